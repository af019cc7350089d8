"""Which operations of torch, and custom ones, a computation calls, and with what."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hyperfunc._torch import internals, tracking

# Calls of one operation that are kept, each with arguments of other shapes.
_MOST_CALLS = 4

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_OWN = ("hyperfunc.", "torch.")


class Call(NamedTuple):
    """An operation and its arguments, below all transforms."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_custom: bool


class recorded(TorchFunctionMode):
    """Notes the operations that are called in the context, in this thread.

    A `torch.autograd.Function` hands itself to no mode of torch: the profiler of Python sees it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[tuple[Any, ...], Call] = {}

    def calls(self) -> Iterator[Call]:
        """The calls, of custom operations first."""
        return iter(sorted(self._calls.values(), key=lambda call: not call.is_custom))

    def __enter__(self) -> recorded:
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(self._before)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_custom = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
        self._note(torch.overrides.resolve_name(func) or str(func), func, args, kwargs, is_custom)
        return func(*args, **kwargs)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is _APPLY:
            cls, args = frame.f_locals["cls"], frame.f_locals["args"]
            if not f"{cls.__module__}.".startswith(_OWN):
                self._note(cls.__qualname__, cls.apply, args, frame.f_locals["kwargs"], True)

    def _note(
        self, name: str, function: Any, args: Any, kwargs: dict[str, Any], is_custom: bool
    ) -> None:
        leaves = internals.tree_leaves((args, kwargs))
        shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        if not shapes or sum(key[0] == name for key in self._calls) >= _MOST_CALLS:
            return
        try:
            with internals.outside_all(), torch._C.DisableTorchFunction():
                args, kwargs = internals.tree_map(_value, (args, kwargs))
        except RuntimeError:  # the older vmap of torch.autograd.grad has no values to look at
            return
        self._calls.setdefault((name, shapes), Call(name, function, args, kwargs, is_custom))


def _value(leaf: Any) -> Any:
    """A copy of a tensor, cut from every graph and transform."""
    return tracking.innermost(leaf).detach().clone() if isinstance(leaf, Tensor) else leaf
