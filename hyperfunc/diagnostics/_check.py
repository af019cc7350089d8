"""A method against independent ones, on a problem of the user's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.results import RESULTS
from hyperfunc._engine.shown import show
from hyperfunc._engine.solver_aux import without_aux
from hyperfunc._rule.conditions import Arguments, BoundCondition, Condition, make_condition
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.unsupported import explained
from hyperfunc._types import InnerSolver, Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.diagnostics._diagnose import Diagnosis, diagnose_bound
from hyperfunc.diagnostics._differences import (
    directional_derivative,
    magnitude,
    noise_level,
    random_direction,
)
from hyperfunc.diagnostics._report import Causes, HypergradCheck, outcome
from hyperfunc.diagnostics._routes import (
    REFUSALS,
    ROUTES,
    Route,
    Tasks,
    gap,
    gap_of_derivative,
    gap_of_vmap,
    suspect,
)
from hyperfunc.inner_solvers._composed import ComposedLoss
from hyperfunc.inner_solvers._proximal import ProximalLoss
from hyperfunc.inner_solvers._solvers import IterativeSolver
from hyperfunc.iterative import FirstOrder, Reverse, ReverseUnroll
from hyperfunc.linear_solvers import (
    CG,
    AbstractLinearSolver,
    Auto,
    Damped,
    Dense,
    FixedPoint,
    Neumann,
    Nystrom,
    PipelinedCG,
)
from hyperfunc.linear_solvers._base import parts
from hyperfunc.linear_solvers._spectrum import spectral_radius
from hyperfunc.transforms._hypergrad import hypergrad_and_solution
from hyperfunc.transforms._methods import is_implicit, resolve_method


def check_hypergrad(  # noqa: D417
    inner_solver: InnerSolver,
    outer_loss: Loss,
    hparams: TensorTree,
    *args: Any,
    fixed_point: ParamsFunction | None = None,
    inner_loss: Loss | None = None,
    optimality: ParamsFunction | None = None,
    method: Any = "cg",
    has_aux: bool = False,
    solver_has_aux: bool = False,
    throw: bool = False,
    rtol: float | None = None,
    num_directions: int = 3,
    max_dense: int = 500,
    unroll: bool = True,
    in_dims: Any = None,
    routes: Sequence[Route] | None = None,
    generator: torch.Generator | None = None,
) -> HypergradCheck:
    r"""Check a hypergradient on a problem of yours, and say what is wrong if it is.

    For random directions :math:`v` the derivative :math:`v^\top \nabla f` by the method is compared
    with

    - the implicit formula with a direct solve, at the same params;
    - central differences :math:`(f(\lambda + tv) - f(\lambda - tv)) / 2t` of
      :math:`f(\lambda) = E(w(\lambda), \lambda)` through the inner solver, extrapolated, with
      steps chosen by the noise of :math:`f`, and an estimate of their error;
    - the derivative through the inner solver's code, where it has one.

    The check passes where method and differences agree within ``rtol`` of the largest derivative
    and twice the estimated error. If they do not, further tests tell which ingredient is off.
    Whether a solver stopped early or solves another problem can be told for those of
    `hyperfunc.iterate` and `hyperfunc.minimize`; for others both causes are reported.

    Then what is right for one task is compared with other ways to compute it: with a ``vmap`` over
    several tasks, and if asked for with compiled code, and with its own derivative against
    differences. If they do not agree, each operation that was called is tried by itself, so that
    one with a wrong rule (of yours, for ``vmap`` or a derivative, or of torch) is named.

    All arguments that are not listed here are those of `hyperfunc.hypergrad`.

    Args:
        inner_solver: ``(hparams, *args) -> params``. It is called 19 times for each direction, and
            some 30 times more to find a cause.
        hparams: the point to check at.
        *args: what the functions take besides.
        throw: whether a check that fails raises, as `raise_if_failed` does.
        rtol: relative tolerance, > 0; by default ``eps ** 0.25`` of the coarsest dtype, 1e-4 in
            float64 and 2e-2 in float32. Raise it for a truncated solve.
        num_directions: how many directions, >= 1; each mixes all leaves of hparams.
        max_dense: leave the direct solve out beyond this many inner parameters, >= 0.
        unroll: whether to differentiate the inner solver; its graph may be large.
        in_dims: as for `hyperfunc.task_map`, where hparams or args hold several tasks, of which
            the first one is checked and all are compared. By default there is one, and a second
            one is made of hparams close by.
        routes: which of ``"vmap"``, ``"compile"`` and ``"derivative"`` are compared, none for
            ``()``; by default a vmap, if the functions can be mapped, which takes the memory of all
            tasks. The derivative, of a hypergradient by its hparams, needs a converged solver if
            the method is implicit.
        generator: of the directions, on the CPU; by default one with seed 0.

    Returns:
        A `HypergradCheck`, with ``passed``, ``raise_if_failed()``, and a table as its ``str``.

    Raises:
        ValueError: as `hyperfunc.hypergrad`; a number out of its range; a call inside of a
            transform such as ``vmap``, where differences cannot be taken.
        HypergradError: the check failed, and ``throw`` is on.

    Example:
        The regulariser was left out of the condition:

        >>> X, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
        >>> def solve(reg):
        ...     return torch.linalg.solve(X.T @ X + torch.diag(reg.exp().expand(3)), X.T @ y)
        >>> def loss(w, reg):
        ...     return 0.5 * ((X @ w - y) ** 2).sum()
        >>> def outer_loss(w, reg):
        ...     return (w**2).sum()
        >>> reg = torch.zeros((), dtype=torch.float64)
        >>> report = hf.check_hypergrad(solve, outer_loss, reg, inner_loss=loss)
        >>> report.passed, bool(report.causes.dependence_lost)
        (False, True)

    References:
        More and Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011).
    """
    if tracking.transforms_active():
        raise ValueError(
            "check_hypergrad: called inside of a torch.func transform, torch.compile or inference "
            "mode, where finite differences cannot be taken. Check one task, outside of it"
        )
    check_count("check_hypergrad", "num_directions", num_directions)
    check_count("check_hypergrad", "max_dense", max_dense, least=0)
    if rtol is not None:
        check_number("check_hypergrad", "rtol", rtol, above=True)
    hparams, args = trees.tree_map(_detached, (hparams, args))
    if isinstance(routes, Tensor):
        raise TypeError(f"check_hypergrad: routes is {show(routes)}; expected a list of names")
    for route in routes or ():
        if route not in ROUTES:
            raise ValueError(
                f"check_hypergrad: routes holds {show(route)}; expected some of "
                f"{', '.join(map(repr, ROUTES))}"
            )
    tasks = None
    if in_dims is not None:
        tasks = Tasks.of(in_dims, (hparams, *args))
        hparams, *rest = tasks.single[0]
        args = tuple(rest)
    inner_solver = without_aux(inner_solver, solver_has_aux)
    condition = make_condition(inner_solver, fixed_point, inner_loss, optimality)
    method = resolve_method(method)
    problem = _Problem(inner_solver, outer_loss, method, condition, has_aux, hparams, args)
    named = functools.partial(trees.named_tensors, hparams, args)
    with torch.enable_grad(), explained("check_hypergrad", named):
        report = _check(problem, rtol, num_directions, max_dense, unroll, generator, routes, tasks)
    if throw:
        report.raise_if_failed()
    return report


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    inner_solver: Callable[..., Any]
    outer_loss: Callable[..., Any]
    method: Any
    condition: Condition | None
    has_aux: bool
    hparams: TensorTree
    args: tuple[Any, ...]

    def hypergrad(self, method: Any, params: TensorTree = None) -> tuple[Leaves, Any]:
        """By a method, at given params or those of the inner solver."""
        grads, solution = self.transformed(method, params)(self.hparams, *self.args)
        return tracking.detach(trees.flatten(grads)[0]), solution

    def transformed(self, method: Any, params: TensorTree = None, **options: Any) -> Any:
        """What `hypergrad_and_solution` makes of the problem."""
        solver = self.inner_solver if params is None else lambda hparams, *args: params
        if self.condition is not None:
            fn = self.condition.fn
            # at given params it is judged by the Hessian, and a plain function has no other matrix
            exact = params is not None and self.is_composed
            options[self.condition.kind] = functools.partial(fn) if exact else fn
        options |= {"method": method, "has_aux": self.has_aux, "throw": False}
        return hypergrad_and_solution(solver, self.outer_loss, **options)

    @property
    def is_composed(self) -> bool:
        """Whether the implicit methods take a Gauss-Newton matrix for the Hessian."""
        fn: Any = None if self.condition is None else self.condition.fn
        return isinstance(fn.loss if isinstance(fn, ProximalLoss) else fn, ComposedLoss)

    def outer(self, params: TensorTree, hparams: TensorTree) -> Tensor:
        output = self.outer_loss(params, hparams, *self.args)
        value: Tensor = output[0] if self.has_aux else output
        return value

    def solve(self, h: Leaves) -> TensorTree:
        """The inner solver's params for the leaves of other hparams."""
        return trees.tree_map(_detached, self.inner_solver(self.tree(h), *self.args))

    def value(self, h: Leaves) -> float:
        """The outer loss through the inner solver."""
        return float(self.outer(self.solve(h), self.tree(h)).detach())

    def outer_gradient(self, params: TensorTree) -> tuple[Leaves, Leaves]:
        w, others, state = trees.flatten_state(params, "params")
        h, n = trees.flatten(self.hparams)[0], len(w)
        grads = autodiff.gradient(
            lambda *leaves: self.outer(state.fill(leaves[:n], others), self.tree(leaves[n:])),
            (*w, *h),
            create_graph=False,
        )
        return tracking.detach(grads[:n]), tracking.detach(grads[n:])

    def tree(self, h: Leaves) -> TensorTree:
        return trees.unflatten(trees.flatten(self.hparams)[1], h)


