"""Krylov subspace methods with short recurrences: CG and its relatives, BiCGStab."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.random_vectors import random_uniform
from hyperfunc._engine.results import RESULTS, code_where
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    Bounds,
    IterativeLinearSolver,
    LinearOperator,
    Solved,
    begin,
    no_steps,
    ratio,
    where,
)
from hyperfunc.linear_solvers._preconditioners import PreconditionedSolver, prepare


@dataclasses.dataclass(frozen=True)
class CG(PreconditionedSolver):
    """Conjugate gradients, for a symmetric positive definite operator.

    Minimises ``||x - x*||_A`` over the Krylov space, one product a step. Stops when
    ``||b - A x|| <= max(rtol ||b||, atol)``, at the level of rounding, or on breakdown: a search
    direction with ``p^T A p <= 0`` or, unless the operator is known to be symmetric, successive
    residuals that are not orthogonal.

    Args:
        maxiter: largest number of steps, >= 0. With ``rtol=0, atol=0`` exactly this many are taken,
            without any host synchronisation, and that is a success.
        rtol: relative tolerance, >= 0; by default ``eps ** 0.75`` for the coarsest dtype, that is
            1.8e-12 in float64 and 6.4e-6 in float32.
        atol: absolute tolerance, >= 0.
        preconditioner: a symmetric positive definite approximation of the inverse: an object such
            as `JacobiPreconditioner`, built in each solve, or a linear function from trees like
            params to such trees. The tolerances stay those of the residual itself.
        check_symmetry: whether to spend two products on the test ``<A u, v> = <u, A v>`` for
            random ``u, v`` first; failing it is a breakdown.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> (x,), stats = hf.CG(maxiter=10).solve(operator, (torch.tensor([5.0, 5.0]),))
        >>> x
        tensor([1., 2.])
        >>> stats.num_steps, stats.result
        (tensor(2), tensor(0))

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952;
        as adjoint solver: Pedregosa, arXiv 1602.02355, and Grazzi et al., arXiv 2006.16218.
    """

    check_symmetry: bool = False

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        precondition = prepare(self.preconditioner, operator, b)
        x, r, rs, bounds, num_steps, active = begin(self, operator, b, x0)
        limits = bounds
        if self.check_symmetry:
            active = active & _seems_symmetric(operator, b)
        p = z = r if precondition is None else precondition(r)
        rz = rs if precondition is None else trees.dot(r, z)
        own = False  # the first residual and direction are those of the caller
        for step in range(self.maxiter):
            if bounds.finished(active):
                break
            Ap = operator.mv(p)
            if step == 0 and trees.can_read(x, r, p, Ap):
                limits, (rs, rz, num_steps, active) = bounds.read(rs, rz, num_steps, active)
            alpha = ratio(rz, *limits.dots((p, Ap)))
            active = active & (alpha > 0) & (alpha < torch.inf)
            alpha = where(active, alpha, 0.0)
            fresh = own or (x0 is None and trees.may_overwrite(x, p, Ap))
            x = trees.axpy(alpha, p, x, out=x if fresh else None)
            r = trees.axpy(-alpha, Ap, r, out=r if own and operator.symmetric else None)
            num_steps = num_steps + active
            z_previous, z = z, r if precondition is None else precondition(r)
            others: tuple[Leaves, ...] = () if precondition is None else (z,)
            if not operator.symmetric:
                others = (*others, z_previous)
            rs, *products = limits.dots((r, r), *((r, other) for other in others))
            rz_previous, rz = rz, rs if precondition is None else products[0]
            if not operator.symmetric:
                overlap = ratio(abs(products[-1]), where(rz > rz_previous, rz, rz_previous))
                skew = (overlap > bounds.asymmetry) & limits.open(rs) & (alpha > 0)
                active = where(skew, False, active)
            beta = where(active, ratio(rz, rz_previous), 0.0)
            p = trees.axpy(beta, p, z, out=p if own else None)
            active = active & limits.open(rs)
            own = own or (step == 0 and trees.may_overwrite(x, r, p))
        return x, bounds.stats(num_steps, rs, active)


@dataclasses.dataclass(frozen=True)
class NormalCG(IterativeLinearSolver):
    """Conjugate gradients on the normal equations, for any invertible operator.

    Solves ``A^T A x = A^T b`` in the form that keeps the residual ``b - A x`` (CGLS), two products
    a step. The rate depends on the squared condition number of ``A``. This is HyperTorch's
    ``CG_normaleq``. The arguments are the first three of `CG`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.NormalCG(maxiter=10).solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)

    References:
        Bjorck, Numerical methods for least squares problems, SIAM 1996, algorithm 7.4.1.
    """

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        transposed = operator.T
        x, r, rs, bounds, num_steps, active = begin(self, operator, b, x0)
        limits = bounds
        own = False  # the first vectors are those of the caller
        for step in range(self.maxiter):
            if bounds.finished(active):
                break
            if step == 0:
                p = s = transposed.mv(r)
                gamma: Any = trees.dot(s, s)
            q = operator.mv(p)
            if step == 0 and trees.can_read(x, r, p, q):
                limits, (rs, gamma, num_steps, active) = bounds.read(rs, gamma, num_steps, active)
            alpha = ratio(gamma, *limits.dots((q, q)))
            active = active & (alpha > 0) & (alpha < torch.inf)
            alpha = where(active, alpha, 0.0)
            x = trees.axpy(alpha, p, x, out=x if own else None)
            r = trees.axpy(-alpha, q, r, out=r if own else None)
            num_steps = num_steps + active
            if step + 1 == self.maxiter:
                (rs,) = limits.dots((r, r))
                active = active & limits.open(rs)
                break
            s = transposed.mv(r)
            gamma_previous = gamma
            rs, gamma = limits.dots((r, r), (s, s))
            active = active & limits.open(rs)
            beta = where(active, ratio(gamma, gamma_previous), 0.0)
            p = trees.axpy(beta, p, s, out=p if own else None)
            own = own or (step == 0 and trees.may_overwrite(x, r, p))
        return x, bounds.stats(num_steps, rs, active)


@dataclasses.dataclass(frozen=True)
class BiCGStab(PreconditionedSolver):
    """Stabilised biconjugate gradients, for any invertible operator.

    Two products a step and a fixed number of vectors, where `GMRES` keeps all of them; no product
    with the transpose, which `NormalCG` needs. The residual may grow a lot on the way and leave
    rounding errors behind. So the residual at the end is checked by one more product. Where it is
    too large, the iteration begins anew; stagnation is reported if that does not help.

    Breakdown is reported where ``rho``, the overlap of the residual with the first one, or
    ``omega``, the overlap of ``A s`` with the residual ``s`` halfway through the step, is zero up
    to rounding. ``Fallback(BiCGStab(), GMRES())`` then starts over with the other method.

    Args:
        preconditioner: an approximation of the inverse, applied from the right, so that the
            residual is that of the system itself.

    All other arguments are those of `CG`.

    Example:
        >>> A = torch.tensor([[4.0, 2.0], [-1.0, 3.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.BiCGStab().solve(operator, (torch.tensor([8.0, 5.0]),))[0]
        (tensor([1., 2.]),)

    References:
        van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG, 1992.
    """

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        precondition = prepare(self.preconditioner, operator, b) or (lambda v: v)
        iterate = functools.partial(_bicgstab, operator.mv, precondition)
        x, r, rs, bounds, num_steps, active = begin(self, operator, b, x0)
        before, left = rs, self.maxiter
        verdict = torch.full_like(rs, -1, dtype=torch.int64)
        while left > 0:
            started = active
            x, rs, made, active, left = iterate(x, r, active, bounds, left)
            num_steps = num_steps + made
            ended = started & (rs <= bounds.converged)
            if not bounds.adaptive or not batching.any_true(ended):
                break
            r = operator.residual(x, b)
            rs = torch.where(ended, trees.dot(r, r), rs)
            missed = ended & bounds.open(rs)
            # where beginning anew gains nothing more, that is as far as rounding errors allow
            exhausted = missed & (rs >= before / 4)
            accurate = rs <= trees.epsilon(b) ** 0.5 * bounds.bb
            code = code_where(accurate, RESULTS.success, RESULTS.stagnation)
            verdict = torch.where(exhausted, code, verdict)
            before = torch.where(ended, rs, before)
            active = active | (missed & ~exhausted)
            if bounds.finished(active):
                break
        stats = bounds.stats(num_steps, rs, active)
        return x, stats._replace(result=torch.where(verdict >= 0, verdict, stats.result))


def _bicgstab(
    product: Callable[[Leaves], Leaves],
    precondition: Callable[[Leaves], Leaves],
    x: Leaves,
    r: Leaves,
    active: Tensor,
    bounds: Bounds,
    left: int,
) -> tuple[Leaves, Tensor, Tensor, Tensor, int]:
    """Iterate until the recurrence has converged: ``x, rs``, steps made, active, ``left``."""
    eps = trees.epsilon(r)
    first = r
    p = v = trees.zeros_like(r)
    rs = first_rs = rho = trees.dot(r, r)
    rho_previous = alpha = omega = torch.ones_like(rs)
    num_steps = no_steps(rs)
    own = False  # the first vectors are those of the caller
    while left > 0 and not bounds.finished(active):
        left -= 1
        active = active & (rho.abs() > eps * (first_rs * rs).sqrt())
        beta = torch.where(active, (rho / rho_previous) * (alpha / omega), 0.0)
        p = trees.axpy(-omega, v, p, out=p if own else None)
        p = trees.axpy(beta, p, r, out=p if own else None)
        p_hat = precondition(p)
        v = product(p_hat)
        alpha = rho / trees.dot(first, v)
        active = active & torch.isfinite(alpha)
        alpha = torch.where(active, alpha, 0.0)
        s = trees.axpy(-alpha, v, r)
        s_hat = precondition(s)
        t = product(s_hat)
        ss, ts, tt = trees.dots((s, s), (t, s), (t, t))
        # where s is zero, or the second half breaks down, only the first half is taken
        stable = active & (ts.abs() > eps * (tt * ss).sqrt())
        omega = torch.where(stable, ts / tt, 0.0)
        x = trees.axpy(alpha, p_hat, x, out=x if own else None)
        x = trees.axpy(omega, s_hat, x, out=x if own else None)
        r = trees.axpy(-omega, t, s, out=s if own else None)
        own = own or trees.may_overwrite(x, p, r)
        rho_previous = rho
        rs, rho = trees.dots((r, r), (first, r))
        num_steps = num_steps + active
        active = stable & bounds.open(rs)
    return x, rs, num_steps, active, left


def _seems_symmetric(operator: LinearOperator, b: Leaves) -> Tensor:
    u, v = random_uniform(b, 0), random_uniform(b, 1)
    Au, Av = operator.mv(u), operator.mv(v)
    size = trees.norm(Au) * trees.norm(v) + trees.norm(u) * trees.norm(Av)
    gap = (trees.dot(Au, v) - trees.dot(u, Av)).abs()
    return torch.le(gap, trees.epsilon(b) ** 0.75 * size)
