"""Every loop of `hyperfunc.bilevel` and exact AID on three problems, against calls and seconds.

    python -m tests.benchmarks.bilevel --problem quadratic --methods soba saba "exact AID"

An oracle call is one gradient, product with the Hessian or product with the cross derivative, of
the loss of one sample. What is measured is ``f(hparams) - min f`` for the value function ``f``,
with the inner problem solved exactly, outside of the time that is taken, which is that of the
processor. Of seven step sizes on the hparams the one is taken that ends lowest on the same problem,
and runs away on no other draws; what is shown is the median of three runs with it, on draws of
their own. The step size on the params is the same for all. Writes ``bilevel.json`` and
``bilevel.md`` to the output folder, and with ``--plot`` a picture a problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfunc as hf
from hyperfunc.bilevel import power_decay, power_growth

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import bilevel_problems
import stochastic_bilevel
from bilevel_problems import Problem

AID = "exact AID"
FACTORS = tuple(2.0**k for k in range(-4, 3))  # the grid, times the step size of the problem
SEEDS = 3  # runs that the median is of, beside those that choose the step size
DRAWING = ("bsa", "ttsa", "sustain", "pzobo")  # the loops that have a seed of their own
MARKS = 8  # points of a curve
FAMILIES = {"one loop": "#1f8fe0", "a series": "#2ca86b", "first order": "#e07b1f", AID: "#808080"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A loop, its settings here, and the oracle calls of one update on one sample.

    The four formulas count gradients, products with the Hessian and with the cross derivative of
    the inner loss, and gradients of the outer one, in `T` (inner steps), `Q` (adjoint steps) and
    `J` (directions).
    """

    family: str
    gradients: str
    products: str
    cross: str
    outer: str
    width: str = ""  # the leading dimension of the inner batches, if they have one
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    outer_scale: Callable[[float], float] = lambda inner_lr: 1.0  # of the step size on the hparams
    decays: bool = True  # the step sizes decrease: without reduction of variance they must
    large: float = 0.0  # the share of the data in the batches that begin a period

    def count(self, formula: str) -> int:
        """What a formula comes to with the settings."""
        keys = {"T": "num_inner_steps", "Q": "num_adjoint_steps", "J": "num_directions"}
        values = {letter: self.settings.get(key) for letter, key in keys.items()}
        return int(eval(formula, {}, values))

    def calls(self, inner_size: int, outer_size: int) -> int:
        """The oracle calls of an update on batches of these sizes."""
        inner = sum(map(self.count, (self.gradients, self.products, self.cross)))
        return inner * inner_size + self.count(self.outer) * outer_size


ONE, SERIES, FIRST = "one loop", "a series", "first order"
TWO_LOOPS = {"num_inner_steps": 10, "num_adjoint_steps": 10}
ONE_STEP = {"num_adjoint_steps": 10}
HALF = {"inner_weight": 0.5, "outer_weight": 0.5}
METHODS = {
    "soba": Method(ONE, "1", "1", "1", "1"),
    "saba": Method(ONE, "1", "1", "1", "1", decays=False),
    "ma_soba": Method(ONE, "1", "1", "1", "1"),
    "srba": Method(ONE, "2", "2", "2", "2", settings={"period": 64}, decays=False, large=1.0),
    "fsla": Method(ONE, "1", "1", "2", "2", "3"),
    "ttsa": Method(SERIES, "1", "Q", "1", "1", "Q + 2", ONE_STEP),
    "bsa": Method(SERIES, "T", "Q", "1", "1", "T + Q + 1", TWO_LOOPS),
    "stocbio": Method(SERIES, "T", "Q", "1", "1", "T + Q + 1", TWO_LOOPS),
    "amigo": Method(ONE, "T", "Q", "1", "1", "T + Q + 1", TWO_LOOPS),
    "mrbo": Method(SERIES, "2", "2 * Q", "2", "2", "Q + 2", ONE_STEP | HALF),
    "sustain": Method(SERIES, "2", "2 * Q", "2", "2", "Q + 2", ONE_STEP | HALF),
    "vrbo": Method(
        SERIES,
        "2 * T + 1",
        "(2 * T + 1) * Q",
        "2 * T + 1",
        "2 * T + 1",
        "(T + 1) * (Q + 2)",
        {"period": 8, "num_inner_steps": 3, "num_adjoint_steps": 10},
        decays=False,
        large=0.1,
    ),
    "pzobo": Method(
        FIRST, "T * (J + 1)", "0", "0", "1", "T", {"num_inner_steps": 10, "num_directions": 4}
    ),
    "truncated": Method(SERIES, "2 * T", "T", "T", "1", "T", {"num_inner_steps": 10}),
    "f2sa": Method(
        FIRST,
        "2 * T + 2",
        "0",
        "0",
        "T + 1",
        settings={"num_inner_steps": 1, "penalty": power_growth(3.0, 1 / 4)},
    ),
    "bome": Method(FIRST, "T + 2", "0", "0", "1", settings={"num_inner_steps": 10}),
    "pbgd": Method(
        FIRST,
        "T + 2",
        "0",
        "0",
        "1",
        settings={"num_inner_steps": 10, "penalty": 10.0},
        outer_scale=lambda inner_lr: 0.4,
    ),
    "meha": Method(
        FIRST,
        "4",
        "0",
        "0",
        "2",
        settings={"penalty": power_growth(3.0, 1 / 4)},
        outer_scale=lambda inner_lr: 4.0,
    ),
    "sama": Method(
        FIRST,
        "3",
        "0",
        "0",
        "1",
        outer_scale=lambda inner_lr: 1 / inner_lr,
    ),
    "darts": Method(FIRST, "4", "0", "0", "1", outer_scale=lambda inner_lr: 1 / inner_lr),
}


