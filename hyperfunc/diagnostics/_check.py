"""A method against independent ones, on a problem of the user's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.results import RESULTS, HypergradError
from hyperfunc._rule.conditions import Arguments, BoundCondition, Condition, make_condition
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.unsupported import explained
from hyperfunc._types import InnerSolver, Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.diagnostics._diagnose import Diagnosis, diagnose_bound
from hyperfunc.diagnostics._differences import (
    Difference,
    difference,
    noise_level,
    random_direction,
)
from hyperfunc.inner_solvers._solvers import IterativeSolver
from hyperfunc.iterative import Reverse, ReverseUnroll
from hyperfunc.linear_solvers import CG, Auto, Dense, FixedPoint, Neumann, Nystrom, PipelinedCG
from hyperfunc.linear_solvers._spectrum import spectral_radius
from hyperfunc.transforms._hypergrad import hypergrad_and_solution
from hyperfunc.transforms._methods import is_implicit, resolve_method


class Causes(NamedTuple):
    """Which ingredients are off: bool tensors, all false if the check passed.

    Attributes:
        solver_not_converged: the params that the inner solver returned do not satisfy the
            condition, which matters for the hypergradient; or they are not finite.
        condition_mismatch: the condition is not that of what the inner solver solves.
        linear_solve: the adjoint does not solve the linear system.
        assumption_broken: nor can it, for the method assumes what does not hold: symmetry,
            positive curvature, or contraction.
        dependence_lost: the inner solver, the condition or the outer loss ignores or detaches
            something that it depends on, or should.
        inconclusive: the finite differences are too noisy to compare with.
    """

    solver_not_converged: Tensor
    condition_mismatch: Tensor
    linear_solve: Tensor
    assumption_broken: Tensor
    dependence_lost: Tensor
    inconclusive: Tensor


ADVICE = {
    "solver_not_converged": (
        "solver not converged: the params that the inner solver returned do not satisfy the "
        "condition, or are not finite. Give it more steps, or use an iterative method such as "
        "method='reverse_unroll', which is right for the params that were reached"
    ),
    "condition_mismatch": (
        "condition does not match the solver: the inner solver solves another problem than the "
        "one that fixed_point, inner_loss or optimality states. Pass the function that it solves, "
        "with every term and every hyperparameter"
    ),
    "linear_solve": (
        "linear solve not converged: the adjoint does not solve its system. Raise maxiter or "
        "lower rtol, or take another method: see hf.diagnose"
    ),
    "assumption_broken": (
        "the method's assumption does not hold. Use the method that hf.diagnose recommends, or "
        "method='auto'"
    ),
    "dependence_lost": (
        "dependence lost: a function ignores or detaches what it depends on (.detach(), .item(), "
        "torch.no_grad(), a tensor that it closes over, a hyperparameter that it leaves out)"
    ),
    "inconclusive": (
        "inconclusive: the finite differences are too noisy to judge by. Is the inner solver "
        "random, or stopped by a loose tolerance? Use float64, fix its number of steps, or pass a "
        "larger rtol"
    ),
}


class HypergradCheck(NamedTuple):
    """What `hyperfunc.check_hypergrad` found: a tree of numbers; its ``str`` is a table.

    A column holds the derivatives along each direction, in float64; what was left out is ``()``.

    Attributes:
        hypergradient: by the method, a tree like hparams.
        by_method: its products with the directions.
        by_dense: by the implicit formula with a direct solve, at the same params.
        by_unrolling: by differentiating the inner solver.
        by_differences: by finite differences through the inner solver.
        difference_errors: the estimated errors of these.
        tolerance: the gaps between method and differences that are allowed.
        inner_residual: the norm of the condition's residual at the returned params.
        newton_distance: how far a Newton step on the condition goes from there, relative to the
            norm of the params.
        linear_residual: of the linear solve, ``||b - A^T u|| / ||b||``.
        result: int64, its code of `hyperfunc.RESULTS`.
        causes: what is wrong, as bools.
        lost: a tree like hparams of bools: where a dependence on hparams was found to be lost.
        diagnosis: what `hyperfunc.diagnose` finds at the returned params.
    """

    hypergradient: TensorTree
    by_method: Tensor
    by_dense: Any
    by_unrolling: Any
    by_differences: Tensor
    difference_errors: Tensor
    tolerance: Tensor
    inner_residual: Any
    newton_distance: Any
    linear_residual: Any
    result: Any
    causes: Causes
    lost: TensorTree
    diagnosis: Diagnosis | tuple[()]

    @property
    def passed(self) -> bool:
        """Whether no cause of a wrong hypergradient was found."""
        return not any(bool(cause) for cause in self.causes)

    def raise_if_failed(self) -> None:
        """Raise a `hyperfunc.HypergradError` with the causes and the table, if there are any."""
        if not self.passed:
            raise HypergradError(f"check_hypergrad: {self}")

    def __str__(self) -> str:
        lines = ["passed" if self.passed else "failed"]
        for name, cause in zip(Causes._fields, self.causes, strict=True):
            if bool(cause):
                lines.append(f"- {ADVICE[name]}{self._details(name)}")
        columns = {
            "method": self.by_method,
            "dense": self.by_dense,
            "unrolled": self.by_unrolling,
            "differences": self.by_differences,
            "± error": self.difference_errors,
            "allowed gap": self.tolerance,
        }
        shown = {name: column for name, column in columns.items() if isinstance(column, Tensor)}
        lines.append("direction" + "".join(f"{name:>15}" for name in shown))
        for i in range(len(self.by_method)):
            row = "".join(f"{float(column[i]):>15.6e}" for column in shown.values())
            lines.append(f"{i + 1:>9}{row}")
        if isinstance(self.inner_residual, Tensor):
            lines.append(
                f"inner residual {float(self.inner_residual):.2e}, "
                f"Newton step {float(self.newton_distance):.2e} of the params"
            )
        if isinstance(self.linear_residual, Tensor):
            code = _code(self.result).name
            lines.append(f"linear residual {float(self.linear_residual):.2e} ({code})")
        if not isinstance(self.by_dense, Tensor):
            lines.append("left out: dense (too many inner parameters, or no condition)")
        if not isinstance(self.by_unrolling, Tensor):
            lines.append("left out: unrolled (the inner solver cannot be differentiated)")
        return "\n".join(lines)

    def _details(self, name: str) -> str:
        facts = self.diagnosis
        if name in ("linear_solve", "assumption_broken") and isinstance(self.result, Tensor):
            code = _code(self.result)
            text = f". The solve reported: {code.message}"
            if name == "assumption_broken" and isinstance(facts, Diagnosis):
                text += (
                    f". Asymmetry {float(facts.asymmetry.value):.2g}, smallest curvature "
                    f"{float(facts.eig_min.value):.3g}, largest {float(facts.eig_max.value):.3g}, "
                    f"spectral radius of I - s A {float(facts.spectral_radius.value):.3g} for s = "
                    f"{float(facts.step_size):.3g}"
                )
            return text
        if name == "dependence_lost":
            leaves, spec = trees.flatten(self.lost)
            paths = trees.paths(spec, "hparams")
            lost = [path for path, leaf in zip(paths, leaves, strict=True) if bool(leaf)]
            return f". It concerns {', '.join(lost)}" if lost else ". It concerns params"
        return ""


def check_hypergrad(
    inner_solver: InnerSolver,
    outer_loss: Loss,
    hparams: TensorTree,
    *args: Any,
    fixed_point: ParamsFunction | None = None,
    inner_loss: Loss | None = None,
    optimality: ParamsFunction | None = None,
    method: Any = "cg",
    has_aux: bool = False,
    throw: bool = False,
    rtol: float | None = None,
    num_directions: int = 3,
    max_dense: int = 500,
    unroll: bool = True,
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
    and twice the estimated error. If they do not, further tests tell which ingredient is off: each
    derivative that enters the formula is compared with differences of its own function, the
    condition is tried at the returned params, the adjoint in its system, and the assumptions of the
    method are measured. A single call of a black box does not tell a solver that stopped early from
    one that solves another problem; then both causes are reported. A solver made by
    `hyperfunc.iterate` or `hyperfunc.minimize` is given more steps to find out.

    Args:
        inner_solver: see `hyperfunc.hypergrad`, as for all others up to ``has_aux``. It is called
            19 times for each direction, and some 30 times more to find a cause.
        outer_loss: see `hyperfunc.hypergrad`.
        hparams: the point to check at.
        *args: what the functions take besides.
        fixed_point: see `hyperfunc.hypergrad`.
        inner_loss: see `hyperfunc.hypergrad`.
        optimality: see `hyperfunc.hypergrad`.
        method: see `hyperfunc.hypergrad`.
        has_aux: see `hyperfunc.hypergrad`.
        throw: whether a check that fails raises, as `raise_if_failed` does.
        rtol: relative tolerance, > 0; by default ``eps ** 0.25`` of the coarsest dtype, 1e-4 in
            float64 and 2e-2 in float32. Raise it for a truncated solve.
        num_directions: how many directions, >= 1; each mixes all leaves of hparams.
        max_dense: leave the direct solve out beyond this many inner parameters, >= 0.
        unroll: whether to differentiate the inner solver; its graph may be large.
        generator: where the directions are drawn from, on the CPU; by default one with seed 0, and
            never torch's global one.

    Returns:
        A `HypergradCheck`: a tree of numbers, with ``passed``, ``raise_if_failed()``, and a table
        as its ``str``.

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
        >>> report = hf.check_hypergrad(
        ...     solve,
        ...     lambda w, reg: (w**2).sum(),
        ...     torch.zeros((), dtype=torch.float64),
        ...     inner_loss=loss,
        ... )
        >>> report.passed, bool(report.causes.dependence_lost)
        (False, True)
        >>> report = hf.check_hypergrad(
        ...     solve,
        ...     lambda w, reg: (w**2).sum(),
        ...     torch.zeros((), dtype=torch.float64),
        ...     inner_loss=lambda w, reg: loss(w, reg) + 0.5 * reg.exp() * (w**2).sum(),
        ... )
        >>> report.raise_if_failed()

    References:
        More and Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011).
    """
    if tracking.transforms_active():
        raise ValueError(
            "check_hypergrad: called inside of a torch.func transform, torch.compile or inference "
            "mode, where finite differences cannot be taken. Check one task, outside of it"
        )
    for name, number, least in (
        ("num_directions", num_directions, 1),
        ("max_dense", max_dense, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(
                f"check_hypergrad: {name} is {number!r}; expected an integer, {least} or more"
            )
    if rtol is not None and not 0 < rtol < math.inf:
        raise ValueError(f"check_hypergrad: rtol is {rtol!r}; expected a number > 0")
    hparams, args = trees.tree_map(_detached, (hparams, args))
    keywords = {"fixed_point": fixed_point, "inner_loss": inner_loss, "optimality": optimality}
    problem = _Problem(
        inner_solver,
        outer_loss,
        resolve_method(method),
        make_condition(inner_solver, fixed_point, inner_loss, optimality),
        keywords,
        has_aux,
        hparams,
        args,
    )
    with explained("check_hypergrad", lambda: trees.named_tensors(hparams, args)):
        report = _check(problem, rtol, num_directions, max_dense, unroll, generator)
    if throw:
        report.raise_if_failed()
    return report


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """What the user passed, and its functions of flat tensors."""

    inner_solver: Callable[..., Any]
    outer_loss: Callable[..., Any]
    method: Any
    condition: Condition | None
    keywords: dict[str, Any]
    has_aux: bool
    hparams: TensorTree
    args: tuple[Any, ...]

    def hypergrad(self, method: Any, params: TensorTree = None) -> tuple[Leaves, Any]:
        """By a method, at given params or those of the inner solver."""
        keywords = self.keywords
        solver = self.inner_solver
        if params is not None:
            assert self.condition is not None
            keywords = {self.condition.kind: self.condition.fn}

            def solver(hparams: TensorTree, *args: Any) -> TensorTree:
                return params

        transformed = hypergrad_and_solution(
            solver, self.outer_loss, method=method, has_aux=self.has_aux, throw=False, **keywords
        )
        grads, solution = transformed(self.hparams, *self.args)
        return tracking.detach(trees.flatten(grads)[0]), solution

    def outer(self, params: TensorTree, hparams: TensorTree) -> Tensor:
        output = self.outer_loss(params, hparams, *self.args)
        value: Tensor = output[0] if self.has_aux else output
        return value

    def solve(self, h: Leaves) -> TensorTree:
        """The inner solver's params for other hparams."""
        hparams = trees.unflatten(trees.flatten(self.hparams)[1], h)
        with torch.enable_grad():
            return trees.tree_map(_detached, self.inner_solver(hparams, *self.args))

    def value(self, h: Leaves) -> float:
        """The outer loss through the inner solver."""
        hparams = trees.unflatten(trees.flatten(self.hparams)[1], h)
        with torch.enable_grad():
            params = trees.tree_map(_detached, self.inner_solver(hparams, *self.args))
            return float(self.outer(params, hparams).detach())


@dataclasses.dataclass(frozen=True, eq=False)
class _Local:
    """The condition at the returned params, and what is made of it there."""

    bound: BoundCondition
    w: Leaves
    theta: Leaves
    linearization: autodiff.Linearization
    residual: Leaves

    @staticmethod
    def make(problem: _Problem, params: TensorTree) -> _Local:
        assert problem.condition is not None
        leaves, spec = trees.flatten_floating(params, "params")
        arguments, theta, _ = Arguments.flatten(problem.hparams, problem.args)
        bound = BoundCondition(problem.condition, arguments, spec, len(leaves))
        w, n, m = tracking.detach(leaves), len(leaves), arguments.num_hparams

        def residual(*tensors: Tensor) -> Leaves:
            return bound.residual(tensors[:n], tensors[n:], bound.function(*tensors))

        linearization = autodiff.Linearization(
            residual, (*w, *theta), (tuple(range(n)), tuple(range(n, n + m)))
        )
        return _Local(bound, w, theta, linearization, linearization.outputs)

    @property
    def size(self) -> int:
        return sum(leaf.numel() for leaf in self.w)

    def newton_step(self, solver: Any) -> Leaves:
        operator = self.bound.operator(self.bound.linearize(self.w, self.theta, ()), self.theta)
        step, _ = solver.solve(operator, self.residual)
        return tracking.detach(step)

    def residual_along(self, a: Leaves, w: Leaves, h: Leaves) -> float:
        """The product of the residual elsewhere with a fixed vector."""
        theta = (*h, *self.theta[len(h) :])
        value = self.bound.residual(w, theta, self.bound.function(*w, *theta))
        return float(trees.dot(tracking.detach(value), a))


def _check(
    problem: _Problem,
    rtol: float | None,
    num_directions: int,
    max_dense: int,
    unroll: bool,
    generator: torch.Generator | None,
) -> HypergradCheck:
    h, h_spec = trees.flatten_floating(problem.hparams, "hparams")
    generator = generator or torch.Generator().manual_seed(0)
    directions = [random_direction(h, generator) for _ in range(num_directions)]
    grads, solution = problem.hypergrad(problem.method)
    params = trees.tree_map(_detached, solution.params)
    w = tuple(trees.flatten(params)[0])
    rtol = max(trees.epsilon(h), trees.epsilon(w)) ** 0.25 if rtol is None else rtol

    noise = noise_level(problem.value, h, directions[0])
    differences = [difference(problem.value, h, v, noise) for v in directions]
    by_method = _along(grads, directions)
    by_differences, errors = _columns(differences)
    finite = torch.cat([by_method, by_differences]).nan_to_num(0.0, 0.0, 0.0)
    # where the derivative vanishes, how much the function varies tells what a small one is
    nearby = [abs(problem.value(trees.axpy(t, directions[0], h))) for t in (-0.1, 0.0, 0.1)]
    scale = max(float(finite.abs().max()), rtol * max(filter(math.isfinite, nearby), default=0.0))
    tolerance = rtol * scale + 2 * errors
    agrees = _within(by_method, by_differences, tolerance)
    inconclusive = not _within(errors, torch.zeros_like(errors), 0.05 * scale)

    local, facts, by_dense = None, None, None
    oracle: Any = Auto()
    if problem.condition is not None and bool(trees.all_finite(w)):
        local = _Local.make(problem, params)
        facts = diagnose_bound(local.bound, w, local.theta, 20)
        if local.size <= max_dense:
            oracle = Dense()
            by_dense = _along(problem.hypergrad(oracle, params)[0], directions)
    linear_residual = _linear_residual(problem, local, solution)
    step = local.newton_step(oracle) if local else None
    causes = dict.fromkeys(Causes._fields, False)
    lost = [False] * len(h)
    if local is None and problem.condition is not None:
        causes["solver_not_converged"] = True
    elif inconclusive:
        causes["inconclusive"] = True
    elif not agrees:
        tests = _Tests(problem, local, facts, h, w, params, directions, rtol, scale)
        lost = tests.find(causes, by_method, by_dense, oracle, step, linear_residual, solution)
    return HypergradCheck(
        hypergradient=trees.unflatten(h_spec, grads),
        by_method=by_method,
        by_dense=() if by_dense is None else by_dense,
        by_unrolling=_by_unrolling(problem, directions) if unroll else (),
        by_differences=by_differences,
        difference_errors=errors,
        tolerance=tolerance,
        inner_residual=trees.norm(local.residual) if local else (),
        newton_distance=() if step is None else trees.norm(step) / trees.norm(w),
        linear_residual=() if linear_residual is None else linear_residual,
        result=solution.stats.result if is_implicit(problem.method) else (),
        causes=Causes(**{name: torch.tensor(flag) for name, flag in causes.items()}),
        lost=trees.unflatten(h_spec, [torch.tensor(flag) for flag in lost]),
        diagnosis=() if facts is None else facts,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Tests:
    """What is tried to find the cause of a hypergradient that does not agree."""

    problem: _Problem
    local: _Local | None
    facts: Diagnosis | None
    h: Leaves
    w: Leaves
    params: TensorTree
    directions: list[Leaves]
    rtol: float
    scale: float

    def find(
        self,
        causes: dict[str, bool],
        by_method: Tensor,
        by_dense: Tensor | None,
        oracle: Any,
        step: Leaves | None,
        linear_residual: Tensor | None,
        solution: Any,
    ) -> list[bool]:
        """Set the causes, and return which leaves of hparams a dependence was lost on."""
        lost = [self._lost(leaf) for leaf in range(len(self.h))]
        causes["dependence_lost"] = any(lost) or self._params_lost()
        method = self.problem.method
        if not is_implicit(method):
            truncated = isinstance(method, Reverse) and method.last is not None
            causes["assumption_broken" if truncated else "dependence_lost"] = True
            return lost
        if self.local is None or self.facts is None or step is None:
            causes["solver_not_converged"] = True
            return lost
        gap = self.rtol * self.scale
        failed = int(solution.stats.result) > int(RESULTS.max_steps)
        if by_dense is not None:
            solved = _within(by_method, by_dense, gap)
        else:
            solved = linear_residual is not None and float(linear_residual) <= self.rtol
        if failed or not solved:
            broken = self._assumption_broken(self.local, self.facts)
            causes["assumption_broken" if broken else "linear_solve"] = True
        if not self._satisfied(oracle, step, gap):
            further = self._residual_with_more_steps()
            before = float(self.facts.residual.value)
            causes["solver_not_converged"] = further is None or further < before / 2
            causes["condition_mismatch"] = further is None or further >= before / 2
        if not any(causes.values()):
            causes["condition_mismatch"] = True
        return lost

    def _satisfied(self, oracle: Any, step: Leaves, gap: float) -> bool:
        """Whether a Newton step on the condition leaves the hypergradient as it is."""
        assert self.facts is not None
        norm, noise = self.facts.residual
        if bool(norm <= 10 * noise):
            return True
        spec = trees.flatten(self.params)[1]
        here = self.problem.hypergrad(oracle, self.params)[0]
        there = self.problem.hypergrad(oracle, trees.unflatten(spec, trees.sub(self.w, step)))[0]
        return _within(_along(here, self.directions), _along(there, self.directions), gap / 2)

    def _residual_with_more_steps(self) -> float | None:
        solver = self.problem.inner_solver
        if not isinstance(solver, IterativeSolver) or solver.inputs is not None:
            return None
        longer = dataclasses.replace(solver, num_steps=4 * solver.num_steps + 4, rtol=0.0, atol=0.0)
        with torch.enable_grad():
            params = longer(self.problem.hparams, *self.problem.args)
        return float(trees.norm(_Local.make(self.problem, params).residual))

    def _assumption_broken(self, local: _Local, facts: Diagnosis) -> bool:
        method = self.problem.method
        if isinstance(method, Nystrom):
            return not bool(facts.symmetric)
        if isinstance(method, CG | PipelinedCG):
            return not bool(facts.symmetric) or not float(facts.eig_min.value) > 0
        if isinstance(method, FixedPoint | Neumann):
            operator = local.bound.operator(
                local.bound.linearize(local.w, local.theta, ()), local.theta
            )
            radius = spectral_radius(
                lambda v: trees.axpy(-method.step_size, operator.mv(v), v), local.w, 20
            )
            return not float(radius.value) < 1
        return False

    def _lost(self, leaf: int) -> bool:
        """Whether a derivative by a leaf of hparams is lost somewhere."""
        v = tuple(
            part if i == leaf else torch.zeros_like(part)
            for i, part in enumerate(self.directions[0])
        )
        by_outer = self._outer_gradient()[len(self.w) + leaf]
        if self._differs(
            lambda x: float(self.problem.outer(self.params, self._tree(x)).detach()),
            self.h,
            v,
            float(trees.dot((by_outer,), (v[leaf],))),
        ):
            return True
        if self.local is None:
            return False
        local, a = self.local, random_signs(self.w, 0)
        cross = local.linearization.pull(a, 1)[leaf]
        if self._differs(
            lambda x: local.residual_along(a, self.w, x),
            self.h,
            v,
            float(trees.dot((cross,), (v[leaf],))),
        ):
            return True
        moved = tuple(trees.flatten(self.problem.solve(trees.axpy(0.01, v, self.h)))[0])
        change = float(trees.norm(trees.sub(moved, self.w)))
        # one of the two depends on this leaf, the other does not
        return (change == 0) != (not bool((cross != 0).any()))

    def _params_lost(self) -> bool:
        """Whether a derivative by params is lost in the outer loss or the condition."""
        generator = torch.Generator().manual_seed(1)
        z, spec = random_direction(self.w, generator), trees.flatten(self.params)[1]
        by_outer = self._outer_gradient()[: len(self.w)]
        if self._differs(
            lambda x: float(
                self.problem.outer(trees.unflatten(spec, x), self.problem.hparams).detach()
            ),
            self.w,
            z,
            float(trees.dot(by_outer, z)),
        ):
            return True
        if self.local is None:
            return False
        local, a = self.local, random_signs(self.w, 0)
        if self._differs(
            lambda x: local.residual_along(a, x, self.h),
            self.w,
            z,
            float(trees.dot(local.linearization.pull(a, 0), z)),
        ):
            return True
        condition = local.bound.condition
        if condition.kind != "inner_loss":
            return False
        return self._differs(
            lambda x: float(
                condition.fn(
                    trees.unflatten(spec, x), self.problem.hparams, *self.problem.args
                ).detach()
            ),
            self.w,
            z,
            float(trees.dot(local.residual, z)),
        )

    def _differs(
        self, fn: Callable[[Leaves], float], x: Leaves, v: Leaves, derivative: float
    ) -> bool:
        value, error = difference(fn, x, v, noise_level(fn, x, v))
        scale = max(abs(value), abs(derivative))
        return abs(value - derivative) > self.rtol * scale + 4 * error

    def _outer_gradient(self) -> Leaves:
        spec, n = trees.flatten(self.params)[1], len(self.w)
        return tracking.detach(
            autodiff.gradient(
                lambda *leaves: self.problem.outer(
                    trees.unflatten(spec, leaves[:n]), self._tree(leaves[n:])
                ),
                (*self.w, *self.h),
                create_graph=False,
            )
        )

    def _tree(self, h: Leaves) -> TensorTree:
        return trees.unflatten(trees.flatten(self.problem.hparams)[1], h)


def _by_unrolling(problem: _Problem, directions: list[Leaves]) -> Any:
    """The derivatives through the solver's code, or () where it has none."""
    with torch.enable_grad():
        hparams = trees.tree_map(lambda t: t.detach().requires_grad_(), problem.hparams)
        try:
            leaves = trees.flatten(problem.inner_solver(hparams, *problem.args))[0]
            if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                return ()
            return _along(problem.hypergrad(ReverseUnroll())[0], directions)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return ()


def _linear_residual(problem: _Problem, local: _Local | None, solution: Any) -> Tensor | None:
    if local is None or not is_implicit(problem.method):
        return None
    spec = local.bound.params_spec
    b = autodiff.gradient(
        lambda *leaves: problem.outer(trees.unflatten(spec, leaves), problem.hparams),
        local.w,
        create_graph=False,
    )
    u = tracking.detach(trees.flatten(solution.adjoint)[0])
    size = trees.norm(b)
    gap = trees.norm(trees.sub(b, local.linearization.pull(u, 0)))
    return gap / torch.where(size > 0, size, 1.0)


def _along(grads: Leaves, directions: list[Leaves]) -> Tensor:
    products = [
        sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, v, strict=True))
        for v in directions
    ]
    return torch.tensor(products, dtype=torch.float64)


def _columns(differences: list[Difference]) -> tuple[Tensor, Tensor]:
    values, errors = zip(*differences, strict=True)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)


def _within(a: Tensor, b: Tensor, tolerance: float | Tensor) -> bool:
    """Whether all gaps are allowed; NaN is not."""
    return bool(((a - b).abs() <= tolerance).all())


def _code(result: Tensor) -> RESULTS:
    return next(code for code in RESULTS if code == int(result))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
