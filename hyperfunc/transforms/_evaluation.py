"""What the transforms compute: a hypergradient, by the implicit formula or through the steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._compile.compiler import Compiler, applies
from hyperfunc._engine import trees
from hyperfunc._engine.finite_differences import Products, check_products
from hyperfunc._engine.flat import split
from hyperfunc._engine.results import UNFINISHED, ChoiceStats, Solution, SolveStats
from hyperfunc._engine.shown import show
from hyperfunc._engine.solver_aux import WithAux, split_aux
from hyperfunc._engine.user_functions import call
from hyperfunc._rule.conditions import Arguments, BoundCondition, Condition, make_condition
from hyperfunc._rule.error_bound import ErrorBound, error_bound
from hyperfunc._rule.implicit import (
    ImplicitProblem,
    Layout,
    cross_term,
    flatten_params,
    raise_on_failure,
    raise_unless_finite,
)
from hyperfunc._rule.outer_loss import OuterLoss, mean_outer_gradient
from hyperfunc._rule.unused import failures_explained
from hyperfunc._torch import autodiff, batching, derivative_rules, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.inner_solvers._maps import DescentMap
from hyperfunc.inner_solvers._solvers import with_products
from hyperfunc.inner_solvers._steps import DescentStep
from hyperfunc.iterative import FirstOrder, ForwardMode
from hyperfunc.linear_solvers import StochasticAID
from hyperfunc.optim._decay import tell_of_decay
from hyperfunc.transforms._methods import is_implicit
from hyperfunc.transforms._unreached import (
    is_sound,
    refuse_own_leaves,
    refuse_unreached_by_rule,
    refuse_unreached_by_solver,
)

_SOLVER = "the inner solver(hparams, *args)"
_REMEDY = (
    "Leave the optimizer's weight_decay at 0 (hf.optim.adam in place of adamw) and write the decay "
    "into the loss: hf.minimize(hf.proximal(inner_loss, {decay}, center=zeros), ...), with zeros a "
    "tree like params. Or differentiate the steps: method='reverse'"
)
_DECAY_OF_HPARAMS = (
    "the weight decay of the optimizer is a function of hparams, and {method} differentiates the "
    "minimum of inner_loss, which does not have it: its hypergradient would be zero, which is "
    "wrong. " + _REMEDY.replace("{decay}", "weight=lambda hparams: ...")
)
_DECAY = (
    "the optimizer has a weight decay, so that the params do not go to the minimum of inner_loss, "
    "which {method} differentiates: the hypergradient is off by that. "
    + _REMEDY.replace("{decay}", "weight=0.01")
)
_DECAY_UNLESS_STATED = (
    "the optimizer has a weight decay, so that the params do not go to the minimum of its loss: "
    "unless inner_loss= holds that decay, {method} differentiates another minimum, and the "
    "hypergradient is off. Leave weight_decay at 0 (hf.optim.adam in place of adamw), and write "
    "the decay into both losses, as hf.proximal(loss, weight=0.01, center=zeros)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """An inner solver with the method that differentiates it and the condition that this needs."""

    inner_solver: Callable[..., Any]
    condition: Condition | None
    method: Any
    throw: bool | None
    on_backward: Callable[[SolveStats], object] | None = None
    has_aux: bool = False  # of the inner solver
    compiler: Compiler | None = None  # of its derivative, as an implicit method takes it

    def make_problem(self, arguments: Arguments) -> ImplicitProblem:
        assert self.condition is not None
        return ImplicitProblem(
            self.inner_solver,
            self.condition,
            self.method,
            arguments,
            self.throw,
            self.on_backward,
            self.has_aux,
            compiler=self.compiler,
        )

    def tell_of_decay(self, problem: ImplicitProblem, hparams: TensorTree) -> None:
        """Raise or warn if the solver's optimiser decays params, where the condition does not."""
        step, condition = getattr(self.inner_solver, "step", None), problem.condition
        if not isinstance(step, DescentStep) or condition.kind != "inner_loss":
            return
        assert problem.bound is not None
        name = type(self.method).__name__
        texts: tuple[str | None, str] = _DECAY_OF_HPARAMS, _DECAY
        if condition.fn is not step.inner_loss:
            texts = None, _DECAY_UNLESS_STATED  # it may hold the decay
        function, constant = (text and text.format(method=name) for text in texts)
        spec = problem.bound.params_spec
        tell_of_decay(step.optimizer, spec, hparams, function, constant)

    def solution_map(self, hparams: TensorTree, *args: Any) -> TensorTree:
        """The inner solution, with this rule as its derivative; with ``has_aux`` a pair."""
        if not is_implicit(self.method):
            solution_map = self.method.solution_map(self.inner_solver)
            wanted = tracking.transforms_active()
            wanted = wanted or tracking.is_tracked(trees.flatten((hparams, args))[0])
            with derivative_rules.active(wanted):
                result = call(_SOLVER, solution_map, hparams, *args)
            return split_aux(result, True) if self.has_aux else result
        arguments, theta, _ = Arguments.flatten(hparams, args)
        problem = self.make_problem(arguments)
        w, theta = problem.solution(theta)
        self.tell_of_decay(problem, hparams)
        if torch.is_grad_enabled() and not tracking.is_tracked(theta):
            problem.refuse_captured(w, theta)
        assert problem.bound is not None
        params = problem.bound.params(w, theta)
        return (params, problem.aux) if self.has_aux else params


