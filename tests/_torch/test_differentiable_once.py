"""A gradient that has no derivative, by @once_differentiable, is refused where one is needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import hyperfunc as hf
from tests.cells import each_cell
from tests.problems import CubeOnce

F64 = torch.float64


class OfOnePiece(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


def outer_loss(w: Tensor, h: Tensor) -> Tensor:
    return (w**2).sum()


def solver_of(loss: Callable[..., Tensor]) -> Any:
    return hf.minimize(loss, hf.optim.sgd(0.05), 5, init=lambda h: torch.ones(3, dtype=F64) + 0 * h)


ROUTES: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "hypergrad": lambda solver, method, h: hf.hypergrad(solver, outer_loss, method=method)(h),
    "vmap": lambda solver, method, h: torch.func.vmap(
        hf.hypergrad(solver, outer_loss, method=method)
    )(h.expand(2)),
    "grad": lambda solver, method, h: torch.func.grad(
        lambda h: outer_loss(hf.implicit_diff(solver, method=method)(h), h)
    )(h),
    "backward": lambda solver, method, h: outer_loss(
        hf.implicit_diff(solver, method=method)(h.clone().requires_grad_()), h
    ).backward(),
    "products": lambda solver, method, h: hf.diagnose(
        solver(h), h, inner_loss=solver.step.inner_loss
    ),
}
METHODS = ("reverse_unroll", "reverse", "forward", "cg")


@pytest.mark.parametrize("operation", [CubeOnce, OfOnePiece])
@pytest.mark.parametrize("scaled", [False, True])  # torch notices neither, for other reasons
def test_it_is_refused_by_name(operation: Any, scaled: bool) -> None:
    def loss(w: Tensor, h: Tensor) -> Tensor:
        return (h if scaled else 1.0) * operation.apply(w).sum() + h * (w**2).sum()

    solver, h = solver_of(loss), torch.tensor(0.3, dtype=F64)
    with each_cell() as cell:
        for route, call in ROUTES.items():
            if operation is OfOnePiece and route in ("vmap", "grad"):
                continue  # which torch.func does not take
            for method in METHODS:
                name = rf"{operation.__qualname__}\.backward, .*@once_differentiable.*first_order"
                with cell(route, method), pytest.raises(RuntimeError, match=name):
                    call(solver, method, h)


def test_where_first_derivatives_are_enough_it_is_right() -> None:
    """Of the data, of hparams, of the outer loss, and by the first-order method."""
    x, h = torch.linspace(0.5, 1.0, 3, dtype=F64), torch.tensor(0.3, dtype=F64)

    def losses(cube: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
        def inner(w: Tensor, h: Tensor) -> Tensor:
            return ((w - cube(x)) ** 2).sum() + cube(h) * (w**4).sum()

        return inner, lambda w, h: cube(w).sum()

    with each_cell() as cell:
        for method in METHODS:
            for route in ("alone", "vmap"):
                if method == "forward":  # which takes its products as transposes
                    fn = hf.hypergrad(
                        solver_of(losses(CubeOnce.apply)[0]), outer_loss, method=method
                    )
                    with cell(method), pytest.raises(RuntimeError, match="once_differentiable"):
                        fn(h)
                    continue
                found = []
                for cube in (CubeOnce.apply, lambda x: x**3):
                    inner, outer = losses(cube)
                    fn = hf.hypergrad(solver_of(inner), outer, method=method)
                    found.append(fn(h) if route == "alone" else torch.func.vmap(fn)(h.expand(2)))
                with cell(method, route):
                    assert found[1].abs().min() > 1e-3
                    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
        with cell("first order"):
            found = [
                hf.hypergrad(
                    solver_of(lambda w, h, cube=cube: cube(w - h).sum()),
                    outer_loss,
                    method=hf.FirstOrder(init=lambda h: torch.ones(3, dtype=F64) * h),
                )(h)
                for cube in (OfOnePiece.apply, lambda x: x**3)
            ]
            torch.testing.assert_close(*found, rtol=1e-12, atol=0)
