"""A-posteriori bounds on the error of a hypergradient by implicit differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
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
        if self.strong_convexity is not None and not 0 < self.strong_convexity < float("inf"):
            raise ValueError(
                f"ErrorBound: strong_convexity is {self.strong_convexity!r}; expected a number > 0"
            )
        if self.contraction is not None and self.strong_convexity is not None:
            raise ValueError(
                "ErrorBound: got contraction and strong_convexity; expected one of them: the first "
                "for a fixed-point map, the second for an inner loss or optimality function"
            )
        steps = self.num_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"ErrorBound: num_steps is {steps!r}; expected an integer, 1 or more")

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
    point = _Point.make(bound, outer, w, theta, u)
    norms = _Norms.estimate(settings, point)
    residuals = trees.norm(point.residual), trees.norm(point.adjoint_residual)
    inner_term, linear_term = norms.terms(*residuals)
    total = inner_term + linear_term
    if settings.sharpen:
        better, adjoint_residual, distance = point.improve(settings.num_steps)
        rest = sum(norms.terms(trees.norm(better.residual), trees.norm(adjoint_residual)))
        sharp = distance + rest
        total = torch.where(sharp < total, sharp, total)
    size = trees.norm(point.hypergradient) + norms.cross.upper * trees.norm(u)
    rounding = 10 * max(trees.epsilon(w), trees.epsilon(point.hypergradient)) * size
    return HypergradBound(
        bound=total + rounding,
        inner_term=inner_term,
        linear_term=linear_term,
        inner_residual=residuals[0],
        linear_residual=residuals[1],
        gamma=norms.gamma,
        gamma_is_estimate=torch.full_like(total, norms.estimated, dtype=torch.bool),
        inner_distance=_times(norms.inverse, residuals[0]),
        cross_norm=norms.cross,
        curvature=norms.curvature,
        cross_curvature=norms.cross_curvature,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Point:
    """The residual and the gradient of ``L`` at params, for a fixed adjoint, linearised."""

    bound: BoundCondition
    outer: Callable[..., Tensor]
    w: Leaves
    theta: Leaves
    u: Leaves
    first: autodiff.Linearization
    second: autodiff.Linearization

    @staticmethod
    def make(
        bound: BoundCondition, outer: Callable[..., Tensor], w: Leaves, theta: Leaves, u: Leaves
    ) -> _Point:
        n, m = len(w), bound.arguments.num_hparams

        def residual(*leaves: Tensor) -> Leaves:
            return bound.residual(leaves[:n], leaves[n:], bound.function(*leaves))

        def gradients(*leaves: Tensor) -> Leaves:
            def lagrangian(*chosen: Tensor) -> Tensor:
                point = (*chosen, *leaves[n + m :])
                return outer(*point) - trees.dot(residual(*point), u)

            return autodiff.gradient(lagrangian, leaves[: n + m])

        inner, hparams = tuple(range(n)), tuple(range(n, n + m))
        first = autodiff.Linearization(residual, (*w, *theta), (inner, hparams))
        second = autodiff.Linearization(gradients, (*w, *theta), (inner,))
        return _Point(bound, outer, w, theta, u, first, second)

    @property
    def residual(self) -> Leaves:
        return self.first.outputs

    @property
    def adjoint_residual(self) -> Leaves:
        return self.second.outputs[: len(self.w)]

    @property
    def hypergradient(self) -> Leaves:
        return self.second.outputs[len(self.w) :]

    @property
    def operator(self) -> LinearOperator:
        symmetric = self.bound.condition.symmetric
        return LinearOperator(
            self.first.pull if symmetric else self.first.push, self.first.pull, symmetric=symmetric
        )

    def improve(self, num_steps: int) -> tuple[_Point, Leaves, Tensor]:
        """The point after a Newton step, the residual of a better adjoint, and the way there.

        That is the distance from the hypergradient here to the one there.
        """
        solver = GMRES(maxiter=num_steps)
        step, _ = solver.solve(self.operator, self.residual)
        w = trees.sub(self.w, step)
        better = _Point.make(self.bound, self.outer, w, self.theta, self.u)
        change, _ = solver.solve(better.operator.T, better.adjoint_residual)
        rest = better.operator.T.residual(change, better.adjoint_residual)
        hypergradient = trees.sub(better.hypergradient, better.first.pull(change, 1))
        return better, rest, trees.norm(trees.sub(hypergradient, self.hypergradient))


class _Norms(NamedTuple):
    gamma: Estimate
    estimated: bool
    inverse: Tensor
    cross: Estimate
    curvature: Estimate
    cross_curvature: Estimate

    @staticmethod
    def estimate(settings: ErrorBound, point: _Point) -> _Norms:
        first, second, w = point.first, point.second, point.w
        n, h = len(w), point.hypergradient
        zeros_w, zeros_h = trees.zeros_like(w), trees.zeros_like(h)

        def cross_gram(v: Leaves) -> tuple[Leaves, Leaves]:
            image = first.pull(v, 1)
            return image, first.push(image, 1)

        def cross_curvature_gram(v: Leaves) -> tuple[Leaves, Leaves]:
            image = second.pull((*zeros_w, *v))
            return image, second.push(image)[n:]

        steps = settings.num_steps
        ritz = eigenvalues(lambda v: second.pull((*v, *zeros_h)), w, steps)
        gamma, estimated = _gamma(settings, point)
        inverse = torch.where(gamma.lower > 0, 1 / gamma.lower, torch.inf)
        return _Norms(
            gamma,
            estimated,
            inverse,
            cross=singular_values(cross_gram, w, steps)[1],
            curvature=ritz.extremes()[3],
            cross_curvature=singular_values(cross_curvature_gram, h, steps)[1],
        )

    def terms(self, inner_residual: Tensor, linear_residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the residuals of the inner problem and of the linear solve contribute."""
        both = self.cross.upper * self.curvature.upper
        factor = self.cross_curvature.upper + _times(self.inverse, both)
        inner = _times(_times(self.inverse, inner_residual), factor)
        return inner, _times(self.inverse, self.cross.upper * linear_residual)


def _gamma(settings: ErrorBound, point: _Point) -> tuple[Estimate, bool]:
    bound, residual, w = point.bound, point.first, point.w
    given: float | None = settings.strong_convexity
    if settings.contraction is not None:
        given = 1 - settings.contraction
    norm = trees.norm(w)
    if given is not None:
        return Estimate(torch.full_like(norm, given), torch.zeros_like(norm)), False
    if bound.condition.kind == "fixed_point":

        def gram(v: Leaves) -> tuple[Leaves, Leaves]:
            image = trees.sub(v, residual.push(v))
            return image, trees.sub(image, residual.pull(image))

        _, contraction = singular_values(gram, w, settings.num_steps)
        return Estimate(1 - contraction.value, contraction.uncertainty), True

    def product(v: Leaves) -> Leaves:
        image = residual.pull(v)
        if bound.condition.symmetric:
            return image
        half = torch.full((), 0.5, dtype=norm.dtype, device=norm.device)
        return trees.scale(half, trees.add(image, residual.push(v)))

    return eigenvalues(product, w, settings.num_steps).extremes()[0], True


def _times(inverse: Tensor, value: Tensor) -> Tensor:
    """The product, with nothing left of an infinite factor where the other one is zero."""
    return torch.where(value == 0, value, inverse * value)
