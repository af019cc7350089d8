"""Thousands of hyperparameters: an L2 regulariser for each feature of a text classifier.

Multinomial logistic regression on sparse features. With a regulariser h_j for each feature,

    w*(h) = argmin_w  cross_entropy(w; training part) + 1/2 sum_j exp(h_j) ||w_j||^2,

and h minimises the loss of w*(h) on the validation part. As in Grazzi et al. the inner solver takes
T = 10 steps of heavy ball and the adjoint K = 10 steps of CG, each from where it stood.

So many hyperparameters fit the validation part itself: its loss keeps falling when that on new data
has stopped. The outer loop therefore watches a third part, and the numbers to believe are those of
the fourth, the test part. The last row shows what else a validation part is good for.

    python examples/per_feature_l2.py
    python examples/per_feature_l2.py --data newsgroups --root DIR   # scikit-learn's data folder

Reference: Grazzi, Franceschi, Pontil and Salzo, On the iteration complexity of hypergradient
computation, 2020, arXiv 2006.16218, section 4.2.
"""

from __future__ import annotations

import math

import common
import torch
import torch.nn.functional as F
from datasets import Rows, docstrings, newsgroups
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

PARTS = ("train", "validation", "stop", "test")
GRID = [10**exponent for exponent in (-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5)]


def inner_loss(W: Tensor, h: Tensor, train: Rows, validation: Rows, start: Tensor) -> Tensor:
    penalty = 0.5 * (h.exp()[:, None] * W**2).sum()
    return F.cross_entropy(train.x @ W, train.y) + penalty


def outer_loss(W: Tensor, h: Tensor, train: Rows, validation: Rows, start: Tensor) -> Tensor:
    return F.cross_entropy(validation.x @ W, validation.y)


def main(argv: list[str] | None = None) -> dict:
    args = common.options(
        argv,
        __doc__,
        "per_feature_l2",
        data=(("docstrings", "newsgroups"), "the texts"),
        root=(None, "scikit-learn's data folder that holds the 20 newsgroups"),
        steps=(10, "T = K, steps of heavy ball and of CG"),
        lr=(20.0, "of heavy ball"),
        baseline_steps=(300, "steps for a single L2"),
        iterations=(500, "outer steps"),
        outer_lr=(0.03, "of Adam on the log L2"),
        seed=(0, "of the split"),
    )
    shares = (0.1, 0.5, 0.15, 0.25)
    if args.data == "newsgroups":
        parts, words = newsgroups(args.root, *shares, seed=args.seed)
    else:
        parts, words = docstrings(*shares, seed=args.seed)
    data = dict(zip(PARTS, parts, strict=True))
    train, validation = data["train"], data["validation"]
    classes = 1 + max(int(part.y.max()) for part in parts)
    zeros = torch.zeros(len(words), classes)
    print(f"{len(words)} features, {classes} classes, {[len(part.y) for part in parts]} samples")

    def solver(steps: int) -> hf.inner_solvers.IterativeSolver:
        optimizer = hf.optim.heavy_ball(lr=args.lr, momentum=0.9)
        return hf.minimize(inner_loss, optimizer, steps, init=lambda h, train, val, start: start)

    def scores(W: Tensor) -> dict[str, tuple[float, float]]:
        logits = {name: part.x @ W for name, part in data.items()}
        return {
            name: (
                F.cross_entropy(logits[name], part.y).item(),
                (logits[name].argmax(1) == part.y).float().mean().item(),
            )
            for name, part in data.items()
        }

    def best_on_grid(train: Rows, judge: str) -> tuple[float, dict[str, tuple[float, float]]]:
        fits = {}
        for l2 in tqdm(GRID, desc=f"one L2 for all features, on {len(train.y)} samples"):
            h = torch.full((len(words),), math.log(l2))
            fits[l2] = scores(solver(args.baseline_steps)(h, train, validation, zeros))
        best = min(fits, key=lambda l2: fits[l2][judge][0])
        return best, fits[best]

    l2, baseline = best_on_grid(train, "validation")
    hypergradient = hf.hypergrad_and_solution(
        solver(args.steps), outer_loss, method=hf.CG(maxiter=args.steps, rtol=0.0), throw=False
    )
    h, W, adjoint = torch.full((len(words),), math.log(l2)), zeros, zeros
    W = solver(args.baseline_steps)(h, train, validation, zeros)
    optimizer = hf.optim.adam(lr=args.outer_lr)
    state = optimizer.init(h)
    history, best = [], (scores(W), h)
    for _ in (bar := tqdm(range(args.iterations), desc=f"{len(h)} regularisers", unit="it")):
        grads, solution = hypergradient(h, train, validation, W, adjoint_init=adjoint)
        W, adjoint = solution.params, solution.adjoint
        history.append(scores(W))
        bar.set_postfix({name: f"{loss:.3f}" for name, (loss, _) in history[-1].items()})
        if history[-1]["stop"][0] < best[0]["stop"][0]:
            best = history[-1], h
        h, state = optimizer.update(grads, state, h)
        h = h.clamp(max=math.log(1 / args.lr))  # such a weight is zero after one step already

    both = Rows(torch.cat([train.x, validation.x]), torch.cat([train.y, validation.y]))
    rows = {
        f"one L2 for all features (best of {len(GRID)})": baseline,
        "one L2 a feature, stopped early": best[0],
        "one L2 a feature, not stopped": history[-1],
        "one L2, validation part trained on": best_on_grid(both, "stop")[1],
    }
    cells = {
        title: [f"{loss:.3f} ({hits:6.1%})" for loss, hits in (row[name] for name in PARTS[1:])]
        for title, row in rows.items()
    }
    common.table("cross-entropy (accuracy)", dict.fromkeys(PARTS[1:], "s"), cells)
    figure = picture(history, baseline, best[1], words)
    found = {"best_l2": l2, "log_l2": best[1].tolist()}
    common.save(args, figure, rows=rows, history=history, **found)
    return rows


def picture(history: list, baseline: dict, h: Tensor, words: list[str]) -> Figure:
    figure, (curves, learned) = common.panels(2, (12, 4.2), width_ratios=(1, 1.2))
    for index, name in enumerate(PARTS[1:]):
        curves.axhline(baseline[name][0], color=f"C{index}", ls=":")
    losses = {name: [entry[name][0] for entry in history] for name in PARTS[1:]}
    title = "cross-entropy (dotted: the best single L2)"
    common.curves(curves, losses, title=title, xlabel="outer step", yscale="log")
    order = h.argsort()
    learned.plot(h[order] / math.log(10))
    ends = (range(8), 0.05, "left", "top"), (range(-8, 0), 0.95, "right", "bottom")
    for ranks, at, ha, va in ends:
        text = "\n".join(words[order[rank]] for rank in ranks)
        learned.text(at, 1 - at, text, transform=learned.transAxes, fontsize=8, ha=ha, va=va)
    learned.set(title="learned L2 (log10), with the words at both ends", xlabel="features in order")
    return figure


if __name__ == "__main__":
    common.run(main)
