"""Ten million hyperparameters over several processes: a regulariser for each feature.

Many small regressions, each with fewer samples than features, and few features that matter. Each
feature j of each regression has a regulariser of its own, exp(r_j):

    w*(r) = argmin_w  1/2 sum_i (x_i . w - y_i)^2 + 1/2 sum_j exp(r_j) w_j^2

The regularisers minimise the squared error on validation samples, starting from the best common
one, by Adam on hypergradients. Parameters, regularisers and data are DTensors, sharded by
regressions: each process holds its part of them, and all hypergradients are one implicit solve by
CG. That is the only place where processes talk: two sums of a few numbers in each step of CG.

    python examples/sharded_hyperparameters.py                         # on one process, then on two
    python examples/sharded_hyperparameters.py --ranks 1 2 4
    torchrun --nproc-per-node 8 examples/sharded_hyperparameters.py    # on the ranks of torchrun

Reference: Pedregosa, Hyperparameter optimization with approximate gradient, 2016, arXiv 1602.02355.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
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

try:
    from torch.distributed.tensor import DTensor, Shard
except ImportError:  # where they lived up to torch 2.4
    from torch.distributed._tensor import DTensor, Shard

FEATURES, MATTER, SAMPLES = 32, 4, 16  # of a regression; samples for each of training and so on
BLOCKS = 64  # the data are drawn in so many parts, the same on any number of processes
Data = dict[str, tuple[Tensor, Tensor]]


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if dist.is_torchelastic_launched():
        run(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    options = sys.argv[1:] if argv is None else argv
    for ranks in args.ranks:
        print(f"{ranks} process{'es' if ranks > 1 else ''}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*launch, f"--nproc-per-node={ranks}", __file__, *options], check=True)
    report(args)


def report(args: argparse.Namespace) -> None:
    """Print and draw what the runs have noted."""
    rows = [json.loads((args.out / f"ranks{n}.json").read_text()) for n in args.ranks]
    print(f"\n{rows[0]['features']:,} features, each with its own regulariser; squared errors")
    print("ranks  seconds/step  GB/rank  CG steps  common: test  one each: validation      test")
    for row in rows:
        print(
            f"{row['ranks']:5d}{row['seconds']:14.2f}{row['gigabytes']:9.2f}{row['cg_steps']:10.1f}"
            f"{row['common']['test']:14.4f}{row['own']['val']:22.4f}{row['own']['test']:10.4f}"
        )
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture(args.out / "picture.png", rows)


def run(args: argparse.Namespace) -> None:
    """What each process does: its share of the regressions, in step with the others."""
    torch.set_num_threads(1)
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BLOCKS % ranks:
        raise SystemExit(f"the number of processes is {ranks}; expected a divisor of {BLOCKS}")
    mesh = init_device_mesh("cpu", (ranks,))
    rows = max(1, round(args.features / FEATURES / BLOCKS))  # regressions in a block
    mine = range(rank * BLOCKS // ranks, (rank + 1) * BLOCKS // ranks)
    data, test = draw(mine, rows, args.seed)

    def shard(local: Tensor) -> Any:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    def error(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (((x @ w.unsqueeze(-1)).squeeze(-1) - y) ** 2).sum()

    def inner_loss(w: Tensor, reg: Tensor, data: Data) -> Tensor:
        return 0.5 * error(w, *data["train"]) + 0.5 * (reg.exp() * w**2).sum()

    def outer_loss(w: Tensor, reg: Tensor, data: Data) -> Tensor:
        return error(w, *data["val"])

    # Any code will do as inner solver: here ridge regression in the dimension of the samples.
    def solve(reg: Any, data: Any) -> Any:
        return shard(ridge(reg.to_local(), *(leaf.to_local() for leaf in data["train"])))

    def hypergradient(reg: Any, data: Any, adjoint: Any) -> Any:
        diagonal = reg.exp() + SAMPLES  # of the Hessian, on average over the data
        method = hf.CG(rtol=args.rtol, preconditioner=lambda v: v / diagonal)
        fit = hf.hypergrad_and_solution(solve, outer_loss, inner_loss=inner_loss, method=method)
        return fit(reg, data, adjoint_init=adjoint)

    def mean_errors(reg: Any) -> dict[str, float]:
        w = ridge(reg.to_local(), *data["train"])
        sums = torch.stack([error(w, *data["val"]), error(w, *test)]).double()
        dist.all_reduce(sums)
        return dict(zip(("val", "test"), (sums / (BLOCKS * rows * SAMPLES)).tolist(), strict=True))

    def constant(value: float) -> Any:
        return shard(torch.full((len(mine) * rows, FEATURES), value))

    common = {value: mean_errors(constant(value)) for value in (-1.0, 0.0, 1.0, 2.0, 3.0)}
    best = min(common, key=lambda value: common[value]["val"])
    reg, adjoint = constant(best), None
    optimizer = hf.optim.adam(lr=args.outer_lr)
    state = optimizer.init(reg)
    sharded = {name: tuple(map(shard, pair)) for name, pair in data.items()}
    curve, steps, start = [], [], time.perf_counter()
    bar = tqdm(range(args.iterations), unit="it", disable=rank > 0)
    for _ in bar:
        grads, solution = hypergradient(reg, sharded, adjoint)
        adjoint = solution.adjoint
        reg, state = optimizer.update(grads, state, reg, None)
        curve.append(solution.value.to_local().item() / (BLOCKS * rows * SAMPLES))
        steps.append(int(solution.stats.num_steps))
        bar.set_postfix(val=curve[-1], cg_steps=steps[-1])
    seconds = (time.perf_counter() - start) / args.iterations
    memory = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    own = mean_errors(reg)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        numbers = {
            "ranks": ranks,
            "features": BLOCKS * rows * FEATURES,
            "seconds": seconds,
            "gigabytes": memory.item(),
            "cg_steps": sum(steps) / len(steps),
            "common": common[best],
            "own": own,
            "curve": curve,
        }
        (args.out / f"ranks{ranks}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    dist.destroy_process_group()


def ridge(reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The minimisers of the inner loss, a part of the regressions at a time."""
    solutions = []
    for r, a, b in zip(reg.split(4096), x.split(4096), y.split(4096), strict=True):
        scaled = a / r.exp().unsqueeze(1)
        system = scaled @ a.mT + torch.eye(a.shape[1])
        dual = torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(system))
        solutions.append((scaled.mT @ dual).squeeze(-1))
    return torch.cat(solutions)


