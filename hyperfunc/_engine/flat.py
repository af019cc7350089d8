"""Flat tuples of tensors, and those of them that a product is taken with respect to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hyperfunc._torch import tracking


def split(tensors: Sequence[Any], *sizes: int) -> tuple[tuple[Any, ...], ...]:
    """Pieces of the given sizes, and what remains."""
    pieces, begin = [], 0
    for size in sizes:
        pieces.append(tuple(tensors[begin : begin + size]))
        begin += size
    return (*pieces, tuple(tensors[begin:]))


def differentiable_indices(
    tensors: Sequence[Any], wanted: Sequence[Any] | None = None
) -> tuple[int, ...]:
    """Where the differentiable tensors are, if wanted: where the second sequence holds too."""
    return tuple(
        i
        for i, tensor in enumerate(tensors)
        if tracking.is_differentiable(tensor) and (wanted is None or wanted[i])
    )


def scatter(values: Sequence[Tensor], indices: Sequence[int], size: int) -> list[Tensor | None]:
    """The values at their indices in a list of None."""
    scattered: list[Tensor | None] = [None] * size
    for index, value in zip(indices, values, strict=True):
        scattered[index] = value
    return scattered
