"""Peak memory and time of the iterative methods, and of other libraries: ``make bench-memory``.

Hypergradients of a learning rate and of one L2 weight a layer, through momentum steps on an MLP,
the work of P4 of ``make bench``. Each row runs in a process of its own, on one thread and one
processor. Its memory is the highest resident size of that process, less the size after the imports
and before the first computation; its time is the processor time of one hypergradient after a
warm-up, and is compared with that of `ReverseUnroll` for as many steps. What a compiler takes
counts as memory, and not as time.

The row "gradients and products" takes every gradient and its transposed product and does nothing
with them, the least that any method needs. The rows "by hand" are the computation of
`ReverseUnroll`, written with torch alone. Libraries that are not installed are left out, with a
line that says so; ``make bench`` installs them.

Prints a Markdown table, and writes it with the raw numbers to the output folder after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hyperfunc as hf
from tests.benchmarks import unrolled

METHODS: dict[str, Any] = {
    "ReverseUnroll()": hf.ReverseUnroll(),
    "Reverse()": hf.Reverse(),
    "Reverse(10)": hf.Reverse(10),
    "Reverse('sqrt')": hf.Reverse("sqrt"),
    "Reverse('binomial')": hf.Reverse("binomial"),
    "Reverse('binomial', slots=32)": hf.Reverse("binomial", slots=32),
    "Reverse(last=10)": hf.Reverse(last=10),
    "ForwardMode()": hf.ForwardMode(),
}
UNROLL, JAX = "ReverseUnroll()", "JAX, grad of lax.scan, jit"
BUILD: dict[str, Callable[[unrolled.Work], Callable[[], Any]]] = {
    **{
        name: functools.partial(unrolled.hyperfunc, method=method, compile=False)
        for name, method in METHODS.items()
    },
    "gradients and products": unrolled.floor,
    "by hand, create_graph": unrolled.by_hand,
    "by hand, nested torch.func.grad": unrolled.nested_by_hand,
    "higher": unrolled.higher,
    "TorchOpt": unrolled.torchopt,
    JAX: unrolled.jax_scan,
}
IMPORTS = {"higher": ("higher",), "TorchOpt": ("torchopt",), JAX: ("jax", "jax.numpy")}
Row = dict[str, Any]


def main() -> None:
    """Measure every row, or, with ``--row``, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 100, 1000, 4000])
    parser.add_argument("--rows", nargs="+", default=list(BUILD), choices=list(BUILD), metavar="R")
    parser.add_argument("--out", type=Path, default=Path("out/bench-memory"))
    parser.add_argument("--row", nargs=2, metavar=("METHOD", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row[0], int(options.row[1]))))
        return
    all_steps = sorted({1, *options.steps})
    print(
        f"{len(options.rows)} rows for each of {', '.join(map(str, all_steps))} steps, about 6 "
        f"minutes in all by default; results go to {options.out} one by one.\n"
    )
    rows: list[Row] = []
    print(*HEADER, sep="\n", flush=True)
    try:
        for steps in all_steps:
            for name in options.rows:
                rows.append({"method": name, "steps": steps, **run(name, steps, rows)})
                print(markdown(rows[-1], rows), flush=True)
                write(rows, options.out)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {options.out} has what was measured.")
    print(f"\nWritten to {options.out / 'memory.md'} and {options.out / 'memory.json'}")


def write(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "threads": 1, "rows": rows}
    (folder / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    table = [*HEADER, *(markdown(row, rows) for row in rows)]
    (folder / "memory.md").write_text("\n".join(table) + "\n")


def run(name: str, steps: int, rows: list[Row]) -> Row:
    """Measure a row in a process of its own, unless it would not fit in memory."""
    known = [row for row in rows if row["method"] == name and "megabytes" in row]
    if len(known) > 1:
        first, last = known[0], known[-1]
        slope = (last["megabytes"] - first["megabytes"]) / (last["steps"] - first["steps"])
        expected = first["megabytes"] + slope * (steps - first["steps"])
        available = resident_sizes("/proc/meminfo")["MemAvailable"]
        if expected > 0.8 * available:
            return {"left_out": f"needs about {expected:.0f} MB, {available:.0f} MB are free"}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--row", name, str(steps)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: Row = json.loads(output.splitlines()[-1])
    return result


def measure(name: str, steps: int) -> Row:
    """Memory and time of one hypergradient, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # those of peers
    try:
        for module in IMPORTS.get(name, ()):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return {"left_out": f"not run: needs {error.name}, which is not installed"}
    work = unrolled.mlp(steps)
    idle = resident_sizes()["VmRSS"]
    compute = BUILD[name](work)
    # compiled code is made for a number of steps
    (compute if name == JAX else BUILD[name](dataclasses.replace(work, steps=1)))()
    start = time.process_time()
    gradient = compute()
    seconds = time.process_time() - start
    return {
        "megabytes": resident_sizes()["VmHWM"] - idle,
        "seconds": seconds,
        "hypergradient": [float(x) for leaf in gradient or [] for x in leaf.reshape(-1)],
    }


def resident_sizes(path: str = "/proc/self/status") -> dict[str, float]:
    """The entries of a file of the kernel that are given in kB, in MB."""
    entries = (line.split(":") for line in Path(path).read_text().splitlines())
    return {
        name: int(rest[0]) / 1024
        for name, value in entries
        if len(rest := value.split()) == 2 and rest[1] == "kB"
    }


HEADER = (
    "| method | steps | peak MB | times that of 1 step | seconds | times ReverseUnroll |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
)


def markdown(row: Row, rows: list[Row]) -> str:
    """A row of the table."""
    if "left_out" in row:
        return f"| {row['method']} | {row['steps']} | {row['left_out']} | | | |"

    def find(method: str, steps: int) -> Row:
        matching = (r for r in rows if r["method"] == method and r["steps"] == steps)
        return next(matching, {})

    def ratio(quantity: str, other: Row) -> str:
        return f"{row[quantity] / other[quantity]:.2f}" if quantity in other else ""

    return (
        f"| {row['method']} | {row['steps']} | {row['megabytes']:.0f} "
        f"| {ratio('megabytes', find(row['method'], 1))} | {row['seconds']:.2f} "
        f"| {ratio('seconds', find(UNROLL, row['steps']))} |"
    )


if __name__ == "__main__":
    main()
