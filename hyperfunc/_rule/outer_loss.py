"""The outer loss on flat tensors, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._engine.user_functions import call
from hyperfunc._rule.implicit import ImplicitProblem
from hyperfunc._torch import autodiff, sharding
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves, TensorTree


def mean_outer_gradient(
    outer_losses: list[Callable[..., Any]],
    has_aux: bool,
    problem: ImplicitProblem,
    w: Leaves,
    theta: Leaves,
) -> tuple[Tensor, Any, Leaves]:
    """The mean of the outer losses, what they gave as aux, and the gradient by params and hparams.

    Losses (of minibatches) are evaluated one by one, so that one graph at a time is held.
    """
    assert problem.bound is not None
    arguments, bound, n = problem.arguments, problem.bound, len(w)
    auxes = []
    total: Leaves = ()
    for outer_loss in outer_losses:
        outer = OuterLoss(outer_loss, has_aux)
        linearized = autodiff.Linearization(
            lambda *leaves, outer=outer: outer(
                bound.params(leaves[:n], leaves[n:]), *arguments.unflatten(leaves[n:])
            ),
            (*w, *theta),
            (tuple(range(n + arguments.num_hparams)),),
            has_aux=True,
        )
        outer.refuse_captured(linearized)
        (value,) = linearized.outputs
        result = (value, *linearized.pull((torch.ones_like(value),)))
        total = trees.add(total, result) if total else result
        auxes.append(outer.unflatten_aux(linearized.aux))
    if len(outer_losses) == 1:
        return total[0], auxes[0], total[1:]
    value, *gradient = trees.scale(1 / len(outer_losses), total)
    return value, tuple(auxes) if has_aux else (), tuple(gradient)


class OuterLoss:
    """The outer loss as ``-> ((value,), tensors of aux)``, remembering how aux was laid out."""

    def __init__(self, outer_loss: Callable[..., Any], has_aux: bool) -> None:
        self._outer_loss = outer_loss
        self._has_aux = has_aux
        self._aux_frame: trees.Frame | None = None

    def __call__(
        self, params: TensorTree, hparams: TensorTree, *args: Any
    ) -> tuple[Leaves, Leaves]:
        role = "outer_loss(params, hparams, *args)"
        output = call(role, self._outer_loss, params, hparams, *args)
        if not self._has_aux:
            return (sharding.replicate(check_scalar(output, "outer_loss")),), ()
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"outer_loss returned {type(output).__name__}; expected a tuple (scalar, aux), "
                f"since has_aux=True"
            )
        value, aux = output
        tensors, self._aux_frame = trees.partition(aux)
        trees.refuse_holders(self._aux_frame.constants, self._aux_frame.spec, "aux")
        return (sharding.replicate(check_scalar(value, "outer_loss")),), tensors

    def refuse_captured(self, linearized: autodiff.Linearization) -> None:
        if linearized.captures_gradient and torch.is_grad_enabled():
            raise ValueError(captured_message("outer_loss"))

    def unflatten_aux(self, tensors: Leaves) -> Any:
        return () if self._aux_frame is None else self._aux_frame.fill(tensors)
