"""The state of an outer loop on disk, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._torch import sharding
from hyperfunc._types import TensorTree
from hyperfunc.distributed._ranks import Ranks, fingerprint

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
    ordinary tensor has to be the same on all ranks, and is saved once. A run that is killed at any
    time leaves the state before or the state after, never a part.

    Args:
        state: a tree of tensors, numbers and strings: hparams, params and adjoint to start from,
            the state of an `hyperfunc.optim` optimiser, the random state
            (``torch.get_rng_state()``), the position in the data; and optimisers of
            ``torch.optim``, of which the ``state_dict()`` is saved.
        folder: where the states are kept, as ``folder/step-00000012``; one that all ranks see.
        step: the number of the outer step that comes next, >= 0; what `load_state` returns.
        keep: how many states to keep, >= 1. Older ones are removed.
        background: copy the state, return, and write the copy in a thread. With several ranks,
            ``group`` must then be one that nothing else uses meanwhile, as made by
            ``torch.distributed.new_group(backend="gloo")``.
        group: the ranks that hold the state; by default all.

    Returns:
        A future, which is done already without ``background``. ``future.result()`` waits, and
        raises what went wrong in the thread. Wait for it before the next call and at the end.

    Raises:
        TypeError: for a step or a number to keep that is no integer.
        ValueError: for one out of range, leaves that cannot be saved, small ordinary tensors that
            differ between ranks, or ``background`` without a group.
        HypergradError: on every rank, naming the first, where only some met such an error, or one
            could not write.

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
    ranks, named, error = Ranks(group), {}, None
    try:
        check_count("save_state", "step", step, 0)
        check_count("save_state", "keep", keep)
        if background and group is None and ranks.size > 1:
            raise ValueError(
                "save_state: background=True sends from a thread, which takes a group of its own. "
                'Make one at the start, group = torch.distributed.new_group(backend="gloo"), and '
                "pass group=group"
            )
        named = _named_leaves(_expanded(state))
    except (TypeError, ValueError) as problem:
        error = problem
    alike = {"the leaves that are saved once": _values(named) if ranks.size > 1 else []}
    advice = (
        "Make what differs a DTensor, or derive it from the step and the rank, as in "
        "torch.Generator().manual_seed(hash((seed, step, rank)))"
    )
    ranks.agree("save_state", error, alike=alike, advice=advice)
    future: Future[None] = Future()
    if not background:
        _write(named, Path(folder), step, keep, ranks)
        future.set_result(None)
        return future
    copies = {
        name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for name, leaf in named.items()
    }
    pool = ThreadPoolExecutor(1, "save_state")
    future = pool.submit(_write, copies, Path(folder), step, keep, ranks)
    pool.shutdown(wait=False)
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
            start of a run; it is left alone. Its DTensors say how each rank wants its shards, on
            any mesh. An optimiser of ``torch.optim`` need not have taken a step.
        folder: as given to `save_state`, as is ``group``.
        step: which state; by default the last.
        group: the ranks that take part.

    Returns:
        ``(state, step)``, a tree like ``like`` of new tensors, or None where the folder holds no
        state yet. In place of an optimiser of ``torch.optim`` comes the dict for its
        ``load_state_dict``.

    Raises:
        ValueError: for a step that is not there, or a tree of another structure, shape or dtype
            than was saved, naming the leaf.
        HypergradError: on every rank, naming the first, where only some met such an error.

    Example:
        >>> import tempfile
        >>> folder, weight = tempfile.mkdtemp(), torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([weight])
        >>> (weight - 1).square().sum().backward()
        >>> optimizer.step()
        >>> future = hf.distributed.save_state({"opt": optimizer}, folder, step=1)
        >>> optimizer = torch.optim.Adam([weight])
        >>> state, step = hf.distributed.load_state({"opt": optimizer}, folder)
        >>> optimizer.load_state_dict(state["opt"])
        >>> optimizer.state[weight]["exp_avg"]
        tensor([-0.2000, -0.2000])
    """
    folder, ranks = Path(folder), Ranks(group)
    dcp = importlib.import_module("torch.distributed.checkpoint")
    names = ranks.from_rank(0, [f"step-{number:08d}" for number in _steps(folder)])
    if not names and step is None:
        return None
    error = None
    try:
        name = names[-1] if step is None else f"step-{step:08d}"
        if name not in names:
            raise ValueError(
                f"load_state: {folder} has no state of step {step}; expected one of {names}"
            )
        saved = dcp.FileSystemReader(folder / name).read_metadata().state_dict_metadata
        tree = _expanded(like, saved)
        wanted, spec = _named_leaves(tree), trees.flatten(tree)[1]
        _check_saved(wanted, saved, folder / name)
    except Exception as problem:
        error = problem
    ranks.agree("load_state", error)
    loaded = {
        path: torch.empty_like(leaf.detach()) if isinstance(leaf, Tensor) else leaf
        for path, leaf in wanted.items()
    }
    with _without_warnings():
        dcp.load(loaded, checkpoint_id=folder / name, process_group=group)
    for path, leaf in wanted.items():
        if isinstance(leaf, Tensor):
            loaded[path].requires_grad_(leaf.requires_grad)
    return trees.unflatten(spec, list(loaded.values())), int(name.removeprefix("step-"))


