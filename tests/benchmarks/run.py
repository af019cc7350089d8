"""Speed beside the floor and beside other libraries: ``make bench``.

For each problem and number of threads a process of its own, held to so many processors, checks
every entry's hypergradient against float64 and then times all entries in turn, round after round;
the median counts. The floor is the fastest of a few ways, written by hand, to do the products and
gradients alone. What is not installed is left out, with a line that says so.

    python -m tests.benchmarks.run --problems P1 P3a --threads 1

Writes ``bench.json`` (seconds), ``bench.md`` (ratios) and ``bench.png`` to the output folder after
every problem. What is there already is not measured again, unless ``--again`` is given or the
library, the benchmark or a version has changed: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = (1, 4, 16, 64, 256)
ONE, BOTH = (1,), (1, 2)
# The numbers of threads to measure by default, and about how many minutes each takes, with what is
# to be compiled. Small problems leave a second thread idle, and P2 and P5 are like P1 and P3a.
PROBLEMS: dict[str, tuple[tuple[int, ...], float]] = {
    "P1": (BOTH, 0.6),
    "P2": (ONE, 0.6),
    "P3a": (BOTH, 2.2),
    "P3b": (ONE, 4.2),
    "P4": (BOTH, 1.1),
    "P5-1": (ONE, 0.6),
    "P5-4": (ONE, 1.8),
    "P5-16": (BOTH, 2.2),
    "P5-64": (ONE, 1.4),
    "P5-256": (ONE, 3.7),
    "P6-cg": (ONE, 0.4),
    "P6-reverse": (ONE, 0.8),
    "P7": (ONE, 0.2),
    "P8": (ONE, 0.2),
}
SAME = {"P5-16": "P3a"}  # one work under two names, measured once
PEERS = ("higher", "jax", "jaxopt", "torchdeq", "torchopt")
GROUPS = ("floor", "raw torch", "hyperfunc", "peer")


def main() -> None:
    """Measure the chosen problems, or, with ``--child``, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--problems", nargs="+", default=["all"], metavar="P", help="; ".join(PROBLEMS)
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", help="by default 1, and 2 for problems that use them"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing, for each problem")
    parser.add_argument(
        "--only", default="", help="entries with one of these, A|B, in their name, and floors"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
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
    unknown = [n for n in options.problems if not any(_is_chosen(key, [n]) for key in PROBLEMS)]
    if unknown:
        parser.error(f"no such problem: {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    jobs = [
        (key, threads)
        for key, (default, _) in PROBLEMS.items()
        if _is_chosen(key, options.problems)
        for threads in options.threads or default
    ]
    try:
        failed = run(jobs, options)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {options.out} has what was measured; the same command goes on.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; see above")


def run(jobs: list[tuple[str, int]], options: Any) -> list[str]:
    """Measure what is not there already; the names of what failed."""
    path = options.out / "bench.json"
    stored = json.loads(path.read_text())["results"] if path.exists() else {}
    results = {name: result for name, result in stored.items() if result["key"] in PROBLEMS}
    context = circumstances(options)

    def is_there(key: str, threads: int) -> bool:
        result = results.get(f"{key}/{threads}", {})
        return all(result.get(name) == value for name, value in context.items())

    rest = [job for job in jobs if options.again or not is_there(*job)]
    minutes = sum(PROBLEMS[key][1] for key, threads in rest if (SAME.get(key), threads) not in jobs)
    there = f", {len(jobs) - len(rest)} more are in {path} already" if len(jobs) > len(rest) else ""
    print(
        f"{len(rest)} measurements, about {minutes:.0f} min on a machine with nothing else to "
        f"do{there}.\nResults go to {options.out} one by one. Ctrl-C stops, and the same command "
        f"goes on.\n",
        flush=True,
    )
    failed = []
    start = time.perf_counter()
    for number, (key, threads) in enumerate(rest, 1):
        name, twin = f"{key}/{threads}", (SAME.get(key, ""), threads)
        print(f"[{number}/{len(rest)}] {key}, {threads} thread{'s' * (threads > 1)}", flush=True)
        begin = time.perf_counter()
        if is_there(*twin) and (twin in rest or not options.again):
            print(f"  the same work as {twin[0]}")
            result = {**results[f"{twin[0]}/{threads}"], "key": key}
        else:
            try:
                result = {**run_child(key, threads, options), **context}
            except subprocess.CalledProcessError as error:
                print(f"  failed: the process returned {error.returncode}\n", flush=True)
                failed.append(name)
                continue
        now = time.perf_counter()
        print("\n".join(table(result)))
        print(f"{now - begin:.0f} s; {(now - start) / 60:.1f} min so far\n", flush=True)
        results[name] = result
        write(results, options.out)
    if results:
        drawn = write(results, options.out)
        also = "bench.png" if drawn else "no picture, which needs matplotlib"
        print(f"Written to {options.out}: bench.json, bench.md, {also}")
    return failed


def circumstances(options: Any) -> dict[str, Any]:
    """What a result depends on besides its problem and threads."""
    here = Path(__file__).parent
    code = hashlib.sha256()
    for source in sorted([*here.glob("*.py"), *here.parents[1].glob("hyperfunc/**/*.py")]):
        if source != Path(__file__):
            code.update(source.read_bytes())
    versions = {"python": platform.python_version()}
    for name in ("torch", *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "code": code.hexdigest()[:16],
        "machine": platform.processor() or platform.machine(),
        "timing": {"seconds": options.seconds, "only": options.only},
    }


def write(results: dict[str, Any], folder: Path) -> bool:
    """The three files, the first of which is never there half; whether there is a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    order = list(PROBLEMS)
    ordered = sorted(results.values(), key=lambda r: (order.index(r["key"]), r["threads"]))
    report = {"results": {f"{r['key']}/{r['threads']}": r for r in ordered}}
    path = folder / "bench.json"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(report, indent=1) + "\n")
    scratch.replace(path)
    text = "\n\n".join(
        f"## {r['key']}: {r['title']}; threads: {r['threads']}\n\n" + "\n".join(table(r))
        for r in ordered
    )
    (folder / "bench.md").write_text(text + "\n")
    return picture(ordered, folder / "bench.png")


def run_child(key: str, threads: int, options: Any) -> dict[str, Any]:
    """Measure a problem in a process that is held to so many threads and processors."""
    count = str(threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
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
    return {"key": key, "title": problem.title, "threads": threads, "rows": rows}


def make(key: str) -> Any:
    """The problem of this name."""
    from tests.benchmarks import equilibrium, implicit, small_networks, unrolled

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
        "P8": small_networks.p8,
    }
    return problems[key]()


def table(result: dict[str, Any]) -> list[str]:
    """Ratios to the floor, and of each entry to the fastest of hyperfunc, as Markdown."""
    rows = result["rows"]
    floor = min(row["seconds"] for row in rows if row["group"] == "floor")
    ours = [row["seconds"] for row in rows if row["group"] == "hyperfunc" and "seconds" in row]
    lines = [
        "| | | milliseconds | times the floor | times the fastest of hyperfunc | first call, s "
        "| repeats |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        head = f"| {row['name']} | {row['group']} "
        if "seconds" not in row:
            lines.append(f"{head}| not run: {row['not_run']} | | | | |")
            continue
        ratio = f"{row['seconds'] / min(ours):.2f}" if ours else ""
        lines.append(
            f"{head}| {1e3 * row['seconds']:.2f} | {row['seconds'] / floor:.2f} | {ratio} "
            f"| {row['first_call']:.2f} | {row['repeats']} |"
        )
    return lines


def picture(results: list[dict[str, Any]], path: Path) -> bool:
    """One panel a problem, bars in times the floor; nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
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
    pyplot.close(figure)
    return True


def _is_chosen(key: str, names: list[str]) -> bool:
    return "all" in names or any(key == name or key.startswith(f"{name}-") for name in names)


if __name__ == "__main__":
    main()
