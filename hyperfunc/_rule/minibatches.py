"""The linearisation of a condition of which only minibatches are ever evaluated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from hyperfunc._engine import trees
from hyperfunc._rule.conditions import BoundCondition, Condition
from hyperfunc._torch import autodiff, batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers import StochasticAID

SECOND_DERIVATIVE = (
    "a second derivative through StochasticAID with a sampler: the solve and its derivative would "
    "share their minibatches, and the result would be biased. Use a deterministic method such as "
    "method='cg' for this, or .detach() the hypergradient if no derivative of it is meant"
)


@dataclasses.dataclass(frozen=True, eq=False)
class MinibatchLinearization:
    """Stands in for `autodiff.Linearization` under a stochastic method.

    `at` linearises with respect to ``w`` on one minibatch; the products, with respect to ``theta``,
    are means over the minibatches that come after those of the steps.
    """

    method: StochasticAID
    bound: BoundCondition
    w: Leaves
    theta: Leaves
    wrt: tuple[int, ...]

    def at(self, step: int) -> autodiff.Linearization:
        """The condition's function on the minibatch of a step."""
        return self._linearize(step, ())

    def pull_used(self, cotangents: Leaves, group: int) -> Leaves:
        """The mean product with the transposed Jacobian."""
        self._refuse_replaced(self.wrt)
        return self._mean("pull", cotangents, group)

    def push(self, tangents: Leaves, group: int) -> Leaves:
        """The mean product with the Jacobian."""
        # forward mode fills in zeros for the tensors that it is not asked about
        pairs = zip(self.wrt, tangents, strict=True)
        self._refuse_replaced(
            [i for i, tangent in pairs if batching.any_true((tangent != 0).any())]
        )
        return self._mean("push", tangents, group)

    def _refuse_replaced(self, wrt: Sequence[int]) -> None:
        replaced = any(index >= self.bound.arguments.num_hparams for index in wrt)
        if replaced and not callable(self.method.sampler):
            raise ValueError(
                "sampler replaces *args, so that derivatives with respect to them are lost. Pass "
                "a function (step, *args) -> args that indexes into its arguments, or .detach() "
                "the arguments"
            )

    def _mean(self, product: str, vector: Leaves, group: int) -> Leaves:
        assert group == 1
        first, count = self.method.num_steps, self.method.num_cross_batches
        values = (
            getattr(self._linearize(step, self.wrt), product)(vector, 1)
            for step in range(first, first + count)
        )
        return trees.scale(1 / count, functools.reduce(trees.add, values))

    def _linearize(self, step: int, wrt: tuple[int, ...]) -> autodiff.Linearization:
        condition, proximal = self.bound.condition, self.bound.proximal
        if proximal is None:
            sampled: Callable[..., Any] = self.method.on_minibatch(condition.fn, step)
        else:  # its regulariser depends on no sample, and is added elsewhere
            loss = self.method.on_minibatch(proximal.loss, step)
            sampled = dataclasses.replace(proximal, loss=loss)
        bound = dataclasses.replace(self.bound, condition=Condition(condition.kind, sampled))
        return bound.linearize(self.w, self.theta, wrt)
