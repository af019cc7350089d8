"""Oracle calls of one update of every loop: counted by a loss, beside the tables."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf
from tests.benchmarks.bilevel import AID, METHODS, Problem, main, make

KINDS = ("gradients", "products", "cross", "outer")
TOGETHER = {
    "soba",
    "saba",
    "ma_soba",
    "srba",
    "truncated",
}  # one pass serves the gradient and both products
COUNTS = ("passes", "products", "cross", "outer")
GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "bilevel_methods.md"


class Counted(torch.autograd.Function):
    """A loss ``w A w / 2 - w B h``, whose derivatives are counted when they are taken."""

    @staticmethod
    def forward(w: Tensor, h: Tensor, A: Tensor, B: Tensor, counts: Any) -> Tensor:
        return 0.5 * w @ A @ w - w @ B @ h

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.counts = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        w, h, *rest = ctx.saved_tensors
        w, h = Reached.apply(w, "products", ctx.counts), Reached.apply(h, "cross", ctx.counts)
        by_w, by_h = Gradient.apply(w, h, *rest, ctx.counts)
        return grad * by_w, grad * by_h, None, None, None


class Gradient(torch.autograd.Function):
    """Its gradient: a pass through the loss."""

    @staticmethod
    def forward(w: Tensor, h: Tensor, A: Tensor, B: Tensor, counts: Any) -> Any:
        counts["passes"] += 1
        return A @ w - B @ h, -B.T @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, *matrices, _ = inputs
        ctx.save_for_backward(*matrices)

    @staticmethod
    def backward(ctx: Any, v: Tensor, by_h: Tensor) -> Any:
        A, B = ctx.saved_tensors
        return A @ v - B @ by_h, -B.T @ v, None, None, None


class Reached(torch.autograd.Function):
    """The identity, which counts second derivatives: it is run where one is asked for alone."""

    @staticmethod
    def forward(x: Tensor, kind: str, counts: Any) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.kind, ctx.counts = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.counts[ctx.kind] += 1
        return grad, None, None


def counted(name: str) -> dict[str, int]:
    """What one update in the middle of a run takes, with the settings of the benchmark."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.eye(4, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    counts = dict.fromkeys(COUNTS, 0)

    def inner_loss(w: Tensor, h: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return Counted.apply(w, h, A, B, counts)

    def outer_loss(w: Tensor, h: Tensor) -> Tensor:
        value = 0.5 * (w**2).sum() + 0.5 * (h**2).sum()

        def add(grad: Tensor) -> None:
            counts["outer"] += 1

        value.register_hook(add)
        return value

    method = METHODS[name]
    data: Any = (A, B)
    problem = Problem(
        "", inner_loss, outer_loss, data, (), A[0], B[0], torch.clone, 0.1, {"soba": 0.1}, 1
    )
    loop = make(name, problem, 1.0, 2)
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    state = loop.init(start, start[:3])
    if method.width:
        data = tuple(leaf.expand(method.count(method.width), *leaf.shape) for leaf in data)
    indices = (0, 1) if name == "saba" else ()
    state = loop.update(state, data, (), *indices)
    counts.update(dict.fromkeys(COUNTS, 0))
    loop.update(state, data, (), *indices)
    return dict(counts)


@pytest.mark.parametrize("name", METHODS)
def test_oracle_calls_are_those_of_the_table(name: str) -> None:
    """Where a product or a cross term has a pass of its own, its gradient is no oracle call."""
    gradients, products, cross, outer = (
        METHODS[name].count(getattr(METHODS[name], kind)) for kind in KINDS
    )
    passes = gradients if name in TOGETHER else gradients + products + cross
    assert tuple(counted(name).values()) == (passes, products, cross, outer)


def test_every_loop_has_a_row_and_the_guide_says_the_same() -> None:
    helpers = {"module_loop", "power_decay", "power_growth"}
    loops = {name for name in hf.bilevel.__all__ if name.islower()} - helpers
    assert set(METHODS) == loops
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", GUIDE.read_text(), flags=re.MULTILINE))
    for name, method in METHODS.items():
        written = [getattr(method, kind).replace(" * ", " ") for kind in KINDS]
        assert [cell.strip(" $") for cell in rows[name].split("|")][:4] == written


@pytest.mark.slow
def test_the_comparison_writes_a_table_and_pictures(tmp_path: Path) -> None:
    words = ["--problem", "cleaning", "--methods", "soba", "f2sa", "vrbo", AID, "--scale", "0.02"]
    results = main([*words, f"--out={tmp_path}", f"--plot={tmp_path}", "--seconds=60"])
    [runs] = results.values()
    for name in ("soba", "f2sa", AID):
        assert runs[name]["gaps"][-1] < 0.8 * runs[name]["gaps"][0]
        assert runs[name]["calls"][-1] >= 0.02 * 400 * 800
    assert len(runs) == 4
    assert "| soba |" in (tmp_path / "bilevel.md").read_text()
    saved = json.loads((tmp_path / "bilevel.json").read_text())["results"]
    assert saved.keys() == results.keys()
    assert 10_000 < (tmp_path / "bilevel_cleaning.png").stat().st_size < 200_000
