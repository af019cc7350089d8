"""TensorDicts as nodes of trees, once the program has imported tensordict: nothing here does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import optree
from torch import Tensor

from hyperfunc._torch.containers import register_node

_REGISTERED: set[str] = set()  # a cached function would not do: torch.compile looks into it


def register(namespace: str) -> None:
    """Make nodes of TensorDict and TensorDictParams, if the program has imported tensordict.

    Both are unflattened to a TensorDict.
    """
    module = _imported()
    if module is not None and namespace not in _REGISTERED:
        unflatten = functools.partial(_unflatten, module)
        for cls in (module.TensorDict, module.TensorDictParams):
            register_node(cls, _flatten, unflatten, optree.MappingEntry, namespace)
        _REGISTERED.add(namespace)


def is_tensordict(value: Any) -> bool:
    """Whether a value is a TensorDict of any class, or a tensorclass."""
    module = _imported()
    return module is not None and bool(module.is_tensor_collection(value))


def _imported() -> Any:
    module = sys.modules.get("tensordict")
    return module if hasattr(module, "TensorDictParams") else None  # None while it is half imported


@dataclasses.dataclass(frozen=True)
class _Node:
    """What a TensorDict is beside its entries. As for tensors, sizes do not make the structure."""

    keys: tuple[str, ...]
    batch_dims: int
    names: tuple[str | None, ...] = dataclasses.field(compare=False)
    device: Any = dataclasses.field(compare=False)
    ndims: tuple[int, ...] = dataclasses.field(compare=False)
    batch_size: tuple[int, ...] = dataclasses.field(compare=False)

    def __repr__(self) -> str:
        return f"batch_dims={self.batch_dims}"


def _flatten(tree: Any) -> tuple[list[Any], _Node, tuple[str, ...]]:
    entries = dict(tree.items())
    keys = tuple(sorted(entries))
    children = [entries[key] for key in keys]
    ndims = tuple(child.ndim for child in children)
    size = tuple(tree.batch_size)
    return children, _Node(keys, len(size), tuple(tree.names), tree.device, ndims, size), keys


def _unflatten(module: Any, node: _Node, children: Sequence[Any]) -> Any:
    """The TensorDict of these children, which may have won or lost dimensions at the front."""
    entries = dict(zip(node.keys, children, strict=True))
    if not all(isinstance(c, Tensor) or module.is_tensor_collection(c) for c in children):
        return entries  # of numbers, say, which a TensorDict would turn into tensors
    change, batch_size = 0, node.batch_size
    if children:
        change = min(c.ndim - ndim for c, ndim in zip(children, node.ndims, strict=True))
        sizes = zip(*(c.shape[: max(node.batch_dims + change, 0)] for c in children), strict=False)
        common = itertools.takewhile(lambda column: len(set(column)) == 1, sizes)
        batch_size = tuple(column[0] for column in common)
    kept = len(batch_size) == node.batch_dims and change == 0
    same_device = {getattr(child, "device", None) for child in children} <= {node.device}
    return module.TensorDict(
        entries,
        batch_size=batch_size,
        names=node.names if kept else None,
        device=node.device if same_device else None,
    )
