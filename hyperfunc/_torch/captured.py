"""Detects differentiable tensors that a function closes over instead of taking as arguments."""

from __future__ import annotations

import dataclasses
import dis
import functools
import itertools
import types
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn

from hyperfunc._torch import tensordicts, tracking

_Seen: TypeAlias = dict[Hashable, object]

# A container with more items is a data set, not a tree of parameters.
_MOST_ITEMS = 1000

_FOUND = (Tensor, str, int, float)


def refuse_captured_tensors(*named: tuple[Any, str]) -> None:
    """Raise if one of some functions, each with its name, closes over what carries a derivative."""
    seen: _Seen = {}
    for fn, name in named:
        if any(tracking.is_attached(value) for value in _captured(fn, seen)):
            raise ValueError(captured_message(name))


def escaped_message(name: str) -> str:
    """The error for a function that runs outside the transform in which it found a tensor."""
    return (
        f"{name} uses a tensor that was made inside an enclosing torch.func transform, which it "
        f"runs outside of. Pass that tensor in *args, so that {name} takes it as an argument"
    )


def captured_message(name: str) -> str:
    """The error for a function that uses a differentiable tensor it did not take as argument."""
    return (
        f"{name} closes over a tensor that requires grad or belongs to an enclosing torch.func "
        f"transform, whose gradient would be lost. Pass that tensor in hparams or *args, so that "
        f"{name} takes it as an argument, or call .detach() on it if it is a constant"
    )


def captured_tensors(fn: Any) -> list[Tensor]:
    """The tensors that a function closes over.

    Looked through are its variables, globals, and default values, the attributes and methods of
    these that it names, dicts, lists and tuples, and the functions among all these. Modules are
    not: their parameters may be replaced by arguments in the call.
    """
    return [value for value in _captured(fn, {}) if isinstance(value, Tensor)]


def captured_values(fn: Any) -> list[Tensor | str | float]:
    """`captured_tensors`, and the numbers and strings beside them, for modules their mode."""
    return _captured(fn, {})


def _captured(fn: Any, seen: _Seen) -> list[Any]:
    found: list[Any] = []
    _look_into(fn, seen, found)
    return found


def _look_into(fn: Any, seen: _Seen, found: list[Any]) -> None:
    """Add what a function closes over to what was found."""
    if isinstance(fn, functools.partial):
        for held in (fn.func, fn.args, fn.keywords):
            _add(held, (), seen, found)
    elif isinstance(fn, types.MethodType):
        code = getattr(fn.__func__, "__code__", None)
        _add_attributes(fn.__self__, _all_names(code) if code else (), seen, found)
        _add(fn.__func__, (), seen, found)
    elif isinstance(fn, types.FunctionType):
        names = _all_names(fn.__code__)
        for held in (fn.__defaults__, fn.__kwdefaults__, *_contents(fn.__closure__ or ())):
            _add(held, names, seen, found)
        for name in _global_names(fn.__code__):
            value = fn.__globals__.get(name)
            # the functions of other modules are libraries
            if getattr(value, "__globals__", fn.__globals__) is fn.__globals__:
                _add(value, names, seen, found)
    elif dataclasses.is_dataclass(fn) and not isinstance(fn, type):
        for field in dataclasses.fields(fn):
            _add(getattr(fn, field.name), (), seen, found)
    elif callable(fn) and isinstance(type(fn).__call__, types.FunctionType):
        _look_into(types.MethodType(type(fn).__call__, fn), seen, found)


def _add(value: Any, names: tuple[str, ...], seen: _Seen, found: list[Any]) -> None:
    """Add the values in what a function holds, whose code reads attributes of these names."""
    if isinstance(value, _FOUND):
        found.append(value)
        return
    if isinstance(value, nn.Module):
        found.append(value.training)
        return
    if value is None or isinstance(value, type | types.ModuleType):
        return
    if isinstance(value, types.MethodType):
        key: Hashable = (id(value.__self__), id(value.__func__))
    else:
        key = (id(value), names)
    if key in seen:
        return
    seen[key] = value  # held, so that no other object gets its id
    if isinstance(value, dict | list | tuple) or tensordicts.is_tensordict(value):
        items = value if isinstance(value, list | tuple) else value.values()
        for item in itertools.islice(items, _MOST_ITEMS):
            _add(item, names, seen, found)
        return
    _add_attributes(value, names, seen, found)
    if not str(getattr(value, "__module__", "")).startswith("torch."):
        _look_into(value, seen, found)


def _add_attributes(value: Any, names: tuple[str, ...], seen: _Seen, found: list[Any]) -> None:
    """Add those in the attributes of these names, and in what methods of these names use."""
    attributes = getattr(value, "__dict__", {})
    for name in names:
        if name in attributes:
            _add(attributes[name], names, seen, found)
        elif isinstance(method := getattr(type(value), name, None), types.FunctionType):
            _add(types.MethodType(method, value), (), seen, found)


def _contents(cells: Iterable[types.CellType]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            continue


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = [
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    ]
    return tuple(dict.fromkeys(names + [n for c in _nested(code) for n in _global_names(c)]))


@functools.lru_cache(maxsize=1024)
def _all_names(code: types.CodeType) -> tuple[str, ...]:
    """Every name in the code, those of attributes included."""
    return tuple(
        dict.fromkeys([*code.co_names, *(n for c in _nested(code) for n in _all_names(c))])
    )


def _nested(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]
