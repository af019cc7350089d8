"""Krylov subspace methods: CG and its relatives."""

from __future__ import annotations

import dataclasses

import torch

from hyperfunc import _ad, _tree
from hyperfunc._results import SolveStats
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    Bounds,
    LinearOperator,
    check_settings,
)


@dataclasses.dataclass(frozen=True)
class CG(AbstractLinearSolver):
    """Conjugate gradients, for a symmetric positive definite operator.

    Minimises ``||x - x*||_A`` over the Krylov space, one product a step. Stops when
    ``||b - A x|| <= max(rtol ||b||, atol)``, at the level of rounding, or on breakdown: a search
    direction with ``p^T A p <= 0``, or, where symmetry is not known beforehand, successive
    residuals that are not orthogonal, which tells a non-symmetric operator.

    Args:
        maxiter: largest number of steps, >= 0. With ``rtol=0, atol=0`` exactly this many steps are
            taken, without any host synchronisation, and that is a success.
        rtol: relative tolerance, >= 0; by default ``eps ** 0.75`` for the coarsest dtype, that is
            1.8e-12 in float64 and 6.4e-6 in float32.
        atol: absolute tolerance, >= 0.

    Example:
        >>> import torch
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> operator = hf.linear_solvers.LinearOperator(
        ...     lambda v: (A @ v[0],), lambda v: (A.T @ v[0],)
        ... )
        >>> (x,), stats = hf.CG(maxiter=10).solve(operator, (torch.tensor([5.0, 5.0]),))
        >>> x
        tensor([1., 2.])
        >>> stats.num_steps, stats.result
        (tensor(2), tensor(0))

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952;
        as adjoint solver: Pedregosa, arXiv 1602.02355, and Grazzi et al., arXiv 2006.16218.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, self.maxiter, self.rtol, self.atol)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        x = _tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else operator.residual(x0, b)
        p = r
        rs = _tree.dot(r, r)
        bounds = Bounds.make(self.rtol, self.atol, b, rs)
        num_steps = torch.zeros((), dtype=torch.int64, device=rs.device)
        active = bounds.open(rs)
        for _ in range(self.maxiter):
            if bounds.adaptive and not _ad.any_true(active):
                break
            Ap = operator.mv(p)
            alpha = rs / _tree.dot(p, Ap)
            active = active & (alpha > 0) & (alpha < torch.inf)
            alpha = torch.where(active, alpha, 0.0)
            x = _tree.axpy(alpha, p, x)
            previous, r = r, _tree.axpy(-alpha, Ap, r)
            rs_previous, rs = rs, _tree.dot(r, r)
            num_steps = num_steps + active
            if not operator.symmetric:
                overlap = _tree.dot(r, previous).abs() / torch.maximum(rs, rs_previous)
                active = active & ~((overlap > bounds.asymmetry) & bounds.open(rs) & (alpha > 0))
            p = _tree.axpy(torch.where(active, rs / rs_previous, 0.0), p, r)
            active = active & bounds.open(rs)
        return x, bounds.stats(num_steps, rs, active)


@dataclasses.dataclass(frozen=True)
class NormalCG(AbstractLinearSolver):
    """Conjugate gradients on the normal equations, for any invertible operator.

    Solves ``A^T A x = A^T b`` in the form that keeps the residual ``b - A x`` (CGLS), two products
    a step. The rate depends on the squared condition number of ``A``. This is HyperTorch's
    ``CG_normaleq``. The arguments are those of `CG`.

    Example:
        >>> import torch
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator(
        ...     lambda v: (A @ v[0],), lambda v: (A.T @ v[0],)
        ... )
        >>> (x,), stats = hf.NormalCG(maxiter=10).solve(operator, (torch.tensor([4.0, 3.0]),))
        >>> x
        tensor([-3.,  2.])

    References:
        Bjorck, Numerical methods for least squares problems, SIAM 1996, algorithm 7.4.1.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, self.maxiter, self.rtol, self.atol)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        transposed = operator.T
        x = _tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else operator.residual(x0, b)
        rs = _tree.dot(r, r)
        bounds = Bounds.make(self.rtol, self.atol, b, rs)
        num_steps = torch.zeros((), dtype=torch.int64, device=rs.device)
        active = bounds.open(rs)
        if self.maxiter > 0:
            p = s = transposed.mv(r)
            gamma = _tree.dot(s, s)
        for step in range(self.maxiter):
            if bounds.adaptive and not _ad.any_true(active):
                break
            q = operator.mv(p)
            alpha = gamma / _tree.dot(q, q)
            active = active & (alpha > 0) & (alpha < torch.inf)
            alpha = torch.where(active, alpha, 0.0)
            x = _tree.axpy(alpha, p, x)
            r = _tree.axpy(-alpha, q, r)
            rs = _tree.dot(r, r)
            num_steps = num_steps + active
            active = active & bounds.open(rs)
            if step + 1 < self.maxiter:
                s = transposed.mv(r)
                gamma_previous, gamma = gamma, _tree.dot(s, s)
                p = _tree.axpy(torch.where(active, gamma / gamma_previous, 0.0), p, s)
        return x, bounds.stats(num_steps, rs, active)