def _write(named: dict[str, Any], folder: Path, step: int, keep: int, ranks: Ranks) -> None:
    dcp = importlib.import_module("torch.distributed.checkpoint")  # which takes a moment
    target = folder / f"step-{step:08d}"
    partial, replaced = (folder / f".{target.name}.{state}" for state in ("partial", "replaced"))

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by runs that were killed
            shutil.rmtree(left, ignore_errors=True)

    def finish() -> None:
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        _sync(folder)
        for number in _steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{number:08d}", ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)

    _on_first(prepare, ranks)
    with _without_warnings():
        dcp.save(dict(named), checkpoint_id=partial, process_group=ranks.group)
    ranks.barrier()
    _on_first(finish, ranks)


def _on_first(action: Callable[[], None], ranks: Ranks) -> None:
    """Have the first rank do something on the disk, and the others wait, or raise as it does."""
    error = None
    if ranks.rank == 0:
        try:
            action()
        except OSError as problem:
            error = problem
    ranks.agree("save_state", error)


def _named_leaves(state: TensorTree) -> dict[str, Any]:
    leaves, spec = trees.flatten(state)
    named = dict(zip(trees.paths(spec, "state"), leaves, strict=True))
    for path, leaf in named.items():
        if not isinstance(leaf, Tensor | int | float | str | bool):
            raise ValueError(
                f"{path} is {leaf!r} of type {type(leaf).__name__}; expected a tensor, a number or "
                f"a string. Put generator.get_state() for a generator"
            )
    return named


def _expanded(tree: TensorTree, saved: dict[str, Any] | None = None) -> TensorTree:
    """A tree with the states of optimizers in their place: their own, or of what was saved."""
    leaves, spec = trees.flatten(tree)
    for index, path in enumerate(trees.paths(spec, "state")):
        optimizer: Any = leaves[index]
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        leaves[index] = state = optimizer.state_dict()
        if saved is not None:
            state["state"] = _optimizer_state(optimizer, f"{path}['state']", saved)
    return trees.unflatten(spec, leaves)


def _optimizer_state(
    optimizer: torch.optim.Optimizer, path: str, saved: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Room for what was saved for each parameter, laid out like it where the shape is the same."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    pattern = re.compile(re.escape(path) + r"\[(\d+)\]\['(\w+)'\]")
    state: dict[int, dict[str, Any]] = {}
    for name, entry in saved.items():
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) >= len(params):
            continue
        param, key = params[int(match[1])].detach(), match[2]
        room: Any = 0
        if hasattr(entry, "size"):
            size, dtype = entry.size, entry.properties.dtype
            own = key != "step" and size == param.shape
            room = torch.empty_like(param, dtype=dtype) if own else torch.empty(size, dtype=dtype)
        state.setdefault(int(match[1]), {})[key] = room
    return state


def _check_saved(wanted: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Raise unless a tree has the paths, shapes and dtypes that were saved."""
    for path, leaf in wanted.items():
        if path not in saved:
            raise ValueError(
                f"load_state: {path} was not saved in {folder}, which has {sorted(saved)}. "
                f"Pass a tree of the structure that was saved"
            )
        size = getattr(saved[path], "size", None)
        if not isinstance(leaf, Tensor) or size is None:
            continue
        dtype = saved[path].properties.dtype
        shapes = ("shape", tuple(leaf.shape), tuple(size))
        for what, got, expected in (shapes, ("dtype", leaf.dtype, dtype)):
            if got != expected:
                raise ValueError(f"load_state: {path} has {what} {got}, but {expected} was saved")
    left = [path for path in saved if path not in wanted]
    if left:
        raise ValueError(
            f"load_state: {left[0]} was saved in {folder}, but is not in the tree to load. "
            f"Pass a tree of the structure that was saved. The state_dict() of an optimizer of "
            f"torch.optim that has not taken a step is empty: pass the optimizer itself"
        )


def _values(named: dict[str, Any]) -> list[str]:
    """A line for each leaf that is saved once and small, and thus compared between ranks."""
    return [
        f"{path} with {fingerprint(leaf)}"
        for path, leaf in named.items()
        if not isinstance(leaf, Tensor)
        or (not sharding.is_dtensor(leaf) and leaf.nbytes <= _COMPARED_BYTES)
    ]


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
def _without_warnings() -> Iterator[None]:
    """Without the warnings that there is no process group, where none was meant."""
    if dist.is_initialized():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch 2.4
        yield
