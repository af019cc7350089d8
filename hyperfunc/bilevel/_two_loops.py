"""Loops that make several steps on the params and on the adjoint before one on the hparams."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._types import Leaves
from hyperfunc.bilevel._base import Method, Point, State, check_batch, unbind


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class TwoLoops(Method, abc.ABC):
    """Steps on the params, a solve for the adjoint, and one step on the hparams."""

    num_inner_steps: int
    num_adjoint_steps: int

    least_adjoint_steps: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "num_inner_steps", self.num_inner_steps)
        least = self.least_adjoint_steps
        check_count(self.name, "num_adjoint_steps", self.num_adjoint_steps, least)

    @abc.abstractmethod
    def solve(self, point: Point, batches: list[tuple[Any, ...]], b: Leaves, lr: Any) -> Leaves:
        """The adjoint: an approximate solution of ``Hessian u = b``, a product a batch."""

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        T, Q = self.num_inner_steps, self.num_adjoint_steps
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        batches = unbind(self.name, inner_batches, T + Q + 1)
        inner_lr = point.rate("inner_lr")
        for batch in batches[:T]:
            w = trees.axpy(-inner_lr, point.gradient(batch), point.w)
            point = dataclasses.replace(point, w=w)
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        u = self.solve(point, batches[T : T + Q], outer_params, point.rate("adjoint_lr"))
        d_h = trees.sub(outer_hparams, point.cross(u, batches[-1]))
        h = trees.axpy(-point.rate("outer_lr"), d_h, point.h)
        return point.leave(point.w, u, h)
