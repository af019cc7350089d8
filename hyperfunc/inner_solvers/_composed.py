"""Inner losses given as a model and a convex loss of its output, with Gauss-Newton products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_scalar
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves, TensorTree

_MODEL = "composed: model(params, hparams, *args)"
_LOSS = "composed: loss(outputs, hparams, *args)"


def composed(model: Callable[..., TensorTree], loss: Callable[..., Any]) -> ComposedLoss:
    r"""The inner loss of a model's output, whose Hessian implicit methods replace by Gauss-Newton.

    .. math::
        \ell(w, \lambda) = L(f(w, \lambda), \lambda), \qquad
        G = J^\top \nabla^2_f L\; J, \quad J = \partial f / \partial w

    As an inner loss this is the same function as one written by hand. Implicit methods take
    products with :math:`G` where they would take them with the Hessian
    :math:`G + \sum_i \partial_i L\, \nabla^2_w f_i`: positive semi-definite by construction where L
    is convex in the output, so that `CG` works where the loss of a network is not convex in w. The
    hypergradient is then that of the problem with the model replaced by its linearisation
    :math:`f(w^*, \lambda) + J(w^*, \lambda) (w - w^*)`, which has the same solution and the cross
    term :math:`\partial_\lambda \nabla_w \ell` of the true loss. It is exact where the model is
    linear in w or the gradient of L vanishes, as where the data are fitted; elsewhere it is an
    approximation, which `check_hypergrad` will tell from differences, and which the bound of
    ``error_bound=`` includes. The same holds for second derivatives. G is singular where there are
    more parameters than outputs: add a regulariser by `proximal`, or a damping by `Damped`.

    Args:
        model: ``(params, hparams, *args) -> outputs``, a tree of floating-point tensors. With
            params among them, L may hold a convex regulariser too.
        loss: ``(outputs, hparams, *args) -> scalar``, convex in the outputs.

    Returns:
        A callable ``(params, hparams, *args) -> scalar`` for ``inner_loss=``, `hyperfunc.minimize`
        and `hyperfunc.proximal`.

    Raises:
        TypeError: one of them is not callable.

    Example:
        >>> def model(w, h, x):
        ...     return torch.tanh(x @ w)
        >>> def loss(outputs, h, x):
        ...     return ((outputs - h) ** 2).sum()
        >>> inner_loss = hf.proximal(hf.composed(model, loss), weight=0.1, center=torch.zeros_like)
        >>> inner_loss(torch.zeros(2), torch.ones(2), torch.eye(2))
        tensor(2.)

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002;
        Bae, Ng, Lo, Ghassemi and Grosse, If influence functions are the answer, then what is the
        question?, arXiv 2209.05364.
    """
    check_callable(model, "composed: model", "(params, hparams, *args) -> outputs")
    check_callable(loss, "composed: loss", "(outputs, hparams, *args) -> scalar")
    return ComposedLoss(model, loss)


@dataclasses.dataclass(frozen=True, eq=False)
class ComposedLoss:
    """``loss(model(params))``; made by `composed`."""

    model: Callable[..., TensorTree]
    loss: Callable[..., Any]

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> Any:
        outputs = call(_MODEL, self.model, params, hparams, *args)
        return call(_LOSS, self.loss, outputs, hparams, *args)

    def linearised_gradient(
        self,
        step: Leaves,
        w: Leaves,
        params: Callable[[Leaves, Leaves], TensorTree],
        theta: Leaves,
        unflatten: Callable[[Leaves], tuple[Any, ...]],
    ) -> Leaves:
        """The gradient after a step from w, with the model replaced by its linearisation at w.

        At a step of zero it is the gradient at w, and its derivative in the step is G there.
        """
        n, specs = len(w), []

        def outputs(*tensors: Tensor) -> Leaves:
            w, theta = tensors[:n], tensors[n:]
            value = call(_MODEL, self.model, params(w, theta), *unflatten(theta))
            leaves, output_spec = trees.flatten_floating(value, "the output of the model")
            specs.append(output_spec)
            return leaves

        def value(*leaves: Tensor) -> Tensor:
            tree = trees.unflatten(specs[0], leaves)
            return check_scalar(call(_LOSS, self.loss, tree, *unflatten(theta)), "inner_loss")

        model = autodiff.Linearization(outputs, (*w, *theta), (tuple(range(n)),))
        return model.pull(autodiff.gradient(value, trees.add(model.outputs, model.push(step))))
