"""Warm starts: an outer loop that carries the inner solution and the adjoint as its state.

Logistic regression on handwritten digits, with a regulariser for each pixel tuned on held-out
images. Successive outer steps change the hparams little, so the last params are a good start for
the inner solver and the last adjoint one for conjugate gradients: both are fields of
`hf.Solution`, and both go back in as arguments. The script runs the same outer loop from a cold
start, from each of the two and from both, and counts gradients and products.

    python examples/warm_start.py --out out/warm_start
"""

from __future__ import annotations

from typing import Any, NamedTuple

import common
import torch
import torch.nn.functional as F
from datasets import Rows, centred_digits
from matplotlib.figure import Figure
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


History = dict[str, list[float]]


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


def run(data: list[Rows], warm_params: bool, warm_adjoint: bool, steps: tqdm) -> History:
    (X, y), (X_val, y_val) = data
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
    history: History = {"gradients": [], "products": [], "value": []}
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


def picture(histories: dict[str, History]) -> Figure:
    """Cold against warm; what one warm start saves, it saves whether or not the other is used."""
    figure, axes = common.panels(2, (10, 4))
    titles = {"gradients": "inner gradients", "products": "Hessian-vector products"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        cold, warm = (histories[name][key] for name in ("cold", "warm params and adjoint"))
        steps = range(1, len(cold) + 1)
        lines = {"from a cold start": cold, "from the last solution": warm}
        saved = f"{title}: {1 - warm[-1] / cold[-1]:.0%} saved"
        common.curves(axis, lines, x=steps, xlabel="outer step", title=saved)
        axis.fill_between(steps, warm, cold, color="C1", alpha=0.12, linewidth=0)
    return figure


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = common.options(argv, __doc__, "warm_start", steps=(60, "outer steps"))
    data = centred_digits(600, 1197)
    histories = {
        name: run(data, *warm, tqdm(range(args.steps), desc=name, unit="step"))
        for name, warm in RUNS.items()
    }
    cold, rows = histories["cold"], {}
    for name, history in histories.items():
        rows[name] = {}
        for key in ("gradients", "products"):
            rows[name][key] = history[key][-1]
            rows[name][f"{key} saved"] = 1 - history[key][-1] / cold[key][-1]
        rows[name]["value"] = history["value"][-1]
    formats = ("d", ".0%", "d", ".0%", ".6f")
    columns = dict(zip(rows["cold"], formats, strict=True))
    common.table("start", columns, {name: row.values() for name, row in rows.items()})
    common.save(args, picture(histories), runs=rows, histories=histories, tolerance=TOLERANCE)
    return rows


if __name__ == "__main__":
    common.run(main)
