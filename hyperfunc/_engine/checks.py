"""Checks of what users pass, which say what was got, what was expected and what to type."""

from __future__ import annotations

import inspect
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hyperfunc._engine.shown import show


def check_scalar(value: Any, name: str) -> Tensor:
    """Return a loss value if it is a floating-point scalar tensor, raise otherwise."""
    if not isinstance(value, Tensor):
        advice = ""
        if isinstance(value, tuple) and name == "outer_loss":
            advice = ". For an outer loss that returns (value, aux), pass has_aux=True"
        elif isinstance(value, tuple) and name.endswith("inner_loss"):
            advice = (
                " alone. What else it computes may come from the outer loss, with has_aux=True in "
                "the transform; hf.minimize(..., trace=True) gives the losses of its steps"
            )
        raise TypeError(f"{name} returned {type(value).__name__}; expected a scalar tensor{advice}")
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
            f"{name} is {show(value)} of type {type(value).__name__}; "
            f"expected a function {signature}"
        )


def takes(fn: Any, count: int, other: int) -> bool:
    """Whether the signature of a function, if it has one, allows so many arguments, not others."""
    if torch.compiler.is_compiling():  # which cannot look
        return False
    try:
        signature = inspect.signature(fn, follow_wrapped=False)
        signature.bind(*[None] * count)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(*[None] * other)
    except TypeError:
        return True
    return False


def check_count(owner: object, name: str, value: Any, least: int = 1, also: str = "") -> int:
    """Return an integer, or raise unless it is one and not below the least.

    ``owner`` is what the argument belongs to: a name, or an object of a class; ``also`` says what
    else the caller takes, as ``"None or "``.
    """
    message = f"{_name(owner)}: {name} is {show(value)}; expected {also}an integer >= {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    return value


def check_number(
    owner: object, name: str, value: Any, *, least: float = 0.0, above: bool = False
) -> float:
    """Return a finite number, or raise unless it is one and at least (or above) a bound."""
    sign = ">" if above else ">="
    message = f"{_name(owner)}: {name} is {show(value)}; expected a finite number {sign} {least:g}"
    if not is_number(value):
        raise TypeError(message)
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(message)
    return value


def check_flags(owner: object, **flags: Any) -> None:
    """Raise unless each is True or False: a tensor is no setting, as it may differ by task."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            advice = ""
            if isinstance(value, Tensor):
                advice = f". Write {name}=bool(...), outside of any torch.func transform"
            raise TypeError(
                f"{_name(owner)}: {name} is {show(value)} of type {type(value).__name__}; "
                f"expected True or False{advice}"
            )


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a Python number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
