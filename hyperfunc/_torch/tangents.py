"""Tangents in the dtype of their tensors.

In torch's forward mode a number times a 0-d float32 tensor has a float64 tangent, which spreads to
all that is computed from it, or is refused by an operation such as ``lerp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import internals, tracking


def in_own_dtype(value: Any) -> Any:
    """A tensor whose tangent, if it has one, is of its own dtype; any other value as it is."""
    if not tracking.is_differentiable(value) or not internals.forward_mode_active():
        return value
    return _InOwnDtype.apply(value)


def all_in_own_dtype(values: Sequence[Any]) -> tuple[Any, ...]:
    """`in_own_dtype` of each."""
    if not internals.forward_mode_active():
        return tuple(values)
    return tuple(map(in_own_dtype, values))


class _InOwnDtype(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return in_own_dtype(cotangent)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        # torch switches forward mode off here, and an enclosing jvp would get a zero tangent
        with internals.forward_mode_enabled(True):
            return tangent.view_as(tangent).to(ctx.dtype)
