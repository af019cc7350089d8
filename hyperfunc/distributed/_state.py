"""The state of an outer loop on disk: what is saved when, and which state is loaded."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.contact import LostContact, in_contact
from hyperfunc._engine.results import HypergradError
from hyperfunc._torch import sharding
from hyperfunc._types import TensorTree
from hyperfunc.distributed import _files, _folder
from hyperfunc.distributed._ranks import Ranks, fingerprint

# Ordinary tensors up to this size are compared between ranks before they are saved.
_COMPARED_BYTES = 1 << 20
# Kinds of leaves, of which one cannot be loaded as another; a bool is no number.
_KINDS = {"a tensor": Tensor, "a bool": bool, "a number": int | float, "a string": str}
_EARLIER = threading.local()
# What helps where the disk refuses something.
_FULL = "Free some space there, or keep fewer states by keep="
_FORBIDDEN = "Pass a folder in which this process may write"
_NO_FOLDER = "A file is where a folder should be: pass another folder, or move the file"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_FOLDER),
}


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
    time, or a disk that refuses something, leaves the state before or the state after, never a
    part. ``manifest.json`` in the folder of a step has the SHA-256 of each file.

    Args:
        state: a tree of tensors, numbers and strings: hparams, params and adjoint to start from,
            the state of an `hyperfunc.optim` optimiser, the random state
            (``torch.get_rng_state()``), the position in the data; and optimisers of
            ``torch.optim``, of which the ``state_dict()`` is saved.
        folder: where the states are kept, as ``folder/step-00000012``; one that all ranks see, and
            that no other run saves in. While a state is written, ``folder/.lock`` is locked.
        step: the number of the outer step that comes next, >= 0; what `load_state` returns. One
            that was saved before is replaced.
        keep: how many states to keep, >= 1. Older ones are removed.
        background: copy the state, return, and write the copy in a thread. The next call from the
            same thread waits for it. With several ranks, ``group`` must then be one that nothing
            else uses meanwhile, as made by ``torch.distributed.new_group(backend="gloo")``.
        group: the ranks that hold the state; by default all.

    Returns:
        A future, which is done already without ``background``. ``future.result()`` waits, and
        raises what went wrong in the thread. If nobody asks, the next call for this folder raises
        it, or else a warning tells at the end of the process.

    Raises:
        TypeError: for a step or a number to keep that is no integer.
        ValueError: for one out of range, leaves that cannot be saved, calls or small ordinary
            tensors that differ between ranks, or ``background`` without a group.
        HypergradError: where the state could not be written (no space, no permission, a file in
            the place of a folder), the folder holds a later step, or another process has been
            saving there for ten seconds; where the last save in the background failed; and, on
            every rank, naming the first, where only some met an error, or a rank has died.

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
    folder = _folder.path_of("save_state", folder)
    with in_contact("save_state", group):
        try:
            check_count("save_state", "step", step, 0)
            check_count("save_state", "keep", keep)
            if background and group is None and ranks.size > 1:
                raise ValueError(
                    "save_state: background=True sends from a thread, which takes a group of its "
                    'own. Make one at the start, group = torch.distributed.new_group(backend="gloo"'
                    "), and pass group=group"
                )
            _tell_of_earlier(folder)
            named = _named_leaves(_expanded(state))
        except (TypeError, ValueError, HypergradError) as problem:
            error = problem
        alike = {
            "step, keep and background": [repr((step, keep, background))],
            "the leaves that are saved once": _values(named) if ranks.size > 1 else [],
        }
        advice = (
            "Make what differs a DTensor, or derive it from the step and the rank, as in "
            "torch.Generator().manual_seed(hash((seed, step, rank)))"
        )
        ranks.agree("save_state", error, alike=alike, advice=advice)
    if background:
        named = {
            name: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            for name, leaf in named.items()
        }
        for device in {leaf.device for leaf in named.values() if isinstance(leaf, Tensor)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the thread reads on another stream
    saving = _Saving(step, lambda: _write(named, folder, step, keep, ranks))
    if background:
        vars(_EARLIER)[_key(folder)] = saving
        threading.Thread(target=saving.run, name="save_state", daemon=False).start()
    else:
        saving.run()
        saving.result()
    return saving


def load_state(
    like: TensorTree,
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    fallback: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[TensorTree, int] | None:
    """Load a state that `save_state` wrote, on the same number of ranks or another one.

    Checksums tell whether it is what was written. Nothing in the files is run, whoever wrote them.
    States of version 0.1.0 have no checksums, which a warning says.

    Args:
        like: a tree of the structure, shapes and dtypes that were saved, such as the state at the
            start of a run; it is left alone. Its DTensors say how each rank wants its shards, on
            any mesh. An optimiser of ``torch.optim`` need not have taken a step.
        folder: as given to `save_state`, as is ``group``.
        step: which state; by default the last.
        fallback: where that state is damaged, warn and load the last one before it that is not.
        group: the ranks that take part.

    Returns:
        ``(state, step)``, a tree like ``like`` of new tensors, or None where there is no such
        folder, or no state in it yet. In place of an optimiser of ``torch.optim`` comes the dict
        for its ``load_state_dict``.

    Raises:
        ValueError: for a step that is not there, or a tree of another structure, shape, dtype or
            kind of leaf than was saved, naming the leaf. An int may stand for a float.
        HypergradError: for a state that is damaged, naming the file and an earlier step that is
            not; for a folder that cannot be read; and, on every rank, naming the first, where only
            some met an error, or a rank has died.

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
    folder, ranks = _folder.path_of("load_state", folder), Ranks(group)
    if (earlier := vars(_EARLIER).get(_key(folder))) is not None:
        wait([earlier])

    def attempt(action: Callable[[], Any], only: int | None = None) -> Any:
        doing = f"load_state: the state in {folder} was not read"
        return ranks.attempt("load_state", lambda: _explained(doing, action), only)

    with in_contact("load_state", group):
        ranks.agree("load_state", None, alike={"step and fallback": [repr((step, fallback))]})
        found = attempt(lambda: _folder.states(folder), only=0)
        if step is not None and step not in found:
            names = sorted(path.name for path in found.values())
            raise ValueError(
                f"load_state: {folder} has no state of step {step}; expected one of {names}"
            )
        if not found:
            return None
        candidates = sorted((n for n in found if step is None or n <= step), reverse=True)
        number, metadata, problem = _first_intact([(n, found[n]) for n in candidates], ranks)
        if problem is not None:
            if not fallback:
                raise HypergradError(
                    f"load_state: {problem}. The state of step {number} in the same folder is "
                    f"intact: pass step={number}, or fallback=True for the last intact one"
                ) from problem
            text = f"load_state: {problem}. The state of step {number} is loaded in its place"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if _files.is_old(found[number]):
            text = (
                f"load_state: {found[number]} was written without checksums, by version 0.1.0, so "
                f"that damage to it goes unnoticed. Save it again"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)

        def check() -> tuple[dict[str, Any], trees.TreeSpec]:
            tree = _expanded(like, metadata.state_dict_metadata)
            wanted = _named_leaves(tree)
            _check_saved(wanted, metadata.state_dict_metadata, found[number])
            return wanted, trees.flatten(tree)[1]

        wanted, spec = ranks.attempt("load_state", check)
        loaded = {
            path: torch.empty_like(leaf.detach()) if isinstance(leaf, Tensor) else leaf
            for path, leaf in wanted.items()
        }
        attempt(lambda: _files.read(found[number], metadata, loaded))
        ranks.attempt("load_state", lambda: _check_kinds(wanted, loaded))
    for path, leaf in wanted.items():
        if isinstance(leaf, Tensor):
            loaded[path].requires_grad_(leaf.requires_grad)
    return trees.unflatten(spec, list(loaded.values())), number


