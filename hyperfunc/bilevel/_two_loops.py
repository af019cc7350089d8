"""Loops that make several steps on the params and on the adjoint before one on the hparams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hyperfunc._engine import trees
from hyperfunc._types import Leaves
from hyperfunc.bilevel._base import Loop, Point, Settings, State, check_batch, check_count, unbind


def two_loops(
    name: str,
    settings: Settings,
    solve: Callable[[Point, list[tuple[Any, ...]], Leaves, Any], Leaves],
    num_inner_steps: int,
    num_adjoint_steps: int,
) -> Loop:
    """Steps on the params, a solve for the adjoint, and one step on the hparams."""
    T = check_count(name, "num_inner_steps", num_inner_steps, 1)
    Q = check_count(name, "num_adjoint_steps", num_adjoint_steps, 0)

    def update(state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> State:
        point = settings.enter(state)
        check_batch(name, "outer_batch", outer_batch)
        batches = unbind(name, inner_batches, T + Q + 1)
        inner_lr = point.rate("inner_lr")
        for batch in batches[:T]:
            w = trees.axpy(-inner_lr, point.gradient(batch), point.w)
            point = dataclasses.replace(point, w=w)
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        u = solve(point, batches[T : T + Q], outer_params, point.rate("adjoint_lr"))
        d_h = trees.sub(outer_hparams, point.cross(u, batches[-1]))
        h = trees.axpy(-point.rate("outer_lr"), d_h, point.h)
        return point.leave(point.w, u, h)

    return Loop(settings.init, update)
