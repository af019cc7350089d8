"""PZOBO: the response of the params by differences along random directions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hyperfunc._engine import checks, trees
from hyperfunc._torch import sharding
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import Loop, Method, Point, State, Steps, check_batch, taking, unbind
from hyperfunc.bilevel._random import normal

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(Steps)
def pzobo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_steps: int = 10,
    num_directions: int = 1,
    smoothing: float = 0.01,
    seed: int = 0,
    **steps: Unpack[Steps],
) -> Loop:
    r"""PZOBO: the response of the params by differences along random directions, without products.

    Let :math:`w^T(\lambda)` be the params after :math:`T` steps on the inner loss from where they
    are. With :math:`v_j` drawn from the normal distribution, one update is

    .. math::
        d = \nabla_\lambda E + \frac1J \sum_{j=1}^J
        \Bigl\langle \frac{w^T(\lambda + \mu v_j) - w^T(\lambda)}{\mu}, \nabla_w E \Bigr\rangle v_j,
        \qquad w \leftarrow w^T(\lambda), \qquad \lambda \leftarrow \lambda - \gamma d,

    with the gradients of :math:`E` at :math:`w^T(\lambda)`. It takes gradients alone, of the inner
    loss by params. The variance grows with the number of hparams over :math:`J`, and does not
    vanish at the solution, so ``outer_lr`` must decrease.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        num_inner_steps: :math:`T \ge 1`.
        num_directions: :math:`J \ge 1`; one update takes ``T (J + 1)`` inner gradients.
        smoothing: :math:`\mu > 0`, at least ten times the precision of the dtypes.
        seed: an integer >= 0; it and the step of the state alone determine what is drawn, the same
            for all tasks under ``vmap`` that are at the same step.
        steps: ``inner_lr``, ``outer_lr`` or optimisers, as in `soba`; there is none on an adjoint.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size ``T``. The adjoint of the state stays zero.

    Raises:
        TypeError: as `soba`.
        ValueError: as `soba`; a number out of its range.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.pzobo(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.05, num_inner_steps=3
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.full((3,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Sow, Ji and Liang, On the convergence theory for Hessian-free bilevel algorithms,
        arXiv 2110.07004.
    """
    return _PZOBO(
        inner_loss, outer_loss, steps,
        num_inner_steps, num_directions, smoothing, seed,
    ).loop()  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class _PZOBO(Method):
    num_inner_steps: int
    num_directions: int
    smoothing: float
    seed: int

    name = "pzobo"
    adjoint = ""
    follows = "inner"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_count(self.name, "num_inner_steps", self.num_inner_steps)
        checks.check_count(self.name, "num_directions", self.num_directions)
        checks.check_number(self.name, "smoothing", self.smoothing, above=True)
        checks.check_count(self.name, "seed", self.seed, least=0)

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        self._check_precision(point)
        batches = unbind(self.name, inner_batches, self.num_inner_steps, "num_inner_steps")
        mu, end = self.smoothing, _descended(point, batches)
        outer_params, d_h = end.outer_gradient(outer_batch)
        for v in self._drawn(point):
            pushed = _descended(point.at(trees.axpy(mu, v, point.h)), batches)
            response = trees.sub(pushed.w, end.w)
            slope = trees.dot(response, outer_params) / (mu * self.num_directions)
            d_h = trees.axpy(slope, v, d_h)
        return end.step("outer", d_h).leave()

    def _check_precision(self, point: Point) -> None:
        """Refuse a push that rounding would swallow."""
        least = 10 * trees.epsilon((*point.w, *point.h))
        if self.smoothing < least:
            raise ValueError(
                f"pzobo: smoothing is {self.smoothing:g}; expected at least {least:.2g}, ten times "
                f"the precision of params and hparams. Write smoothing={2 * least:.1g}, or hand "
                f"over both in float32"
            )

    def _drawn(self, point: Point) -> list[Leaves]:
        """The directions of this step, each like hparams: where these are sharded, too."""
        sizes = [leaf.numel() for leaf in point.h]
        numbers = normal(self.seed, point.state.step, self.num_directions * sum(sizes))
        drawn = []
        for row in numbers.reshape(self.num_directions, sum(sizes)).unbind(0):
            pairs = zip(row.split(sizes), point.h, strict=True)
            v = [sharding.spread_like(part.reshape(h.shape).to(h), h) for part, h in pairs]
            drawn.append(sharding.align(tuple(v), point.h))
        return drawn


def _descended(point: Point, batches: list[tuple[Any, ...]]) -> Point:
    """The point after a step on each batch."""
    for batch in batches:
        point = point.step("inner", point.gradient(batch))
    return point
