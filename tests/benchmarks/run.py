"""Speed beside the floor and beside other libraries: ``make bench``.

For each problem and number of threads a process of its own checks every entry's hypergradient
against float64 and then times all entries in turn, round after round. The floor is the fastest of
a few ways, written by hand, to do the products and gradients alone. What is not installed is left
out, with a line that says so.

    python -m tests.benchmarks.run --problems P1 P3a --threads 1

Writes ``bench.json`` (seconds), ``bench.md`` (ratios) and ``bench.png`` to the output folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = (1, 4, 16, 64, 256)
PROBLEMS = (
    "P1",
    "P2",
    "P3a",
    "P3b",
    "P4",
    *(f"P5-{n}" for n in TASKS),
    "P6-cg",
    "P6-reverse",
    "P7",
)
GROUPS = ("floor", "raw torch", "hyperfunc", "peer")


def main() -> None:
    """Measure the chosen problems, or, with ``--child``, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--problems", nargs="+", default=["all"], metavar="P", help="; ".join(PROBLEMS)
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each problem")
    parser.add_argument(
        "--only", default="", help="entries with one of these, A|B, in their name, and floors"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        key, threads = options.child
        try:
            print(json.dumps(child(key, int(threads), options.seconds, options.only)))
        except KeyboardInterrupt:
            sys.exit(130)
        return
    chosen = [key for key in PROBLEMS if _is_chosen(key, options.problems)]
    if not chosen:
        parser.error(f"no such problem: {options.problems}; there are {', '.join(PROBLEMS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bench.json"
    report = json.loads(path.read_text()) if path.exists() else {"results": {}}
    print(f"{len(chosen)} problems, 1 to 5 minutes each and number of threads; results in {path}")
    for number, key in enumerate(chosen):
        for threads in options.threads:
            print(f"{key}, {threads} thread{'s' * (threads > 1)}", flush=True)
            try:
                result = run_child(key, threads, options)
            except KeyboardInterrupt:
                rest = " ".join(chosen[number:])
                sys.exit(f"Stopped. {path} has what was measured; go on with --problems {rest}")
            print("\n".join(table(result)) + "\n", flush=True)
            report["results"][f"{key}/{threads}"] = result
            report["machine"] = platform.processor() or platform.machine()
            path.write_text(json.dumps(report, indent=1) + "\n")
    results = list(report["results"].values())
    text = "\n\n".join(
        f"## {r['key']}: {r['title']}; threads: {r['threads']}\n\n" + "\n".join(table(r))
        for r in results
    )
    (options.out / "bench.md").write_text(text + "\n")
    picture(results, options.out / "bench.png")
    print(f"Written to {options.out}")


def run_child(key: str, threads: int, options: Any) -> dict[str, Any]:
    """Measure a problem in a process that is held to so many threads and processors."""
    count = str(threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.benchmarks.run", "--child", key, count]
    command += ["--seconds", str(options.seconds), "--only", options.only]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def child(key: str, threads: int, seconds: float, only: str) -> dict[str, Any]:
    """Measure a problem in this process."""
    if hasattr(os, "sched_setaffinity"):
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[:threads])  # JAX has no other way to be told
    import torch

    from tests.benchmarks.harness import measure

    warnings.simplefilter("ignore")  # those of peers, at each call
    torch.set_num_threads(threads)
    problem = make(key)
    rows = measure(problem, seconds, functools.partial(print, file=sys.stderr, flush=True), only)
    versions = {"torch": torch.__version__}
    for name in ("jax", "jaxopt", "torchopt", "higher", "torchdeq"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = str(getattr(module, "__version__", "?"))
    return {
        "key": key,
        "title": problem.title,
        "threads": threads,
        "versions": versions,
        "rows": rows,
    }


def make(key: str) -> Any:
    """The problem of this name."""
    from tests.benchmarks import equilibrium, implicit, unrolled

    problems: dict[str, Callable[[], Any]] = {
        "P1": implicit.p1,
        "P2": implicit.p2,
        "P3a": implicit.p3a,
        "P3b": implicit.p3b,
        "P4": unrolled.p4,
        **{f"P5-{n}": functools.partial(implicit.p5, n) for n in TASKS},
        "P6-cg": implicit.p6,
        "P6-reverse": unrolled.p6,
        "P7": equilibrium.p7,
    }
    return problems[key]()


def table(result: dict[str, Any]) -> list[str]:
    """Ratios to the floor, and of each entry to the fastest of hyperfunc, as Markdown."""
    rows = result["rows"]
    floor = min(row["seconds"] for row in rows if row["group"] == "floor")
    ours = [row["seconds"] for row in rows if row["group"] == "hyperfunc" and "seconds" in row]
    lines = [
        "| | | milliseconds | times the floor | times the fastest of hyperfunc | first call, s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        head = f"| {row['name']} | {row['group']} "
        if "seconds" not in row:
            lines.append(f"{head}| not run: {row['not_run']} | | | |")
            continue
        ratio = f"{row['seconds'] / min(ours):.2f}" if ours else ""
        lines.append(
            f"{head}| {1e3 * row['seconds']:.2f} | {row['seconds'] / floor:.2f} | {ratio} "
            f"| {row['first_call']:.2f} |"
        )
    return lines


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """One panel a problem, bars in times the floor; nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    colors = dict(zip(GROUPS, ("0.6", "tab:blue", "tab:red", "tab:green"), strict=True))
    columns = 3
    height = -(-len(results) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(5.5 * columns, 2.9 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        rows = [row for row in result["rows"] if "seconds" in row][::-1]
        floor = min(row["seconds"] for row in rows if row["group"] == "floor")
        ratios = [row["seconds"] / floor for row in rows]
        axis.barh(
            [row["name"] for row in rows], ratios, color=[colors[row["group"]] for row in rows]
        )
        for index, ratio in enumerate(ratios):
            axis.text(ratio, index, f" {ratio:.1f}", va="center", fontsize=7)
        axis.set_title(f"{result['key']}, threads: {result['threads']}", fontsize=9)
        axis.set_xlabel("times the floor", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=110)


def _is_chosen(key: str, names: list[str]) -> bool:
    return "all" in names or any(key == name or key.startswith(f"{name}-") for name in names)


if __name__ == "__main__":
    main()
