"""Implicit MAML on sinusoids, whose tasks have negative curvature: what each remedy comes to.

Run as ``python -m tests.benchmarks.imaml_sinusoid``; it takes a few minutes. Each row meta-learns
the start of a small network with 25 tasks an outer step: ten points of a sinusoid each, a proximal
term, some steps of gradient descent, and a linear solve of a few steps for the adjoint. It ends
with the mean squared error on new tasks, after the same adaptation; "failed" counts tasks whose
solve ended with a code that raises by default, in the first outer step and over all of them.

Reference: Rajeswaran, Finn, Kakade and Levine, Meta-learning with implicit gradients, 2019, arXiv
1909.04630, and Finn, Abbeel and Levine, 2017, arXiv 1703.03400, for the tasks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hyperfunc as hf

TASKS, SHOTS, STEPS, WEIGHT, SOLVER_STEPS = 25, 10, 32, 0.5, 10
MAXITER: dict[str, Any] = {"maxiter": SOLVER_STEPS, "rtol": 1e-6}
# the method, whether the loss is composed, and whether failures are left out of the mean
ROWS: dict[str, tuple[Any, bool, bool]] = {
    "CG, failures ignored": (hf.CG(**MAXITER), False, False),
    "CG, mean_over_successes": (hf.CG(**MAXITER), False, True),
    'CG(negative_curvature="stop")': (hf.CG(**MAXITER, negative_curvature="stop"), False, False),
    "GMRES": (hf.GMRES(**MAXITER), False, False),
    "composed (Gauss-Newton), CG": (hf.CG(**MAXITER), True, False),
}


def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Sinusoids of random amplitude and phase."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, generator=generator)
    phase = math.pi * torch.rand(count, 1, generator=generator)
    x, x_query = (10 * torch.rand(count, n, generator=generator) - 5 for n in (SHOTS, 2 * SHOTS))
    return {
        "x": x,
        "y": amplitude * torch.sin(x - phase),
        "x_query": x_query,
        "y_query": amplitude * torch.sin(x_query - phase),
    }


def make(method: Any, composed: bool) -> tuple[Any, Any]:
    """The hypergradient of one task, and the start of the meta-parameters."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU()]
    apply, meta = hf.functional(torch.nn.Sequential(*layers, torch.nn.Linear(40, 1)))

    def model(w: Any, meta: Any, task: Any) -> Tensor:
        return apply(w, task["x"][:, None])[:, 0]

    def loss(outputs: Tensor, meta: Any, task: Any) -> Tensor:
        return ((outputs - task["y"]) ** 2).mean()

    def query_loss(w: Any, meta: Any, task: Any) -> Tensor:
        return ((apply(w, task["x_query"][:, None])[:, 0] - task["y_query"]) ** 2).mean()

    inner = hf.composed(model, loss) if composed else lambda w, *args: loss(model(w, *args), *args)
    inner_loss = hf.proximal(inner, WEIGHT)
    solver = hf.minimize(inner_loss, hf.optim.sgd(lr=0.02), STEPS, init=lambda meta, task: meta)
    fn = hf.hypergrad_and_solution(solver, query_loss, method=method, throw=False)
    return torch.func.vmap(fn, in_dims=(None, 0)), meta


def run(name: str, outer_steps: int) -> Iterator[tuple[int, int, float]]:
    """Failures of a step, tasks so far, and its mean loss; the last has the loss of new tasks."""
    method, composed, masked = ROWS[name]
    fn, meta = make(method, composed)
    meta = {key: leaf.clone() for key, leaf in meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(outer_steps):
        grads, solution = fn(meta, draw(TASKS, generator))
        failed = int((solution.stats.result > int(hf.RESULTS.max_steps)).sum())
        if masked:
            grads, _ = hf.mean_over_successes(grads, solution.stats, throw=False)
        else:
            grads = {key: leaf.mean(0) for key, leaf in grads.items()}
        hf.assign_grads(meta, grads)
        optimizer.step()
        yield failed, (step + 1) * TASKS, float(solution.value.mean())
    tasks = draw(200, torch.Generator().manual_seed(2))
    yield 0, outer_steps * TASKS, float(fn(meta, tasks)[1].value.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="outer steps")
    steps = parser.parse_args().steps
    print(f"| {steps} outer steps | failed at first | failed in all | error of new tasks |")
    print("| --- | ---: | ---: | ---: |")
    for name in ROWS:
        *each, (_, total, error) = run(name, steps)
        failed = [row[0] for row in each]
        share = sum(failed) / total
        print(f"| {name} | {failed[0]} of {TASKS} | {share:.0%} | {error:.2f} |", flush=True)


if __name__ == "__main__":
    main()
