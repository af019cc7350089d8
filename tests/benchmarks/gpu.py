"""What a GPU does with this library, in one command of less than 8 minutes: ``make gpu``.

    python -m tests.benchmarks.gpu [--device cpu] [--only P5 sync] [--out out/gpu]

It needs torch, optree and pytest; JAX and other libraries take part where they are installed. Each
job runs in a process of its own with a time limit, and each entry of it has one too, so that what
fails, hangs or does not fit leaves a line that says so, and the rest goes on. What is compiled
comes last, and what the time is not enough for is left out.

- ``tests``: the tests that run on each device; ``sync``: loops of a fixed number of steps, with
  ``torch.cuda.set_sync_debug_mode("error")``, under which waiting for the GPU is an error;
- the problems of ``make bench``, with 256 tasks for P3b and P5, and ``10M``, four tasks of a
  network of 10 million parameters: eager, compiled and as CUDA graphs, against the floor, which is
  the products and gradients alone, and against other libraries. Errors are relative to float64, for
  the first four tasks. float32 is float32 (``cudnn.allow_tf32`` is off) but for the rows in TF32,
  and in bfloat16 by autocast.

Writes ``gpu.json`` and ``gpu.md`` after every job. With ``--device cpu`` sizes are small, and
nothing tells of synchronisation: it tries this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

import hyperfunc as hf
from tests.benchmarks import equilibrium, implicit, unrolled
from tests.benchmarks.harness import (
    FLOOR,
    OURS,
    PEER,
    RAW,
    Entry,
    NotRun,
    Problem,
    as_tensor,
    converted,
    in_double,
    interleaved,
)

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]
SECONDS, FEWEST = 1.0, 30.0  # of timing an entry; left for a job to begin
GRAPHS = "reduce-overhead"
COMPILED, LOWER = ("compiled", "CUDA graphs"), ("bfloat16", "TF32")
# The jobs in their order, with the most seconds that each, and each entry of it, may take.
JOBS: dict[str, tuple[int, int]] = {
    "tests": (100, 100),
    "sync": (40, 10),
    **dict.fromkeys(["P5", "10M", "P3b", "P1", "P3a", "P7", "P4", "P6-cg"], (40, 10)),
    **dict.fromkeys(["P5, compiled", "10M, compiled", "P1, compiled", "P7, compiled"], (90, 60)),
    **dict.fromkeys(["P2", "P6-reverse"], (40, 10)),
    **dict.fromkeys([f"{key}, compiled" for key in ("P4", "P6-cg", "P3b", "P3a")], (90, 60)),
    **dict.fromkeys(["P2, compiled", "P6-reverse, compiled"], (90, 60)),
}
Row = dict[str, Any]


def main() -> None:
    """Run the jobs, or, with ``--child``, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", default=list(JOBS), help=f"of {'; '.join(JOBS)}")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.device)
        return
    if unknown := [name for name in options.only if name not in JOBS]:
        parser.error(f"no such job: {', '.join(unknown)}; there are {'; '.join(JOBS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --device cpu tries the script")
    run(options)


def run(options: Any) -> None:
    """Run the jobs one after the other, and write what there is after each."""
    end = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for job in (name for name in JOBS if name in options.only):
        left = end - time.monotonic()
        new = [{"job": job, "name": "all", "note": "not run: out of time"}]
        if left >= FEWEST:
            print(f"{job} ({left:.0f} s left)", flush=True)
            new = run_child(job, options.device, min(left, JOBS[job][0]))
        rows += new
        for row in new:
            if "entries" not in row:
                print(f"  {row['name']}: {told(row)}", flush=True)
        write(rows, options)
    print(f"Written to {options.out}: gpu.json, gpu.md")


