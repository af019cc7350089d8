"""Stochastic bilevel loops beside full-batch AID: suboptimality against oracle calls.

Three problems: least squares, whose value function has a closed form; logistic regression on
handwritten digits with a regulariser for each pixel; and hyper-cleaning, where 40 % of the training
labels are wrong and each sample has a weight. An oracle call is one gradient, Hessian-vector
product or cross product of the loss of one sample. What is plotted is ``f(hparams) - min f`` for
the value function ``f``, with the inner problem solved exactly.

    python examples/stochastic_bilevel.py --out out/stochastic_bilevel
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf
from hyperfunc.bilevel import power_decay

BATCH = 40
T, Q = 10, 10  # inner steps and adjoint steps of the double loops
FULL_STEPS, FULL_PRODUCTS = 10, 10  # inner steps and products of full-batch AID
CHECKPOINTS = 16
COLORS = {
    "soba": "#e09f3e",
    "saba": "#d1495b",
    "stocbio": "#8fb996",
    "amigo": "#2a6f97",
    "full-batch AID": "#4c566a",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Losses that are means over samples; data are tuples of tensors with a sample dimension."""

    title: str
    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    inner_data: tuple[Tensor, ...]
    outer_data: tuple[Tensor, ...]
    params: Tensor
    hparams: Tensor
    solve: Callable[[Tensor], Tensor]
    inner_lr: float
    outer_lr: dict[str, float]  # the best of a grid for each method
    passes: int  # oracle calls in multiples of the number of samples

    def value(self, hparams: Tensor) -> float:
        return self.outer_loss(self.solve(hparams), hparams, *self.outer_data).item()

    @property
    def num_samples(self) -> int:
        return len(self.inner_data[0])

    @property
    def budget(self) -> int:
        return self.passes * self.num_samples


# --- The problems -----------------------------------------------------------------------------


def least_squares() -> tuple[Problem, float]:
    """The hparams shift the targets; the value function is a quadratic, minimised exactly."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, dim, hdim = 1000, 20, 10
    scales = torch.linspace(1, 0.5, dim, dtype=torch.float64)
    X, Z, X_val = scales * randn(n, dim), randn(n, hdim), scales * randn(n, dim)
    Z = Z + X[:, :hdim]
    y, y_val = randn(n), X_val @ randn(dim) + randn(n)

    def inner_loss(w: Tensor, h: Tensor, X: Tensor, Z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - Z @ h - y) ** 2).mean() + 0.1 * (w**2).sum()

    def outer_loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).mean() + 0.05 * (h**2).sum()

    A = X.T @ X / n + 0.2 * torch.eye(dim, dtype=torch.float64)
    G, offset = torch.linalg.solve(A, X.T @ Z / n), torch.linalg.solve(A, X.T @ y / n)
    C = X_val.T @ X_val / n
    hessian = G.T @ C @ G + 0.1 * torch.eye(hdim, dtype=torch.float64)
    best = torch.linalg.solve(hessian, G.T @ (X_val.T @ y_val / n - C @ offset))

    problem = Problem(
        title="least squares",
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        inner_data=(X, Z, y),
        outer_data=(X_val, y_val),
        params=torch.zeros(dim, dtype=torch.float64),
        hparams=torch.zeros(hdim, dtype=torch.float64),
        solve=lambda h: G @ h + offset,
        inner_lr=0.2,
        outer_lr={"soba": 0.05, "saba": 0.1, "stocbio": 0.05, "amigo": 0.05, "full-batch AID": 1.6},
        passes=400,
    )
    return problem, problem.value(best)


def digits(noise: float) -> tuple[Tensor, ...]:
    """Training images, their labels (some of them wrong), validation images and labels."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[:1600]
    X, y = torch.tensor(images / 16)[order], torch.tensor(labels)[order]
    X = X - X.mean(0)
    noisy = y[:800].clone()
    wrong = torch.rand(800, generator=generator) < noise
    noisy[wrong] = (noisy + torch.randint(1, 10, (800,), generator=generator))[wrong] % 10
    return X[:800], noisy, X[800:], y[800:]


