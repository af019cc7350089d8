"""The method of Newton, with a linear solver for its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver, Iteration, Point, Problem
from hyperfunc.linear_solvers import GMRES, AbstractLinearSolver, LinearOperator
from hyperfunc.linear_solvers._wrappers import check_solver


@dataclasses.dataclass(frozen=True)
class Newton(AbstractFixedPointSolver):
    r"""Newton's method, whose linear systems are solved by products.

    .. math:: z_{k+1} = z_k + \delta, \qquad (I - f'(z_k)) \, \delta = f(z_k) - z_k

    Converges quadratically from a start that is close enough; no contraction is needed. A step
    takes one evaluation of the map and the products of the linear solver.

    Samples (``batch_dim``) share one linear system, in which those that are done have a zero
    right-hand side. Where samples do not interact, ``Blockwise(GMRES(), blocks="batch")`` solves
    one for each.

    Args:
        linear_solver: any of the linear solvers, such as ``hf.NormalCG()``. A solve that stops
            early or fails is no failure of Newton's method unless its step is bad.

    All other arguments are those of `Picard`. Its steps cannot be differentiated: autograd or a
    transform that would record them is refused.

    Example:
        >>> f = lambda z, a: z + z**2 - a  # expands
        >>> z, stats = hf.fixed_point_solvers.Newton()(f, torch.ones(2), torch.tensor([2.0, 3.0]))
        >>> z
        tensor([1.4142, 1.7321])
    """

    maxiter: int = 50
    rtol: float | None = None
    atol: float = 0.0
    linear_solver: AbstractLinearSolver = GMRES()
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver(self, "linear_solver", self.linear_solver)

    def _iteration(self, problem: Problem) -> Iteration:
        tensors = (*problem.init, *trees.flatten((problem.hparams, problem.args))[0])
        recorded = torch.is_grad_enabled() or tracking.transforms_active()
        if recorded and any(map(tracking.is_attached, tensors)):
            raise ValueError(
                "Newton: its steps cannot be differentiated, but init, hparams or *args require "
                "grad or belong to an enclosing torch.func transform. Use "
                "hf.implicit_diff(solver.inner_solver(fixed_point, init=...)) for the derivatives "
                "of the solution, detach the tensors, or take Anderson or Broyden"
            )
        found: tuple[Tensor, Any] | None = None

        def evaluate(z: Tensor) -> Tensor:
            nonlocal found
            inputs = tracking.detach(problem.unpack(z))
            linearization = autodiff.Linearization(
                lambda *z: problem.apply(z), inputs, (tuple(range(len(inputs))),)
            )
            if linearization.captures_gradient and torch.is_grad_enabled():
                raise ValueError(captured_message("fixed_point"))
            found = z, linearization
            return problem.pack(tracking.detach(linearization.outputs))

        def step(
            number: Any, point: Point, memory: Any, active: Tensor, restart: Tensor
        ) -> tuple[Tensor, Any]:
            if found is None or found[0] is not point.z:  # of what came before a kept loop
                evaluate(point.z)
            assert found is not None
            linearization, column = found[1], active[:, None]

            def masked(product: Callable[[Leaves], Leaves]) -> Callable[[Leaves], Leaves]:
                # a sample that is NaN must not reach the others by the solver's inner products
                if self.batch_dim is None:
                    return product
                return lambda v: problem.unpack(torch.where(column, problem.pack(product(v)), 0.0))

            push, pull = masked(linearization.push), masked(linearization.pull)
            operator = LinearOperator(push, pull, shift=1.0, scale=-1.0, spec=problem.spec)
            rhs = problem.unpack(torch.where(column, point.residual, 0.0))
            change, _ = self.linear_solver.solve(operator, rhs)
            return point.z + problem.pack(change).detach(), memory

        return Iteration(evaluate, lambda point: (), step)