def run_child(job: str, device: str, limit: float) -> list[Row]:
    """The rows of a job in a process of its own, and one for each entry that it did not reach."""
    command = [*COMMAND, "--child", job, "--device", device]
    environment = {**os.environ, "PYTHONPATH": ".", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            why = f"failed: the process returned {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (output, errors):
            file.seek(0)
        lines = [line for line in output if line.startswith("{") and line.endswith("}\n")]
        last = errors.read().strip().splitlines()[-1:]
    planned, *rows = map(json.loads, lines or ['{"entries": ["all"]}'])
    if process.returncode > 0 and last:
        why += f": {last[0][:200]}"
    missing = [name for name in planned["entries"] if all(row["name"] != name for row in rows)]
    rows += [{"name": name, "note": why} for name in missing]
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return [{"job": job, **row} for row in rows]


def child(job: str, device: str) -> None:
    """Run a job in this process: a line of JSON for what is planned, and for each row."""
    warnings.simplefilter("ignore")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    steps = STEPS.get(job, measured)(job, device)
    names = [name for name, _ in steps]
    print(json.dumps({"entries": names}), flush=True)
    for name, step in steps:
        row: Row = {"name": name}
        try:
            with time_limit(JOBS[job][1]):
                step(row)
        except ModuleNotFoundError as error:
            row["note"] = f"not run: needs {error.name}, which is not installed"
        except NotRun as error:
            row["note"] = f"not run: {error}"
        except Exception as error:
            text = " ".join(str(error).split())
            row["note"] = f"failed: {type(error).__name__}: {text[:200]}"
        print(json.dumps(row), flush=True)


Steps = list[tuple[str, Callable[[Row], None]]]
"""The entries of a job, and what fills in the row of each."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A context in which a TimeoutError comes after some seconds, when Python code next runs."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def tests(job: str, device: str) -> Steps:
    """The tests with the fixture ``device``, in the files that need no further packages."""

    def step(row: Row) -> None:
        pattern = re.compile(r"def test_\w+\([^)]*\bdevice\b")
        paths = sorted(p for p in ROOT.glob("tests/**/test_*.py") if pattern.search(p.read_text()))
        command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-o", "minversion=1"]
        command += ["-m", "not slow", "-k", device, "--continue-on-collection-errors"]
        command += ["-o", "filterwarnings=", "-p", "no:cacheprovider"]
        names = [str(path.relative_to(ROOT)) for path in paths]
        if device == "cpu":
            names = ["tests/test_modules.py"]
        with tempfile.TemporaryFile("w+") as output:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*command, *names], cwd=ROOT, stdout=output, timeout=JOBS[job][1] - 5
                )
            output.seek(0)
            text = output.read()
        found = {kind: re.findall(rf"^(\S+) {kind}", text, re.MULTILINE) for kind in OUTCOMES}
        row["note"] = ", ".join(f"{len(names)} {kind.lower()}" for kind, names in found.items())
        row["failed"] = found["FAILED"] + re.findall(r"^ERROR (\S+)", text, re.MULTILINE)
        if row["failed"]:
            row["note"] += ": " + ", ".join(row["failed"][:10])

    return [("on each device", step)]


OUTCOMES = ("PASSED", "FAILED", "SKIPPED", "ERROR")


def sync(job: str, device: str) -> Steps:
    """A call of each method with a fixed number of steps, under which waiting is an error."""
    from tests.whole.test_no_sync import METHODS, transform

    def step(row: Row, method: Any) -> None:
        h, x = torch.zeros(4, device=device), torch.ones(2, 3, 4, device=device)
        fn = transform(method)
        for call in (lambda: fn(h, x[0]), lambda: torch.func.vmap(fn, (None, 0))(h, x)):
            call()
            if device == "cpu":
                row["note"] = "runs; a CPU does not tell whether it waits"
                continue
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            row["note"] = "waits for nothing"

    return [(name, functools.partial(step, method=method)) for name, method in METHODS.items()]


def measured(job: str, device: str) -> Steps:
    """The entries of a problem, checked and timed; those that are compiled, or the others."""
    key, _, compiled = job.partition(", ")
    problem = make(key, device)
    reference: list[torch.Tensor] = []

    def step(row: Row, entry: Entry) -> None:
        row["group"] = entry.group
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        function = finished(entry.prepare(), device)
        begin = time.perf_counter()
        result = function()
        row["first_call"] = time.perf_counter() - begin
        if result is not None:
            if not reference:
                reference[:] = map(as_tensor, problem.reference())
            row["error"] = error = distance(result, reference)
            row["wrong"] = not error <= problem.tolerance and not any(
                n in entry.name for n in LOWER
            )
        times = interleaved([function], SECONDS)[0]
        row.update(seconds=statistics.median(times), fastest=min(times), repeats=len(times))
        if device == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20

    chosen = [
        each
        for each in problem.entries
        if any(name in each.name for name in COMPILED) == bool(compiled)
    ]
    return [(each.name, functools.partial(step, entry=each)) for each in chosen]


STEPS = {"tests": tests, "sync": sync}


def distance(result: Any, reference: list[torch.Tensor]) -> float:
    """The relative error in the tasks that the reference holds, which are the first ones."""
    gaps, sizes = [], []
    for got, expected in zip(map(as_tensor, result), reference, strict=True):
        gaps.append(((got[: len(expected)] if expected.ndim else got) - expected).norm())
        sizes.append(expected.norm())
    gap, size = (torch.stack(norms).norm() for norms in (gaps, sizes))
    return float(gap / size)


def finished(function: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A function that waits for the GPU before it returns."""

    def call() -> Any:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def make(key: str, device: str) -> Problem:
    """A problem on a device, small on a CPU, with all entries."""
    if key == "P7":
        return equilibrium.p7(device)
    title, build, many = WORKS[key]
    work = converted(build(device == "cpu"), lambda leaf: leaf.to(device))
    if isinstance(work, implicit.Work):
        first = dataclasses.replace(work, tasks=tuple(leaf[:4] for leaf in work.tasks))
        reference = functools.partial(lambda: implicit.by_hand(in_double(first))())
        return Problem(key, title, list(entries_of(work, many, device)), reference, 3e-2)
    problem = unrolled.problem_of(key, title, work)
    graphs = [
        entry(f"hyperfunc, {name}, CUDA graphs", OURS, unrolled.hyperfunc, work, method, GRAPHS)
        for name, method in (("ReverseUnroll", hf.ReverseUnroll()), ("Reverse", hf.Reverse()))
    ]
    return dataclasses.replace(problem, entries=[*problem.entries, *graphs])


Work: TypeAlias = implicit.Work | unrolled.Work
# Titles, works, small or not, and whether there are too many tasks to take one after the other.
WORKS: dict[str, tuple[str, Callable[[bool], Work], bool]] = {
    "P1": ("logistic regression, 500 x 20, CG 20", lambda _: implicit.logistic("cg", 20), False),
    "P2": ("the same, Neumann 50", lambda _: implicit.logistic("neumann", 50), False),
    "P3a": ("iMAML, 16 tasks, MLP", lambda s: implicit.fewshot_mlp(2 if s else 16), False),
    "P3b": (
        "iMAML, 256 tasks, CNN",
        lambda s: implicit.fewshot_conv(*(2, 8) if s else (256,)),
        True,
    ),
    "P4": ("MLP, 100 steps, unrolled", lambda s: unrolled.mlp(8 if s else 100), False),
    "P5": ("iMAML, 256 tasks, MLP", lambda s: implicit.fewshot_mlp(3 if s else 256), True),
    "P6-cg": ("20 parameters, 100 steps, CG 10", lambda _: implicit.tiny_logistic(), False),
    "P6-reverse": ("the same, unrolled", lambda _: unrolled.tiny_logistic(), False),
    "10M": (
        "iMAML, 4 tasks, MLP of 10 million parameters",
        lambda s: implicit.fewshot_mlp(4, (784, *[64 if s else 2048] * 3, 5)),
        False,
    ),
}


def entry(name: str, group: str, build: Callable[..., Callable[[], Any]], *args: Any) -> Entry:
    return Entry(name, group, functools.partial(build, *args))


def entries_of(work: implicit.Work, many: bool, device: str) -> Iterator[Entry]:
    """The ways to do a work of tasks; with many of them not one after the other."""
    mapped = work.num_tasks > 1
    floor, ours, name = implicit.floor, implicit.hyperfunc_loop, "hyperfunc"
    if not many:
        yield entry("products and gradients", FLOOR, floor, work)
        yield entry("by hand, updates in place", RAW, implicit.by_hand, work)
        yield entry("hyperfunc", OURS, ours, work)
    if mapped:
        floor, ours, name = implicit.batched_floor, implicit.hyperfunc_vmap, "hyperfunc, vmap"
        yield entry("products and gradients, batched", FLOOR, floor, work)
        yield entry(name, OURS, ours, work)
        yield entry("hyperfunc, task_map", OURS, implicit.hyperfunc_task_map, work)
    yield entry("by hand, torch.func.vjp", RAW, implicit.functional_by_hand, work)
    for what, compile in (("compiled", True), ("CUDA graphs", GRAPHS)):
        yield entry(f"{name}, {what}", OURS, ours, work, compile)
    for what, lower in (("bfloat16", in_bfloat16), ("TF32", in_tf32)) if mapped else ():
        yield entry(f"products and gradients, {what}", FLOOR, lower, floor, work, device)
        yield entry(f"{name}, {what}", OURS, lower, ours, work, device)
    if not many:
        yield entry("HyperTorch's algorithm, by hand", PEER, implicit.hypertorch_style, work)
        yield entry("TorchOpt", PEER, implicit.torchopt, work)
    for over in ("scan",) if not mapped else ("vmap",) if many else ("scan", "vmap"):
        yield entry(f"JAXopt, jit, {over} over tasks", PEER, implicit.jaxopt, work, over)


def in_bfloat16(build: Any, work: implicit.Work, device: str) -> Callable[[], Any]:
    """An entry with its losses under autocast."""

    def lower(loss: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return loss(*args)

        return run

    losses = lower(work.data_loss), lower(work.outer_loss)
    batched = work.batched_losses and tuple(map(lower, work.batched_losses))
    changes = {"data_loss": losses[0], "outer_loss": losses[1], "batched_losses": batched}
    return build(dataclasses.replace(work, **changes))


def in_tf32(build: Any, work: implicit.Work, device: str) -> Callable[[], Any]:
    """An entry whose products and convolutions round their operands to TF32."""
    if device == "cpu":
        raise NotRun("a CPU has no TF32")
    function = build(work)

    def run() -> Any:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False

    return run


def told(row: Row) -> str:
    """What came of an entry, in a line."""
    if "seconds" not in row:
        return str(row.get("note", ""))
    text = f"{1e3 * row['seconds']:.2f} ms"
    return f"{text}, WRONG by {row['error']:.1e}" if row.get("wrong") else text


def write(rows: list[Row], options: Any) -> None:
    """The JSON, with the machine, and the table, in times the floor of the same problem."""
    machine = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "minutes": options.minutes,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    lines = [
        f"{machine['device']}, torch {machine['torch']}",
        "",
        "| job | entry | milliseconds | times the floor | first call, s | error | peak, MiB | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    floors: dict[str, float] = {}
    for row in rows:
        if row.get("group") == FLOOR and "seconds" in row:
            key = row["job"]
            floors[key] = min(row["seconds"], floors.get(key, row["seconds"]))
    for row in rows:
        cells = [row["job"], row["name"], *[""] * 5, row.get("note", "")]
        if "seconds" in row:
            floor = floors.get(row["job"].partition(",")[0])
            ratio = "" if floor is None else f"{row['seconds'] / floor:.2f}"
            cells[2:5] = f"{1e3 * row['seconds']:.2f}", ratio, f"{row['first_call']:.1f}"
            cells[5] = f"{row['error']:.0e}" if "error" in row else ""
            cells[6] = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
            cells[7] = "WRONG" if row.get("wrong") else ""
        lines.append(f"| {' | '.join(cells)} |")
    (options.out / "gpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
