"""Operators that act on each entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperfunc.optim._base import Coefficient
from hyperfunc.prox._base import Prox


def l1(weight: Coefficient = 1.0) -> Prox:
    r"""Soft thresholding, for the lasso: :math:`g(w) = \sum_i \mathrm{weight}_i\, |w_i|`.

    .. math:: z_i = \mathrm{sign}(w_i) \max(|w_i| - \mathrm{lr}\; \mathrm{weight}_i, 0)

    Args:
        weight: at least 0, one for all entries, for each leaf or for each entry. A tree such as
            ``{"w": 1.0, "b": 0.0}`` leaves an intercept alone.

    Raises:
        ValueError: a number below 0.
        TypeError: a weight of another kind.

    Example:
        >>> shrink = hf.prox.l1(weight=lambda h: h.exp())
        >>> shrink(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(0.0), 1.0)
        tensor([ 2.,  0., -1.])
    """
    return Prox("l1", _soft_threshold, {"weight": weight})


def elastic_net(l1: Coefficient = 1.0, l2: Coefficient = 1.0) -> Prox:
    r"""Shrinks and scales, for :math:`g(w) = l_1 \|w\|_1 + \tfrac{1}{2} l_2 \|w\|^2`.

    .. math:: z_i = \mathrm{sign}(w_i) \max(|w_i| - \mathrm{lr}\; l_1, 0) / (1 + \mathrm{lr}\; l_2)

    Both weights, and the errors, are as for `hyperfunc.prox.l1`.

    Example:
        >>> hf.prox.elastic_net(l1=1.0, l2=1.0)(torch.tensor([3.0, -0.5]), None, 1.0)
        tensor([1., 0.])

    References:
        Zou and Hastie, Regularization and variable selection via the elastic net, 2005.
    """
    return Prox("elastic_net", _elastic_net, {"l1": l1, "l2": l2})


def non_negative() -> Prox:
    r"""The projection onto :math:`w \ge 0`: each entry becomes :math:`\max(w_i, 0)`.

    Example:
        >>> hf.prox.non_negative()(torch.tensor([1.0, -2.0]))
        tensor([1., 0.])
    """
    return Prox("non_negative", _positive_part)


def box(lower: Coefficient = 0.0, upper: Coefficient = 1.0) -> Prox:
    r"""The projection onto :math:`\mathrm{lower} \le w \le \mathrm{upper}`, entry by entry.

    Args:
        lower: the lower bound, given as the weight of `l1`; minus infinity is none.
        upper: the upper bound, not below ``lower``.

    Raises:
        ValueError: numbers with ``lower > upper``.
        TypeError: a bound of another kind.

    Example:
        >>> clip = hf.prox.box(lower=-1.0, upper=lambda h: h)
        >>> clip(torch.tensor([-3.0, 0.5, 4.0]), torch.tensor(2.0), 1.0)
        tensor([-1.0000,  0.5000,  2.0000])
    """
    if isinstance(lower, int | float) and isinstance(upper, int | float) and lower > upper:
        raise ValueError(f"prox.box: got lower={lower}, upper={upper}; expected lower <= upper")
    return Prox("box", _clip, {"lower": lower, "upper": upper})


def identity() -> Prox:
    """No regulariser and no constraint: params as they are, for parts of them in `blocks`.

    Example:
        >>> hf.prox.identity()(torch.tensor([3.0, -4.0]))
        tensor([ 3., -4.])
    """
    return Prox("identity", _unchanged)


def _soft_threshold(w: Tensor, dims: Any, lr: Tensor, weight: Tensor) -> Tensor:
    threshold = lr * weight
    # at |w| = threshold = 0 the derivative is that of the identity; NaN is not below anything
    return torch.where(w.abs() < threshold, 0.0, w - w.sign() * threshold)


def _positive_part(w: Tensor, dims: Any, lr: Tensor) -> Tensor:
    return torch.clamp(w, min=0)


def _unchanged(w: Tensor, dims: Any, lr: Tensor) -> Tensor:
    return w


def _elastic_net(w: Tensor, dims: Any, lr: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
    return _soft_threshold(w, dims, lr, l1) / (1 + lr * l2)


def _clip(w: Tensor, dims: Any, lr: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.clamp(w, lower, upper)
