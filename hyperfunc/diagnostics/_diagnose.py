"""Facts about an inner problem at a point, and the method that they call for."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.finite_differences import Products, check_products
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.shown import show
from hyperfunc._rule.conditions import Arguments, BoundCondition, make_condition
from hyperfunc._torch import tracking
from hyperfunc._torch.unsupported import explained
from hyperfunc._types import Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.diagnostics._choice import choose, condition_number, make_solver
from hyperfunc.linear_solvers import GMRES, AbstractLinearSolver
from hyperfunc.linear_solvers._spectrum import Estimate, Spectrum, measure

MOST_STEPS = 5000  # of an iteration that is recommended

REASONS = {
    "cg": "A is symmetric, and no direction that was explored has negative curvature",
    "fixed_point": "the map contracts fast",
    "gmres": "A is not symmetric, or not positive definite, and no map contracts fast",
    "normal_cg": "A is not positive definite, or so well conditioned that its square may be solved",
    "dense": "there are so few inner parameters that the matrix costs less than an iteration",
}


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The method that the facts call for.

    Attributes:
        method: the method object, ready to be passed to `hyperfunc.hypergrad`.
        reason: why, in words.
        num_products: for each method by its short name, the products with ``A`` or its transpose
            that it is expected to need for the accuracy, added up over the tasks; methods whose
            assumptions do not hold are left out.
    """

    method: AbstractLinearSolver
    reason: str
    num_products: dict[str, int]


