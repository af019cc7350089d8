"""Fixed-point maps of gradient descent and of proximal gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.shown import show_fields
from hyperfunc._torch import tracking
from hyperfunc._torch.tangents import in_own_dtype
from hyperfunc._types import Loss, ParamsFunction, TensorTree
from hyperfunc.inner_solvers._gradients import InnerGradient
from hyperfunc.inner_solvers._proximal import ProximalLoss, ScalarCoefficient
from hyperfunc.optim._base import refuse_schedule
from hyperfunc.prox._base import check_prox


def gradient_descent_map(inner_loss: Loss, lr: ScalarCoefficient) -> ParamsFunction:
    r"""The fixed-point map of gradient descent.

    $$\varphi(w, \lambda, \ldots) = w - \eta(\lambda)\, \nabla_w \ell(w, \lambda, \ldots)$$

    Args:
        inner_loss: ``(params, hparams, *args) -> scalar``, pure.
        lr: the step size $\eta$: a number, a 0-d tensor, or a function of the hparams.

    Returns:
        The map ``(params, hparams, *args) -> params``.

    Raises:
        TypeError: if ``inner_loss`` is not a function.

    Example:
        >>> phi = hf.gradient_descent_map(lambda w, h: h * (w**2).sum(), lr=0.25)
        >>> phi(torch.tensor([2.0, 4.0]), torch.tensor(1.0))
        tensor([1., 2.])
    """
    check_callable(inner_loss, "inner_loss", "(params, hparams, *args) -> scalar")
    refuse_schedule("gradient_descent_map", "lr", lr)
    return DescentMap(inner_loss, lr)


def proximal_gradient_map(
    loss: Loss, prox: Callable[..., TensorTree], lr: ScalarCoefficient
) -> ParamsFunction:
    r"""The fixed-point map of proximal gradient descent, for constraints and non-smooth terms.

    $$\varphi(w, \lambda, \ldots) = \mathrm{prox}_{\eta g}\big(w - \eta(\lambda)\, \nabla_w \ell(w,
    \lambda, \ldots)\big)$$

    Its fixed points minimise $\ell + g$ for convex $g$; where $g$ is the indicator of a set, $\ell$
    over that set. Iterate it with `iterate`, or give it as ``fixed_point=`` for a solution found by
    other means. Its operator is not symmetric, so `CG` does not apply: `GMRES`, `NormalCG` and
    `FixedPoint` do. The solution has a kink where the set of zeros (or of active constraints)
    changes; everywhere else the hypergradient is exact, as the derivative on that set.

    Args:
        loss: ``(params, hparams, *args) -> scalar``, the smooth part $\ell$, pure.
        prox: ``(params, hparams, lr) -> params``, the operator of $g$; see `hyperfunc.prox`.
        lr: the step size $\eta$, as for `gradient_descent_map`, below 2 over the largest curvature
            of the loss. The operator gets its value.

    Returns:
        The map ``(params, hparams, *args) -> params``.

    Raises:
        TypeError: if ``loss`` or ``prox`` is not a function, or ``prox`` still makes an operator.

    Example:
        The lasso, and the derivative of its solution with respect to the regulariser:

        >>> X, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 0.5])
        >>> def loss(w, log_reg):
        ...     return 0.5 * ((X @ w - y) ** 2).sum()
        >>> phi = hf.proximal_gradient_map(loss, hf.prox.l1(lambda log_reg: log_reg.exp()), lr=0.2)
        >>> solver = hf.iterate(phi, 50, init=lambda log_reg: torch.zeros(2))
        >>> solve = hf.implicit_diff(solver, method="gmres")
        >>> solve(torch.tensor(0.0)), torch.func.jacrev(solve)(torch.tensor(0.0))
        (tensor([1.2500, 0.0000]), tensor([-0.2500, 0.0000]))

    References:
        Bertrand et al., Implicit differentiation of Lasso-type models for hyperparameter
        optimization, 2020, arXiv 2002.08943.
    """
    check_callable(loss, "loss", "(params, hparams, *args) -> scalar")
    refuse_schedule("proximal_gradient_map", "lr", lr)
    return DescentMap(loss, lr, check_prox(prox, "proximal_gradient_map"))


@dataclass(frozen=True, eq=False)
class DescentMap:
    loss: Loss
    lr: ScalarCoefficient
    prox: Callable[..., TensorTree] | None = None
    products: Products = "reverse"

    __repr__ = show_fields

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> TensorTree:
        lr = in_own_dtype(self.lr(hparams)) if callable(self.lr) else self.lr
        leaves, others, state = trees.flatten_state(params, "params")
        operands, structure = trees.flatten((params, hparams, args))
        trees.refuse_holders(operands, structure, "(params, hparams, args)")
        regularised = self.loss if isinstance(self.loss, ProximalLoss) else None
        loss = self.loss if regularised is None else regularised.loss
        tracked = tracking.is_tracked(operands)
        grads = InnerGradient(loss, state, hparams, args, tracked, self.products)(leaves, others)
        if regularised is not None:
            grads = regularised.at(hparams, leaves, state.spec).add_gradient(grads, leaves)
        moved = trees.axpy(-lr, grads, leaves)
        if self.prox is None:
            return state.fill(moved, others)
        proximal = self.prox(trees.unflatten(state.spec, moved), hparams, lr)
        return state.fill(trees.flatten(proximal)[0], others) if others else proximal
