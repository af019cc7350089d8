"""StocBiO: inner steps, then a truncated Neumann series."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyperfunc._engine.finite_differences import Products
from hyperfunc._types import Loss
from hyperfunc.bilevel._base import AdjointSteps, Loop, taking
from hyperfunc.bilevel._series import Series

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(AdjointSteps)
def stocbio(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""StocBiO: inner steps from the last params, then a truncated Neumann series.

    With one batch :math:`B` for each step, one update is

    .. math::
        w \leftarrow w - \rho \nabla_w \ell(w, \lambda; B_t) \;\; (t < T), \qquad
        u = \eta \sum_{q=0}^{Q} \prod_{k < q} (I - \eta \nabla^2_{ww} \ell(w, \lambda; B_{T + k}))
        \nabla_w E, \qquad
        \lambda \leftarrow \lambda - \gamma D_\lambda .

    The series is begun anew in every update: its truncation leaves a bias that shrinks with
    :math:`Q` alone.

    ``num_inner_steps`` is :math:`T \ge 1`, ``num_adjoint_steps`` :math:`Q \ge 0`, and
    ``adjoint_lr`` the step size in the series. All other arguments are those of `soba`.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size ``T + Q + 1``: batches for the ``T`` steps, for the ``Q``
        products, and for the cross term.

    Raises:
        TypeError: as `soba`; a batch with leaves that are no tensors.
        ValueError: as `soba`; another leading dimension.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.stocbio(inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.2)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(50):
        ...     state = loop.update(state, (torch.full((21,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Ji, Yang and Liang, Bilevel optimization: convergence analysis and enhanced design,
        algorithms 2 and 3, arXiv 2010.07962.
    """
    return _StocBiO(
        inner_loss, outer_loss, steps, num_inner_steps, num_adjoint_steps, products=products
    ).loop()


class _StocBiO(Series):
    name = "stocbio"
