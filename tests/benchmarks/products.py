"""Time and memory of one product with its cross term, exact and by differences, and of `Reverse`.

    python -m tests.benchmarks.products [ROW ...] [--layers 4]

A network like GPT (4 layers, width 256, length 128, batch 8, float32, one thread), whose samples
have weights: the product of the Hessian of the loss with a vector like the params, and of the cross
derivative with respect to the weights; and the hypergradient of the weights through four steps of
SGD. "Blocks" has `hyperfunc.checkpoint` around each layer.
Each row runs in a process of its own. Its memory is the highest resident size less that before the
first computation, and the most that the new tensors of a later one hold; its time, of the CPU, is
the median of five.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import hyperfunc as hf
from examples.common import Meter
from hyperfunc._engine.finite_differences import DifferencedLinearization
from hyperfunc._torch import autodiff

WIDTH, LENGTH, BATCH, VOCABULARY, STEPS = 256, 128, 8, 1000, 4
ROWS = (
    "training gradient",
    *("finite_difference", "reverse", "reverse, blocks"),
    *("forward over reverse", "forward over reverse, blocks"),
    *("Reverse, 4 steps", "Reverse, 4 steps, blocks"),
)


class Network(nn.Module):
    """A causal transformer with its default attention."""

    def __init__(self, num_layers: int, blocks: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        keywords = {"src_mask": mask, "is_causal": True}
        x = self.embedding(tokens)
        for layer in self.layers.layers:

            def block(w: Any, x: Tensor, layer: nn.Module = layer) -> Any:
                return functional_call(layer, w, (x,), keywords)

            if self.blocks:
                x = hf.checkpoint(block)(dict(layer.named_parameters()), x)
            else:
                x = layer(x, **keywords)
        return self.head(x)


def build(row: str, num_layers: int = 4) -> Callable[[], Any]:
    """What a row computes."""
    torch.manual_seed(0)
    apply, params = hf.functional(Network(num_layers, "blocks" in row))
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    names, w = tuple(params), tuple(params.values())
    weights = torch.zeros(BATCH)
    u = tuple(torch.randn_like(leaf) for leaf in w)

    def loss_of(params: dict[str, Tensor], weights: Tensor) -> Tensor:
        logits = apply(params, tokens[:, :-1])
        losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return (weights.exp() * losses.mean(1)).mean()

    def loss(*leaves: Tensor) -> Tensor:
        return loss_of(dict(zip(names, leaves[:-1], strict=True)), leaves[-1])

    primals, groups = (*w, weights), (tuple(range(len(w) + 1)),)
    if row == "training gradient":
        leaves = [leaf.clone().requires_grad_() for leaf in w]
        return lambda: torch.autograd.grad(loss(*leaves, weights), leaves)
    if row == "finite_difference":
        made: list[Any] = []

        def product() -> Any:
            if not made:  # with the gradient at the point itself, which a solve takes once
                made.append(DifferencedLinearization(loss, primals, len(w), groups))
            return made[0].pull(u)

        return product
    if row.startswith("Reverse"):
        solver = hf.minimize(loss_of, hf.optim.sgd(lr=0.01), STEPS, init=lambda h: params)
        fn = hf.hypergrad(solver, loss_of, method=hf.Reverse())
        return lambda: fn(weights)
    if row.startswith("forward"):
        gradient = torch.func.grad(lambda primals: loss(*primals))
        tangents = (*u, torch.zeros(BATCH))
        return lambda: torch.func.jvp(gradient, (primals,), (tangents,))[1]
    return lambda: autodiff.Linearization(
        lambda *leaves: autodiff.gradient(
            lambda *w: loss(*w, leaves[-1]), leaves[:-1], create_graph=True
        ),
        primals,
        groups,
    ).pull(u)


def measure(row: str, num_layers: int) -> dict[str, float]:
    """Seconds and memory of one row, in this process."""
    torch.set_num_threads(1)
    compute = build(row, num_layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        begin = time.process_time()
        compute()
        times.append(time.process_time() - begin)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with Meter((0, 0)) as meter:
        compute()
    return {"s": sorted(times)[2], "MB": memory / 1000, "MB of tensors": meter.peak / 1e6}


def main() -> None:
    """Measure every row in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help="one row, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.rows[0], options.layers)))
        return
    print("| | s | MB | MB of tensors | of a training gradient |\n| --- | --- | --- | --- | --- |")
    first: dict[str, float] = {}
    for row in dict.fromkeys((ROWS[0], *(options.rows or ROWS))):
        command = [sys.executable, "-m", "tests.benchmarks.products", "--measure", row]
        command.append(f"--layers={options.layers}")
        result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        first = first or result
        ratios = ", ".join(f"{result[key] / first[key]:.2f}" for key in first)
        cells = (f"{result['s']:.2f}", *(f"{result[key]:.0f}" for key in list(first)[1:]), ratios)
        print("|", " | ".join((row, *cells)), "|", flush=True)


if __name__ == "__main__":
    main()
