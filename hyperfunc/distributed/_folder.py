"""The states in a folder: which there are, and how a new one takes its place."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyperfunc._engine.results import HypergradError
from hyperfunc._engine.shown import show
from hyperfunc.distributed import _files

_STEP, _REPLACED = re.compile(r"step-(\d+)"), re.compile(r"\.(step-(\d+))\.replaced")
# How long a save waits for another one in the same folder, in seconds.
_PATIENCE = 10.0


def path_of(caller: str, folder: Any) -> Path:
    """A folder that a caller was given, whatever the working directory becomes."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"{caller}: folder is {show(folder)}; expected a path")
    return Path(folder).absolute()


def states(folder: Path) -> dict[int, Path]:
    """The states in a folder by their steps; one that was being replaced counts as it was."""
    try:
        names = sorted(os.listdir(folder))  # what was replaced comes before what replaced it
    except FileNotFoundError:
        if os.path.lexists(folder):  # a link that leads nowhere
            raise
        return {}
    found = {}
    for name in names:
        if match := _REPLACED.fullmatch(name):
            found[int(match[2])] = folder / name
        if match := _STEP.fullmatch(name):
            found[int(match[1])] = folder / name
    return found


@contextlib.contextmanager
def prepared(folder: Path, step: int) -> Iterator[Path]:
    """A place for a new state, while no other is saved in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for name in os.listdir(folder):  # by runs that were killed
            replaced = _REPLACED.fullmatch(name)
            if replaced and not os.path.lexists(folder / replaced[1]):
                os.rename(folder / name, folder / replaced[1])
            elif name.startswith((".step-", ".removed-")):
                shutil.rmtree(folder / name, ignore_errors=True)
        _refuse_later(folder, step)
        partial = folder / f".step-{step:08d}.{uuid.uuid4().hex}.partial"
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_later(folder: Path, step: int) -> None:
    """Raise if a later step is there, which would be loaded in place of this one."""
    for number, path in sorted(states(folder).items()):
        if number <= step:
            continue
        try:
            _files.check(path)
        except _files.Damaged:  # the run went on from an earlier one
            os.rename(path, folder / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            continue
        raise HypergradError(
            f"save_state: step {step} was not written to {folder}, which has a state of step "
            f"{number}, of another run or from before going back: load_state would take that for "
            f"the last one. Save to another folder, or remove what comes after step {step}"
        )


def put_in_place(partial: Path, target: Path, keep: int) -> None:
    """Put a state in its place; at any time it is there, or the one before is, by one of its names.

    ``states`` finds the latter by either name.
    """
    replaced = target.with_name(f".{target.name}.replaced")
    if target.is_dir():
        os.rename(target, replaced)
    elif os.path.lexists(target):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    try:
        os.rename(partial, target)
        _files.sync(target.parent)
    except OSError:
        if target.exists():
            os.rename(target, partial)
        if replaced.exists():
            os.rename(replaced, target)
        raise
    older = sorted(states(target.parent).items())[:-keep]
    for path in [replaced, *(path for _, path in older)]:
        with contextlib.suppress(OSError):  # what is left does no harm
            removed = target.with_name(f".removed-{uuid.uuid4().hex}")
            os.rename(path, removed)  # at once, so that a part of it is never taken for a state
            shutil.rmtree(removed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process or thread save in a folder; the system unlocks where one is killed."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # other systems
        yield
        return
    with (folder / ".lock").open("w") as file:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise HypergradError(
                        f"save_state: another process or thread has been saving in {folder} for "
                        f"{_PATIENCE:g} s. Give each run a folder of its own"
                    ) from None
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # also where a process was forked meanwhile
