"""Units of a right-hand side in which the squares of its entries neither overflow nor underflow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, code_where
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator, parts

Solve = TypeVar("Solve", bound=Callable[..., Any])

# In float32 squares lie between 2^-149 and 2^128, and a solve compares those of residuals.
_LEAST, _MOST = 2.0**-80, 2.0**80  # of the squared norm, within which nothing is done
_SMALL, _LARGE = 2.0**-75, 2.0**84  # the units outside of that, powers of two

_NORMAL = 2.0**-126  # a solution below has lost digits, or all
_FOR_SQUARES = 2.0**60


def in_units(solve: Solve) -> Solve:
    """A method ``(operator, b, x0)`` that solves in other units where squares are no numbers."""

    @functools.wraps(solve)
    def scaled(
        self: Any, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, Any]:
        unit = _unit(self, b)
        if unit is None:
            return solve(self, operator, b, x0)  # type: ignore[no-any-return]
        start = None if x0 is None else trees.scale(1 / unit, x0)
        scaled_x, stats = solve(self, operator, trees.scale(1 / unit, b), start)
        x = trees.scale(unit, scaled_x)
        size = trees.scale(_FOR_SQUARES, scaled_x)
        squares = trees.dot(size, size)
        lost = (squares > 0) & (squares < (_NORMAL * _FOR_SQUARES / unit) ** 2)
        result = code_where(
            lost & (stats.result == RESULTS.success), RESULTS.stagnation, stats.result
        )
        result = code_where(trees.all_finite(x), result, RESULTS.nonfinite)
        return x, stats._replace(residual_norm=unit * stats.residual_norm, result=result)

    return cast(Solve, scaled)


def _unit(solver: AbstractLinearSolver, b: Leaves) -> Tensor | None:
    """The unit, or None for 1: for wide dtypes, and where an absolute tolerance is in that unit."""
    if trees.accumulation_dtype(b) != torch.float32 or any(u.dtype == torch.float16 for u in b):
        return None
    if any(getattr(part, "atol", 0) for part in parts(solver)):
        return None
    bb = trees.dot(b, b)
    fine = (bb >= _LEAST) & (bb <= _MOST)
    if bb.device.type == "cpu" and batching.can_look(bb) and batching.all_true(fine):
        return None
    return torch.where(bb < _LEAST, _SMALL, torch.where(bb > _MOST, _LARGE, 1.0)).to(bb.dtype)
