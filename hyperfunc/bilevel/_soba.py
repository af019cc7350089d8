"""SOBA: one step on all three variables at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hyperfunc._engine.finite_differences import Products
from hyperfunc._types import Loss
from hyperfunc.bilevel._base import AdjointSteps, Loop, Method, State, directions, taking

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(AdjointSteps)
def soba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""SOBA: one stochastic gradient step on all three variables at once.

    .. math::
        w \leftarrow w - \rho D_w, \qquad u \leftarrow u - \rho_u D_u, \qquad
        \lambda \leftarrow \lambda - \gamma D_\lambda

    with the directions at the top of this page, all at the old point, of one inner and one outer
    batch. With constant step sizes it ends in a neighbourhood of a solution whose size grows with
    them; it converges if they decrease, ``inner_lr`` like ``t ** -0.4`` and ``outer_lr`` like
    ``t ** -0.6``.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        products: ``"reverse"`` or ``"finite_difference"``; see `hyperfunc.hypergrad`.
        inner_lr: step size on the params, below 2 over the largest curvature of the inner loss.
        outer_lr: step size on the hparams.
        adjoint_lr: step size on the adjoint; by default ``inner_lr``.
        inner_optimizer: in place of ``inner_lr``, an optimiser of `hyperfunc.optim`; the adjoint
            then needs a step of its own. Weight decay belongs into ``inner_loss``: the optimiser's
            (0.01 in `hyperfunc.optim.adamw` by default) is no part of what the directions are
            taken of.
        outer_optimizer: in place of ``outer_lr``.
        adjoint_optimizer: in place of ``adjoint_lr``. It minimises a quadratic whose solution is
            the adjoint: weight decay would shift it.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Raises:
        TypeError: a loss that is no function; a batch that is no tuple; a step size of no kind
            above; no step for a variable, or two; a state that is no `State`.
        ValueError: a negative step size; a loss that is not scalar; a state without the states of
            these optimisers; in ``init``, a weight decay of an optimiser that depends on hparams.
            A constant one warns.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.soba(inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.05)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Dagreou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms, arXiv 2201.13409.
    """
    return _SOBA(inner_loss, outer_loss, steps, products=products).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _SOBA(Method):
    name = "soba"

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        return point.stepped(*directions(point.terms(inner_batch, outer_batch))).leave()
