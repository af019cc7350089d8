"""The gradient of an inner loss in a step, with its derivatives by either kind of product."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._engine.finite_differences import Products, differenced_gradient
from hyperfunc._engine.flat import split
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves, Loss


@dataclasses.dataclass(frozen=True, eq=False)
class InnerGradient:
    """``(leaves of w, integers of w) -> gradient by w`` of a loss at given arguments.

    ``used`` is a list that holds which leaves the loss uses once that is known, for which None
    stands in the gradient; without it zeros do. A list ``values`` gets the losses.
    """

    loss: Loss
    state: trees.StateSpec
    hparams: Any
    args: tuple[Any, ...]
    tracked: bool
    products: Products = "reverse"

    def __call__(
        self,
        leaves: Leaves,
        others: Leaves = (),
        used: list[bool] | None = None,
        values: list[Tensor] | None = None,
    ) -> tuple[Any, ...]:
        if self.tracked and self.products == "finite_difference":
            grads = self._by_differences(leaves, others, values)
            if used is not None:
                return grads
            pairs = zip(grads, leaves, strict=True)
            return tuple(torch.zeros_like(w) if grad is None else grad for grad, w in pairs)

        def value(*flat: Tensor) -> Tensor:
            return self._value(flat, others, self.hparams, self.args)

        if used is None:
            return autodiff.gradient(value, leaves, create_graph=self.tracked, values=values)
        return autodiff.gradient_used(
            value, leaves, create_graph=self.tracked, used=used, values=values
        )

    def _by_differences(
        self, leaves: Leaves, others: Leaves, values: list[Tensor] | None
    ) -> tuple[Tensor | None, ...]:
        tensors, frame = trees.partition((self.hparams, self.args))

        def value(*flat: Tensor) -> Tensor:
            w, others_, operands = split(flat, len(leaves), len(others))
            return self._value(w, others_, *frame.fill(operands))

        return differenced_gradient(value, leaves, (*others, *tensors), values)

    def _value(self, w: Leaves, others: Leaves, hparams: Any, args: tuple[Any, ...]) -> Tensor:
        at = self.state.fill(w, others), hparams, *args
        return check_scalar(
            call("inner_loss(params, hparams, *args)", self.loss, *at), "inner_loss"
        )