class _ConditionAtParams:
    """The condition at the params that the inner solver returned, with a Newton step from there."""

    def __init__(self, problem: _Problem, params: TensorTree, max_dense: int) -> None:
        bound, w, theta = _bind(problem, params)
        self.bound, self.w, self.theta = bound, w, theta
        hparams = range(bound.arguments.num_hparams)
        self.linearization, _ = bound.linearize_residual(w, theta, hparams)  # of the Hessian
        self.residual = self.linearization.outputs
        # in the form of the condition, by which Auto knows a map
        self.operator = bound.operator(bound.linearize(w, theta, ()), theta)
        few = sum(leaf.numel() for leaf in w) <= max_dense
        self.exact: AbstractLinearSolver = Dense() if few else Auto()
        self.newton_step = tracking.detach(self.exact.solve(self.operator, self.residual)[0])


def _check(
    problem: _Problem,
    rtol: float | None,
    num_directions: int,
    max_dense: int,
    unroll: bool,
    generator: torch.Generator | None,
    routes: Sequence[Route] | None,
    tasks: Tasks | None,
) -> HypergradCheck:
    """Compare with differences, measure what else the report tells, and find causes if need be."""
    h, h_spec = trees.flatten_floating(problem.hparams, "hparams")
    generator = generator or torch.Generator().manual_seed(0)
    directions = [random_direction(h, generator) for _ in range(num_directions)]
    grads, solution = problem.hypergrad(problem.method)
    params = trees.tree_map(_detached, solution.params)
    w = trees.flatten_state(params, "params")[0]
    rtol = max(trees.epsilon(h), trees.epsilon(w)) ** 0.25 if rtol is None else rtol

    noise = noise_level(problem.value, h, directions[0])
    estimates = [directional_derivative(problem.value, h, v, noise) for v in directions]
    by_method = _along(grads, directions)
    by_differences, errors = torch.tensor(estimates, dtype=torch.float64).unbind(1)
    finite = torch.cat([by_method, by_differences]).nan_to_num(0.0, 0.0, 0.0)
    # where the derivative vanishes, how much the function varies tells what a small one is
    scale = max(float(finite.abs().max()), rtol * magnitude(problem.value, h, directions[0]))
    left_out: dict[str, Any] = dict.fromkeys(HypergradCheck._fields, ())
    report = HypergradCheck(**left_out)._replace(
        hypergradient=trees.unflatten(h_spec, grads),
        by_method=by_method,
        by_unrolling=_by_unrolling(problem, directions) if unroll else (),
        by_differences=by_differences,
        difference_errors=errors,
        tolerance=rtol * scale + 2 * errors,
        result=solution.stats.result if is_implicit(problem.method) else (),
        causes=_causes(),
        lost=trees.unflatten(h_spec, [torch.tensor(False) for _ in h]),
        routes={},
        operations={},
    )
    outer_gradient = problem.outer_gradient(params)
    at = None
    if problem.condition is not None:
        if not bool(trees.all_finite(w)):
            return report._replace(causes=_causes("solver_not_converged"))
        at = _ConditionAtParams(problem, params, max_dense)
        report = report._replace(
            inner_residual=trees.norm(at.residual),
            newton_distance=trees.norm(at.newton_step) / trees.norm(w),
            diagnosis=diagnose_bound(at.bound, w, at.theta, 20),
        )
        if isinstance(at.exact, Dense):
            by_dense = _along(problem.hypergrad(at.exact, params)[0], directions)
            report = report._replace(by_dense=by_dense)
        if is_implicit(problem.method):
            u, _ = at.bound.state.split(tracking.detach(trees.flatten(solution.adjoint)[0]))
            b = outer_gradient[0]
            size = trees.norm(b)
            left = trees.norm(trees.sub(b, at.linearization.pull(u, 0)))
            report = report._replace(linear_residual=left / torch.where(size > 0, size, 1.0))
    if not _within(errors, torch.zeros_like(errors), 0.05 * scale):
        return report._replace(causes=_causes("inconclusive"))
    if _within(by_method, by_differences, report.tolerance):
        return _by_routes(problem, report, routes, tasks, directions, rtol)
    functions = _functions(problem, params, outer_gradient, at)
    search = _Search(problem, report, at, functions, w, h, directions, rtol, rtol * scale)
    lost = search.lost_leaves()
    return report._replace(
        causes=_causes(*search.causes(any(lost))),
        lost=trees.unflatten(h_spec, [torch.tensor(flag) for flag in lost]),
    )


