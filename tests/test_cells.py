"""The cells of a test fail by name, whatever happens in the others."""

import pytest

from tests.cells import each_cell, thinned


def test_every_cell_runs_and_those_that_fail_are_named() -> None:
    ran = []

    def cells() -> None:
        with each_cell() as cell:
            for name in "abc":
                with cell(name, 1):
                    ran.append(name)
                    if name == "b":
                        pytest.fail("broken")
                    {"a": 0}[name]

    with pytest.raises(
        pytest.fail.Exception, match=r"^2 of 3 cells failed:\n\[b-1\]\n\[c-1\]\n"
    ) as info:
        cells()
    assert ran == ["a", "b", "c"]
    assert "Failed: broken" in str(info.value)
    assert "KeyError: 'c'" in str(info.value)


def test_an_error_between_the_cells_hides_none() -> None:
    def cells(wrong: bool) -> None:
        with each_cell() as cell:
            with cell("a"):
                assert not wrong
            raise KeyError

    with pytest.raises(pytest.fail.Exception, match=r"^1 of 1 cells failed:\n\[a\]") as info:
        cells(wrong=True)
    assert isinstance(info.value.__context__, KeyError)
    with pytest.raises(KeyError):
        cells(wrong=False)
    with pytest.raises(AssertionError, match="no cells"), each_cell():
        pass


def test_a_thinned_product_keeps_each_value() -> None:
    kept = [param.values for param in thinned("abc", range(2)) if not param.marks]
    assert kept == [("a", 0), ("b", 1), ("c", 0)]
    assert len(thinned("abc", range(2))) == 6
