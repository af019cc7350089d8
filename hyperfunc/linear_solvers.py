"""Linear solvers for the adjoint system ``A^T u = dE/dw``, matrix-free on trees of any layout.

Each solver is a small frozen object. It sees a `LinearOperator` and a right-hand side as tuples of
leaves, works under ``torch.func.vmap`` (a task that has converged is frozen, with its own
``num_steps`` and result code), never looks at the operator's entries unless it says so, and
returns the iterate together with `hyperfunc.SolveStats`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hyperfunc import _ad, _tree
from hyperfunc._results import RESULTS, SolveStats
from hyperfunc._types import Leaves


@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """The operator ``A = shift I + scale P``, given by the products with ``P`` and ``P^T``.

    A fixed-point map has ``P = dphi/dw`` with ``shift = 1, scale = -1``; an inner loss has its
    Hessian with ``shift = 0, scale = 1``. Keeping the identity apart lets solvers fuse it into
    their own vector updates.

    Args:
        product: ``v -> P v`` on tuples of leaves.
        transposed_product: ``v -> P^T v``.
        shift: the coefficient of the identity.
        scale: the coefficient of ``P``.
        symmetric: whether ``P = P^T`` is known.
    """

    product: Callable[[Leaves], Leaves]
    transposed_product: Callable[[Leaves], Leaves]
    shift: float = 0.0
    scale: float = 1.0
    symmetric: bool = False

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        return dataclasses.replace(
            self, product=self.transposed_product, transposed_product=self.product
        )

    def mv(self, v: Leaves) -> Leaves:
        """The product ``A v``."""
        return _combine(self.scale, self.product(v), self.shift, v)

    def residual(self, v: Leaves, b: Leaves) -> Leaves:
        """The residual ``b - A v``."""
        return _combine(-1.0, self.mv(v), 1.0, b)

    def richardson(self, v: Leaves, b: Leaves, step_size: float) -> Leaves:
        """One step ``v + step_size (b - A v)``, with as few passes over the vectors as it takes."""
        update = _combine(-step_size * self.scale, self.product(v), step_size, b)
        return _combine(1.0, update, 1.0 - step_size * self.shift, v)


class AbstractLinearSolver(abc.ABC):
    """What every linear solver provides: `solve`.

    A subclass is final: a frozen dataclass of its settings with this one method.
    """

    @abc.abstractmethod
    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        """Solve ``A x = b`` from ``x0`` (zeros by default).

        Args:
            operator: the operator ``A``.
            b: right-hand side, a tuple of leaves.
            x0: initial iterate, like ``b``.

        Returns:
            The solution and its statistics. A failure is a result code here, never an exception.
        """


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
        >>> operator = LinearOperator(lambda v: (A @ v[0],), lambda v: (A.T @ v[0],))
        >>> (x,), stats = CG(maxiter=10).solve(operator, (torch.tensor([5.0, 5.0]),))
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
        _check_settings(self, self.maxiter, self.rtol, self.atol)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        x = _tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else operator.residual(x0, b)
        p = r
        rs = _tree.dot(r, r)
        bounds = _Bounds.make(self.rtol, self.atol, b, rs)
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
        >>> operator = LinearOperator(lambda v: (A @ v[0],), lambda v: (A.T @ v[0],))
        >>> (x,), stats = NormalCG(maxiter=10).solve(operator, (torch.tensor([4.0, 3.0]),))
        >>> x
        tensor([-3.,  2.])

    References:
        Bjorck, Numerical methods for least squares problems, SIAM 1996, algorithm 7.4.1.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        _check_settings(self, self.maxiter, self.rtol, self.atol)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        transposed = operator.T
        x = _tree.zeros_like(b) if x0 is None else x0
        r = b if x0 is None else operator.residual(x0, b)
        rs = _tree.dot(r, r)
        bounds = _Bounds.make(self.rtol, self.atol, b, rs)
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
        >>> operator = LinearOperator(
        ...     lambda v: (J @ v[0],), lambda v: (J.T @ v[0],), shift=1.0, scale=-1.0
        ... )
        >>> (x,), stats = FixedPoint(maxiter=100).solve(operator, (torch.tensor([0.0, 1.0]),))
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
        _check_settings(self, self.maxiter, self.rtol, self.atol)
        _check_step_size(self, self.step_size)

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
        >>> operator = LinearOperator(
        ...     lambda v: (0.5 * v[0],), lambda v: (0.5 * v[0],), shift=1.0, scale=-1.0
        ... )
        >>> (x,), stats = Neumann(maxiter=2, rtol=0, atol=0).solve(operator, (torch.ones(1),))
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
        _check_settings(self, self.maxiter, self.rtol, self.atol)
        _check_step_size(self, self.step_size)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        start = _tree.scale(self.step_size, b) if x0 is None else x0
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
        >>> operator = LinearOperator(lambda v: v, lambda v: v)
        >>> OneStep().solve(operator, (torch.ones(2),))[0]
        (tensor([1., 1.]),)

    References:
        Luketina et al., arXiv 1511.06727; Liu, Simonyan and Yang, arXiv 1806.09055;
        Fung et al., arXiv 2103.12803; Bolte, Pauwels and Vaiter, arXiv 2305.13768.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        _check_step_size(self, self.step_size)

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        rs = _tree.dot(b, b)
        bounds = _Bounds.make(0.0, 0.0, b, rs)
        num_steps = torch.zeros((), dtype=torch.int64, device=rs.device)
        return _tree.scale(self.step_size, b), bounds.stats(num_steps, rs, bounds.open(rs))


@dataclasses.dataclass(frozen=True)
class Dense(AbstractLinearSolver):
    """Forms the matrix of the operator column by column and solves by LU factorisation.

    Exact up to rounding for any invertible operator. Takes ``n`` products and ``n^2`` memory for
    ``n`` inner parameters in all, so it is for small problems and as the oracle that other methods
    are checked against. A matrix that is singular to working precision is reported as breakdown.

    Example:
        >>> import torch
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = LinearOperator(lambda v: (A @ v[0],), lambda v: (A.T @ v[0],))
        >>> Dense().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)
    """

    def solve(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, SolveStats]:
        dtype = _tree.accumulation_dtype(b)
        rhs = _ravel(b, dtype)
        identity = torch.eye(rhs.numel(), dtype=dtype, device=rhs.device)
        matrix = torch.stack(
            [_ravel(operator.mv(_unravel(column, b)), dtype) for column in identity], dim=1
        )
        # solve_ex, unlike solve, neither raises nor synchronises on a singular matrix
        x, info = torch.linalg.solve_ex(matrix, rhs)
        residual_norm = torch.linalg.vector_norm(rhs - matrix @ x)
        conditioning = torch.linalg.vector_norm(matrix) * torch.linalg.vector_norm(x)
        singular = (info != 0) | (
            conditioning * torch.finfo(dtype).eps > torch.linalg.vector_norm(rhs)
        )
        finite = torch.isfinite(matrix).all() & torch.isfinite(rhs).all()
        result = torch.where(singular, int(RESULTS.breakdown), int(RESULTS.success))
        result = torch.where(finite, result, int(RESULTS.nonfinite))
        num_steps = torch.full_like(result, identity.shape[0])
        return _unravel(x, b), SolveStats(num_steps, residual_norm, result)


@dataclasses.dataclass(frozen=True)
class _Bounds:
    """The squared residual norms at which an iteration stops, and the verdict when it has."""

    converged: Tensor
    diverged: Tensor
    asymmetry: float
    adaptive: bool

    @staticmethod
    def make(rtol: float | None, atol: float, b: Leaves, rs: Tensor) -> _Bounds:
        """Bounds for a right-hand side and the squared norm of the first residual."""
        eps = _tree.epsilon(b)
        bb = _tree.dot(b, b)
        relative = eps**0.75 if rtol is None else rtol
        # below eps ||b|| a residual is rounding noise, on which recurrences divide 0 by 0
        converged = bb * max(relative, eps) ** 2
        if atol:
            converged = converged.clamp_min(atol**2)
        return _Bounds(
            converged=converged,
            diverged=torch.maximum(rs, bb) / eps,
            asymmetry=eps**0.25,
            adaptive=bool(relative or atol),
        )

    def open(self, rs: Tensor) -> Tensor:
        """Whether the iteration may go on: neither converged, nor diverged, nor NaN."""
        return (rs > self.converged) & (rs < self.diverged)

    def stats(self, num_steps: Tensor, rs: Tensor, active: Tensor) -> SolveStats:
        """Statistics at the end, where ``active`` tells an iteration that could have gone on."""
        unfinished = RESULTS.max_steps if self.adaptive else RESULTS.success
        result = torch.where(active, int(unfinished), int(RESULTS.breakdown))
        result = torch.where(rs >= self.diverged, int(RESULTS.divergence), result)
        result = torch.where(rs <= self.converged, int(RESULTS.success), result)
        result = torch.where(torch.isfinite(rs), result, int(RESULTS.nonfinite))
        return SolveStats(num_steps.expand_as(result).clone(), rs.sqrt(), result)


def _richardson(
    solver: FixedPoint | Neumann,
    operator: LinearOperator,
    b: Leaves,
    x0: Leaves | None,
    maxiter: int,
) -> tuple[Leaves, SolveStats]:
    step_size = solver.step_size
    first = bb = _tree.dot(b, b)
    bounds = _Bounds.make(solver.rtol, solver.atol, b, bb)
    x, rs, steps = (_tree.zeros_like(b) if x0 is None else x0), bb, 0
    if x0 is None and maxiter > 0:
        x, steps = _tree.scale(step_size, b), 1
    num_steps = torch.full((), steps, dtype=torch.int64, device=bb.device)
    active = bounds.open(rs)
    for step in range(steps, maxiter):
        if bounds.adaptive and not _ad.any_true(active):
            break
        new = operator.richardson(x, b, step_size)
        measured = bounds.adaptive or step in (steps, maxiter - 1)
        if measured:
            update = _tree.sub(new, x)
            rs = torch.where(active, _tree.dot(update, update) / step_size**2, rs)
        if step == 0:
            first = rs
        num_steps = num_steps + active
        x = _tree.where(active, new, x) if bounds.adaptive else new
        if measured:
            active = active & bounds.open(rs)
    stats = bounds.stats(num_steps, rs, active)
    # rounding noise around a converged start is not growth
    grown = rs > 1.001 * torch.maximum(first, bb * _tree.epsilon(b))
    return x, stats._replace(
        result=torch.where(grown & torch.isfinite(rs), int(RESULTS.divergence), stats.result)
    )


def _combine(alpha: float, x: Leaves, beta: float, y: Leaves) -> Leaves:
    if beta == 0:
        return x if alpha == 1 else _tree.scale(alpha, x)
    if alpha == 1:
        return _tree.axpy(beta, y, x)
    if beta == 1:
        return _tree.axpy(alpha, x, y)
    return _tree.axpy(alpha, x, _tree.scale(beta, y))


def _ravel(x: Leaves, dtype: torch.dtype) -> Tensor:
    return torch.cat([leaf.to(device=x[0].device, dtype=dtype).reshape(-1) for leaf in x])


def _unravel(vector: Tensor, like: Leaves) -> Leaves:
    parts = torch.split(vector, [leaf.numel() for leaf in like])
    return tuple(
        part.reshape(leaf.shape).to(device=leaf.device, dtype=leaf.dtype)
        for part, leaf in zip(parts, like, strict=True)
    )


def _check_settings(solver: object, maxiter: object, rtol: object, atol: object) -> None:
    name = type(solver).__name__
    if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0:
        raise ValueError(f"{name}: maxiter is {maxiter!r}; expected an integer >= 0")
    for field, value in (("rtol", rtol), ("atol", atol)):
        if field == "rtol" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name}: {field} is {value!r}; expected a number >= 0")


def _check_step_size(solver: object, step_size: object) -> None:
    if isinstance(step_size, bool) or not isinstance(step_size, int | float) or not step_size > 0:
        name = type(solver).__name__
        raise ValueError(f"{name}: step_size is {step_size!r}; expected a number > 0")
