"""`torch.utils.checkpoint` inside functions whose tensors are put in from outside.

It computes a part of a module again in the backward pass, when `torch.func.functional_call` has
taken the parameters out again, and under no transform of torch.func at all: gradients came out as
zeros or NaN. Inside `computed_once` such parts are computed once and kept, as without it. The two
functions of torch that are replaced for this ask a flag of their thread, and do in every other
place what they did before. `hyperfunc.checkpoint` saves the memory, and holds under transforms.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

_LOCK = threading.Lock()


class _Thread(threading.local):
    inside = False


_thread = _Thread()


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Where `torch.utils.checkpoint` calls its function and does nothing else."""
    if torch.compiler.is_compiling():  # which checkpoints in a way of its own
        yield
        return
    _replace()
    before, _thread.inside = _thread.inside, True
    try:
        yield
    finally:
        _thread.inside = before


def _replace() -> None:
    """Put in the two functions, once a process."""
    original = torch_checkpoint._checkpoint_without_reentrant_generator
    if getattr(original, "_asks_hyperfunc", False):
        return
    with _LOCK:
        reentrant_function: Any = torch_checkpoint.CheckpointFunction
        reentrant = reentrant_function.apply

        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if _thread.inside:
                return function(*args)
            return reentrant(function, preserve, *args)

        def without_reentrant(*args: Any, **keywords: Any) -> Iterator[None]:
            if _thread.inside:
                yield
                return
            yield from original(*args, **keywords)

        without_reentrant._asks_hyperfunc = True  # type: ignore[attr-defined]
        reentrant_function.apply = staticmethod(apply)
        torch_checkpoint._checkpoint_without_reentrant_generator = without_reentrant
