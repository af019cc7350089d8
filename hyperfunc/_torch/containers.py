"""Objects that hold tensors as nodes of trees: dataclasses, subclasses of dict, list and UserDict.

optree knows classes one by one, and takes an object of any other class for a leaf, whose tensors no
derivative, no ``vmap`` and no ``detach`` would reach. A class is registered when the first object
of it that holds a tensor is met: so are the outputs and batches of transformers, without importing
it. What cannot be taken apart is refused, by `refuse_holder`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn

from hyperfunc._torch import tracking

# Leaves of these types hold no tensors.
_PLAIN = {bool, int, float, complex, str, bytes, type(None)}
_LEAVES = {Tensor, nn.Parameter, *_PLAIN}
_CODE = (type, ModuleType, FunctionType, MethodType, nn.Module)

# An object that holds more others is a data set, and is not searched to its end.
_MOST = 1000

Class = TypeVar("Class", bound=type)
_REGISTERED: set[tuple[type, str]] = set()
_LOCK = threading.Lock()


def loadable(kind: Class) -> Class:
    """Have ``torch.load`` read named tuples of a class by default: holders of values, no code."""
    torch.serialization.add_safe_globals([kind])
    return kind


def register_holders(leaves: Iterable[Any], namespace: str) -> bool:
    """Make nodes of the classes of some leaves; whether there was any new one."""
    found = False
    for leaf in leaves:
        cls = type(leaf)
        if cls in _LEAVES or isinstance(leaf, Tensor) or (cls, namespace) in _REGISTERED:
            continue
        kind = _kind(leaf)
        if kind is not None and _holds_tensor(leaf):
            unflatten = functools.partial(kind.unflatten, cls)
            register_node(cls, kind.flatten, unflatten, kind.entry_type, namespace)
            found = True
    return found


def register_node(
    cls: type, flatten: Callable[..., Any], unflatten: Any, entry_type: Any, namespace: str
) -> None:
    """Make nodes of the objects of a class, once."""
    with _LOCK:
        if (cls, namespace) not in _REGISTERED:
            optree.register_pytree_node(
                cls, flatten, unflatten, path_entry_type=entry_type, namespace=namespace
            )
            _REGISTERED.add((cls, namespace))


def holds_attached(leaf: Any) -> bool:
    """Whether a leaf that is no tensor holds one with a derivative or a batch dimension."""
    return any(_is_attached(tensor) for _, tensor in _tensors(leaf))


def refuse_holder(leaf: Any, path: str) -> None:
    """Raise the error for such a leaf."""
    cls = type(leaf).__name__
    name = next(name for name, tensor in _tensors(leaf) if _is_attached(tensor))
    raise TypeError(
        f"{path} is an object of {type(leaf).__module__}.{cls}, which holds the tensor "
        f"{path}{name}: its derivative and its batch dimension would be lost. Put the tensor into "
        f"a dict or a dataclass, call .detach() on it, leave the object out (models of "
        f"transformers: use_cache=False), or make a node of the class: "
        f'optree.register_pytree_node({cls}, flatten, unflatten, namespace="hyperfunc")'
    )


def _is_attached(tensor: Tensor) -> bool:
    return tracking.is_attached(tensor) or tracking.has_level(tensor)


@dataclasses.dataclass(frozen=True)
class _Node:
    """What an object is beside its children: numbers and texts in its fields, and the rest."""

    keys: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    rest: dict[str, Any] = dataclasses.field(compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How objects of a kind are taken apart and put together."""

    entries: Callable[[Any], dict[Any, Any]]
    fill: Callable[[Any, dict[Any, Any]], None]
    entry_type: Any

    def flatten(self, value: Any) -> tuple[list[Any], _Node, tuple[Any, ...]]:
        entries = self.entries(value)
        constants: tuple[tuple[str, Any], ...] = ()
        if self.fill is _set_fields:  # a field is no leaf for being a number or a text
            constants = tuple((k, v) for k, v in entries.items() if type(v) in _PLAIN)
            entries = {k: v for k, v in entries.items() if type(v) not in _PLAIN}
        held = {id(entry) for entry in entries.values()}
        attributes = getattr(value, "__dict__", {})
        # some classes keep an entry as an attribute too
        rest = {name: each for name, each in attributes.items() if id(each) not in held}
        for name, each in list(rest.items()):
            if isinstance(each, dict) and each.keys() == entries.keys():
                del rest[name]  # the dict that a UserDict wraps
            elif _holds_tensor(each):
                raise TypeError(
                    f"an object of {type(value).__name__} holds a tensor in its attribute "
                    f"{name!r}, which is no field of it. Put it into a field or an entry"
                )
        mirrored = tuple(key for key in entries if attributes.get(key) is entries[key])
        constants += tuple((k, v) for k, v in rest.items() if type(v) in _PLAIN)
        node = _Node(tuple(entries), constants, {**rest, "": mirrored})
        return list(entries.values()), node, tuple(entries)

    def unflatten(self, cls: Any, node: Any, children: Iterable[Any]) -> Any:
        value = cls.__new__(cls)
        entries = dict(zip(node.keys, children, strict=True))
        rest = dict(node.rest)
        mirrored = rest.pop("")
        if hasattr(value, "__dict__"):
            value.__dict__.update(rest, **{key: entries[key] for key in mirrored})
        if self.fill is _set_fields:
            entries.update(node.constants)
        self.fill(value, entries)
        return value


def _fields(value: Any) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _set_fields(value: Any, entries: dict[str, Any]) -> None:
    for name, entry in entries.items():
        object.__setattr__(value, name, entry)


def _set_items(value: Any, entries: dict[Any, Any]) -> None:
    base = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    for key, entry in entries.items():
        base.__setitem__(value, key, entry)


def _set_data(value: Any, entries: dict[Any, Any]) -> None:
    value.__dict__["data"] = entries


def _set_list(value: Any, entries: dict[int, Any]) -> None:
    list.extend(value, entries.values())


def _kind(value: Any) -> _Kind | None:
    if isinstance(value, _CODE) or callable(value):
        return None  # a function that holds tensors closes over them
    # a dict first: the outputs of transformers are dataclasses too, whose unset fields are no items
    if isinstance(value, dict):
        return _Kind(dict, _set_items, optree.MappingEntry)
    if isinstance(value, collections.UserDict):
        return _Kind(lambda v: dict(v.data), _set_data, optree.MappingEntry)
    if isinstance(value, list):
        return _Kind(lambda v: dict(enumerate(v)), _set_list, optree.SequenceEntry)
    if dataclasses.is_dataclass(value):
        return _Kind(_fields, _set_fields, optree.GetAttrEntry)
    return None


def _holds_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an object holds, each with what to write behind its name to get it."""
    waiting: collections.deque[tuple[str, Any]] = collections.deque([("", value)])
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        path, each = waiting.popleft()
        if isinstance(each, Tensor):
            yield path, each
        elif type(each) not in _PLAIN and not isinstance(each, _CODE) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend((path + name, held) for name, held in _held(each))


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds in its attributes and items."""
    for name, each in getattr(value, "__dict__", {}).items():
        yield f".{name}", each
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        items = enumerate(value)
    for key, each in itertools.islice(items, _MOST):
        yield f"[{key!r}]", each
