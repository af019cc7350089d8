"""Time and memory of one product with its cross term, exact and by differences.

    python -m tests.benchmarks.products

A network like GPT (4 layers, width 256, length 128, batch 8, float32, two threads), whose samples
have weights: the product of the Hessian of the loss with a vector like the params, and of the cross
derivative with respect to the weights. Each row runs in a process of its own. Its memory is the
highest resident size less that before the first computation; its time the median of five.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hyperfunc as hf
from hyperfunc._engine.finite_differences import DifferencedLinearization
from hyperfunc._torch import autodiff

LAYERS, WIDTH, LENGTH, BATCH, VOCABULARY = 4, 256, 128, 8, 1000
ROWS = ("training gradient", "reverse", "finite_difference")


class Network(nn.Module):
    """A causal transformer with its default attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))


def build(row: str) -> Callable[[], Any]:
    """What a row computes."""
    torch.manual_seed(0)
    apply, params = hf.functional(Network())
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    names, w = tuple(params), tuple(params.values())
    weights = torch.zeros(BATCH)
    u = tuple(torch.randn_like(leaf) for leaf in w)

    def loss(*leaves: Tensor) -> Tensor:
        logits = apply(dict(zip(names, leaves[:-1], strict=True)), tokens[:, :-1])
        losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return (leaves[-1].exp() * losses.mean(1)).mean()

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
    return lambda: autodiff.Linearization(
        lambda *leaves: autodiff.gradient(
            lambda *w: loss(*w, leaves[-1]), leaves[:-1], create_graph=True
        ),
        primals,
        groups,
    ).pull(u)


def measure(row: str) -> dict[str, float]:
    """Seconds and MB of one row, in this process."""
    torch.set_num_threads(2)
    compute = build(row)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        compute()
        times.append(time.perf_counter() - begin)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": sorted(times)[2], "MB": memory / 1000}


def main() -> None:
    """Measure every row in a process of its own, and print a table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print("| | s | MB | of a training gradient |\n| --- | --- | --- | --- |")
    first: dict[str, float] = {}
    for row in ROWS:
        command = [sys.executable, "-m", "tests.benchmarks.products", row]
        result = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        first = first or result
        ratios = ", ".join(f"{result[key] / first[key]:.2f}" for key in ("seconds", "MB"))
        print(f"| {row} | {result['seconds']:.2f} | {result['MB']:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
