"""Anderson acceleration of the fixed-point iteration on the linear system."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.trees import ravel, unravel
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
        first, num_steps, active = rs, no_steps(rs), bounds.open(rs)
        x_steps = f_steps = rhs.new_empty(0, len(rhs))
        x_previous = f_previous = x
        for step in range(self.maxiter):
            if bounds.finished(active):
                break
            if step > 0:
                r = rhs - ravel(operator.mv(unravel(x, b)), dtype)
                rs = torch.where(active, r @ r, rs)
                # a step from the solution may lead away from it again
                active = active & bounds.open(rs)
            f = r if precondition is None else ravel(precondition(unravel(r, b)), dtype)
            f = self.step_size * f
            new = x + f
            if step > 0:
                x_steps = append_row(x_steps, x - x_previous, self.memory)
                f_steps = append_row(f_steps, f - f_previous, self.memory)
                new = new - mixing_coefficients(f_steps, f) @ (x_steps + f_steps)
            x_previous, f_previous = x, f
            num_steps = num_steps + active
            x = torch.where(active, new, x)
        stats = report_growth(bounds.stats(num_steps, rs, active), rs, first, bb, b)
        return unravel(x, b), stats


def append_row(rows: Tensor, row: Tensor, size: int) -> Tensor:
    """The last rows with one more; the dimension before the last counts them."""
    return torch.cat([rows, row.unsqueeze(-2)], dim=-2)[..., -size:, :]


def mixing_coefficients(
    rows: Tensor, f: Tensor, *, ridge: float | None = None, alive: Tensor | None = None
) -> Tensor:
    """Least-squares coefficients of vectors in rows; 0 for those that are zero or not ``alive``."""
    norms = torch.linalg.vector_norm(rows, dim=-1)
    alive = norms > 0 if alive is None else alive & (norms > 0)
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1.0), 0.0)
    unit = rows * inverse.unsqueeze(-1)
    ridge = 10 * torch.finfo(f.dtype).eps if ridge is None else ridge
    gram = unit @ unit.mT + ridge * torch.eye(rows.shape[-2], dtype=f.dtype, device=f.device)
    coefficients: Tensor = torch.linalg.solve_ex(gram, unit @ f.unsqueeze(-1))[0].squeeze(-1)
    return inverse * coefficients
