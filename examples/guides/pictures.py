"""The pictures of the guides, from what this script computes: a minute or two.

    python examples/guides/pictures.py            # into examples/guides/pictures
    python examples/guides/pictures.py tree       # this one alone

- tree.png: which method, drawn from the tree of questions in the README
- geometry.png: an inner problem, its solutions, and the slope of the outer loss along them
- memory.png: what one hypergradient holds, against the inner steps, by method
- error.png: how far it is from the exact one, against products, by method
- equilibrium.png: residuals of an equilibrium layer against evaluations, by solver
- schedule.png: a learning rate for each step of SGD, as it is learned, and what it gains
- weights.png: the weights that training samples learn, those with right and with wrong labels

Drawn by ``python -m tests.benchmarks.bilevel --plot examples/guides/pictures``, in five minutes:

- bilevel_quadratic.png: suboptimality of every bilevel loop, on least squares
- bilevel_regularisation.png: on the regularisation of a logistic regression
- bilevel_cleaning.png: on the cleaning of labels
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path

import torch
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn import functional as F

import hyperfunc as hf

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Meter

GREY = "#808080"  # legible on white and on black
COLOURS = ["#1f8fe0", "#e07b1f", "#2ca86b", "#d1495b", "#9b6dd6", "#8c8c3a", "#3ab0b0"]
README = Path(__file__).parents[2] / "README.md"


def questions() -> list[list[str]]:
    """The tree of the README: a row a leaf, of the conditions that lead to it and the answer."""
    block = re.search(r"## Which method.*?```\n(.*?)\n```", README.read_text(), re.DOTALL)[1]
    path: list[tuple[int, str]] = []
    rows = []
    for line in block.splitlines():
        branch = re.match(r"([│ ]*)[├└]─+ ", line)
        column, text = (len(branch[1]), line[branch.end() :]) if branch else (-1, line)
        words, *answer = re.split(r" ─{2,} ", text)
        path = [node for node in path if node[0] < column]
        if answer and not answer[0].endswith("?"):
            rows.append([text for _, text in path] + [words, *answer])
        path.append((column, ": ".join([words, *answer]) if answer else words))
    return rows


def tree(axes: Axes) -> None:
    """Boxes from left to right: a question, conditions, and the method in the last column."""
    rows = questions()
    columns, widths = [0.0, 2.4, 5.3], [24, 30, 34]
    places: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        for depth in range(1, len(row)):
            places.setdefault(tuple(row[:depth]), []).append(i)
    style = {"va": "center", "color": "white", "fontsize": 9.5}

    def box(x: float, y: float, text: str, width: int, colour: str) -> None:
        frame = {"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": "none"}
        axes.text(x, y, "\n".join(textwrap.wrap(text, width)), bbox=frame, **style)

    def line(x0: float, y0: float, x1: float, y1: float) -> None:
        bend = x1 - 0.28
        axes.plot([x0, bend, bend, x1], [y0, y0, y1, y1], color=GREY, lw=1.5, zorder=0)

    for path, at in places.items():
        depth, y = min(len(path) - 1, 2), -sum(at) / len(at)
        box(columns[depth], y, path[-1], widths[depth], "#4a5a70" if depth else "#8a3f6b")
        if depth:
            parent = places[path[:-1]]
            line(columns[depth - 1] + 0.3, -sum(parent) / len(parent), columns[depth], y)
    for i, row in enumerate(rows):
        axes.plot([columns[len(row) - 2] + 0.3, 8.3], [-i, -i], color=GREY, lw=1.5, zorder=0)
        box(8.3, -i, row[-1], 34, "#1f6fb0")
    axes.set(xlim=(-0.2, 11.0), ylim=(0.6 - len(rows), 0.6))
    axes.set_axis_off()


def geometry(left: Axes, right: Axes) -> None:
    """An inner loss over params and hparams, its valley, and the outer loss along the valley."""

    def inner_loss(w, h):
        return (w - torch.sin(2 * h) - h / 2) ** 2 / 2

    def outer_loss(w, h):
        return (w - 0.4) ** 2 + 0.1 * h**2

    def solve(h):
        return torch.sin(2 * h) + h / 2

    h, w = torch.linspace(-1.2, 1.6, 200), torch.linspace(-1.8, 2.0, 200)
    grid = torch.meshgrid(h, w, indexing="xy")
    levels = [0.01, 0.05, 0.15, 0.4, 0.8, 1.6, 3.0]
    losses = inner_loss(grid[1], grid[0])
    left.contour(h, w, losses, levels=levels, colors=GREY, linewidths=0.8, alpha=0.4)
    left.plot(h, solve(h), color=COLOURS[0], lw=2.5, label="solutions w*(λ)")
    here = torch.tensor(0.75)
    point = solve(here)
    slope = torch.func.grad(hf.implicit_diff(solve, inner_loss=inner_loss))(here)
    near = here + torch.tensor([-0.4, 0.4])
    left.plot(near, point + slope * (near - here), color=COLOURS[1], lw=2, label="dw*/dλ")
    left.plot(here, point, "o", color=COLOURS[3])
    left.axhline(0.4, color=COLOURS[2], ls="--", label="where the outer loss wants w")
    left.set(xlabel="hparams λ", ylabel="params w", title="the inner loss, and its minima")
    f, gradient = outer_loss(solve(h), h), hf.hypergrad(solve, outer_loss, inner_loss=inner_loss)
    value = outer_loss(point, here)
    right.plot(h, f, color=COLOURS[2], lw=2.5, label="f(λ) = E(w*(λ), λ)")
    right.plot(near, value + gradient(here) * (near - here), color=COLOURS[1], lw=2)
    right.plot([], [], color=COLOURS[1], lw=2, label="its slope: the hypergradient")
    right.plot(here, value, "o", color=COLOURS[3])
    right.set(xlabel="hparams λ", ylabel="outer loss", title="the outer loss along the minima")


def memory(axes: Axes) -> None:
    """Copies of the params that are there at once, for a small network and gradient descent."""
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    apply, start = hf.functional(net)
    x, y = torch.randn(32, 32), torch.randint(10, (32,))

    def loss(w, h, x, y):
        decay = h["log_decay"].exp() * sum((v**2).sum() for v in w.values())
        return torch.nn.functional.cross_entropy(apply(w, x), y) + decay

    h = {"log_lr": torch.tensor(-2.0), "log_decay": torch.tensor(-3.0)}
    size = 4 * sum(w.numel() for w in start.values())
    methods = {
        '"reverse_unroll"': hf.ReverseUnroll(),
        '"reverse"': hf.Reverse(),
        'Reverse("sqrt")': hf.Reverse("sqrt"),
        '"forward", two hparams': hf.ForwardMode(),
        '"cg", 10 steps': hf.CG(maxiter=10, rtol=0, atol=0),
    }
    counts = [10, 20, 40, 80, 160]
    for name, method in methods.items():
        peaks = []
        for steps in counts:
            sgd = hf.optim.sgd(lr=lambda h: h["log_lr"].exp())
            solver = hf.minimize(loss, sgd, steps, init=lambda h, *args: start)
            fn = hf.hypergrad(solver, loss, method=method, throw=False)
            with Meter((0, 0)) as meter:
                fn(h, x, y)
            peaks.append(meter.peak / size)
        axes.loglog(counts, peaks, marker="o", label=name)
    axes.set(xlabel="inner steps", ylabel="copies of the params at the peak")
    axes.minorticks_off()
    axes.set_xticks(counts, map(str, counts))
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])


def error(axes: Axes) -> None:
    """The relative error of a hypergradient of ridge regression, in float64."""
    X, y = torch.randn(200, 50).double(), torch.randn(200).double()
    X = X * torch.logspace(0, -1, 50).double()

    def inner_loss(w, h):
        return ((X @ w - y) ** 2).mean() / 2 + (h.exp() * w**2).sum() / 2

    def solve(h):
        return torch.linalg.solve(X.T @ X / len(X) + h.exp().diag(), X.T @ y / len(X))

    def outer_loss(w, h):
        return ((w - 1) ** 2).sum()

    h = torch.full((50,), -5.0).double()
    exact = hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method="dense")(h)
    methods = {
        "CG": (hf.CG, 1),
        "NormalCG": (hf.NormalCG, 2),
        "GMRES": (hf.GMRES, 1),
        "FixedPoint": (lambda **kw: hf.FixedPoint(step_size=0.5, **kw), 1),
        "AndersonFixedPoint": (lambda **kw: hf.AndersonFixedPoint(step_size=0.5, **kw), 1),
    }
    products = [2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 100]
    for name, (make, each) in methods.items():
        errors = []
        for count in products:
            method = make(maxiter=count // each, rtol=0, atol=0)
            fn = hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method=method, throw=False)
            errors.append(((fn(h) - exact).norm() / exact.norm()).item())
        axes.semilogy(products, errors, marker=".", label=name)
    axes.set(xlabel="products", ylabel="relative error", ylim=(1e-12, 3))


def equilibrium(axes: Axes) -> None:
    """Residuals of a recurrent cell whose map has a contraction factor near one."""
    W = torch.linalg.qr(torch.randn(64, 64).double())[0] * 0.97
    x = 0.3 * torch.randn(1, 64).double()

    def cell(z, W, x):
        return torch.tanh(z @ W.T + x)

    solvers = hf.fixed_point_solvers
    for solver in (solvers.Picard, solvers.Anderson, solvers.Broyden):
        residuals = []
        for steps in range(1, 41):
            z, _ = solver(maxiter=steps, rtol=0, throw=False)(cell, torch.zeros_like(x), W, x)
            residuals.append((cell(z, W, x) - z).norm().item())
        axes.semilogy(range(1, 41), residuals, label=solver.__name__)
    axes.set(xlabel="evaluations of the cell", ylabel="residual", ylim=(1e-5, 10))


def schedule(left: Axes, right: Axes) -> None:
    """A rate for each of 60 steps of SGD on batches of ten digits, the mean over 32 orders."""
    X, y = digits()
    steps, shape = 60, (32, 60, 10)
    train, val = (X[:600], y[:600]), (X[600:1200], y[600:1200])

    def loss(W, rates, batch):
        return F.cross_entropy(train[0][batch] @ W, train[1][batch])

    def val_loss(W, rates):
        return F.cross_entropy(val[0] @ W, val[1])

    def gradient(rates, batches):
        sgd = hf.optim.sgd(lr=hf.optim.per_step(lambda h: h.exp()))
        start = torch.zeros(64, 10)
        solver = hf.minimize(loss, sgd, steps, init=lambda h: start, inputs=batches)
        return hf.hypergrad_and_value(solver, val_loss, method="reverse")(rates)

    mean = hf.task_map(gradient, in_dims=(None, 0), reduce="mean")
    draw = torch.Generator().manual_seed(1)
    constants = torch.linspace(-0.5, 1.5, 9)
    fixed = torch.randint(600, shape, generator=draw)
    best = min((mean(c.expand(steps), fixed)[1].item(), c.item()) for c in constants)
    rates = torch.full((steps,), best[1])
    adam = torch.optim.Adam([rates], lr=0.05)
    values = []
    for outer in range(101):
        if outer in (0, 20, 100):
            left.semilogy(rates.exp(), label=f"after {outer} outer steps")
        grads, value = mean(rates, torch.randint(600, shape, generator=draw))
        hf.assign_grads(rates, grads)
        adam.step()
        values.append(value.item())
    left.set(xlabel="step of SGD", ylabel="learning rate")
    right.plot(values, label="learned schedule")
    right.axhline(best[0], color=GREY, ls="--", label="best constant rate")
    right.set(xlabel="outer steps", ylabel="validation loss after 60 steps")


def weights(axes: Axes) -> None:
    """The problem of the guide on data weights, with its 400 samples and 100 clean ones."""
    X, y = digits()
    train_y = y[:400].clone()
    drawn = torch.rand(400) < 0.4
    train_y[drawn] = torch.randint(10, (400,))[drawn]
    wrong = train_y != y[:400]

    def train_loss(W, h):
        losses = F.cross_entropy(X[:400] @ W, train_y, reduction="none")
        return (h.sigmoid() * losses).mean() + 1e-3 * (W**2).sum()

    def clean_loss(W, h):
        return F.cross_entropy(X[400:500] @ W, y[400:500])

    solver = hf.minimize(
        train_loss, hf.optim.sgd(lr=2.0, momentum=0.9), 300, init=lambda h: torch.zeros(64, 10)
    )
    gradient = hf.hypergrad(solver, clean_loss, method=hf.CG(rtol=1e-2))
    h = torch.zeros(400)
    adam = torch.optim.Adam([h], lr=1.0)
    for _ in range(8):
        hf.assign_grads(h, gradient(h))
        adam.step()
    parts = {"right labels": h[~wrong], "wrong labels": h[wrong]}
    samples = [part.sigmoid().tolist() for part in parts.values()]
    axes.hist(samples, bins=20, label=list(parts), color=[COLOURS[0], COLOURS[3]])
    axes.set(xlabel="learned weight of a training sample", ylabel="samples")


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits of scikit-learn in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target))
    return torch.tensor(data.data / 16).float()[order], torch.tensor(data.target)[order]


# What is drawn, with how many panels and in what size
PICTURES = [
    (tree, 1, (10.5, 4.6)),
    (geometry, 2, (10, 4)),
    (memory, 1, (7, 4)),
    (error, 1, (7, 4)),
    (equilibrium, 1, (7, 4)),
    (schedule, 2, (10, 4)),
    (weights, 1, (7, 3.5)),
]


def main(folder: Path, only: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    greys = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style = dict.fromkeys(greys, GREY) | {
        "axes.titlecolor": GREY,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "grid.color": GREY,
        "grid.alpha": 0.25,
    }
    for draw, panels, size in PICTURES:
        if only and draw.__name__ not in only:
            continue
        torch.manual_seed(0)
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, panels, squeeze=False)[0]
            draw(*axes)
            for panel in axes:
                if panel.axison:
                    panel.grid()
                    panel.legend(frameon=False)
            figure.savefig(folder / f"{draw.__name__}.png", dpi=110, transparent=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", help="names of pictures; all if none is given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    torch.set_num_threads(1)
    given = parser.parse_args()
    main(given.out, given.only)