class Diagnosis(NamedTuple):
    """What was found at a point; a tree of 0-d tensors (batched under ``vmap``).

    With ``r`` the residual of the condition (``w - phi(w)``, the inner gradient, or the optimality
    function) and ``A = dr/dw``, or the Gauss-Newton matrix of a loss made by `composed`. Each
    `Estimate` is a pair of a ``value`` and its ``uncertainty``.

    Attributes:
        residual: ``||r||``; its uncertainty is what rounding ``params`` to their dtype does to it.
        contraction: ``||I - s A||``: below 1 where the map ``w - s r(w)`` is a contraction.
        spectral_radius: that of ``I - s A``: the rate of the last iterations of this map.
        step_size: ``s``: 1 for a fixed-point map, otherwise the best or a usual one.
        asymmetry: ``||A - A^T|| / ||A||`` in the Frobenius norm; 0 for an inner loss. Its
            uncertainty is a standard error.
        eig_min: smallest curvature, the least eigenvalue of ``(A + A^T) / 2``.
        eig_max: largest curvature.
        curvature_signs: int64, of shape (3,): among the curvatures that were found, how many are
            negative, zero up to rounding, and positive.
        condition_number: ``||A|| ||A^{-1}||``, Inf if singular.
        sigma_min: smallest singular value ``1 / ||A^{-1}||``.
        sigma_max: largest singular value ``||A||``.
        symmetric: bool, whether the asymmetry is rounding noise.
        is_map: bool, whether the condition is a fixed-point map.
        size: int64, the number of inner parameters.
        num_products: int64, the products that the diagnosis took.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> facts = hf.diagnose(
        ...     torch.zeros(2), torch.ones(2), inner_loss=lambda w, h: w @ A @ w / 2
        ... )
        >>> facts.eig_min.value, facts.eig_max.value, facts.curvature_signs, facts.method
        (tensor(-1.0000), tensor(2.0000), tensor([1, 0, 1]), Dense())
    """

    residual: Estimate
    contraction: Estimate
    spectral_radius: Estimate
    step_size: Tensor
    asymmetry: Estimate
    eig_min: Estimate
    eig_max: Estimate
    curvature_signs: Tensor
    condition_number: Estimate
    sigma_min: Estimate
    sigma_max: Estimate
    symmetric: Tensor
    is_map: Tensor
    size: Tensor
    num_products: Tensor

    @property
    def method(self) -> AbstractLinearSolver:
        """The recommended method, for the default accuracy of its dtype."""
        return self.recommend().method

    @property
    def advice(self) -> str:
        """The recommendation in words."""
        chosen, kappa = self.recommend(), self.condition_number
        counts = ", ".join(f"{name} {count}" for name, count in chosen.num_products.items())
        lines = [f"method: {chosen.method!r}", f"  because {chosen.reason}"]
        lines.append(f"  products expected at most, by method: {counts}")
        notes = {
            "for GMRES no rate is known here; should it stagnate, NormalCG has one": (
                isinstance(chosen.method, GMRES) and "gmres" not in chosen.num_products
            ),
            "A has negative curvature: these params are no minimum of an inner loss, but a saddle "
            "or maximum": (self.curvature_signs[..., 0] > 0).any() and self.symmetric.all(),
            "A is singular to working precision: the solution does not depend smoothly on hparams. "
            "Add a regulariser, or use hf.Damped": kappa.value.isinf().any(),
            "the condition number is a lower bound rather than an estimate: raise num_steps": (
                (kappa.uncertainty > 0.5 * kappa.value).any()
            ),
            "A has non-finite entries (NaN or Inf)": not self.sigma_max.value.isfinite().all(),
        }
        return "\n".join([*lines, *(f"  {note}" for note, holds in notes.items() if holds)])

    def recommend(self, accuracy: float | None = None) -> Recommendation:
        """The method for a relative accuracy of the adjoint, one for all tasks.

        Args:
            accuracy: between 0 and 1, the ``rtol`` of the method; by default that of the methods,
                ``eps ** 0.75``.

        Raises:
            ValueError: for an accuracy that is not between 0 and 1.
        """
        if accuracy is not None and not 0 < accuracy < 1:
            raise ValueError(f"accuracy is {show(accuracy)}; expected a number between 0 and 1")
        eps = torch.finfo(self.residual.value.dtype).eps
        # a diagnosis that comes out of vmap holds a batch of equal sizes and kinds
        size, is_map = int(self.size.reshape(-1)[0]), bool(self.is_map.reshape(-1)[0])
        spectrum = Spectrum(**{name: getattr(self, name) for name in Spectrum._fields})
        choice = choose(spectrum, size, is_map, accuracy or eps**0.75)
        products = {name: count for name, count in choice.products.items() if count >= 0}
        steps = products.get(choice.name, products.get("normal_cg", 0))
        if choice.name == "normal_cg":
            steps = steps // 2
        method = make_solver(choice.name, min(max(2 * steps, 1000), MOST_STEPS), accuracy)
        reason = REASONS[choice.name]
        if why := self._hopeless(choice.name, steps):
            reason = f"no method is good here, and this one {why}"
        return Recommendation(method, reason, products)

    def _hopeless(self, name: str, steps: int) -> str:
        """Why the method that was chosen is not good, or nothing if it is."""
        signs, kappa = self.curvature_signs.reshape(-1, 3).sum(0).tolist(), self.condition_number
        if name == "dense":
            singular = kappa.value.isinf().any()
            text = "solves only systems that have a solution: A is singular to working precision"
            return text if singular else ""
        ill = (kappa.value >= torch.finfo(kappa.value.dtype).eps ** -0.75).any()
        if steps <= MOST_STEPS and not ill:
            return ""
        causes = f"the condition number of A is {_number(kappa.value)}"
        if signs[0] and self.symmetric.all():
            causes += (
                f", and these params are not at a minimum, with negative curvature in {signs[0]} "
                f"of {sum(signs)} directions"
            )
        remedy = "Train the inner problem on, or regularise it (hf.proximal, hf.Damped)"
        return f"may need more than {MOST_STEPS} steps: {causes}. {remedy}"

    def __str__(self) -> str:
        measured = {
            "inner residual": self.residual,
            f"contraction factor of w - {_number(self.step_size)} r(w)": self.contraction,
            "spectral radius of its Jacobian": self.spectral_radius,
            "asymmetry of A": self.asymmetry,
            "smallest curvature": self.eig_min,
            "largest curvature": self.eig_max,
            "smallest singular value of A": self.sigma_min,
            "largest singular value of A": self.sigma_max,
            "condition number of A": self.condition_number,
        }
        rows = {name: f"{_number(a)} ± {_number(b)}" for name, (a, b) in measured.items()}
        signs = self.curvature_signs.reshape(-1, 3).sum(0).tolist()
        rows["curvatures found"] = f"{signs[0]} negative, {signs[1]} zero, {signs[2]} positive"
        width = max(map(len, rows))
        return "\n".join([*(f"{name:<{width}}  {row}" for name, row in rows.items()), self.advice])


