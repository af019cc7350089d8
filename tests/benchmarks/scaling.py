"""Time as the work grows, beside the floor: ``make bench-scaling``.

Implicit MAML on an MLP, on one thread, along four axes: tasks, parameters, products of the
adjoint (K) and inner steps (T). Each point is the median of interleaved repeats. The slope is that
of a line through the last half of the points on log axes: 1 where twice the work takes twice the
time.

    python -m tests.benchmarks.scaling --axes tasks K

Writes ``scaling.json``, ``scaling.md`` and ``scaling.png`` to the output folder after every axis.

From a million parameters on, a third of the time goes to pages of memory that the allocator of C
has given back to the system and takes anew. On Linux it keeps them with

    MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks import implicit
from tests.benchmarks.harness import interleaved

AXES: dict[str, Sequence[int]] = {
    "tasks": (1, 2, 4, 8, 16, 32, 64),
    "parameters": (10**3, 10**4, 10**5, 10**6, 10**7),
    "K": (1, 2, 4, 8, 16, 32, 64),
    "T": (1, 2, 4, 8, 16, 32, 64, 128),
}
FLOOR = "floor"
ENTRIES: dict[str, Callable[[implicit.Work], Callable[[], Any]]] = {
    FLOOR: implicit.floor,
    "hyperfunc": implicit.hyperfunc_loop,
    "hyperfunc, task_map": implicit.hyperfunc_task_map,
    "hyperfunc, vmap": implicit.hyperfunc_vmap,
}


def main() -> None:
    """Measure the chosen axes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each point")
    parser.add_argument("--out", type=Path, default=Path("out/bench-scaling"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = sum(len(AXES[axis]) for axis in options.axes)
    print(f"{points} points, about {points * 1.5 * options.seconds / 60:.1f} minutes", flush=True)
    results: dict[str, dict[str, list[float]]] = {}
    try:
        for axis in options.axes:
            results[axis] = along(axis, options.seconds)
            write(results, options.out)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. {options.out} has the axes that were measured; choose with --axes")
    print("\n" + "\n".join(table(results)) + f"\n\nWritten to {options.out}")


def along(axis: str, seconds: float) -> dict[str, list[float]]:
    """The median times of each entry at the points of an axis."""
    names = list(ENTRIES) if axis == "tasks" else [FLOOR, "hyperfunc"]
    medians: dict[str, list[float]] = {name: [] for name in names}
    for value in AXES[axis]:
        work = make(axis, value)
        times = interleaved([ENTRIES[name](work) for name in names], seconds)
        for name, samples in zip(names, times, strict=True):
            medians[name].append(statistics.median(samples))
        row = ", ".join(f"{name} {1e3 * medians[name][-1]:.2f} ms" for name in names)
        print(f"{axis} = {value}: {row}", flush=True)
    return medians


def write(results: dict[str, dict[str, list[float]]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "scaling.md").write_text("\n".join(table(results)) + "\n")
    picture(results, folder / "scaling.png")


def make(axis: str, value: int) -> implicit.Work:
    """The work at a point of an axis; elsewhere 4 tasks, about 40,000 parameters, K = 5, T = 16."""
    if axis == "parameters":
        return dataclasses.replace(network(max(1, value // 105), 1), steps=4, products=5)
    work = network(400, value if axis == "tasks" else 4 if axis != "T" else 1)
    return dataclasses.replace(
        work, **{"K": {"products": value}, "T": {"steps": value}}.get(axis, {})
    )


def network(hidden: int, num_tasks: int) -> implicit.Work:
    """Few-shot tasks of 100 features, for a network with one hidden layer."""
    generator = torch.Generator().manual_seed(1)
    meta = [
        torch.randn(hidden, 100, generator=generator) / 10,
        torch.zeros(hidden),
        torch.randn(5, hidden, generator=generator) / math.sqrt(hidden),
        torch.zeros(5),
    ]

    def net(w: list[Tensor], x: Tensor) -> Tensor:
        return F.linear(F.linear(x, w[0], w[1]).relu(), w[2], w[3])

    tasks = implicit.few_shot_tasks(num_tasks, (100,))
    return implicit.few_shot(net, None, meta, tasks, None)


def table(results: dict[str, dict[str, list[float]]]) -> list[str]:
    """The slopes and the ratios to the floor at the ends, as Markdown."""
    lines = [
        "| axis | | slope | times the floor, first point | last point |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for axis, columns in results.items():
        floor = columns[FLOOR]
        for name, times in columns.items():
            lines.append(
                f"| {axis} | {name} | {slope(AXES[axis], times):.2f} "
                f"| {times[0] / floor[0]:.2f} | {times[-1] / floor[-1]:.2f} |"
            )
    return lines


def slope(values: Sequence[int], times: Sequence[float]) -> float:
    """The slope on log axes over the last half of the points."""
    half = len(times) // 2
    x = torch.tensor([math.log(value) for value in values[half:]])
    y = torch.tensor([math.log(time) for time in times[half:]])
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def picture(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel an axis; nothing without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(4 * len(results), 3.4), squeeze=False, layout="constrained"
    )
    for panel, (axis, columns) in zip(axes.flat, results.items(), strict=True):
        for name, times in columns.items():
            style = {"color": "0.5", "linestyle": "--"} if name == FLOOR else {}
            panel.loglog(AXES[axis], times, marker="o", markersize=3, label=name, **style)
        panel.set_xlabel(axis)
        panel.set_ylabel("seconds")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