def _by_routes(
    problem: _Problem,
    report: HypergradCheck,
    routes: Sequence[Route] | None,
    tasks: Tasks | None,
    directions: list[Leaves],
    rtol: float,
) -> HypergradCheck:
    """The report with the gaps by other routes, and the operation that is wrong by one."""

    def one(*task: Any, **options: Any) -> TensorTree:
        return problem.transformed(problem.method, **options)(*task)[0]

    point = (problem.hparams, *problem.args)
    gaps: dict[str, Tensor] = {}
    operations: dict[str, Tensor] = {}
    for route in ("vmap",) if routes is None else routes:
        if route == "vmap":
            several = tasks or Tasks.near(problem.hparams, problem.args, directions[0])
            try:
                off = gap_of_vmap(one, several)
            except REFUSALS:
                if routes is None and tasks is None:
                    continue
                raise
        elif route == "compile":
            found, expected = (trees.flatten(one(*point, compile=c))[0] for c in (True, False))
            off = gap(found, expected)
        else:
            off = gap_of_derivative(one, problem.hparams, problem.args, directions[0])
        gaps[route] = torch.tensor(off)
        if off > rtol and route != "compile":
            operations = operations or suspect(one, point, route)
    wrong = any(float(off) > rtol for off in gaps.values())
    causes = _causes("route") if wrong else report.causes
    return report._replace(routes=gaps, operations=operations, causes=causes)