def regularisation() -> tuple[Problem, float]:
    X, y, X_val, y_val = digits(noise=0.1)

    def inner_loss(W: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(X @ W, y) + 0.5 * (reg.exp()[:, None] * W**2).sum()

    def outer_loss(W: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        # the second term keeps the regularisers of useless pixels from growing without end
        return F.cross_entropy(X @ W, y) + 1e-3 * ((reg + 4) ** 2).sum()

    return with_reference(
        Problem(
            title="regularisation of logistic regression",
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_data=(X, y),
            outer_data=(X_val, y_val),
            params=torch.zeros(64, 10, dtype=X.dtype),
            hparams=torch.full((64,), -4.0, dtype=X.dtype),
            solve=Minimizer(inner_loss, (X, y)),
            inner_lr=0.5,
            outer_lr={"soba": 40, "saba": 40, "stocbio": 40, "amigo": 40, "full-batch AID": 160},
            passes=400,
        )
    )


def cleaning() -> tuple[Problem, float]:
    X, y, X_val, y_val = digits(noise=0.4)

    def inner_loss(W: Tensor, weights: Tensor, X: Tensor, y: Tensor, i: Tensor) -> Tensor:
        losses = F.cross_entropy(X @ W, y, reduction="none")
        return (weights[i].sigmoid() * losses).mean() + 2e-3 * (W**2).sum()

    def outer_loss(W: Tensor, weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(X @ W, y) + 1e-5 * (weights**2).sum()

    data = X, y, torch.arange(len(y))
    return with_reference(
        Problem(
            title="hyper-cleaning of labels",
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_data=data,
            outer_data=(X_val, y_val),
            params=torch.zeros(64, 10, dtype=X.dtype),
            hparams=torch.zeros(len(y), dtype=X.dtype),
            solve=Minimizer(inner_loss, data),
            inner_lr=0.5,
            outer_lr={
                "soba": 800,
                "saba": 200,
                "stocbio": 400,
                "amigo": 200,
                "full-batch AID": 3200,
            },
            passes=400,
        )
    )


class Minimizer:
    """The inner problem solved by L-BFGS on all data, each time from the last solution."""

    def __init__(self, inner_loss: Callable[..., Tensor], data: tuple[Tensor, ...]) -> None:
        self.inner_loss, self.data = inner_loss, data
        self.last = torch.zeros(64, 10, dtype=data[0].dtype)

    def __call__(self, hparams: Tensor, *args: Any) -> Tensor:
        W = self.last.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [W],
            max_iter=200,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss = self.inner_loss(W, hparams, *self.data)
            (W.grad,) = torch.autograd.grad(loss, W)
            return loss

        optimizer.step(closure)
        self.last = W.detach()
        return self.last


def with_reference(problem: Problem) -> tuple[Problem, float]:
    """The least value that L-BFGS finds with converged hypergradients."""
    hypergrad = hf.hypergrad_and_value(
        lambda hparams, *args: problem.solve(hparams),
        lambda W, hparams, *args: problem.outer_loss(W, hparams, *problem.outer_data),
        inner_loss=problem.inner_loss,
        method=hf.CG(rtol=1e-6),
    )
    hparams = problem.hparams.clone()
    optimizer = torch.optim.LBFGS([hparams], max_iter=60, line_search_fn="strong_wolfe")
    values = []

    def closure() -> Tensor:
        hparams.grad, value = hypergrad(hparams.detach(), *problem.inner_data)
        values.append(value.item())
        return value

    optimizer.step(closure)
    return problem, min(values)


# --- The methods: each yields (oracle calls so far, hparams) ------------------------------------


def run_loop(name: str, problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """A loop of `hyperfunc.bilevel`, on a fixed split of the data into batches."""
    options: dict[str, Any] = {"inner_lr": problem.inner_lr, "outer_lr": problem.outer_lr[name]}
    blocks = torch.arange(problem.num_samples).reshape(-1, BATCH)
    double = name in ("stocbio", "amigo")
    if name == "soba":
        options = {
            "inner_lr": power_decay(options["inner_lr"], 0.2),
            "outer_lr": power_decay(options["outer_lr"], 0.3),
        }
    if name == "saba":
        options |= {"num_inner_batches": len(blocks), "num_outer_batches": len(blocks)}
    if double:
        options |= {"num_inner_steps": T, "num_adjoint_steps": Q}
    loop = getattr(hf.bilevel, name)(problem.inner_loss, problem.outer_loss, **options)
    calls_per_step = BATCH * ((T + Q + 1 if double else 3) + 1)
    generator = torch.Generator().manual_seed(0)
    state, calls = loop.init(problem.params, problem.hparams), 0
    while True:
        yield calls, state.hparams
        i = torch.randint(len(blocks), (T + Q + 1,), generator=generator)
        j = torch.randint(len(blocks), (), generator=generator)
        inner = tuple(t[blocks[i if double else i[0]]] for t in problem.inner_data)
        outer = tuple(t[blocks[j]] for t in problem.outer_data)
        indices = (i[0], j) if name == "saba" else ()
        state = loop.update(state, inner, outer, *indices)
        calls += calls_per_step


def run_full_batch(problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """AID on all data with warm starts: some inner steps, conjugate gradients, an outer step."""
    step = hf.optim.sgd(lr=problem.inner_lr, momentum=0.9, nesterov=True)
    n = problem.num_samples

    def inner_solver(hparams: Tensor, start: Tensor, *data: Tensor) -> Tensor:
        params, memory = start, step.init(start)
        for _ in range(FULL_STEPS):
            grads = torch.func.grad(problem.inner_loss)(params, hparams, *data)
            params, memory = step.update(grads, memory, params)
        return params

    hypergrad = hf.hypergrad_and_solution(
        inner_solver,
        lambda params, hparams, *args: problem.outer_loss(params, hparams, *problem.outer_data),
        inner_loss=lambda params, hparams, start, *data: problem.inner_loss(params, hparams, *data),
        method=hf.CG(maxiter=FULL_PRODUCTS, rtol=1e-8),
    )
    params, hparams, adjoint, calls = problem.params, problem.hparams, None, 0
    while True:
        yield calls, hparams
        grads, solution = hypergrad(hparams, params, *problem.inner_data, adjoint_init=adjoint)
        hparams = hparams - problem.outer_lr["full-batch AID"] * grads
        params, warm = solution.params, adjoint is not None
        adjoint = solution.adjoint
        # steps, products, the residual at a warm start, the cross product, the outer gradient
        calls += n * (FULL_STEPS + int(solution.stats.num_steps) + warm + 1 + 1)


def measure(
    name: str, problem: Problem, best: float, scale: float
) -> tuple[list[int], list[float]]:
    """Suboptimality at oracle calls that grow geometrically."""
    iterates = run_full_batch(problem) if name == "full-batch AID" else run_loop(name, problem)
    budget = int(scale * problem.budget)
    marks = [budget * 200 ** (k / (CHECKPOINTS - 1) - 1) for k in range(CHECKPOINTS)]
    counts, gaps = [], []
    with tqdm(total=budget, desc=f"{problem.title}: {name}", unit="call", unit_scale=True) as bar:
        for calls, hparams in iterates:
            bar.update(min(calls, budget) - bar.n)
            if calls >= (marks[0] if counts else 0):
                counts.append(max(calls, 1))
                gaps.append(problem.value(hparams) - best)
                marks = [mark for mark in marks if mark > calls]
            if not marks:
                return counts, gaps
    raise AssertionError("a method never ends by itself")


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, (title, runs) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for name, run in runs.items():
            floor = [max(gap, 1e-12) for gap in run["suboptimality"][1:]]
            axis.loglog(run["calls"][1:], floor, "o-", ms=3, color=COLORS[name], label=name)
        axis.set(title=title, xlabel="oracle calls (samples)")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("f(hparams) - min f")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of oracle calls")
    parser.add_argument(
        "--out", type=Path, default=Path("out/stochastic_bilevel"), help="for the results"
    )
    args = parser.parse_args(argv)
    if not (args.scale > 0 and math.isfinite(args.scale)):
        parser.error(f"--scale is {args.scale}; expected a positive number")

    torch.set_num_threads(1)  # the matrices are small
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    for make in (least_squares, regularisation, cleaning):
        problem, best = make()
        runs = {}
        for name in COLORS:
            calls, gaps = measure(name, problem, best, args.scale)
            runs[name] = {"calls": calls, "suboptimality": gaps}
        results[problem.title] = runs
    print(f"{'f - min f at the end':<40}" + "".join(f"{name:>16}" for name in COLORS))
    for title, runs in results.items():
        ends = "".join(f"{run['suboptimality'][-1]:>16.2e}" for run in runs.values())
        print(f"{title:<40}{ends}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, args.out / "picture.png")
    print(f"{time.monotonic() - began:.0f} s; numbers and picture are in {args.out}")
    return results


if __name__ == "__main__":
    main()
