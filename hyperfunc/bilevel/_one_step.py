"""SAMA and DARTS: the hypergradient of one inner step, by differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from hyperfunc import optim
from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.finite_differences import Products, difference
from hyperfunc._engine.flat import scatter
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves, Loss, TensorTree
from hyperfunc.bilevel._base import Loop, Method, Point, State, StepSize, check_batch, check_rate
from hyperfunc.optim._base import Optimizer, check_optimizer


def sama(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    optimizer: Callable[[Any], Optimizer] = optim.adam,
) -> Loop:
    r"""SAMA: one step of an adaptive optimiser, whose scaling is all that is left of the adjoint.

    With the step :math:`w^+ = \phi(g)` of the inner optimiser as a function of the gradient
    :math:`g = \nabla_w \ell(w, \lambda)`, one update is

    .. math::
        w \leftarrow \phi(g), \qquad
        u = -\Bigl(\frac{\partial \phi}{\partial g}\Bigr)^{\!\top} \nabla_w E(w, \lambda), \qquad
        \lambda \leftarrow \lambda - \gamma D_\lambda .

    The Hessian is taken for the identity, and :math:`\partial \phi / \partial g` from the optimiser
    itself: for `hyperfunc.optim.sgd` it is minus the step size, for Adam the scale of each entry
    too. The cross term is a difference of two gradients at :math:`w \pm \epsilon u`, so that first
    derivatives suffice: 3 gradients of the inner loss and one of the outer loss an update. The
    direction is biased, and as large as ``inner_lr``: ``outer_lr`` is to be larger by as much. The
    paper's further step of the params along :math:`u` is left out.

    ``State.adjoint`` is :math:`u`, and ``State.memory`` the state of the optimiser.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        inner_lr: step size of the optimiser.
        outer_lr: step size on the hparams.
        optimizer: makes the optimiser from the step size: a function of `hyperfunc.optim`, or one
            of your own around it, such as ``lambda lr: hf.optim.adam(lr, betas=(0.8, 0.99))``.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Raises:
        TypeError: as `soba`; an optimizer that is no function, or does not make an
            `hyperfunc.optim.Optimizer`.
        ValueError: as `soba`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.sama(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.1, optimizer=hf.optim.sgd
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params.round(decimals=3), state.hparams.round(decimals=3)
        (tensor(6.), tensor(3.))

    References:
        Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing, Making scalable meta learning
        practical, arXiv 2310.05674.
    """
    return _SAMA(inner_loss, outer_loss, inner_lr, outer_lr, None, optimizer=optimizer).loop()


def darts(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    unroll_lr: StepSize | None = None,
) -> Loop:
    r"""DARTS: the hypergradient of one unrolled step, then the step itself.

    With :math:`w' = w - \xi \nabla_w \ell(w, \lambda)`, one update is

    .. math::
        \lambda &\leftarrow \lambda - \gamma \bigl(\nabla_\lambda E(w', \lambda)
        - \xi \nabla^2_{\lambda w} \ell(w, \lambda) \nabla_w E(w', \lambda)\bigr), \\
        w &\leftarrow w - \rho \nabla_w \ell(w, \lambda) ,

    the second with the new hparams. The cross term is a difference of two gradients, so that first
    derivatives suffice: 4 gradients of the inner loss and one of the outer loss an update. The
    direction is biased, and as large as :math:`\xi`: ``outer_lr`` is to be larger by as much.

    ``unroll_lr`` is :math:`\xi`, by default ``inner_lr``; with 0 it is the paper's first-order
    variant, for losses whose hparams are in the outer loss too. ``State.adjoint`` is
    :math:`\xi \nabla_w E(w', \lambda)`. All other arguments, what is returned and the errors are
    those of `soba`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.darts(inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.1)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params.round(decimals=3), state.hparams.round(decimals=3)
        (tensor(6.), tensor(3.))

    References:
        Liu, Simonyan and Yang, DARTS: differentiable architecture search, arXiv 1806.09055.
    """
    unroll_lr = inner_lr if unroll_lr is None else unroll_lr
    return _DARTS(inner_loss, outer_loss, inner_lr, outer_lr, None, unroll_lr=unroll_lr).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _OneStep(Method):
    products: Products = dataclasses.field(default="finite_difference", kw_only=True)

    def direction(
        self, point: Point, u: Leaves, outer_hparams: Leaves, batch: tuple[Any, ...]
    ) -> Leaves:
        """The direction of the hparams, with the cross term at the point."""
        n = len(point.w)
        primals = (*point.w, *point.h)
        value = point.loss("inner_loss", batch)
        cross = difference(value, primals, range(n), u, range(n, len(primals)), tracked=False)
        return trees.sub(outer_hparams, cross)


@dataclasses.dataclass(frozen=True, repr=False)
class _SAMA(_OneStep):
    optimizer: Callable[[Any], Optimizer] = dataclasses.field(kw_only=True)

    name = "sama"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_callable(self.optimizer, "sama: optimizer", "(step size) -> hf.optim.Optimizer")
        self.optimizer_at(0.0)

    def optimizer_at(self, lr: Any) -> Optimizer:
        """The optimiser with a step size."""
        return check_optimizer(self.optimizer(lr), "sama: optimizer")

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        state = super().init(params, hparams)
        return state._replace(memory=self.optimizer_at(0.0).init(state.params))

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "inner_batch", inner_batch)
        check_batch(self.name, "outer_batch", outer_batch)
        optimizer = self.optimizer_at(point.rate("inner_lr"))
        loss, n = point.loss("inner_loss", inner_batch), len(point.w)
        found = autodiff.gradient_used(
            lambda *w: loss(*w, *point.h), point.w, create_graph=False, used=[]
        )
        used = [i for i, grad in enumerate(found) if grad is not None]

        def step(*grads: Any) -> tuple[Leaves, Any]:
            tree = trees.unflatten(point.params_spec, scatter(grads, used, n))
            params, memory = optimizer.update(tree, state.memory, state.params, state.hparams)
            return tuple(trees.flatten(params)[0]), memory

        grads = tuple(grad for grad in found if grad is not None)
        w, memory = step(*grads)
        moved = dataclasses.replace(point, w=w)
        outer_params, outer_hparams = moved.outer_gradient(outer_batch)
        scaled: Leaves = ()
        if grads:
            scaled = autodiff.gradient(lambda *g: trees.dot(step(*g)[0], outer_params), grads)
        u = tuple(
            torch.zeros_like(leaf) if each is None else -each
            for leaf, each in zip(w, scatter(scaled, used, n), strict=True)
        )
        d_h = self.direction(moved, u, outer_hparams, inner_batch)
        h = trees.axpy(-point.rate("outer_lr"), d_h, point.h)
        return point.leave(w, u, h)._replace(memory=memory)


@dataclasses.dataclass(frozen=True, repr=False)
class _DARTS(_OneStep):
    unroll_lr: StepSize = dataclasses.field(kw_only=True)

    name = "darts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.unroll_lr):
            check_rate(self.name, "unroll_lr", self.unroll_lr)

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "inner_batch", inner_batch)
        check_batch(self.name, "outer_batch", outer_batch)
        lr = point.rate("unroll_lr")
        ahead = dataclasses.replace(point, w=trees.axpy(-lr, point.gradient(inner_batch), point.w))
        outer_params, outer_hparams = ahead.outer_gradient(outer_batch)
        u = trees.axpy(lr, outer_params, trees.zeros_like(point.w))
        d_h = self.direction(point, u, outer_hparams, inner_batch)
        moved = dataclasses.replace(point, h=trees.axpy(-point.rate("outer_lr"), d_h, point.h))
        w = trees.axpy(-point.rate("inner_lr"), moved.gradient(inner_batch), point.w)
        return moved.leave(w, u, moved.h)
