"""Products of cases: a part of them in `make test`, and many small ones in one test."""

import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest


def thinned(*axes: Iterable[Any], every: int = 2) -> list[Any]:
    """The product of axes as parameters, of which one in ``every`` is not marked slow.

    Those are the cells whose positions add up to a multiple of ``every``. So each value of an axis
    that is crossed with ``every`` others or more is kept, each time with others of them.
    """
    return [
        pytest.param(
            *(value for _, value in cell),
            id="-".join(_name(value) for _, value in cell),
            marks=() if sum(i for i, _ in cell) % every == 0 else pytest.mark.slow,
        )
        for cell in itertools.product(*map(enumerate, axes))
    ]


def slow_but(*kept: Any, of: Iterable[Any]) -> list[Any]:
    """Parameters that are all marked slow, but for those that are kept in `make test`.

    A tuple is the values of several parameters.
    """
    values = list(of)
    assert all(value in values for value in kept), f"of {kept} some are none of {values}"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in kept else pytest.mark.slow,
        )
        for value in values
    ]


@contextlib.contextmanager
def each_cell() -> Iterator[Callable[..., contextlib.AbstractContextManager[None]]]:
    """Run the cells of a product in one test, all of them, and name each that fails.

    with each_cell() as cell:
        for name in ...:
            with cell(name):
                ...
    """
    failures: list[str] = []
    count = 0

    @contextlib.contextmanager
    def cell(*values: Any) -> Iterator[None]:
        nonlocal count
        count += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            name = "-".join(map(_name, values))
            failures.append(f"[{name}]\n" + "".join(traceback.format_exception(error)))

    try:
        yield cell
    finally:  # what is raised between the cells does not hide those that failed
        if failures:
            names = "\n".join(failure.partition("\n")[0] for failure in failures)
            pytest.fail(
                f"{len(failures)} of {count} cells failed:\n{names}\n\n" + "\n".join(failures)
            )
    assert count, "there are no cells"


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
