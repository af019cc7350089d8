"""A few processes that stay up and run functions as the ranks of one process group."""

from __future__ import annotations

import contextlib
import datetime
import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    OLD = False
except ImportError:  # where they lived up to torch 2.4
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor

    OLD = True

__all__ = [
    "OLD",
    "DTensor",
    "Ranks",
    "Replicate",
    "Shard",
    "distribute_tensor",
    "mesh_of",
    "running",
]

TIMEOUT = 60.0


class Ranks:
    """Processes of one process group (gloo), each waiting for the next function to run.

    They meet through a file, so that no port is taken that another might want.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns on each rank; it is pickled, as are its arguments.

        If it raises on some rank, so does this, with the traceback from there. If a rank gives no
        answer, all are ended, and the next call starts others.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((fn, args))
        results, failures, lost = [], [], False
        for rank, connection in enumerate(self._connections):
            if not connection.poll(0 if lost else TIMEOUT):
                failures.append(f"rank {rank} gave no answer within {TIMEOUT} s")
                lost = True
                continue
            try:
                ok, value = connection.recv()
            except EOFError:
                failures.append(f"rank {rank} has ended")
                lost = True
                continue
            results.append(value)
            if not ok:
                failures.append(f"on rank {rank}:\n{value}")
        if lost:
            self.stop(kill=True)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def stop(self, kill: bool = False) -> None:
        """End the processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(0 if kill else 10)
            if process.is_alive():
                process.kill()
                process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._world, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


@contextlib.contextmanager
def running(world: int) -> Iterator[Ranks]:
    """Ranks that end with the context."""
    ranks = Ranks(world)
    try:
        yield ranks
    finally:
        ranks.stop()


@functools.cache
def mesh_of(*shape: int) -> Any:
    """A mesh of all ranks, whose dimensions are called a, b and so on; the same one every time."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


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
    while True:
        try:
            message = connection.recv()
        except EOFError:  # whoever asks has ended
            break
        if message is None:
            break
        fn, args = message
        try:
            connection.send((True, fn(*args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()
