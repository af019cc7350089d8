"""The quasi-Newton method of Broyden."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_count
from hyperfunc.fixed_point_solvers._base import (
    AbstractFixedPointSolver,
    Iteration,
    Point,
    Problem,
    is_first,
    room,
)


@dataclasses.dataclass(frozen=True)
class Broyden(AbstractFixedPointSolver):
    r"""Broyden's method: Newton's with an inverse Jacobian that is learned from the steps.

    For the root of :math:`g(z) = f(z) - z`, from :math:`H_0 = -I`,

    .. math::
        z_{k+1} = z_k - H_k g_k, \qquad
        H_{k+1} = H_k + \frac{(\Delta z - H_k \Delta g) \, \Delta z^\top H_k}
            {\Delta z^\top H_k \Delta g} .

    One evaluation a step. The updates are all forgotten when there is no room for another, and one
    with a denominator at rounding level is left out. Growth is dealt with as in `Anderson`.

    Args:
        memory: updates to keep, two vectors each; >= 1.

    All other arguments are those of `Picard`; each sample has an inverse Jacobian of its own.

    Example:
        >>> f = lambda z, h: torch.tanh(h - 3 * z)  # not a contraction
        >>> z, stats = hf.fixed_point_solvers.Broyden()(f, torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> z
        tensor([0.2487, 0.4886])

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, 1965; limited
        memory: Kelley, Iterative methods for linear and nonlinear equations, 1995, chapter 7.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    memory: int = 20
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "memory", self.memory)

    def _iteration(self, problem: Problem) -> Iteration:
        return Iteration(problem.evaluate, self._start, self._step, self.memory)

    def _start(self, point: Point) -> _Memory:
        batch, size = point.z.shape  # not len, of which torch.export makes a constant
        rows = point.z.new_zeros(batch, room(point.z, self.memory), size)
        return _Memory(point.z, point.residual, rows, rows)

    def _step(
        self, number: Any, point: Point, last: _Memory, active: Tensor, restart: Tensor
    ) -> tuple[Tensor, _Memory]:
        z, g = point.z, point.residual
        if is_first(number):
            return point.value, last
        u, v = last.u, last.v
        full = (number - 1) % self.memory == 0
        if isinstance(full, Tensor):
            u, v = (torch.where(full, 0.0, rows) for rows in (u, v))
        elif full:
            u = v = u[:, :0]
        z_step, g_step = z - last.z, g - last.g
        row = _combine(z_step, u, v) - z_step
        error = z_step + g_step - _combine(g_step, v, u)
        denominator = (row * g_step).sum(dim=1)
        row_size, g_size = (torch.linalg.vector_norm(v.detach(), dim=1) for v in (row, g_step))
        noise = torch.finfo(z.dtype).eps * row_size * g_size
        sound = active & (denominator.abs() > noise)
        column = error / torch.where(sound, denominator, 1.0)[:, None]
        u = _append(u, torch.where(sound[:, None], column, 0.0), self.memory)
        v = _append(v, row, self.memory)
        u = torch.where(restart[:, None, None], 0.0, u)
        return point.value - _combine(g, v, u), _Memory(z, g, u, v)


class _Memory(NamedTuple):
    """The last point, and the inverse Jacobian ``H = -I + sum_i u_i v_i^T``."""

    z: Tensor
    g: Tensor
    u: Tensor
    v: Tensor


def _append(rows: Tensor, row: Tensor, most: int) -> Tensor:
    """Rows with one more, without the first if they would be too many."""
    return torch.cat([rows, row.unsqueeze(-2)], dim=-2)[:, -most:]


def _combine(vectors: Tensor, by: Tensor, rows: Tensor) -> Tensor:
    """For each sample ``sum_i (vector . by_i) rows_i``."""
    # rows times a matrix: its product with a column takes up to nine times as long in a batch
    return (vectors.unsqueeze(-2) @ by.mT @ rows)[:, 0]
