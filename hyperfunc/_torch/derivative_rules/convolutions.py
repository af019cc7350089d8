"""Transposed convolutions with an output padding: no forward mode of a gradient, no third order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of

Sizes = int | tuple[int, ...]


@in_place_of(torch.conv_transpose1d, right_up_to=2, in_vmap=True)
def conv_transpose1d(*args: Any, **named: Any) -> Tensor:
    return _padded(torch.conv_transpose1d, *args, **named)


@in_place_of(torch.conv_transpose2d, right_up_to=2, in_vmap=True)
def conv_transpose2d(*args: Any, **named: Any) -> Tensor:
    return _padded(torch.conv_transpose2d, *args, **named)


@in_place_of(torch.conv_transpose3d, right_up_to=2, in_vmap=True)
def conv_transpose3d(*args: Any, **named: Any) -> Tensor:
    return _padded(torch.conv_transpose3d, *args, **named)


def _padded(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """The whole of what is convolved, cut at both ends: fewer at the far one by its padding."""
    dims = weight.ndim - 2
    near, more, step, spread = (
        [sizes] * dims if isinstance(sizes, int) else list(sizes) * (dims if len(sizes) == 1 else 1)
        for sizes in (padding, output_padding, stride, dilation)
    )
    limits = map(max, step, spread)
    if not any(more) or not all(0 <= m < limit for m, limit in zip(more, limits, strict=True)):
        return TORCHS_OWN  # torch says what is wrong
    whole = convolve(input, weight, None, stride, 0, 0, groups, dilation)
    ends = [end for p, m in zip(near[::-1], more[::-1], strict=True) for end in (-p, m - p)]
    y = F.pad(whole, ends)
    return y if bias is None else y + bias.reshape(-1, *[1] * dims)
