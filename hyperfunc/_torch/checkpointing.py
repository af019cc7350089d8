"""`torch.utils.checkpoint` in functions that are differentiated here.

It computes a part of a function again in the backward pass, when `torch.func.functional_call` has
taken the parameters out of a module again, and under no transform of torch.func at all: gradients
came out as zeros or NaN. With ``use_reentrant=True`` it loses the derivatives by all that the part
closes over, and has none of higher order. So such parts are computed once and kept, as without it,

- inside `computed_once`, which is where a module is called with tensors put in from outside, and
- in a function of the user's that is differentiated here: with ``use_reentrant=True``, and under
  transforms. Outside of these ``use_reentrant=False`` is right, and saves the memory as it should.

The two functions of torch that are replaced for this ask what holds in their thread, and do in
every other place what they did before. `hyperfunc.checkpoint` saves the memory everywhere.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from hyperfunc._torch import internals, tracking

_LOCK = threading.Lock()

# What non-reentrant checkpoints run, which torch 2.14 has under another name.
_GENERATOR = "_checkpoint_without_reentrant_generator"
if hasattr(torch_checkpoint, f"{_GENERATOR}_impl"):
    _GENERATOR += "_impl"


class _Thread(threading.local):
    arguments: tuple[Any, ...] | None = None  # those of the forward that is running, if one is


_thread = _Thread()


@contextlib.contextmanager
def computed_once(*arguments: Any) -> Iterator[None]:
    """Where `torch.utils.checkpoint` calls its function and does nothing else."""
    if torch.compiler.is_compiling():  # which checkpoints in a way of its own
        yield
        return
    before, _thread.arguments = _thread.arguments, arguments
    try:
        yield
    finally:
        _thread.arguments = before


def made_inside(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made by the forward of a module that is running."""
    arguments = _thread.arguments
    return arguments is not None and all(
        tensor is not leaf for leaf in internals.tree_leaves(arguments)
    )


def _inside_transform() -> bool:
    """Whether a transform is active, or left for a while and still refuses what is needed here."""
    return tracking.transforms_active() or not internals.saved_tensors_hooks_enabled()


def replace(is_differentiated: Callable[[], bool]) -> None:
    """Put in the two functions, once a process; the argument tells whether a derivative is taken.

    That is, by this package, of what runs now in this thread.
    """
    original: Any = getattr(torch_checkpoint, _GENERATOR)
    if getattr(original, "_asks_hyperfunc", False):
        return
    with _LOCK:
        reentrant_function: Any = torch_checkpoint.CheckpointFunction
        reentrant = reentrant_function.apply

        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if _thread.arguments is not None or is_differentiated():
                return function(*args)
            return reentrant(function, preserve, *args)

        def without_reentrant(*args: Any, **keywords: Any) -> Iterator[None]:
            if _thread.arguments is not None or (is_differentiated() and _inside_transform()):
                yield
                return
            yield from original(*args, **keywords)

        without_reentrant._asks_hyperfunc = True  # type: ignore[attr-defined]
        reentrant_function.apply = staticmethod(apply)
        setattr(torch_checkpoint, _GENERATOR, without_reentrant)
