"""The implicit rule: derivatives of the solution of ``r(w, theta) = 0`` from one linear solve.

With ``A = dr/dw`` at the solution ``w*(theta)``, the implicit function theorem gives

    vjp:  g  ->  -(dr/dtheta)^T u   with  A^T u = g
    jvp:  t  ->  -A^{-1} (dr/dtheta) t

Here ``w`` are the leaves of params, and ``theta`` is all that the solution may depend on: the
leaves of hparams, followed by the tensors in ``*args``.

The linear solve is itself a solution map, with its own rule of the same kind; the two call each
other, and that is what makes every order of derivative right whatever the linear solver does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._compile.compiler import Compiler
from hyperfunc._engine import trees
from hyperfunc._engine.contact import in_contact
from hyperfunc._engine.convergence import warn_unless_converged
from hyperfunc._engine.flat import differentiable_indices, scatter, split
from hyperfunc._engine.results import (
    RESULTS,
    UNFINISHED,
    ChoiceStats,
    HypergradError,
    SolveStats,
    explain,
    find_failure,
    of_tasks,
)
from hyperfunc._engine.solver_aux import UNTOLD, split_aux
from hyperfunc._engine.user_functions import call
from hyperfunc._rule.conditions import Arguments, BoundCondition, Condition
from hyperfunc._rule.minibatches import SECOND_DERIVATIVE, MinibatchLinearization
from hyperfunc._rule.unused import UNUSED, failures_explained, is_used
from hyperfunc._torch import autodiff, batching, derivative_rules, tracking
from hyperfunc._torch.captured import captured_message, captured_tensors, escaped_message
from hyperfunc._torch.unsupported import explained
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers import (
    AbstractLinearSolver,
    LeastSquares,
    LinearOperator,
    StochasticAID,
)
from hyperfunc.linear_solvers._base import parts
from hyperfunc.linear_solvers._preconditioners import refuse_one_direction

Linearized: TypeAlias = autodiff.Linearization | MinibatchLinearization

_NOT_FINITE = {
    "params": "the inner solver returned non-finite values (NaN or Inf) in {path}{tasks}. Lower "
    "its step size, check the data, or pass throw=False to get the numbers as they are",
    "hparams": "the hypergradient with respect to {path} is not finite (NaN or Inf){tasks}, though "
    "the inner solution is. Check the outer loss and the derivatives of the condition there, or "
    "pass throw=False to get the numbers as they are",
}

_FLOAT16 = (
    ". In float16 the derivative of a step of Adam or RMSprop overflows at a gradient of zero, "
    "where it is 1 / eps: take eps=1e-3 or more, bfloat16, or float32 for params and hparams"
)


Layout: TypeAlias = tuple[trees.TreeSpec, trees.Frame]
"""How the params and aux of an inner solver are laid out."""


@dataclasses.dataclass(eq=False)
class ImplicitProblem:
    """An inner solver called, and the condition of its result, ``bound`` once that is known."""

    inner_solver: Callable[..., Any]
    condition: Condition
    linear_solver: AbstractLinearSolver
    arguments: Arguments
    throw: bool | None  # None: where what is returned is of no use
    on_backward: Callable[[SolveStats], object] | None = None
    has_aux: bool = False
    bound: BoundCondition | None = None
    compiler: Compiler | None = None  # of what pulls a cotangent back
    aux_frame: trees.Frame | None = None
    aux: Any = ()  # what the inner solver returned beside its params, once that is known

    def solve(self, theta: Leaves) -> Leaves:
        """The inner solution as detached leaves that share no memory with the arguments.

        Those that are integers or bools come next, and the tensors of aux last.
        """
        hparams = theta[: self.arguments.num_hparams]
        versions = tracking.versions(hparams)
        captured = captured_tensors(self.inner_solver) if tracking.transforms_active() else ()
        used = (*theta, *filter(tracking.has_level, captured))
        since = tracking.now()
        try:
            with (
                torch.enable_grad(),
                batching.outside_idle_vmaps(used),
                derivative_rules.active(tracking.transforms_active()),
            ):
                outputs, (spec, self.aux_frame) = self._run(tracking.detach(theta), captured)
        except RuntimeError as error:
            if tracking.escaped(error):
                raise ValueError(escaped_message("the inner solver")) from error
            raise
        leaves, aux = split(outputs, spec.num_leaves)
        if tracking.reaches_foreign_leaf(tuple(map(tracking.innermost, leaves)), (), since):
            raise ValueError(captured_message("the inner solver"))
        self._refuse_written(versions, tracking.versions(hparams))
        if self.throw is not False:
            raise_unless_finite(leaves, spec)
        state = trees.StateSpec.of(spec, leaves)
        self.bound = BoundCondition(self.condition, self.arguments, state)
        w, others = state.split(leaves)
        return tuple(leaf.clone() for leaf in tracking.detach((*w, *others, *aux)))

    def _run(self, theta: Leaves, captured: Sequence[Tensor]) -> tuple[Leaves, Layout]:
        """What the inner solver returns, by a loop over tasks where it is no code for vmap."""
        layouts: list[Layout] = []

        def run(*tensors: Tensor) -> Leaves:
            at = self.arguments.unflatten(tensors)
            result = call("the inner solver(hparams, *args)", self.inner_solver, *at)
            params, aux = split_aux(result, self.has_aux)
            leaves, spec = flatten_params(params)
            values, frame = trees.partition(aux)
            layouts.append((spec, frame))
            return (*leaves, *values)

        rng = torch.get_rng_state() if batching.active_vmaps() else None
        try:
            return run(*theta), layouts[0]
        except Exception as error:
            final = isinstance(error, HypergradError | torch.cuda.OutOfMemoryError)
            if rng is None or final or "randomness" in str(error):
                raise
            if any(map(tracking.has_level, captured)):
                raise ValueError(escaped_message("the inner solver")) from error
        # the solver is never differentiated, so that it may branch, call backward(), NumPy, ...
        layouts.clear()
        leaves = batching.loop_over_tasks(run, theta, rng)
        for layout in layouts:
            for what, one, other in zip(("params", "aux"), layout, layouts[0], strict=True):
                if one != other:
                    raise ValueError(
                        f"the inner solver returned {what} of another structure for one task than "
                        f"for another: got {one} and {other}; expected one structure for all tasks"
                    )
        return leaves, layouts[0]

    def solution(self, theta: Leaves) -> tuple[Leaves, Leaves]:
        """The inner solution, and theta, which now has what in the solution is no floating number.

        It has the implicit rule attached if derivatives may be asked for.
        """
        tracked = tracking.is_tracked(theta)
        if tracked:
            self._refuse_captured_by_solver(theta)
        leaves = _ImplicitSolution.apply(self, *theta) if tracked else self.solve(theta)
        assert self.bound is not None
        state = self.bound.state
        w, others, aux = split(leaves, state.num_floating, state.num_others)
        if self.aux_frame is not None:
            self.aux = self.aux_frame.fill(tracking.detach(aux))
        theta = (*theta, *others)
        if tracked and tracking.transforms_active():  # else every linearisation looks for itself
            self.refuse_captured(w, theta)
        return w, theta

    def linearize(self, w: Leaves, theta: Leaves, wrt: Sequence[int]) -> Linearized:
        """The condition's function at a point; see `BoundCondition.linearize`."""
        assert self.bound is not None
        method = self.linear_solver
        if isinstance(method, StochasticAID) and method.sampler is not None:
            return MinibatchLinearization(method, self.bound, w, theta, tuple(wrt))
        return self.bound.linearize(w, theta, wrt)

    def adjoint(
        self,
        linearization: Linearized,
        w: Leaves,
        theta: Leaves,
        b: Leaves,
        x0: Leaves | None = None,
        *,
        transposed: bool = True,
    ) -> tuple[Leaves, SolveStats | ChoiceStats]:
        """Solve ``A^T u = b`` (or ``A u = b``), differentiably where that may be asked for."""
        system = _LinearSystem(self, len(w), len(theta), transposed)
        if not tracking.is_tracked((*w, *theta, *b)):
            return system.solve(linearization, theta, b, x0)
        start = () if x0 is None else tracking.detach(x0)
        outputs = _LinearSolution.apply(system, *w, *theta, *b, *start)
        u, stats = split(outputs, len(w))
        return u, (SolveStats if len(stats) == 3 else ChoiceStats)(*stats)

    def unseen_adjoint(
        self, *args: Any, **keywords: Any
    ) -> tuple[Leaves, SolveStats | ChoiceStats]:
        """`adjoint` where nobody sees its statistics, which so warns if it did not converge."""
        u, stats = self.adjoint(*args, **keywords)
        self._tell(stats)
        return u, stats

    def pull(self, w: Leaves, theta: Leaves, wrt: Sequence[int], b: Leaves) -> Leaves:
        """``-(dr/dtheta)^T A^{-T} b`` for the tensors of theta at wrt, whose solve nobody sees."""
        assert self.bound is not None
        with failures_explained(self.bound, w, theta, wrt):
            if self.compiler is not None and self.compiler.applies((*w, *theta, *b)):
                stats, cross = self._pull_compiled(self.compiler, w, theta, tuple(wrt), b)
                if not batching.any_true(stats.result == UNFINISHED):
                    self.refuse_failure(stats)
                    self._tell(stats)
                    return cross
            linearization = self.linearize(w, theta, wrt)
            u, _ = self.unseen_adjoint(linearization, w, theta, b)
        return cross_term(self, linearization, w, theta, wrt, u)

    def _pull_compiled(
        self, compiler: Compiler, w: Leaves, theta: Leaves, wrt: tuple[int, ...], b: Leaves
    ) -> tuple[SolveStats, Leaves]:
        quiet = dataclasses.replace(self, throw=False)

        def compute(*operands: Tensor) -> tuple[SolveStats, Leaves]:
            at, variables, rhs = split(operands, len(w), len(theta))
            linearization = quiet.linearize(at, variables, wrt)
            u, stats = quiet.adjoint(linearization, at, variables, rhs)
            cross = cross_term(quiet, linearization, at, variables, wrt, u)
            return SolveStats(*stats[:3]), cross

        key = (self.bound and self.bound.state, self.arguments, wrt)
        operands = (*w, *theta, *(leaf.contiguous() for leaf in b))
        result: tuple[SolveStats, Leaves] = compiler.call(compute, key, compiler.read(), operands)
        return result

    def refuse_failure(self, stats: SolveStats | ChoiceStats) -> None:
        """Raise if a linear solve failed, unless what it found may be returned all the same."""
        result = stats.result
        if self.throw is None:
            useless = (result == int(RESULTS.nonfinite)) | (result == int(RESULTS.divergence))
            result = torch.where(useless, result, 0)
        if self.throw is not False:
            found = SolveStats(*stats[:3])._replace(result=result)
            raise_on_failure(found, self.linear_solver, self.condition.kind)

    def _tell(self, stats: SolveStats | ChoiceStats) -> None:
        """Tell of a solve whose statistics nobody sees."""
        found = SolveStats(*stats[:3])
        if self.on_backward is not None and not tracking.transforms_active():
            self.on_backward(SolveStats(*tracking.detach(found)))
        solver = self.linear_solver
        name = f"the linear solve with {solver!r} for a derivative"
        kind = self.condition.kind
        warn_unless_converged(solver, found, name, lambda code: explain(code, kind))

    @contextlib.contextmanager
    def explained(self, theta: Leaves) -> Iterator[None]:
        """Where errors of torch name the argument that they are due to."""

        def arguments() -> dict[str, Tensor]:
            hparams, *args = self.arguments.unflatten(theta)
            return trees.named_tensors(hparams, args)

        what = "the derivative of the inner solution"
        with explained(what, arguments), in_contact(what):
            yield

    def _refuse_written(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        if before == after:
            return
        paths = trees.paths(self.arguments.frame.spec.children()[0], "hparams")
        path = next(p for p, old, new in zip(paths, before, after, strict=True) if old != new)
        raise ValueError(
            f"the inner solver wrote to {path} in place; expected it to leave its arguments as "
            f"they are. Start from a copy: {path}.clone()"
        )

    def _refuse_captured_by_solver(self, theta: Leaves) -> None:
        """Raise if the inner solver uses a tensor of an enclosing transform, besides its value."""
        if not (tracking.transforms_active() and tracking.is_tracked(())):
            return
        if not any(map(tracking.is_attached, captured_tensors(self.inner_solver))):
            return
        # which runs it below the transforms, where it cannot be told: so once more within them
        with torch.enable_grad(), contextlib.suppress(RuntimeError):
            result = self.inner_solver(*self.arguments.unflatten(tracking.detach(theta)))
            if not any(map(tracking.is_attached, trees.tensors(result))):
                return
        raise ValueError(captured_message("the inner solver"))

    def warn_of_unused_hparams(self) -> None:
        message = self.condition.unused
        if message is None:
            message = UNUSED.format(kind=self.condition.kind)
        if message:
            warnings.warn(message, stacklevel=3)

    def warn_of_zero_push(self, w: Leaves, theta: Leaves, wrt: Sequence[int], b: Leaves) -> None:
        """Warn if a tangent of hparams has become zero as the condition does not use them."""
        size = self.arguments.num_hparams
        if not any(i < size for i in wrt) or not batching.can_look(b[0]):
            return
        if batching.any_true(trees.norm(b) != 0):
            return
        assert self.bound is not None
        if not is_used(self.bound, w, theta, range(size)):
            self.warn_of_unused_hparams()

    def refuse_captured(self, w: Leaves, theta: Leaves) -> None:
        """Raise if the condition uses a tensor that carries a derivative and is no argument."""
        assert self.bound is not None
        if not tracking.transforms_active():
            self.bound.linearize(tracking.detach(w), tracking.detach(theta), ())
            return
        value = self.bound.residual_at(tracking.detach(w), tracking.detach(theta))
        if any(tracking.is_attached(leaf) for leaf in value):
            raise ValueError(captured_message(self.condition.kind))


class _ImplicitSolution(torch.autograd.Function):
    """theta -> w*, solved in forward by any code, differentiated by the implicit rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: ImplicitProblem, *theta: Tensor) -> Leaves:
        return batching.mapped_alike(problem.solve(theta), theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.problem, *theta = inputs
        state = ctx.problem.bound.state
        ctx.num_params, ctx.num_others = state.num_floating, state.num_others
        w, others, aux = split(output, ctx.num_params, ctx.num_others)
        ctx.num_rest = len(others) + len(aux)
        ctx.mark_non_differentiable(*others, *aux)
        _save(ctx, *w, *theta, *others)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        w, theta = split(autodiff.saved_tensors(ctx), ctx.num_params)
        num_theta = len(theta) - ctx.num_others
        wrt = differentiable_indices(theta[:num_theta], ctx.needs_input_grad[1:])
        with ctx.problem.explained(theta):
            cross = ctx.problem.pull(w, theta, wrt, cotangents[: ctx.num_params])
        return (None, *scatter(cross, wrt, num_theta))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with autodiff.nested_forward_mode(ctx.saved_tensors) as saved:
            w, theta = split(saved, ctx.num_params)
            wrt, directions = _directions(tangents, theta[: len(theta) - ctx.num_others])
            linearization = ctx.problem.linearize(w, theta, wrt)
            b = trees.scale(-ctx.problem.condition.scale, linearization.push(directions, 1))
            if (regulariser := ctx.problem.bound.regulariser(w, theta, wrt)) is not None:
                b = trees.sub(b, regulariser.push(directions))
            ctx.problem.warn_of_zero_push(w, theta, wrt, b)
            w_dot, _ = ctx.problem.unseen_adjoint(linearization, w, theta, b, transposed=False)
            return (*w_dot, *[None] * ctx.num_rest)


@dataclasses.dataclass(frozen=True, eq=False)
class _LinearSystem:
    """``A(w, theta)^T u = b``, or ``A(w, theta) u = b``, at a solution of an implicit problem."""

    problem: ImplicitProblem
    num_params: int
    num_theta: int
    transposed: bool

    def solve(
        self, linearization: Linearized, theta: Leaves, b: Leaves, x0: Leaves | None
    ) -> tuple[Leaves, SolveStats | ChoiceStats]:
        if x0 is not None:  # the solution for b = 0 is 0, which no relative tolerance can find
            x0 = trees.scale((trees.dot(b, b) != 0).to(torch.float32), x0)
        solver = self.problem.linear_solver
        if not self.transposed and not self.problem.condition.symmetric:
            refuse_one_direction(solver)
        if isinstance(linearization, MinibatchLinearization):
            at, spec = linearization.at, linearization.bound.params_spec
            x, stats = linearization.method.descend(
                lambda step: self.operator(at(step), theta), b, x0, spec
            )
        else:
            if isinstance(solver, StochasticAID):
                solver = solver.without_samplers()
            solve = getattr(solver, "solve_and_tell", solver.solve)
            x, stats = solve(self.operator(linearization, theta), b, x0)
        self.problem.refuse_failure(stats)
        if (
            self.problem.throw is False
        ):  # what a solver returns then is its last finite iterate, zeros perhaps
            nonfinite = stats.result == int(RESULTS.nonfinite)
            x = trees.where(nonfinite, trees.scale(torch.nan, x), x)
        return x, stats

    def operator(self, linearization: autodiff.Linearization, theta: Leaves) -> LinearOperator:
        assert self.problem.bound is not None
        operator = self.problem.bound.operator(linearization, theta)
        return operator.T if self.transposed else operator

    def linearize(self, u: Leaves, point: Leaves, wrt: Sequence[int]) -> autodiff.Linearization:
        """``A(w, theta)^T u`` (or ``A u``) as a function of the point ``(w, theta)``."""
        if any(isinstance(part, LeastSquares) for part in parts(self.problem.linear_solver)):
            raise RuntimeError(
                "LeastSquares gives first derivatives only: the derivative of a least-squares "
                "solution is not that of a solved system. Add a regulariser to the inner problem, "
                "or use hf.Damped, hf.Dense or hf.NormalCG if the system has solutions"
            )

        def product(*point: Tensor) -> Leaves:
            w, theta = split(point, self.num_params)
            linearization = self.problem.linearize(w, theta, ())
            if isinstance(linearization, MinibatchLinearization):
                raise RuntimeError(SECOND_DERIVATIVE)
            return self.operator(linearization, theta).mv(u)

        return autodiff.Linearization(product, point, (wrt,))


class _LinearSolution(torch.autograd.Function):
    """(w, theta, b) -> u with A(w, theta)^T u = b, and the statistics of the solve."""

    generate_vmap_rule = True

    @staticmethod
    def forward(system: _LinearSystem, *tensors: Tensor) -> Leaves:
        n = system.num_params
        w, theta, b, start = split(tensors, n, system.num_theta, n)
        try:
            linearization = system.problem.linearize(w, theta, ())
            u, stats = system.solve(linearization, theta, b, start or None)
        except RuntimeError as error:
            if tracking.escaped(error):
                raise ValueError(escaped_message(system.problem.condition.kind)) from error
            raise
        return batching.mapped_alike(tuple(leaf.clone() for leaf in (*u, *stats)), tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.system, *tensors = inputs
        ctx.num_inputs = len(inputs)
        point_size = ctx.system.num_params + ctx.system.num_theta
        _save(ctx, *output[: ctx.system.num_params], *tensors[:point_size])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        system: _LinearSystem = ctx.system
        u, point = split(autodiff.saved_tensors(ctx), system.num_params)
        w, theta = split(point, system.num_params)
        cotangent = cotangents[: system.num_params]
        wrt = differentiable_indices(point, ctx.needs_input_grad[1 : 1 + len(point)])
        with system.problem.explained(theta):
            products = system.linearize(u, point, wrt)
            linearization = system.problem.linearize(w, theta, ())
            s, _ = system.problem.unseen_adjoint(
                linearization, w, theta, cotangent, transposed=not system.transposed
            )
            grads = trees.neg(products.pull(s))
        rest = ctx.num_inputs - 1 - len(point) - system.num_params
        return (None, *scatter(grads, wrt, len(point)), *s, *[None] * rest)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        system: _LinearSystem = ctx.system
        with autodiff.nested_forward_mode(ctx.saved_tensors) as saved:
            u, point = split(saved, system.num_params)
            w, theta = split(point, system.num_params)
            b_tangents = tangents[len(point) : len(point) + len(u)]
            b_dot = tuple(
                torch.zeros_like(leaf) if tangent is None else tangent.to(leaf.dtype)
                for leaf, tangent in zip(u, b_tangents, strict=True)
            )
            wrt, directions = _directions(tangents[: len(point)], point)
            b_dot = trees.sub(b_dot, system.linearize(u, point, wrt).push(directions))
            linearization = system.problem.linearize(w, theta, ())
            u_dot, stats = system.problem.unseen_adjoint(
                linearization, w, theta, b_dot, transposed=system.transposed
            )
            rest = [None] * (len(stats) - 2)
            return (*u_dot, None, torch.zeros_like(stats.residual_norm), *rest)


def cross_term(
    problem: ImplicitProblem,
    linearization: Linearized,
    w: Leaves,
    theta: Leaves,
    wrt: Sequence[int],
    u: Leaves,
    start: Leaves | None = None,
) -> Leaves:
    """``start - (dr/dtheta)^T u`` for the tensors of theta at wrt, group 1 of the linearization."""
    bound = problem.bound
    assert bound is not None
    total: list[Tensor | None] = [None] * len(wrt) if start is None else list(start)

    def add(factor: float, terms: Sequence[Tensor | None]) -> None:
        for i, (term, sum_) in enumerate(zip(terms, total, strict=True)):
            if term is not None and sum_ is None:
                (total[i],) = trees.scale(factor, (term,))
            elif term is not None and sum_ is not None:
                (total[i],) = trees.axpy(factor, (term,), (sum_,))

    add(-problem.condition.scale, linearization.pull_used(u, 1))
    if (weight := bound.center_weight(w, theta)) is not None:
        size = problem.arguments.num_hparams
        add(weight, [u[i] if i < size else None for i in wrt])
    elif (regulariser := bound.regulariser(w, theta, wrt)) is not None:
        add(-1.0, regulariser.pull_used(u, 0))
    size = problem.arguments.num_hparams
    of_hparams = [term for i, term in zip(wrt, total, strict=True) if i < size]
    if of_hparams and all(term is None for term in of_hparams):  # never so with a start
        problem.warn_of_unused_hparams()
    return tuple(
        torch.zeros_like(theta[i]) if term is None else term
        for i, term in zip(wrt, total, strict=True)
    )


def flatten_params(params: Any) -> tuple[Leaves, trees.TreeSpec]:
    """Flatten what an inner solver returned, integers too, with an error that names the solver."""
    if params is None:
        raise TypeError(
            "the inner solver returned None; expected the tree of inner parameters. "
            "Is its return statement missing?"
        )
    try:
        return trees.flatten_floating(params, "params", others=True)
    except TypeError as error:
        if isinstance(params, tuple) and len(params) == 2:
            raise TypeError(f"{error}{UNTOLD}") from None
        raise


def raise_unless_finite(leaves: Leaves, spec: trees.TreeSpec, name: str = "params") -> None:
    """Raise if a solution, or the gradient for hparams, has NaN or Inf, naming leaf and tasks."""
    floating = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    leaves = tuple(leaves[i] for i in floating)
    if batching.all_true(trees.sum_is_finite(leaves)):
        return
    finite = trees.all_finite(leaves)
    if batching.all_true(finite):
        return
    paths = trees.paths(spec, name)
    parts = ((paths[i], leaf) for i, leaf in zip(floating, leaves, strict=True))
    path = next(path for path, leaf in parts if not batching.all_true(trees.all_finite((leaf,))))
    message = _NOT_FINITE[name].format(path=path, tasks=of_tasks(~finite))
    if name == "hparams" and any(leaf.dtype == torch.float16 for leaf in leaves):
        message += _FLOAT16
    raise HypergradError(message)


def raise_on_failure(stats: SolveStats, linear_solver: AbstractLinearSolver, kind: str) -> None:
    if failure := find_failure(stats.result):
        code, tasks = failure
        raise HypergradError(
            f"the linear solve with {linear_solver!r} failed{tasks}: "
            f"{explain(code, kind)}. Pass throw=False to get the result codes instead"
        )


def _save(ctx: Any, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _directions(
    tangents: Sequence[Tensor | None], tensors: Leaves
) -> tuple[tuple[int, ...], Leaves]:
    wrt = differentiable_indices(tensors, [tangent is not None for tangent in tangents])
    # a number times a 0-d float32 tensor has a float64 tangent in torch
    return wrt, tuple(
        tangent.to(tensors[index].dtype)
        for index, tangent in enumerate(tangents)
        if index in wrt and tangent is not None
    )
