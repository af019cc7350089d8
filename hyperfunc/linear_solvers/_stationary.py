"""Fixed-point iterations on the linear system: Richardson, Neumann, one step."""

from __future__ import annotations

import dataclasses

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, SolveStats
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    Bounds,
    LinearOperator,
    check_settings,
    check_step_size,
)


@dataclasses.dataclass(frozen=True)
class FixedPoint(AbstractLinearSolver):
    """Fixed-point (Richardson) iteration ``x <- x + step_size (b - A x)``.

    For a fixed-point map with Jacobian ``J``, where the adjoint system has ``A^T = I - J^T``, and
    step size 1 this is ``v <- J^T v + b`` from ``v = 0``: HyperTorch's ``fixed_point``. It
    converges when ``I - step_size A`` is a contraction, and its error after ``K`` steps is that of
    ``K`` steps of reverse mode at the solution. For an inner loss ``A`` is the Hessian, and the
    step size must be below 2 over its largest eigenvalue. One product a step; the first step from
    zero needs none.

    Args:
        maxiter: largest number of steps, >= 0; exactly this many with ``rtol=0, atol=0``.
        rtol: relative tolerance on the residual, >= 0; by default ``eps ** 0.75``.
        atol: absolute tolerance, >= 0.
        step_size: > 0.

    A residual that is larger at the end than at the start is reported as divergence.

    Example:
        >>> import torch
        >>> J = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
        >>> operator = hf.linear_solvers.LinearOperator(
        ...     lambda v: (J @ v[0],), lambda v: (J.T @ v[0],), shift=1.0, scale=-1.0
        ... )
        >>> (x,), stats = hf.FixedPoint(maxiter=100).solve(operator, (torch.tensor([0.0, 1.0]),))
        >>> x
        tensor([1.0000, 2.0000])

    References:
        Grazzi et al., On the iteration complexity of hypergradient computation, arXiv 2006.16218.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, self.maxiter, self.rtol, self.atol)
        check_step_size(self, self.step_size)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        return _richardson(self, operator, b, x0, self.maxiter)


@dataclasses.dataclass(frozen=True)
class Neumann(AbstractLinearSolver):
    """Truncated Neumann series ``x_K = step_size sum_{i<=K} (I - step_size A)^i b``.

    For a fixed-point map and step size 1 this is ``sum_{i<=K} (J^T)^i b``: it starts at ``v = b``,
    so ``Neumann(K)`` equals ``FixedPoint(K + 1)``, with ``K`` products. It converges under the same
    condition and takes the same arguments as `FixedPoint`.

    Example:
        >>> import torch
        >>> operator = hf.linear_solvers.LinearOperator(
        ...     lambda v: (0.5 * v[0],), lambda v: (0.5 * v[0],), shift=1.0, scale=-1.0
        ... )
        >>> (x,), stats = hf.Neumann(maxiter=2, rtol=0, atol=0).solve(operator, (torch.ones(1),))
        >>> x
        tensor([1.7500])

    References:
        Lorraine, Vicol and Duvenaud, arXiv 1911.02590; Grazzi et al., arXiv 2006.16218.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, self.maxiter, self.rtol, self.atol)
        check_step_size(self, self.step_size)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        start = trees.scale(self.step_size, b) if x0 is None else x0
        return _richardson(self, operator, b, start, self.maxiter)


@dataclasses.dataclass(frozen=True)
class OneStep(AbstractLinearSolver):
    """The adjoint taken as ``u = b``: differentiate one step of the map at the solution.

    With a fixed-point condition the hypergradient becomes
    ``dE/dhparams + (dphi/dhparams)^T dE/dw``, which is what differentiating only the last step of
    the inner iteration gives. No product is needed; the error is the whole contribution of
    ``J^T u``, so the map must contract fast. Also known as Jacobian-free backpropagation, the
    T1-T2 method, and, for one gradient step, first-order DARTS or first-order MAML.

    Args:
        step_size: ``u = step_size b``; > 0. With an inner loss, the size of the one gradient step.

    Example:
        >>> import torch
        >>> operator = hf.linear_solvers.LinearOperator(lambda v: v, lambda v: v)
        >>> hf.OneStep().solve(operator, (torch.ones(2),))[0]
        (tensor([1., 1.]),)

    References:
        Luketina et al., arXiv 1511.06727; Liu, Simonyan and Yang, arXiv 1806.09055;
        Fung et al., arXiv 2103.12803; Bolte, Pauwels and Vaiter, arXiv 2305.13768.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        check_step_size(self, self.step_size)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        rs = trees.dot(b, b)
        bounds = Bounds.make(0.0, 0.0, b, rs)
        num_steps = torch.zeros((), dtype=torch.int64, device=rs.device)
        return trees.scale(self.step_size, b), bounds.stats(num_steps, rs, bounds.open(rs))


def _richardson(
    solver: FixedPoint | Neumann,
    operator: LinearOperator,
    b: Leaves,
    x0: Leaves | None,
    maxiter: int,
) -> tuple[Leaves, SolveStats]:
    step_size = solver.step_size
    first = bb = trees.dot(b, b)
    bounds = Bounds.make(solver.rtol, solver.atol, b, bb)
    x, rs, steps = (trees.zeros_like(b) if x0 is None else x0), bb, 0
    if x0 is None and maxiter > 0:
        x, steps = trees.scale(step_size, b), 1
    num_steps = torch.full((), steps, dtype=torch.int64, device=bb.device)
    # from a given start even a small b says nothing of the residual
    active = bounds.open(rs) if x0 is None else torch.isfinite(bb)
    uncounted = 0
    for step in range(steps, maxiter):
        if bounds.adaptive and not batching.any_true(active):
            break
        new = operator.richardson(x, b, step_size)
        measured = bounds.adaptive or step in (steps, maxiter - 1)
        if measured:
            update = trees.sub(new, x)
            rs = torch.where(active, trees.dot(update, update) / step_size**2, rs)
        if step == 0:
            first = rs
            bounds = Bounds.make(solver.rtol, solver.atol, b, first)
        uncounted += 1
        x = trees.where(active, new, x) if bounds.adaptive else new
        if measured:
            num_steps, uncounted = num_steps + uncounted * active, 0
            active = active & bounds.open(rs)
    stats = bounds.stats(num_steps, rs, active)
    # rounding noise around a converged start is not growth
    grown = rs > 1.001 * torch.maximum(first, bb * trees.epsilon(b))
    return x, stats._replace(
        result=torch.where(grown & torch.isfinite(rs), int(RESULTS.divergence), stats.result)
    )
