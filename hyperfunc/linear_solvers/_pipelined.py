"""Conjugate gradients with one sum over the ranks a step, hidden behind the product."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_count
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import Bounds, LinearOperator, Solved, no_steps
from hyperfunc.linear_solvers._cycles import State, begin, run_cycles
from hyperfunc.linear_solvers._preconditioners import PreconditionedSolver, prepare
from hyperfunc.linear_solvers._units import in_units


@dataclasses.dataclass(frozen=True)
class PipelinedCG(PreconditionedSolver):
    r"""`CG` rearranged so that a step takes one sum over the ranks, done during its product.

    In exact arithmetic the iterates are those of `CG`, where a step waits for two sums over the
    ranks, one before and one after its product. Here recurrences for :math:`A p`, :math:`M A p` and
    :math:`A M A p` bring all inner products of a step together, and the next product does not need
    them. It pays on DTensors, on many ranks or over a slow network; it takes six further vectors.
    On ordinary tensors `CG` is faster.

    The recurrences drift by rounding. So they are evaluated anew every ``replace`` steps, by four
    products, and the residual itself decides at the end, by one product: what has brought it down
    tenfold may start again from there, and a residual above ten times the tolerance and
    ``sqrt(eps) ||b||``, while the recurrence is below, is reported as stagnation. In float32,
    condition numbers of about 1e3 are what can be had.

    With ``K`` steps, ``K + 2`` products, four more for each replacement, and two for each restart.

    Args:
        replace: steps between replacements, >= 1.

    All other arguments are those of `CG`.

    An operator that is not symmetric shows in the residual at the end alone.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.PipelinedCG().solve(operator, (torch.tensor([5.0, 5.0]),))[0]
        (tensor([1., 2.]),)

    References:
        Ghysels and Vanroose, Hiding global synchronization latency in the preconditioned conjugate
        gradient algorithm, 2014, algorithm 4; replacement: Cools, Yetkin, Agullo, Giraud and
        Vanroose, arXiv 1601.07068.
    """

    replace: int = 50

    symmetric_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "replace", self.replace)

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        preconditioner = prepare(self.preconditioner, operator, b)
        precondition = preconditioner or (lambda v: v)

        def start_cycle(start: State, by: Bounds) -> _Pipeline:
            x, r, rs, num_steps, active, *_ = start
            u, zeros, one = precondition(r), trees.zeros_like(x), torch.ones_like(rs)
            vectors = x, r, u, operator.mv(u), zeros, zeros, zeros, zeros, (), ()
            count = no_steps(rs) if loop.is_kept(start) else 0
            # as if a step with an infinite gamma had been made, so that beta is zero
            infinite = torch.full_like(rs, torch.inf)
            return ahead(
                _Pipeline(*vectors, rs, infinite, infinite, one, one, num_steps, active, count), by
            )

        def ahead(s: _Pipeline, by: Bounds) -> _Pipeline:
            """The next product, and meanwhile the inner products of a step."""
            pending = trees.start_dots((s.r, s.r), (s.r, s.u), (s.w, s.u))
            m = precondition(s.w)
            n = operator.mv(m)
            rs, gamma, delta = pending()
            rs = torch.where(s.active, rs, s.rs)
            active = s.active & by.open(rs)
            m = m if preconditioner else ()
            products = rs, s.gamma, gamma, delta
            return _Pipeline(*s[:8], m, n, *products, s.alpha, s.num_steps, active, s.count)

        def descend(s: _Pipeline, by: Bounds) -> _Pipeline:
            beta = torch.where(s.active, s.gamma / s.gamma_before, 0.0)
            alpha = s.gamma / (s.delta - beta * s.gamma / s.alpha)
            active = s.active & (alpha > 0) & (alpha < torch.inf)
            num_steps, up = s.num_steps + active, torch.where(active, alpha, 0.0)
            down = -up
            z, q = by.add(beta, s.z, s.n, s.z), by.add(beta, s.q, s.m or s.w, s.q)
            Ap, p = by.add(beta, s.s, s.w, s.s), by.add(beta, s.p, s.u, s.p)
            x, r = by.add(up, p, s.x, s.x), by.add(down, Ap, s.r, s.r)
            u, w = by.add(down, q, s.u, s.u), by.add(down, z, s.w, s.w)
            vectors = x, r, u, w, p, Ap, q, z, (), ()
            scalars = s.rs, s.gamma_before, s.gamma, s.delta, alpha, num_steps, active
            return _Pipeline(*vectors, *scalars, s.count + 1)

        def step(s: _Pipeline, by: Bounds) -> _Pipeline:
            s = descend(s, by)

            def renew(old: tuple[Leaves, ...]) -> tuple[Leaves, ...]:
                r, Ap = operator.residual(s.x, b), operator.mv(s.p)
                u, q = precondition(r), precondition(Ap)
                new = r, u, operator.mv(u), s.p, Ap, q, operator.mv(q)
                return tuple(trees.where(s.active, *pair) for pair in zip(new, old, strict=True))

            drifting: tuple[Leaves, ...] = s[1:8]
            anew: Any = loop.when(s.count % self.replace == 0, renew, drifting)
            rest: Any = s[8:]
            return ahead(_Pipeline(s.x, *anew, *rest), by)

        def cycle(start: State, by: Bounds, most: Any) -> tuple[State, Any]:
            s = start_cycle(start, by)
            s, taken = by.steps(step, s, most, numbers=False, last=descend)
            return State(s.x, s.r, s.rs, s.num_steps, s.active), taken

        return run_cycles(
            self, operator, b, *begin(self, operator, b, x0), cycle, always=True, retry=True
        )


class _Pipeline(NamedTuple):
    """``u = M r``, ``w = A u``, ``s = A p``, ``q = M s``, ``z = A q``, ``m = M w``, ``n = A m``.

    ``m`` is left out if it is ``w``. Further ``gamma = <r, u>``, also the one before, ``delta =
    <w, u>``, the last ``alpha``, what `State` has, and steps of this cycle.
    """

    x: Leaves
    r: Leaves
    u: Leaves
    w: Leaves
    p: Leaves
    s: Leaves
    q: Leaves
    z: Leaves
    m: Leaves
    n: Leaves
    rs: Tensor
    gamma_before: Tensor
    gamma: Tensor
    delta: Tensor
    alpha: Tensor
    num_steps: Tensor
    active: Tensor
    count: Any
