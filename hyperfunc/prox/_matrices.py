"""Operators that act on matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import tracking
from hyperfunc.optim._base import Coefficient
from hyperfunc.prox._base import Prox


def nuclear_norm(weight: Coefficient = 1.0) -> Prox:
    r"""Soft thresholding of singular values: :math:`g(W) = \mathrm{weight}\, \sum_i \sigma_i(W)`.

    .. math::
        Z = U\, \mathrm{diag}(\max(\sigma - \mathrm{lr}\; \mathrm{weight}, 0))\, V^\top
        \qquad \text{for} \quad W = U\, \mathrm{diag}(\sigma)\, V^\top

    The derivatives never pass through those of singular vectors, which are infinite where singular
    values are equal. They come from the equations that the singular subspace above the threshold
    and the polar factor on it satisfy, and hold up to the third order.

    Args:
        weight: at least 0, one for all matrices, for each leaf or for each matrix (of size 1 in the
            last two dimensions).

    Returns:
        A `Prox`, for leaves with two dimensions at least.

    Raises:
        ValueError: a number below 0; when called, a leaf with fewer dimensions.
        TypeError: a weight of another kind.

    Example:
        >>> hf.prox.nuclear_norm(1.0)(torch.diag(torch.tensor([3.0, 0.5])), None, 1.0)
        tensor([[2., 0.],
                [0., 0.]])

    References:
        Cai, Candès and Shen, A singular value thresholding algorithm for matrix completion, 2010.
    """
    return Prox("nuclear_norm", _shrink_singular_values, {"weight": weight}, (-2, -1))


_ORDERS = 3  # of the derivatives of `nuclear_norm`


def _shrink_singular_values(W: Tensor, dims: Any, lr: Tensor, weight: Tensor) -> Tensor:
    finite = torch.isfinite(W).all(-1, keepdim=True).all(-2, keepdim=True)
    W = torch.where(finite, W, 0.0)
    wide = W.shape[-2] < W.shape[-1]
    tall = W.mT if wide else W
    threshold = lr * weight
    threshold = threshold.expand(*W.shape[:-2], 1, 1)
    U, sigma, Vh = torch.linalg.svd(tall.detach(), full_matrices=False)
    at = threshold.detach()[..., 0]
    Z = (U * (sigma - at).clamp(min=0)[..., None, :]) @ Vh
    if tracking.is_tracked((W, threshold)):
        change = _singular_value_expansion(tall, threshold, sigma, Vh, sigma >= at)
        Z = Z + (change - change.detach())
    return torch.where(finite, Z.mT if wide else Z, torch.nan)


def _singular_value_expansion(
    W: Tensor, threshold: Tensor, sigma: Tensor, Vh: Tensor, active: Tensor
) -> Tensor:
    """The shrunk W as a function of W that agrees with it near the W that was decomposed.

    In the basis V, with ``M = W V`` and ``G = M^T M``, it is ``M (P - threshold K) V^T``. P is the
    projector on the eigenvectors of G that are active, the range of ``B = diag(active) + X``, with
    X from inactive to active the root of ``(I - X) G (I + X)`` there. ``K = (P G P)^{-1/2}`` is the
    root of ``K G K = P``. At the point itself all are diagonal, so both equations linearise to
    divisions: by ``sigma_j^2 - sigma_i^2`` across the threshold, and by ``sigma_i + sigma_j``
    above it, but for singular values that are rounding errors of zero. A step with these gains one
    order of the expansion.
    """
    eye = torch.eye(sigma.shape[-1], dtype=W.dtype, device=W.device)
    row, column = sigma[..., :, None], sigma[..., None, :]
    rising = ~active[..., :, None] & active[..., None, :]
    noise = sigma[..., :1, None] * (max(W.shape[-2:]) * torch.finfo(W.dtype).eps)
    both = active[..., :, None] & active[..., None, :] & (row + column > noise)
    across = torch.where(rising, 1 / torch.where(rising, (column - row) * (column + row), 1.0), 0.0)
    above = torch.where(both, 1 / torch.where(both, row + column, 1.0), 0.0)
    M = W @ Vh.mT
    G = M.mT @ M
    X = torch.zeros_like(across)
    for _ in range(_ORDERS):
        X = X + across * ((eye - X) @ G @ (eye + X))
    B = eye * active[..., None, :] + X
    gram = X.mT @ X  # of second order, so that the inverse of I + gram is this
    P = B @ (eye - gram + gram @ gram) @ B.mT
    K = P @ (eye * 2 * above) @ P
    for _ in range(_ORDERS):
        K = K + P @ (above * (P - K @ G @ K)) @ P
    return M @ (P - threshold * K) @ Vh
