"""The pictures of the guides, from measurements that this script makes: seconds to a minute.

    python examples/guides/pictures.py            # into examples/guides/pictures

- memory.png: what one hypergradient holds, against the inner steps, by method
- error.png: how far it is from the exact one, against products, by method
- equilibrium.png: residuals of an equilibrium layer against evaluations, by solver
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hyperfunc as hf

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Meter

GREY = "#808080"  # legible on white and on black
COLOURS = ["#1f8fe0", "#e07b1f", "#2ca86b", "#d1495b", "#9b6dd6", "#8c8c3a", "#3ab0b0"]


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


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    greys = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color")
    style = dict.fromkeys(greys, GREY) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 11,
        "grid.color": GREY,
        "grid.alpha": 0.25,
    }
    for draw in (memory, error, equilibrium):
        torch.manual_seed(0)
        with rc_context(style):
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.subplots()
            axes.set_prop_cycle(color=COLOURS)
            draw(axes)
            axes.grid()
            axes.legend(frameon=False)
            figure.savefig(folder / f"{draw.__name__}.png", dpi=110, transparent=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    torch.set_num_threads(1)
    main(parser.parse_args().out)
