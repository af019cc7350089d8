"""The state of an outer loop on disk, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc import _sharding, _tree
from hyperfunc._types import TensorTree

_NAME = re.compile(r"step-(\d+)")
# Ordinary tensors up to this size are compared between ranks before they are saved.
_COMPARED_BYTES = 1 << 20


def save_state(
    state: TensorTree,
    folder: str | os.PathLike[str],
    step: int,
    *,
    keep: int = 2,
    background: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Future[None]:
    """Save the state of an outer loop, so that it appears whole or not at all.

    All ranks of the group call this with the same tree. A DTensor is saved shard by shard; an
    ordinary tensor has to be the same on all ranks, and is saved once. What is written goes to a
    folder of another name first, which is renamed when every rank is done: a run that is killed
    at any time leaves the state before or the state after, never a part.

    Args:
        state: a tree of tensors and numbers: hparams, params and adjoint to start from, the state
            of an `hyperfunc.optim` optimiser or the ``state_dict()`` of one of ``torch.optim``,
            the random state (``torch.get_rng_state()``, or a generator's), the position in the
            data.
        folder: where the states are kept, as ``folder/step-00000012``; one that all ranks see.
        step: the number of the outer step that comes next, >= 0; what `load_state` returns.
        keep: how many states to keep, >= 1. Older ones are removed.
        background: copy the state, return, and write in a thread. The copies take the memory of
            the state once more. ``group`` must then be one that nothing else uses meanwhile, as
            made by ``torch.distributed.new_group(backend="gloo")``, if there is more than one rank.
        group: the ranks that hold the state; by default all.

    Returns:
        A future, which is done already without ``background``. ``future.result()`` waits, and
        raises what went wrong in the thread. Wait for it before the next call and at the end.

    Raises:
        ValueError: for a step or a number to keep out of range, leaves that cannot be saved, small
            ordinary tensors that differ between ranks, or ``background`` without a group.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> state = {"hparams": torch.ones(3), "rng": torch.get_rng_state(), "epoch": 4}
        >>> hf.distributed.save_state(state, folder, step=10).done()
        True
        >>> like = {"hparams": torch.zeros(3), "rng": torch.get_rng_state(), "epoch": 0}
        >>> state, step = hf.distributed.load_state(like, folder)
        >>> state["hparams"], state["epoch"], step
        (tensor([1., 1., 1.]), 4, 10)
    """
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"save_state: {name} is {value!r}; expected an integer >= {least}")
    if background and group is None and _num_ranks(group) > 1:
        raise ValueError(
            "save_state: background=True sends from a thread, which takes a group of its own. "
            'Make one at the start, group = torch.distributed.new_group(backend="gloo"), and pass '
            "group=group"
        )
    named = _named_leaves(state)
    _check_equal(named, group)
    if background:
        named = {
            name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            for name, leaf in named.items()
        }
    future: Future[None] = Future()

    def write() -> None:
        try:
            _write(named, Path(folder), step, keep, group)
        except BaseException as error:
            future.set_exception(error)
            if not background:
                raise
        else:
            future.set_result(None)

    if background:
        threading.Thread(target=write, name="save_state").start()
    else:
        write()
    return future


def load_state(
    like: TensorTree,
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[TensorTree, int] | None:
    """Load a state that `save_state` wrote, on the same number of ranks or another one.

    Args:
        like: a tree of the structure, shapes and dtypes that were saved, such as the state at the
            start of a run. Its DTensors say how each rank wants its shards, on any mesh; what it
            holds is left alone.
        folder: the folder given to `save_state`.
        step: which state; by default the last.
        group: the ranks that take part; by default all.

    Returns:
        ``(state, step)``, a tree like ``like`` of new tensors, or None where the folder holds no
        state yet.

    Raises:
        ValueError: for a step that is not there, or a tree of another structure than was saved,
            naming the leaf.
    """
    folder, dcp = Path(folder), _checkpoint()
    names = _from_first([f"step-{number:08d}" for number in _steps(folder)], group)
    if step is not None and f"step-{step:08d}" not in names:
        raise ValueError(
            f"load_state: {folder} has no state of step {step}; expected one of {names}"
        )
    if not names:
        return None
    name = names[-1] if step is None else f"step-{step:08d}"
    leaves, spec = _tree.flatten(like)
    wanted = _named_leaves(like)
    saved = dcp.FileSystemReader(folder / name).read_metadata().state_dict_metadata
    for path, leaf in wanted.items():
        if path not in saved:
            raise ValueError(
                f"load_state: {path} was not saved in {folder / name}, which has {sorted(saved)}. "
                f"Pass a tree of the structure that was saved"
            )
        size = getattr(saved[path], "size", None)
        if isinstance(leaf, Tensor) and size is not None and leaf.shape != size:
            raise ValueError(
                f"load_state: {path} has shape {tuple(leaf.shape)}, but {tuple(size)} was saved"
            )
    loaded = {
        path: torch.empty_like(leaf.detach()) if isinstance(leaf, Tensor) else leaf
        for path, leaf in wanted.items()
    }
    with _without_warning_of_one_process():
        dcp.load(loaded, checkpoint_id=folder / name, process_group=group)
    result = [
        loaded[path].requires_grad_(leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else loaded[path]
        for path, leaf in zip(wanted, leaves, strict=True)
    ]
    return _tree.unflatten(spec, result), int(name.removeprefix("step-"))


def _write(
    named: dict[str, Any], folder: Path, step: int, keep: int, group: dist.ProcessGroup | None
) -> None:
    dcp = _checkpoint()
    target = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    first = _rank(group) == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by runs that were killed
            shutil.rmtree(left, ignore_errors=True)
    _barrier(group)
    with _without_warning_of_one_process():
        dcp.save(dict(named), checkpoint_id=partial, process_group=group)
    _barrier(group)
    if first:
        if target.exists():
            target.rename(folder / f".step-{step:08d}.replaced")
        partial.rename(target)
        _sync(folder)
        for number in _steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{number:08d}", ignore_errors=True)
        shutil.rmtree(folder / f".step-{step:08d}.replaced", ignore_errors=True)
    _barrier(group)


def _checkpoint() -> Any:
    """Imported where it is used, for it takes a moment."""
    return importlib.import_module("torch.distributed.checkpoint")


def _named_leaves(state: TensorTree) -> dict[str, Any]:
    leaves, spec = _tree.flatten(state)
    named = dict(zip(_tree.paths(spec, "state"), leaves, strict=True))
    for path, leaf in named.items():
        if not isinstance(leaf, Tensor | int | float | str | bool):
            raise ValueError(
                f"{path} is {leaf!r} of type {type(leaf).__name__}; expected a tensor, a number or "
                f"a string. Put generator.get_state() for a generator, optimizer.state_dict() for "
                f"an optimizer"
            )
    return named


def _check_equal(named: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise if a small leaf that is saved once differs between the ranks."""
    if _num_ranks(group) == 1:
        return
    sums = {}
    for path, leaf in named.items():
        if not isinstance(leaf, Tensor):
            sums[path] = zlib.crc32(repr(leaf).encode())
        elif not _sharding.is_dtensor(leaf) and leaf.nbytes <= _COMPARED_BYTES:
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            sums[path] = zlib.crc32(ctypes.string_at(data.data_ptr(), data.numel()))
    everywhere: list[Any] = [None] * _num_ranks(group)
    dist.all_gather_object(everywhere, sums, group=group)
    for rank, others in enumerate(everywhere):
        for path, value in others.items():
            if everywhere[0].get(path) != value:
                raise ValueError(
                    f"save_state: {path} on rank {rank} is not what it is on rank 0; expected the "
                    f"same on all ranks, as it is saved once. Make what differs a DTensor, or "
                    f"derive it from the step and the rank, as in "
                    f"torch.Generator().manual_seed(hash((seed, step, rank)))"
                )


def _steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("step-*")) if folder.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _sync(folder: Path) -> None:
    """Have the disk know of renamed files in a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _without_warning_of_one_process() -> Iterator[None]:
    """Without the warning that there is no process group, where none was meant."""
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        yield


def _num_ranks(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _barrier(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():
        dist.barrier(group)


def _from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    """What the first rank has, since the disk may look otherwise to the others."""
    if _num_ranks(group) == 1:
        return value
    message = [value]
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(message, source, group=group)
    return message[0]
