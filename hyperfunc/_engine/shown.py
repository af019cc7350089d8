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
    if hasattr(value, "__array_interface__") and hasattr(value, "shape") and value.shape:
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


def show_fields(value: Any) -> str:
    """The repr of a dataclass of ours whose fields may be tensors."""
    fields = (
        f"{each.name}={show(getattr(value, each.name))}" for each in dataclasses.fields(value)
    )
    return f"{type(value).__name__}({', '.join(fields)})"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...{text[-1]}"
