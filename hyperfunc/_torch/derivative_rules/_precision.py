"""In which precision a row computes, and what it returns, as the fused operations do it."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """The tensor, in single precision if it has half of it."""
    return x.float() if x.dtype in _HALF else x


def narrowed(y: Tensor, like: Tensor, *, stays_wide_in_autocast: bool = False) -> Tensor:
    """A result in the precision of the input, or as autocast would have it."""
    if stays_wide_in_autocast and torch.is_autocast_enabled(like.device.type):
        return y
    return y.to(like.dtype)
