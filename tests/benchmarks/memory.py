"""Peak memory and time of the iterative methods: ``make bench-memory``.

Hypergradients of a learning rate and of one L2 weight a layer, through momentum steps on an MLP.
Each row runs in a process of its own, on one thread. Its memory is the highest resident size of
that process, less the size before the first computation; its time is the processor time of one
hypergradient after a warm-up, and is compared with that of `ReverseUnroll` for as many steps.

Two rows are no methods: "gradients and products" takes every gradient and its transposed product
and does nothing with them, the least that any method needs; "nested torch.func.grad" is the same
computation as `ReverseUnroll`, written by hand with torch alone.

Prints a Markdown table, and writes it with the raw numbers to the output folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfunc as hf

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
UNROLL, NESTED, FLOOR = "ReverseUnroll()", "nested torch.func.grad", "gradients and products"
MOMENTUM = 0.9
Row = dict[str, Any]
Params = dict[str, Tensor]


def main() -> None:
    """Measure every row, or, with ``--row``, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 100, 1000, 4000])
    parser.add_argument("--out", type=Path, default=Path("out/bench-memory"))
    parser.add_argument("--row", nargs=2, metavar=("METHOD", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row[0], int(options.row[1]))))
        return
    rows: list[Row] = []
    print(*HEADER, sep="\n", flush=True)
    for steps in sorted({1, *options.steps}):
        for name in (*METHODS, FLOOR, NESTED):
            rows.append({"method": name, "steps": steps, **run(name, steps, rows)})
            print(markdown(rows[-1], rows), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "threads": 1, "rows": rows}
    (options.out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    table = [*HEADER, *(markdown(row, rows) for row in rows)]
    (options.out / "memory.md").write_text("\n".join(table) + "\n")
    print(f"\nWritten to {options.out / 'memory.md'} and {options.out / 'memory.json'}")


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
    command = [sys.executable, __file__, "--row", name, str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: Row = json.loads(output.splitlines()[-1])
    return result


def measure(name: str, steps: int) -> Row:
    """Memory and time of one hypergradient, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train = torch.randn(512, 784), torch.randint(10, (512,))
    val = torch.randn(512, 784), torch.randint(10, (512,))
    hparams = {"log_lr": torch.tensor(-3.0), "log_l2": torch.full((2,), -6.0)}
    compute = {FLOOR: gradients_and_products, NESTED: nested_grad}.get(name, library)
    idle = resident_sizes()["VmRSS"]
    compute(name, 1, hparams, train, val)
    start = time.process_time()
    gradient = compute(name, steps, hparams, train, val)
    seconds = time.process_time() - start
    return {
        "megabytes": resident_sizes()["VmHWM"] - idle,
        "seconds": seconds,
        "hypergradient": [entry for leaf in gradient for entry in leaf.reshape(-1).tolist()],
    }


def network(params: Params, x: Tensor) -> Tensor:
    hidden = torch.addmm(params["b1"], x, params["W1"]).relu()
    return torch.addmm(params["b2"], hidden, params["W2"])


def inner_loss(params: Params, hparams: Params, x: Tensor, y: Tensor) -> Tensor:
    l2 = hparams["log_l2"].exp()
    penalty = l2[0] * (params["W1"] ** 2).sum() + l2[1] * (params["W2"] ** 2).sum()
    return F.cross_entropy(network(params, x), y) + penalty


def outer_loss(params: Params, hparams: Params, x: Tensor, y: Tensor, *val: Tensor) -> Tensor:
    return F.cross_entropy(network(params, val[0]), val[1])


def init(hparams: Params, *args: Tensor) -> Params:
    generator = torch.Generator().manual_seed(1)
    return {
        "W1": torch.randn(784, 128, generator=generator) / 28,
        "b1": torch.zeros(128),
        "W2": torch.randn(128, 10, generator=generator) / 11,
        "b2": torch.zeros(10),
    }


def library(name: str, steps: int, hparams: Params, train: Any, val: Any) -> list[Tensor]:
    """The hypergradient by one of the methods."""
    optimizer = hf.optim.sgd(lambda h: h["log_lr"].exp(), momentum=MOMENTUM)

    def loss(params: Params, hparams: Params, x: Tensor, y: Tensor, *val: Tensor) -> Tensor:
        return inner_loss(params, hparams, x, y)

    solver = hf.minimize(loss, optimizer, steps, init=init)
    gradient = hf.hypergrad(solver, outer_loss, method=METHODS[name])(hparams, *train, *val)
    return [gradient["log_lr"], gradient["log_l2"]]


def nested_grad(name: str, steps: int, hparams: Params, train: Any, val: Any) -> list[Tensor]:
    """The hypergradient by `torch.func.grad` of a loop around `torch.func.grad`."""

    def objective(h: Params) -> Tensor:
        params = init(h)
        buffer = {key: torch.zeros_like(leaf) for key, leaf in params.items()}
        for _ in range(steps):
            grads = torch.func.grad(inner_loss)(params, h, *train)
            buffer = {key: MOMENTUM * buffer[key] + grads[key] for key in grads}
            params = {key: params[key] - h["log_lr"].exp() * buffer[key] for key in grads}
        return outer_loss(params, h, *train, *val)

    gradient = torch.func.grad(objective)(hparams)
    return [gradient["log_lr"], gradient["log_l2"]]


def gradients_and_products(
    name: str, steps: int, hparams: Params, train: Any, val: Any
) -> list[Tensor]:
    """As many gradients, and transposed products with their derivative, as the others take."""
    params = {key: leaf.requires_grad_() for key, leaf in init(hparams).items()}
    l2 = hparams["log_l2"].clone().requires_grad_()
    inputs = [*params.values(), l2]
    for _ in range(steps):
        loss = inner_loss(params, {"log_l2": l2}, *train)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        torch.autograd.grad(grads, inputs, [leaf.detach() for leaf in grads])
    return []


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
