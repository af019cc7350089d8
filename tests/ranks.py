"""A few processes that stay up and run functions as the ranks of one process group."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0


class Ranks:
    """Processes of one process group (gloo), each waiting for the next function to run."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns on each rank; it is pickled, as are its arguments.

        If it raises on some rank, so does this, with the traceback from there.
        """
        for connection in self._connections:
            connection.send((fn, args))
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(TIMEOUT):
                failures.append(f"rank {rank} gave no answer within {TIMEOUT} s")
                continue
            ok, value = connection.recv()
            results.append(value)
            if not ok:
                failures.append(f"on rank {rank}:\n{value}")
        if failures:
            raise AssertionError("\n".join(failures))
        return results


@contextlib.contextmanager
def running(world: int, folder: Path) -> Iterator[Ranks]:
    """Ranks that meet through a file in a folder, and end with the context."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(world)]
    processes = [
        context.Process(target=_serve, args=(rank, world, folder / "store", theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks([ours for ours, _ in pairs])
    finally:
        for (ours, _), process in zip(pairs, processes, strict=True):
            with contextlib.suppress(OSError):
                ours.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, world: int, store: Path, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    while (message := connection.recv()) is not None:
        fn, args = message
        try:
            connection.send((True, fn(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()
