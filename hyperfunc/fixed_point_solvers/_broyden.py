"""The quasi-Newton method of Broyden."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_count
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver, Iteration, Point, Problem


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
        return Iteration(problem.apply, _InverseJacobian(self.memory).advance, self.memory)


class _InverseJacobian:
    """``H = -I + sum_i u_i v_i^T``."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._previous: tuple[Tensor, Tensor] | None = None

    def advance(self, point: Point, active: Tensor, restart: Tensor) -> Tensor:
        z, g = point.z, point.residual
        if self._previous is None:
            self._u = self._v = z.new_empty(z.shape[0], 0, z.shape[1])
        else:
            if self._u.shape[1] == self._memory:
                self._u = self._v = self._u[:, :0]
            z_step, g_step = z - self._previous[0], g - self._previous[1]
            row = _combine(z_step, self._u, self._v) - z_step
            error = z_step + g_step - _combine(g_step, self._v, self._u)
            denominator = (row * g_step).sum(dim=1)
            row_size, g_size = (torch.linalg.vector_norm(v.detach(), dim=1) for v in (row, g_step))
            noise = torch.finfo(z.dtype).eps * row_size * g_size
            sound = active & (denominator.abs() > noise)
            column = error / torch.where(sound, denominator, 1.0)[:, None]
            self._u = _append(self._u, torch.where(sound[:, None], column, 0.0))
            self._v = _append(self._v, row)
            self._u = torch.where(restart[:, None, None], 0.0, self._u)
        self._previous = z, g
        return point.value - _combine(g, self._v, self._u)


def _append(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([rows, row.unsqueeze(-2)], dim=-2)


def _combine(vectors: Tensor, by: Tensor, rows: Tensor) -> Tensor:
    """For each sample ``sum_i (vector . by_i) rows_i``."""
    # rows times a matrix: its product with a column takes up to nine times as long in a batch
    return (vectors.unsqueeze(-2) @ by.mT @ rows)[:, 0]
