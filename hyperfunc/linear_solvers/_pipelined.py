"""Conjugate gradients with one sum over the ranks a step, hidden behind the product."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import Bounds, LinearOperator, Solved
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
        precondition = prepare(self.preconditioner, operator, b) or (lambda v: v)

        def vectors_at(x: Leaves, r: Leaves, p: Leaves | None = None) -> _Vectors:
            """Those of an iterate, its residual and a direction, evaluated anew."""
            u = precondition(r)
            w = operator.mv(u)
            if p is None:
                zeros = trees.zeros_like(x)
                return _Vectors(x, r, u, w, zeros, zeros, zeros, zeros)
            s = operator.mv(p)
            q = precondition(s)
            return _Vectors(x, r, u, w, p, s, q, operator.mv(q))

        def cycle(start: State, bounds: Bounds, most: int) -> tuple[State, int]:
            x, r, rs, num_steps, active, *_ = start
            v = vectors_at(x, r)
            gamma_previous = alpha = torch.ones_like(rs)
            own = False  # the first vectors are those of the caller, or one and the same
            for step in range(most):
                if step and step % self.replace == 0:
                    v = vectors_at(v.x, operator.residual(v.x, b), v.p).where(active, v)
                pending = trees.start_dots((v.r, v.r), (v.r, v.u), (v.w, v.u))
                m = precondition(v.w)
                n = operator.mv(m)
                rs_now, gamma, delta = pending()
                rs = torch.where(active, rs_now, rs)
                active = active & bounds.open(rs)
                if bounds.finished(active):
                    return State(v.x, v.r, rs, num_steps, active), step
                if step == 0:
                    beta, curvature = torch.zeros_like(rs), delta
                else:
                    beta = torch.where(active, gamma / gamma_previous, 0.0)
                    curvature = delta - beta * gamma / alpha
                alpha = gamma / curvature
                active = active & (alpha > 0) & (alpha < torch.inf)
                num_steps = num_steps + active
                v = v.step(torch.where(active, alpha, 0.0), beta, m, n, own)
                own = own or trees.may_overwrite(*v)
                gamma_previous = gamma
            return State(v.x, v.r, rs, num_steps, active), most

        return run_cycles(
            self, operator, b, *begin(self, operator, b, x0), cycle, always=True, retry=True
        )


class _Vectors(NamedTuple):
    """Iterate, residual, ``u = M r``, ``w = A u``, ``s = A p``, ``q = M s``, ``z = A q``."""

    x: Leaves
    r: Leaves
    u: Leaves
    w: Leaves
    p: Leaves
    s: Leaves
    q: Leaves
    z: Leaves

    def step(self, alpha: Tensor, beta: Tensor, m: Leaves, n: Leaves, own: bool) -> _Vectors:
        """The vectors after a step; ``own`` if these may be written over."""

        def add(factor: Tensor, x: Leaves, y: Leaves, out: Leaves) -> Leaves:
            return trees.axpy(factor, x, y, out=out if own else None)

        z, q = add(beta, self.z, n, self.z), add(beta, self.q, m, self.q)
        s, p = add(beta, self.s, self.w, self.s), add(beta, self.p, self.u, self.p)
        x, r = add(alpha, p, self.x, self.x), add(-alpha, s, self.r, self.r)
        u, w = add(-alpha, q, self.u, self.u), add(-alpha, z, self.w, self.w)
        return _Vectors(x, r, u, w, p, s, q, z)

    def where(self, mask: Tensor, others: _Vectors) -> _Vectors:
        """These where the mask holds, else the others."""
        return _Vectors(*(trees.where(mask, *pair) for pair in zip(self, others, strict=True)))