class _Function(NamedTuple):
    """A scalar function of params and hparams, with the derivatives that autodiff gives."""

    value: Callable[[Leaves, Leaves], Tensor]
    by_params: Leaves
    by_hparams: Leaves


def _functions(
    problem: _Problem,
    params: TensorTree,
    outer_gradient: tuple[Leaves, Leaves],
    at: _ConditionAtParams | None,
) -> dict[str, _Function]:
    """What enters the formula; the residual is multiplied by a fixed vector."""
    _, others, state = trees.flatten_state(params, "params")
    tree = problem.tree
    functions = {
        "outer loss": _Function(
            lambda w, h: problem.outer(state.fill(w, others), tree(h)), *outer_gradient
        )
    }
    if at is None:
        return functions
    bound, theta, a = at.bound, at.theta, random_signs(at.w, 0)
    functions["residual"] = _Function(
        lambda w, h: trees.dot(bound.residual_at(w, (*h, *theta[len(h) :])), a),
        at.linearization.pull(a, 0),
        at.linearization.pull(a, 1),
    )
    if bound.condition.kind == "inner_loss":  # whose derivative by hparams is not used
        loss = bound.condition.fn
        functions["inner loss"] = _Function(
            lambda w, h: loss(state.fill(w, others), tree(h), *problem.args), at.residual, ()
        )
    return functions


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    """What is tried to find the causes where a method does not agree with the differences."""

    problem: _Problem
    report: HypergradCheck  # what is known so far
    at: _ConditionAtParams | None
    functions: dict[str, _Function]
    w: Leaves
    h: Leaves
    directions: list[Leaves]
    rtol: float
    gap: float  # how far products with the directions may differ

    def lost_leaves(self) -> list[bool]:
        """For each leaf of hparams, whether a dependence on it is lost somewhere."""
        lost = []
        for leaf, part in enumerate(self.directions[0]):
            v = tuple(part if i == leaf else torch.zeros_like(u) for i, u in enumerate(self.h))
            functions = self.functions.values()
            differs = any(self._differs(fn, v, "hparams") for fn in functions if fn.by_hparams)
            if not differs and self.at is not None:
                differs = self._left_behind(self.at, v, leaf)
            lost.append(differs)
        return lost

    def _left_behind(self, at: _ConditionAtParams, v: Leaves, leaf: int) -> bool:
        """Whether solver and condition agree, and follow a leaf of hparams in different ways.

        One of them ignores it, or some entries, or takes a part of it from where it does not move.
        """

        def moved(direction: Leaves) -> tuple[Leaves, Leaves]:
            h = trees.axpy(0.01, direction, self.h)
            return trees.flatten_state(self.problem.solve(h), "params")[0], h

        def residual(w: Leaves, h: Leaves) -> float:
            return float(trees.norm(at.bound.residual_at(w, (*h, *at.theta[len(h) :]))))

        ignored = self.functions["residual"].by_hparams[leaf] == 0
        w, h = moved(v)
        if float(trees.norm(trees.sub(w, self.w))) == 0:
            return not bool(ignored.all())
        if bool(ignored.any()):
            only = tuple(d * ignored if i == leaf else d for i, d in enumerate(v))
            if float(trees.norm(trees.sub(moved(only)[0], self.w))) > 0:
                return True
        before, after, alone = residual(self.w, self.h), residual(w, h), residual(self.w, h)
        return before < 0.01 * max(alone, after) and after > 0.05 * alone

    def _differs(self, fn: _Function, v: Leaves, wrt: Literal["params", "hparams"]) -> bool:
        """Whether the derivative of a function along a direction is another one by differences."""

        def along(x: Leaves) -> float:
            point = (x, self.h) if wrt == "params" else (self.w, x)
            return float(fn.value(*point).detach())

        x, gradient = (self.w, fn.by_params) if wrt == "params" else (self.h, fn.by_hparams)
        value, error = directional_derivative(along, x, v, noise_level(along, x, v))
        pairs = zip(gradient, v, strict=True)
        derivative = sum(float(trees.dot((g,), (d,))) for g, d in pairs if bool(d.any()))
        scale = max(abs(value), abs(derivative))
        return abs(value - derivative) > self.rtol * scale + 4 * error

    def causes(self, lost: bool) -> set[str]:
        v = random_direction(self.w, torch.Generator().manual_seed(1))
        lost = lost or any(self._differs(fn, v, "params") for fn in self.functions.values())
        found = {"dependence_lost"} if lost else set()
        method, facts = self.problem.method, self.report.diagnosis
        if not is_implicit(method):
            biased = isinstance(method, FirstOrder)
            biased = biased or (isinstance(method, Reverse) and method.last is not None)
            return found | {"assumption_broken" if biased else "dependence_lost"}
        assert self.at is not None
        assert isinstance(facts, Diagnosis)
        if not self._solved():
            found.add(self._unsolved_because(method, facts, self.at))
        if not self._satisfied(facts, self.at) or (_is_unsolved(facts) and not found):
            found |= self._unsatisfied_because(facts)
        return found or {"condition_mismatch"}

    def _solved(self) -> bool:
        report = self.report
        if outcome(report.result).failed:
            return False
        if isinstance(report.by_dense, Tensor):
            return _within(report.by_method, report.by_dense, self.gap)
        return float(report.linear_residual) <= self.rtol

    def _unsolved_because(self, method: Any, facts: Diagnosis, at: _ConditionAtParams) -> str:
        """What keeps the method from the exact solution of the linear system."""
        if _assumption_broken(method, facts, at):
            return "assumption_broken"
        if outcome(self.report.result) == RESULTS.success:
            if any(isinstance(part, Damped) for part in parts(method)):
                return "damping"
            if self.problem.is_composed:
                return "curvature"
        return "linear_solve"

    def _satisfied(self, facts: Diagnosis, at: _ConditionAtParams) -> bool:
        """Whether a Newton step on the condition leaves the hypergradient as it is."""
        if not _is_unsolved(facts):
            return True
        here = self.report.by_dense
        if not isinstance(here, Tensor):
            here = self._exact(at, at.w)
        there = self._exact(at, trees.sub(at.w, at.newton_step))
        return _within(here, there, self.gap / 2)

    def _exact(self, at: _ConditionAtParams, w: Leaves) -> Tensor:
        params = at.bound.params(w, at.theta)
        return _along(self.problem.hypergrad(at.exact, params)[0], self.directions)

    def _unsatisfied_because(self, facts: Diagnosis) -> set[str]:
        """By whether more steps help a solver that can take them; otherwise both causes.

        A solver that minimises the very loss that is stated has not converged as long as it moves.
        """
        solver, problem = self.problem.inner_solver, self.problem
        if not isinstance(solver, IterativeSolver) or solver.inputs is not None:
            return {"solver_not_converged", "condition_mismatch"}
        longer = dataclasses.replace(solver, num_steps=4 * solver.num_steps + 4, rtol=0.0, atol=0.0)
        bound, w, theta = _bind(problem, longer(problem.hparams, *problem.args))
        helped = bool(trees.norm(bound.residual_at(w, theta)) < 0.9 * facts.residual.value)
        if not helped and solver.condition == (bound.condition.kind, bound.condition.fn):
            moved = float(trees.norm(trees.sub(w, self.w)))
            helped = not moved <= 1e-6 * float(trees.norm(w))  # nor NaN
        return {"solver_not_converged" if helped else "condition_mismatch"}