def make_rule(
    inner_solver: Any,
    conditions: tuple[Any, Any, Any],
    method: Any,
    throw: bool | None,
    on_backward: Callable[[SolveStats], object] | None = None,
    has_aux: bool = False,
    products: Products = "reverse",
) -> Rule:
    if not callable(inner_solver):
        raise TypeError(
            f"the inner solver is {show(inner_solver)}; "
            f"expected a function (hparams, *args) -> params"
        )
    check_products(products)
    if products == "finite_difference" and isinstance(method, ForwardMode):
        raise ValueError(
            f"products='finite_difference' is of no use for {method!r}, which pushes tangents "
            f"through the steps. Take method='reverse', or leave products out"
        )
    condition = make_condition(inner_solver, *conditions, products)
    if is_implicit(method) and condition is None:
        raise ValueError(
            f"method {method!r} needs to know what the inner solution satisfies; got none of "
            f"fixed_point=, inner_loss=, optimality=. Pass one of them (or an inner solver made "
            f"by hf.iterate or hf.minimize without minibatch inputs), or use an iterative method "
            f"such as method='reverse_unroll'"
        )
    if products == "finite_difference" and not is_implicit(method):
        inner_solver = _differenced(inner_solver, method)
    if getattr(inner_solver, "has_aux", False) is True:
        has_aux = True
    elif has_aux and not is_implicit(method):
        inner_solver = WithAux(inner_solver)
    return Rule(inner_solver, condition, method, throw, on_backward, has_aux)


def _differenced(inner_solver: Any, method: Any) -> Any:
    """An inner solver whose gradients have products by differences, or an error."""
    differenced = with_products(inner_solver, "finite_difference")
    if differenced is inner_solver or not _has_gradients(inner_solver):
        raise ValueError(
            f"products='finite_difference' with {method!r} is for solvers made by hf.minimize, or "
            f"by hf.iterate of hf.gradient_descent_map, whose gradients are known; got "
            f"{inner_solver!r}. Make the solver so, or leave products out"
        )
    return differenced


def _has_gradients(inner_solver: Any) -> bool:
    step = inner_solver.step
    return isinstance(getattr(step, "fixed_point", step), DescentMap | DescentStep)


