"""Warm starts: an outer loop that carries the inner solution and the adjoint as its state.

Logistic regression on handwritten digits, with a regulariser for each pixel tuned on held-out
images. Successive outer steps change the hparams little, so the last params are a good start for
the inner solver and the last adjoint one for conjugate gradients: both are fields of
`hf.Solution`, and both go back in as arguments. The script runs the same outer loop from a cold
start, from each of the two and from both, and counts gradients and products.

    python examples/warm_start.py --out out/warm_start
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

# What each run carries: the params, the adjoint.
RUNS = {
    "cold": (False, False),
    "warm params": (True, False),
    "warm adjoint": (False, True),
    "warm params and adjoint": (True, True),
}
TOLERANCE = 1e-4  # of the inner gradient and of the linear solve, relative


class State(NamedTuple):
    """All that one outer step hands to the next: a tree of tensors, so torch.save stores it."""

    reg: Tensor
    optimizer: Any
    params: Tensor
    adjoint: Tensor


def inner_loss(W: Tensor, reg: Tensor, X: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The training loss; it does not depend on where the solver starts."""
    return F.cross_entropy(X @ W, y) + 0.5 * (reg.exp()[:, None] * W**2).sum()


class InnerSolver:
    """Accelerated gradient descent from `start`, which counts the gradients that it takes."""

    def __init__(self) -> None:
        self.gradients = 0

    def __call__(self, reg: Tensor, X: Tensor, y: Tensor, start: Tensor) -> Tensor:
        gradient = torch.func.grad(inner_loss)
        bound = 0.5 * torch.linalg.matrix_norm(X, 2).item() ** 2 / len(X)  # for cross-entropy
        weakest, strongest = reg.exp().min().item(), bound + reg.exp().max().item()
        momentum = (strongest**0.5 - weakest**0.5) / (strongest**0.5 + weakest**0.5)
        scale = gradient(torch.zeros_like(start), reg, X, y, start).norm()
        W = ahead = start
        for _ in range(10000):
            g = gradient(ahead, reg, X, y, start)
            self.gradients += 1
            if g.norm() <= TOLERANCE * scale:
                break
            previous, W = W, ahead - g / strongest
            ahead = W + momentum * (W - previous)
        return ahead


def load(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Training images and labels, then those held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    X = torch.tensor(images / 16, dtype=dtype)[order]
    y = torch.tensor(labels)[order]
    X = X - X.mean(0)
    return X[:600], y[:600], X[600:], y[600:]


def run(
    data: tuple[Tensor, ...], warm_params: bool, warm_adjoint: bool, steps: range | tqdm
) -> dict[str, list[float]]:
    X, y, X_val, y_val = data
    solver = InnerSolver()
    hypergrad = hf.hypergrad_and_solution(
        solver,
        lambda W, reg, *args: F.cross_entropy(X_val @ W, y_val),
        inner_loss=inner_loss,
        method=hf.CG(rtol=TOLERANCE),
    )
    optimizer = hf.optim.adam(lr=0.05)
    reg = torch.full((X.shape[1],), -4.0, dtype=X.dtype)
    zeros = torch.zeros(X.shape[1], 10, dtype=X.dtype)
    state = State(reg, optimizer.init(reg), params=zeros, adjoint=zeros)
    history: dict[str, list[float]] = {"gradients": [], "products": [], "value": []}
    products = 0
    for step in steps:
        adjoint_init = state.adjoint if warm_adjoint and step else None
        grads, solution = hypergrad(state.reg, X, y, state.params, adjoint_init=adjoint_init)
        reg, memory = optimizer.update(grads, state.optimizer, state.reg)
        params = solution.params if warm_params else zeros
        state = State(reg, memory, params, solution.adjoint)
        # a start other than zero costs the product that its residual needs
        products += int(solution.stats.num_steps) + (adjoint_init is not None)
        history["gradients"].append(solver.gradients)
        history["products"].append(products)
        history["value"].append(solution.value.item())
    return history


def draw(histories: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Cold against warm; what one warm start saves, it saves whether or not the other is used."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"gradients": "inner gradients", "products": "Hessian-vector products"}
    for axis, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        cold, warm = (histories[name][key] for name in ("cold", "warm params and adjoint"))
        steps = range(1, len(cold) + 1)
        axis.plot(steps, cold, color="#4c566a", label="from a cold start")
        axis.plot(steps, warm, color="#d1495b", label="from the last solution")
        axis.fill_between(steps, warm, cold, color="#d1495b", alpha=0.12, linewidth=0)
        axis.set(xlabel="outer step", title=f"{title}: {1 - warm[-1] / cold[-1]:.0%} saved")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="outer steps")
    parser.add_argument("--out", type=Path, default=Path("out/warm_start"), help="for the results")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; expected 1 or more")

    torch.set_num_threads(1)  # the matrices are small
    data = load()
    histories = {
        name: run(data, *warm, tqdm(range(args.steps), desc=name, unit="step"))
        for name, warm in RUNS.items()
    }
    cold = histories["cold"]
    rows = {}
    print(
        f"{'start':>24} {'gradients':>10} {'saved':>6} {'products':>10} {'saved':>6} {'value':>9}"
    )
    for name, history in histories.items():
        row = {"value": history["value"][-1]}
        for key in ("gradients", "products"):
            row[key] = history[key][-1]
            row[f"{key}_saved"] = 1 - row[key] / cold[key][-1]
        rows[name] = row
        print(
            f"{name:>24} {row['gradients']:>10} {row['gradients_saved']:>6.0%} "
            f"{row['products']:>10} {row['products_saved']:>6.0%} {row['value']:>9.6f}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"steps": args.steps, "tolerance": TOLERANCE, "runs": rows, "histories": histories}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(histories, args.out / "picture.png")
    print(f"numbers and picture are in {args.out}")
    return rows


if __name__ == "__main__":
    main()
