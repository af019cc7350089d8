"""What messages and reprs say of a value: never the entries of a tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

_LONGEST = 300


def show(value: Any) -> str:
    """The repr of a value, with the shapes of tensors and arrays in place of their entries."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)} and dtype {value.dtype}>"
    if is_array(value) and value.shape:
        return f"<array of shape {tuple(value.shape)} and dtype {value.dtype}>"
    kind = type(value)
    if kind in (list, tuple):
        parts = ", ".join(map(show, value))
        tail = "," if kind is tuple and len(value) == 1 else ""
        return _cut(f"[{parts}]" if kind is list else f"({parts}{tail})")
    if kind is dict:
        return _cut(f"{{{', '.join(f'{key!r}: {show(each)}' for key, each in value.items())}}}")
    text = repr(value)
    if "tensor(" in text or "array(" in text:
        return f"{kind.__name__}(...)"
    return text if hasattr(kind, "__dataclass_fields__") else _cut(text)


def kind_of(value: Any) -> str:
    """What a value is in a few words: its type, and the shapes and dtypes in it."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}"
    if is_array(value):
        return f"array {value.dtype} {tuple(value.shape)}"
    kind = type(value)
    if kind in (list, tuple) and value and all(isinstance(each, int | float) for each in value):
        return f"{kind.__name__} of {len(value)} numbers"
    if kind in (list, tuple):
        parts = ", ".join(map(kind_of, value))
        return _cut(f"[{parts}]" if kind is list else f"({parts})")
    if kind is dict:
        return _cut(f"{{{', '.join(f'{key!r}: {kind_of(each)}' for key, each in value.items())}}}")
    return kind.__name__


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, or a scalar of its."""
    return hasattr(value, "__array_interface__") and hasattr(value, "shape")


def show_fields(value: Any) -> str:
    """The repr of a dataclass of ours whose fields may be tensors."""
    fields = (
        f"{each.name}={show(getattr(value, each.name))}" for each in dataclasses.fields(value)
    )
    return f"{type(value).__name__}({', '.join(fields)})"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...{text[-1]}"
