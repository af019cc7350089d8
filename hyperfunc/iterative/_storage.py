"""Which iterates of a run are kept, and where."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._types import Leaves

# How many iterates are stored in one tensor.
_ROWS = 16


class Schedule(NamedTuple):
    """Which iterates are kept: every ``stride``-th one, or ``slots`` of them at a time."""

    stride: int | None = None
    slots: int | None = None

    def gap(self, length: int, kept: int, *, first: bool = False) -> int:
        """How far from the last of ``kept`` iterates, ``length`` from the end, the next one is."""
        if self.slots is None:
            return int(self.stride or 1) if first else 1
        return _best_split(length, self.slots - kept + 1)


class Mark(NamedTuple):
    """An iterate that is kept, and the states of the random number streams there."""

    step: int
    state: Leaves
    streams: Leaves


class Trace(NamedTuple):
    """What a run of the steps leaves behind: the marks, and how long it (or each task) went on."""

    num_steps: int
    marks: list[Mark]
    buffers: list[Leaves]
    lengths: Tensor | None = None
    shortest: int = sys.maxsize

    def store(self, state: Leaves) -> Leaves:
        """A copy of an iterate, in its row: kept as they are, they leave holes in the heap."""
        buffer, row = divmod(len(self.marks), _ROWS)
        if buffer == len(self.buffers):
            size = min(_ROWS, self.num_steps)
            self.buffers.append(tuple(_empty_rows(leaf, size) for leaf in state))
        rows = tuple(tensor[row] for tensor in self.buffers[buffer])
        for place, leaf in zip(rows, state, strict=True):
            place.copy_(leaf)
        return rows

    def active(self, step: int) -> Tensor | None:
        """Which tasks take a step; None for all of them."""
        return None if self.lengths is None or step < self.shortest else self.lengths > step


def _empty_rows(leaf: Tensor, size: int) -> Tensor:
    """Room for a number of tensors, each laid out in memory as this one."""
    strides = torch.empty_like(leaf).stride()
    return leaf.new_empty_strided((size, *leaf.shape), (leaf.numel(), *strides))


def _best_split(length: int, slots: int) -> int:
    """Where the next iterate is kept: s slots and r runs of each step reverse C(s + r, s) steps."""
    if slots <= 1:
        return length
    repetitions = 1
    while math.comb(slots + repetitions, slots) < length:
        repetitions += 1
    before = math.comb(slots + repetitions - 1, slots)
    after = math.comb(slots + repetitions - 2, slots - 1)
    return min(before, max(1, length - after))