def _is_unsolved(facts: Diagnosis) -> bool:
    """Whether the residual is more than rounding."""
    norm, noise = facts.residual
    return not bool(norm <= 10 * noise)


def _assumption_broken(method: Any, facts: Diagnosis, at: _ConditionAtParams) -> bool:
    """Whether a method cannot solve the system, for it assumes what does not hold."""
    if isinstance(method, Nystrom):
        return not bool(facts.symmetric)
    if isinstance(method, CG | PipelinedCG):
        return not bool(facts.symmetric) or not float(facts.eig_min.value) > 0
    if isinstance(method, FixedPoint | Neumann):
        radius = spectral_radius(
            lambda v: trees.axpy(-method.step_size, at.operator.mv(v), v), at.w, 20
        )
        return not float(radius.value) < 1
    return False


def _bind(problem: _Problem, params: TensorTree) -> tuple[BoundCondition, Leaves, Leaves]:
    """The condition on flat tensors, with params and arguments."""
    assert problem.condition is not None
    leaves, others, state = trees.flatten_state(params, "params")
    arguments, theta, _ = Arguments.flatten(problem.hparams, problem.args)
    bound = BoundCondition(problem.condition, arguments, state)
    return bound, tracking.detach(leaves), (*theta, *tracking.detach(others))


def _by_unrolling(problem: _Problem, directions: list[Leaves]) -> Any:
    """The derivatives through the solver's code, or () where it has none."""
    hparams = trees.tree_map(lambda t: t.detach().requires_grad_(), problem.hparams)
    try:
        leaves = trees.flatten(problem.inner_solver(hparams, *problem.args))[0]
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return ()
        return _along(problem.hypergrad(ReverseUnroll())[0], directions)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return ()


def _along(grads: Leaves, directions: list[Leaves]) -> Tensor:
    products = [
        sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, v, strict=True))
        for v in directions
    ]
    return torch.tensor(products, dtype=torch.float64)


def _causes(*names: str) -> Causes:
    return Causes(*(torch.tensor(name in names) for name in Causes._fields))


def _within(a: Tensor, b: Tensor, tolerance: float | Tensor) -> bool:
    """Whether all gaps are allowed; NaN is not."""
    return bool(((a - b).abs() <= tolerance).all())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
