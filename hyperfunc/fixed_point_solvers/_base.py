"""What the fixed-point solvers have in common: the call, the loop, and how states are laid out."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._compile.compiler import Compiler, check_backend
from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_callable, check_count, check_flags
from hyperfunc._engine.convergence import warn_unless_converged
from hyperfunc._engine.results import RESULTS, HypergradError, SolveStats, code_where, find_failure
from hyperfunc._engine.shown import show
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import sharding
from hyperfunc._types import InnerSolver, Leaves, ParamsFunction, TensorTree
from hyperfunc.linear_solvers._base import check_stopping

_GROWTH = 10.0  # of the residual over the best one, where a method with a memory starts anew


class AbstractFixedPointSolver(abc.ABC):
    """What a fixed-point solver, a frozen dataclass, provides: the call, and `inner_solver`.

    Example:
        >>> def cosine(z, h):
        ...     return torch.cos(h * z)
        >>> for solver in hf.fixed_point_solvers.Picard(), hf.fixed_point_solvers.Newton():
        ...     solver(cosine, torch.tensor(0.0), torch.tensor(1.0))[1].num_steps
        tensor(31)
        tensor(4)
    """

    maxiter: int
    rtol: float | None
    atol: float
    batch_dim: int | None
    throw: bool

    def __post_init__(self) -> None:
        check_stopping(self)
        check_flags(self, throw=self.throw)
        if isinstance(self.batch_dim, bool) or not isinstance(self.batch_dim, int | None):
            expected = "expected an integer, or None for one problem"
            raise TypeError(
                f"{type(self).__name__}: batch_dim is {show(self.batch_dim)}; {expected}"
            )

    def __call__(
        self,
        fixed_point: ParamsFunction,
        init: TensorTree,
        hparams: TensorTree,
        /,
        *args: Any,
        return_trace: bool = False,
        at_steps: Sequence[int] = (),
    ) -> Any:
        """Solve ``z = fixed_point(z, hparams, *args)``.

        A pure function; what autograd records of it are the steps. For the derivatives of the
        solution itself use `inner_solver` with `hyperfunc.implicit_diff`.

        Args:
            fixed_point: ``(params, hparams, *args) -> tree like params``.
            init: where to start: the solution for similar ``hparams`` saves steps. Integers and
                bools in it, such as masks, stay as they are.
            hparams: passed on to ``fixed_point``.
            args: passed on to ``fixed_point``.
            return_trace: whether to return the residual norms on the way too.
            at_steps: numbers of steps, each at least 0, after which the iterate is returned too.

        Returns:
            The solution, a tree like ``init``, and its `hyperfunc.SolveStats`, of shape
            ``(batch,)`` with ``batch_dim``: steps taken (the map is evaluated once more, to measure
            the last one), residual norm of the solution, and result. With ``return_trace`` then
            comes a tensor of shape ``(iterates,)`` or ``(iterates, batch)``: the residual norms of
            all iterates, the start first; that of a sample that is done stays. With ``at_steps``
            then comes a list of trees like ``init``; a sample that is done stays as it is.

        Raises:
            HypergradError: for non-finite values and divergence, with ``throw``.
            TypeError: if no leaf of ``init`` is a floating-point tensor, or one is no tensor.
            ValueError: if the map changes structure, shape, dtype or device, or leaves have no
                common batch dimension.
        """
        problem = Problem.make(fixed_point, init, hparams, args, self.batch_dim)
        if not isinstance(at_steps, Sequence):
            raise TypeError(
                f"{type(self).__name__}: at_steps is of type {type(at_steps).__name__}; expected a "
                f"tuple of numbers of steps. Write at_steps=(4,) for one"
            )
        for step in at_steps:
            check_count(self, "at_steps holds", step, 0)
        trace: list[Tensor] = []
        kept: dict[int, Tensor] = {}

        def observe(count: int, point: Point) -> None:
            trace.append(point.norm)
            if count in at_steps:
                kept[count] = point.z

        check_flags(self, return_trace=return_trace)
        watched = return_trace or at_steps
        iteration = self._iteration(problem)
        rows, stats = _solve(self, iteration, problem, observe if watched else None)
        if self.throw:
            raise_unless_solved(self, stats)
        if self.batch_dim is None:
            stats = SolveStats(*(field[0] for field in stats))
        solution = problem.tree(problem.unpack(rows))
        further: list[Any] = []
        if return_trace:
            norms = torch.stack(trace).detach()
            further.append(norms[:, 0] if self.batch_dim is None else norms)
        if at_steps:
            states = (problem.unpack(kept.get(step, rows)) for step in at_steps)
            further.append(list(map(problem.tree, states)))
        return (solution, stats, *further)

    def inner_solver(
        self,
        fixed_point: ParamsFunction,
        *,
        init: InnerSolver,
        has_aux: bool = False,
        compile: bool | str | Mapping[str, Any] = False,
    ) -> FixedPointInnerSolver:
        """An inner solver ``(hparams, *args) -> params``, which carries its condition.

        Args:
            fixed_point: ``(params, hparams, *args) -> tree like params``.
            init: ``(hparams, *args) -> params``, where the solver starts.
            has_aux: whether it returns ``(params, SolveStats)``, which the transforms know. A solve
                that does not converge then warns no more.
            compile: whether to compile the solve, as by the ``compile`` of `hyperfunc.iterate`: as
                a loop that stops by itself, with the numbers, codes and statistics of plain calls.

        Returns:
            The inner solver, for `hyperfunc.hypergrad` and `hyperfunc.implicit_diff`.

        Example:
            >>> solve = hf.fixed_point_solvers.Anderson().inner_solver(
            ...     lambda z, h: torch.cos(h * z), init=lambda h: torch.zeros_like(h)
            ... )
            >>> torch.func.grad(hf.implicit_diff(solve, method="gmres"))(torch.tensor(1.0))
            tensor(-0.2975)
        """
        check_callable(fixed_point, "fixed_point", "(params, hparams, *args) -> tree like params")
        check_callable(init, "init", "(hparams, *args) -> params")
        check_flags(self, has_aux=has_aux)
        backend = check_backend(compile)
        compiler = None
        if backend is not None:
            compiler = Compiler(backend, "the fixed-point solve", (fixed_point, self))
        return FixedPointInnerSolver(self, fixed_point, init, has_aux, compiler)

    @abc.abstractmethod
    def _iteration(self, problem: Problem) -> Iteration:
        """What the solver does in one call."""


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPointInnerSolver:
    """An inner solver made by `AbstractFixedPointSolver.inner_solver`."""

    solver: AbstractFixedPointSolver
    fixed_point: ParamsFunction
    init: InnerSolver
    has_aux: bool = False
    compiler: Compiler | None = None

    @property
    def condition(self) -> tuple[str, ParamsFunction]:
        """What the solution satisfies."""
        return ("fixed_point", self.fixed_point)

    def __call__(self, hparams: TensorTree, /, *args: Any) -> TensorTree:
        """The solution, or with ``has_aux`` a pair of it and the `hyperfunc.SolveStats`."""
        init = call("init(hparams, *args)", self.init, hparams, *args)
        arguments = (self.fixed_point, init, hparams, *args)
        solution, stats = solve_compiled(self.solver, self.compiler, *arguments)
        if self.has_aux:
            return solution, stats
        warn_unless_solved(self.solver, stats)
        return solution


def solve_compiled(
    solver: AbstractFixedPointSolver,
    compiler: Compiler | None,
    fixed_point: ParamsFunction,
    *arguments: Any,
) -> tuple[TensorTree, SolveStats]:
    """A call of a solver, compiled where that may stand in for it."""
    tensors, frame = trees.partition(arguments)
    if compiler is None or not compiler.applies(tensors):
        return solver(fixed_point, *arguments)  # type: ignore[no-any-return]
    quiet: Any = dataclasses.replace(solver, throw=False)  # type: ignore[type-var]

    def compute(*operands: Tensor) -> Any:
        return quiet(fixed_point, *frame.fill(operands))

    solution, stats = compiler.call(compute, frame, compiler.read(), tensors)
    if solver.throw:
        raise_unless_solved(solver, stats)
    return solution, stats


def raise_unless_solved(
    solver: AbstractFixedPointSolver, stats: SolveStats, *, finished: bool | None = False
) -> None:
    """Raise if a solve failed.

    So it did with ``finished`` if it only stopped at its step limit too; with None only if values
    are not finite.
    """
    accepted = RESULTS.success if finished else RESULTS.max_steps
    result = stats.result
    if finished is None:
        result = torch.where(result == int(RESULTS.nonfinite), result, 0)
    failure = find_failure(result, accepted, "samples")
    if failure is not None:
        code, samples = failure
        raise HypergradError(
            f"the fixed-point solve with {solver!r} failed{samples}: {_advice(solver, code)}. "
            f"Pass throw=False to get the best iterates and the result codes instead"
        )


def warn_unless_solved(solver: AbstractFixedPointSolver, stats: SolveStats) -> None:
    """Warn of a solve whose statistics nobody sees, unless it was a success."""
    name = f"the fixed-point solve with {solver!r}"
    warn_unless_converged(solver, stats, name, lambda code: f"{_advice(solver, code)}.", "samples")


def _advice(solver: AbstractFixedPointSolver, code: RESULTS) -> str:
    names = (name for name in ("Anderson", "Broyden", "Newton") if name != type(solver).__name__)
    return _ADVICE[code].format(others=", ".join(names))


_ADVICE = {
    RESULTS.max_steps: "the tolerance was not reached. Raise maxiter or rtol, start closer, or "
    "take a solver that needs fewer steps ({others}). If none gets there, the map is no "
    "contraction: a cell that norms its state is a common cause, and may norm its input instead",
    RESULTS.nonfinite: "non-finite values (NaN or Inf) appeared. Check the start and the inputs, "
    "or bound the map",
    RESULTS.divergence: "the residual grew instead of shrinking: the map is no contraction there. "
    "Take another solver ({others}), start closer, or bound the map's Lipschitz constant "
    "(torch.nn.utils.parametrizations.spectral_norm)",
}


class Point(NamedTuple):
    """Iterates as rows, one a sample, with the values of the map and the residual norms there."""

    z: Tensor
    value: Tensor
    norm: Tensor

    @property
    def residual(self) -> Tensor:
        return self.value - self.z


class Iteration(NamedTuple):
    """A method for one problem, by what drives all of them.

    ``start`` gives what the method remembers, at first, of a point; ``step`` the next iterates and
    what it remembers then, from the number of the step, a point, what it remembers, the active
    samples, and those that are to forget it, which they may have to after ``memory`` steps.
    """

    evaluate: Callable[[Tensor], Tensor]
    start: Callable[[Point], Any]
    step: Callable[[Any, Point, Any, Tensor, Tensor], tuple[Tensor, Any]]
    memory: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The map on flat trees, and how these are laid out as a matrix with one row a sample.

    Integers and bools in the state are constants.
    """

    fixed_point: ParamsFunction
    init: Leaves
    constants: Leaves
    state: trees.StateSpec
    hparams: TensorTree
    args: tuple[Any, ...]
    batch_dim: int | None
    num_rows: int
    dtype: torch.dtype

    @staticmethod
    def make(
        fixed_point: ParamsFunction, init: Any, hparams: Any, args: Any, batch_dim: int | None
    ) -> Problem:
        leaves, constants, state = trees.flatten_state(init, "init")
        paths, _ = state.split(trees.paths(state.full, "init"))
        for leaf, path in zip(leaves, paths, strict=True):
            if sharding.is_sharded(leaf):
                raise ValueError(
                    f"{path} is a DTensor that is sharded, but fixed-point solvers keep iterates "
                    f"as one matrix. Use an inner solver made by hf.iterate or hf.minimize"
                )
            if batch_dim is None:
                continue
            if not -leaf.ndim <= batch_dim < leaf.ndim:
                raise ValueError(
                    f"{path} has shape {tuple(leaf.shape)}, without dimension {batch_dim}; "
                    f"batch_dim={batch_dim} says that all leaves have one, which counts samples. "
                    f"Write batch_dim=None for one problem"
                )
            if leaf.shape[batch_dim] != leaves[0].shape[batch_dim]:
                raise ValueError(
                    f"{paths[0]} has shape {tuple(leaves[0].shape)} and {path} has shape "
                    f"{tuple(leaf.shape)}; expected the same size in dimension {batch_dim} "
                    f"(batch_dim), which counts samples"
                )
        num_rows = 1 if batch_dim is None else leaves[0].shape[batch_dim]
        dtype = trees.accumulation_dtype(leaves)
        return Problem(
            *(fixed_point, leaves, constants, state, hparams, args, batch_dim, num_rows, dtype)
        )

    @property
    def spec(self) -> trees.TreeSpec:
        """The structure without the constants."""
        return self.state.spec

    def tree(self, leaves: Leaves) -> TensorTree:
        """The state of these leaves, and the constants."""
        return self.state.fill(leaves, self.constants)

    def evaluate(self, z: Tensor) -> Tensor:
        """The map on rows."""
        return self.pack(self.apply(self.unpack(z)))

    def apply(self, leaves: Leaves) -> Leaves:
        """The map on flat trees."""
        role, at = "fixed_point(params, hparams, *args)", (self.hparams, *self.args)
        output = call(role, self.fixed_point, self.tree(leaves), *at)
        values, spec = trees.flatten(output)
        like, name = self.state.merge(leaves, self.constants), "the output of fixed_point"
        trees.check_like(values, spec, like, self.state.full, name, "params")
        return self.state.split(values)[0]

    def pack(self, leaves: Leaves) -> Tensor:
        """The leaves as rows, in the accumulation dtype."""
        device = self.init[0].device
        rows = [
            self._first(leaf).reshape(self.num_rows, size).to(device=device, dtype=self.dtype)
            for leaf, size in zip(leaves, self._sizes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def unpack(self, rows: Tensor) -> Leaves:
        """The inverse of `pack`."""
        leaves = []
        for part, leaf in zip(rows.split(self._sizes, dim=1), self.init, strict=True):
            part = part.reshape(self._first(leaf).shape)
            if self.batch_dim is not None:
                part = part.movedim(0, self.batch_dim)
            leaves.append(part.to(device=leaf.device, dtype=leaf.dtype))
        return tuple(leaves)

    def round(self, rows: Tensor) -> Tensor:
        """The rows with each entry in the precision of its leaf."""
        exact = all(leaf.dtype == self.dtype for leaf in self.init)
        return rows if exact else self.pack(self.unpack(rows))

    def _first(self, leaf: Tensor) -> Tensor:
        """The leaf with its samples in the first dimension."""
        return leaf if self.batch_dim is None else leaf.movedim(self.batch_dim, 0)

    @property
    def _sizes(self) -> list[int]:
        # not numel over rows, of which there may be none
        shapes = [self._first(leaf).shape for leaf in self.init]
        return [(shape if self.batch_dim is None else shape[1:]).numel() for shape in shapes]


def is_first(number: Any) -> bool:
    """Whether a step is the first one, where that is told; steps of a kept loop are all alike."""
    return isinstance(number, int) and number == 0


def room(z: Tensor, most: int) -> int:
    """Vectors to begin with where no step may add one: all, of zeros, in a kept loop, else none."""
    return most if loop.is_kept(z) else 0


class _Progress(NamedTuple):
    """Where a solve is: what is known of each sample, and what the method remembers."""

    point: Point
    best: Any  # a point, or None where nothing asks for it
    active: Tensor
    done: Tensor
    num_steps: Tensor
    age: Tensor  # steps since it started anew
    memory: Any


def _solve(
    solver: AbstractFixedPointSolver,
    iteration: Iteration,
    problem: Problem,
    observe: Callable[[int, Point], None] | None,
) -> tuple[Tensor, SolveStats]:
    eps = trees.epsilon(problem.init)
    adaptive = solver.rtol != 0 or solver.atol != 0
    rtol = max(eps**0.75 if solver.rtol is None else solver.rtol, eps)
    z = problem.pack(problem.init)
    nobody = torch.zeros(problem.num_rows, dtype=torch.bool, device=z.device)

    def move(number: Any, s: _Progress) -> tuple[Tensor, Tensor, Any]:
        """The next iterates, and the age of what the method remembers and that itself."""
        start, restart, age = s.point, nobody, s.age
        if iteration.memory is not None:
            grown = start.norm > _GROWTH * s.best.norm
            restart = s.active & (age > iteration.memory) & grown
            start = _select(restart, s.best, start)
            age = torch.where(restart, 0, age + 1)
        z, memory = iteration.step(number, start, s.memory, s.active, restart)
        z = problem.round(z)
        return torch.where(s.active[:, None], z, s.point.z) if adaptive else z, age, memory

    def judge(
        point: Point, best: Any, active: Tensor, done: Tensor, num_steps: Tensor, *rest: Any
    ) -> _Progress:
        """What there is at a point, which may be the best one, or good enough."""
        if adaptive:
            size = _norms(point.value)
            met = active & (point.norm <= (rtol * size).clamp_min(solver.atol))
            best = _select(active & (met | (point.norm < best.norm)), point, best)
            active, done = active & ~met & (point.norm < most), done | met
        elif best is not None:
            best = _select(point.norm < best.norm, point, best)
        return _Progress(point, best, active, done, num_steps, *rest)

    def step(number: Any, s: _Progress) -> _Progress:
        z, age, memory = move(number, s)
        value, norm, num_steps = iteration.evaluate(z), s.point.norm, s.num_steps
        if adaptive:
            num_steps = num_steps + s.active
            norm = torch.where(s.active, _norms(value - z), norm)
        elif s.best is not None or observe is not None:
            norm = _norms(value - z)
        point = Point(z, value, norm)
        if observe is not None:
            observe(number + 1, point)
        return judge(point, s.best, s.active, s.done, num_steps, age, memory)

    value = iteration.evaluate(z)
    point = Point(z, value, _norms(value - z))
    first, largest = point.norm, torch.maximum(point.norm, _norms(value))
    most = largest / eps
    if observe is not None:
        observe(0, point)
    none = torch.zeros_like(nobody, dtype=torch.int64)
    best = point if adaptive or iteration.memory is not None else None
    s = judge(point, best, ~nobody, nobody, none, none, iteration.start(point))
    if not adaptive:  # the last step is not measured
        if solver.maxiter:
            s, count = loop.repeat(step, s, solver.maxiter - 1)
            z, _, _ = move(count, s)
        norm = _norms(s.point.value - s.point.z)
        finite = torch.isfinite(norm) & torch.isfinite(z.detach()).all(dim=1)
        result = code_where(finite, RESULTS.success, RESULTS.nonfinite)
        return z, SolveStats(none + solver.maxiter, norm, result)
    s, _ = loop.repeat(step, s, solver.maxiter, lambda s: s.active.any())
    norm = s.point.norm
    # rounding noise around a start that is the solution may grow
    grown = ~s.active | (norm > 1.001 * torch.maximum(first, eps * largest))
    result = code_where(grown, RESULTS.divergence, RESULTS.max_steps)
    result = code_where(torch.isfinite(norm), result, RESULTS.nonfinite)
    result = code_where(s.done, RESULTS.success, result)
    return s.best.z, SolveStats(s.num_steps, s.best.norm, result)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.detach(), dim=1)
    return norms


def _select(mask: Tensor, a: Point, b: Point) -> Point:
    """The first point for the samples of a mask, the second for the others."""
    if trees.can_read((mask,)) and (mask == mask[:1]).all():  # most often
        return a if mask[:1].all() else b
    masks = mask[:, None], mask[:, None], mask
    return Point(*(torch.where(*parts) for parts in zip(masks, a, b, strict=True)))
