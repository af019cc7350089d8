"""Stochastic bilevel loops beside full-batch AID: suboptimality against oracle calls.

Three problems: least squares, whose value function has a closed form; logistic regression on
handwritten digits with a regulariser for each pixel; and hyper-cleaning, where 40 % of the training
labels are wrong and each sample has a weight. An oracle call is one gradient, Hessian-vector
product or cross product of the loss of one sample. What is plotted is ``f(hparams) - min f`` for
the value function ``f``, with the inner problem solved exactly.

    python examples/stochastic_bilevel.py --out out/stochastic_bilevel
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import common
import torch
from bilevel_problems import Problem, cleaning, least_squares, regularisation
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf
from hyperfunc.bilevel import power_decay

BATCH = 40
T, Q = 10, 10  # inner steps and adjoint steps of the double loops
FULL_STEPS, FULL_PRODUCTS = 10, 10  # inner steps and products of full-batch AID
CHECKPOINTS = 16
METHODS = ("soba", "saba", "stocbio", "amigo", "full-batch AID")


def run_loop(name: str, problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """A loop of `hyperfunc.bilevel`, on a fixed split of the data into batches.

    Like the next function it yields the oracle calls so far and the hparams, without end.
    """
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
    n, n_val = problem.num_samples, len(problem.outer_data[0])

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
        calls += n * (FULL_STEPS + int(solution.stats.num_steps) + warm + 1) + n_val


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


def picture(results: dict[str, dict[str, Any]]) -> Figure:
    figure, axes = common.panels(len(results), (13, 4.2))
    for axis, (title, runs) in zip(axes, results.items(), strict=True):
        for name, run in runs.items():
            gaps = [max(gap, 1e-12) for gap in run["suboptimality"][1:]]
            common.curves(axis, {name: gaps}, "o-", run["calls"][1:], xscale="log", yscale="log")
        axis.set(title=title, xlabel="oracle calls (samples)")
    axes[0].set_ylabel("f(hparams) - min f")
    return figure


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    args = common.options(
        argv, __doc__, "stochastic_bilevel", scale=(1.0, "of the number of oracle calls")
    )
    results: dict[str, dict[str, Any]] = {}
    for make in (least_squares, regularisation, cleaning):
        problem, best = make()
        results[problem.title] = {}
        for name in METHODS:
            calls, gaps = measure(name, problem, best, args.scale)
            results[problem.title][name] = {"calls": calls, "suboptimality": gaps}
    ends = {
        title: [run["suboptimality"][-1] for run in runs.values()]
        for title, runs in results.items()
    }
    common.table("f - min f at the end", dict.fromkeys(METHODS, ".2e"), ends)
    common.save(args, picture(results), problems=results)
    return results


if __name__ == "__main__":
    common.run(main)
