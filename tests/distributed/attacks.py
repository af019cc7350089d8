"""Attacks on states on disk, each with a count of what came of it; the tests hold the counts.

Some of them end processes or change limits, so they run in a process of their own::

    python -m tests.distributed.attacks [--all] [name ...]

Without ``--all``, a few seconds' worth of each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import errno
import functools
import io
import itertools
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import hyperfunc as hf
from tests.ranks import Shard, distribute_tensor, mesh_of

Counts: TypeAlias = "collections.Counter[str]"
save, load = hf.distributed.save_state, hf.distributed.load_state


def state(seed: int = 0) -> dict[str, Any]:
    values = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"w": values, "count": torch.tensor(seed), "rate": 0.5 + seed, "name": f"run{seed}"}


def equal(one: Any, other: Any) -> bool:
    return all(
        torch.equal(one[k], other[k]) if isinstance(one[k], Tensor) else one[k] == other[k]
        for k in other
    )


def outcome(folder: Path, *seeds: int) -> str:
    """What loading gives: a state as one of those that were saved, an error, or something worse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = load(state(), folder)
        except BaseException as error:
            return said(error)
    if found is None:
        return "lost"
    return "right" if any(equal(found[0], state(seed)) for seed in seeds) else "silently wrong"


def said(error: BaseException) -> str:
    if isinstance(error, hf.HypergradError | ValueError):
        return "told"
    kind = type(error).__name__
    return f"raw {kind}" if isinstance(error, Exception) else f"escapes except Exception: {kind}"


def called(action: Callable[[], Any]) -> str:
    try:
        return "no state yet" if action() is None else "done"
    except BaseException as error:
        return said(error)


@contextlib.contextmanager
def saved(*steps: int) -> Iterator[Path]:
    """A folder with the states of some steps, each with its step as the seed."""
    with tempfile.TemporaryDirectory() as root:
        for step in steps:
            save(state(step), Path(root) / "states", step, keep=len(steps))
        yield Path(root) / "states"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# Killed while saving ------------------------------------------------------------------------------

# What changes a folder, by the names of Python's audit events; opening counts if it is to write.
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock"}


def kill_at(number: int) -> None:
    """End this process before its n-th change of a file, counted from 0."""
    left = [number]

    def count() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event: str, args: Any) -> None:
        flags = args[2] if event == "open" and isinstance(args[2], int) else 0
        if (flags & (os.O_WRONLY | os.O_RDWR) and flags & os.O_CREAT) or event in CHANGES:
            count()

    def fsync(*args: Any) -> None:
        count()
        before(*args)

    before, os.fsync = os.fsync, fsync
    sys.addaudithook(hook)


def in_child(action: Callable[[], Any]) -> int:
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
    seed: int,
    change: int,
    step: int,
    keep: int,
    background: bool = False,
    world: int = 1,
    victim: int = 0,
) -> bool:
    """Save a state in children, of which one is killed; returns whether it got to the end."""

    def child(rank: int) -> None:
        group = None
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{root}/store{seed}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=20),
            )
            group = dist.new_group(backend="gloo")
        if rank == victim:
            kill_at(change)
        folder = f"{root}/states"
        save(state(seed), folder, step, keep=keep, background=background, group=group).result()

    pids = [in_child(functools.partial(child, rank)) for rank in range(world)]
    code = [os.waitpid(pid, 0)[1] for pid in pids][victim]
    assert code == 0 or os.WTERMSIG(code) == signal.SIGKILL, code
    return code == 0


def killed(
    steps: tuple[int, ...],
    step: int,
    keep: int,
    background: bool,
    world: int = 1,
    victim: int = 0,
    stride: int = 1,
) -> Counts:
    """Save ``steps``, and then one more, killed at each change of a file in turn."""
    counts: Counts = collections.Counter()
    for change in range(0, 1000, stride):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "states"
            for each in steps:
                save(state(each), folder, each, keep=max(keep, len(steps)))
            finished = attempt(root, 100, change, step, keep, background, world, victim)
            if finished:
                assert outcome(folder, 100) == "right"
                break
            found = outcome(folder, *steps, 100)
            counts["none yet" if found == "lost" and not steps else found] += 1
    return counts


def kills(everything: bool, world: int = 1) -> Counts:
    cases: Iterable[Any] = [((1,), 1, 1, False)]
    if everything:
        before = (((), 1), ((1,), 2), ((1,), 1), ((1, 2), 2), ((1, 2, 3), 4))
        cases = [
            (*each, keep, late) for each in before for keep in (1, 2) for late in (False, True)
        ]
    counts: Counts = collections.Counter()
    for case in cases:
        for victim in range(world):
            counts += killed(*case, world, victim, stride=1 if everything else 3 * world)
    return counts


