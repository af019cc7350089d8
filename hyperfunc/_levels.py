"""Tensors inside ``vmap`` and what they are outside of it: one tensor with the batch in front."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, coerce_cinterpreter

Levels: TypeAlias = tuple[tuple[int, int], ...]
"""The level and the batch size of each ``vmap``, the outermost first."""


def is_traced() -> bool:
    """Whether ``make_fx`` records what is computed."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def vmap_levels() -> Levels:
    """The active transforms, if these are ``vmap`` alone and nothing else follows values; or ()."""
    if torch.compiler.is_compiling():
        return ()
    stack = _functorch.get_interpreter_stack()
    if (
        not stack
        or any(entry.key() != _functorch.TransformType.Vmap for entry in stack)
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_inference_mode_enabled()
        or is_traced()
    ):
        return ()
    interpreters = [coerce_cinterpreter(entry) for entry in stack]
    return tuple(
        (interpreter.level(), interpreter.batch_size())
        for interpreter in interpreters
        if isinstance(interpreter, VmapInterpreter)
    )


def is_batched(tensor: Tensor, levels: Levels) -> bool:
    """Whether a tensor has the batch dimension of every level."""
    for level, _ in reversed(levels):
        if _functorch.maybe_get_level(tensor) != level:
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def lower(tensor: Tensor, levels: Levels) -> Tensor:
    """The tensor below all levels, with a dimension for each of them in front."""
    for level, size in reversed(levels):
        if _functorch.maybe_get_level(tensor) == level:
            dim = _functorch.maybe_get_bdim(tensor)
            tensor = _functorch.get_unwrapped(tensor)
            tensor = tensor.movedim(dim, 0) if dim else tensor
        else:
            tensor = tensor.expand(size, *tensor.shape)
    return tensor