class _Saving(Future[None]):
    """A save under way, perhaps in a thread; if it fails and nobody asks, it tells all the same."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.step, self._action = step, action
        self.untold: list[str] = []
        self.set_running_or_notify_cancel()  # it cannot be cancelled
        weakref.finalize(self, _tell, step, self.untold)  # at the end of the process, if not before

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.untold.append(str(error))
            self.set_exception(error)
        else:
            self.set_result(None)
        finally:
            del self._action  # and with it the copies

    def result(self, timeout: float | None = None) -> None:
        self.exception(timeout)
        super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self.untold.clear()
        return error


def _tell(step: int, untold: list[str]) -> None:
    if untold:
        text = f"save_state: step {step} was not saved in the background. {untold[0]}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _key(folder: Path) -> str:
    return f"{os.getpid()} {folder}"  # a fork does not wait for a thread that it has not


def _tell_of_earlier(folder: Path) -> None:
    """Wait for the last save of this thread in the background, and raise if it failed untold."""
    earlier = vars(_EARLIER).pop(_key(folder), None)
    if earlier is None:
        return
    wait([earlier])
    told = not earlier.untold
    error = earlier.exception()
    if error is not None and not told:
        raise HypergradError(
            f"save_state: the last save in the background, of step {earlier.step}, has failed, and "
            f"this call has saved nothing yet: mend the cause, and make it again. {error}"
        ) from error


def _write(named: dict[str, Any], folder: Path, step: int, keep: int, ranks: Ranks) -> None:
    def attempt(action: Callable[[], Any], only: int | None = None) -> Any:
        doing = f"save_state: step {step} was not written to {folder}"
        then = ". What was saved before is as it was"
        return ranks.attempt("save_state", lambda: _explained(doing, action, then), only)

    with in_contact("save_state", ranks.group), contextlib.ExitStack() as stack:
        partial = attempt(lambda: stack.enter_context(_folder.prepared(folder, step)), only=0)
        _files.write(named, partial, ranks.rank, attempt, ranks.gather)
        attempt(lambda: _folder.put_in_place(partial, folder / f"step-{step:08d}", keep), only=0)


def _first_intact(
    candidates: list[tuple[int, Path]], ranks: Ranks
) -> tuple[int, Any, Exception | None]:
    """The first state that is not damaged, with its description, and what is wrong before it."""
    first: Exception | None = None
    for number, path in candidates:
        try:
            check = functools.partial(_files.check, path, ranks.rank, ranks.size)
            metadata = ranks.attempt("load_state", check)
        except LostContact:
            raise
        except HypergradError as problem:
            first = first or problem
        else:
            return number, metadata, first
    raise HypergradError(
        f"load_state: {first}. No earlier state in the folder is intact"
    ) from first


def _explained(doing: str, action: Callable[[], Any], then: str = "") -> Any:
    """Do something on the disk, or raise an error of ours that says why not and what helps."""
    try:
        return action()
    except HypergradError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        cause = cause or error
        reason, advice = f"{type(cause).__name__}: {cause}", ""
        if isinstance(cause, OSError) and cause.errno in _ADVICE:
            advice = f". {_ADVICE[cause.errno]}"
        text = f"{doing}: {reason}{advice}{then}"
        raise HypergradError(text) from error


def _named_leaves(state: TensorTree) -> dict[str, Any]:
    leaves, spec = trees.flatten(state)
    named = dict(zip(trees.paths(spec, "state"), leaves, strict=True))
    for path, leaf in named.items():
        if not isinstance(leaf, Tensor | int | float | str | bool):
            raise ValueError(
                f"{path} is of type {type(leaf).__name__}; expected a tensor, a number or a "
                f"string. Put generator.get_state() for a generator"
            )
        if isinstance(leaf, Tensor) and (leaf.layout is not torch.strided or leaf.is_meta):
            raise ValueError(
                f"{path} is a tensor of layout {leaf.layout} on device {leaf.device}; expected a "
                f"dense one that has values. Put {path}.to_dense() for a sparse one"
            )
        if not isinstance(leaf, Tensor | bool | _AnyValue):
            named[path] = _plain(leaf)
    if len(named) < len(leaves):
        raise ValueError(f"two leaves have the same path, of {list(named)}. Rename one of the keys")
    return named


def _plain(leaf: float | str) -> float | str:
    """A number or a string without a class of NumPy's, say, whose pickles are not read back."""
    if isinstance(leaf, str):
        return str.__str__(leaf)
    return int.__int__(leaf) if isinstance(leaf, int) else float.__float__(leaf)


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
        room: Any = _AnyValue()
        if hasattr(entry, "size"):
            size, dtype = entry.size, entry.properties.dtype
            own = key != "step" and size == param.shape
            room = torch.empty_like(param, dtype=dtype) if own else torch.empty(size, dtype=dtype)
        state.setdefault(int(match[1]), {})[key] = room
    return state


