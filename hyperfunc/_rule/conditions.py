"""What characterises the inner solution: a fixed-point map, inner loss, or optimality function.

Each is brought to one form, a residual ``r(w, theta) = shift w + scale P(w, theta)`` that vanishes
at the solution: ``P`` is the map itself for ``fixed_point`` (shift 1, scale -1), the gradient for
``inner_loss`` and the function itself for ``optimality`` (shift 0, scale 1).

An inner loss made by `hyperfunc.proximal` with weight ``mu`` and centre ``c`` keeps its quadratic
part apart: ``r = mu (w - c(theta)) + P`` with ``P`` the gradient of the loss without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._engine.finite_differences import DifferencedLinearization, Products
from hyperfunc._engine.shown import show
from hyperfunc._engine.solver_aux import UNTOLD
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.inner_solvers._composed import ComposedLoss
from hyperfunc.inner_solvers._proximal import ProximalLoss
from hyperfunc.inner_solvers._solvers import with_products
from hyperfunc.linear_solvers import LinearOperator

KINDS = ("fixed_point", "inner_loss", "optimality")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A user's function together with the kind of condition that it expresses."""

    kind: str
    fn: Callable[..., Any]
    unused: str | None = None  # what is said where it uses no hparams, if not what others say
    products: Products = "reverse"

    @property
    def scale(self) -> float:
        return -1.0 if self.kind == "fixed_point" else 1.0

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian of the residual is symmetric: it is the Hessian of a loss."""
        return self.kind == "inner_loss"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How ``(hparams, *args)`` is laid out flat: tensors are operands, the rest is constant."""

    frame: trees.Frame
    num_hparams: int

    @staticmethod
    def flatten(hparams: Any, args: tuple[Any, ...]) -> tuple[Arguments, Leaves, trees.TreeSpec]:
        """The layout, the tensors (those of hparams first), and the structure of hparams."""
        hparam_leaves, hparams_spec = trees.flatten_floating(hparams, "hparams")
        tensors, frame = trees.partition((hparams, *args))
        trees.refuse_holders(frame.constants, frame.spec, "(hparams, *args)")
        for i, constant in enumerate(frame.constants):
            if isinstance(constant, Iterator):
                raise TypeError(
                    f"{trees.paths(frame.spec, '(hparams, *args)')[i]} is {show(constant)}, "
                    f"which the "
                    f"first function to read it would use up. Pass list(...) of it"
                )
        arguments = Arguments(frame, len(hparam_leaves))
        return arguments, tracking.out_of_inference(tensors), hparams_spec

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        return tuple(self.frame.fill(tensors))


