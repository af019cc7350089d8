"""`check_hypergrad` by routes: vmap, compiled code and one more derivative against one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperfunc as hf

F64 = torch.float64


class _Square(torch.autograd.Function):
    """``x^2``, whose parts are put together by subclasses."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


class Right(_Square):
    generate_vmap_rule = True


class MixesTasks(_Square):
    """A rule that subtracts a mean over the batch, as one forgets which dimension is which."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int | None]:
        y = MixesTasks.apply(x)
        return y - 0.3 * (y - y.mean(in_dims[0], keepdim=True)), in_dims[0]


class OneDerivative(_Square):
    """Right once, wrong when it is differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * cotangent


class TwoDerivatives(_Square):
    """The derivative of the backward pass is right, and a constant in the next one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**4 / 12

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Cube.apply(x) * cotangent


class Cube(_Square):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3 / 3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.detach() ** 2 * cotangent


def problem(square: Any) -> tuple[Any, Any]:
    """An inner solver that the function is used in, and an outer loss."""

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return square.apply(w - x).log1p().sum() + h.exp() * (w**2).sum()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 5, init=lambda h, x: torch.ones_like(x))
    return solver, lambda w, h, x: ((w - 2) ** 2 * h).sum()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
H = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64)


def causes(report: Any) -> set[str]:
    return {name for name, cause in report.causes._asdict().items() if bool(cause)}


@pytest.mark.parametrize("method", ["reverse_unroll", "forward", "cg"])
def test_a_wrong_vmap_rule_is_named(method: str) -> None:
    solver, outer = problem(MixesTasks)
    if method == "cg":
        solver = hf.minimize(solver.step.inner_loss, hf.optim.sgd(lr=0.3), 60, init=solver.init)
    report = hf.check_hypergrad(solver, outer, H, X, method=method, in_dims=0, num_directions=1)
    assert causes(report) == {"route"}, report
    assert list(report.operations) == ["MixesTasks"]
    assert float(report.routes["vmap"]) > 1e-3
    assert "route" in str(report)
    assert "It is MixesTasks" in str(report)
    if method != "cg":  # without a batch of the user's, by one that is made
        assert causes(hf.check_hypergrad(solver, outer, H[0], X[0], method=method)) == {"route"}
    assert hf.check_hypergrad(solver, outer, H[0], X[0], method=method, routes=()).passed


def test_right_rules_pass() -> None:
    solver, outer = problem(Right)
    report = hf.check_hypergrad(
        solver, outer, H, X, method="reverse", in_dims=0, routes=("vmap", "derivative")
    )
    assert report.passed, report
    assert report.operations == {}
    assert all(float(off) < 1e-6 for off in report.routes.values())
    assert "against one task at a time: vmap" in str(report)


def test_a_derivative_of_torch_that_is_right_by_our_rules_passes() -> None:
    apply, w0 = hf.functional(
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    )

    def loss(w: Any, h: Tensor, x: Tensor) -> Tensor:
        return (apply(w, x) ** 2).mean() * h.exp()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.1), 2, init=lambda h, x: w0)
    report = hf.check_hypergrad(
        solver, loss, H[0], X, method="reverse", routes=("vmap", "derivative"), num_directions=1
    )
    assert report.passed, report


def test_a_derivative_that_is_wrong_by_one_more_is_named() -> None:
    solver, outer = problem(TwoDerivatives)
    report = hf.check_hypergrad(solver, outer, H[0], X[0], method="reverse", routes=("derivative",))
    assert causes(report) == {"route"}, report
    assert set(report.operations) <= {"TwoDerivatives", "Cube"}
    assert report.operations


def test_what_is_wrong_one_by_one_is_no_fault_of_a_route() -> None:
    solver, outer = problem(OneDerivative)
    report = hf.check_hypergrad(solver, outer, H[0], X[0], method="reverse")
    assert not report.passed
    assert "route" not in causes(report)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_compiled_code_is_a_route() -> None:
    report = hf.check_hypergrad(
        *problem(Right), H[0], X[0], method="reverse", routes=("compile",), num_directions=1
    )
    assert report.passed, report
    assert set(report.routes) == {"compile"}


def test_code_that_cannot_be_mapped_is_left_out_unless_asked_for() -> None:
    def solve(h: Tensor) -> Tensor:
        return h / 2 if float(h.detach()) > 0 else 1 - h

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return w**2

    report = hf.check_hypergrad(solve, outer, H[2], method="reverse_unroll")
    assert report.passed, report
    assert report.routes == {}
    with pytest.raises(RuntimeError, match="chunk_size=1"):
        hf.check_hypergrad(solve, outer, H[2], method="reverse_unroll", routes=("vmap",))
    with pytest.raises(ValueError, match="routes holds 'nest'; expected some of 'vmap'"):
        hf.check_hypergrad(solve, outer, H[2], routes=("nest",))  # type: ignore[arg-type]
