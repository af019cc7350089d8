"""What a function closes over instead of taking it as an argument."""

from __future__ import annotations

import collections.abc
import dataclasses
import dis
import enum
import functools
import itertools
import numbers
import os
import sys
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hyperfunc._torch import tensordicts

_Names: TypeAlias = frozenset[str]

# A container with more items is a data set, not a tree of parameters.
_MOST_ITEMS = 1000

_SCALARS = {str, bool, int, float, complex, bytes, types.NoneType}
_CONSTANTS = (str, bytes, numbers.Number, enum.Enum)
_COLLECTIONS = (
    collections.abc.Mapping,
    collections.abc.Sequence,
    collections.abc.Set,
    collections.abc.ValuesView,
)

# Methods that code calls without naming them.
_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("getattr", "getitem", "call", "iter", "len", "contains", "bool", "float", "int", "neg"),
        *("add", "sub", "mul", "truediv", "matmul", "pow", "enter", "exit"),
        *("radd", "rsub", "rmul", "rtruediv", "rmatmul", "rpow"),
    )
)

# Where the code of Python, of installed packages, and of this one lies.
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in {
        os.path.dirname(os.__file__),
        os.path.dirname(os.path.dirname(torch.__file__)),  # with the other packages
        os.path.dirname(os.path.dirname(__file__)),
    }
)


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
    """The tensors that a function closes over; not a module's, as a call may replace those."""
    walk = _Walk()
    walk.look_into(fn)
    return walk.found


def captured_values(
    functions: Iterable[Any], names: _Names = frozenset()
) -> tuple[tuple[Hashable, ...], _Names]:
    """What code made of functions depends on besides arguments (see ``compile`` of `hypergrad`).

    Objects are looked through for ``names``, which come back with those that were missing.
    """
    while True:
        walk = _Walk(names)
        for fn in functions:
            walk.look_into(fn)
        if walk.read <= names:
            values = (
                (_Same(v), v.requires_grad) if isinstance(v, Tensor) else v for v in walk.found
            )
            return tuple(values), names
        names |= walk.read