# Problems ----------------------------------------------------------------------------------------


def quadratic() -> tuple[Problem, float]:
    """At the size of benchmark_bilevel: 32,768 and 1,024 samples, 100 and 10 variables."""
    problem, best = bilevel_problems.least_squares(32768, 1024, 100, 10)
    return dataclasses.replace(problem, outer_lr={"soba": 0.2}, passes=100), best


def regularisation() -> tuple[Problem, float]:
    """Two classes at the size of ijcnn1: 49,152 samples each, 22 features and regularisers."""
    generator = torch.Generator().manual_seed(0)
    n, dim = 49152, 22
    x = torch.randn(2 * n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(2 * n, generator=generator, dtype=torch.float64)
    y = (x[:, :8] @ torch.linspace(1, 0.2, 8, dtype=x.dtype) + noise > 1.5).double()

    def inner_loss(w: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(X @ w, y)
        return loss + 0.5 * (reg.exp() * w**2).sum()

    def outer_loss(w: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        # the second term keeps the regularisers of useless features from growing without end
        return F.binary_cross_entropy_with_logits(X @ w, y) + 1e-3 * (reg**2).sum()

    return bilevel_problems.with_reference(
        Problem(
            title="regularisation of logistic regression",
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_data=(x[:n], y[:n]),
            outer_data=(x[n:], y[n:]),
            params=torch.zeros(dim, dtype=x.dtype),
            hparams=torch.zeros(dim, dtype=x.dtype),
            solve=bilevel_problems.Minimizer(inner_loss, (x[:n], y[:n]), dim),
            inner_lr=0.4,
            outer_lr={"soba": 32.0},
            passes=100,
        )
    )


def cleaning() -> tuple[Problem, float]:
    """Digits of scikit-learn, 800 samples each: those of MNIST would take 20,000 and 5,000."""
    problem, best = bilevel_problems.cleaning()
    return dataclasses.replace(problem, outer_lr={"soba": 3200.0}), best


PROBLEMS: dict[str, tuple[Callable[[], tuple[Problem, float]], int]] = {
    "quadratic": (quadratic, 64),
    "regularisation": (regularisation, 64),
    "cleaning": (cleaning, 20),
}
"""Each with the number of batches that the data are split into."""


# Runs --------------------------------------------------------------------------------------------


def make(
    name: str, problem: Problem, factor: float, num_batches: int, seed: int = 0
) -> hf.bilevel.Loop:
    """A loop with a step size of the grid."""
    method, inner_lr = METHODS[name], problem.inner_lr
    settings = dict(method.settings)
    if name in DRAWING:
        settings["seed"] = seed
    if name == "meha":  # its params are to be slower than its second params
        settings["adjoint_lr"], inner_lr = 0.8 * inner_lr, 0.4 * inner_lr
    outer_lr = factor * problem.outer_lr["soba"] * method.outer_scale(problem.inner_lr)
    rates: dict[str, Any] = {"inner_lr": inner_lr, "outer_lr": outer_lr}
    if method.decays:
        rates = {
            "inner_lr": power_decay(inner_lr, 0.2),
            "outer_lr": power_decay(outer_lr, 0.3),
        }
    if name == "sama":  # whose own optimiser is Adam
        lr = rates.pop("inner_lr")
        settings["inner_optimizer"] = hf.optim.sgd(hf.optim.schedule(lambda h, step: lr(step)))
    if name == "saba":
        settings |= {"num_inner_batches": num_batches, "num_outer_batches": num_batches}
    loop: hf.bilevel.Loop = getattr(hf.bilevel, name)(
        problem.inner_loss, problem.outer_loss, **rates, **settings
    )
    return loop


def iterates(
    name: str, problem: Problem, factor: float, num_batches: int, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """The oracle calls so far and the hparams, without end."""
    if name == AID:
        rates = {"full-batch AID": factor * 4 * problem.outer_lr["soba"]}
        yield from stochastic_bilevel.run_full_batch(dataclasses.replace(problem, outer_lr=rates))
    method, loop = METHODS[name], make(name, problem, factor, num_batches, seed)
    sizes = len(problem.inner_data[0]), len(problem.outer_data[0])
    blocks = [torch.arange(size).reshape(num_batches, -1) for size in sizes]
    width = method.count(method.width) if method.width else 0
    generator = torch.Generator().manual_seed(seed)
    state, calls, step = loop.init(problem.params, problem.hparams), 0, 0
    while True:
        yield calls, state.hparams
        draws = torch.randint(num_batches, (max(width, 1),), generator=generator)
        draw = torch.randint(num_batches, (), generator=generator)
        inner_rows, outer_rows = blocks[0][draws if width else draws[0]], blocks[1][draw]
        if method.large and step % method.settings["period"] == 0:
            many = [max(int(method.large * size), 1) for size in sizes]
            inner_rows, outer_rows = (
                torch.randperm(size, generator=generator)[:count]
                for size, count in zip(sizes, many, strict=True)
            )
            if width:
                inner_rows = inner_rows.expand(width, -1)
        inner = tuple(leaf[inner_rows] for leaf in problem.inner_data)
        outer = tuple(leaf[outer_rows] for leaf in problem.outer_data)
        indices = (draws[0], draw) if name == "saba" else ()
        state = loop.update(state, inner, outer, *indices)
        calls += method.calls(inner_rows.shape[-1], len(outer_rows))
        step += 1


Trace = list[tuple[int, float, Tensor]]


def trace(steps: Iterator[tuple[int, Tensor]], budget: int, seconds: float) -> Trace:
    """Calls, seconds and hparams at calls that grow geometrically."""
    marks = [budget * 100 ** (k / (MARKS - 1) - 1) for k in range(MARKS)]
    found: Trace = []
    begin = time.process_time()
    for calls, hparams in steps:
        spent = time.process_time() - begin
        over = calls >= budget or spent >= seconds
        if not found or over or calls >= marks[0]:
            found.append((calls, spent, hparams))
            marks = [mark for mark in marks if mark > calls]
            if over or not hparams.isfinite().all():
                break
    return found


def gap(problem: Problem, best: float, hparams: Tensor) -> float:
    """The suboptimality, or infinity where the run went astray."""
    if not hparams.isfinite().all() or hparams.abs().max() > 1e3:
        return math.inf
    value = problem.value(hparams) - best
    return value if math.isfinite(value) else math.inf


def measure(
    name: str, problem: Problem, best: float, num_batches: int, budget: int, seconds: float
) -> dict[str, Any]:
    """The median curve of the step size that ends lowest."""

    def run(factor: float, seed: int) -> Trace:
        return trace(iterates(name, problem, factor, num_batches, seed), budget, seconds)

    chosen = {factor: run(factor, 0) for factor in FACTORS}
    ends = {factor: gap(problem, best, found[-1][2]) for factor, found in chosen.items()}
    for factor in sorted(ends, key=lambda each: ends[each]):
        # exact AID draws nothing
        runs = [chosen[factor]] if name == AID else [run(factor, 1 + k) for k in range(SEEDS)]
        if all(math.isfinite(gap(problem, best, found[-1][2])) for found in runs):
            break  # else it ran away on other draws
    points = min(map(len, runs)) - 1
    shared = [[*found[:points], found[-1]] for found in runs]
    columns = list(zip(*shared, strict=True))
    return {
        "factor": factor,
        "calls": [int(statistics.median(calls for calls, _, _ in column)) for column in columns],
        "seconds": [statistics.median(spent for _, spent, _ in column) for column in columns],
        "gaps": [
            statistics.median(gap(problem, best, hparams) for _, _, hparams in column)
            for column in columns
        ],
        "ends": [gap(problem, best, found[-1][2]) for found in runs],
        "stopped by time": runs[0][-1][0] < budget,
    }


# What is written ---------------------------------------------------------------------------------

Results = dict[str, dict[str, dict[str, Any]]]


def after(run: dict[str, Any], axis: str, limit: float) -> float:
    """The suboptimality at the last point that is not past a limit."""
    return [g for at, g in zip(run[axis], run["gaps"], strict=True) if at <= limit][-1]


def table(results: Results) -> list[str]:
    """For each problem: where all had made as many calls, where all had as long, and at the end."""
    lines = []
    for problem, runs in results.items():
        calls = min(run["calls"][-1] for run in runs.values())
        seconds = min(run["seconds"][-1] for run in runs.values())
        lines += [
            f"**{problem[0].upper()}{problem[1:]}**",
            "",
            f"| method | {calls:.1e} calls | {seconds:.2f} seconds | at its end | calls then |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, run in sorted(runs.items(), key=lambda item: item[1]["gaps"][-1]):
            cells = [after(run, "calls", calls), after(run, "seconds", seconds), run["gaps"][-1]]
            texts = " | ".join(f"{cell:.1e}" for cell in [*cells, run["calls"][-1]])
            lines.append(f"| {name} | {texts} |")
        lines.append("")
    return lines


def picture(problem: str, runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Suboptimality against calls and against seconds, a colour a family."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    grey = "#808080"  # legible on white and on black
    keys = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style = dict.fromkeys(keys, grey) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }
    family = {name: METHODS[name].family if name in METHODS else AID for name in runs}
    dashes = ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1))]
    with rc_context(style):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, key in zip(axes, ("calls", "seconds"), strict=True):
            seen = dict.fromkeys(FAMILIES, 0)
            for name, run in runs.items():
                kind = family[name]
                gaps = [
                    max(each, 1e-14) if each < math.inf else math.nan for each in run["gaps"][1:]
                ]
                axis.loglog(
                    run[key][1:],
                    gaps,
                    color=FAMILIES[kind],
                    linestyle=dashes[seen[kind] % len(dashes)],
                    linewidth=2.5 if kind == AID else 1.4,
                    marker="os^v"[seen[kind] // 2 % 4],
                    markersize=3,
                    label=name,
                )
                seen[kind] += 1
            axis.grid(color=grey, alpha=0.25)
            axis.minorticks_off()
            axis.set_xlabel(
                "oracle calls (samples)"
                if key == "calls"
                else "seconds of the processor, one thread"
            )
        axes[0].set_ylabel("f(hparams) - min f")
        figure.suptitle(problem)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
        figure.savefig(path, dpi=100, transparent=True)


def main(argv: Sequence[str] | None = None) -> Results:
    """Measure the chosen methods on the chosen problems."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    everything = [*METHODS, AID]
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of oracle calls")
    parser.add_argument("--seconds", type=float, default=0.75, help="the most that a run may take")
    parser.add_argument("--out", type=Path, default=Path("out/bench-bilevel"))
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into this folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for key in options.problem:
        build, num_batches = PROBLEMS[key]
        problem, best = build()
        budget = int(options.scale * problem.budget)
        runs = results[problem.title] = {}
        for name in options.methods:
            run = measure(name, problem, best, num_batches, budget, options.seconds)
            runs[name] = run
            print(f"{problem.title}: {name}: {run['gaps'][-1]:.1e}", flush=True)
            text = json.dumps({"settings": vars(options), "results": results}, default=str)
            (options.out / "bilevel.json").write_text(text + "\n")
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            picture(problem.title, runs, options.plot / f"bilevel_{key}.png")
    text = "\n".join(table(results))
    (options.out / "bilevel.md").write_text(text)
    print(f"\n{text}\nWritten to {options.out}; {time.process_time() / 60:.1f} CPU-minutes")
    return results


if __name__ == "__main__":
    main()
