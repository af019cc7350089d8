"""MA-SOBA, SRBA and FSLA: one step on all three variables, along better estimates than SOBA's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hyperfunc._engine import trees
from hyperfunc._engine.finite_differences import Products
from hyperfunc._types import Loss
from hyperfunc.bilevel._base import (
    AdjointSteps,
    Loop,
    State,
    StepSize,
    check_batch,
    directions,
    taking,
    unbind,
)
from hyperfunc.bilevel._recursive import Remembering, corrected, kept, kept_in_period

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(AdjointSteps)
def ma_soba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    outer_weight: StepSize = 0.1,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""MA-SOBA: `soba` with a moving average of the direction of the hparams.

    .. math::
        d \leftarrow a D_\lambda + (1 - a) d, \qquad \lambda \leftarrow \lambda - \gamma d,

    and `soba`'s steps on the params and on the adjoint, all directions at the old point. In the
    first step :math:`a = 1`. The rate is that of stochastic gradients for one level, under the
    smoothness of the losses that these need.

    ``outer_weight`` is :math:`a`, in [0, 1], of the order of ``outer_lr`` in theory: a number or a
    function of the step. All other arguments, and the errors, are those of `soba`, and so is the
    cost: the average is one more tree like hparams.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.ma_soba(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.02, outer_weight=0.5
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(400):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Chen, Xiao and Balasubramanian, Optimal algorithms for stochastic bilevel optimization under
        relaxed smoothness conditions, arXiv 2306.12067.
    """
    return _MASOBA(inner_loss, outer_loss, steps, outer_weight, products=products).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _MASOBA(Remembering):
    outer_weight: StepSize

    name = "ma_soba"
    directed = ("hparams",)
    weights = ("outer_weight",)

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        [average], _ = self.recall(point)
        d_w, d_u, new = directions(point.terms(inner_batch, outer_batch))
        d_h = trees.axpy(kept(point, "outer_weight"), trees.sub(average, new), new)
        return self.remember(point, point.stepped(d_w, d_u, d_h).leave(), [d_h])


@taking(AdjointSteps)
def srba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    period: int,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""SRBA: `soba` with directions that are corrected from step to step, as SARAH has it.

    For each of the three directions, with :math:`D` on the batches of this step at the point of
    now, and :math:`D'` on the same batches at the point before,

    .. math::
        d \leftarrow D \;\text{ where } t \bmod p = 0, \qquad
        d \leftarrow d + D - D' \;\text{ else}.

    Where ``state.step % period == 0``, hand over batches that hold all data, or many samples: the
    directions begin anew there. Between, small batches do, as the corrections vanish with the
    steps: with constant step sizes it converges at the rate of gradient descent, and with a period
    of the order of the square root of the number of samples it is optimal up to constants. The
    projection of the adjoint onto a ball, which the theory asks for, is left out.

    ``period`` is :math:`p \ge 1`. All other arguments are those of `soba`. A step costs two of
    `soba`'s, at both points; the memory holds two trees more of each variable.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Raises:
        TypeError: as `soba`; a state of another loop.
        ValueError: as `soba`; a period below 1.

    Example:
        >>> x, y = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
        >>> inner_loss = lambda w, h, x: ((w - h * x) ** 2).mean() / 2
        >>> outer_loss = lambda w, h, y: ((w - y) ** 2).mean() / 2
        >>> loop = hf.bilevel.srba(inner_loss, outer_loss, inner_lr=0.3, outer_lr=0.05, period=4)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for step, (i, j) in enumerate(torch.randint(2, (400, 2)).tolist()):
        ...     batches = ((x,), (y,)) if step % 4 == 0 else ((x[i],), (y[j],))
        ...     state = loop.update(state, *batches)
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Dagreou, Moreau, Vaiter and Ablin, A lower bound and a near-optimal algorithm for bilevel
        empirical risk minimization, arXiv 2302.08766; Nguyen, Liu, Scheinberg and Takac, SARAH,
        arXiv 1703.00102.
    """
    return _SRBA(inner_loss, outer_loss, steps, period, products=products).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _SRBA(Remembering):
    period: int

    name = "srba"
    directed = looks_back = ("params", "adjoint", "hparams")

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        last, before = self.recall(point)
        new, old = (directions(where.terms(inner_batch, outer_batch)) for where in (point, before))
        keep = kept_in_period(point, self.period)
        d = [corrected(keep, *each) for each in zip(new, old, last, strict=True)]
        return self.remember(point, point.stepped(*d).leave(), d)


@taking(AdjointSteps)
def fsla(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    outer_weight: StepSize = 0.1,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""FSLA: one step on the params, then on the adjoint, then on the hparams with momentum.

    .. math::
        w \leftarrow w - \rho D_w, \qquad u \leftarrow u - \rho_u D_u, \qquad
        d \leftarrow D_\lambda + (1 - a) (d - D_\lambda'), \qquad
        \lambda \leftarrow \lambda - \gamma d,

    each at the newest point: :math:`D_u` at the new params, :math:`D_\lambda` at the new params and
    adjoint; :math:`D_\lambda'` is that of the same batches at the variables before: params and
    adjoint at the start of this step, hparams at the start of the last. In the first step
    :math:`a = 1`.

    ``outer_weight`` is :math:`a`, in [0, 1]: a number or a function of the step. All other
    arguments, and the errors, are those of `soba`. One update takes four passes through the inner
    loss and two through the outer one; the memory holds two trees like hparams.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size 3: batches for the gradient, for the product, and for the
        cross term.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.fsla(inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.05)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.full((3,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Li, Gu and Huang, A fully single loop algorithm for bilevel optimization without Hessian
        inverse, arXiv 2112.04660.
    """
    return _FSLA(inner_loss, outer_loss, steps, outer_weight, products=products).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _FSLA(Remembering):
    outer_weight: StepSize

    name = "fsla"
    directed = looks_back = ("hparams",)
    weights = ("outer_weight",)

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        for_w, for_u, for_h = unbind(self.name, inner_batches, 3, "gradient + product + cross term")
        [last], before = self.recall(point)
        moved = point.step("inner", point.gradient(for_w))
        outer_params, outer_hparams = moved.outer_gradient(outer_batch)
        d_u = trees.sub(moved.product(point.u, for_u), outer_params)
        moved = moved.step("adjoint", d_u)
        new = trees.sub(outer_hparams, moved.cross(moved.u, for_h))
        old = trees.sub(before.outer_gradient(outer_batch)[1], before.cross(point.u, for_h))
        d_h = corrected(kept(point, "outer_weight"), new, old, last)
        return self.remember(point, moved.step("outer", d_h).leave(), [d_h])
