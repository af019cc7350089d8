"""Attacks on states on disk: each returns a count of what came of it.

The tests hold the counts. For a table of all of them::

    python -m tests.distributed.attacks [name ...]
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import hyperfunc as hf

Counts = collections.Counter
save, load = hf.distributed.save_state, hf.distributed.load_state

# What changes a folder, by the names of Python's audit events; opening counts if it is to write.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock"}


def state(seed: int = 0) -> dict[str, Any]:
    values = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        "hparams": values,
        "count": torch.tensor(seed),
        "rate": 0.5 + seed,
        "name": f"run{seed}",
    }


def equal(one: Any, other: Any) -> bool:
    return all(
        torch.equal(one[k], other[k]) if isinstance(one[k], Tensor) else one[k] == other[k]
        for k in other
    )


def outcome(folder: Path, expected: dict[int, Any], **keywords: Any) -> str:
    """What loading gives: a state as it was saved, an error, or something worse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load(state(), folder, **keywords)
    except Exception as error:
        return "told" if isinstance(error, hf.HypergradError | ValueError) else "raw error"
    except BaseException:
        return "escapes except Exception"
    if found is None:
        return "lost"
    loaded, step = found
    return "right" if step in expected and equal(loaded, expected[step]) else "silently wrong"


# Killed while saving ------------------------------------------------------------------------------


def kill_at(number: int) -> None:
    """End this process before its n-th change of a file, counted from 0."""
    left = [number]

    def count() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event: str, args: Any) -> None:
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes and args[2] & os.O_CREAT) or event in CHANGES:
            count()

    fsync = os.fsync
    os.fsync = lambda *args: (count(), fsync(*args))[1]  # type: ignore[assignment]
    sys.addaudithook(hook)


