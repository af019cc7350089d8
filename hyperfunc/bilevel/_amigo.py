"""AmIGO: inner steps, then steps on the adjoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hyperfunc._engine import trees
from hyperfunc._engine.finite_differences import Products
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import AdjointSteps, Loop, Point, TwoLoops, taking

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(AdjointSteps)
def amigo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""AmIGO: inner steps from the last params, then steps on the adjoint from the last adjoint.

    As `stocbio`, but the adjoint is carried from one update to the next and improved by

    .. math::
        u \leftarrow u - \eta (\nabla^2_{ww} \ell(w, \lambda; B_{T + q}) u - \nabla_w E)
        \;\; (q < Q) .

    As the hparams settle, its error vanishes for any :math:`Q \ge 1`.

    The arguments are those of `stocbio`, but ``num_adjoint_steps`` is 1 at least; so are the
    batches and the errors.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.amigo(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.2, num_adjoint_steps=1
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.full((12,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization,
        arXiv 2111.14580.
    """
    return _AmIGO(
        inner_loss, outer_loss, steps, num_inner_steps, num_adjoint_steps, products=products
    ).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _AmIGO(TwoLoops):
    name = "amigo"
    least_adjoint_steps = 1

    def solve(self, point: Point, batches: list[tuple[Any, ...]], b: Leaves) -> Point:
        for batch in batches:
            point = point.step("adjoint", trees.sub(point.product(point.u, batch), b))
        return point
