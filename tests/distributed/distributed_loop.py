"""An outer loop that saves its state at each step, for torchrun to start, to kill, and to resume.

Tuning a regulariser for each feature of ridge regression, with DTensors as hyperparameters, the
adjoint as warm start, an optimiser with state, and noise drawn at each step. A rank ends itself by
a signal at the moments that the option ``--kill`` lists: before a step, or while it saves. It notes
each in a file, so that the process that takes its place does not do it again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hyperfunc as hf

try:
    from torch.distributed.tensor import Shard, distribute_tensor
except ImportError:  # where they lived up to torch 2.4
    from torch.distributed._tensor import Shard, distribute_tensor

F64 = torch.float64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kill", nargs="*", default=[], help="rank:step:before|saving")
    parser.add_argument("--background", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((20, 7), (20,)))

    columns = distribute_tensor(x, mesh, [Shard(1)])

    def ridge_loss(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (reg.exp() * w**2).sum()

    def step(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return w - 0.3 * torch.func.grad(ridge_loss)(w, reg, x, y)

    fn = hf.hypergrad_and_solution(
        hf.iterate(step, 5, init=lambda reg, x, y: torch.zeros_like(reg)),
        lambda w, reg, x, y: (w**2).sum(),
        inner_loss=ridge_loss,
        method=hf.CG(rtol=1e-6),
    )
    optimizer = hf.optim.adam(lr=0.1)
    reg = distribute_tensor(torch.zeros(7, dtype=F64), mesh, [Shard(0)])
    state: dict[str, Any] = {
        "hparams": reg,
        "adjoint": torch.zeros_like(reg),
        "optimizer": optimizer.init(reg),
        "rng": torch.Generator().manual_seed(1).get_state(),
        "seen": 0,
    }
    loaded = hf.distributed.load_state(state, args.folder)
    state, first = loaded or (state, 0)
    future, saving = None, KilledWhileSaving(args)
    for number in range(first, args.steps):
        kill(args, number, "before")
        draws = torch.Generator()
        draws.set_state(state["rng"])
        noisy = y + 0.1 * torch.randn(20, generator=draws, dtype=F64)
        target = distribute_tensor(noisy, mesh)
        grads, solution = fn(state["hparams"], columns, target, adjoint_init=state["adjoint"])
        hparams, moments = optimizer.update(grads, state["optimizer"], state["hparams"], None)
        state = {
            "hparams": hparams,
            "adjoint": solution.adjoint,
            "optimizer": moments,
            "rng": draws.get_state(),
            "seen": state["seen"] + 20,
        }
        if future is not None:
            future.result()
        saving.next(number)
        future = hf.distributed.save_state(
            state, args.folder, number + 1, background=args.background, group=group
        )
    assert future is not None
    future.result()
    result = [*state["hparams"].full_tensor().tolist(), state["seen"]]
    if dist.get_rank() == 0:
        (args.folder / "result").write_text(repr(result))
    dist.destroy_process_group()


def kill(args: argparse.Namespace, number: int, moment: str) -> None:
    mark = f"{dist.get_rank()}:{number}:{moment}"
    if mark in args.kill and not (args.folder / mark).exists():
        (args.folder / mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


class KilledWhileSaving:
    """Makes the rank end itself when it has written its part, before the others know that."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._gather = args, dist.all_gather_object
        self.number = self.calls = 0
        dist.all_gather_object = self

    def next(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, *args: Any, **keywords: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # first the ranks tell what they are to write
            kill(self._args, self.number, "saving")
        self._gather(*args, **keywords)


if __name__ == "__main__":
    main()
