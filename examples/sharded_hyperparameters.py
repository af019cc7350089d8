"""Ten million hyperparameters over several processes: a regulariser for each feature.

Many small regressions, each with fewer samples than features, and few features that matter. Each
feature j of each regression has its own regulariser exp(r_j), chosen on validation samples:

    w*(r) = argmin_w  1/2 sum_i (x_i . w - y_i)^2 + 1/2 sum_j exp(r_j) w_j^2

Parameters, regularisers and data are DTensors, sharded by regressions: each process holds its part,
and all hypergradients are one implicit solve by CG. Processes talk in two places: sums of a few
numbers, twice in each step of CG, and for the value of the outer loss.

    python examples/sharded_hyperparameters.py                         # on 1, 2 and 4 processes
    torchrun --nproc-per-node 8 examples/sharded_hyperparameters.py    # on the ranks of torchrun

Reference: Pedregosa, Hyperparameter optimization with approximate gradient, 2016, arXiv 1602.02355.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import hyperfunc as hf

FEATURES, MATTER, SAMPLES = 16, 2, 8  # of a regression; samples for each of training and so on
BLOCKS = 64  # the data are drawn in so many parts, the same on any number of processes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--features", type=int, default=10_485_760, help="of all regressions, and regularisers")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to run on")
    add("--iterations", type=int, default=4, help="outer steps")
    add("--out", type=Path, default=Path("out/sharded_hyperparameters"), help="folder for results")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if dist.is_torchelastic_launched():
        return run(args)
    options = sys.argv[1:] if argv is None else argv
    for ranks in args.ranks:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*launch, f"--nproc-per-node={ranks}", __file__, *options], check=True)
    rows = [json.loads((args.out / f"ranks{n}.json").read_text()) for n in args.ranks]
    print(f"\n{rows[0]['features']:,} features, each with its own regulariser; squared errors")
    print("ranks  seconds/step  GB/rank  CG steps  common: test  one each: validation      test")
    for row in rows:
        print(
            f"{row['ranks']:5d}{row['seconds']:14.2f}{row['gigabytes']:9.2f}{row['cg_steps']:10.1f}"
            f"{row['common'][1]:14.4f}{row['own'][0]:22.4f}{row['own'][1]:10.4f}"
        )
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture(args.out / "picture.png", rows)


def run(args):
    """What each process does: its share of the regressions, in step with the others."""
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BLOCKS % ranks:
        raise SystemExit(f"the number of processes is {ranks}; expected a divisor of {BLOCKS}")
    mesh = init_device_mesh("cpu", (ranks,))
    rows = max(1, round(args.features / FEATURES / BLOCKS))  # regressions in a block
    mine = range(rank, BLOCKS, ranks)
    train, val, test = draw(mine, rows)

    def shard(local):
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    def error(w, x, y):
        return (((x @ w.unsqueeze(-1)).squeeze(-1) - y) ** 2).sum()

    def inner_loss(w, reg, train, val):
        return 0.5 * error(w, *train) + 0.5 * (reg.exp() * w**2).sum()

    def outer_loss(w, reg, train, val):
        return error(w, *val)

    def solve(reg, *_):  # any code will do as inner solver
        return shard(ridge(reg.to_local(), *train))

    def mean_errors(reg):
        w = ridge(reg.to_local(), *train)
        sums = torch.stack([error(w, *val), error(w, *test)]).double()
        dist.all_reduce(sums)
        return (sums / (BLOCKS * rows * SAMPLES)).tolist()

    shape = (len(mine) * rows, FEATURES)
    constants = [shard(torch.full(shape, value)) for value in (0.0, 1.0, 2.0)]
    reg = min(constants, key=lambda constant: mean_errors(constant)[0])
    common, adjoint, curve, steps = mean_errors(reg), None, [], []
    optimizer = hf.optim.adam(lr=0.8)
    state, data = optimizer.init(reg), [tuple(map(shard, pair)) for pair in (train, val)]
    start = time.perf_counter()
    bar = tqdm(range(args.iterations), unit="it", desc=f"{ranks} ranks", disable=rank > 0)
    for _ in bar:
        diagonal = reg.exp() + SAMPLES  # of the Hessian, on average over the data
        method = hf.CG(rtol=0.1, preconditioner=lambda v, diagonal=diagonal: v / diagonal)
        fit = hf.hypergrad_and_solution(solve, outer_loss, inner_loss=inner_loss, method=method)
        grads, solution = fit(reg, *data, adjoint_init=adjoint)
        reg, state = optimizer.update(grads, state, reg, None)
        adjoint = solution.adjoint
        curve.append(solution.value.to_local().item() / (BLOCKS * rows * SAMPLES))
        steps.append(int(solution.stats.num_steps))
        bar.set_postfix(val=curve[-1], cg_steps=steps[-1])
    seconds = (time.perf_counter() - start) / args.iterations
    memory = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20])
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    numbers = {"ranks": ranks, "features": reg.numel(), "common": common, "own": mean_errors(reg)}
    numbers |= {"seconds": seconds, "gigabytes": memory.item(), "curve": curve}
    numbers |= {"cg_steps": sum(steps) / len(steps)}
    if rank == 0:
        (args.out / f"ranks{ranks}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    dist.destroy_process_group()


def ridge(reg, x, y):
    """The minimisers of the inner loss, by systems in the dimension of the samples."""
    scaled = x / reg.exp().unsqueeze(1)
    dual = torch.linalg.solve(scaled @ x.mT + torch.eye(SAMPLES), y.unsqueeze(-1))
    return (scaled.mT @ dual).squeeze(-1)


def draw(blocks, rows):
    """The samples (x, y) for training, validation and test of some blocks of regressions."""
    parts = [[], [], []]
    for block in blocks:
        generator = torch.Generator().manual_seed(block)
        w = torch.randn(rows, FEATURES, generator=generator)
        w = w * (torch.rand(rows, FEATURES, generator=generator).argsort(1) < MATTER)
        for pairs in parts:
            x = torch.randn(rows, SAMPLES, FEATURES, generator=generator)
            noise = 0.5 * torch.randn(rows, SAMPLES, generator=generator)
            pairs.append((x, (x @ w.unsqueeze(-1)).squeeze(-1) + noise))
    return [tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in parts]


def picture(path, rows):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    ranks = [row["ranks"] for row in rows]
    for axis, key in zip(axes, ("seconds", "gigabytes"), strict=True):
        axis.plot(ranks, [row[key] for row in rows], "o-", label="measured")
        axis.plot(ranks, [rows[0][key] * ranks[0] / n for n in ranks], "k:", label="in proportion")
        axis.set(xlabel="ranks", xticks=ranks, ylim=(0, None))
        axis.legend()
    axes[0].set_title("seconds for an outer step")
    axes[1].set_title("peak memory of a rank, GB")
    figure.suptitle(f"{rows[0]['features']:,} hyperparameters, {os.cpu_count()} cores", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