class _AnyValue(int):
    """Room for a number, a bool or a string of an optimizer."""


def _check_saved(wanted: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Raise unless a tree has the paths, shapes and dtypes that were saved."""
    for path, leaf in wanted.items():
        if path not in saved:
            raise ValueError(
                f"load_state: {path} was not saved in {folder}, which has {sorted(saved)}. "
                f"Pass a tree of the structure that was saved"
            )
        size = getattr(saved[path], "size", None)
        if isinstance(leaf, Tensor) != (size is not None):
            was = "a number or a string" if size is None else "a tensor"
            raise ValueError(f"load_state: {path} is {_kind_of(leaf)}, but {was} was saved")
        if size is None:
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


def _check_kinds(wanted: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Raise unless numbers, bools and strings are what they were."""
    for path, leaf in wanted.items():
        got, was = _kind_of(leaf), _kind_of(loaded[path])
        if got != was and not isinstance(leaf, _AnyValue):
            raise ValueError(f"load_state: {path} is {got}, but {was} was saved")


def _kind_of(leaf: Any) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(leaf, kind))


def _values(named: dict[str, Any]) -> list[str]:
    """A line for each leaf that is saved once and small, and thus compared between ranks."""
    return [
        f"{path} with {fingerprint(leaf)}"
        for path, leaf in named.items()
        if not isinstance(leaf, Tensor)
        or (not sharding.is_dtensor(leaf) and leaf.nbytes <= _COMPARED_BYTES)
    ]
