"""What is known of the other ranks of a process group once one of them no longer answers."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist

# What gloo says, which raises plain RuntimeErrors, where others have classes of their own.
_TEXTS = ("gloo/", "Application timeout", "Connection closed by peer", "Connection reset by peer")
# How long a rank waits for others to tell that they have lost contact too, in seconds.
PATIENCE = 2.0


def is_lost_contact(error: Exception) -> bool:
    """Whether an error says that another rank has died or does not answer."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    kinds = tuple(getattr(dist, name) for name in ("DistBackendError", "DistNetworkError"))
    return isinstance(error, kinds) or any(text in str(error) for text in _TEXTS)


def timeout_of(group: dist.ProcessGroup | None) -> float | None:
    """The seconds after which a group gives up; None where it does not tell."""
    with contextlib.suppress(Exception):
        pg: Any = dist.distributed_c10d._get_default_group() if group is None else group
        device = torch.device("cpu" if "gloo" in dist.get_backend(group) else "cuda")
        seconds: float = pg._get_backend(device).options._timeout.total_seconds()
        return seconds
    return None


def silent_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """The ranks, as numbered in the group, that do not tell soon that they lost contact as well."""
    own, size = dist.get_rank(group), dist.get_world_size(group)
    silent = [rank for rank in range(size) if rank != own]
    with contextlib.suppress(Exception):  # the store may have gone with the rank that held it
        store = dist.distributed_c10d._get_default_store()
        name = "all" if group is None else group.group_name
        store.set(f"hyperfunc/lost/{name}/{own}", "1")
        end = time.monotonic() + PATIENCE
        while silent and len(silent) + (size > 2) > 1 and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([f"hyperfunc/lost/{name}/{rank}"])]
            time.sleep(0.02)
    return silent
