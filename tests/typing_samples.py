"""What type checkers make of the public functions; run by test_typing.py, never imported."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import hyperfunc as hf

Weights = dict[str, Tensor]


def loss(w: Tensor, h: Weights, x: Tensor) -> Tensor:
    return (w * x).sum() + h["reg"] * (w**2).sum()


def loss_and_aux(w: Tensor, h: Weights, x: Tensor) -> tuple[Tensor, str]:
    return loss(w, h, x), "aux"


def solve(h: Weights, x: Tensor) -> Tensor:
    return -x / (2 * h["reg"])


h, x = {"reg": torch.ones(())}, torch.ones(3)

assert_type(hf.hypergrad(solve, loss, inner_loss=loss)(h, x), Weights)
assert_type(
    hf.hypergrad(solve, loss_and_aux, inner_loss=loss, has_aux=True)(h, x), tuple[Weights, Any]
)
assert_type(hf.hypergrad_and_value(solve, loss, inner_loss=loss)(h, x), tuple[Weights, Tensor])
assert_type(
    hf.hypergrad_and_value(solve, loss_and_aux, inner_loss=loss, has_aux=True)(h, x),
    tuple[Weights, tuple[Tensor, str]],
)
assert_type(
    hf.hypergrad_and_solution(solve, loss, inner_loss=loss, method=hf.CG(maxiter=3))(h, x),
    tuple[Weights, hf.Solution],
)
assert_type(hf.implicit_diff(solve, inner_loss=loss)(h, x), Tensor)


@hf.hypergrad(outer_loss=loss, inner_loss=loss, method="cg")
def decorated(h: Weights, x: Tensor) -> Tensor:
    return solve(h, x)


@hf.hypergrad_and_value(outer_loss=loss_and_aux, inner_loss=loss, has_aux=True)
def with_aux(h: Weights, x: Tensor) -> Tensor:
    return solve(h, x)


@hf.implicit_diff(inner_loss=loss)
def differentiable(h: Weights, x: Tensor) -> Tensor:
    return solve(h, x)


assert_type(decorated(h, x, adjoint_init=x), Weights)
assert_type(decorated.__wrapped__(h, x), Any)
assert_type(with_aux(h, x), tuple[Weights, tuple[Tensor, str]])
assert_type(differentiable(h, x), Tensor)

hf.hypergrad(solve, loss, inner_los=loss)  # wrong: no such keyword
hf.hypergrad(solve, "loss", inner_loss=loss)  # wrong: not a function
decorated(x, x)  # wrong: hparams of another type
differentiable(h)  # wrong: an argument is missing
