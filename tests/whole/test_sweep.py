"""Every module of torch, by every route to a hypergradient: right, or refused with advice."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import hyperfunc as hf
from hyperfunc._torch.derivative_rules import _mode
from tests.whole import sweep, sweep_cases
from tests.whole.sweep import METHODS, RAW, REFUSED, RIGHT, ROUTES, WRONG

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

PLAIN = tuple(route for route in ROUTES if route != "compile")
FIRST = [
    next(case for case in sweep_cases.CASES if case.layer == layer)
    for layer in dict.fromkeys(case.layer for case in sweep_cases.CASES)
]

# One method each: every route in every quick run, at little cost.
QUICK = (
    *(
        "LayerNorm()",
        "BatchNorm1d(affine=True)",
        "ConvTranspose1d",
        "EmbeddingBag(scale",
        "RReLU()",
    ),
    *("SyncBatchNorm()", "MultiheadAttention(batch_first=True) masked", "F.mse_loss()"),
)


def check(cells: Sequence[sweep.Cell]) -> None:
    bad = [str(cell) for cell in cells if cell.kind in (RAW, WRONG)]
    assert not bad, "\n".join(bad)
    for cell in cells:
        known = (
            cell.case.startswith(n) and cell.route in r for n, r in sweep_cases.REFUSED.items()
        )
        random = cell.route == "compile" and "draws random numbers" in cell.detail
        assert cell.kind != REFUSED or random or any(known), str(cell)


def test_every_class_is_swept_or_left_out_for_a_reason() -> None:
    classes = set(nn.modules.__all__)
    assert classes - sweep_cases.modules_swept() == set(sweep_cases.LEFT_OUT) & classes
    assert sweep_cases.functions_named() <= sweep_cases.functions_swept()
    names = [case.name for case in sweep_cases.CASES]
    assert len(set(names)) == len(names)


def test_lazy_modules_are_refused_before_their_first_call() -> None:
    layer = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="lazy"):
        hf.functional(layer)
    layer(torch.ones(1, 3))
    assert type(layer) is nn.Linear


def test_some_of_it() -> None:
    cases = [
        next(case for case in sweep_cases.CASES if case.name.startswith(name)) for name in QUICK
    ]
    methods = itertools.cycle(METHODS)
    check([cell for case in cases for cell in sweep.run(case, [next(methods)], PLAIN)])


def test_it_sees_what_torch_has_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mode, "_rows", {})
    norm, attention = (
        next(case for case in sweep_cases.CASES if case.name.startswith(name))
        for name in ("LayerNorm()", "MultiheadAttention(batch_first=True) masked")
    )
    kinds = [cell.kind for cell in sweep.run(norm, ["reverse"], ["one by one", "vmap"])]
    assert kinds == [RIGHT, WRONG]
    routes = ["one by one", "grad of vmap"]
    kinds = [cell.kind for cell in sweep.run(attention, ["reverse_unroll"], routes)]
    assert kinds == [REFUSED, RAW]


@pytest.mark.slow
@pytest.mark.parametrize("layer", [case.layer for case in FIRST])
def test_all_of_it(layer: str) -> None:
    cases = [case for case in sweep_cases.CASES if case.layer == layer]
    check([cell for case in cases for cell in sweep.run(case, METHODS, PLAIN)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in FIRST if not case.is_function], ids=lambda case: case.layer
)
def test_compiled(case: sweep_cases.Case) -> None:
    """By one method and with default options, for it takes seconds to compile."""
    check(list(sweep.run(case, ["reverse"], ["compile"])))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_operations(part: int) -> None:
    from tests.whole import sweep_operations  # takes seconds to import

    cells = list(sweep_operations.run(sweep_operations.names()[part::8]))
    assert not [str(cell) for cell in cells if cell.kind == WRONG]
    assert sum(cell.kind == RIGHT for cell in cells) > 200
