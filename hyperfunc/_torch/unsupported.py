"""What torch cannot do for the tensors of a call, said by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import sharding, tracking


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
        raise


def _mixed(tensors: Mapping[str, Tensor]) -> str:
    """What to say where torch was given an ordinary tensor beside a DTensor."""
    sharded = {
        path for path, leaf in tensors.items() if sharding.is_dtensor(tracking.innermost(leaf))
    }
    mesh = next((f"{path}.device_mesh" for path in tensors if path in sharded), "mesh")
    plain = ", ".join(path for path in tensors if path not in sharded)
    return (
        f"an operation got ordinary tensors and DTensors together, for which torch has no rule. "
        f"The ordinary ones: {plain or 'one that the inner solver returned or your functions made'}"
        f". Write distribute_tensor(x, {mesh}, [Replicate()]) around them, with one placement for "
        f"each dimension of the mesh, or let your functions call .full_tensor() on the others"
    )
