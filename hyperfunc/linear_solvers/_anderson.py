"""Anderson acceleration of the fixed-point iteration on the linear system."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._torch import tracking
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import Bounds, LinearOperator, Solved, no_steps
from hyperfunc.linear_solvers._preconditioners import prepare
from hyperfunc.linear_solvers._stationary import RichardsonSolver, report_growth
from hyperfunc.linear_solvers._units import in_units


@dataclasses.dataclass(frozen=True)
class AndersonFixedPoint(RichardsonSolver):
    r"""`FixedPoint` with Anderson acceleration.

    With the update :math:`f_k = \eta M (b - A x_k)` of the plain iteration (:math:`M` a
    preconditioner, or the identity) and the differences
    :math:`\Delta x_i, \Delta f_i` of the last ``memory`` steps,

    .. math::
        x_{k+1} = x_k + f_k - \sum_i \gamma_i (\Delta x_i + \Delta f_i),
        \qquad \gamma = \arg\min_\gamma \| f_k - \sum_i \gamma_i \Delta f_i \|.

    One product a step, none for the first one from zero and one more to see that it has converged.
    It converges where `FixedPoint` diverges too: as long as the memory holds all steps, ``x_{k+1}``
    is one plain step from the iterate ``k`` of `GMRES`, which keeps half as many vectors. Beyond
    that, this method goes on with a moving window where `GMRES` starts anew.

    Args:
        step_size: :math:`\eta > 0`.
        memory: differences to keep, two vectors each; >= 1.

    All other arguments are those of `CG`. A residual that is larger at the end than at the start is
    reported as divergence.

    Example:
        >>> J = torch.tensor([[0.5, 0.25], [0.0, -1.5]])  # not a contraction
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(torch.eye(2) - J)
        >>> hf.AndersonFixedPoint().solve(operator, (torch.tensor([0.0, 5.0]),))[0]
        (tensor([1.0000, 2.0000]),)

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """

    memory: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "memory", self.memory)

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        dtype = trees.accumulation_dtype(b)
        rhs = ravel(b, dtype)
        precondition = prepare(self.preconditioner, operator, b)
        x = torch.zeros_like(rhs) if x0 is None else ravel(x0, dtype)
        r = rhs if x0 is None else ravel(operator.residual(x0, b), dtype)
        bb, rs = rhs @ rhs, r @ r
        bounds = Bounds.make(self.rtol, self.atol, b, rs)
        active, none = bounds.open(rs), no_steps(rs)

        def plain_step(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            f = r if precondition is None else ravel(precondition(unravel(r, b)), dtype)
            f = self.step_size * f
            return f, x + f

        def step(s: _Iterate, by: Bounds) -> _Iterate:
            r = rhs - ravel(operator.mv(unravel(s.x, b)), dtype)
            rs = torch.where(s.active, r @ r, s.rs)
            # a step from the solution may lead away from it again
            active = s.active & by.open(rs)
            f, plain = plain_step(s.x, r)
            window = s.window.put(f - s.f, plain - s.plain, s.count % self.memory, True)
            x = torch.where(active, plain - window.correction(f), s.x)
            return _Iterate(x, f, plain, window, rs, s.num_steps + active, active, s.count + 1)

        if self.maxiter == 0:
            return unravel(x, b), bounds.stats(none, rs, active)
        f, plain = plain_step(x, r)
        kept = loop.is_kept(x)
        window, count = Window.empty(rhs, self.memory if kept else 0), none if kept else 0
        x = torch.where(active, plain, x)
        start = _Iterate(x, f, plain, window, rs, none + active, active, count)
        s, _ = bounds.steps(step, start, self.maxiter - 1, numbers=False, sure=False)
        stats = report_growth(bounds.stats(s.num_steps, s.rs, s.active), s.rs, rs, bb, b)
        return unravel(s.x, b), stats


class _Iterate(NamedTuple):
    """An iterate, the last plain step ``plain = x + f`` from the one before, and steps after it."""

    x: Tensor
    f: Tensor
    plain: Tensor
    window: Window
    rs: Tensor
    num_steps: Tensor
    active: Tensor
    count: Any


class Window(NamedTuple):
    """The last differences in a ring: a new one takes the place of the oldest.

    A step of the plain iteration leads from ``z`` to ``g = z + f``. For differences of ``f`` and
    ``g``, ``units`` are ``df / |df|``, ``steps`` are ``dg / |df|``, in the dimension before the
    last, ``gram`` holds products of units, and columns of ``alive`` tell which rows count.
    """

    units: Tensor
    steps: Tensor
    gram: Tensor
    alive: Tensor

    @staticmethod
    def empty(like: Tensor, room: int = 0) -> Window:
        """A window for vectors in the last dimension, with room for so many rows."""
        *lead, size = like.shape
        shapes = [(*lead, room, n) for n in (size, size, room, 1)]
        units, steps, gram, alive = map(like.new_zeros, shapes)  # each may be written to
        return Window(units, steps, gram, alive > 0)

    def put(self, f_step: Tensor, g_step: Tensor, slot: Any, active: Tensor | bool) -> Window:
        """The window with a row in a slot; this one, which may be overwritten, is gone then."""
        if tracking.is_tracked((f_step,)):  # the norm of zeros has no second derivative
            zero = (f_step == 0).all(-1, keepdim=True)
            norm = torch.linalg.vector_norm(f_step.masked_fill(zero, 1.0), dim=-1, keepdim=True)
            norm = norm.masked_fill(zero, 0.0)
        else:
            norm = torch.linalg.vector_norm(f_step, dim=-1, keepdim=True)
        alive = (norm > 0) & active
        scale = torch.where(alive, 1 / torch.where(alive, norm, 1.0), 0.0)
        unit, step, gram = f_step * scale, g_step * scale, self.gram
        own = isinstance(slot, int) and trees.may_overwrite(self, (unit, step, alive))
        units = _put(self.units, unit, slot, own)
        products = (unit.unsqueeze(-2) @ units.mT).squeeze(-2)
        if isinstance(slot, int) and slot == gram.shape[-1]:
            gram = torch.nn.functional.pad(gram, (0, 1, 0, 1))
        gram = _put(_put(gram, products, slot, own).mT, products, slot, own)
        steps, alive = _put(self.steps, step, slot, own), _put(self.alive, alive, slot, own)
        return Window(units, steps, gram, alive)

    def correction(self, f: Tensor, ridge: float | None = None) -> Tensor:
        """The combination of steps to subtract from ``g``, by least squares on ``f``."""
        ridge = 10 * torch.finfo(f.dtype).eps if ridge is None else ridge
        eye = torch.eye(self.gram.shape[-1], dtype=f.dtype, device=f.device)
        gram = torch.where(self.alive & self.alive.mT, self.gram, eye) + ridge * eye
        # rows times a matrix: its product with a column takes up to nine times as long in a batch
        products = torch.where(self.alive, (f.unsqueeze(-2) @ self.units.mT).mT, 0.0)
        coefficients: Tensor = torch.linalg.solve_ex(gram, products)[0]
        return (coefficients.mT @ self.steps).squeeze(-2)


def _put(rows: Tensor, row: Tensor, slot: Any, own: bool) -> Tensor:
    """Rows with one in a slot, the first free one or that of another."""
    if isinstance(slot, int) and slot == rows.shape[-2]:
        return torch.cat([rows, row.unsqueeze(-2)], dim=-2)
    if own:
        rows.select(-2, slot).copy_(row)
        return rows
    # not by select_scatter, whose gradient in a vmap is torch's mistake
    here = torch.arange(rows.shape[-2], device=rows.device) == slot
    return torch.where(here[:, None], row.unsqueeze(-2), rows)
