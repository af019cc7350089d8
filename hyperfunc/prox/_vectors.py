"""Operators that act on vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperfunc.optim._base import Coefficient
from hyperfunc.prox._base import Dim, Prox


def group_lasso(weight: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""Shrinks vectors as a whole: :math:`g(w) = \sum_v \mathrm{weight}_v \, \|w_v\|`.

    .. math:: z_v = \max\Big(1 - \frac{\mathrm{lr}\; \mathrm{weight}_v}{\|w_v\|}, 0\Big)\, w_v

    Args:
        weight: at least 0, one for all vectors, for each leaf or for each vector, of size 1 in dim.
        dim: where the vectors v lie: ``None``, each leaf is one; otherwise along these dimensions.

    Raises:
        ValueError: a number below 0; when called, a leaf without such a dimension, or a weight that
            varies within a vector.
        TypeError: a weight or ``dim`` of another kind.

    Example:
        >>> hf.prox.group_lasso(2.5, dim=1)(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), None, 1.0)
        tensor([[1.5000, 2.0000],
                [0.0000, 0.0000]])

    References:
        Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006.
    """
    return Prox("group_lasso", _shrink_vectors, {"weight": weight}, dim)


def simplex(total: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{z \ge 0, \; \sum_i z_i = \mathrm{total}\}`.

    .. math:: z_i = \max(w_i - \tau, 0), \qquad \text{with } \tau \text{ such that the sum is right}

    ``total`` is at least 0, and 1 for probabilities. The rest is as for `group_lasso`.

    Example:
        >>> hf.prox.simplex()(torch.tensor([1.0, 0.8, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])

    References:
        Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the l1-ball for
        learning in high dimensions, 2008.
    """
    return Prox("simplex", _project_simplex, {"total": total}, dim)


def l1_ball(radius: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{\sum_i |z_i| \le \mathrm{radius}\}`.

    ``radius`` is at least 0. The rest is as for `group_lasso`.

    Example:
        >>> hf.prox.l1_ball(radius=2.0)(torch.tensor([3.0, -2.0, 0.1]))
        tensor([ 1.5000, -0.5000,  0.0000])

    References:
        Duchi et al., 2008, as in `simplex`.
    """
    return Prox("l1_ball", _project_l1_ball, {"radius": radius}, dim)


def l2_ball(radius: Coefficient = 1.0, dim: Dim = None) -> Prox:
    r"""The projection of vectors onto :math:`\{\|z\| \le \mathrm{radius}\}`, with the 2-norm.

    ``radius`` is at least 0. The rest is as for `group_lasso`.

    Example:
        >>> hf.prox.l2_ball()(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    return Prox("l2_ball", _project_l2_ball, {"radius": radius}, dim)


def _shrink_vectors(w: Tensor, dims: tuple[int, ...], lr: Tensor, weight: Tensor) -> Tensor:
    size, least = norm(w, dims), lr * weight
    divisor = torch.where(size == 0, 1.0, size)
    return torch.where(size < least, 0.0, w * (1 - least / divisor))


def _project_l2_ball(w: Tensor, dims: tuple[int, ...], lr: Tensor, radius: Tensor) -> Tensor:
    size = norm(w, dims)
    inside = size <= radius
    return torch.where(inside, w, w * (radius / torch.where(inside, 1.0, size)))


def _project_simplex(w: Tensor, dims: tuple[int, ...], lr: Tensor, total: Tensor) -> Tensor:
    v = _below_largest(w, dims)
    support, tau = threshold(v, dims, total)
    return torch.where(support, (v - tau).clamp(min=0), 0.0)


def _project_l1_ball(w: Tensor, dims: tuple[int, ...], lr: Tensor, radius: Tensor) -> Tensor:
    size = w.abs()
    v = _below_largest(size, dims)
    support, tau = threshold(v, dims, radius)
    projected = torch.where(support, w.sign() * (v - tau).clamp(min=0), 0.0)
    return torch.where(size.sum(dims, keepdim=True) <= radius, w, projected)


def _below_largest(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Entries less the largest: differences of large numbers are exact, sums of them are not."""
    return w - w.detach().amax(dims, keepdim=True)


def norm(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The norm along dims, which neither overflows nor has a derivative other than 0 at 0."""
    largest = w.detach().abs().amax(dims, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)
    squared = ((w / unit) ** 2).sum(dims, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0.0, unit * torch.where(zero, 1.0, squared).sqrt())


def threshold(w: Tensor, dims: tuple[int, ...], total: Tensor) -> tuple[Tensor, Tensor]:
    """The tau with ``sum(max(w - tau, 0)) = total`` along dims, and where ``w > tau``."""
    # Which entries are positive is found by sorting; tau is a linear function of those.
    # No entry is in the support that lies below the largest by more than the total.
    kept = [1 if dim in dims else size for dim, size in enumerate(w.shape)]
    last = tuple(range(-len(dims), 0))
    rows = w.detach().movedim(dims, last).reshape(*(n for n in kept if n != 1), -1)
    sums = total.detach().expand(kept).reshape(*rows.shape[:-1], 1)
    ordered = rows.sort(dim=-1, descending=True).values
    ordered = torch.maximum(ordered, ordered[..., :1] - sums)
    excess = ordered.cumsum(-1) - sums
    numbers = torch.arange(1, rows.shape[-1] + 1, dtype=w.dtype, device=w.device)
    count = (ordered * numbers > excess).sum(-1, keepdim=True).clamp(min=1)
    tau = excess.gather(-1, count - 1) / count
    support = ~(w <= tau.reshape(kept))  # true for NaN
    size = support.sum(dims, keepdim=True).clamp(min=1)
    return support, (torch.where(support, w, 0.0).sum(dims, keepdim=True) - total) / size
