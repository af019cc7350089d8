"""A-posteriori bounds on the error of a hypergradient by implicit differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_flags, check_number
from hyperfunc._engine.flat import split
from hyperfunc._engine.shown import show, show_fields
from hyperfunc._rule.conditions import BoundCondition
from hyperfunc._torch import autodiff
from hyperfunc._torch.containers import loadable
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers import GMRES, LinearOperator
from hyperfunc.linear_solvers._spectrum import Estimate, eigenvalues, singular_values


@dataclasses.dataclass(frozen=True)
class ErrorBound:
    r"""What to take for granted in a bound on a hypergradient's error, and how hard to look.

    Let :math:`r` be the residual of the condition (:math:`w - \varphi(w)`, the inner gradient, or
    the optimality function), :math:`A = \partial_w r`, and :math:`\gamma > 0` such that
    :math:`\lVert w - w^* \rVert \le \lVert r(w) \rVert / \gamma` and
    :math:`\lVert A^{-1} \rVert \le 1 / \gamma`: for a map with contraction factor :math:`q` that is
    :math:`\gamma = 1 - q`, and for a strongly convex inner loss (or a strongly monotone optimality
    function) its constant :math:`\mu`. With the params :math:`w` and adjoint :math:`u` that were
    found, and the residual :math:`\rho = \partial_w E - A^\top u` of the linear solve,

    .. math::
        \lVert \text{error} \rVert \le
        \Big(\lVert \partial^2_{\lambda w} L \rVert
        + \frac{\lVert \partial_\lambda r \rVert}{\gamma} \lVert \partial^2_{ww} L \rVert\Big)
        \frac{\lVert r \rVert}{\gamma}
        + \lVert \partial_\lambda r \rVert \frac{\lVert \rho \rVert}{\gamma},
        \qquad L(w, \lambda) = E(w, \lambda) - u^\top r(w, \lambda).

    The computed hypergradient is :math:`g = \partial_\lambda L(w, \lambda)` with :math:`u` held
    fixed. At the solution :math:`r` vanishes, so that the exact one is
    :math:`\partial_\lambda L(w^*, \lambda) + (\partial_\lambda r)^\top (u - u^*)`, with
    :math:`u - u^* = -A^{-\top} \partial_w L(w^*, \lambda)`, as
    :math:`\partial_w L = \partial_w E - A^\top u`. The first part differs from :math:`g`, and
    :math:`\partial_w L(w^*, \lambda)` from :math:`\rho`, by second derivatives of :math:`L` times
    :math:`\lVert w - w^* \rVert \le \lVert r \rVert / \gamma`; the sum is the bound. It is the
    analysis of Grazzi et al., with what was measured in place of a-priori rates of the two solvers
    and of Lipschitz constants.

    Products of norms forget directions. With ``sharpen`` a Newton step gives better params, a
    further linear solve a better adjoint, and the bound is the distance to their hypergradient plus
    the bound for that one, if this is less. The returned hypergradient stays as it is.

    The error is that of the derivative of the solution itself. So :math:`A` is the Jacobian of the
    condition also where the method solves with another operator, the Gauss-Newton matrix of
    `composed` or one with a damping: :math:`\rho` holds what that makes of :math:`u`.

    The norms are estimated at :math:`w` by Krylov spaces. So the bound holds where the second
    derivatives of :math:`L` and the first ones of :math:`r` do not vary between :math:`w` and
    :math:`w^*`, and to first order in the distance (second with ``sharpen``) elsewhere. It is Inf
    where :math:`\gamma` is not positive.

    Args:
        contraction: :math:`q` of the fixed-point map, from 0 to below 1; by default the norm of its
            Jacobian at :math:`w`.
        strong_convexity: :math:`\mu > 0` of the inner loss or optimality function; by default the
            smallest curvature at :math:`w`.
        sharpen: whether to take the directions of the errors into account.
        num_steps: dimension of the Krylov spaces, >= 1; all takes about 10 times as many products.

    Raises:
        ValueError: for values outside these ranges, or both constants.

    Example:
        >>> hf.ErrorBound(contraction=0.9)
        ErrorBound(contraction=0.9, strong_convexity=None, sharpen=True, num_steps=20)

    References:
        Grazzi, Franceschi, Pontil and Salzo, On the iteration complexity of hypergradient
        computation, arXiv 2006.16218: the bound for approximate implicit differentiation.
    """

    contraction: float | None = None
    strong_convexity: float | None = None
    sharpen: bool = True
    num_steps: int = 20

    __repr__ = show_fields

    def __post_init__(self) -> None:
        if self.contraction is not None and not 0 <= self.contraction < 1:
            raise ValueError(
                f"ErrorBound: contraction is {show(self.contraction)}; expected a number from 0 to "
                f"below 1, the factor by which the fixed-point map shrinks distances"
            )
        if self.strong_convexity is not None:
            check_number(self, "strong_convexity", self.strong_convexity, above=True)
        if self.contraction is not None and self.strong_convexity is not None:
            raise ValueError(
                "ErrorBound: got contraction and strong_convexity; expected one of them: the first "
                "for a fixed-point map, the second for an inner loss or optimality function"
            )
        check_count(self, "num_steps", self.num_steps)
        check_flags(self, sharpen=self.sharpen)

    def check(self, kind: str) -> None:
        """Raise if the constant that is given is not the one that a kind of condition has."""
        if kind == "fixed_point" and self.strong_convexity is not None:
            raise ValueError(
                "ErrorBound: strong_convexity is given, but the condition is a fixed-point map. "
                "Give its contraction factor: ErrorBound(contraction=q)"
            )
        if kind != "fixed_point" and self.contraction is not None:
            raise ValueError(
                f"ErrorBound: contraction is given, but the condition is {kind}, which has no map. "
                f"Write ErrorBound(strong_convexity=mu), or pass "
                f"fixed_point=hf.gradient_descent_map(...)"
            )


@loadable
class HypergradBound(NamedTuple):
    """A bound on the Euclidean norm of a hypergradient's error over all leaves; 0-d tensors.

    An ``Estimate`` has a ``value`` and its ``uncertainty``; the bound is computed from the
    unfavourable end of each. See `hyperfunc.ErrorBound` for the formula.

    Attributes:
        bound: the sum of the two terms below, or less if sharpened, and rounding errors.
        inner_term: the part that is due to the inner solution.
        linear_term: the part that is due to the linear solve.
        inner_residual: ``||r(w)||``.
        linear_residual: ``||dE/dw - A^T u||``.
        gamma: ``1 - q`` or ``mu``, with uncertainty 0 where it was given.
        gamma_is_estimate: bool, whether it was estimated.
        inner_distance: the bound on ``||w - w*||``.
        cross_norm: ``||dr/dhparams||``.
        curvature: ``||d^2 L / dw^2||``.
        cross_curvature: ``||d^2 L / dhparams dw||``.

    Example:
        >>> gradient = hf.hypergrad_and_solution(
        ...     lambda h: h + 0.01,  # off by 0.01
        ...     lambda w, h: w**2 / 2,
        ...     inner_loss=lambda w, h: (w - h) ** 2 / 2,
        ...     error_bound=hf.ErrorBound(strong_convexity=1.0),
        ... )
        >>> gradient(torch.tensor(1.0))[1].error_bound.bound
        tensor(0.0100)
    """

    bound: Tensor
    inner_term: Tensor
    linear_term: Tensor
    inner_residual: Tensor
    linear_residual: Tensor
    gamma: Estimate
    gamma_is_estimate: Tensor
    inner_distance: Tensor
    cross_norm: Estimate
    curvature: Estimate
    cross_curvature: Estimate


def error_bound(
    settings: ErrorBound,
    bound: BoundCondition,
    outer: Callable[..., Tensor],
    w: Leaves,
    theta: Leaves,
    u: Leaves,
) -> HypergradBound:
    """The bound at detached params, arguments and adjoint, with the outer loss as a function."""
    point = _Lagrangian(bound, outer, w, theta, u)
    gamma = _gamma(settings, point)
    cross_norm, curvature, cross_curvature = point.norms(settings.num_steps)
    inverse = torch.where(gamma.lower > 0, 1 / gamma.lower, torch.inf)

    def terms(inner_residual: Tensor, linear_residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the residuals of the inner problem and of the linear solve contribute."""
        both = cross_norm.upper * curvature.upper
        factor = cross_curvature.upper + _times(inverse, both)
        inner = _times(_times(inverse, inner_residual), factor)
        return inner, _times(inverse, cross_norm.upper * linear_residual)

    inner_residual, linear_residual = trees.norm(point.residual), trees.norm(point.gradient)
    inner_term, linear_term = terms(inner_residual, linear_residual)
    total = inner_term + linear_term
    if settings.sharpen:
        better, rest, distance = point.improve(settings.num_steps)
        sharp = distance + sum(terms(trees.norm(better.residual), trees.norm(rest)))
        total = torch.where(sharp < total, sharp, total)
    estimated = settings.contraction is None and settings.strong_convexity is None
    size = trees.norm(point.hypergradient) + cross_norm.upper * trees.norm(u)
    rounding = 10 * max(trees.epsilon(w), trees.epsilon(point.hypergradient)) * size
    return HypergradBound(
        bound=total + rounding,
        inner_term=inner_term,
        linear_term=linear_term,
        inner_residual=inner_residual,
        linear_residual=linear_residual,
        gamma=gamma,
        gamma_is_estimate=torch.full_like(total, estimated, dtype=torch.bool),
        inner_distance=_times(inverse, inner_residual),
        cross_norm=cross_norm,
        curvature=curvature,
        cross_curvature=cross_curvature,
    )


