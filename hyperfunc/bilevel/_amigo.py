"""AmIGO: inner steps, then steps on the adjoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from hyperfunc._engine import trees
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import Loop, Point, StepSize
from hyperfunc.bilevel._two_loops import TwoLoops


def amigo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    adjoint_lr: StepSize | None = None,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
) -> Loop:
    r"""AmIGO: inner steps from the last params, then steps on the adjoint from the last adjoint.

    As `stocbio`, but the adjoint is carried from one update to the next and improved by

    .. math::
        u \leftarrow u - \eta (\nabla^2_{ww} \ell(w, \lambda; B_{T + q}) u - \nabla_w E)
        \;\; (q < Q) .

    As the hparams settle, its error vanishes for any :math:`Q \ge 1`.

    Args:
        inner_loss: as for `stocbio`.
        outer_loss: as for `stocbio`.
        inner_lr: as for `stocbio`.
        outer_lr: as for `stocbio`.
        adjoint_lr: the step size on the adjoint; by default ``inner_lr``.
        num_inner_steps: the number ``T``, >= 1.
        num_adjoint_steps: the number ``Q``, >= 1.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``; its batches are those of
        `stocbio`.

    Raises:
        TypeError: as `stocbio`.
        ValueError: as `stocbio`.

    Example:
        >>> loop = hf.bilevel.amigo(
        ...     lambda w, h, x: (w - h * x) ** 2 / 2,
        ...     lambda w, h, y: (w - y) ** 2 / 2,
        ...     inner_lr=0.5,
        ...     outer_lr=0.2,
        ...     num_inner_steps=2,
        ...     num_adjoint_steps=1,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.full((4,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization,
        arXiv 2111.14580.
    """
    method = _AmIGO(
        *(inner_loss, outer_loss, inner_lr, outer_lr, adjoint_lr),
        num_inner_steps=num_inner_steps,
        num_adjoint_steps=num_adjoint_steps,
    )
    return Loop(method.init, method.update)


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class _AmIGO(TwoLoops):
    name = "amigo"
    least_adjoint_steps = 1

    def solve(self, point: Point, batches: list[tuple[Any, ...]], b: Leaves, lr: Any) -> Leaves:
        u = point.u
        for batch in batches:
            u = trees.axpy(-lr, trees.sub(point.product(u, batch), b), u)
        return u
