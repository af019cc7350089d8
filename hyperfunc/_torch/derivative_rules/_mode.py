"""The table, and the mode in which its rows stand in for the operations of torch."""

from __future__ import annotations

import functools
import math
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from hyperfunc._torch import batching, checkpointing, internals, tracking

F = TypeVar("F", bound=Callable[..., Any])

# What a row returns in place of a result to leave a call to torch, which may know what is wrong.
TORCHS_OWN = cast(torch.Tensor, object())

_rows: dict[Callable[..., Any], _Row] = {}
_opened: dict[Callable[..., Any], Callable[..., Any]] = {}


class _Row(NamedTuple):
    function: Callable[..., Any]
    right_up_to: int
    in_vmap: bool
    state: tuple[int, ...]

    def carries_state(self, args: tuple[Any, ...]) -> bool:
        """Whether a derivative flows by the arguments that torch has none for."""
        state = [args[i] for i in self.state if i < len(args) and args[i] is not None]
        marks = [getattr(tensor, tracking.STATE, None) for tensor in state]
        if None in marks and _here.record is not None:
            _here.record.uses_rows = True  # in a later call it may
        return any(
            tracking.is_attached(tensor) if mark is None else mark
            for tensor, mark in zip(state, marks, strict=True)
        )


def in_place_of(
    *operations: Callable[..., Any],
    right_up_to: int = 1,
    in_vmap: bool = False,
    state: tuple[int, ...] = (),
) -> Callable[[F], F]:
    """Add a row: a function that stands in for operations with its signature.

    Where it returns ``TORCHS_OWN``, the operation itself is taken. So it is where no more
    derivatives are taken than torch has right, ``right_up_to``: outside of transforms, and with
    ``in_vmap``, inside of a vmap that is not itself differentiated, too; but not where derivatives
    flow by the arguments at the positions ``state``, for which torch has none.
    """

    def add(row: F) -> F:
        _rows.update(dict.fromkeys(operations, _Row(row, right_up_to, in_vmap, state)))
        return row

    return add


def torch_is_right(up_to: int, in_vmap: bool) -> bool:
    """Whether no more derivatives than these are taken of what runs now, without a vmap between."""
    if not 0 < _here.order <= up_to:
        return False
    if not tracking.transforms_active():
        return _here.outside == 0
    if not in_vmap or torch.is_autocast_enabled("cpu") or internals.forward_mode_active():
        return False
    inside = (internals.active_transforms() or ())[_here.outside :]
    return len(inside) == _here.order and all(t.key() == internals.GRAD for t in inside)


def in_mode(function: Callable[..., Any], *args: Any) -> Any:
    """Call another operation from a row, by its own row if that is needed."""
    with _MODE:
        return function(*args)


