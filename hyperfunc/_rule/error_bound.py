"""A-posteriori bounds on the error of a hypergradient by implicit differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._rule.conditions import BoundCondition
from hyperfunc._torch import autodiff
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

    To see it, note that the computed hypergradient is :math:`g = \partial_\lambda L(w, \lambda)`
    with :math:`u` held fixed. At the solution :math:`r` vanishes, so that the exact one is
    :math:`g^* = \partial_\lambda L(w^*, \lambda) + (\partial_\lambda r)^\top (u - u^*)`, with
    :math:`u - u^* = -A^{-\top} \partial_w L(w^*, \lambda)`, as
    :math:`\partial_w L = \partial_w E - A^\top u`. The first part differs from :math:`g` by at most
    :math:`\lVert \partial^2_{\lambda w} L \rVert \lVert w - w^* \rVert`. In the second,
    :math:`\lVert A^{-1} \rVert \le 1 / \gamma`, and :math:`\partial_w L(w^*, \lambda)` differs from
    :math:`\rho = \partial_w L(w, \lambda)` by at most
    :math:`\lVert \partial^2_{ww} L \rVert \lVert w - w^* \rVert`. With
    :math:`\lVert w - w^* \rVert \le \lVert r \rVert / \gamma` the sum is the bound.

    It is the analysis of approximate implicit differentiation of Grazzi et al., with what was
    measured in place of the a-priori rates :math:`\rho_\lambda(t)` and :math:`\sigma_\lambda(k)` of
    the two solvers. There the two second-order norms are bounded by the Lipschitz constants of the
    parts, :math:`\eta_2 + \nu_2 \lVert u \rVert` and :math:`\eta_1 + \nu_1 \lVert u \rVert` with
    :math:`\lVert u \rVert \le \lVert \partial_w E \rVert / (1 - q)`.

    Products of norms forget directions. With ``sharpen`` a Newton step gives better params
    :math:`w'`, a further linear solve a better adjoint :math:`u'`, and the bound is the distance
    to their hypergradient plus the bound for that one, if this is less. The returned hypergradient
    stays as it is.

    The norms are estimated at :math:`w` by Krylov spaces. So the bound holds as it is where the
    second derivatives of :math:`L` and the first ones of :math:`r` do not vary between :math:`w`
    and :math:`w^*`, and to first order in the distance (to second order with ``sharpen``)
    elsewhere. It is Inf where :math:`\gamma` is not positive.

    Args:
        contraction: :math:`q` of the fixed-point map, from 0 to below 1. By default it is
            estimated, as the norm of the map's Jacobian at :math:`w`.
        strong_convexity: :math:`\mu > 0` of the inner loss or optimality function. By default it is
            estimated, as the smallest curvature at :math:`w`.
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

    def __post_init__(self) -> None:
        if self.contraction is not None and not 0 <= self.contraction < 1:
            raise ValueError(
                f"ErrorBound: contraction is {self.contraction!r}; expected a number from 0 to "
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


class HypergradBound(NamedTuple):
    """A bound on the Euclidean norm of a hypergradient's error over all leaves; 0-d tensors.

    What is of type ``Estimate`` is an estimate, with a ``value`` and its
    ``uncertainty``; the bound is computed from the unfavourable end of each. See
    `hyperfunc.ErrorBound` for the formula.

    Attributes:
        bound: the sum of the two terms below, or less if sharpened, and the rounding errors of the
            last step.
        inner_term: the part that is due to the inner solution.
        linear_term: the part that is due to the linear solve.
        inner_residual: ``||r(w)||``.
        linear_residual: ``||dE/dw - A^T u||``.
        gamma: what the distances to the solutions are bounded with: ``1 - q`` or ``mu``, with
            uncertainty 0 where it was given.
        gamma_is_estimate: bool, whether it was estimated.
        inner_distance: the bound on ``||w - w*||``.
        cross_norm: ``||dr/dhparams||``.
        curvature: ``||d^2 L / dw^2||``.
        cross_curvature: ``||d^2 L / dhparams dw||``.
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
    """The bound for the hypergradient from detached params, arguments and adjoint.

    ``outer`` is the outer loss of the leaves of ``w`` followed by the tensors of ``theta``.
    """
    point = _Lagrangian.make(bound, outer, w, theta, u)
    norms = _Norms.estimate(settings, point)
    inner_residual, linear_residual = trees.norm(point.residual), trees.norm(point.gradient)
    inner_term, linear_term = norms.terms(inner_residual, linear_residual)
    total = inner_term + linear_term
    if settings.sharpen:
        better, rest, distance = point.improve(settings.num_steps)
        sharp = distance + sum(norms.terms(trees.norm(better.residual), trees.norm(rest)))
        total = torch.where(sharp < total, sharp, total)
    size = trees.norm(point.hypergradient) + norms.cross_norm.upper * trees.norm(u)
    rounding = 10 * max(trees.epsilon(w), trees.epsilon(point.hypergradient)) * size
    return HypergradBound(
        bound=total + rounding,
        inner_term=inner_term,
        linear_term=linear_term,
        inner_residual=inner_residual,
        linear_residual=linear_residual,
        inner_distance=_times(norms.inverse, inner_residual),
        **norms._asdict(),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Lagrangian:
    """``L`` at params for a fixed adjoint, and the residual there.

    ``first`` is the residual as a function of params and hparams, linearised; ``second`` the
    gradient of ``L`` by both, as a function of params.
    """

    bound: BoundCondition
    outer: Callable[..., Tensor]
    w: Leaves
    theta: Leaves
    u: Leaves
    first: autodiff.Linearization
    second: autodiff.Linearization
    operator: LinearOperator

    @staticmethod
    def make(
        bound: BoundCondition, outer: Callable[..., Tensor], w: Leaves, theta: Leaves, u: Leaves
    ) -> _Lagrangian:
        n, m = len(w), bound.arguments.num_hparams

        def gradients(*leaves: Tensor) -> Leaves:
            def lagrangian(*chosen: Tensor) -> Tensor:
                point = (*chosen, *leaves[n + m :])
                return outer(*point) - trees.dot(bound.residual_at(point[:n], point[n:]), u)

            return autodiff.gradient(lagrangian, leaves[: n + m])

        first, operator = bound.linearize_residual(w, theta, range(m))
        second = autodiff.Linearization(gradients, (*w, *theta), (range(n),))
        return _Lagrangian(bound, outer, w, theta, u, first, second, operator)

    @property
    def residual(self) -> Leaves:
        return self.first.outputs

    @property
    def gradient(self) -> Leaves:
        """By params, which is the residual of the linear solve for the adjoint."""
        return self.second.outputs[: len(self.w)]

    @property
    def hypergradient(self) -> Leaves:
        """The gradient by hparams."""
        return self.second.outputs[len(self.w) :]

    def improve(self, num_steps: int) -> tuple[_Lagrangian, Leaves, Tensor]:
        """The point after a Newton step, the residual of a better adjoint, and the way there.

        That is the distance from the hypergradient here to the one there.
        """
        solver = GMRES(maxiter=num_steps)
        step, _ = solver.solve(self.operator, self.residual)
        w = trees.sub(self.w, step)
        better = _Lagrangian.make(self.bound, self.outer, w, self.theta, self.u)
        change, _ = solver.solve(better.operator.T, better.gradient)
        rest = better.operator.T.residual(change, better.gradient)
        hypergradient = trees.sub(better.hypergradient, better.first.pull(change, 1))
        return better, rest, trees.norm(trees.sub(hypergradient, self.hypergradient))


class _Norms(NamedTuple):
    """The norms in the bound, as fields of `HypergradBound`."""

    gamma: Estimate
    gamma_is_estimate: Tensor
    cross_norm: Estimate
    curvature: Estimate
    cross_curvature: Estimate

    @staticmethod
    def estimate(settings: ErrorBound, point: _Lagrangian) -> _Norms:
        first, second, w = point.first, point.second, point.w
        n, h, steps = len(w), point.hypergradient, settings.num_steps
        zeros_w, zeros_h = trees.zeros_like(w), trees.zeros_like(h)
        cross = LinearOperator(lambda v: first.pull(v, 1), lambda v: first.push(v, 1))
        cross_curvature = LinearOperator(
            lambda v: second.pull((*zeros_w, *v)), lambda v: second.push(v)[n:]
        )
        ritz = eigenvalues(lambda v: second.pull((*v, *zeros_h)), w, steps)
        return _Norms(
            *_gamma(settings, point),
            cross_norm=singular_values(cross.gram, w, steps)[1],
            curvature=ritz.extremes()[3],
            cross_curvature=singular_values(cross_curvature.gram, h, steps)[1],
        )

    @property
    def inverse(self) -> Tensor:
        """``1 / gamma``, or Inf where that may be negative."""
        return torch.where(self.gamma.lower > 0, 1 / self.gamma.lower, torch.inf)

    def terms(self, inner_residual: Tensor, linear_residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the residuals of the inner problem and of the linear solve contribute."""
        both = self.cross_norm.upper * self.curvature.upper
        factor = self.cross_curvature.upper + _times(self.inverse, both)
        inner = _times(_times(self.inverse, inner_residual), factor)
        return inner, _times(self.inverse, self.cross_norm.upper * linear_residual)


def _gamma(settings: ErrorBound, point: _Lagrangian) -> tuple[Estimate, Tensor]:
    """``1 - q`` or ``mu``, and whether it is an estimate."""
    operator, w, steps = point.operator, point.w, settings.num_steps
    given = settings.strong_convexity
    if settings.contraction is not None:
        given = 1 - settings.contraction
    norm = trees.norm(w)
    is_estimate = torch.full_like(norm, given is None, dtype=torch.bool)
    if given is not None:
        gamma = Estimate(torch.full_like(norm, given), torch.zeros_like(norm))
    elif point.bound.condition.kind == "fixed_point":
        jacobian = dataclasses.replace(operator, shift=1.0, scale=-1.0)  # I - A
        _, q = singular_values(jacobian.gram, w, steps)
        gamma = Estimate(1 - q.value, q.uncertainty)
    else:
        gamma = eigenvalues(operator.symmetric_part, w, steps).extremes()[0]
    return gamma, is_estimate


def _times(inverse: Tensor, value: Tensor) -> Tensor:
    """The product, with nothing left of an infinite factor where the other one is zero."""
    return torch.where(value == 0, value, inverse * value)
