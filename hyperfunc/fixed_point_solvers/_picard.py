"""The plain iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_number
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver, Iteration, Point, Problem


@dataclasses.dataclass(frozen=True)
class Picard(AbstractFixedPointSolver):
    r"""The plain iteration :math:`z_{k+1} = z_k + \eta \, (f(z_k) - z_k)`.

    Converges for a contraction, with its factor; with a step size :math:`\eta < 1` also for maps
    whose Jacobian has eigenvalues beyond -1.

    Args:
        maxiter: largest number of steps, >= 0. With ``rtol=0, atol=0`` exactly this many, a
            success, without any host synchronisation but for the check of ``throw`` at the end.
        rtol: relative tolerance, >= 0; by default ``eps ** 0.75`` for the coarsest dtype, that is
            1.8e-12 in float64 and 6.4e-6 in float32. Below ``eps`` it counts as ``eps``.
        atol: absolute tolerance, >= 0.
        step_size: :math:`\eta > 0`.
        batch_dim: the dimension of all leaves that counts samples; None: one problem.
        throw: whether non-finite values and divergence raise; else they are result codes.

    A residual that is larger at the end than at the start is reported as divergence.

    Example:
        >>> solver = hf.fixed_point_solvers.Picard(batch_dim=0)
        >>> f = lambda z, h, x: h * z + x
        >>> z, stats = solver(f, torch.zeros(3), torch.tensor([0.0, 0.25, 0.5]), torch.ones(3))
        >>> z
        tensor([1.0000, 1.3333, 2.0000])
        >>> stats.num_steps
        tensor([ 1,  9, 17])
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    step_size: float = 1.0
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "step_size", self.step_size, above=True)

    def _iteration(self, problem: Problem) -> Iteration:
        return Iteration(problem.evaluate, lambda point: (), self._step)

    def _step(
        self, number: Any, point: Point, memory: Any, active: Tensor, restart: Tensor
    ) -> tuple[Tensor, Any]:
        if self.step_size == 1:
            return point.value, memory
        return torch.lerp(point.z, point.value, self.step_size), memory