def rules() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table, from an operation to what stands in for it."""
    return {operation: row.function for operation, row in _rows.items()}


class active:
    """Compute what the table lists by its rows, in this thread, as long as the context lasts.

    If it is not ``wanted``, only notes what happens: the record that is yielded says afterwards
    whether a row was used. ``order`` is how many derivatives are taken of what runs in the context;
    those of the contexts around it are added. Where that is not known, there may be any number.
    """

    __slots__ = ("_entered", "_order", "_outer", "_record", "_wanted")

    def __init__(self, wanted: bool = True, order: float = 0) -> None:
        self._wanted = wanted
        self._order = order

    def __enter__(self) -> Record:
        if _is_compiling():
            self._outer = None
            return Record(None)
        checkpointing.replace(_is_differentiated)
        here = _here
        self._record = Record(here.record)
        self._outer = here.order, here.outside
        if self._order and not here.order:
            here.outside = len(internals.active_transforms() or ())
        here.order += self._order
        here.record = self._record
        self._entered = self._wanted and not here.suspended and not _is_on()
        if self._entered:
            torch._C._push_on_torch_function_stack(_MODE)
        return self._record

    def __exit__(self, *error: Any) -> None:
        if self._outer is None:
            return
        if self._entered:
            torch._C._pop_torch_function_stack()
        _here.record = self._record.close()
        _here.order, _here.outside = self._outer


class counting:
    """`active` where it is not wanted, for which nothing is noted: only the derivatives count."""

    __slots__ = ("_order", "_outer")

    def __init__(self, order: float) -> None:
        self._order = order

    def __enter__(self) -> None:
        if _is_compiling():
            self._outer = None
            return
        checkpointing.replace(_is_differentiated)
        here = _here
        self._outer = here.order, here.outside
        if not here.order:
            here.outside = len(internals.active_transforms() or ())
        here.order += self._order

    def __exit__(self, *error: Any) -> None:
        if self._outer is not None:
            _here.order, _here.outside = self._outer


def known_to_be_right() -> bool:
    """Whether this is a later call of a function that was looked through; see `Watch`."""
    return _here.suspended


def derivatives(tracked: bool) -> float:
    """How many derivatives a gradient adds: one, if nothing outside may differentiate it again."""
    return math.inf if tracked and _here.order == 0 else 1


class Record:
    """Whether a row was used, the value of a tensor was read, or a gradient taken by torch."""

    __slots__ = ("_outer", "nests", "reads_values", "uses_rows")

    def __init__(self, outer: Record | None) -> None:
        self._outer = outer
        self.uses_rows = False
        self.reads_values = False
        self.nests = False

    def close(self) -> Record | None:
        """Tell the record around this one, and return it."""
        if self._outer is not None:
            self._outer.uses_rows |= self.uses_rows
            self._outer.reads_values |= self.reads_values
            self._outer.nests |= self.nests
        return self._outer


class Watch:
    """`active` for many calls of one pure function, such as the steps of a loop.

    The mode costs a few microseconds for each operation of torch, so the first call finds out
    whether the function has one of the table, and if not, the others go without. That holds if
    nothing in its course depends on values: shapes and constants are the same in all calls of the
    loop, and a function that reads the values of tensors (``if``, ``.item()``, boolean masks) is
    called in the mode each time. The answer is kept here, for one loop, and for each combination of
    gradient mode and transforms.
    """

    def __init__(self) -> None:
        self._plain: dict[tuple[bool, int, float], bool] = {}
        self._order: float = 0

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(*args)``, in the mode where that is needed."""
        if _here.suspended or _is_compiling():
            return fn(*args)
        depth = len(internals.active_transforms() or ())
        circumstances = (torch.is_grad_enabled(), depth, _here.order)
        if self._plain.get(circumstances):
            return _suspended(fn, args)
        if circumstances in self._plain:
            with active(order=self._order):
                return fn(*args)
        result, record = evaluate(fn, args, self._order)
        unforeseen = record.reads_values or record.nests
        self._plain[circumstances] = not (record.uses_rows or unforeseen)
        if unforeseen:
            self._order = math.inf
        return result


def again() -> active:
    """The mode, if a row was used since the record of the context around this began.

    For backward passes, so that what is computed again there (by torch.utils.checkpoint) is so by
    the same rules.
    """
    return active(_here.record is not None and _here.record.uses_rows)


class inactive:
    """A context in which the mode is off, but for what enters it again."""

    __slots__ = ("_left",)

    def __enter__(self) -> None:
        self._left = not _is_compiling() and _is_on_top()
        if self._left:
            torch._C._pop_torch_function_stack()

    def __exit__(self, *error: Any) -> None:
        if self._left:
            torch._C._push_on_torch_function_stack(_MODE)


def evaluate(fn: Callable[..., Any], args: Sequence[Any], order: float) -> tuple[Any, Record]:
    """``fn(*args)``, of which so many derivatives are taken, and what was noted.

    If the function differentiates on its own account, by ``torch.autograd``, there is one
    derivative more than was counted, and it is called once more.
    """
    if _is_compiling():
        return fn(*args), Record(None)
    counted = 0 < _here.order + order < math.inf and not _here.suspended
    states = _random_states(args) if counted else []
    with active(order=order) as record:
        result = fn(*args)
    if counted and record.nests:
        for write, state in states:
            write(state)
        with active(order=math.inf) as record:
            result = fn(*args)
        record.nests = True
    return result, record


