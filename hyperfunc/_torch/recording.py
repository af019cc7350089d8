"""Which operations of torch, and custom ones, a computation calls, and with what."""

from __future__ import annotations

import inspect
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

# The code of `torch.autograd.Function.apply`; None for the built-in method of torch 2.14.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
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
        self._applied: type[torch.autograd.Function] | None = None

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

    def _see(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call" and frame.f_code is _APPLY:
            names = frame.f_locals
            self._note_custom(names["cls"], names["args"], names["kwargs"])
        elif event == "c_call" and getattr(function, "__name__", "") == "apply":
            # a built-in method, whose arguments are seen when it calls what the user wrote
            owner = getattr(function, "__self__", None)
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                self._applied = owner
        elif event == "call" and self._applied is not None:
            owner = self._applied
            if frame.f_code is getattr(owner.forward, "__code__", None):
                self._applied = None
                self._note_custom(owner, _positional(frame)[0 if _has_setup(owner) else 1 :], {})

    def _note_custom(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not f"{cls.__module__}.".startswith(_OWN):
            self._note(cls.__qualname__, cls.apply, args, kwargs, True)

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


def _positional(frame: FrameType) -> tuple[Any, ...]:
    """The positional arguments that a function of Python was called with."""
    code, values = frame.f_code, frame.f_locals
    args = tuple(values[name] for name in code.co_varnames[: code.co_argcount])
    if code.co_flags & inspect.CO_VARARGS:
        args += values[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
    return args


def _has_setup(cls: Any) -> bool:
    return cls.setup_context is not torch.autograd.Function.setup_context
