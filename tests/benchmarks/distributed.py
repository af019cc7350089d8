"""What several ranks send and what that costs: measured here, and projected to many devices.

    python tests/benchmarks/distributed.py

1. All-reduces and bytes in a step of each solver on two ranks, counted, against the formulas.
2. Tasks by `task_parallel` on 1, 2 and 4 ranks: strong scaling (as many tasks in all) and weak
   scaling (as many on each rank). More ranks than cores share cores, so that what can be seen is
   what the ranks cost each other, and no speedup beyond the number of cores.
3. A projection to 1024 devices by the alpha-beta model of Hockney: an all-reduce of n bytes on p
   devices takes ``2 log2(p) alpha + 2 (1 - 1/p) n beta``. The numbers for the network and the
   devices are assumptions, which `Machine` lists; the bytes are those counted in 1.

Tables go to standard output; numbers and a picture into the folder given by --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import hyperfunc as hf
from tests import ranks

DEVICES = (1, 8, 64, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench-distributed"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if args.resume and path.exists() else {}
    stages: dict[str, Callable[[], Any]] = {"solvers": count_solvers}
    stages |= {f"tasks on {n}": functools.partial(measure_tasks, n) for n in args.ranks}
    stages["projection"] = project
    bar = tqdm(stages.items(), unit="part")
    try:
        for name, stage in bar:
            bar.set_description(name)
            if name not in results:
                results[name] = stage()
                path.write_text(json.dumps(results, indent=1) + "\n")
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped; --resume goes on from what is in {path}") from None
    report(results, args.ranks)
    picture(args.out / "picture.png", results, args.ranks)


# 1. What a step sends -----------------------------------------------------------------------------

# solver: all-reduces in a step, and numbers summed in them; GMRES as a mean over its steps 3 to 12
FORMULAS: dict[str, tuple[Any, float, float]] = {
    "CG": (hf.CG, 2, 3),
    "PipelinedCG": (hf.PipelinedCG, 1, 3),
    "NormalCG": (hf.NormalCG, 2, 3),
    "BiCGStab": (hf.BiCGStab, 3, 6),
    "GMRES": (hf.GMRES, 3, 2 * 7.5 + 2),
    "FixedPoint": (hf.FixedPoint, 1, 1),
}


def count_solvers() -> dict[str, dict[str, float]]:
    counted = {}
    with ranks.running(2) as two:
        for name in FORMULAS:
            none, ten = (two.run(_count, name, steps)[0] for steps in (2, 12))
            calls, size = ((b - a) / 10 for a, b in zip(none, ten, strict=True))
            counted[name] = {"all_reduces": calls, "bytes": size}
    return counted


def _count(name: str, steps: int) -> tuple[int, int]:
    from torch.distributed.tensor import Shard, distribute_tensor

    solver = FORMULAS[name][0](maxiter=steps, rtol=1e-300)
    mesh = init_device_mesh("cpu", (2,))
    A = distribute_tensor(torch.linspace(0.5, 1.5, 1000, dtype=torch.float64), mesh, [Shard(0)])
    operator = hf.linear_solvers.LinearOperator(lambda v: (A * v[0],), lambda v: (A * v[0],))
    sizes, all_reduce = [], dist.all_reduce

    def counting(values: Tensor, *args: Any, **keywords: Any) -> Any:
        sizes.append(values.nbytes)
        return all_reduce(values, *args, **keywords)

    dist.all_reduce = counting
    try:
        solver.solve(operator, (torch.ones_like(A),))
    finally:
        dist.all_reduce = all_reduce
    return len(sizes), sum(sizes)


# 2. Tasks -----------------------------------------------------------------------------------------

TASKS, WIDTH, STEPS, PRODUCTS = 32, 512, 5, 5


def measure_tasks(number: int) -> dict[str, float]:
    with ranks.running(number) as group:
        strong = max(seconds for seconds, _ in group.run(_time, TASKS))
        weak = group.run(_time, TASKS * number)
    return {
        "ranks": number,
        "strong": strong,
        "weak": max(seconds for seconds, _ in weak),
        "bytes": weak[0][1],
    }


def _time(num_tasks: int) -> tuple[float, int]:
    """Seconds of the fastest of three calls, and the bytes that a rank puts into one, counted."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 5)
    )
    apply, meta = hf.functional(net)
    tasks = {
        name: (
            torch.randn(num_tasks, 25, 32, generator=generator),
            torch.randint(5, (num_tasks, 25), generator=generator),
        )
        for name in ("support", "query")
    }

    def loss(w: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(apply(w, x), y)

    inner_loss = hf.proximal(lambda w, m, task: loss(w, *task["support"]), 1.0)

    @hf.hypergrad_and_value(
        outer_loss=lambda w, m, task: loss(w, *task["query"]),
        inner_loss=inner_loss,
        method=hf.CG(maxiter=PRODUCTS, rtol=0, atol=0),
        throw=False,
    )
    def adapt(m: Any, task: Any) -> Any:
        w = m
        for _ in range(STEPS):
            grads = torch.func.grad(inner_loss)(w, m, task)
            w = {name: w[name] - 0.1 * grads[name] for name in w}
        return w

    call = hf.distributed.task_parallel(torch.func.vmap(adapt, in_dims=(None, 0)))
    mine = hf.distributed.local_tasks(tasks)
    call(meta, mine)
    seconds = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        call(meta, mine)
        seconds.append(time.perf_counter() - start)
    return min(seconds), _sent(lambda: call(meta, mine))


def _sent(call: Callable[[], Any]) -> int:
    sizes: list[int] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reducing(values: Tensor, **keywords: Any) -> Any:
        sizes.append(values.nbytes)
        return all_reduce(values, **keywords)

    def gathering(out: Any, values: Tensor, **keywords: Any) -> Any:
        sizes.append(values.nbytes)
        return all_gather(out, values, **keywords)

    dist.all_reduce, dist.all_gather = reducing, gathering
    try:
        call()
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
    return sum(sizes)


def _formula(tasks: int) -> int:
    """Bytes of a call: hypergradient and flag, twelve integers, and a rank's losses."""
    params = 32 * WIDTH + WIDTH + WIDTH * 5 + 5
    return 4 * (params + 1) + 8 * (8 + 4) + 4 * tasks


# 3. Projection ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is assumed of devices and network: round numbers of a cluster of GPUs."""

    alpha: float = 10e-6  # seconds for a message between two devices
    beta: float = 1 / 25e9  # seconds for a byte between two devices
    memory: float = 2e12  # bytes a second that a device reads and writes
    flops: float = 5e13  # operations a second that a device sustains in products

    def all_reduce(self, devices: int, size: float) -> float:
        """Seconds for an all-reduce of some bytes."""
        latency = 2 * math.log2(devices) * self.alpha
        return latency + 2 * (1 - 1 / devices) * size * self.beta


# Passes over vectors in a step beside the product: an axpy reads two and writes one.
PASSES = {"CG": 3 * 3 + 4, "PipelinedCG": 8 * 3 + 6}


def step_seconds(machine: Machine, solver: str, size: float, devices: int) -> float:
    """A step of a solver on vectors of so many float32 entries, of which a device has its share.

    The product reads 20 vectors (data, activations and their gradients, all sharded), at the speed
    of memory, and sends nothing. Starting kernels costs nothing.
    """
    share = 4 * size / devices
    product, passes = 20 * share / machine.memory, PASSES[solver] * share / machine.memory
    if solver == "CG":
        return product + passes + machine.all_reduce(devices, 4) + machine.all_reduce(devices, 8)
    return max(product, machine.all_reduce(devices, 12)) + passes


def task_efficiency(machine: Machine, params: float, tasks: int, devices: int) -> float:
    """The share of time that devices compute; 25 samples, 10 gradients and products for a task."""
    busy = math.ceil(tasks / devices) * 20 * 6 * params * 25 / machine.flops
    sent = machine.all_reduce(devices, 4 * params) + 2 * machine.all_reduce(devices, 64)
    return tasks / devices / math.ceil(tasks / devices) * busy / (busy + sent)


SIZES, PARAMS = (1e7, 1e8, 1e9, 1e10), (1e5, 1e6, 1e7, 1e8)


def project() -> dict[str, Any]:
    machine = Machine()
    steps: dict[str, Any] = {}
    for size in SIZES:
        seconds = {s: [step_seconds(machine, s, size, p) for p in DEVICES] for s in PASSES}
        first = next((p for p in range(2, 4097) if _pays(machine, size, p)), None)
        steps[f"{size:.0e}"] = {"crossover": first, **seconds}
    shares = {
        f"{params:.0e}": [task_efficiency(machine, params, 4096, p) for p in DEVICES]
        for params in PARAMS
    }
    return {
        "machine": dataclasses.asdict(machine),
        "devices": DEVICES,
        "solver_step_seconds": steps,
        "task_efficiency": shares,
    }


def _pays(machine: Machine, size: float, devices: int) -> bool:
    pipelined, plain = (step_seconds(machine, s, size, devices) for s in ("PipelinedCG", "CG"))
    return pipelined < plain


# Tables and pictures ------------------------------------------------------------------------------


def report(results: dict[str, Any], numbers: list[int]) -> None:
    print("\nA step of a solver on two ranks, of an operator that sends nothing itself; float64")
    print(f"{'':12s}{'all-reduces':>12s}{'formula':>9s}{'bytes':>9s}{'formula':>9s}")
    for name, (_, collectives, size) in FORMULAS.items():
        counted = results["solvers"][name]
        row = f"{counted['all_reduces']:12.1f}{collectives:9.1f}{counted['bytes']:9.1f}"
        print(f"{name:12s}{row}{8 * size:9.1f}")
    rows = [results[f"tasks on {n}"] for n in numbers]
    print(f"\nSeconds for the hypergradient of {TASKS} tasks in all, and of {TASKS} on each rank,")
    print(f"by an MLP of width {WIDTH}, on {os.cpu_count()} cores, one thread a rank")
    header = f"{'ranks':>5s}{'strong':>9s}{'speedup':>9s}{'weak':>9s}{'efficiency':>12s}"
    print(header + f"{'bytes':>9s}{'formula':>9s}")
    for row in rows:
        speedup, efficiency = rows[0]["strong"] / row["strong"], rows[0]["weak"] / row["weak"]
        line = f"{row['ranks']:5d}{row['strong']:9.3f}{speedup:9.2f}{row['weak']:9.3f}"
        line += f"{efficiency:12.0%}{row['bytes']:9d}"
        print(line + f"{_formula(TASKS):9d}")
    projection = results["projection"]
    print(f"\nProjected, not measured: {Machine(**projection['machine'])}")
    print("microseconds for a step of a linear solver, and where PipelinedCG is the faster")
    devices = "".join(f"{f'p = {p}':>12s}" for p in projection["devices"])
    print(f"{'entries':>8s}  {'':12s}{devices}{'crossover':>12s}")
    for size, entry in projection["solver_step_seconds"].items():
        for solver in PASSES:
            shown = "".join(f"{1e6 * t:12.1f}" for t in entry[solver])
            first = f"{entry['crossover'] or '> 4096'!s:>12s}" if solver == "PipelinedCG" else ""
            print(f"{size:>8s}  {solver:12s}{shown}{first}")
    print("\nshare of the time that devices compute, for 4096 tasks")
    print(f"{'params':>8s}  {'':12s}{devices}")
    for params, shares in projection["task_efficiency"].items():
        print(f"{params:>8s}  {'':12s}" + "".join(f"{share:12.1%}" for share in shares))


def picture(path: Path, results: dict[str, Any], numbers: list[int]) -> None:
    machine = Machine()
    figure, (tasks, solvers, share) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    rows = [results[f"tasks on {n}"] for n in numbers]
    for key in ("strong", "weak"):
        tasks.plot(numbers, [row[key] for row in rows], "o-", label=f"{key} scaling")
    tasks.set(title=f"measured, {os.cpu_count()} cores", xlabel="ranks", xticks=numbers)
    tasks.set(ylabel="seconds", ylim=(0, None))
    tasks.legend(fontsize=8)
    many = [2**k for k in range(13)]
    for color, size in zip(("C0", "C1", "C2"), (1e7, 1e8, 1e9), strict=True):
        for solver, line in (("CG", "-"), ("PipelinedCG", "--")):
            times = [1e6 * step_seconds(machine, solver, size, p) for p in many]
            solvers.plot(many, times, line, color=color, label=f"{solver}, {size:.0e} entries")
        first = results["projection"]["solver_step_seconds"][f"{size:.0e}"]["crossover"]
        if first:
            at = 1e6 * step_seconds(machine, "CG", size, first)
            solvers.plot([first], [at], "k*", ms=9)
    solvers.set(title="projected: a step (stars: crossover)", xlabel="devices", ylabel="us")
    solvers.set(xscale="log", yscale="log")
    solvers.legend(fontsize=6)
    for params in (1e5, 1e6, 1e7, 1e8):
        shares = [task_efficiency(machine, params, 4096, p) for p in many]
        share.plot(many, shares, label=f"{params:.0e} parameters")
    share.set(title="projected: 4096 tasks", xlabel="devices", ylabel="share of time computing")
    share.set(xscale="log", ylim=(0, 1.02))
    share.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
