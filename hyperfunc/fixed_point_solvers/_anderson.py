"""Anderson acceleration."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_count, check_number
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver, Iteration, Point, Problem
from hyperfunc.linear_solvers._anderson import append_row, mixing_coefficients


@dataclasses.dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    r"""Anderson acceleration: the combination of the last steps with the smallest residual.

    With :math:`f_k = f(z_k) - z_k` and the differences :math:`\Delta z_i, \Delta f_i` of the last
    ``memory`` steps,

    .. math::
        z_{k+1} = z_k + \eta f_k - \sum_i \gamma_i (\Delta z_i + \eta \Delta f_i),
        \qquad \gamma = \arg\min_\gamma \| f_k - \sum_i \gamma_i \Delta f_i \|^2
            + \text{ridge} \sum_i \gamma_i^2 \| \Delta f_i \|^2 .

    One evaluation a step, as `Picard`, and fewer steps; it converges for many maps that are no
    contraction. A sample with a full memory and 10 times its smallest residual forgets its memory
    and takes a plain step from its best iterate.

    Args:
        memory: differences to keep, two vectors each; >= 1.
        step_size: :math:`\eta > 0`, "mixing" or "beta" elsewhere.
        ridge: relative regularisation, >= 0, for noisy maps; by default ``10 eps``.

    All other arguments are those of `Picard`; each sample has coefficients of its own.

    Example:
        >>> rotate = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
        >>> f = lambda z, h: rotate @ z + h
        >>> z, stats = hf.fixed_point_solvers.Anderson()(f, torch.zeros(2), torch.ones(2))
        >>> z, stats.num_steps  # 117 with Picard
        (tensor([0.0552, 1.0497]), tensor(3))

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    memory: int = 5
    step_size: float = 1.0
    ridge: float | None = None
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "memory", self.memory)
        check_number(self, "step_size", self.step_size, above=True)
        if self.ridge is not None:
            check_number(self, "ridge", self.ridge)

    def _iteration(self, problem: Problem) -> Iteration:
        return Iteration(problem.apply, _Mixing(self).advance, self.memory)


class _Mixing:
    def __init__(self, solver: Anderson) -> None:
        self._solver = solver
        self._previous: tuple[Tensor, Tensor] | None = None

    def advance(self, point: Point, active: Tensor, restart: Tensor) -> Tensor:
        memory, step_size, ridge = self._solver.memory, self._solver.step_size, self._solver.ridge
        z, f = point.z, point.residual
        new = point.value if step_size == 1 else z + step_size * f
        if self._previous is None:
            self._z_steps = self._f_steps = z.new_empty(z.shape[0], 0, z.shape[1])
            self._alive = restart.new_empty(z.shape[0], 0)
        else:
            old_z, old_f = self._previous
            self._z_steps = append_row(self._z_steps, z - old_z, memory)
            self._f_steps = append_row(self._f_steps, f - old_f, memory)
            alive = torch.cat([self._alive, active[:, None]], dim=1)[:, -memory:]
            self._alive = alive & ~restart[:, None]
            gamma = mixing_coefficients(self._f_steps, f, ridge=ridge, alive=self._alive)
            steps = torch.add(self._z_steps, self._f_steps, alpha=step_size)
            new = new - (gamma[:, None] @ steps)[:, 0]
        self._previous = z, f
        return new
