"""The first-order rule: the steps count as the identity, so that only the start is followed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.shown import show
from hyperfunc._engine.solver_aux import split_aux
from hyperfunc._engine.user_functions import call
from hyperfunc._rule.conditions import Arguments, Condition
from hyperfunc._rule.implicit import ImplicitProblem
from hyperfunc._torch import tracking
from hyperfunc._types import InnerSolver, Leaves, TensorTree
from hyperfunc.inner_solvers._solvers import IterativeSolver
from hyperfunc.inner_solvers._steps import DescentStep
from hyperfunc.linear_solvers import AbstractLinearSolver, LinearOperator, OneStep


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    r"""First-order MAML: inner gradients count as constants, ``"first_order"``.

    With the start $w_0(\lambda)$ and the result $w_T$ of the inner solver,

    $$\nabla f = \partial_\lambda E + (\partial_\lambda w_0)^\top \partial_w E \big|_{w_T},$$

    the outer gradient at the adapted parameters, carried back to the start as if the steps were the
    identity. It takes no second derivative, and no memory that grows with the steps. The start is

    - ``init``, if it is given here;
    - that of the inner solver, if it was made by `minimize`, `iterate` or the ``inner_solver`` of a
      fixed-point solver;
    - else ``hparams`` themselves, which must then be a tree like ``params``. The solver may be any
      code.

    With a solver made by `minimize`, coefficients of the optimiser that depend on ``hparams``, such
    as learning rates, get their derivative too, that of the steps with the inner gradients held
    fixed: $-\sum_t g_t^\top \partial_w E$ for the rate of `hyperfunc.optim.sgd`. What else the
    inner problem depends on counts as a constant, so that its hypergradient is that of the outer
    loss alone, or zero; where all of it is zero for that reason, `hypergrad` raises.

    Args:
        init: ``(hparams, *args) -> params``, where the inner solver starts.

    Raises:
        TypeError: if ``init`` is no function.
        ValueError: when differentiated, if the start is no tree like ``params``.

    Example:
        >>> loss = lambda w, meta, x: ((w - x) ** 2).sum() / 2
        >>> solver = hf.minimize(loss, hf.optim.sgd(lr=0.5), 1, init=lambda meta, x: meta)
        >>> outer_loss = lambda w, meta, x: (w**2).sum() / 2
        >>> fn = hf.hypergrad(solver, outer_loss, method=hf.FirstOrder())
        >>> fn(torch.tensor(1.0), torch.tensor(2.0))  # w = 1.5
        tensor(1.5000)

    References:
        Finn, Abbeel and Levine, arXiv 1703.03400; Nichol, Achiam and Schulman, arXiv 1803.02999.
    """

    init: InnerSolver | None = None

    def __post_init__(self) -> None:
        if self.init is not None:
            check_callable(self.init, "FirstOrder: init", "(hparams, *args) -> params")

    def solution_map(self, inner_solver: InnerSolver, warns: bool = True) -> InnerSolver:
        """The solver, with the derivatives of its start; ``warns`` if that uses no hparams."""
        if isinstance(inner_solver, IterativeSolver) and isinstance(inner_solver.step, DescentStep):
            step = dataclasses.replace(inner_solver.step, first_order=True)
            solver = dataclasses.replace(inner_solver, step=step)
            return functools.partial(_descend, solver, self.init or solver.init)
        condition = Condition(
            "fixed_point", self._map_of(inner_solver), self.unused if warns else ""
        )

        def solve(hparams: TensorTree, /, *args: Any) -> TensorTree:
            arguments, theta, _ = Arguments.flatten(hparams, args)
            has_aux = getattr(inner_solver, "has_aux", False) is True
            problem = ImplicitProblem(
                *(inner_solver, condition, _Identity(), arguments), throw=False, has_aux=has_aux
            )
            w, theta = problem.solution(theta)
            assert problem.bound is not None
            params = problem.bound.params(w, theta)
            return (params, problem.aux) if has_aux else params

        return solve

    @property
    def unused(self) -> str:
        """What is said where no derivative reaches hparams."""
        return (
            f"no derivative reaches hparams: {self!r} follows the start of the inner solver, the "
            f"outer loss and the coefficients of hf.minimize's optimiser, and none of them depends "
            f"on hparams. Start from them, as in hf.minimize(..., init=lambda hparams, *args: "
            f"hparams), or differentiate the steps: method='reverse_unroll'"
        )

    def followed(self, inner_solver: InnerSolver) -> InnerSolver:
        """What of an inner solver is differentiated, as a function whose graph shows it."""
        if isinstance(inner_solver, IterativeSolver) and isinstance(inner_solver.step, DescentStep):
            return self.solution_map(inner_solver)
        return self._start_of(inner_solver) or _hparams

    def _start_of(self, inner_solver: Any) -> Callable[..., Any] | None:
        return self.init or getattr(inner_solver, "init", None)

    def _map_of(self, inner_solver: Any) -> Callable[..., Any]:
        """The fixed-point map whose derivative is that of the start: it does not depend on w."""
        start = self._start_of(inner_solver)
        if start is not None:
            return lambda params, hparams, *args: start(hparams, *args)

        def identity(params: TensorTree, hparams: TensorTree, *args: Any) -> TensorTree:
            (w, spec), (h, like) = trees.flatten(params), trees.flatten(hparams)
            if spec == like and all(a.shape == b.shape for a, b in zip(w, h, strict=True)):
                return hparams
            raise ValueError(
                f"{self!r} carries the derivative back to where the inner solver starts, which "
                f"{show(inner_solver)} does not tell, and hparams are no tree like params: got "
                f"{like} with shapes {[tuple(leaf.shape) for leaf in h]}, expected {spec} with "
                f"{[tuple(leaf.shape) for leaf in w]}. Name the start as a function of hparams: "
                f"method=hf.FirstOrder(init=lambda hparams, *args: ...), or make the solver with "
                f"hf.minimize(..., init=...)"
            )

        return identity


def _descend(
    solver: IterativeSolver, init: InnerSolver, hparams: TensorTree, /, *args: Any
) -> TensorTree:
    """The result of the steps, whose gradients are constants, with the derivative of the start."""
    role = "init(hparams, *args)"
    start = call(role, init, hparams, *args)
    own = start if init is solver.init else call(role, solver.init, hparams, *args)
    at = trees.tree_map(lambda leaf: leaf.detach(), own)
    result = dataclasses.replace(solver, init=lambda *_: at)(hparams, *args)
    result, aux = split_aux(result, solver.has_aux)
    leaves, spec = trees.flatten(start)
    adapted, result_spec = trees.flatten(result)
    trees.check_like(leaves, spec, tuple(adapted), result_spec, "FirstOrder: init", "params")
    carried = [
        # plus nothing, with the derivative of the start
        w + (leaf - leaf.detach()) if tracking.is_differentiable(leaf) else w
        for w, leaf in zip(adapted, leaves, strict=True)
    ]
    params = trees.unflatten(spec, carried)
    return (params, aux) if solver.has_aux else params


class _Identity(AbstractLinearSolver):
    """Solves with the identity, which is the operator of a map that does not depend on params."""

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Any:
        u, stats = OneStep().solve(operator, b)
        return u, stats._replace(result=torch.zeros_like(stats.result))


def _hparams(hparams: TensorTree, /, *args: Any) -> TensorTree:
    return hparams
