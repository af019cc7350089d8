"""The solver that needs no choice: it tries, and keeps the best answer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from hyperfunc._engine.checks import check_count
from hyperfunc._engine.results import RESULTS, ChoiceStats, SolveStats
from hyperfunc._engine.trees import unravel
from hyperfunc._torch import batching, sharding
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    LinearOperator,
    Solved,
    check_stopping,
)
from hyperfunc.linear_solvers._dense import Dense
from hyperfunc.linear_solvers._gmres import GMRES
from hyperfunc.linear_solvers._krylov import CG, NormalCG
from hyperfunc.linear_solvers._preconditioners import JacobiPreconditioner
from hyperfunc.linear_solvers._wrappers import try_next

MOST_ENTRIES = 256  # inner parameters up to which the matrix may be formed
_PATIENCE = 5  # steps of CG for each product with another purpose
_SPREAD = 100.0  # ratio of diagonal entries from which on it pays to divide by them


@dataclasses.dataclass(frozen=True)
class Auto(AbstractLinearSolver):
    r"""`CG` and, where that does not do, the methods for other operators: ``"auto"``.

    `CG` shows by itself, in a few steps, an operator that is not symmetric or not definite. If it
    has not converged after ``5 num_steps`` steps, ``num_steps`` products estimate the diagonal
    of :math:`A`, and where its entries differ by a factor of 100 or more, it goes on with a
    `JacobiPreconditioner` of them. What it leaves unsolved is for

    - `Dense`, if there are 256 inner parameters or fewer (`CG` then takes at most 5 steps for each
      of them), which also finds the solution of least norm of a singular system;
    - otherwise `GMRES`, then `NormalCG`, from the same start. Not where :math:`A` is known to be
      symmetric and `CG` reached ``maxiter``: that is no failure, and the others are slower.

    So it costs what `CG` costs, and at most a fifth more, where `CG` works. The answer is the one
    with the smallest residual of all. `hyperfunc.diagnose` measures what a choice by hand needs.

    Under ``vmap`` a method runs if some task needs it. ``Solution.stats`` is a `ChoiceStats`, whose
    ``choice`` is an index into ``Auto.CHOICES``, and whose steps are those of all solvers together.

    Args:
        num_steps: products for the diagonal, >= 1.
        maxiter: largest number of steps of each solver, >= 0.

    All other arguments are those of `CG`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])  # not symmetric, so that CG would fail
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.Auto().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)
    """

    num_steps: int = 10
    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    CHOICES: ClassVar[tuple[str, ...]] = ("cg", "cg, jacobi", "dense", "gmres", "normal_cg")

    def __post_init__(self) -> None:
        check_count(self, "num_steps", self.num_steps)
        check_stopping(self)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        x, stats = self.solve_and_tell(operator, b, x0)
        return x, SolveStats(*stats[:3])

    def solve_and_tell(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, ChoiceStats]:
        """`solve`, with the choice in the statistics."""
        size = sum(leaf.numel() for leaf in b)
        whole = sharding.layout_of(b) is None
        few = whole and size <= MOST_ENTRIES
        bounds = self.rtol, self.atol
        paid = torch.zeros((), dtype=torch.int64, device=b[0].device)

        def look() -> Leaves | None:
            nonlocal paid
            scale = JacobiPreconditioner(self.num_steps).scale(operator, b)
            scale = torch.where(scale > 0, scale, scale.amax())
            pays = scale.amax() >= _SPREAD * scale.amin()
            if not batching.any_true(pays):
                return None
            paid = pays.to(torch.int64)
            return unravel(torch.where(pays, scale, 1.0), b)

        solver = CG(min(self.maxiter, _PATIENCE * size) if few else self.maxiter, *bounds)
        late = (_PATIENCE * self.num_steps, look) if whole else None
        x, stats = solver.run(operator, b, x0, late)
        told = ChoiceStats(*stats, paid.expand_as(stats.result))
        rest: dict[int, AbstractLinearSolver] = {2: Dense()}
        if not few:
            rest = {3: GMRES(self.maxiter, None, *bounds), 4: NormalCG(self.maxiter, *bounds)}
        # out of steps, CG has still done better than the others would
        enough = RESULTS.max_steps if operator.symmetric and not few else RESULTS.success
        open_ = (stats.result > int(enough)) & (self.maxiter > 0)
        for index, then in rest.items():
            x, told = try_next(then, index, open_, operator, b, x0, x, told)
            open_ = open_ & (told.result != int(RESULTS.success))
        return x, told
