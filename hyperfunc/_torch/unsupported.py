"""What torch cannot do for the tensors of a call, said by their names."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import sharding, tracking

# Where code is that the user did not write.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<frozen")

_COMPILED = (
    "calls code that torch.compile made, which has no derivative of a derivative, and a "
    "hypergradient needs one. Leave torch.compile out of your functions (apply in place of "
    "torch.compile(apply)), and compile what is differentiated: hf.hypergrad(..., compile=True), "
    "hf.minimize(..., compile=True) or hf.iterate(..., compile=True)"
)

_LOOP = "hf.task_map(fn, in_dims, chunk_size=1), which maps tasks in a loop"

# What torch says of code that vmap cannot map, or no transform can, and what helps.
_ADVICE = (
    (
        ("randomness",),
        "draws random numbers (Dropout?) under vmap, which must be told whether tasks share them: "
        'torch.func.vmap(..., randomness="different") draws anew for each task, randomness="same" '
        "once for all. jacfwd takes the same keyword; or call module.eval() before "
        "functional(module)",
    ),
    (
        ("extra_args is not possible", "broadcast shape", "out= or view ops", "were not batched"),
        "writes in place, under vmap, to a tensor that all tasks share. If that is a buffer, use "
        'functional(module, buffers="update"), where each task has its own; or write '
        "`self.buffer = new_value` instead of `self.buffer.copy_(new_value)` or `out=self.buffer`. "
        "If the code makes it, write `A = A + x` for `A += x`, or make it of a mapped tensor: "
        "x.new_zeros(shape). For torch.nn.utils.spectral_norm, take "
        f"torch.nn.utils.parametrizations.spectral_norm. Or use {_LOOP}",
    ),
    (
        ("mutate a captured Tensor",),
        "writes in place to a tensor attribute that is not a buffer. Register it by "
        "self.register_buffer, or write `self.attribute = new_value`",
    ),
    (
        ("data-dependent control flow", "calling .item()"),
        "branches on the value of a tensor (if, while, .item(), bool(), float()), which differs "
        f"from task to task under vmap. Write torch.where(condition, a, b), or use {_LOOP}",
    ),
    (
        (
            "Batching rule not implemented",
            "we do not yet support aten::",
            "not supported inside of vmap",
            "can output dynamic shape",
        ),
        f"uses an operation that torch cannot map by vmap. Use {_LOOP}",
    ),
    (
        ("inside a functorch transform", "inside of a function being", "does not require grad"),
        "calls backward() or torch.autograd under a transform of torch.func. Write "
        "torch.func.grad(loss)(params)",
    ),
    (
        ("that doesn't have storage",),
        "reads the memory of a tensor (by NumPy? the lengths of packed sequences?) under a "
        f"transform of torch.func. Write it in torch, or use {_LOOP}",
    ),
)

# And of what it has no derivative for, in a transform or not.
_GAPS = (
    (
        ("Trying to use forward AD with", "ZeroTensors are immutable"),
        "uses an operation that torch has no forward mode for, which jvp, jacfwd, hessian and "
        'method="forward" take. Use vjp, grad, jacrev and method="reverse", or write the operation '
        "by elementary ones",
    ),
    (
        ("derivative for aten::", "the derivative for '"),
        "uses an operation whose derivative torch cannot differentiate again. Write it by "
        "elementary operations",
    ),
    (
        ("autograd.Function", "does not have vmap support", "functions with out=... arguments"),
        "calls a torch.autograd.Function that lacks what is needed here. Give it setup_context, "
        "generate_vmap_rule = True, a jvp, and a backward without `out=`; in place of "
        "torch.nn.CrossMapLRN2d take torch.nn.LocalResponseNorm",
    ),
)


class Unmappable(RuntimeError):
    """What `refuse_unmappable` raises, shown to users as the RuntimeError that it is."""


Unmappable.__name__ = Unmappable.__qualname__ = "RuntimeError"
Unmappable.__module__ = "builtins"


def refuse_unmappable(what: str, error: RuntimeError) -> None:
    """Raise with advice if torch cannot map or differentiate some code; ``what`` names the code."""
    if isinstance(error, Unmappable):
        return
    for fragments, advice in (*_GAPS, *(_ADVICE if tracking.transforms_active() else ())):
        if any(text in str(error) for text in fragments):
            reason = " ".join(str(error).split())[:120]
            raise Unmappable(f"{what} {advice} (torch says: {reason})") from error


@contextlib.contextmanager
def explained(caller: Any, arguments: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Name the argument in errors of torch, if it is one for which torch lacks operations.

    ``arguments()`` are the tensors of the call by the expressions that the user knows them by.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        tensors = arguments()
        if "mixed torch.Tensor and DTensor" in str(error):
            raise ValueError(f"{caller}: {_mixed(tensors)}") from error
        for path, leaf in tensors.items():
            below = tracking.innermost(leaf)
            if below.layout is not torch.strided and "sparse" in reason.lower():
                raise NotImplementedError(
                    f"{caller}: {path} has layout {below.layout}, for which torch lacks an "
                    f"operation that is needed here ({reason}). Write {path}.to_dense(). Without "
                    f"torch.func, forward mode and compile sparse data may stay as it is: "
                    f"hf.task_map(fn, in_dims, chunk_size=1) maps tasks in a loop"
                ) from error
            if below.numel() == 0 < leaf.numel():
                raise ValueError(
                    f"{caller}: {path} is mapped over no tasks, by a vmap over a dimension of size "
                    f"0, for which torch lacks an operation that is needed here ({reason}). Leave "
                    f"the call out where there are no tasks"
                ) from error
        if "does not currently support double backward" in str(error):
            raise NotImplementedError(f"{caller} {_COMPILED} (torch says: {reason})") from error
        if isinstance(error, RuntimeError):
            refuse_unmappable(f"{caller}: {_culprit(error)}", error)
        raise


def _culprit(error: RuntimeError) -> str:
    """The innermost function of the user's in the traceback of an error, and its line."""
    found = "a function"
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES):
            found = f"{code.co_name} ({Path(code.co_filename).name}, line {line})"
    return found


def _mixed(tensors: Mapping[str, Tensor]) -> str:
    """What to say where torch was given an ordinary tensor beside a DTensor."""
    below = {path: tracking.innermost(leaf) for path, leaf in tensors.items()}
    sharded = [path for path, leaf in below.items() if sharding.is_dtensor(leaf)]
    mesh = f"{sharded[0]}.device_mesh" if sharded else "mesh"
    plain = ", ".join(path for path in tensors if path not in sharded)
    return (
        f"an operation got ordinary tensors and DTensors together, for which torch has no rule. "
        f"The ordinary ones: {plain or 'one that the inner solver returned or your functions made'}"
        f". Write distribute_tensor(x, {mesh}, [Replicate()]) around them, with one placement for "
        f"each dimension of the mesh, or let your functions call .full_tensor() on the others"
    )