@dataclasses.dataclass(frozen=True, eq=False)
class BoundCondition:
    """A condition for params and arguments of a known layout, as a function of flat tensors.

    Params that are integers or bools are constants, and their tensors come last in ``theta``.
    """

    condition: Condition
    arguments: Arguments
    state: trees.StateSpec

    @property
    def params_spec(self) -> trees.TreeSpec:
        """The structure of ``w``."""
        return self.state.spec

    @property
    def num_params(self) -> int:
        return self.state.num_floating

    def params(self, w: Sequence[Any], theta: Sequence[Tensor]) -> TensorTree:
        """The params, whose integers, if they have any, are the last tensors of theta."""
        return trees.unflatten(self.state.full, self.leaves(w, theta))

    def leaves(self, w: Sequence[Any], theta: Sequence[Tensor]) -> Leaves:
        """The leaves of the params."""
        if not self.state.num_others:
            return tuple(w)
        return self.state.merge(w, theta[len(theta) - self.state.num_others :])

    def function(self, *tensors: Tensor) -> Leaves:
        """``P(w, theta)`` for the leaves of ``w`` followed by the tensors of ``theta``."""
        w, theta = tensors[: self.num_params], tensors[self.num_params :]
        hparams_and_args = self.arguments.unflatten(theta)
        if self.condition.kind == "inner_loss":
            return autodiff.gradient(lambda *w: self.value(self.loss, *w, *theta), w)
        name = self.condition.kind
        role = f"{name}(params, hparams, *args)"
        value = call(role, self.condition.fn, self.params(w, theta), *hparams_and_args)
        leaves, spec = trees.flatten(value)
        like, full, what = self.leaves(w, theta), self.state.full, f"the output of {name}"
        try:
            trees.check_like(leaves, spec, like, full, what, "params")
        except ValueError as error:
            if full.type is tuple and full.num_children == 2 and spec != full:
                raise ValueError(f"{error}{UNTOLD}") from None
            raise
        return self.state.split(leaves)[0]

    def value(self, loss: Callable[..., Any], *tensors: Tensor) -> Tensor:
        """An inner loss for the leaves of ``w`` followed by the tensors of ``theta``."""
        w, theta = tensors[: self.num_params], tensors[self.num_params :]
        at = self.params(w, theta), *self.arguments.unflatten(theta)
        return check_scalar(call("inner_loss(params, hparams, *args)", loss, *at), "inner_loss")

    def linearize(self, w: Leaves, theta: Leaves, wrt: Sequence[int]) -> autodiff.Linearization:
        """``P`` at a point; group 0 is ``w``, group 1 the tensors of ``theta`` at ``wrt``.

        For a loss made by `hyperfunc.composed`, group 0 is a step from ``w`` of the linear model.
        """
        n = self.num_params
        function, primals = self.function, (*w, *theta)
        if self.condition.symmetric and isinstance(self.loss, ComposedLoss):
            function = self.linearised_function
            primals = (*(torch.zeros_like(leaf) for leaf in w), *theta, *w)
        elif self.is_differenced:
            return self._by_differences(self.loss, w, theta, wrt)
        linearization = autodiff.Linearization(
            function,
            primals,
            (tuple(range(n)), tuple(n + i for i in wrt)),
            # where the hparams are a centre alone, the loss without the regulariser has none
            optional=1 if self.proximal else None,
        )
        return self._checked(linearization)

    @property
    def is_differenced(self) -> bool:
        """Whether products are differences of gradients of the inner loss."""
        return self.condition.symmetric and self.condition.products == "finite_difference"

    def _by_differences(
        self, loss: Callable[..., Any], w: Leaves, theta: Leaves, wrt: Sequence[int]
    ) -> autodiff.Linearization:
        n = self.num_params
        groups = tuple(range(n)), tuple(n + i for i in wrt)
        value = functools.partial(self.value, loss)
        return self._checked(DifferencedLinearization(value, (*w, *theta), n, groups))

    def _checked(self, linearization: autodiff.Linearization) -> autodiff.Linearization:
        if linearization.captures_gradient:
            raise ValueError(captured_message(self.condition.kind))
        return linearization

    def linearize_residual(
        self, w: Leaves, theta: Leaves, wrt: Sequence[int]
    ) -> tuple[autodiff.Linearization, LinearOperator]:
        """The residual at a point, in the groups of `linearize`, and ``A = dr/dw`` made of it."""
        n = self.num_params
        if self.is_differenced:
            linearization = self._by_differences(self.condition.fn, w, theta, wrt)
        else:
            linearization = autodiff.Linearization(
                lambda *leaves: self.residual_at(leaves[:n], leaves[n:]),
                (*w, *theta),
                (tuple(range(n)), tuple(n + i for i in wrt)),
            )
            self._checked(linearization)
        symmetric = self.condition.symmetric
        product = linearization.pull if symmetric else linearization.push
        operator = LinearOperator(
            product, linearization.pull, symmetric=symmetric, spec=self.params_spec
        )
        return linearization, operator

    @property
    def loss(self) -> Any:
        """The inner loss without its regulariser, or the function of another kind."""
        return self.proximal.loss if self.proximal else self.condition.fn

    def linearised_function(self, *tensors: Tensor) -> Leaves:
        """``P`` for a step from ``w``, the tensors of ``theta``, and ``w``, of a linear model."""
        n = self.num_params
        step, theta, w = tensors[:n], tensors[n:-n], tensors[-n:]
        loss: ComposedLoss = self.loss
        return loss.linearised_gradient(step, w, self.params, theta, self.arguments.unflatten)

    @property
    def proximal(self) -> ProximalLoss | None:
        """The inner loss, if it is one with a regulariser in closed form."""
        fn = self.condition.fn
        return fn if self.condition.kind == "inner_loss" and isinstance(fn, ProximalLoss) else None

    def shift(self, theta: Leaves) -> float | Tensor:
        if self.proximal:
            return self.proximal.weight_at(self.arguments.unflatten(theta)[0])
        return 1.0 if self.condition.kind == "fixed_point" else 0.0

    def regulariser(
        self, w: Leaves, theta: Leaves, wrt: Sequence[int]
    ) -> autodiff.Linearization | None:
        """What the residual holds besides ``P``, as a function of the tensors of theta at wrt."""
        proximal = self.proximal
        if proximal is None:
            return None
        n = self.num_params
        linearization = autodiff.Linearization(
            lambda *leaves: proximal.gradient(
                leaves[:n], self.params_spec, self.arguments.unflatten(leaves[n:])[0]
            ),
            (*w, *theta),
            (tuple(n + i for i in wrt),),
        )
        return self._checked(linearization)

    def center_weight(self, w: Leaves, theta: Leaves) -> float | None:
        """``mu`` where the regulariser is ``mu/2 ||w - hparams||^2`` with a number mu, or None."""
        proximal = self.proximal
        if proximal is None or proximal.center is not None:
            return None
        hparams = self.arguments.unflatten(theta)[0]
        proximal.center_at(hparams, w, self.params_spec)  # which are like params, or else it raises
        weight = proximal.weight_at(hparams)
        return None if isinstance(weight, Tensor) else weight

    def residual(self, w: Leaves, theta: Leaves, value: Leaves) -> Leaves:
        """The residual at a point, from the value ``P(w, theta)`` there."""
        if self.condition.kind == "fixed_point":
            return trees.sub(w, value)
        if self.proximal is None:
            return value
        hparams = self.arguments.unflatten(theta)[0]
        return trees.add(value, self.proximal.gradient(w, self.params_spec, hparams))

    def residual_at(self, w: Leaves, theta: Leaves) -> Leaves:
        return self.residual(w, theta, self.function(*w, *theta))

    def operator(self, linearization: autodiff.Linearization, theta: Leaves) -> LinearOperator:
        symmetric = self.condition.symmetric
        return LinearOperator(
            product=linearization.pull if symmetric else linearization.push,
            transposed_product=linearization.pull,
            shift=self.shift(theta),
            scale=self.condition.scale,
            symmetric=symmetric,
            spec=self.params_spec,
        )


