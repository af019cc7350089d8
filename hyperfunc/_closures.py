"""Detects differentiable tensors that a function closes over instead of taking as arguments."""

from __future__ import annotations

import dataclasses
import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hyperfunc import _ad
from hyperfunc._conditions import captured_message


def refuse_captured_tensors(fn: Callable[..., Any], name: str) -> None:
    """Raise if a function closes over a tensor that carries a derivative."""
    for captured in _captured(fn):
        if isinstance(captured, Tensor) and _ad.is_attached(captured):
            raise ValueError(captured_message(name))


def _captured(fn: Any) -> Iterator[Any]:
    while isinstance(fn, functools.partial):
        yield from fn.args
        yield from fn.keywords.values()
        fn = fn.func
    if dataclasses.is_dataclass(fn) and not isinstance(fn, type):
        for field in dataclasses.fields(fn):
            value = getattr(fn, field.name)
            yield value
            yield from _captured(value)
    if not isinstance(fn, types.FunctionType):
        return
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            continue
    for name in _global_names(fn.__code__):
        if name in fn.__globals__:
            yield fn.__globals__[name]


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = [
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    ]
    nested = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys(names + [name for const in nested for name in _global_names(const)]))
