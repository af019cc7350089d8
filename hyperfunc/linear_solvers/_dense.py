"""Direct solves with the matrix of the operator."""

from __future__ import annotations

import dataclasses

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, SolveStats, code_where
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator, Solved


@dataclasses.dataclass(frozen=True)
class Dense(AbstractLinearSolver):
    """Forms the matrix of the operator column by column and solves by LU factorisation.

    Exact up to rounding for any invertible operator, by ``n`` products and ``n^2`` memory for ``n``
    inner parameters in all. A matrix that is singular to working precision is reported as
    breakdown.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.Dense().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)
    """

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        dtype = trees.accumulation_dtype(b)
        rhs = ravel(b, dtype)
        identity = torch.eye(rhs.numel(), dtype=dtype, device=rhs.device)
        matrix = torch.stack(
            [ravel(operator.mv(unravel(column, b)), dtype) for column in identity], dim=1
        )
        # solve_ex, unlike solve, neither raises nor synchronises on a singular matrix
        x, info = torch.linalg.solve_ex(matrix, rhs)
        residual_norm = torch.linalg.vector_norm(rhs - matrix @ x)
        conditioning = torch.linalg.vector_norm(matrix) * torch.linalg.vector_norm(x)
        noise = conditioning * torch.finfo(dtype).eps
        singular = (info != 0) | (noise > torch.linalg.vector_norm(rhs))
        finite = torch.isfinite(matrix).all() & torch.isfinite(rhs).all()
        result = code_where(singular, RESULTS.breakdown, RESULTS.success)
        result = code_where(finite, result, RESULTS.nonfinite)
        num_steps = torch.full_like(result, identity.shape[0])
        return unravel(x, b), SolveStats(num_steps, residual_norm, result)
