"""Truncated back-propagation: exact through the last steps of the inner optimiser."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hyperfunc._engine import checks, trees
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.flat import split
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import Loop, Method, Point, State, Steps, check_batch, taking, unbind

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(Steps)
def truncated(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_steps: int = 10,
    products: Products = "reverse",
    **steps: Unpack[Steps],
) -> Loop:
    r"""Truncated back-propagation: the exact hypergradient through some steps of the inner run.

    With :math:`\phi` a step of the inner optimiser, whose state is :math:`s`, one update takes
    :math:`T` steps from where the params are and differentiates them all, one after the other:

    .. math::
        (w_{t+1}, s_{t+1}) = \phi\bigl(\nabla_w \ell(w_t, \lambda; B_t), w_t, s_t, \lambda\bigr),
        \qquad
        \lambda \leftarrow \lambda - \gamma\, \frac{d}{d\lambda} E(w_T(\lambda), \lambda),

    with :math:`w_0` and :math:`s_0` held constant. The next update goes on from :math:`w_T` and
    :math:`s_T`. The direction is that of the steps themselves: those of Adam as well as plain ones,
    with the rates and decays that are functions of the hparams. What it leaves out is how the
    hparams have led to :math:`w_0`. Where the inner loss is strongly convex with constant
    :math:`\mu`, that is a bias of the order of :math:`(1 - \eta \mu)^T` for plain steps of size
    :math:`\eta`; the hparams settle where it vanishes only if the outer loss does not use them.

    One update takes 2 T gradients and T products of the inner loss, and the memory of one product
    beside T copies of the params and of the optimiser's state.

    ``num_inner_steps`` is :math:`T \ge 1`; the other arguments, what is returned and the errors are
    those of `pzobo`, and ``products`` is that of `soba`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.truncated(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.1, num_inner_steps=3
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.full((3,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.), tensor(3.))

    References:
        Shaban, Cheng, Hatch and Boots, Truncated back-propagation for bilevel optimization,
        arXiv 1810.10667.
    """
    return _Truncated(inner_loss, outer_loss, steps, num_inner_steps, products=products).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _Truncated(Method):
    num_inner_steps: int

    name = "truncated"
    adjoint = ""
    follows = "inner"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_count(self.name, "num_inner_steps", self.num_inner_steps)

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        end = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        batches = unbind(self.name, inner_batches, self.num_inner_steps, "num_inner_steps")
        points = []
        for batch in batches:
            points.append(end)
            end = end.step("inner", end.gradient(batch))
        d_w, d_h = end.outer_gradient(outer_batch)
        d_s = trees.zeros_like(_state(end)[0])
        for point, batch in zip(reversed(points), reversed(batches), strict=True):
            d_w, d_s, more = _back(point, batch, d_w, d_s)
            d_h = trees.add(d_h, more)
        return end.step("outer", d_h).leave()


def _back(
    point: Point, batch: tuple[Any, ...], d_w: Leaves, d_s: Leaves
) -> tuple[Leaves, Leaves, Leaves]:
    """What cotangents of params and state after a step are before it, and the part of hparams."""
    n, m = len(point.w), len(d_s)
    s, others, spec = _state(point)
    gradient = point.linearize(batch, range(n + len(point.h)))

    def step(*leaves: Tensor) -> Leaves:
        grads, w, s, h = split(leaves, n, n, m)
        optimizers = {**point.optimizers, "inner": spec.fill(s, others)}
        here = dataclasses.replace(point.at(h), w=w, optimizers=optimizers)
        moved = here.step("inner", grads)
        return (*moved.w, *_state(moved)[0])

    primals = (*gradient.outputs, *point.w, *s, *point.h)
    pulled = autodiff.Linearization(step, primals, (range(len(primals)),)).pull((*d_w, *d_s))
    of_grads, of_w, of_s, of_h = split(pulled, n, n, m)
    by_w, by_h = split(gradient.pull(of_grads), n)
    return trees.add(of_w, by_w), of_s, trees.add(of_h, by_h)


def _state(point: Point) -> tuple[Leaves, Leaves, trees.StateSpec]:
    """The inner optimiser's state: what has derivatives, what has none, and its structure."""
    leaves, full = trees.flatten(point.optimizers.get("inner", ()))
    spec = trees.StateSpec.of(full, leaves)
    return *spec.split(leaves), spec
