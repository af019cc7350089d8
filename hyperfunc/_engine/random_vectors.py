"""Random vectors as a pure function of a seed.

`torch.func.vmap` refuses torch's generators by default, and a solver must give the same numbers in
every call. So the entries come from a hash of their position and the seed: the same on every
device, for any number of ranks, and for every task.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from hyperfunc._engine.trees import unravel
from hyperfunc._torch import loops, sharding
from hyperfunc._types import Leaves

_Integer = TypeVar("_Integer", int, Tensor)


def random_signs(like: Leaves, seed: int) -> Leaves:
    """Independent entries -1 or 1 with equal probability, in the layout of ``like``."""
    return unravel(1.0 - 2.0 * (_bits(like, seed) >> 31), like)


def random_uniform(like: Leaves, seed: int) -> Leaves:
    """Independent entries uniform in [-1, 1), in the layout of ``like``."""
    return unravel(_bits(like, seed) / 2.0**31 - 1.0, like)


def random_sample(size: int, count: int, seed: int) -> list[int]:
    """Distinct integers below a size, in increasing order, by Floyd's algorithm."""
    chosen: set[int] = set()
    for bound in range(size - count, size):
        index = _mix(_mix(bound) ^ _mix(seed + 1)) % (bound + 1)
        chosen.add(bound if index in chosen else index)
    return sorted(chosen)


def _bits(like: Leaves, seed: int) -> Tensor:
    if loops.are_kept():  # a constant, as compiling all that makes it takes half a minute
        return loops.untraced(lambda: _hashed(like, seed))
    return _hashed(like, seed)


def _hashed(like: Leaves, seed: int) -> Tensor:
    size = sum(leaf.numel() for leaf in like)
    position = torch.arange(size, dtype=torch.int64, device=like[0].device)
    layout = sharding.layout_of(like)
    if layout is not None:  # those of the entries that this rank holds
        parts = torch.split(position, [leaf.numel() for leaf in like])
        shaped = tuple(part.reshape(leaf.shape) for part, leaf in zip(parts, like, strict=True))
        position = torch.cat([part.reshape(-1) for part in layout.local(shaped)])
    return _mix(_mix(position) ^ _mix(seed + 1))


def _mix(x: _Integer) -> _Integer:
    """A hash of 32-bit integers; the factor is small enough for products to fit in 63 bits."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
