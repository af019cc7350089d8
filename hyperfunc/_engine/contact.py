"""Errors that name the call, and the rank if it can be known, where a rank dies or hangs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from hyperfunc._engine.results import HypergradError
from hyperfunc._torch import process_groups


class LostContact(HypergradError):
    """A rank has died or does not answer."""


LostContact.__name__ = LostContact.__qualname__ = "HypergradError"
LostContact.__module__ = "hyperfunc"


@contextlib.contextmanager
def in_contact(caller: Any, group: Any = None) -> Iterator[None]:
    """Name the call and the rank in errors of ``torch.distributed`` about one that is lost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HypergradError) or not process_groups.is_lost_contact(error):
            raise
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        silent = process_groups.silent_ranks(group)
        who = "another rank, which" if not silent else f"one of the ranks {silent}, which"
        if len(silent) == 1:
            who = f"rank {silent[0]}, which"
        seconds = process_groups.timeout_of(group)
        within = "in time" if seconds is None else f"within {seconds:g} s"
        make = "init_process_group" if group is None else "new_group"
        raise LostContact(
            f"{caller}: rank {rank} of {size} lost contact with {who} has died or did not answer "
            f"{within}. Its own output says more; the group is of no use from here on. If it was "
            f"only slow, set a longer time by torch.distributed.{make}(..., "
            f"timeout=datetime.timedelta(seconds=...))"
        ) from error