def draw(blocks: range, rows: int, seed: int) -> tuple[Data, tuple[Tensor, Tensor]]:
    """The samples for training, validation and test of some blocks of regressions."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
    for block in blocks:
        generator = torch.Generator().manual_seed(1000 * seed + block)
        w = torch.randn(rows, FEATURES, generator=generator)
        ranking = torch.rand(rows, FEATURES, generator=generator).argsort(1)
        w = torch.where(ranking < MATTER, w, 0.0)
        for pairs in parts.values():
            x = torch.randn(rows, SAMPLES, FEATURES, generator=generator)
            noise = 0.5 * torch.randn(rows, SAMPLES, generator=generator)
            pairs.append((x, (x @ w.unsqueeze(-1)).squeeze(-1) + noise))
    train, val, test = (
        tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        for pairs in parts.values()
    )
    return {"train": train, "val": val}, test


def picture(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, (seconds, memory, curve) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    ranks = [row["ranks"] for row in rows]
    for axis, key, title in (
        (seconds, "seconds", "seconds for an outer step"),
        (memory, "gigabytes", "peak memory of a rank, GB"),
    ):
        axis.plot(ranks, [row[key] for row in rows], "o-", label="measured")
        ideal = [rows[0][key] * ranks[0] / n for n in ranks]
        axis.plot(ranks, ideal, "k:", label="in proportion")
        axis.set(title=title, xlabel="ranks", xticks=ranks, ylim=(0, None))
        axis.legend()
    for row in rows:
        curve.plot(row["curve"], label=f"one each, {row['ranks']} ranks")
    curve.axhline(rows[0]["common"]["val"], color="black", ls="--", label="best common one")
    curve.set(title="validation error", xlabel="outer step")
    curve.legend()
    cores = os.cpu_count()
    figure.suptitle(f"{rows[0]['features']:,} hyperparameters, {cores} cores", fontsize=10)
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Learn ten million regularisers over several processes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--features", type=int, default=10_485_760, help="of all regressions, and regularisers")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes to run on")
    add("--iterations", type=int, default=12, help="outer steps")
    add("--outer-lr", type=float, default=0.3, help="of Adam on the regularisers")
    add("--rtol", type=float, default=0.1, help="relative tolerance of CG")
    add("--seed", type=int, default=0, help="of the data")
    add("--out", type=Path, default=Path("out/sharded_hyperparameters"), help="folder for results")
    return parser


if __name__ == "__main__":
    main()
