"""SAMA and DARTS: the hypergradient of one inner step, by differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from hyperfunc import optim
from hyperfunc._engine import trees
from hyperfunc._engine.finite_differences import Products, difference
from hyperfunc._engine.flat import split
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import (
    Loop,
    Method,
    Point,
    State,
    Steps,
    StepSize,
    check_batch,
    check_rate,
    taking,
)
from hyperfunc.optim._base import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(Steps)
def sama(inner_loss: Loss, outer_loss: Loss, **steps: Unpack[Steps]) -> Loop:
    r"""SAMA: one step of an adaptive optimiser, whose scaling is all that is left of the adjoint.

    With the step :math:`w^+ = \phi(g)` of the inner optimiser as a function of the gradient
    :math:`g = \nabla_w \ell(w, \lambda)`, one update is

    .. math::
        w \leftarrow \phi(g), \qquad
        u = -\Bigl(\frac{\partial \phi}{\partial g}\Bigr)^{\!\top} \nabla_w E(w, \lambda), \qquad
        \lambda \leftarrow \lambda - \gamma \Bigl(D_\lambda
        + \Bigl(\frac{\partial \phi}{\partial \lambda}\Bigr)^{\!\top} \nabla_w E\Bigr) ,

    the last term for coefficients of the optimiser that are functions of the hparams, such as a
    learned rate. The Hessian is taken for the identity, and :math:`\partial \phi / \partial g` from
    the optimiser itself: for `hyperfunc.optim.sgd` it is minus the step size, for Adam the scale of
    each entry too. The cross term is a difference of two gradients at :math:`w \pm \epsilon u`, so
    that first derivatives suffice: 3 gradients of the inner loss and one of the outer loss an
    update. The direction is biased, and as large as ``inner_lr``: ``outer_lr`` is to be larger by
    as much. The paper's further step of the params along :math:`u` is left out.

    ``State.adjoint`` is :math:`u`. With ``inner_lr`` the inner optimiser is
    ``hf.optim.adam(inner_lr)``, as in the paper. There is no step on the adjoint; all other
    arguments, what is returned and the errors are those of `soba`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.sama(
        ...     inner_loss, outer_loss, inner_optimizer=hf.optim.sgd(0.5), outer_lr=0.1
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
    return _SAMA(inner_loss, outer_loss, steps).loop()


@taking(Steps)
def darts(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    unroll_lr: StepSize | None = None,
    **steps: Unpack[Steps],
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

    ``unroll_lr`` is :math:`\xi`, a step size, by default ``inner_lr``; with 0 it is the paper's
    first-order variant, for losses whose hparams are in the outer loss too; a schedule of
    `hyperfunc.optim` that depends on the hparams is learned with them. ``State.adjoint`` is
    :math:`\xi \nabla_w E(w', \lambda)`. There is no step on the adjoint; all other arguments, what
    is returned and the errors are those of `soba`.

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
    return _DARTS(inner_loss, outer_loss, steps, unroll_lr=unroll_lr).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _OneStep(Method):
    products: Products = dataclasses.field(default="finite_difference", kw_only=True)

    adjoint: ClassVar[Any] = ""
    first_order = True

    def direction(
        self, point: Point, u: Leaves, outer_hparams: Leaves, batch: tuple[Any, ...]
    ) -> Leaves:
        """The direction of the hparams, with the cross term at the point."""

        def gradient_at(w: Leaves) -> Leaves:
            moved = dataclasses.replace(point, w=w)
            return moved.gradients("inner_loss", batch, by="h")[1]

        cross = difference(gradient_at, point.w, u)
        return trees.sub(outer_hparams, cross)


@dataclasses.dataclass(frozen=True, repr=False)
class _SAMA(_OneStep):
    name = "sama"
    follows = "inner"

    def __post_init__(self) -> None:
        super().__post_init__()
        lr = self.steps["inner"]
        if not isinstance(lr, optim.Optimizer):
            by_step = callable(lr) and not isinstance(lr, Schedule)
            adam = optim.adam(optim.schedule(_OfStep(lr)) if by_step else lr)
            object.__setattr__(self, "steps", {**self.steps, "inner": adam})

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "inner_batch", inner_batch)
        check_batch(self.name, "outer_batch", outer_batch)
        grads = point.gradient(inner_batch)
        moved = point.step("inner", grads)
        outer_params, outer_hparams = moved.outer_gradient(outer_batch)

        def along(*leaves: Tensor) -> Tensor:
            grads, h = split(leaves, len(point.w))
            return trees.dot(point.at(h).step("inner", grads).w, outer_params)

        of_grads, of_rates = split(autodiff.gradient(along, (*grads, *point.h)), len(point.w))
        u = trees.neg(of_grads)
        d_h = self.direction(moved, u, trees.add(outer_hparams, of_rates), inner_batch)
        return dataclasses.replace(moved, u=u).step("outer", d_h).leave()


@dataclasses.dataclass(frozen=True)
class _OfStep:
    """A function of the step as one of hparams and step."""

    fn: Callable[[Tensor], Any]

    def __call__(self, hparams: Any, step: Tensor) -> Any:
        return self.fn(step)


@dataclasses.dataclass(frozen=True, repr=False)
class _DARTS(_OneStep):
    unroll_lr: StepSize | None = dataclasses.field(kw_only=True)

    name = "darts"
    follows = "unroll"
    unseen = "but the step that is unrolled is that of unroll_lr. To learn it, hand it to unroll_lr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unroll_lr is None:
            lr = self.steps["inner"]
            if isinstance(lr, optim.Optimizer):
                raise TypeError(
                    "darts: got inner_optimizer without unroll_lr; expected the step size of the "
                    "step that is unrolled too, such as unroll_lr=0.1"
                )
            object.__setattr__(self, "unroll_lr", lr)
        if not callable(self.unroll_lr):
            check_rate(self.name, "unroll_lr", self.unroll_lr)

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "inner_batch", inner_batch)
        check_batch(self.name, "outer_batch", outer_batch)
        lr = point.rate("unroll_lr")
        grads = point.gradient(inner_batch)
        ahead = dataclasses.replace(point, w=trees.axpy(-lr, grads, point.w))
        outer_params, outer_hparams = ahead.outer_gradient(outer_batch)
        u = trees.axpy(lr, outer_params, trees.zeros_like(point.w))
        rule: Any = self.unroll_lr
        if isinstance(rule, Schedule):  # which hparams may be part of

            def along(*h: Tensor) -> Tensor:
                rate: Tensor = point.at(h).rate("unroll_lr")
                return -rate * trees.dot(grads, outer_params)

            of_rate = autodiff.gradient(along, point.h)
            outer_hparams = trees.add(outer_hparams, of_rate)
        moved = point.step("outer", self.direction(point, u, outer_hparams, inner_batch))
        moved = moved.step("inner", moved.gradient(inner_batch))
        return dataclasses.replace(moved, u=u).leave()
