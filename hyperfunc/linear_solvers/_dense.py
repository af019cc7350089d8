"""Direct solves with the matrix of the operator."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.results import RESULTS, SolveStats, code_where
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator, Solved
from hyperfunc.linear_solvers._cycles import COARSEST, SLACK
from hyperfunc.linear_solvers._units import in_units

_AT_ONCE = 2**18  # entries of the vectors whose products are taken in one batch
_PROBES = 6  # random vectors by which the norm of the inverse is estimated


@dataclasses.dataclass(frozen=True)
class Dense(AbstractLinearSolver):
    r"""Forms the matrix of the operator and solves by LU factorisation.

    For ``n`` inner parameters in all this takes ``n`` products, in batches by ``vmap`` where it has
    rules for them, ``n^2`` memory, and one product to check the solution. Rows and columns are
    scaled first, and a step of iterative refinement follows, so that equations and unknowns may be
    in units of any size.

    Where the scaled matrix is singular to working precision, the least-squares solution of minimal
    norm is computed by a singular value decomposition: the solution, where there is one. Success is
    a residual within :math:`\epsilon^{3/4} \lVert b \rVert` or, if that is more, rounding errors
    of :math:`4 \epsilon \lVert |A| |x| + |b| \rVert`, up to :math:`\epsilon^{1/4} \lVert b
    \rVert`. Anything else is reported as breakdown. `LeastSquares` is for systems without solution.

    One value is looked at, whether the matrix is singular. Where none can be, as while a CUDA graph
    is captured, a singular matrix is a breakdown.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.Dense().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)

    References:
        Skeel, Iterative refinement implies numerical stability for Gaussian elimination, 1980.
    """

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        dtype, eps = trees.accumulation_dtype(b), trees.epsilon(b)
        rhs = ravel(b, dtype)
        matrix = _matrix(operator, b, dtype)
        finite = torch.isfinite(matrix).all() & torch.isfinite(rhs).all()
        safe = torch.where(finite, matrix, torch.eye(len(rhs), dtype=dtype, device=rhs.device))
        flat, regular = _eliminate(safe, rhs)
        if loop.is_kept(rhs) or batching.can_look(rhs):

            def complete(flat: Tensor) -> Tensor:
                return torch.where(regular, flat, _least_squares(safe, rhs))

            flat = loop.when(~regular, complete, flat)
        x = unravel(torch.nan_to_num(flat), b)
        residual = operator.residual(x, b)
        residual_norm, norm = trees.norm(residual), torch.linalg.vector_norm(rhs)
        solution = ravel(x, dtype)
        of_matrix = rhs - safe @ solution
        size = torch.linalg.vector_norm(safe.abs() @ solution.abs() + rhs.abs())
        # products in a lower precision than b, as by autocast, do not agree with the matrix
        defect = torch.linalg.vector_norm(ravel(residual, dtype) - of_matrix)
        shown = (defect / torch.where(size > 0, size, 1.0)).clamp(eps, max(eps, COARSEST))

        def allowed(eps: Tensor) -> Tensor:
            bound = torch.maximum(SLACK * eps * size, eps**0.75 * norm)
            return torch.minimum(bound, eps**0.25 * norm)

        solved = torch.linalg.vector_norm(of_matrix) <= allowed(torch.full_like(shown, eps))
        solved = solved & (residual_norm <= allowed(shown))
        result = code_where(solved, RESULTS.success, RESULTS.breakdown)
        result = code_where(finite, result, RESULTS.nonfinite)
        num_steps = torch.full_like(result, len(rhs))
        return x, SolveStats(num_steps, residual_norm, result)


def _matrix(operator: LinearOperator, b: Leaves, dtype: torch.dtype) -> Tensor:
    """The matrix of the operator, by products with many unit vectors at a time."""

    def column(unit: Tensor) -> Tensor:
        return ravel(operator.mv(unravel(unit, b)), dtype)

    size = sum(leaf.numel() for leaf in b)
    units = torch.eye(size, dtype=dtype, device=b[0].device)
    # what the first product of an operator makes once for all is not to be made inside of a vmap
    columns = column(units[0])[None]
    if size > 1:
        try:
            chunk = max(_AT_ONCE // size, 1)
            rest = torch.func.vmap(column, chunk_size=chunk, randomness="same")(units[1:])
        except Exception:  # there are operations without a rule for vmap
            rest = torch.stack([column(unit) for unit in units[1:]])
        columns = torch.cat([columns, rest])
    return columns.mT


def _eliminate(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """The solution by Gaussian elimination, and whether the matrix is regular."""
    rows = _inverse(matrix.abs().amax(1))
    columns = _inverse((rows[:, None] * matrix).abs().amax(0))
    scaled = rows[:, None] * matrix * columns
    probes = torch.stack([random_signs((rhs,), seed)[0] for seed in range(_PROBES)], dim=1)
    # unlike solve, this neither raises nor synchronises on a singular matrix
    factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
    sides = torch.cat([(rows * rhs)[:, None], probes], dim=1)
    solved = torch.linalg.lu_solve(factors, pivots, sides)
    x = columns * solved[:, 0]
    correction = torch.linalg.lu_solve(factors, pivots, (rows * (rhs - matrix @ x))[:, None])
    x = x + columns * correction[:, 0]
    # the mean of ||A^{-1} z||^2 over random signs z is the squared Frobenius norm of the inverse
    inverse_norm = torch.linalg.matrix_norm(solved[:, 1:]) / _PROBES**0.5
    condition = torch.linalg.matrix_norm(scaled) * inverse_norm
    regular = (info == 0) & (condition * torch.finfo(matrix.dtype).eps < 0.03)
    return x, regular & torch.isfinite(x).all()


def _least_squares(matrix: Tensor, rhs: Tensor) -> Tensor:
    """The least-squares solution of minimal norm, of equations scaled to one size."""
    rows = _inverse(matrix.abs().amax(1))
    left, values, right = torch.linalg.svd(rows[:, None] * matrix, full_matrices=False)
    kept = values > len(rhs) * torch.finfo(matrix.dtype).eps * values.amax()
    inverse = torch.where(kept, 1 / values, 0.0)
    x = torch.zeros_like(rhs)
    for _ in range(2):  # the second time it is refined
        x = x + right.mT @ (inverse * (left.mT @ (rows * (rhs - matrix @ x))))
    return x


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 1.0)
