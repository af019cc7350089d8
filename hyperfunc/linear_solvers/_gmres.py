"""GMRES: the Krylov subspace method that keeps its whole basis."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
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
    no_steps,
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
        room = max(1, min(restart, self.maxiter))
        preconditioner = prepare(self.preconditioner, operator, b)
        precondition = preconditioner or (lambda v: v)
        vectors = _FlatVectors(b)
        start, bounds = begin(self, operator, b, x0)
        zero = torch.zeros_like(start.rs)
        operator_norm = zero

        def step(s: _Space, by: Bounds) -> _Space:
            z = precondition(unravel(s.last(), b))
            product = vectors.ravel(operator.mv(z))
            # without a preconditioner, z is a unit vector
            return s.extend(vectors, product, None if preconditioner is None else trees.norm(z), by)

        def cycle(start: State, bounds: Bounds, most: Any) -> tuple[State, Any]:
            nonlocal operator_norm
            most = min(most, restart) if isinstance(most, int) else most.clamp_max(restart)
            space = _Space.begin(vectors.ravel(start.r), start, room)
            s, taken = bounds.steps(step, space, most, numbers=False)
            operator_norm = s.operator_norm
            x = trees.add(start.x, precondition(unravel(s.combination(start), b)))
            memory = s.product_norm, s.operator_norm
            end = State(x, start.r, s.rs, s.num_steps, s.active, memory=memory)
            return end, taken if bounds.adaptive else most

        start = start._replace(memory=(zero, zero))
        x, stats = run_cycles(self, operator, b, start, bounds, cycle, retry=True, restarts=True)
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


class _Space(NamedTuple):
    """The Arnoldi relation ``A M V_k = V_{k+1} H_k`` as it grows.

    A finished task gets zero vectors. Where the loop is kept there is room for all steps from the
    first one on.
    """

    basis: Tensor
    columns: Any  # of H_k: a tuple, or rows of a tensor
    # the last row of the orthogonal factor of H_k, all that Givens' rotations need of it
    last_row: Tensor
    residual_norms: Any  # at first, and after each step
    size: Any  # k
    residual_norm: Tensor
    product_norm: Tensor  # of the products so far, the largest
    operator_norm: Tensor
    rs: Tensor
    num_steps: Tensor
    active: Tensor

    @staticmethod
    def begin(r: Tensor, start: State, room: int) -> _Space:
        """No step yet, and room for so many."""
        norm = start.rs.sqrt()
        first = torch.where(start.active, r / norm, 0.0)
        rest = norm, *start.memory, *start[2:5]
        if loop.is_kept(start):
            zeros = first.new_zeros(room + 1, room + 1)
            basis = torch.nn.functional.pad(first[None], (0, 0, 0, room))
            none = no_steps(norm)
            last_row = _put(zeros[0], torch.ones_like(norm), none)
            norms = _put(zeros[0] + torch.inf, norm, none)
            return _Space(basis, zeros[1:], last_row, norms, none, *rest)
        basis = first[None]
        if not tracking.transforms_active() and trees.may_overwrite((first,)):
            basis = first.new_empty(room + 1, len(first))
            basis[0] = first
        return _Space(basis, (), torch.ones_like(norm)[None], (norm,), 0, *rest)

    def last(self) -> Tensor:
        """The last vector of the basis."""
        if isinstance(self.size, int):
            return self.basis[self.size]
        return self.basis.index_select(0, self.size.reshape(1))[0]

    def extend(self, vectors: _FlatVectors, w: Tensor, length: Tensor | None, by: Bounds) -> _Space:
        """Take in the product with the last vector, or with that of a length."""
        slot = self.size + 1
        basis = self.basis[:slot] if isinstance(slot, int) else self.basis
        projection, norm = vectors.project(basis, w)
        w = w - projection @ basis
        correction = vectors.products(basis, w)
        w = w - correction @ basis
        column, below = projection + correction, vectors.norm(w)

        diagonal = self.last_row @ column
        pivot = torch.hypot(diagonal, below)
        # a pivot that is rounding noise tells a singular operator
        product_norm = torch.maximum(self.product_norm, torch.where(self.active, norm, 0.0))
        made = self.active & (pivot > _NOISE * torch.finfo(w.dtype).eps * product_norm)
        sine = torch.where(made, below / pivot, 1.0)
        last_row = _put(-sine * self.last_row, diagonal / pivot, slot)
        residual_norm = self.residual_norm * sine

        vector = torch.where(made & (below > 0), w / below, 0.0)
        rs = torch.where(made, residual_norm**2, self.rs)
        rs = torch.where(self.active & ~torch.isfinite(norm), norm, rs)
        gain = norm if length is None else norm / length
        return _Space(
            _put(self.basis, vector, slot),
            _put(self.columns, _put(column, below, slot), self.size),
            last_row,
            _put(self.residual_norms, residual_norm, slot),
            slot,
            residual_norm,
            product_norm,
            torch.maximum(self.operator_norm, torch.where(made, gain, 0.0)),
            rs,
            self.num_steps + made,
            made & by.open(rs),
        )

    def combination(self, start: State) -> Tensor:
        """The vector ``V_k y`` for which the residual is smallest."""
        columns, norms, size = self.columns, self.residual_norms, len(self.columns)
        if isinstance(columns, tuple):
            pad = torch.nn.functional.pad
            columns = torch.stack([pad(c, (0, size + 1 - len(c))) for c in columns])
            norms = torch.stack(norms)
        # coefficients of steps that were not made are zero
        made = torch.arange(size, device=columns.device) < self.num_steps - start.num_steps
        eye = torch.eye(size + 1, dtype=columns.dtype, device=columns.device)
        columns = torch.where(made[:, None], columns, eye[1:])
        orthogonal, triangular = torch.linalg.qr(columns.mT)
        # column j: the coefficients of the best combination of the first j vectors
        rhs = (norms[0] * orthogonal[0])[:, None].expand(size, size).triu()
        rhs = torch.nn.functional.pad(rhs, (1, 0))
        y: Tensor = torch.linalg.solve_triangular(triangular, rhs, upper=True)
        # the residual that each leaves, the last unless it is as large as the first
        noise = _NOISE * trees.epsilon((y,)) * self.product_norm
        noise = noise * torch.linalg.vector_norm(y, dim=0)
        enough = self.residual_norm + noise[-1] < 0.1 * norms[0]
        best = torch.where(enough, size, (norms + noise).argmin())
        return y.gather(1, best.expand(size, 1))[:, 0] @ self.basis[:size]


def _put(rows: Any, row: Tensor, slot: Any) -> Any:
    """Rows with one in a slot, which is the first free one."""
    if isinstance(rows, tuple):
        return *rows, row
    if not isinstance(slot, int):
        here = torch.arange(len(rows), device=rows.device) == slot
        return torch.where(here.reshape(-1, *[1] * row.ndim), row, rows)
    if slot < len(rows):
        if trees.may_overwrite((row,)):
            rows[slot] = row
            return rows
        rows = rows[:slot]
    return torch.cat([rows, row[None]])
