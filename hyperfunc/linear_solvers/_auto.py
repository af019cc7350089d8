"""The solver that needs no choice: it tries, and keeps the best answer."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.results import RESULTS, UNFINISHED, ChoiceStats, SolveStats
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
from hyperfunc.linear_solvers._krylov import CG, Linear, NormalCG, Stage
from hyperfunc.linear_solvers._preconditioners import JacobiPreconditioner, NystromPreconditioner
from hyperfunc.linear_solvers._units import in_units
from hyperfunc.linear_solvers._wrappers import try_next

MOST_ENTRIES = 256  # inner parameters up to which the matrix may be formed
_PATIENCE = 5  # steps of CG for each product with another purpose
_SPREAD = 100.0  # ratio of diagonal entries from which on it pays to divide by them


@dataclasses.dataclass(frozen=True)
class Auto(AbstractLinearSolver):
    r"""`CG` and, where that does not do, the methods for other operators: ``"auto"``.

    `CG` shows by itself, in a few steps, an operator that is not symmetric or not definite. If it
    has not converged after ``10 num_steps`` steps, ``num_steps`` products estimate the diagonal
    of :math:`A`, and where its entries differ by a factor of 100 or more, as many steps with a
    `JacobiPreconditioner` are tried. After ``30 num_steps`` steps it is a `NystromPreconditioner`
    of rank ``2 num_steps``. Both go by the energy :math:`\frac12 x^\top A x - b^\top x`, which
    `CG` minimises: one that has won more in all these products than the plain iteration in as many
    is what it goes on with. What it leaves unsolved is for

    - `Dense`, if there are 256 inner parameters or fewer (`CG` then takes at most 5 steps for each
      of them), which also finds the solution of least norm of a singular system;
    - otherwise `GMRES`, then `NormalCG`, from the same start. Not where :math:`A` is known to be
      symmetric and `CG` reached ``maxiter``: that is no failure, and the others are slower.

    So it costs what `CG` costs, and at most a fifth more, where `CG` works. The answer is the one
    with the smallest residual of all. `hyperfunc.diagnose` measures what a choice by hand needs.

    Under ``vmap`` a method runs if some task needs it. Compiled code holds all but the trials:
    where `CG` takes ``10 num_steps`` steps or more, the solve is done again uncompiled.
    ``Solution.stats`` is a `ChoiceStats`, whose ``choice`` is an index into ``Auto.CHOICES``, and
    whose steps are those of all solvers together.

    Args:
        num_steps: products for the diagonal, >= 1. They and the steps of trials come in addition
            to the steps that are counted, a fifth of these at most.
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

    CHOICES: ClassVar[tuple[str, ...]] = (
        "cg",
        "cg, jacobi",
        "dense",
        "gmres",
        "normal_cg",
        "cg, nystrom",
    )

    def __post_init__(self) -> None:
        check_count(self, "num_steps", self.num_steps)
        check_stopping(self)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        x, stats = self.solve_and_tell(operator, b, x0)
        return x, SolveStats(*stats[:3])

    @in_units
    def solve_and_tell(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, ChoiceStats]:
        """`solve`, with the choice in the statistics."""
        size = sum(leaf.numel() for leaf in b)
        whole = sharding.layout_of(b) is None
        few = whole and size <= MOST_ENTRIES
        bounds = self.rtol, self.atol
        most = min(self.maxiter, _PATIENCE * size) if few else self.maxiter
        trials = _Trials(self.num_steps, operator, b, x0)
        if loop.is_kept(b):  # trials are left to Python
            before = min(most, trials.FIRST * self.num_steps)
            x, stats = CG(before, *bounds).run(operator, b, x0)
            unfinished = (stats.num_steps >= before) & (before < most)
            stats = stats._replace(result=torch.where(unfinished, UNFINISHED, stats.result))
        else:
            x, stats = CG(most, *bounds).run(operator, b, x0, trials.stages() if whole else ())
        told = ChoiceStats(*stats, trials.chosen.expand_as(stats.result))
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


class _Trials:
    """Preconditioners that are tried while `CG` is under way, and their choice for each task.

    A trial takes a fifth of the products that were made before, half of them for building, and is
    held against as many products of the plain iteration.
    """

    FIRST = 10  # times num_steps

    def __init__(
        self, num_steps: int, operator: LinearOperator, b: Leaves, x0: Leaves | None
    ) -> None:
        self._num_steps, self._operator, self._b, self._x0 = num_steps, operator, b, x0
        self._energies: list[Tensor] = []
        self._precondition: Linear = lambda r: r
        self.chosen = torch.zeros((), dtype=torch.int64, device=b[0].device)

    def stages(self) -> tuple[Stage, ...]:
        """When to do what."""
        k = self._num_steps
        notes = [(step, self._note) for step in (0, 2 * k, 4 * k)]
        return (*notes, (self.FIRST * k, self._try_jacobi), (30 * k, self._try_nystrom))

    def _note(self, x: Leaves, r: Leaves) -> None:
        self._energies.append(self._energy(x, r))

    def _energy(self, x: Leaves, r: Leaves) -> Tensor:
        return trees.dot(x, trees.add(self._b, r)) / -2

    def _try_jacobi(self, x: Leaves, r: Leaves) -> tuple[Tensor, Linear] | None:
        scale = JacobiPreconditioner(self._num_steps).scale(self._operator, self._b)
        scale = torch.where(scale > 0, scale, scale.amax())
        promising = scale.amax() >= _SPREAD * scale.amin()
        divisors = unravel(scale, self._b)
        divide = functools.partial(_divide, divisors)
        return self._try(divide, promising, self._num_steps, self._energies[1], 1)

    def _try_nystrom(self, x: Leaves, r: Leaves) -> tuple[Tensor, Linear] | None:
        rank = min(2 * self._num_steps, sum(leaf.numel() for leaf in self._b))
        apply = NystromPreconditioner(rank).prepare(self._operator, self._b)
        return self._try(apply, self.chosen == 0, rank, self._energies[2], 5)

    def _try(
        self, precondition: Linear, promising: Tensor, steps: int, energy: Tensor, index: int
    ) -> tuple[Tensor, Linear] | None:
        """For which tasks a preconditioner pays, and what is then that of all."""
        if not batching.any_true(promising):
            return None
        everywhere = torch.ones_like(promising)
        stages: tuple[Stage, ...] = ((0, lambda x, r: (everywhere, precondition)),)
        x, _ = CG(steps, rtol=0).run(self._operator, self._b, self._x0, stages)
        won = self._energy(x, self._operator.residual(x, self._b)) - self._energies[0]
        pays = promising & (won.abs() > (energy - self._energies[0]).abs())
        if not batching.any_true(pays):
            return None
        others, self.chosen = self._precondition, torch.where(pays, index, self.chosen)
        self._precondition = lambda r: trees.where(pays, precondition(r), others(r))
        return pays, self._precondition


def _divide(divisors: Leaves, r: Leaves) -> Leaves:
    return tuple(leaf / divisor for divisor, leaf in zip(divisors, r, strict=True))
