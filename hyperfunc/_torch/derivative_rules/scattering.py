"""Copies of a tensor with a part put in.

Torch's gradient of a mapped `select_scatter` leaves out the tasks, and that of `as_strided_scatter`
is wrong without a vmap too, and raises in one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of


@in_place_of(torch.select_scatter, torch.Tensor.select_scatter, right_up_to=2)
def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    size = input.shape[dim]
    if not -size <= index < size or src.shape != input.select(dim, index).shape:
        return TORCHS_OWN
    start = index % size
    return torch.slice_scatter(input, src.unsqueeze(dim % input.ndim), dim, start, start + 1)


@in_place_of(torch.as_strided_scatter, torch.Tensor.as_strided_scatter, right_up_to=0)
def as_strided_scatter(
    input: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    if not input.is_contiguous() or tuple(src.shape) != tuple(size) or len(size) != len(stride):
        return TORCHS_OWN
    place = torch.full((), storage_offset or 0, device=input.device)
    for length, step in zip(size, stride, strict=True):
        place = place.unsqueeze(-1) + step * torch.arange(length, device=input.device)
    return input.flatten().scatter(0, place.flatten(), src.flatten()).view(input.shape)
