"""Rows of tensors by indices that differ between tasks, or that a compiler does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def row(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` for a 0-d tensor of integers, whose value is not read."""
    # not index_select, whose derivative under vmap inductor gets wrong (torch 2.13)
    return rows[index.reshape(1).to(rows.device)].squeeze(0)


class RowsByIndex(TorchFunctionMode):
    """Within this context, ``rows[index]`` reads no value, as compiled code and ``vmap`` need."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor):
            rows, index = args
            if rows.ndim and index.ndim == 0 and index.dtype in (torch.int32, torch.int64):
                return row(rows, index)
        return func(*args, **(kwargs or {}))