@dataclasses.dataclass(frozen=True, eq=False)
class Hypergradient:
    """The hypergradient of an outer loss by a rule, and the `Solution` that it came from."""

    rule: Rule
    outer_loss: Callable[..., Any]
    has_aux: bool
    bound: ErrorBound | None
    compiler: Compiler | None

    def __call__(
        self, hparams: TensorTree, args: tuple[Any, ...], adjoint_init: TensorTree
    ) -> tuple[TensorTree, Solution]:
        if is_implicit(self.rule.method):
            return self._by_implicit_rule(hparams, args, adjoint_init)
        if adjoint_init is not None:
            raise ValueError(
                f"adjoint_init has no meaning for {self.rule.method!r}, which solves no linear "
                f"system. Leave it out, or use an implicit method such as method='cg'"
            )
        return self._through_the_solver(hparams, args)

    def _by_implicit_rule(
        self, hparams: TensorTree, args: tuple[Any, ...], adjoint_init: TensorTree
    ) -> tuple[TensorTree, Solution]:
        arguments, theta, hparams_spec = Arguments.flatten(hparams, args)
        problem = self.rule.make_problem(arguments)
        w, theta = problem.solution(theta)
        self.rule.tell_of_decay(problem, hparams)
        assert problem.bound is not None
        bound = problem.bound
        start = None if adjoint_init is None else _flatten_start(adjoint_init, bound, w, theta)
        differentiate = self._differentiate
        if self.compiler is not None and self.compiler.applies((*w, *theta)):
            differentiate = self._differentiate_compiled
        with failures_explained(bound, w, theta, range(problem.arguments.num_hparams)):
            value, aux, u, stats, grads = differentiate(problem, w, theta, start)
        if self.rule.throw and not is_sound(grads):
            raise_unless_finite(grads, hparams_spec, "hparams")
            refuse_unreached_by_rule(problem, self._outer_value(problem, len(w)), w, theta, grads)
        zeros = trees.zeros_like(theta[len(theta) - bound.state.num_others :])
        params, adjoint = bound.params(w, theta), bound.params(u, zeros)
        error = self._bound_error(problem, w, theta, u)
        solution = Solution(params, value, aux, adjoint, stats, error, problem.aux)
        return trees.unflatten(hparams_spec, grads), solution

    def _differentiate(
        self, problem: ImplicitProblem, w: Leaves, theta: Leaves, start: Leaves | None
    ) -> tuple[Tensor, Any, Leaves, SolveStats | ChoiceStats, Leaves]:
        """Outer value and aux, the adjoint with its statistics, and the hypergradient."""
        method, losses = self.rule.method, [self.outer_loss]
        if isinstance(method, StochasticAID):
            losses = method.outer_losses(self.outer_loss)
        value, aux, gradient = mean_outer_gradient(losses, self.has_aux, problem, w, theta)
        dw, dh = gradient[: len(w)], gradient[len(w) :]
        wrt = tuple(range(problem.arguments.num_hparams))
        linearization = problem.linearize(w, theta, wrt)
        u, stats = problem.adjoint(linearization, w, theta, dw, start)
        grads = cross_term(problem, linearization, w, theta, wrt, u, start=dh)
        return value, aux, u, stats, grads

    def _differentiate_compiled(
        self, problem: ImplicitProblem, w: Leaves, theta: Leaves, start: Leaves | None
    ) -> tuple[Tensor, Any, Leaves, SolveStats | ChoiceStats, Leaves]:
        """`_differentiate`, compiled; where it fails is told afterwards."""
        assert self.compiler is not None
        assert problem.bound is not None
        quiet = dataclasses.replace(problem, throw=False)
        n, m = len(w), len(theta)

        def compute(*operands: Tensor) -> Any:
            w, theta, rest = operands[:n], operands[n : n + m], operands[n + m :]
            return self._differentiate(quiet, w, theta, rest or None)

        key = (problem.bound.state, problem.arguments)
        result = self.compiler.call(
            compute, key, self.compiler.read(), (*w, *theta, *(start or ()))
        )
        value, aux, u, stats, grads = result
        if batching.any_true(stats.result == UNFINISHED):
            return self._differentiate(problem, w, theta, start)
        if self.rule.throw:
            raise_on_failure(stats, self.rule.method, problem.condition.kind)
        return value, aux, u, stats, grads

    def _bound_error(self, problem: ImplicitProblem, w: Leaves, theta: Leaves, u: Leaves) -> Any:
        if self.bound is None:
            return ()
        assert problem.bound is not None
        detached = (tracking.detach(leaves) for leaves in (w, theta, u))
        return error_bound(self.bound, problem.bound, self._outer_value(problem, len(w)), *detached)

    def _outer_value(self, problem: ImplicitProblem, n: int) -> Callable[..., Tensor]:
        """The outer loss as a function of the leaves of params, n of them, and theta."""
        bound = problem.bound
        assert bound is not None
        outer = OuterLoss(self.outer_loss, self.has_aux)

        def value(*leaves: Tensor) -> Tensor:
            params = bound.params(leaves[:n], leaves[n:])
            return outer(params, *problem.arguments.unflatten(leaves[n:]))[0][0]

        return value

    def _through_the_solver(
        self, hparams: TensorTree, args: tuple[Any, ...]
    ) -> tuple[TensorTree, Solution]:
        arguments, theta, hparams_spec = Arguments.flatten(hparams, args)
        solver: Any = self.rule.inner_solver
        evaluate = functools.partial(self._by_graph, arguments, hparams_spec)
        if self.compiler is not None and applies(theta):
            inputs, inputs_spec = trees.flatten(solver.inputs)

            def compute(*operands: Tensor) -> tuple[TensorTree, Solution, Tensor]:
                theta, inputs = split(operands, len(operands) - inputs_spec.num_leaves)
                minibatches = trees.unflatten(inputs_spec, inputs)
                steps = dataclasses.replace(solver, inputs=minibatches, compiler=None)
                grads, solution = evaluate(steps, theta, False)
                return grads, solution, _shows_soundness(grads, solution.params)

            key = (arguments, hparams_spec, inputs_spec)
            grads, solution, sound = self.compiler.call(
                compute, key, self.compiler.read(), (*theta, *inputs)
            )
            if not self.rule.throw or batching.all_true(sound):
                return grads, solution
        return evaluate(solver, theta, self.rule.throw)

    def _by_graph(
        self,
        arguments: Arguments,
        hparams_spec: trees.TreeSpec,
        inner_solver: Callable[..., Any],
        theta: Leaves,
        throw: bool | None,
    ) -> tuple[TensorTree, Solution]:
        """The hypergradient from the graph of the solver and the outer loss, and the solution."""
        wrt = tuple(range(arguments.num_hparams))
        method = self.rule.method
        outer = OuterLoss(self.outer_loss, self.has_aux)
        layouts: list[Layout] = []

        def solve(solver: Callable[..., Any], leaves: Leaves) -> tuple[Any, Leaves, Leaves]:
            result = call(_SOLVER, solver, *arguments.unflatten(leaves))
            params, aux = split_aux(result, self.rule.has_aux)
            w, spec = flatten_params(params)
            values, frame = trees.partition(aux)
            layouts[:] = [(spec, frame)]
            refuse_own_leaves(w, spec, leaves, method)
            return params, w, values

        def value_and_aux(solver: Callable[..., Any], *leaves: Tensor) -> tuple[Leaves, Leaves]:
            params, w, solver_aux = solve(solver, leaves)
            outputs, aux = outer(params, *arguments.unflatten(leaves))
            return outputs, (*w, *solver_aux, *aux)

        quiet = {"warns": False} if isinstance(method, FirstOrder) else {}  # it is told below
        solution_map = method.solution_map(inner_solver, **quiet)
        linearized = autodiff.Linearization(
            functools.partial(value_and_aux, solution_map), theta, (wrt,), has_aux=True
        )
        if linearized.captures_gradient and torch.is_grad_enabled():
            alone = autodiff.Linearization(
                lambda *leaves: solve(solution_map, leaves)[1], theta, (wrt,)
            )
            name = "the inner solver" if alone.captures_gradient else "outer_loss"
            raise ValueError(captured_message(name))
        (value,), ((params_spec, frame),) = linearized.outputs, layouts
        grads = linearized.pull((torch.ones_like(value),))
        sizes = params_spec.num_leaves, frame.constants.count(None)
        w, solver_aux, aux = split(linearized.aux, *sizes)
        if throw:
            raise_unless_finite(w, params_spec)
            if not is_sound(grads):
                raise_unless_finite(grads, hparams_spec, "hparams")
                refuse_unreached_by_solver(
                    inner_solver,
                    method,
                    lambda solver, *leaves: value_and_aux(solver, *leaves)[0],
                    linearized,
                    theta,
                    grads,
                )
        params = trees.unflatten(params_spec, w)
        found = frame.fill(tracking.detach(solver_aux))
        solution = Solution(params, value, outer.unflatten_aux(aux), (), (), solver_aux=found)
        return trees.unflatten(hparams_spec, grads), solution


def _shows_soundness(grads: TensorTree, params: TensorTree) -> Tensor:
    """A flag that shows that all is finite and some gradient is not zero."""
    finite = trees.sum_is_finite(tuple(filter(tracking.is_differentiable, trees.tensors(params))))
    return finite & trees.sum_is_finite_and_nonzero(tuple(trees.tensors(grads)))


def _flatten_start(
    adjoint_init: TensorTree, bound: BoundCondition, w: Leaves, theta: Leaves
) -> Leaves:
    """The leaves of a start of the linear solve, which has to be like params."""
    leaves, spec = trees.flatten(adjoint_init)
    try:
        like = bound.leaves(w, theta)
        trees.check_like(leaves, spec, like, bound.state.full, "adjoint_init", "params")
    except ValueError as error:
        if not tracking.transforms_active():
            raise
        raise ValueError(
            f"{error}. If it is stacked: vmap maps no keywords, so write "
            f"vmap(lambda h, start: fn(h, adjoint_init=start))(hparams, start)"
        ) from None
    return bound.state.split(leaves)[0]