def kills_in_turn(everything: bool) -> Counts:
    """Saves in one folder, each killed at a random change, among them those that clear up."""
    counts: Counts = collections.Counter()
    draws = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        folder, step, last = Path(root) / "states", 1, -1
        for number in range(300 if everything else 15):
            step += draws.randrange(2)
            finished = attempt(root, number, draws.randrange(25), step, keep=1)
            found = outcome(folder, number) if finished else outcome(folder, number, last)
            if found == "right":
                last = number if outcome(folder, number) == "right" else last
            counts["none yet" if found == "lost" and last < 0 else found] += 1
        save(state(), folder, step, keep=1)
        if {path.name for path in folder.iterdir()} - {".lock"} != {f"step-{step:08d}"}:
            counts["something is left"] += 1
    return counts


# Damage, and code in the files --------------------------------------------------------------------


def flips(everything: bool) -> Counts:
    counts: Counts = collections.Counter()
    draws = random.Random(0)
    with saved(1) as folder:
        for path in files_of(folder / "step-00000001"):
            data = path.read_bytes()
            for _ in range(500 if everything else 20):
                bit = draws.randrange(8 * len(data))
                changed = bytearray(data)
                changed[bit // 8] ^= 1 << bit % 8
                path.write_bytes(changed)
                counts[outcome(folder, 1)] += 1
            path.write_bytes(data)
    return counts


def cuts(everything: bool) -> Counts:
    """Each file shortened, emptied, lengthened, missing, or a folder in its place."""
    counts: Counts = collections.Counter()
    with saved(1, 2) as folder:
        for path in files_of(folder / "step-00000002"):
            data = path.read_bytes()
            for change in (data[:-1], data[: len(data) // 2], b"", data + b"\0", None, "folder"):
                path.unlink()
                if isinstance(change, bytes):
                    path.write_bytes(change)
                elif change is not None:
                    path.mkdir()
                counts[outcome(folder, 2)] += 1
                if path.is_dir():
                    path.rmdir()
                path.write_bytes(data)
    return counts


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def payloads_for(mark: Path) -> list[bytes]:
    """In all formats that torch reads, and as bare pickles."""
    zipped, legacy, tarred = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Payload(mark), zipped)
    torch.save(Payload(mark), legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(0, 2) if name != "pickle" else b""
            content += pickle.dumps(Payload(mark), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    raw = [pickle.dumps(Payload(mark), protocol) for protocol in (0, 2, 5)]
    return [zipped.getvalue(), legacy.getvalue(), tarred.getvalue(), *raw]


def reseal(step: Path) -> None:
    """Make the checksums right again, as who plants something would."""
    with contextlib.suppress(ImportError):
        from hyperfunc.distributed import _files

        _files.seal(step)


def payloads(everything: bool) -> Counts:
    """Code in the place of each file, and of each leaf; checksums as they were, and made right."""
    counts: Counts = collections.Counter()
    with saved(1) as folder:
        original, step = folder.parent / "original", folder / "step-00000001"
        shutil.copytree(folder, original)
        mark = folder.parent / "mark"
        described = next(step.rglob(".metadata")).relative_to(step)
        items = list(pickle.loads((step / described).read_bytes()).storage_data)

        def inside(index: Any, payload: bytes, tensor: bool) -> None:
            """A payload in the place of one tensor or number, or of what is said to be a number."""
            metadata = pickle.loads((step / described).read_bytes())
            info = metadata.storage_data.pop(index)
            path = (step / described).parent / info.relative_path
            info.offset, info.length = path.stat().st_size, len(payload)
            path.write_bytes(path.read_bytes() + payload)
            if not tensor:
                kinds = {type(v).__name__: v for v in metadata.state_dict_metadata.values()}
                metadata.state_dict_metadata[index.fqn] = kinds["BytesStorageMetadata"]
            metadata.storage_data[index if tensor else type(index)(index.fqn)] = info
            (step / described).write_bytes(pickle.dumps(metadata))

        whole = [path.relative_to(step) for path in files_of(step)]
        plants: list[Callable[[bytes], Any]] = []
        plants += [lambda payload, path=path: (step / path).write_bytes(payload) for path in whole]
        for index in items if everything else items[-1:]:
            plants += [
                lambda payload, index=index, tensor=tensor: inside(index, payload, tensor)
                for tensor in (True, False)
            ]
        for plant in plants:
            for payload in payloads_for(mark):
                for sealed in (False, True):
                    shutil.rmtree(folder)
                    shutil.copytree(original, folder)
                    plant(payload)
                    manifest = step / "manifest.json"
                    if sealed and manifest.exists() and manifest.read_bytes() != payload:
                        reseal(step)
                    found = outcome(folder, 1)
                    if mark.exists():
                        found = "code ran"
                        mark.rmdir()
                    counts[found] += 1
    return counts


# What the disk refuses ----------------------------------------------------------------------------


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


class Refusal:
    """The n-th call of a function of ``os`` fails."""

    def __init__(self, name: str, code: int, number: int) -> None:
        self.original, self.code, self.left = getattr(os, name), code, number
        self.name = name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.code, os.strerror(self.code), str(args[0]))
        return self.original(*args, **keywords)


def refusals(everything: bool) -> Counts:
    """Disks that fill up while saving, and each call on the disk refused in turn."""
    counts: Counts = collections.Counter()
    for size in (0, 1, 100, 1500, 3000, 5000) if everything else (0, 1500):
        for step in (1, 2):
            with saved(1) as folder:
                with largest_file(size):
                    said = called(lambda: save(state(9), folder, step))  # noqa: B023
                counts[f"{said}, earlier {outcome(folder, 1)}"] += 1
    codes = (errno.ENOSPC, errno.EACCES, errno.EIO) if everything else (errno.EACCES,)
    for name in ("rename", "mkdir", "fsync"):
        for code in codes:
            for number in range(100):
                refusal = Refusal(name, code, number)
                with saved(1) as folder:
                    with mock.patch.object(os, name, refusal):
                        said = called(lambda: save(state(1), folder, 1))
                    if refusal.left >= 0:
                        break
                    # what is removed last may be left for the next save
                    counts[f"{said}, earlier {outcome(folder, 1)}"] += 1
    return counts


def folders(everything: bool) -> Counts:
    """Folders that cannot be read or written."""
    counts: Counts = collections.Counter()

    def refuse(path: Any, *args: Any, **keywords: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def count(action: Callable[[], Any]) -> None:
        counts[called(action)] += 1

    with saved(1) as folder:
        file, link = folder.parent / "file", folder.parent / "link"
        file.touch()
        link.symlink_to(folder.parent / "nowhere")
        count(lambda: load(state(), file))
        count(lambda: load(state(), link))
        count(lambda: save(state(), file, 1))
        count(lambda: save(state(), file / "states", 1))
        with mock.patch.multiple(os, listdir=refuse, scandir=refuse):
            count(lambda: load(state(), folder))
        with mock.patch.object(os, "mkdir", refuse):
            count(lambda: save(state(), folder.parent / "new", 1))
        (folder / "step-00000002").touch()
        count(lambda: load(state(), folder))
        count(lambda: save(state(), folder, 2))
    return counts


# The rest -----------------------------------------------------------------------------------------


def kinds(everything: bool) -> Counts:
    """Each kind of leaf loaded as each other, but for numbers as numbers."""
    counts: Counts = collections.Counter()
    leaves = {"tensor": torch.ones(()), "float": 0.5, "int": 3, "bool": True, "str": "x"}
    with tempfile.TemporaryDirectory() as root:
        for kind, leaf in leaves.items():
            save({"a": leaf}, f"{root}/{kind}", 1)
            for other, like in leaves.items():
                if kind != other and {kind, other} != {"float", "int"}:
                    counts[called(lambda: load({"a": like}, f"{root}/{kind}"))] += 1  # noqa: B023
    return counts


def filters(everything: bool) -> Counts:
    """Filters of warnings after saves in the background that overlap."""
    counts: Counts = collections.Counter()
    with saved(1):
        pass  # imports what it takes, of which a module adds a filter
    for _ in range(20 if everything else 5):
        before = list(warnings.filters)
        with tempfile.TemporaryDirectory() as root:
            leaf = {"a": torch.ones(200_000)}
            futures = [save(leaf, f"{root}/{i}", 1, background=True) for i in range(4)]
            for future in futures:
                future.result()
        counts["as before" if list(warnings.filters) == before else "changed"] += 1
        warnings.filters[:] = before  # type: ignore[index]
    return counts


def overlaps(everything: bool) -> Counts:
    """Saves in the background without a wait: of one step or several, of one thread or several."""
    counts: Counts = collections.Counter()
    for steps in ((1, 2, 3), (2, 2, 2)):
        for threads in (False, True):
            futures: list[Any] = []
            with tempfile.TemporaryDirectory() as root:

                def start(seed: int, root: str = root, futures: list[Any] = futures) -> None:
                    futures.append(save(state(seed), root, steps[seed], background=True))  # noqa: B023
                    if threading.current_thread() is not threading.main_thread():
                        futures[-1].exception()

                workers = [threading.Thread(target=start, args=(seed,)) for seed in range(3)]
                for seed, worker in enumerate(workers):
                    worker.start() if threads else start(seed)
                for worker in workers if threads else []:
                    worker.join()
                for future in futures:
                    counts[called(lambda: [future.result(20)])] += 1  # noqa: B023
                counts[outcome(Path(root), 0, 1, 2)] += 1
    return counts


# Ranks that die or hang ---------------------------------------------------------------------------


def parallel(rank: int, lose: Callable[[], None]) -> None:
    calls: list[int] = []

    def fn(m: Tensor, tasks: Tensor) -> Tensor:
        calls.append(0)
        if rank == 1 and len(calls) == 2:
            lose()
        return m * tasks

    hf.distributed.task_parallel(fn, chunk_size=1)(torch.tensor(1.0), torch.ones(4))


def sharded(rank: int, lose: Callable[[], None]) -> None:
    mesh = mesh_of(dist.get_world_size())
    m = distribute_tensor(torch.ones(8, dtype=torch.float64), mesh, [Shard(0)])
    calls: list[int] = []

    def loss(w: Tensor, m: Tensor) -> Tensor:
        calls.append(0)
        if rank == 1 and len(calls) == 3:
            lose()
        return ((w - m) ** 2).sum() + (w**4).sum()

    solver = hf.minimize(
        loss, hf.optim.sgd(lr=0.1), num_steps=2, init=lambda m: torch.zeros_like(m)
    )
    hf.hypergrad(solver, lambda w, m: w.sum(), inner_loss=loss, method=hf.CG())(m)


def saving(rank: int, lose: Callable[[], None]) -> None:
    if rank == 1:
        lose()
    save(state(), tempfile.gettempdir() + "/nowhere", 1)


def lost_ranks(everything: bool) -> Counts:
    """What the others say where rank 1 dies, or hangs for longer than the timeout."""
    counts: Counts = collections.Counter()
    cases = list(itertools.product((2, 4), ("dies", "hangs"), (parallel, sharded, saving)))
    for world, how, run in cases if everything else cases[:1]:
        with tempfile.TemporaryDirectory() as root:

            def child(
                rank: int, root: str = root, world: int = world, how: str = how, run: Any = run
            ) -> None:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{root}/store",
                    rank=rank,
                    world_size=world,
                    timeout=datetime.timedelta(seconds=3),
                )
                dist.barrier()

                def lose() -> None:
                    time.sleep(6 if how == "hangs" else 0)
                    os.kill(os.getpid(), signal.SIGKILL)

                text = "no error"
                try:
                    run(rank, lose)
                except BaseException as error:
                    text = f"{type(error).__name__}: {error}"
                Path(root, f"{rank}").write_text(text)

            pids = [in_child(functools.partial(child, rank)) for rank in range(world)]
            for pid in pids:
                os.waitpid(pid, 0)
            for rank in range(world):
                if rank != 1:
                    text = Path(root, f"{rank}").read_text()
                    counts[about(run.__name__, how, world, text)] += 1
    return counts


def about(call: str, how: str, world: int, text: str) -> str:
    """Whether an error names the call, the rank that was lost, and the timeout."""
    names = {"parallel": "task_parallel", "sharded": "hypergrad", "saving": "save_state"}
    lost = "rank 1, which" if world == 2 else "1"
    parts = ("HypergradError: ", names[call], f"of {world} lost contact with", lost, "within 3 s")
    missing = [part for part in (*parts, "timeout=datetime.timedelta") if part not in text]
    return f"{call} {how}: {text[:200]}" if missing else "named"


ATTACKS: dict[str, Callable[[bool], Counts]] = {
    "killed at each change of a file": kills,
    "killed, one of two ranks": functools.partial(kills, world=2),
    "killed, one save after another": kills_in_turn,
    "one bit flipped": flips,
    "a file cut, missing, or a folder": cuts,
    "code planted": payloads,
    "the disk refuses": refusals,
    "folders that are none": folders,
    "another kind of leaf": kinds,
    "filters of warnings": filters,
    "overlapping saves": overlaps,
    "a rank dies or hangs": lost_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or ATTACKS:
        start = time.perf_counter()
        counts = ATTACKS[name](args.all)
        seconds = time.perf_counter() - start
        print(json.dumps([name, dict(sorted(counts.items())), round(seconds, 1)]), flush=True)


if __name__ == "__main__":
    main()
