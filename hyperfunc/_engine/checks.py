"""Checks of what users pass, which say what was got, what was expected and what to type."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_scalar(value: Any, name: str) -> Tensor:
    """Return a loss value if it is a floating-point scalar tensor, raise otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} returned {type(value).__name__}; expected a scalar tensor"
            + (
                ". For an outer loss that returns (value, aux), pass has_aux=True"
                if isinstance(value, tuple) and name == "outer_loss"
                else ""
            )
        )
    if value.ndim != 0:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(value.shape)}; expected a scalar. "
            f"Reduce it with .sum() or .mean()"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{name} returned a scalar of dtype {value.dtype}; expected a floating-point scalar"
        )
    return value


def check_callable(value: Any, name: str, signature: str) -> None:
    """Raise unless a value is callable; the signature is what it should have."""
    if not callable(value):
        raise TypeError(
            f"{name} is {value!r} of type {type(value).__name__}; expected a function {signature}"
        )
