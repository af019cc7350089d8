"""Krylov subspace methods with short recurrences: CG and its relatives, BiCGStab."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_flags
from hyperfunc._engine.random_vectors import random_uniform
from hyperfunc._engine.results import RESULTS, code_where
from hyperfunc._engine.shown import show
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    Bounds,
    LinearOperator,
    Solved,
    ratio,
    where,
)
from hyperfunc.linear_solvers._cycles import State, begin, run_cycles
from hyperfunc.linear_solvers._preconditioners import (
    PreconditionedSolver,
    prepare,
    prepare_normal,
)
from hyperfunc.linear_solvers._units import in_units

Linear: TypeAlias = Callable[[Leaves], Leaves]
Stage: TypeAlias = tuple[int, Callable[[Leaves, Leaves], tuple[Tensor, Linear] | None]]
"""A step of `CG`, and what it calls there with iterate and residual: for which tasks to start anew,
and with which preconditioner."""


@dataclasses.dataclass(frozen=True)
class CG(PreconditionedSolver):
    """Conjugate gradients, for a symmetric positive definite operator.

    Minimises ``||x - x*||_A`` over the Krylov space, one product a step. Stops when
    ``||b - A x|| <= max(rtol ||b||, atol)``, at the level of rounding, or on breakdown: a search
    direction with ``p^T A p <= 0`` or, unless the operator is known to be symmetric, successive
    residuals that are not orthogonal. A negative definite operator, as that of an ``optimality``
    with the other sign, is solved too; that of an inner loss is a breakdown, as it is no minimum.

    Success is held against the residual itself, found by one product at the end: it is within the
    tolerance, or within the rounding errors of ``x`` and ``b``, that is 4 times what relative
    changes of the size of ``eps``, with random signs, do to ``b - A x``, and below
    ``eps^0.25 ||b||``. Where the recurrence has drifted from it, the iteration starts again from
    there, or else reports stagnation. All iterative solvers here do so.

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
        negative_curvature: what to do about a direction with ``p^T A p <= 0``. ``"raise"`` makes
            it a breakdown; ``"stop"`` keeps the iterate so far (zeros, in the first step), as
            truncated Newton methods do, with the code ``max_steps``.

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
        as adjoint solver: Pedregosa, arXiv 1602.02355, and Grazzi et al., arXiv 2006.16218;
        stopping at negative curvature: Steihaug, 1983.
    """

    check_symmetry: bool = False
    negative_curvature: Literal["raise", "stop"] = "raise"

    symmetric_only = True  # so that one preconditioner serves the operator and its transpose

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, check_symmetry=self.check_symmetry)
        if self.negative_curvature not in ("raise", "stop"):
            raise ValueError(
                f"CG: negative_curvature is {show(self.negative_curvature)}; "
                f"expected 'raise' or 'stop'"
            )

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        return self.run(operator, b, x0)

    def run(
        self,
        operator: LinearOperator,
        b: Leaves,
        x0: Leaves | None,
        stages: tuple[Stage, ...] = (),
        atol: Any = None,
    ) -> Solved:
        """`solve`, with stages in the order of their steps that may change its preconditioner.

        ``atol`` may be a tensor here.
        """
        accepts = self.negative_curvature == "stop"
        recurrence = _Conjugation(operator, prepare(self.preconditioner, operator, b), accepts)
        start, bounds = begin(self, operator, b, x0, atol)
        if self.check_symmetry:
            start = start._replace(active=start.active & _seems_symmetric(operator, b))

        def cycle(start: State, bounds: Bounds, most: Any) -> tuple[State, Any]:
            nonlocal stages, recurrence
            state, taken = recurrence.start(start), 0
            while stages and stages[0][0] < most:
                wanted = stages[0][0] - taken
                state, more = bounds.steps(recurrence.step, state, wanted)
                taken += more
                if more < wanted or (wanted and bounds.finished(state.active)):
                    return state.end(), taken
                found, stages = stages[0][1](state.x, state.r), stages[1:]
                if found is not None:
                    anew, precondition = found
                    recurrence = recurrence._replace(precondition=precondition)
                    state = recurrence.turn(bounds.as_tensors(state), anew)
            state, more = bounds.steps(recurrence.step, state, most - taken)
            return state.end(), taken + more

        return run_cycles(self, operator, b, start, bounds, cycle)


class _Conjugate(NamedTuple):
    """Iterate, residual ``r``, direction ``p``, ``z = M r``, ``||r||^2`` and ``<r, z>``.

    Further the sign of the curvature, or 0 before it is known, and what `State` has.
    """

    x: Leaves
    r: Leaves
    p: Leaves
    z: Leaves  # where that is not r, and the operator may not be symmetric
    rs: Any
    rz: Any
    sign: Any
    num_steps: Any
    active: Any
    accepted: Any

    def end(self) -> State:
        return State(self.x, self.r, self.rs, self.num_steps, self.active, self.accepted)


class _Conjugation(NamedTuple):
    """The recurrence of conjugate gradients; whether it ``accepts`` its iterate at a breakdown."""

    operator: LinearOperator
    precondition: Callable[[Leaves], Leaves] | None
    accepts: bool

    def start(self, s: State) -> _Conjugate:
        z = s.r if self.precondition is None else self.precondition(s.r)
        rz = s.rs if self.precondition is None else trees.dot(s.r, z)
        sign = torch.full_like(rz, self.operator.symmetric)
        return _Conjugate(
            s.x, s.r, z, self._kept(z), s.rs, rz, sign, s.num_steps, s.active, s.accepted
        )

    def turn(self, s: _Conjugate, anew: Tensor) -> _Conjugate:
        """A state to go on with by another preconditioner, for some tasks with a new direction."""
        assert self.precondition is not None
        z = self.precondition(s.r)
        p = trees.where(anew, z, s.p)
        return s._replace(p=p, z=self._kept(z), rz=trees.dot(s.r, z))

    def step(self, s: _Conjugate, by: Bounds) -> _Conjugate:
        symmetric = self.operator.symmetric
        Ap = self.operator.mv(s.p)
        alpha = ratio(s.rz, *by.dots((s.p, Ap)))
        sign = where(s.sign == 0, (alpha > 0) * 2.0 - 1.0, s.sign)  # -A is as definite as A
        ahead = (alpha * sign > 0) & (abs(alpha) < torch.inf)
        if not symmetric:
            ahead = ahead & (s.rz > 0)
        accepted = s.accepted
        if self.accepts:
            accepted = accepted | (s.active & (alpha == alpha) & where(ahead, False, True))
        active = s.active & ahead
        alpha = where(active, alpha, 0.0)
        x = by.add(alpha, s.p, s.x, over=s.x)
        r = by.add(-alpha, Ap, s.r, over=s.r if symmetric else None)
        num_steps = s.num_steps + active
        z = r if self.precondition is None else self.precondition(r)
        rs, rz, overlap = self._products(by, r, z, s.z or s.r)
        if not symmetric:
            skew = ratio(abs(overlap), where(rz > s.rz, rz, s.rz)) > by.asymmetry
            active = where(skew & by.open(rs) & (alpha != 0), False, active)
        beta = where(active, ratio(rz, s.rz), 0.0)
        p = by.add(beta, s.p, z, over=s.p)
        active = active & by.open(rs)
        return _Conjugate(x, r, p, self._kept(z), rs, rz, sign, num_steps, active, accepted)

    def _products(self, by: Bounds, r: Leaves, z: Leaves, last: Leaves) -> tuple[Any, Any, Any]:
        """``<r, r>``, ``<r, z>``, and ``<r, z>`` with the last ``z``, which symmetry makes zero."""
        pairs = [(r, r)]
        if self.precondition is not None:
            pairs.append((r, z))
        if not self.operator.symmetric:
            pairs.append((r, last))
        products = by.dots(*pairs)
        return products[0], products[self.precondition is not None], products[-1]

    def _kept(self, z: Leaves) -> Leaves:
        return () if self.precondition is None or self.operator.symmetric else z


@dataclasses.dataclass(frozen=True)
class NormalCG(PreconditionedSolver):
    """Conjugate gradients on the normal equations, for any invertible operator.

    Solves ``A^T A x = A^T b`` in the form that keeps the residual ``b - A x`` (CGLS), two products
    a step. The rate depends on the squared condition number of ``A``. This is HyperTorch's
    ``CG_normaleq``.

    Where ``A^T r`` becomes rounding noise, there is no solution, and that is breakdown: then ``x``
    is the least-squares solution, which `LeastSquares` accepts. So it is for a solution that needs
    singular values below ``10 eps ||A||``, which ``A^T r`` does not show.

    Args:
        preconditioner: an object such as `JacobiPreconditioner`, which is built for ``A^T A``; a
            pair ``(M, M^T)`` as `GMRES` takes it; or one function, if ``A`` is symmetric.

    All other arguments are those of `CG`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.NormalCG(maxiter=10).solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)

    References:
        Bjorck, Numerical methods for least squares problems, SIAM 1996, algorithm 7.4.1.
    """

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        transposed = operator.T
        precondition = prepare_normal(self.preconditioner, operator, b)
        noise = (10 * trees.epsilon(b)) ** 2

        def begin_cycle(start: State) -> _NormalConjugate:
            x, r, rs, num_steps, active, *_ = start
            # in a unit in which gamma is about 1, as the norm of A A^T r may overflow or underflow
            unit = _power_of_two(rs.sqrt(), r)
            s = transposed.mv(trees.scale(1 / unit, r))
            norm = trees.norm(s)
            least = noise * norm**2
            norm = _power_of_two(norm, r)
            s = trees.scale(1 / norm, s)
            p = s if precondition is None else precondition(s)
            gamma = trees.dot(s, p)
            if precondition is not None:
                root = _power_of_two(gamma.abs().sqrt(), r)
                norm, p, gamma = norm * root, trees.scale(1 / root, p), gamma / root**2
            unit, r = unit * norm, trees.scale(1 / norm, trees.scale(1 / unit, r))
            return _NormalConjugate(x, r, p, rs, gamma, least, unit, num_steps, active)

        def descend(s: _NormalConjugate, by: Bounds) -> tuple[Leaves, Leaves, Any]:
            """The next iterate and its residual, and whether that is another one."""
            q = operator.mv(s.p)
            alpha = ratio(s.gamma, *by.dots((q, q)))
            active = s.active & (alpha > 0) & (alpha < torch.inf)
            alpha = where(active, alpha, 0.0)
            x = by.add(alpha * s.unit, s.p, s.x, over=s.x)
            r = by.add(-alpha, q, s.r, over=s.r)
            return x, r, active

        def step(s: _NormalConjugate, by: Bounds) -> _NormalConjugate:
            x, r, active = descend(s, by)
            num_steps = s.num_steps + active
            Ar = transposed.mv(r)
            if precondition is None:
                z = Ar
                rr, ss = by.dots((r, r), (Ar, Ar))
                gamma = ss
            else:
                z = precondition(Ar)
                rr, ss, gamma = by.dots((r, r), (Ar, Ar), (Ar, z))
            rs = (rr**0.5 * s.unit) ** 2
            active = active & by.open(rs)
            if by.adaptive:  # A^T r is noise: there is no solution, or not in this dtype
                active = active & (ss > s.least * rr)
            beta = where(active, ratio(gamma, s.gamma), 0.0)
            p = by.add(beta, s.p, z, over=s.p)
            return _NormalConjugate(x, r, p, rs, gamma, s.least, s.unit, num_steps, active)

        def last(s: _NormalConjugate, by: Bounds) -> _NormalConjugate:
            x, r, active = descend(s, by)
            (rr,) = by.dots((r, r))
            rs, num_steps = where(s.active, (rr**0.5 * s.unit) ** 2, s.rs), s.num_steps + active
            go_on = active & by.open(rs)
            return s._replace(x=x, r=r, rs=rs, num_steps=num_steps, active=go_on)

        def cycle(start: State, bounds: Bounds, most: Any) -> tuple[State, Any]:
            s, taken = bounds.steps(step, begin_cycle(start), most, seen=True, last=last)
            return State(s.x, s.r, s.rs, s.num_steps, s.active), taken

        return run_cycles(self, operator, b, *begin(self, operator, b, x0), cycle)


class _NormalConjugate(NamedTuple):
    """What CGLS carries: ``r`` and ``gamma = <A^T r, z>`` in a ``unit``, and what `State` has."""

    x: Leaves
    r: Leaves
    p: Leaves
    rs: Any
    gamma: Any
    least: Any
    unit: Any
    num_steps: Any
    active: Any


@dataclasses.dataclass(frozen=True)
class LeastSquares(PreconditionedSolver):
    """The least-squares solution of ``A x = b`` where there is no solution, by `CG` on ``A^T A``.

    Minimises ``||b - A x||``: from zeros and without a preconditioner, the minimiser of least norm.
    So a singular Hessian, as that of a network with symmetries, or with more parameters than data,
    gives the hypergradient of the pseudo-inverse. Where the system is solvable, its solution is
    what `NormalCG` finds with less rounding error. Two products a step; the rate depends on the
    squared condition number, over the nonzero singular values.

    Tolerances, residual norm and success are those of the normal equations: the residual is
    ``A^T (b - A x)``, and its tolerance ``max(rtol ||A^T b||, atol)``. A preconditioner
    approximates the inverse of ``A^T A``. All arguments are those of `CG`.

    Second derivatives are refused, as they are not those of a solved system.

    Example:
        >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # b is not in its range
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.LeastSquares().solve(operator, (torch.tensor([3.0, 1.0]),))[0]
        (tensor([1., 1.]),)

    References:
        Bjorck, Numerical methods for least squares problems, SIAM 1996, chapter 7.4.
    """

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        precondition = prepare(self.preconditioner, operator.normal(), b)
        # in units in which b and A^T b are about 1, as the squares of A^T A may overflow
        unit = _power_of_two(_safe_norm(b), b)
        rhs = operator.T.mv(trees.scale(1 / unit, b))
        size = _power_of_two(_safe_norm(rhs), b)
        rhs = trees.scale(1 / size, rhs)

        def product(v: Leaves) -> Leaves:
            image = operator.mv(trees.scale(1 / size, v))
            return operator.T.mv(trees.scale(1 / size, image))

        inner = CG(self.maxiter, self.rtol)
        stages: tuple[Stage, ...] = ()
        if precondition is not None:
            root = _power_of_two(trees.dot(rhs, precondition(rhs)).abs(), b)
            everywhere = torch.ones_like(root, dtype=torch.bool)
            scaled = lambda r: trees.scale(1 / root, precondition(r))  # noqa: E731
            stages = ((0, lambda x, r: (everywhere, scaled)),)
        normal = LinearOperator(product, product, symmetric=True, spec=operator.spec)
        start = None if x0 is None else trees.scale(size / unit, x0)
        atol = self.atol and self.atol / (unit * size)
        y, stats = inner.run(normal, rhs, start, stages, atol)
        x, norm = trees.scale(unit / size, y), stats.residual_norm * unit * size
        result = code_where(trees.all_finite(x), stats.result, RESULTS.nonfinite)
        return x, stats._replace(residual_norm=norm, result=result)


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

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        precondition = prepare(self.preconditioner, operator, b) or (lambda v: v)
        eps = trees.epsilon(b)

        def cycle(start: State, bounds: Bounds, most: Any) -> tuple[State, Any]:
            first, first_rs, one = start.r, start.rs, torch.ones_like(start.rs)

            def step(s: _Biconjugate, by: Bounds) -> _Biconjugate:
                active = s.active & (abs(s.rho) > eps * (first_rs * s.rs) ** 0.5)
                beta = torch.where(active, (s.rho / s.rho_previous) * (s.alpha / s.omega), 0.0)
                p = by.add(-s.omega, s.v, s.p, over=s.p)
                p = trees.axpy(beta, p, s.r, p if by.own else None)
                p_hat = precondition(p)
                v = operator.mv(p_hat)
                alpha = s.rho / trees.dot(first, v)
                active = active & torch.isfinite(alpha)
                alpha = torch.where(active, alpha, 0.0)
                half = trees.axpy(-alpha, v, s.r)
                half_hat = precondition(half)
                t = operator.mv(half_hat)
                ss, ts, tt = trees.dots((half, half), (t, half), (t, t))
                # where s is zero, or the second half breaks down, only the first half is taken
                stable = active & (ts.abs() > eps * (tt * ss).sqrt())
                omega = torch.where(stable, ts / tt, 0.0)
                x = by.add(alpha, p_hat, s.x, over=s.x)
                x = by.add(omega, half_hat, x, over=x)
                r = by.add(-omega, t, half, over=half)
                rs, rho = trees.dots((r, r), (first, r))
                num_steps, go_on = s.num_steps + active, stable & by.open(rs)
                return _Biconjugate(x, r, p, v, rs, rho, s.rho, alpha, omega, num_steps, go_on)

            x, r, rs, num_steps, active, *_ = start
            zeros = trees.zeros_like(r)
            state = _Biconjugate(x, r, zeros, zeros, rs, rs, one, one, one, num_steps, active)
            s, taken = bounds.steps(step, state, most, numbers=False)
            return State(s.x, s.r, s.rs, s.num_steps, s.active), taken

        start = begin(self, operator, b, x0)
        return run_cycles(self, operator, b, *start, cycle, retry=True)


class _Biconjugate(NamedTuple):
    """What BiCGStab carries, by the names of its paper, and what `State` has."""

    x: Leaves
    r: Leaves
    p: Leaves
    v: Leaves
    rs: Tensor
    rho: Tensor
    rho_previous: Tensor
    alpha: Tensor
    omega: Tensor
    num_steps: Tensor
    active: Tensor


def _power_of_two(value: Tensor, like: Leaves) -> Tensor:
    """One near a value, for exact scaling; 1 for float16, whose inner products cannot overflow."""
    if any(leaf.dtype is torch.float16 for leaf in like):
        return torch.ones_like(value)
    most = math.log2(torch.finfo(value.dtype).max) - 2
    power = torch.exp2(torch.log2(value).round().clamp(-most, most))
    return torch.where((value > 0) & torch.isfinite(value), power, 1.0)


def _safe_norm(x: Leaves) -> Tensor:
    """The norm where its square may be too large or too small for a number."""
    norm = trees.norm(x)
    for factor in (2.0**-64, 2.0**64):
        again = trees.norm(trees.scale(factor, x)) / factor
        norm = torch.where((norm > 0) & torch.isfinite(norm), norm, again)
    return norm


def _seems_symmetric(operator: LinearOperator, b: Leaves) -> Tensor:
    u, v = random_uniform(b, 0), random_uniform(b, 1)
    Au, Av = operator.mv(u), operator.mv(v)
    size = trees.norm(Au) * trees.norm(v) + trees.norm(u) * trees.norm(Av)
    gap = (trees.dot(Au, v) - trees.dot(u, Av)).abs()
    return ~torch.gt(gap, trees.epsilon(b) ** 0.75 * size)  # NaN is for the iteration to find
