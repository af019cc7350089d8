"""Fixed-point iterations on the linear system: Richardson, Neumann, one step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_number
from hyperfunc._engine.results import RESULTS, SolveStats, code_where
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    Bounds,
    IterativeLinearSolver,
    LinearOperator,
    Solved,
    no_steps,
)
from hyperfunc.linear_solvers._cycles import State, run_cycles
from hyperfunc.linear_solvers._preconditioners import (
    Preconditioner,
    check_preconditioner,
    prepare,
)
from hyperfunc.linear_solvers._units import in_units


@dataclasses.dataclass(frozen=True)
class RichardsonSolver(IterativeLinearSolver):
    """What iterates by plain steps of a size; see `FixedPoint`."""

    step_size: float = 1.0
    preconditioner: Preconditioner | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self)
        check_number(self, "step_size", self.step_size, above=True)

    def _iterate(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None, series: bool = False
    ) -> Solved:
        precondition = prepare(self.preconditioner, operator, b)
        if series and x0 is None:
            x0 = trees.scale(self.step_size, b if precondition is None else precondition(b))
        r: Leaves
        x, r = (trees.zeros_like(b), b) if x0 is None else (x0, ())
        first = bb = trees.dot(b, b)
        if x0 is not None and precondition is not None:
            r = operator.residual(x, b)
            first = trees.dot(r, r)
        limits = Bounds.make(self.rtol, self.atol, b, first)

        def move(x: Leaves, r: Leaves) -> Leaves:
            direction = r if precondition is None else precondition(r)
            return trees.axpy(self.step_size, direction, x)

        def step(s: State, by: Bounds) -> State:
            """One step, and the norm of the residual where it began."""
            if precondition is None:
                new = operator.richardson(s.x, b, self.step_size)
                update = trees.sub(new, s.x)
                rs_now = trees.dot(update, update) / self.step_size**2
            else:
                residual = operator.residual(s.x, b)
                new, rs_now = move(s.x, residual), trees.dot(residual, residual)
            rs = torch.where(s.active, rs_now, s.rs)
            x = trees.where(s.active, new, s.x) if by.adaptive else new
            num_steps, active = s.num_steps + s.active, s.active & by.open(rs)
            return s._replace(x=x, rs=rs, num_steps=num_steps, active=active)

        def unseen(_: Any, x: Leaves) -> Leaves:
            if precondition is None:
                return operator.richardson(x, b, self.step_size)
            return move(x, operator.residual(x, b))

        def cycle(start: State, _: Bounds, most: Any) -> tuple[State, Any]:
            nonlocal first, limits
            if start.r:
                x = move(start.x, start.r)
                x = trees.where(start.active, x, start.x) if limits.adaptive else x
                num_steps, active = start.num_steps + start.active, start.active
                s = start._replace(x=x, r=(), num_steps=num_steps, active=active)
            else:
                without = dataclasses.replace(limits, diverged=torch.full_like(bb, torch.inf))
                s = step(start._replace(r=()), without)
                first = s.rs
                limits = Bounds.make(self.rtol, self.atol, b, first)
                s = s._replace(active=start.active & limits.open(first))
            if limits.adaptive:
                s, taken = limits.steps(step, s, most - 1, numbers=False, sure=False)
                return s, taken + 1
            if most > 1:
                x, _ = loop.repeat(unseen, s.x, most - 2)
                num_steps = s.num_steps + (most - 2) * s.active
                s = step(s._replace(x=x, num_steps=num_steps), limits)
            return s, most

        # from a start whose residual is not known even a small b says nothing of it
        active = limits.open(first) if r else torch.isfinite(bb)
        start = State(x, r, first, no_steps(bb), active)
        # growth is known from the first residual on, which may be that of a bad start
        bounds = dataclasses.replace(limits, diverged=torch.full_like(bb, torch.inf))
        x, stats = run_cycles(self, operator, b, start, bounds, cycle)
        return x, report_growth(stats, stats.residual_norm**2, first, bb, b)


@dataclasses.dataclass(frozen=True)
class FixedPoint(RichardsonSolver):
    """Fixed-point (Richardson) iteration ``x <- x + step_size (b - A x)``.

    For a fixed-point map with Jacobian ``J``, where the adjoint system has ``A^T = I - J^T``, and
    step size 1 this is ``v <- J^T v + b`` from ``v = 0``: HyperTorch's ``fixed_point``, with the
    error of ``K`` steps of reverse mode at the solution. For an inner loss ``A`` is the Hessian,
    and the step size must be below 2 over its largest eigenvalue. It converges when
    ``I - step_size A`` is a contraction. One product a step; the first from zero needs none.

    Args:
        step_size: > 0.
        preconditioner: an approximation ``M`` of the inverse, as `GMRES` takes it: the iteration
            is ``x <- x + step_size M (b - A x)``, and the residual is that of the system itself.

    All other arguments are those of `CG`. A residual that is larger at the end than at the start is
    reported as divergence.

    Example:
        >>> J = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(torch.eye(2) - J)
        >>> hf.FixedPoint(maxiter=100).solve(operator, (torch.tensor([0.0, 1.0]),))[0]
        (tensor([1.0000, 2.0000]),)

    References:
        Grazzi et al., On the iteration complexity of hypergradient computation, arXiv 2006.16218.
    """

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        return self._iterate(operator, b, x0)


@dataclasses.dataclass(frozen=True)
class Neumann(RichardsonSolver):
    """Truncated Neumann series ``x_K = step_size sum_{i<=K} (I - step_size A)^i b``.

    `FixedPoint` from ``step_size b`` in place of zero, with the same arguments: ``Neumann(K)``
    equals ``FixedPoint(K + 1)``, with ``K`` products. A preconditioner ``M`` makes it the series
    ``step_size sum_{i<=K} (I - step_size M A)^i M b``.

    Example:
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(0.5 * torch.eye(1))
        >>> hf.Neumann(maxiter=2, rtol=0, atol=0).solve(operator, (torch.ones(1),))[0]
        (tensor([1.7500]),)

    References:
        Lorraine, Vicol and Duvenaud, arXiv 1911.02590; Grazzi et al., arXiv 2006.16218.
    """

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        return self._iterate(operator, b, x0, series=True)


@dataclasses.dataclass(frozen=True)
class OneStep(AbstractLinearSolver):
    """The adjoint taken as ``u = b``: differentiate one step of the map at the solution.

    For a fixed-point map the hypergradient becomes ``dE/dhparams + (dphi/dhparams)^T dE/dw``, that
    of the last step of the inner iteration alone, without a product. The error is the whole
    contribution of ``J^T u``, so the map must contract fast. Also known as Jacobian-free
    backpropagation, the T1-T2 method and, for a gradient step, first-order DARTS. Hparams that the
    inner solver only starts from get zeros: first-order MAML is `hyperfunc.FirstOrder`.

    Args:
        step_size: ``u = step_size b``; > 0. With an inner loss, the size of the one gradient step.

    Example:
        >>> operator = hf.linear_solvers.LinearOperator(lambda v: v, lambda v: v)
        >>> hf.OneStep().solve(operator, (torch.ones(2),))[0]
        (tensor([1., 1.]),)

    References:
        Luketina et al., arXiv 1511.06727; Liu, Simonyan and Yang, arXiv 1806.09055;
        Fung et al., arXiv 2103.12803; Bolte, Pauwels and Vaiter, arXiv 2305.13768.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "step_size", self.step_size, above=True)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        rs = trees.dot(b, b)
        bounds = Bounds.make(0.0, 0.0, b, rs)
        return trees.scale(self.step_size, b), bounds.stats(0, rs, bounds.open(rs))


def report_growth(
    stats: SolveStats, rs: Tensor, first: Tensor, bb: Tensor, b: Leaves
) -> SolveStats:
    """Call it divergence if the last squared residual norm is larger than the first."""
    # rounding noise around a converged start is not growth
    grown = rs > 1.001 * torch.maximum(first, bb * trees.epsilon(b))
    diverged = grown & torch.isfinite(rs)
    return stats._replace(result=code_where(diverged, RESULTS.divergence, stats.result))