class _Same:
    """A value that equals itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Walk:
    """Collects the tensors that functions close over, and, where names are given, the constants."""

    def __init__(self, names: _Names | None = None) -> None:
        self.found: list[Any] = []
        self.read: set[str] = set(_OPERATORS)
        self._shared = names
        self._is_thorough = names is not None
        self._seen: dict[Hashable, tuple[int, Any]] = {}

    def look_into(self, fn: Any) -> None:
        if isinstance(fn, functools.partial):
            for held in (fn.func, fn.args, fn.keywords):
                self._add(held)
        elif isinstance(fn, types.MethodType):
            code = getattr(fn.__func__, "__code__", None)
            self._add_attributes(fn.__self__, self._names(code) if code else frozenset())
            if isinstance(fn.__self__, _COLLECTIONS):
                self._add_items(fn.__self__, frozenset())
            self._add(fn.__func__)
        elif isinstance(fn, types.FunctionType):
            names = self._names(fn.__code__)
            self._note(fn.__code__)
            for held in (fn.__defaults__, fn.__kwdefaults__, *_contents(fn.__closure__ or ())):
                self._add(held, names)
            for name in _global_names(fn.__code__):
                value = fn.__globals__.get(name)
                # the functions of other modules are libraries
                if getattr(value, "__globals__", fn.__globals__) is fn.__globals__:
                    self._add(value, names)
                else:
                    self._note(_Same(value))
        elif dataclasses.is_dataclass(fn) and not isinstance(fn, type):
            for field in dataclasses.fields(fn):
                self._add(getattr(fn, field.name, None))
        elif callable(fn) and isinstance(type(fn).__call__, types.FunctionType):
            self.look_into(types.MethodType(type(fn).__call__, fn))
        elif hasattr(fn, "__wrapped__"):
            self._add(fn.__wrapped__)

    def _names(self, code: types.CodeType) -> _Names:
        """The attributes that an object is looked through for, where this code holds it."""
        names = _all_names(code)
        if self._shared is None or code.co_filename.startswith(_LIBRARIES):
            return names
        self.read |= names | _strings(code)
        return self._shared

    def _note(self, value: Any) -> None:
        if self._is_thorough:
            self.found.append(value)

    def _add(self, value: Any, names: _Names | None = None) -> None:
        """Add the values in what a function holds, whose code reads attributes of these names."""
        kind = type(value)
        if isinstance(value, Tensor):
            self.found.append(value)
            return
        if kind in _SCALARS:
            self._note((kind, value))
            return
        names = names or self._shared or frozenset()
        if kind is types.MethodType:
            key: Hashable = (id(value.__self__), id(value.__func__))
        else:
            key = (id(value), names)
        if key in self._seen:
            self._note(("again", self._seen[key][0]))
            return
        self._seen[key] = len(self._seen), value  # held, so that no other object gets its id
        if kind is types.FunctionType or kind is types.MethodType:
            if value.__dict__:
                self._add_own(value, names)
            if _is_of_torch(value):
                self._note(_Same(getattr(value, "__func__", value)))
            else:
                self.look_into(value)
        elif isinstance(value, dict | list | tuple):
            self._add_items(value, names)
            if self._is_thorough and hasattr(value, "__dict__"):
                self._add_attributes(value, names)
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, type | types.ModuleType):
            self._add_members(value, names)
        elif isinstance(value, weakref.ref):
            self._add(value(), names)
        elif tensordicts.is_tensordict(value):
            for item in itertools.islice(value.values(), _MOST_ITEMS):
                self._add(item, names)
        elif isinstance(value, _CONSTANTS):
            self._note((kind, value))
        else:
            if isinstance(value, _COLLECTIONS):
                self._add_items(value, names)
            if hasattr(value, "__dict__") or hasattr(kind, "__slots__"):
                self._note(kind)
                self._add_attributes(value, names)
            else:
                self._note(_opaque(value) if self._is_thorough else None)
            if not _is_of_torch(value):
                self.look_into(value)

    def _add_items(self, values: Any, names: _Names) -> None:
        size = len(values)
        self._note((type(values), size if size <= _MOST_ITEMS else _Same(values)))
        if isinstance(values, collections.abc.Mapping):
            for key, item in itertools.islice(values.items(), _MOST_ITEMS):
                if self._is_thorough:
                    self._add(key)
                self._add(item, names)
        else:
            for item in itertools.islice(values, _MOST_ITEMS):
                self._add(item, names)

    def _add_own(self, value: Any, names: _Names) -> set[str]:
        """Add those in an object's own attributes of these names, which are returned."""
        own = {} if isinstance(value, type) else getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            own = own | value._modules
        found = {name for name in own if name in names}
        for name in sorted(found):
            self._note(name)
            self._add(own[name], names)
        return found

    def _add_attributes(self, value: Any, names: _Names) -> None:
        """Add those in the attributes of these names, and in what methods of these names use."""
        found = self._add_own(value, names)
        cls = value if isinstance(value, type) else type(value)
        for name in _member_names(cls, names):
            if name not in found:
                self._note(name)
                for member in (vars(c)[name] for c in cls.__mro__ if name in vars(c)):
                    if not self._add_member(value, member, name, names):
                        break

    def _add_member(self, value: Any, member: Any, name: str, names: _Names) -> bool:
        """Add what a member of the class of an object holds; whether it may call super()."""
        if isinstance(member, property | functools.cached_property):
            member = getattr(member, "fget", getattr(member, "func", None))
        elif isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, types.FunctionType):
            self._add(types.MethodType(member, value))
            return "__class__" in member.__code__.co_freevars
        if isinstance(member, types.MemberDescriptorType):
            self._add(getattr(value, name, None), names)
        elif self._is_thorough and not hasattr(member, "__get__"):
            self._add(member, names)
        return False

    def _add_members(self, value: Any, names: _Names) -> None:
        """Add those of a class or an imported module, where constants count."""
        if not self._is_thorough:
            return
        self._note(_Same(value))
        module = sys.modules.get(value.__module__) if isinstance(value, type) else value
        if str(getattr(module, "__file__", "")).startswith(_LIBRARIES):
            return
        if isinstance(value, type):
            self._add_attributes(value, names)
            return
        for name in sorted(names & vars(value).keys()):
            if not callable(vars(value)[name]):
                self._note(name)
                self._add(vars(value)[name], names)

    def _add_module(self, module: nn.Module) -> None:
        """Add what the calls of a module depend on besides parameters and buffers."""
        if not self._is_thorough:
            return
        for part in module.modules():
            self._note(type(part))
            for name, value in vars(part).items():
                if type(value) in _SCALARS:
                    self._note((name, type(value), value))
            if not _is_of_torch(part):
                self.look_into(types.MethodType(type(part).forward, part))


def _is_of_torch(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("torch.")


def _opaque(value: Any) -> Hashable:
    """A value without attributes as something hashable: by value if it can be, or by identity."""
    try:
        hash(value)
        return type(value), value
    except TypeError:
        pass
    try:
        view = memoryview(value)
        if view.nbytes <= 8 * _MOST_ITEMS and "O" not in view.format:
            return type(value), view.format, view.shape, view.tobytes()
    except (TypeError, ValueError, BufferError):
        pass
    return _Same(value)


def _contents(cells: Iterable[types.CellType]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            continue


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that code reads, none for a library's, whose globals are its own."""
    if code.co_filename.startswith(_LIBRARIES):
        return ()
    names = [
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    ]
    return tuple(dict.fromkeys(names + [n for c in _nested(code) for n in _global_names(c)]))


@functools.lru_cache(maxsize=1024)
def _all_names(code: types.CodeType) -> _Names:
    """Every name in the code, those of attributes included."""
    return frozenset(code.co_names).union(*map(_all_names, _nested(code)))


@functools.lru_cache(maxsize=1024)
def _strings(code: types.CodeType) -> _Names:
    """Constants in the code that may be names of attributes, for getattr."""
    strings = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(strings).union(*map(_strings, _nested(code)))


@functools.lru_cache(maxsize=1024)
def _member_names(cls: type, names: _Names) -> tuple[str, ...]:
    """Those of the names that are members of a class, object's own left out."""
    return tuple(sorted({name for c in cls.__mro__[:-1] for name in vars(c) if name in names}))


def _nested(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]
