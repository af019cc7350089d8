"""Anderson acceleration."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from hyperfunc._engine.checks import check_count, check_number
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver, Iteration, Point, Problem
from hyperfunc.linear_solvers._anderson import Window


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
        self._slot = 0
        self._previous: tuple[Tensor, Tensor] | None = None

    def advance(self, point: Point, active: Tensor, restart: Tensor) -> Tensor:
        step_size, f = self._solver.step_size, point.residual
        new = plain = point.value if step_size == 1 else point.z + step_size * f
        if self._previous is None:
            self._window = Window.empty(f)
        else:
            old_f, old_plain = self._previous
            window = self._window.put(f - old_f, plain - old_plain, self._slot, active[:, None])
            window = window._replace(alive=window.alive & ~restart[:, None, None])
            self._slot = (self._slot + 1) % self._solver.memory
            new = plain - window.correction(f, self._solver.ridge)
            self._window = window
        self._previous = f, plain
        return new