def make_condition(
    inner_solver: Any,
    fixed_point: Any,
    inner_loss: Any,
    optimality: Any,
    products: Products = "reverse",
) -> Condition | None:
    """The one condition that was given, or that the inner solver carries, if any."""
    condition = _given_or_carried(inner_solver, fixed_point, inner_loss, optimality)
    if condition is None or products == "reverse":
        return condition
    return dataclasses.replace(
        condition, fn=with_products(condition.fn, products), products=products
    )


def _given_or_carried(
    inner_solver: Any, fixed_point: Any, inner_loss: Any, optimality: Any
) -> Condition | None:
    given = [
        Condition(kind, fn)
        for kind, fn in zip(KINDS, (fixed_point, inner_loss, optimality), strict=True)
        if fn is not None
    ]
    if len(given) > 1:
        names = " and ".join(f"{condition.kind}=" for condition in given)
        raise ValueError(
            f"got {names}; expected one of fixed_point=, inner_loss=, optimality=, since each of "
            f"them alone determines the inner solution. Drop the others"
        )
    for condition in given:
        if not callable(condition.fn):
            raise TypeError(
                f"{condition.kind}={show(condition.fn)} is not callable; expected a function "
                f"of (params, hparams, *args)"
            )
    if given:
        return given[0]
    carried = getattr(inner_solver, "condition", None)
    if isinstance(carried, tuple) and len(carried) == 2 and carried[0] in KINDS:
        return Condition(*carried)
    return None
