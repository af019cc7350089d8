"""GMRES: the Krylov subspace method that keeps its whole basis."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.trees import ravel_local, unravel
from hyperfunc._torch import sharding, tracking
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    Bounds,
    LinearOperator,
    Solved,
    check_stopping,
)
from hyperfunc.linear_solvers._cycles import State, begin, run_cycles
from hyperfunc.linear_solvers._preconditioners import (
    Preconditioner,
    check_preconditioner,
    prepare,
    resolve_count,
)
from hyperfunc.linear_solvers._units import in_units

_NOISE = 10.0  # rounding errors of a product, in units of eps times the norm of the operator


@dataclasses.dataclass(frozen=True)
class GMRES(AbstractLinearSolver):
    """Generalised minimal residuals, for any invertible operator.

    Each step takes one product and gives the smallest residual ``||b - A x||`` over the Krylov
    space. All its basis vectors are kept, so the iteration starts anew after ``restart`` of them:
    with ``maxiter=K``, ``K + (K - 1) // restart`` products. The basis is built by classical
    Gram-Schmidt, done twice, in the accumulation dtype (float32 at least).

    A residual that is no smaller after a whole cycle is reported as stagnation, or as success below
    ``eps^0.25 ||b||`` if rounding errors keep it there. A singular operator whose Krylov space
    holds no solution is reported as breakdown. So is one that is singular to the basis: of ``A``
    times the preconditioner, singular values below ``10 eps`` times the largest are lost in it,
    where `CG` and `Dense` may still find the solution of badly scaled equations. The iterate that
    is returned then is the one with the smallest residual that rounding lets be, not one that is
    large for nothing. The residual norm of a fixed number of steps is that of the recurrence, and
    the level of rounding ``eps (||A|| ||x|| + ||b||)`` at least.

    Args:
        maxiter: largest number of steps, over all cycles, >= 0.
        restart: steps a cycle, from 1 to the number of inner parameters; by default 20, or that
            number if it is smaller.
        preconditioner: an approximation of the inverse, applied from the right, so that the
            residual is that of the system itself.

    All other arguments are those of `CG`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.GMRES().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)

    References:
        Saad and Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric
        linear systems, 1986; twice is enough: Giraud, Langou and Rozloznik, 2005.
    """

    maxiter: int = 1000
    restart: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_stopping(self)
        if self.restart is not None:
            check_count(self, "restart", self.restart)
        check_preconditioner(self)

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        restart = resolve_count(self, "restart", self.restart, 20, b)
        preconditioner = prepare(self.preconditioner, operator, b)
        precondition = preconditioner or (lambda v: v)
        vectors = _FlatVectors(b)
        start, bounds = begin(self, operator, b, x0)
        operator_norm = product_norm = torch.zeros_like(start.rs)

        def cycle(start: State, bounds: Bounds, most: int) -> tuple[State, int]:
            nonlocal operator_norm, product_norm
            x, r, rs, num_steps, active, _ = start
            most, step = min(most, restart), 0
            space = _Space(vectors, r, rs, product_norm, active, most + 1)
            while step < most and not (step and bounds.finished(active)):
                step += 1
                z = precondition(unravel(space.basis[-1], b))
                made, norm = space.extend(operator.mv(z), active)
                rs = torch.where(made, space.residual_norm**2, rs)
                rs = torch.where(active & ~torch.isfinite(norm), norm, rs)
                # without a preconditioner, z is a unit vector
                gain = norm if preconditioner is None else norm / trees.norm(z)
                operator_norm = torch.maximum(operator_norm, torch.where(made, gain, 0.0))
                num_steps = num_steps + made
                active = made & bounds.open(rs)
            product_norm = space.norm
            x = trees.add(x, precondition(unravel(space.combination(), b)))
            return State(x, r, rs, num_steps, active), step

        x, stats = run_cycles(self, operator, b, start, bounds, cycle, retry=True)
        if bounds.adaptive:
            return x, stats
        # of the recurrence, which does not know of rounding
        rounding = trees.epsilon(b) * (operator_norm * trees.norm(x) + trees.norm(b))
        return x, stats._replace(residual_norm=torch.maximum(stats.residual_norm, rounding))


class _FlatVectors:
    """Flat vectors of what this rank holds of some leaves, and their products over all ranks."""

    def __init__(self, like: Leaves) -> None:
        self._dtype = trees.accumulation_dtype(like)
        self._layout = sharding.layout_of(like)
        self._counted: Tensor | None = None
        if self._layout is not None and not all(counted := self._layout.counted()):
            masks = zip(self._layout.local(like), counted, strict=True)
            ones = [torch.full((part.numel(),), count, dtype=self._dtype) for part, count in masks]
            self._counted = torch.cat(ones).to(like[0].device)

    def ravel(self, x: Leaves) -> Tensor:
        return ravel_local(x, self._dtype)

    def products(self, rows: Tensor, w: Tensor) -> Tensor:
        """``rows @ w``."""
        return rows @ w if self._layout is None else self._layout.sum(rows @ self._once(w))

    def norm(self, w: Tensor) -> Tensor:
        if self._layout is None:
            length: Tensor = torch.linalg.vector_norm(w)
            return length
        return self._layout.sum(w @ self._once(w)).sqrt()

    def project(self, rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """``rows @ w`` and the norm of ``w``, with one reduction."""
        if self._layout is None:
            return rows @ w, torch.linalg.vector_norm(w)
        once = self._once(w)
        sums = self._layout.sum(torch.cat([rows @ once, (w @ once)[None]]))
        return sums[:-1], sums[-1].sqrt()

    def _once(self, w: Tensor) -> Tensor:
        """The vector with zeros for the entries that other ranks count."""
        return w if self._counted is None else w * self._counted


class _Space:
    """The Arnoldi relation ``A M V_k = V_{k+1} H_k``, and its residual norm as it grows.

    A finished task gets zero vectors, and columns of ``H_k`` that keep its coefficients at zero.
    """

    def __init__(
        self,
        vectors: _FlatVectors,
        r: Leaves,
        rs: Tensor,
        norm: Tensor,
        active: Tensor,
        size: int,
    ) -> None:
        self._vectors = vectors
        self.norm = norm  # of the products so far, the largest
        self.start = self.residual_norm = rs.sqrt()
        self.basis = torch.where(active, vectors.ravel(r) / self.start, 0.0)[None]
        # room for the whole basis, where that may be written to
        self._room: Tensor | None = None
        if not tracking.transforms_active() and trees.may_overwrite((self.basis,)):
            self._room = self.basis.new_empty(size, self.basis.shape[1])
            self._room[0] = self.basis[0]
            self.basis = self._room[:1]
        self.columns: list[Tensor] = []
        self._residual_norms = [self.start]
        # the last row of the orthogonal factor of H_k, all that Givens' rotations need of it
        self._row = torch.ones_like(self.start)[None]

    def extend(self, product: Leaves, active: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the product with the last vector: who made this step, and its norm."""
        vectors, w = self._vectors, self._vectors.ravel(product)
        projection, norm = vectors.project(self.basis, w)
        w = w - projection @ self.basis
        correction = vectors.products(self.basis, w)
        w = w - correction @ self.basis
        column, below = projection + correction, vectors.norm(w)

        diagonal = self._row @ column
        pivot = torch.hypot(diagonal, below)
        # a pivot that is rounding noise tells a singular operator
        self.norm = torch.maximum(self.norm, torch.where(active, norm, 0.0))
        made = active & (pivot > _NOISE * torch.finfo(w.dtype).eps * self.norm)
        sine = torch.where(made, below / pivot, 1.0)
        self._row = torch.cat([-sine * self._row, (diagonal / pivot)[None]])
        self.residual_norm = self.residual_norm * sine
        self._residual_norms.append(self.residual_norm)
        column = torch.cat([column, below[None]])
        idle = torch.eye(len(column), dtype=w.dtype, device=w.device)[-1]
        self.columns.append(torch.where(made, column, idle))
        self._append(torch.where(made & (below > 0), w / below, 0.0))
        return made, norm

    def _append(self, vector: Tensor) -> None:
        count = len(self.basis)
        if self._room is not None and trees.may_overwrite((vector,)):
            self._room[count] = vector
            self.basis = self._room[: count + 1]
        else:
            self.basis = torch.cat([self.basis, vector[None]])
            self._room = None

    def combination(self) -> Tensor:
        """The vector ``V_k y`` for which the residual is smallest."""
        size = len(self.columns)
        if size == 0:
            return torch.zeros_like(self.basis[0])
        pad = torch.nn.functional.pad
        hessenberg = torch.stack([pad(c, (0, size + 1 - len(c))) for c in self.columns], dim=1)
        orthogonal, triangular = torch.linalg.qr(hessenberg)
        # column j: the coefficients of the best combination of the first j vectors
        rhs = pad((self.start * orthogonal[0])[:, None].expand(size, size).triu(), (1, 0))
        y: Tensor = torch.linalg.solve_triangular(triangular, rhs, upper=True)
        # the residual that each leaves, the last unless it is as large as the first
        noise = _NOISE * torch.finfo(y.dtype).eps * self.norm * torch.linalg.vector_norm(y, dim=0)
        left = torch.stack(self._residual_norms) + noise
        best = torch.where(left[-1] < 0.1 * self.start, size, left.argmin())
        return y.gather(1, best.expand(size, 1))[:, 0] @ self.basis[:size]
