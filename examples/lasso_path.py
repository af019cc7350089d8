"""Lasso and weighted lasso tuned by hypergradients, on scikit-learn's diabetes data.

The lasso has one regulariser, and cross-validation over a grid finds it. The weighted lasso has one
for each feature,

    min_w  1/(2n) ||X w - y||^2 + sum_j exp(h_j) |w_j|,

for which there is no grid, but a hypergradient: that of the same cross-validation loss with
respect to h, through the fixed point of proximal gradient descent. All splits of the data and all
folds of each split are solved and differentiated at once, by two `vmap`s. Least squares, `LassoCV`
and both lassos tuned by hypergradients are compared on rows that none has seen.

    python examples/lasso_path.py

Reference: Bertrand, Klopfenstein, Blondel, Vaiter, Gramfort and Salmon, Implicit differentiation of
Lasso-type models for hyperparameter optimization, 2020, arXiv 2002.08943.
"""

from __future__ import annotations

import common
import numpy as np
import torch
from datasets import diabetes_folds, stack
from sklearn.linear_model import LassoCV
from torch.func import vmap
from tqdm import tqdm

import hyperfunc as hf

STEP = 0.2  # times the largest curvature, about 4, is below 1


def loss(w, h, fold):
    return 0.5 * w @ fold["H"] @ w - fold["c"] @ w


def validation_loss(w, h, fold):
    return ((fold["X_val"] @ w - fold["y_val"]) ** 2).mean()


phi = hf.proximal_gradient_map(loss, hf.prox.l1(lambda h: h.exp()), STEP)


def solve(h, fold, steps=600, momentum=0.9):
    """Proximal gradient descent with momentum; the hypergradient only needs where it ends."""
    w = ahead = torch.zeros_like(fold["c"])
    for _ in range(steps):
        previous, w = w, phi(ahead, h, fold)
        ahead = w + momentum * (w - previous)
    return w


hypergradient = hf.hypergrad_and_value(
    solve, validation_loss, fixed_point=phi, method=hf.GMRES(rtol=1e-10)
)


def cross_validation(h, folds):
    """The mean over the folds, of the hypergradient and of the loss."""
    grads, values = vmap(hypergradient, in_dims=(None, 0))(h, folds)
    return grads.mean(0), values.mean(0)


def tune(title, h, folds, iterations, lr):
    """Adam on the cross-validation loss of each split; returns the best h met, and the curves."""
    h = h.clone()
    optimizer = torch.optim.Adam([h], lr=lr)
    best, lowest, trace = h.clone(), torch.full((len(h),), torch.inf).to(h), []
    for _ in (bar := tqdm(range(iterations), desc=title, unit="it")):
        grads, values = vmap(cross_validation)(h, folds)
        better = values < lowest
        lowest = torch.where(better, values, lowest)
        best = torch.where(better[(...,) + (None,) * (h.ndim - 1)], h, best)
        trace.append((h.clone(), values, grads))
        hf.assign_grads(h, grads)
        optimizer.step()
        bar.set_postfix(cv_loss=values.mean().item())
    return best, lowest, trace


def main(argv: list[str] | None = None) -> None:
    args = common.options(
        argv,
        __doc__,
        "lasso_path",
        splits=(10, "random splits into 330 rows and 112 for the test"),
        iterations=(40, "outer iterations"),
        seed=(0, "of the first split"),
    )
    splits = [diabetes_folds(args.seed + i) for i in range(args.splits)]
    folds, whole = stack([s[0] for s in splits]), stack([s[1] for s in splits])
    by_grid = [
        LassoCV(alphas=np.geomspace(1e-3, 1, 100), cv=cv, tol=1e-8, max_iter=10**5).fit(X, y)
        for _, _, (X, y, cv) in tqdm(splits, desc="LassoCV", unit="split")
    ]
    grid_h = torch.tensor([model.alpha_ for model in by_grid]).log()
    one = tune("lasso", torch.full_like(grid_h, -2.0), folds, args.iterations, 0.1)
    many = tune("weighted", one[0][:, None].repeat(1, 10), folds, args.iterations, 0.05)

    w = {
        "least squares": torch.linalg.solve(whole["H"], whole["c"]),
        "LassoCV, a grid of 100": torch.tensor(np.stack([model.coef_ for model in by_grid])),
        "lasso, by hypergradient": vmap(solve)(one[0], whole),
        "weighted lasso, by hypergradient": vmap(solve)(many[0], whole),
    }
    cv_losses = [None, torch.tensor([m.mse_path_.mean(1).min() for m in by_grid]), one[1], many[1]]
    reference = vmap(validation_loss)(w["LassoCV, a grid of 100"], grid_h, whole)
    columns = {"cv_loss": ".4f", "test_error": ".4f", "against_LassoCV": "+.4f"}
    columns |= {"standard_error": ".4f", "features": ".1f"}
    rows = {}
    for (title, coefficients), cv in zip(w.items(), cv_losses, strict=True):
        test = vmap(validation_loss)(coefficients, grid_h, whole)
        change, count = test - reference, (coefficients != 0).sum(1)
        spread = change.std() / len(change) ** 0.5
        values = [t.double().mean().item() for t in (test, change, spread, count)]
        rows[title] = [None if cv is None else cv.mean().item(), *values]
    print(f"\nmeans over {args.splits} splits; squared errors, of targets with variance 1")
    common.table("", columns, rows)
    rows = {title: dict(zip(columns, values, strict=True)) for title, values in rows.items()}
    common.save(args, picture(splits[0], grid_h[0], one, many, cv_losses[1]), rows=rows)


def picture(first, grid_h, one, many, grid_losses):
    figure, (coefficients, curve, descent) = common.panels(3, (13, 3.8))
    along = torch.linspace(-6.5, 0, 120, dtype=torch.float64)
    coefficients.plot(along, vmap(solve, in_dims=(0, None))(along, first[1]))
    coefficients.axvline(grid_h, color="black", ls="--", label="LassoCV")
    coefficients.axvline(one[0][0], color="C3", ls=":", label="by hypergradient")
    coefficients.set(title="the path of the lasso, first split", ylabel="coefficient")
    coefficients.legend(fontsize=8)
    curve.plot(along, vmap(cross_validation, in_dims=(0, None))(along, first[0])[1], color="C7")
    for h, values, grads in one[2][::5]:
        dx = torch.tensor([-0.25, 0.25])
        curve.plot(h[0] + dx, values[0] + grads[0] * dx, color="C3", lw=1)
        curve.plot(h[0], values[0], ".", color="C3")
    curve.axvline(grid_h, color="black", ls="--")
    curve.set(title="its cross-validation loss, with hypergradients as slopes")
    for axis in (coefficients, curve):
        axis.set(xlabel="logarithm of the regulariser")
    descent.axhline(grid_losses.mean(), color="black", ls="--", label="LassoCV")
    traces = {"lasso, by hypergradient": one[2], "weighted lasso, by hypergradient": many[2]}
    means = {title: [values.mean() for _, values, _ in trace] for title, trace in traces.items()}
    common.curves(descent, means, title="cross-validation loss, mean over splits")
    descent.set(xlabel="outer iteration")
    return figure


if __name__ == "__main__":
    common.run(main)