def in_child(action: Callable[[], Any]) -> int:
    """Start a process that does something."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        action()
        code = 0
    finally:
        os._exit(code)


def attempt(
    root: str,
    number: int,
    change: int,
    step: int,
    keep: int = 2,
    background: bool = False,
    world: int = 1,
    victim: int = 0,
) -> bool:
    """Save ``state(number)`` in children, of which one is killed; returns whether it was not."""

    def child(rank: int) -> None:
        group = None
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{root}/store{number}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=20),
            )
            group = dist.new_group(backend="gloo")
        if rank == victim:
            kill_at(change)
        save(
            state(number), f"{root}/states", step, keep=keep, background=background, group=group
        ).result()

    pids = [in_child(lambda r=r: child(r)) for r in range(world)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    ended = codes[victim]
    assert ended == 0 or os.WTERMSIG(ended) == signal.SIGKILL, ended
    return ended == 0


def killed(
    steps: tuple[int, ...], step: int, keep: int, background: bool, world: int = 1, victim: int = 0
) -> Counts[str]:
    """Save ``steps``, and then one more, killed at each change of a file in turn."""
    counts: Counts[str] = Counts()
    earlier = {s: state(s) for s in steps}
    for change in range(1000):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "states"
            for each in steps:
                save(state(each), folder, each, keep=max(keep, len(steps)))
            finished = attempt(root, 100, change, step, keep, background, world, victim)
            before, after = (
                outcome(folder, {**earlier, step: s}) for s in (state(step), state(100))
            )
            if finished:
                assert after == "right"
                break
            if not steps and after == "lost":
                counts["none yet"] += 1
            else:
                counts["right" if "right" in (before, after) else after] += 1
    return counts


def kills(world: int = 1, victims: tuple[int, ...] = (0,), brief: bool = False) -> Counts[str]:
    counts: Counts[str] = Counts()
    cases = (((), 1), ((1,), 2), ((1,), 1), ((1, 2), 2), ((1, 2, 3), 4))
    for steps, step in cases[2:3] if brief else cases:
        for keep in (1,) if brief else (1, 2):
            for background in (True,) if brief else (False, True):
                for victim in victims:
                    counts += killed(steps, step, keep, background, world, victim)
    return counts


def kills_in_turn(rounds: int = 300, keep: int = 1) -> Counts[str]:
    """Saves in one folder, each killed at a random change, among them those that clear up."""
    counts: Counts[str] = Counts()
    draws = random.Random(keep)
    with tempfile.TemporaryDirectory() as root:
        folder, step, last = Path(root) / "states", 1, None
        for number in range(rounds):
            step += draws.randrange(2)
            finished = attempt(root, number, draws.randrange(25), step, keep)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(state(), folder)
            if found is None:
                counts["none yet" if last is None else "lost"] += 1
                continue
            now = int(found[0]["count"])
            right = equal(found[0], state(now)) and now in (number, last)
            counts["right" if right and (now == number or not finished) else "wrong"] += 1
            last = now
        save(state(), folder, step)
        left = [path.name for path in folder.iterdir() if path.name.startswith((".step-", ".rem"))]
        counts["left over"] += len(left)
    return counts


# Damage -------------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@contextlib.contextmanager
def saved(*steps: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        for step in steps:
            save(state(step), Path(root) / "states", step, keep=len(steps))
        yield Path(root) / "states"


def flips(per_file: int = 60) -> Counts[str]:
    counts: Counts[str] = Counts()
    draws = random.Random(0)
    with saved(1) as folder:
        for path in files_of(folder / "step-00000001"):
            data = path.read_bytes()
            for _ in range(per_file):
                bit = draws.randrange(8 * len(data))
                changed = bytearray(data)
                changed[bit // 8] ^= 1 << bit % 8
                path.write_bytes(changed)
                counts[outcome(folder, {1: state(1)})] += 1
            path.write_bytes(data)
    return counts


def cut() -> Counts[str]:
    """Each file shortened, emptied, lengthened, missing, or a folder in its place."""
    counts: Counts[str] = Counts()
    with saved(1, 2) as folder:
        for path in files_of(folder / "step-00000002"):
            data = path.read_bytes()
            for change in (data[:-1], data[: len(data) // 2], b"", data + b"\0", None, "folder"):
                path.unlink()
                if change == "folder":
                    path.mkdir()
                elif change is not None:
                    path.write_bytes(change)  # type: ignore[arg-type]
                counts[outcome(folder, {2: state(2)})] += 1
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
                path.write_bytes(data)
    return counts


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _payloads(marker: Path) -> list[bytes]:
    zipped, legacy, tarred = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Payload(marker), zipped)
    torch.save(Payload(marker), legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(0, 2) if name != "pickle" else b""
            content += pickle.dumps(Payload(marker), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    raw = [pickle.dumps(Payload(marker), protocol) for protocol in (0, 2, 5)]
    return [zipped.getvalue(), legacy.getvalue(), tarred.getvalue(), *raw]


def reseal(folder: Path) -> None:
    """Make the checksums right again, as who plants something would."""
    with contextlib.suppress(ImportError):
        from hyperfunc.distributed import _files

        _files.seal(folder)


def payloads() -> Counts[str]:
    """Code planted in place of each file, and in the place of each thing that is saved."""
    counts: Counts[str] = Counts()
    with saved(1) as folder:
        original = Path(f"{folder}-original")
        shutil.copytree(folder, original)
        marker = folder.parent / "marker"
        step = folder / "step-00000001"

        def attempt(plant: Callable[[Path, bytes], None], number: int, sealed: bool) -> None:
            shutil.rmtree(folder)
            shutil.copytree(original, folder)
            payload = _payloads(marker)[number]
            plant(step, payload)
            if sealed and not (step / "manifest.json").read_bytes().startswith(payload[:2]):
                reseal(step)
            result = outcome(folder, {1: state(1)})
            if marker.exists():
                result = "code ran"
                marker.rmdir()
            counts[result] += 1

        whole = [path.relative_to(step) for path in files_of(step)]
        metadata = next(path for path in whole if path.name == ".metadata")
        items = list(pickle.loads((step / metadata).read_bytes()).storage_data)

        def inside(index: Any, step: Path, payload: bytes) -> None:
            """A payload in the place of one tensor or number."""
            described = pickle.loads((step / metadata).read_bytes())
            info = described.storage_data[index]
            path = (step / metadata).parent / info.relative_path
            info.offset, info.length = path.stat().st_size, len(payload)
            path.write_bytes(path.read_bytes() + payload)
            (step / metadata).write_bytes(pickle.dumps(described))

        def as_bytes(index: Any, step: Path, payload: bytes) -> None:
            """The same, of something that is said to be no tensor."""
            inside(index, step, payload)
            described = pickle.loads((step / metadata).read_bytes())
            kinds = {type(v).__name__: v for v in described.state_dict_metadata.values()}
            described.state_dict_metadata[index.fqn] = kinds["BytesStorageMetadata"]
            stored = described.storage_data
            described.storage_data = {
                type(i)(i.fqn) if i.fqn == index.fqn else i: stored[i] for i in stored
            }
            (step / metadata).write_bytes(pickle.dumps(described))

        plants: list[Any] = [lambda s, p, w=w: (s / w).write_bytes(p) for w in whole]
        plants += [
            lambda s, p, i=i, how=how: how(i, s, p) for i in items for how in (inside, as_bytes)
        ]
        for plant in plants:
            for number in range(6):
                for sealed in (False, True):
                    attempt(plant, number, sealed)
        shutil.rmtree(original)
    return counts


# What the disk refuses ----------------------------------------------------------------------------


def _save_outcome(folder: Path, expected: dict[int, Any], action: Callable[[], Any]) -> str:
    """What a save that cannot work says, and whether what was saved before is still there."""
    try:
        action()
    except Exception as error:
        said = "told" if isinstance(error, hf.HypergradError) else f"raw {type(error).__name__}"
    except BaseException as error:
        said = f"escapes: {type(error).__name__}"
    else:
        said = "silent"
    return f"{said}, earlier {outcome(folder, expected)}"


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The disk takes no more than this of a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def refusing(code: int, number: int, kind: str) -> Iterator[None]:
    """The n-th call of a function of os that changes files fails."""
    left = [number]
    original = getattr(os, kind)

    def refuse(*args: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(code, os.strerror(code), str(args[0]))
        return original(*args, **keywords)

    with mock.patch.object(os, kind, refuse):
        yield
    if left[0] >= 0:
        raise LookupError


def refusals() -> Counts[str]:
    """Full disks at several sizes, and each call on the disk refused with each of three errors."""
    counts: Counts[str] = Counts()
    for size in (0, 1, 100, 1500, 3000, 5000):
        for step in (1, 2):
            with saved(1) as folder:

                def attempt() -> None:
                    with largest_file(size):
                        save(state(9), folder, step)

                counts[_save_outcome(folder, {1: state(1)}, attempt)] += 1
    for kind in ("rename", "mkdir", "fsync"):
        for code in (errno.ENOSPC, errno.EACCES, errno.EIO):
            for number in range(20):
                with saved(1) as folder, contextlib.suppress(LookupError):

                    def attempt() -> None:
                        with refusing(code, number, kind):
                            save(state(1), folder, 1)

                    try:
                        with refusing(code, number, kind):
                            save(state(1), folder, 1)
                    except LookupError:
                        break
                    except BaseException as error:
                        ours = isinstance(error, hf.HypergradError)
                        said = "told" if ours else f"raw {type(error).__name__}"
                        if not isinstance(error, Exception):
                            said = f"escapes: {type(error).__name__}"
                    else:
                        said = "done all the same"
                    counts[f"{said}, earlier {outcome(folder, {1: state(1)})}"] += 1
    return counts


def folders() -> Counts[str]:
    """Folders that cannot be read or written, by their kind."""
    counts: Counts[str] = Counts()

    def count(action: Callable[[], Any], kind: str) -> None:
        try:
            found = action()
        except Exception as error:
            ours = isinstance(error, hf.HypergradError)
            counts["told" if ours else f"raw {type(error).__name__}: {kind}"] += 1
        except BaseException as error:
            counts[f"escapes, {type(error).__name__}: {kind}"] += 1
        else:
            counts[f"silent, {'no state yet' if found is None else 'done'}: {kind}"] += 1

    with saved(1) as folder:
        file = folder.parent / "file"
        file.touch()
        link = folder.parent / "link"
        link.symlink_to(folder.parent / "nowhere")
        count(lambda: load(state(), file), "load from a file")
        count(lambda: load(state(), link), "load from a dangling link")
        count(lambda: save(state(), file, 1), "save to a file")
        count(lambda: save(state(), file / "states", 1), "save below a file")

        def refuse(path: Any, *args: Any, **keywords: Any) -> Any:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        with mock.patch.multiple(os, listdir=refuse, scandir=refuse):
            count(lambda: load(state(), folder), "load from a folder of others")
        with mock.patch.object(os, "mkdir", refuse):
            count(lambda: save(state(), folder.parent / "new", 1), "save to a folder of others")
        (folder / "step-00000002").touch()
        count(lambda: load(state(), folder), "load where a step is a file")
        count(lambda: save(state(), folder, 2), "save where a step is a file")
    return counts


# The rest -----------------------------------------------------------------------------------------


def kinds() -> Counts[str]:
    """Each kind of leaf loaded as each other."""
    counts: Counts[str] = Counts()
    leaves = {"tensor": torch.ones(()), "float": 0.5, "int": 3, "bool": True, "str": "x"}
    with tempfile.TemporaryDirectory() as root:
        for kind, leaf in leaves.items():
            save({"a": leaf}, f"{root}/{kind}", 1)
            for other, like in leaves.items():
                alike = {kind, other} <= {"float", "int"}
                if kind == other or alike:
                    continue
                try:
                    load({"a": like}, f"{root}/{kind}")
                    counts["silent"] += 1
                except ValueError:
                    counts["told"] += 1
                except BaseException as error:
                    counts[f"raw {type(error).__name__}"] += 1
    return counts


def filters() -> Counts[str]:
    """Filters of warnings after saves in the background, of which several overlap."""
    counts: Counts[str] = Counts()
    with saved(1):
        pass  # imports what it takes, of which a module adds a filter
    for _ in range(5):
        before = list(warnings.filters)
        with tempfile.TemporaryDirectory() as root:
            futures = [
                save({"a": torch.ones(200_000)}, f"{root}/{i}", 1, background=True)
                for i in range(4)
            ]
            for future in futures:
                future.result()
        changed = list(warnings.filters) != before
        counts["changed" if changed else "as before"] += 1
        warnings.filters[:] = before  # type: ignore[index]
    return counts


def overlaps() -> Counts[str]:
    """Saves in the background without a wait, of one step and of several, from one thread or two."""
    counts: Counts[str] = Counts()
    for steps in ((1, 2, 3), (2, 2, 2)):
        for threads in (False, True):
            with tempfile.TemporaryDirectory() as root:
                futures, raised = [], []

                def start(seed: int, step: int) -> None:
                    try:
                        futures.append(save(state(seed), root, step, background=True))
                        if threads:
                            futures[-1].result()
                    except Exception as error:
                        raised.append(error)

                for seed, step in enumerate(steps):
                    if threads:
                        worker = threading.Thread(target=start, args=(seed, step))
                        worker.start()
                        workers = [worker]
                    else:
                        start(seed, step)
                for worker in workers if threads else []:
                    worker.join()
                time.sleep(0.3)
                for future in futures:
                    with contextlib.suppress(BaseException):
                        future.result(10)
                errors = [e for e in raised] + [
                    f.exception() for f in futures if f.exception() is not None
                ]
                raw = [e for e in errors if not isinstance(e, hf.HypergradError | ValueError)]
                found = outcome(Path(root), {s: state(i) for i, s in enumerate(steps)})
                if found == "silently wrong":
                    found = next(
                        (
                            "right"
                            for i, s in enumerate(steps)
                            if outcome(Path(root), {s: state(i)}) == "right"
                        ),
                        found,
                    )
                counts[
                    f"{'raw error' if raw else 'told' if errors else 'done'}, state {found}"
                ] += 1
    return counts


ATTACKS: dict[str, Callable[[], Counts[str]]] = {
    "killed at each change of a file": kills,
    "killed in turn": kills_in_turn,
    "killed, one of two ranks": lambda: kills(2, (0, 1)),
    "one bit flipped": flips,
    "a file cut, missing, or a folder": cut,
    "code planted": payloads,
    "the disk refuses": refusals,
    "folders": folders,
    "kinds of leaves": kinds,
    "filters of warnings": filters,
    "overlapping saves": overlaps,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(ATTACKS)
    for name in chosen:
        start = time.perf_counter()
        result = dict(sorted(ATTACKS[name]().items()))
        print(f"{name}: {json.dumps(result)} ({time.perf_counter() - start:.1f} s)", flush=True)