class _Lagrangian:
    """The residual, and the gradient of ``L`` for a fixed adjoint, linearised at params."""

    def __init__(
        self,
        bound: BoundCondition,
        outer: Callable[..., Tensor],
        w: Leaves,
        theta: Leaves,
        u: Leaves,
    ) -> None:
        n, m = len(w), bound.arguments.num_hparams

        def gradients(*leaves: Tensor) -> Leaves:
            def lagrangian(*chosen: Tensor) -> Tensor:
                point = (*chosen, *leaves[n + m :])
                return outer(*point) - trees.dot(bound.residual_at(point[:n], point[n:]), u)

            return autodiff.gradient(lagrangian, leaves[: n + m])

        self.bound, self.outer, self.w, self.theta, self.u = bound, outer, w, theta, u
        self.first, self.operator = bound.linearize_residual(w, theta, range(m))
        self.second = autodiff.Linearization(gradients, (*w, *theta), (range(n),))
        self.residual = self.first.outputs
        # by params, which is the residual of the linear solve for the adjoint, and by hparams
        self.gradient, self.hypergradient = split(self.second.outputs, n)

    def norms(self, num_steps: int) -> tuple[Estimate, Estimate, Estimate]:
        """Of the cross derivative of the residual, and the curvatures of ``L``."""
        first, second, w, h = self.first, self.second, self.w, self.hypergradient
        zeros_w, zeros_h = trees.zeros_like(w), trees.zeros_like(h)
        cross = LinearOperator(lambda v: first.pull(v, 1), lambda v: first.push(v, 1))
        cross_curvature = LinearOperator(
            lambda v: second.pull((*zeros_w, *v)), lambda v: second.push(v)[len(w) :]
        )
        ritz = eigenvalues(lambda v: second.pull((*v, *zeros_h)), w, num_steps)
        return (
            singular_values(cross.gram, w, num_steps)[1],
            ritz.extremes()[3],
            singular_values(cross_curvature.gram, h, num_steps)[1],
        )

    def improve(self, num_steps: int) -> tuple[_Lagrangian, Leaves, Tensor]:
        """The point after a Newton step, a better adjoint's residual, and how far g moves."""
        solver = GMRES(maxiter=num_steps)
        step, _ = solver.solve(self.operator, self.residual)
        w = trees.sub(self.w, step)
        better = _Lagrangian(self.bound, self.outer, w, self.theta, self.u)
        change, _ = solver.solve(better.operator.T, better.gradient)
        rest = better.operator.T.residual(change, better.gradient)
        hypergradient = trees.sub(better.hypergradient, better.first.pull(change, 1))
        return better, rest, trees.norm(trees.sub(hypergradient, self.hypergradient))


def _gamma(settings: ErrorBound, point: _Lagrangian) -> Estimate:
    """``1 - q`` or ``mu``."""
    q, operator, w = settings.contraction, point.operator, point.w
    given = settings.strong_convexity if q is None else 1 - q
    if given is not None:
        gamma = torch.full_like(trees.norm(w), given)
        return Estimate(gamma, torch.zeros_like(gamma))
    if point.bound.condition.kind == "fixed_point":
        jacobian = dataclasses.replace(operator, shift=1.0, scale=-1.0)  # I - A
        largest = singular_values(jacobian.gram, w, settings.num_steps)[1]
        return Estimate(1 - largest.value, largest.uncertainty)
    return eigenvalues(operator.symmetric_part, w, settings.num_steps).extremes()[0]


def _times(inverse: Tensor, value: Tensor) -> Tensor:
    """The product, with nothing left of an infinite factor where the other one is zero."""
    return torch.where(value == 0, value, inverse * value)
