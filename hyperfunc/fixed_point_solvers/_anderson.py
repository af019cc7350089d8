"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc.fixed_point_solvers._base import (
    AbstractFixedPointSolver,
    Iteration,
    Point,
    Problem,
    is_first,
    room,
)
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
        return Iteration(problem.evaluate, self._start, self._step, self.memory)

    def _start(self, point: Point) -> _Memory:
        # rows that can be written to need not be copied to make room for more
        few = min(self.memory, 8) if trees.may_overwrite((point.z, point.value)) else 0
        window = Window.empty(point.residual, room(point.z, self.memory) or few)
        return _Memory(point.residual, self._plain(point), window)

    def _step(
        self, number: Any, point: Point, last: _Memory, active: Tensor, restart: Tensor
    ) -> tuple[Tensor, _Memory]:
        f, plain = point.residual, self._plain(point)
        if is_first(number):
            return plain, last
        slot = (number - 1) % self.memory
        window = last.window.put(f - last.f, plain - last.plain, slot, active[:, None])
        window = window._replace(alive=window.alive & ~restart[:, None, None])
        return plain - window.correction(f, self.ridge), _Memory(f, plain, window)

    def _plain(self, point: Point) -> Tensor:
        """A step of the plain iteration."""
        return point.value if self.step_size == 1 else point.z + self.step_size * point.residual


class _Memory(NamedTuple):
    """The last residual and plain step, and the last differences of both."""

    f: Tensor
    plain: Tensor
    window: Window