class _Rules(TorchFunctionMode):
    """Calls the rows in place of the operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _rows:
            row = _rows[func]
            carries_state = bool(row.state) and row.carries_state(args)
            if carries_state or not torch_is_right(row.right_up_to, row.in_vmap):
                result = row.function(*args, **kwargs)
                if result is not TORCHS_OWN:
                    if _here.record is not None:
                        _here.record.uses_rows = True
                    return result
        elif func in _opened:
            if _here.record is not None and kwargs.get("create_graph"):
                _here.record.nests |= not _by_transform()
            with self:
                return _opened[func](*args, **kwargs)
        elif _reads_values(func, args):
            if _here.record is not None:
                _here.record.reads_values = True
            if func in _NUMBERS:
                return func(batching.common_value(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)


class _Here(threading.local):
    """What holds in this thread."""

    suspended = False  # it is known that nothing that runs now needs the mode
    record: Record | None = None
    order: float = 0  # how many derivatives are taken of what runs now, if that is known
    outside: int = 0  # and how many transforms, all of them vmaps then, are outside of these


_here = _Here()
_MODE = _Rules()


def _is_differentiated() -> bool:
    return _here.order > 0


def _is_on() -> bool:
    return any(
        torch._C._get_function_stack_at(i) is _MODE
        for i in range(torch._C._len_torch_function_stack())
    )


def _is_on_top() -> bool:
    size = torch._C._len_torch_function_stack()
    return size > 0 and torch._C._get_function_stack_at(size - 1) is _MODE


def _by_transform() -> bool:
    """Whether it is ``torch.func`` that calls `torch.autograd.grad` now: its levels are counted."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(
        ("torch.overrides", "torch.autograd", "torch._tensor")
    ):
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).startswith("torch._functorch")


def _is_compiling() -> bool:
    return torch.compiler.is_compiling()


def _suspended(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``fn(*args)`` without the mode, even if it is on."""
    with inactive():
        _here.suspended = True
        try:
            return fn(*args)
        finally:
            _here.suspended = False


# What makes a number of Python from a tensor, or a shape that depends on its values.
_VALUES = frozenset(
    {
        *("__array__", "__bool__", "__complex__", "__contains__", "__dlpack__", "__float__"),
        *("__format__", "__index__", "__int__", "__repr__", "__str__", "_unique", "_unique2"),
        *("allclose", "argwhere", "bincount", "data_ptr", "equal", "histc", "histogram"),
        *("index", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_static", "numpy"),
        *("repeat_interleave", "storage", "to_sparse", "tolist", "unique"),
        *("unique_consecutive", "unique_dim", "untyped_storage"),
    }
)
# Those that make a number, on which code may branch under vmap if it is the same for all tasks.
_NUMBERS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("__bool__", "__complex__", "__float__", "__index__", "__int__", "item")
)
_INDEXING = frozenset({torch.Tensor.__getitem__, torch.Tensor.__setitem__})


def _random_states(tensors: Sequence[Any]) -> list[tuple[Callable[..., Any], torch.Tensor]]:
    """The states of the streams that a function of these tensors draws from, with their setters."""
    states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
    cuda = {t.device for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda}
    for device in cuda:
        write = functools.partial(torch.cuda.set_rng_state, device=device)
        states.append((write, torch.cuda.get_rng_state(device)))
    return states


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _INDEXING:
        return _has_mask(args[1])
    return getattr(func, "__name__", None) in _VALUES


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple | list) else (index,)
    return any(isinstance(p, torch.Tensor) and p.dtype in (torch.bool, torch.uint8) for p in parts)


def unguarded(function: Any) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that runs its body even while a mode is on.

    As it is, it would hand itself to the mode, and the operations in its body would not be seen.
    """
    no_override = {
        name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_func")
    }
    copy = types.FunctionType(
        function.__code__,
        function.__globals__ | no_override,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


differentiate = unguarded(torch.autograd.grad)
"""`torch.autograd.grad` that does not hand itself to a mode."""


def open_functionals() -> None:
    """Find the functions in Python that call an operation of the table, or code of the user."""
    for function in (torch.autograd.grad, torch.Tensor.backward):
        _opened[function] = unguarded(function)
    found = list(_rows)
    while found:  # and those that call one which was found
        names = {operation.__name__ for operation in found}
        found = [
            function
            for function in vars(torch.nn.functional).values()
            if isinstance(function, types.FunctionType)
            and function not in _rows
            and function not in _opened
            and names.intersection(function.__code__.co_names)
        ]
        _opened.update((function, unguarded(function)) for function in found)
