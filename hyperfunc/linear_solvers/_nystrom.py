"""The Nystrom method: a low-rank approximation of a Hessian, inverted in closed form."""

from __future__ import annotations

import dataclasses

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._engine.random_vectors import random_sample
from hyperfunc._engine.results import RESULTS, SolveStats, code_where
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator, Solved
from hyperfunc.linear_solvers._preconditioners import resolve_count
from hyperfunc.linear_solvers._units import in_units


@dataclasses.dataclass(frozen=True)
class Nystrom(AbstractLinearSolver):
    r"""Inverts the low-rank approximation of a symmetric operator by sampled columns.

    For the set :math:`K` of ``rank`` coordinates drawn without replacement, the operator
    :math:`A = s I + H`, with the multiple :math:`s` of the identity that it is known to contain (0
    for an inner loss), is replaced by

    .. math::
        A_K = (s + \rho) I + H_{:K} H_{KK}^{+} H_{:K}^\top,

    and the solution is :math:`A_K^{-1} b`, by the Woodbury identity. This takes ``rank`` products,
    which do not depend on ``b``, and one for the residual, or two with a starting iterate. It is
    exact up to :math:`\rho` if :math:`H` has the rank of its sample. In a direction that the
    columns miss, the solution is ``b`` over :math:`s + \rho`, so :math:`\rho` should be of the size
    of the eigenvalues that may be missed.

    Args:
        rank: columns to sample in each solve, from 1 to the number of inner parameters; by default
            10, or that number if it is smaller.
        rho: :math:`\rho > 0`.
        seed: of the sample, which is the same for each task of ``vmap``; >= 0.

    From a starting iterate with a residual :math:`r_0` smaller than that of zero, the solution is
    that multiple of :math:`A_K^{-1} r_0` further which has the smallest residual, never more than
    the start's. A non-symmetric operator, as far as the sampled block shows it, is reported as
    breakdown. It is a success if the residual is within ``eps^0.75 ||b||``, as :math:`\rho` seldom
    lets it be, and otherwise reported as max_steps, which is no failure: raise ``rank``.

    Example:
        >>> X = torch.randn(4, 100)
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(X.T @ X)  # of rank 4
        >>> b = torch.randn(100)
        >>> (x,), stats = hf.Nystrom(rank=4, rho=1.0).solve(operator, (b,))
        >>> torch.allclose(X.T @ (X @ x) + x, b, atol=1e-3)
        True

    References:
        Hataya and Yamada, Nystrom method for accurate and scalable implicit differentiation,
        arXiv 2302.09726.
    """

    rank: int | None = None
    rho: float = 0.01
    seed: int = 0

    rtol = atol = 0  # no tolerance that it could reach, so that nobody is warned

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count(self, "rank", self.rank)
        check_number(self, "rho", self.rho, above=True)
        check_count(self, "seed", self.seed, 0)

    @in_units
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        rank = resolve_count(self, "rank", self.rank, 10, b)
        dtype = trees.accumulation_dtype(b)
        r = b
        if x0 is not None:
            r = operator.residual(x0, b)
            better = trees.dot(r, r) < trees.dot(b, b)
            x0, r = (trees.where(better, *pair) for pair in ((x0, trees.zeros_like(b)), (r, b)))
        rhs = ravel(r, dtype)
        sample = random_sample(rhs.numel(), rank, self.seed)
        position = torch.arange(rhs.numel(), device=rhs.device)
        units = (unravel((position == i).to(dtype), b) for i in sample)
        products = [ravel(operator.product(unit), dtype) for unit in units]
        columns = operator.scale * torch.stack(products).mT
        core = columns[torch.tensor(sample, device=columns.device)]
        asymmetry = torch.linalg.matrix_norm(core - core.mT)
        symmetric = asymmetry <= trees.epsilon(b) ** 0.25 * torch.linalg.matrix_norm(core)

        # H = W D W^T with D = diag(+-1); where an eigenvalue is rounding noise, W has a zero column
        core = torch.nan_to_num((core + core.mT) / 2, nan=0.0, posinf=0.0, neginf=0.0)
        values, vectors = torch.linalg.eigh(core)
        kept = values.abs() > rank * trees.epsilon(b) * values.abs().amax()
        weights = torch.where(kept, values.abs().rsqrt(), 0.0)
        factor = (columns @ vectors) * weights
        signs = torch.where(kept, values.sign(), 1.0)
        shift = operator.shift + self.rho
        inner = torch.diag(shift * signs) + factor.mT @ factor
        y, info = torch.linalg.solve_ex(inner, factor.mT @ rhs)
        x = unravel((rhs - factor @ y) / shift, b)

        if x0 is not None:
            # what the columns miss, the correction may overshoot: take the best multiple of it
            image = operator.mv(x)
            gain, size = trees.dots((r, image), (image, image))
            x = trees.axpy(torch.where(size > 0, gain / size, 0.0), x, x0)
        residual_norm = trees.norm(operator.residual(x, b))
        bound = trees.epsilon(b) ** 0.75 * trees.norm(b)
        result = code_where(residual_norm <= bound, RESULTS.success, RESULTS.max_steps)
        result = code_where(symmetric & (info == 0), result, RESULTS.breakdown)
        result = code_where(torch.isfinite(residual_norm), result, RESULTS.nonfinite)
        return x, SolveStats(torch.full_like(result, rank), residual_norm, result)