def diagnose(
    params: TensorTree,
    hparams: TensorTree,
    *args: Any,
    fixed_point: ParamsFunction | None = None,
    inner_loss: Loss | None = None,
    optimality: ParamsFunction | None = None,
    num_steps: int = 20,
    seed: int = 0,
    products: Products = "reverse",
) -> Diagnosis:
    r"""Measure what methods assume, at a point: contraction, symmetry, curvature, conditioning.

    With the residual :math:`r` of the condition and :math:`A = \partial_w r`, products with
    :math:`A` and :math:`A^\top` on random vectors tell

    .. math::
        \lVert r \rVert, \quad \lVert I - sA \rVert, \quad \rho(I - sA), \quad
        \lVert A - A^\top \rVert / \lVert A \rVert, \quad
        \lambda\big(\tfrac12 (A + A^\top)\big), \quad \sigma(A),

    by the methods of Lanczos, Golub and Kahan, and Arnoldi. No matrix is formed; ``num_steps``
    vectors are kept. With as many steps as inner parameters all but the asymmetry is exact.

    Args:
        params: the point: a tree of floating-point tensors, usually the inner solution.
        hparams: the outer variables.
        *args: what the condition takes besides.
        fixed_point: the condition, as for `hyperfunc.hypergrad`: exactly one of the three.
        inner_loss: see ``fixed_point``.
        optimality: see ``fixed_point``.
        num_steps: dimension of the Krylov spaces, >= 1: the products are this many for an inner
            loss, up to 7 times as many for other conditions.
        seed: of the random vectors, an integer.
        products: ``"reverse"`` or ``"finite_difference"``; see `hyperfunc.hypergrad`.

    Returns:
        A `Diagnosis`, detached from the graph. Its ``str`` is a table, ``method`` the recommended
        method, ``advice`` the reasons in words, and ``recommend(accuracy)`` the method with the
        number of products that it is expected to need.

    Raises:
        ValueError: none or several conditions, or a number of steps below 1.

    Example:
        >>> facts = hf.diagnose(
        ...     torch.zeros(2), torch.ones(2), inner_loss=lambda w, h: 2 * w[0] ** 2 + w[1] ** 2 / 2
        ... )
        >>> facts.eig_min.value, facts.eig_max.value, facts.condition_number.value
        (tensor(1.0000), tensor(4.0000), tensor(4.0000))
        >>> facts.recommend(accuracy=1e-3).num_products["cg"]
        2

    References:
        The rates: Grazzi, Franceschi, Pontil and Salzo, arXiv 2006.16218.
        The estimates: Golub and Van Loan, Matrix computations, chapter 10.
    """
    check_products(products)
    condition = make_condition(None, fixed_point, inner_loss, optimality, products)
    if condition is None:
        raise ValueError(
            "diagnose: got none of fixed_point=, inner_loss=, optimality=. Pass the one that "
            "characterises params"
        )
    check_count("diagnose", "num_steps", num_steps)
    leaves, others, state = trees.flatten_state(params, "params")
    arguments, theta, _ = Arguments.flatten(hparams, args)
    bound, theta = BoundCondition(condition, arguments, state), (*theta, *others)
    with explained("diagnose", lambda: trees.named_tensors(hparams, args)):
        return diagnose_bound(
            bound, tracking.detach(leaves), tracking.detach(theta), num_steps, seed
        )


def diagnose_bound(
    bound: BoundCondition, w: Leaves, theta: Leaves, num_steps: int, seed: int = 0
) -> Diagnosis:
    is_map = bound.condition.kind == "fixed_point"
    linearization = bound.linearize(w, theta, ())
    operator = bound.operator(linearization, theta)
    norm = trees.norm(bound.residual(w, theta, linearization.outputs))
    rounded = tuple(leaf * sign for leaf, sign in zip(w, random_signs(w, seed), strict=True))
    noise = trees.epsilon(w) * (trees.norm(operator.mv(rounded)) + norm)
    spectrum = measure(operator, w, num_steps, is_map=is_map, full=True, seed=seed)
    facts = spectrum._asdict()
    num_products = facts.pop("num_products") + 1
    return Diagnosis(
        residual=Estimate(norm, noise),
        condition_number=condition_number(spectrum),
        is_map=torch.full_like(num_products, is_map, dtype=torch.bool),
        size=torch.full_like(num_products, sum(leaf.numel() for leaf in w)),
        num_products=num_products,
        **facts,
    )


def _number(value: Tensor) -> str:
    """A number, or the range of those of several tasks."""
    low, high = float(value.min()), float(value.max())
    return f"{low:.4g}" if low == high or value.ndim == 0 else f"{low:.4g} to {high:.4g}"
