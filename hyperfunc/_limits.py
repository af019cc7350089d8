"""What torch cannot do for the tensors of a call, said by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hyperfunc import _ad, _tree


@contextlib.contextmanager
def explained(caller: Any, arguments: Callable[[], tuple[Any, ...]]) -> Iterator[None]:
    """Name the argument in errors of torch, if it is one for which torch lacks operations.

    ``arguments()`` is ``(hparams, *args)``.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        hparams, *args = arguments()
        for path, leaf in (*_tensors("hparams", hparams), *_tensors("args", args)):
            below = _ad.innermost(leaf)
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


def _tensors(root: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    leaves, spec = _tree.flatten(tree)
    for path, leaf in zip(_tree.paths(spec, root), leaves, strict=True):
        if isinstance(leaf, Tensor):
            yield path, leaf
