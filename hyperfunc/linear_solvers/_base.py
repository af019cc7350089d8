"""What linear solvers share: the operator, the abstract solver, and the bounds on an iteration."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._engine.results import RESULTS, SolveStats, code_where
from hyperfunc._torch import batching
from hyperfunc._types import Leaves

State = TypeVar("State", bound=Any)

Solved: TypeAlias = tuple[Leaves, SolveStats]
"""What `AbstractLinearSolver.solve` returns: the solution and its statistics."""


@dataclasses.dataclass(frozen=True)
class LinearOperator:
    """The operator ``A = shift I + scale P``, given by the products with ``P`` and ``P^T``.

    A fixed-point map has ``P = dphi/dw`` with ``shift = 1, scale = -1``; an inner loss has its
    Hessian with ``shift = 0, scale = 1``. Solvers fuse the identity into their vector updates.

    Args:
        product: ``v -> P v`` on tuples of leaves.
        transposed_product: ``v -> P^T v``.
        shift: the coefficient of the identity, a number or a 0-d tensor.
        scale: the coefficient of ``P``.
        symmetric: whether ``P = P^T`` is known.
        transposed: whether this is the transpose of what preconditioners call ``A``.
        spec: the structure of the vectors as trees; by default the tuple of leaves itself.
    """

    product: Callable[[Leaves], Leaves]
    transposed_product: Callable[[Leaves], Leaves]
    shift: float | Tensor = 0.0
    scale: float = 1.0
    symmetric: bool = False
    transposed: bool = dataclasses.field(default=False, kw_only=True)
    spec: trees.TreeSpec | None = None

    @staticmethod
    def from_matrix(matrix: Tensor) -> LinearOperator:
        """The operator of a square matrix, acting on a single leaf of shape ``(n,)``."""
        forward, transposed = (functools.partial(_matrix_product, m) for m in (matrix, matrix.mT))
        return LinearOperator(forward, transposed, spec=trees.flatten(matrix)[1])

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        return dataclasses.replace(
            self,
            product=self.transposed_product,
            transposed_product=self.product,
            transposed=not self.transposed,
        )

    def normal(self) -> LinearOperator:
        """The operator ``A^T A``."""

        def product(v: Leaves) -> Leaves:
            return self.gram(v)[1]

        return LinearOperator(product, product, symmetric=True, spec=self.spec)

    def structure(self, v: Leaves) -> trees.TreeSpec:
        """The structure of a vector as a tree."""
        return trees.flatten(v)[1] if self.spec is None else self.spec

    def mv(self, v: Leaves) -> Leaves:
        """The product ``A v``."""
        return _combine(self.scale, self.product(v), self.shift, v)

    def gram(self, v: Leaves) -> tuple[Leaves, Leaves]:
        """The products ``A v`` and ``A^T A v``."""
        image = self.mv(v)
        return image, self.T.mv(image)

    def symmetric_part(self, v: Leaves) -> Leaves:
        """The product ``(A + A^T) v / 2``."""
        image = self.mv(v)
        return image if self.symmetric else trees.scale(0.5, trees.add(image, self.T.mv(v)))

    def residual(self, v: Leaves, b: Leaves) -> Leaves:
        """The residual ``b - A v``."""
        return _combine(-1.0, self.mv(v), 1.0, b)

    def richardson(self, v: Leaves, b: Leaves, step_size: float) -> Leaves:
        """One step ``v + step_size (b - A v)``, with as few passes over the vectors as it takes."""
        update = _combine(-self.scale, self.product(v), 1.0, b)
        over = trees.reusable(update, v)
        return _combine(step_size, update, 1.0 - step_size * self.shift, v, over)


class AbstractLinearSolver(abc.ABC):
    """What every linear solver provides: `solve`; a subclass is a frozen dataclass of settings."""

    @abc.abstractmethod
    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        """Solve ``A x = b`` from ``x0`` (zeros by default).

        Args:
            operator: the operator ``A``.
            b: right-hand side, a tuple of leaves.
            x0: initial iterate, like ``b``. Krylov methods start from zeros instead where these
                have the smaller residual, as rounding errors of the size of a bad start would stay.

        Returns:
            The solution and its statistics. A failure is a result code here, never an exception.
        """


def parts(solver: AbstractLinearSolver) -> Iterator[AbstractLinearSolver]:
    """A solver and all that are inside it."""
    yield solver
    for value in vars(solver).values() if hasattr(solver, "__dict__") else ():
        if isinstance(value, AbstractLinearSolver):
            yield from parts(value)


@dataclasses.dataclass(frozen=True)
class IterativeLinearSolver(AbstractLinearSolver):
    """What stops at a tolerance or after ``maxiter`` steps; `CG` says how these are to be read."""

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_stopping(self)


def check_stopping(solver: Any) -> None:
    """Raise unless ``maxiter``, ``rtol`` and ``atol`` of a solver are what they should be."""
    check_count(solver, "maxiter", solver.maxiter, 0)
    if solver.rtol is not None:
        check_number(solver, "rtol", solver.rtol)
    check_number(solver, "atol", solver.atol)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Squared residual norms at which an iteration stops, its verdict, and how it computes.

    Scalars of an iteration are 0-d tensors, or numbers if the bounds are: that takes a fraction of
    the time. ``own``: vectors of its state are written over, as no one else holds them.
    """

    bb: Tensor
    converged: Any
    diverged: Any
    asymmetry: float
    adaptive: bool
    own: bool = False

    @staticmethod
    def make(
        rtol: float | None,
        atol: float | Tensor,
        b: Leaves,
        rs: Tensor,
        growth: float | None = None,
    ) -> Bounds:
        """Bounds for a right-hand side and the squared norm of the first residual.

        A residual beyond ``growth`` times the first one, by default ``1 / sqrt(eps)``, diverges.
        """
        eps = trees.epsilon(b)
        bb = trees.dot(b, b)
        relative = eps**0.75 if rtol is None else rtol
        # below eps ||b|| a residual is rounding noise, on which recurrences divide 0 by 0
        converged = bb * max(relative, eps) ** 2
        if isinstance(atol, Tensor) or atol:
            converged = converged.clamp_min(atol**2)
        diverged = torch.maximum(rs, bb) * (1 / eps if growth is None else growth**2)
        adaptive = bool(relative) or isinstance(atol, Tensor) or bool(atol)
        return Bounds(bb, converged, diverged, eps**0.25, adaptive)

    def read(self, *scalars: Tensor) -> tuple[Bounds, list[Any]]:
        """The same bounds, and scalars of the iteration, as numbers."""
        converged, diverged = self.converged.item(), self.diverged.item()
        numbers = dataclasses.replace(self, converged=converged, diverged=diverged)
        return numbers, [scalar.item() for scalar in scalars]

    def as_numbers(self, state: State) -> tuple[Bounds, State]:
        """The bounds and a state with numbers in place of 0-d tensors, where these can be read."""
        if not trees.can_read(*(field for field in state if isinstance(field, tuple))):
            return self, state
        bounds, scalars = self.read(*(each for each in state if isinstance(each, Tensor)))
        rest = iter(scalars)
        fields = (next(rest) if isinstance(each, Tensor) else each for each in state)
        return bounds, type(state)(*fields)

    def as_tensors(self, state: State) -> State:
        """A state with 0-d tensors in place of numbers."""
        dtypes = {bool: torch.bool, int: torch.int64}
        fields = (
            each if isinstance(each, tuple) else self.tensor(each, dtypes.get(type(each)))
            for each in state
        )
        return type(state)(*fields)  # type: ignore[no-any-return]

    def add(self, alpha: Any, x: Leaves, y: Leaves, over: Leaves | None) -> Leaves:
        """``y + alpha x``, written over one of them, of the state, if that may be."""
        return trees.axpy(alpha, x, y, over if self.own else None)

    def dots(self, *pairs: tuple[Leaves, Leaves]) -> tuple[Any, ...]:
        """Inner products, as numbers if the bounds are."""
        dots = trees.dots if isinstance(self.converged, Tensor) else trees.read_dots
        return dots(*pairs)

    def open(self, rs: Any) -> Any:
        """Whether the iteration may go on: neither converged, nor diverged, nor NaN."""
        return (rs > self.converged) & (rs < self.diverged)

    def finished(self, active: Any) -> bool:
        """Whether the iteration may stop as no task goes on; one of a fixed number never asks."""
        return self.adaptive and not batching.any_true(active)

    def steps(
        self,
        step: Callable[[State, Bounds], State],
        state: State,
        most: Any,
        *,
        numbers: bool = True,
        sure: bool = True,
        seen: bool = False,
        last: Callable[[State, Bounds], State] | None = None,
    ) -> tuple[State, Any]:
        """Take steps while a task is ``active``, ``most`` at most; the last state and how many.

        ``sure``: one is active to begin with, so that nothing waits for that value. ``seen``: its
        vectors have been through the operator, and so carry what derivatives are to follow; else
        no number is read before the first step. ``last``: what does where no step follows.
        """
        if loop.is_kept(state):
            go_on = (lambda state: state.active) if self.adaptive else None
            before = most if last is None else most - 1
            state, taken = loop.repeat(lambda _, s: step(s, self), state, before, go_on)
            return (state, taken) if last is None else (last(state, self), taken + 1)
        taken = 0
        bounds, state = self.as_numbers(state) if numbers and seen else (self, state)
        while taken < most and ((sure and not taken) or not bounds.finished(state.active)):
            state = (step if last is None or taken < most - 1 else last)(state, bounds)
            taken += 1
            if taken == 1 < most:  # the first vectors may be those of the caller
                if numbers and not seen:
                    bounds, state = self.as_numbers(state)
                vectors = (field for field in state if isinstance(field, tuple))
                bounds = dataclasses.replace(bounds, own=trees.may_overwrite(*vectors))
        return state, taken

    def tensor(self, value: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A 0-d tensor of a number, or what is one."""
        if isinstance(value, Tensor):
            return value
        bb = self.bb
        return torch.full((), value, dtype=bb.dtype if dtype is None else dtype, device=bb.device)

    def stats(self, num_steps: Any, rs: Any, active: Any) -> SolveStats:
        """Statistics, from tensors or numbers; ``active``: whether it could have gone on."""
        rs = self.tensor(rs)
        unfinished = RESULTS.max_steps if self.adaptive else RESULTS.success
        result = code_where(self.tensor(active, torch.bool), unfinished, RESULTS.breakdown)
        result = code_where(rs >= self.diverged, RESULTS.divergence, result)
        result = code_where(rs <= self.converged, RESULTS.success, result)
        result = code_where(torch.isfinite(rs), result, RESULTS.nonfinite)
        num_steps = self.tensor(num_steps, torch.int64).expand_as(result).clone()
        return SolveStats(num_steps, rs.sqrt(), result)


def no_steps(like: Tensor) -> Tensor:
    """A count of steps, at zero."""
    return torch.zeros((), dtype=torch.int64, device=like.device)


def ratio(a: Any, b: Any) -> Any:
    """``a / b`` of 0-d tensors or numbers, where a number by zero is NaN."""
    return a / b if isinstance(b, Tensor) or b else math.nan


def where(mask: Any, a: Any, b: Any) -> Any:
    """``a`` where the mask holds, else ``b``, of 0-d tensors or numbers."""
    if isinstance(mask, Tensor):
        return torch.where(mask, a, b)
    return a if mask else b


def _combine(
    alpha: float, x: Leaves, beta: float | Tensor, y: Leaves, out: Leaves | None = None
) -> Leaves:
    """``alpha x + beta y``; ``out`` is x if that may be overwritten."""
    fixed = not isinstance(beta, Tensor)
    if fixed and beta != 0 and alpha != 1:
        return trees.axpy(alpha, x, y if beta == 1 else trees.scale(beta, y), out)
    scaled = x if alpha == 1 else trees.scale(alpha, x)
    return scaled if fixed and beta == 0 else trees.axpy(beta, y, scaled, out)


def _matrix_product(matrix: Tensor, v: Leaves) -> Leaves:
    return (matrix @ v[0],)
