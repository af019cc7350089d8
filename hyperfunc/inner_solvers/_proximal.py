"""Inner losses with a quadratic regulariser that is handled in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_number, is_number
from hyperfunc._engine.shown import show, show_fields
from hyperfunc._engine.user_functions import call
from hyperfunc._torch.tangents import in_own_dtype
from hyperfunc._types import Leaves, Loss, TensorTree
from hyperfunc.optim._base import refuse_schedule

ScalarCoefficient: TypeAlias = float | Tensor | Callable[[TensorTree], Any]
"""A number, a 0-d tensor, or a function of the hparams that returns one of them."""


def proximal(
    loss: Loss,
    weight: ScalarCoefficient,
    center: TensorTree | Callable[[TensorTree], TensorTree] | None = None,
) -> ProximalLoss:
    r"""The inner loss with a quadratic regulariser, which costs no differentiation.

    .. math::
        \ell(w, \lambda) = \mathrm{loss}(w, \lambda)
        + \tfrac{\mu}{2} \lVert w - c(\lambda) \rVert^2

    is the biased regulariser of implicit MAML, of proximal meta-learning and, with centre zero,
    plain weight decay. As an inner loss this is the same function as the sum written by hand, but
    its quadratic part never goes through autograd: it enters gradient steps as
    :math:`\mu (w - c)`, products with the Hessian as :math:`H v + \mu v`, and the cross term of
    the hypergradient as :math:`\mu\, (\partial c)^\top u`.

    Args:
        loss: ``(params, hparams, *args) -> scalar``, the part without the regulariser.
        weight: :math:`\mu \ge 0`: a number, a 0-d tensor, or a function of hparams that returns a
            0-d tensor (the hypergradient then includes it).
        center: :math:`c`: a tree like params, a function of hparams that returns one, or ``None``
            for the hparams themselves.

    Returns:
        A callable ``(params, hparams, *args) -> scalar`` for ``inner_loss=``, `hyperfunc.minimize`
        and `hyperfunc.gradient_descent_map`.

    Raises:
        ValueError: a negative number as weight; a centre that is not like params.
        TypeError: the loss is not callable, or the weight is none of the three.

    Example:
        >>> def loss(w, meta, x, y):
        ...     return ((x @ w - y) ** 2).sum()
        >>> inner_loss = hf.proximal(loss, weight=2.0)
        >>> w, meta, x, y = torch.ones(3), torch.zeros(3), torch.eye(3), torch.ones(3)
        >>> inner_loss(w, meta, x, y)
        tensor(3.)

    References:
        Rajeswaran, Finn, Kakade and Levine, Meta-learning with implicit gradients,
        arXiv 1909.04630; Denevi et al., arXiv 1903.10399.
    """
    check_callable(loss, "proximal: loss", "(params, hparams, *args) -> scalar")
    refuse_schedule("proximal", "weight", weight)
    if is_number(weight):
        check_number("proximal", "weight", weight)
    elif not (callable(weight) or isinstance(weight, Tensor)):
        raise TypeError(
            f"proximal: weight is {show(weight)}; "
            f"expected a number >= 0, a 0-d tensor, or a function "
            f"of hparams that returns one"
        )
    return ProximalLoss(loss, weight, center)


@dataclasses.dataclass(frozen=True, eq=False)
class ProximalLoss:
    """``loss + weight/2 ||params - center||^2``; made by `proximal`."""

    loss: Callable[..., Any]
    weight: ScalarCoefficient
    center: Any

    __repr__ = show_fields

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> Any:
        leaves, _, state = trees.flatten_state(params, "params")
        offset = trees.sub(leaves, self.center_at(hparams, leaves, state.spec))
        norm_squared = sum(torch.sum(leaf * leaf).to(leaves[0]) for leaf in offset)
        loss = call("proximal: loss(params, hparams, *args)", self.loss, params, hparams, *args)
        return loss + 0.5 * self.weight_at(hparams) * norm_squared

    def weight_at(self, hparams: TensorTree) -> float | Tensor:
        """The weight for given hparams, a number or a 0-d tensor."""
        weight = in_own_dtype(self.weight(hparams)) if callable(self.weight) else self.weight
        if isinstance(weight, Tensor) and weight.ndim != 0:
            raise ValueError(
                f"proximal: weight has shape {tuple(weight.shape)}; expected a 0-d tensor"
            )
        return weight

    def center_at(self, hparams: TensorTree, like: Leaves, spec: trees.TreeSpec) -> Leaves:
        """The centre for given hparams, as leaves like params."""
        if self.center is None:
            center, name = hparams, "the hparams, as the centre of proximal,"
        else:
            center = self.center(hparams) if callable(self.center) else self.center
            name = "the centre of proximal"
        leaves, center_spec = trees.flatten(center)
        try:
            trees.check_like(leaves, center_spec, like, spec, name, "params")
        except ValueError as error:
            if self.center is not None:
                raise
            path = next(trees.paths_to_like(hparams, like, spec, "hparams"), None)
            if path == "hparams":  # all but a dtype or device
                raise
            advice = "a tree like params, or a function of hparams that returns one"
            if path is not None:
                advice = f"lambda hparams: {path}"
            raise ValueError(f"{error}. Pass center={advice}") from None
        return tuple(leaves)

    def at(self, hparams: TensorTree, like: Leaves, spec: trees.TreeSpec) -> Regulariser:
        """The regulariser at given hparams, for params of given structure."""
        return Regulariser(self.weight_at(hparams), self.center_at(hparams, like, spec))

    def gradient(self, w: Leaves, spec: trees.TreeSpec, hparams: TensorTree) -> Leaves:
        """The gradient ``weight (w - center)`` of the regulariser."""
        return trees.scale(self.weight_at(hparams), trees.sub(w, self.center_at(hparams, w, spec)))


class Regulariser(NamedTuple):
    """``weight/2 ||params - center||^2`` for params as leaves."""

    weight: float | Tensor
    center: Leaves

    def add_gradient(self, grads: Leaves, w: Leaves) -> Leaves:
        """``grads + weight (w - center)``."""
        offset = trees.sub(w, self.center)
        return trees.axpy(self.weight, offset, grads, out=trees.reusable(offset, grads))

    def descend(self, w: Leaves, grads: Leaves, rate: float) -> Leaves:
        """``w - rate (grads + weight (w - center))`` for a number as weight, in two passes."""
        t = rate * self.weight
        moved = tuple([torch.lerp(u, c, t) for u, c in zip(w, self.center, strict=True)])
        return trees.axpy(-rate, grads, moved, out=trees.reusable(moved, grads))
