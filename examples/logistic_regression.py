"""Approximate hypergradients against the exact one, and what they are good for.

Logistic regression with an L2 regulariser for each feature, on data made on the spot: the class
depends on 10 of 100 features, and 150 training rows do not tell which.

    w*(h) = argmin_w  mean logistic loss(w; training rows) + 1/2 sum_j exp(h_j) w_j^2

First the error of the approximate hypergradients after k steps of gradient descent, by k: reverse
mode through these steps, and implicit differentiation at the point that they reached with k steps
of the fixed-point method and of conjugate gradients. The exact one is that of the dense solve at
the minimum. Then the outer problem: gradient descent on h, beside the best single regulariser.

    python examples/logistic_regression.py

Reference: Grazzi, Franceschi, Pontil and Salzo, On the iteration complexity of hypergradient
computation, 2020, arXiv 2006.16218, section 4.1.
"""

from __future__ import annotations

import math

import common
import torch
import torch.nn.functional as F
from datasets import Rows, classes_from
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

FEATURES, INFORMATIVE = 100, 10
COUNTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
METHODS = {
    "reverse": lambda k: hf.Reverse(),
    "fixed_point": lambda k: hf.FixedPoint(maxiter=k, rtol=0.0),
    "cg": lambda k: hf.CG(maxiter=k, rtol=0.0),
}


def inner_loss(w: Tensor, h: Tensor, train: Rows, start: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(train.x @ w, train.y) + 0.5 * (h.exp() * w**2).sum()


def lr(h: Tensor) -> Tensor:
    """A step size below 2 over the largest curvature, whatever h is."""
    return 1 / (1 + h.max().exp())


step = hf.gradient_descent_map(inner_loss, lr)


def solver(steps: int) -> hf.inner_solvers.IterativeSolver:
    return hf.iterate(step, steps, init=lambda h, train, start: start)


def main(argv: list[str] | None = None) -> dict:
    args = common.options(
        argv,
        __doc__,
        "logistic_regression",
        steps=(10, "inner steps and CG steps in an outer step"),
        iterations=(1000, "outer steps"),
        outer_lr=(0.02, "of Adam on h"),
        seed=(0, "of the split"),
    )
    train, validation, test = classes_from(INFORMATIVE, FEATURES, seed=args.seed)
    zeros = torch.zeros(train.x.shape[1], dtype=train.x.dtype)

    def outer_loss(w: Tensor, h: Tensor, *_) -> Tensor:
        return F.binary_cross_entropy_with_logits(validation.x @ w, validation.y)

    def scores(h: Tensor) -> tuple[float, float, float]:
        w = newton(h, train)
        logits = test.x @ w
        loss = F.binary_cross_entropy_with_logits(logits, test.y)
        hits = ((logits > 0) == (test.y > 0)).double().mean()
        return outer_loss(w, h).item(), loss.item(), hits.item()

    h = torch.full_like(zeros, -5.0)
    exact = hf.hypergrad(
        lambda h, train, start: newton(h, train), outer_loss, inner_loss=inner_loss, method="dense"
    )(h, train, zeros)
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    for k in tqdm(COUNTS, desc="hypergradients", unit="k"):
        for name, method in METHODS.items():
            hypergradient = hf.hypergrad(solver(k), outer_loss, method=method(k))
            error = hypergradient(h, train, zeros) - exact
            errors[name].append((error.norm() / exact.norm()).item())

    by_count = {str(k): [errors[name][i] for name in METHODS] for i, k in enumerate(COUNTS)}
    common.table("relative error after k steps", dict.fromkeys(METHODS, ".1e"), by_count)

    grid = {value: torch.full_like(h, value) for value in torch.arange(-9.0, 1.0).tolist()}
    single = min(grid, key=lambda value: scores(grid[value])[0])
    hypergradient = hf.hypergrad_and_solution(
        solver(args.steps), outer_loss, method=hf.CG(maxiter=args.steps, rtol=0.0)
    )
    learned, w, adjoint, curve = grid[single].clone(), newton(grid[single], train), None, []
    optimizer = torch.optim.Adam([learned], lr=args.outer_lr)
    for _ in (bar := tqdm(range(args.iterations), desc="outer steps", unit="it")):
        grads, solution = hypergradient(learned, train, w, adjoint_init=adjoint)
        w, adjoint = solution.params, solution.adjoint
        curve.append(solution.value.item())
        bar.set_postfix(validation=f"{curve[-1]:.4f}")
        hf.assign_grads(learned, grads)
        optimizer.step()
    rows = {
        "almost none (1e-4)": scores(torch.full_like(h, math.log(1e-4))),
        f"one, the best of {len(grid)}": scores(grid[single]),
        "one a feature, learned": scores(learned),
    }
    columns = {"validation loss": ".4f", "test loss": ".4f", "accuracy": ".1%"}
    common.table("L2 regulariser", columns, rows)
    common.save(args, picture(errors, curve, learned), rows=rows, errors=errors, curve=curve)
    return {"rows": rows, "errors": errors}


def newton(h: Tensor, train: Rows) -> Tensor:
    """The minimum, to rounding."""
    w = torch.zeros_like(h)
    derivatives = torch.func.grad(inner_loss), torch.func.hessian(inner_loss)
    for _ in range(20):
        gradient, hessian = (derivative(w, h, train, w) for derivative in derivatives)
        w = w - torch.linalg.solve(hessian, gradient)
    return w


def picture(errors: dict, curve: list[float], learned: Tensor) -> Figure:
    figure, (left, middle, right) = common.panels(3, (12.5, 3.8))
    common.curves(left, errors, ".-", COUNTS, xscale="log", yscale="log")
    title = "relative error of the hypergradient"
    left.set(title=title, xlabel="k (inner steps, solver steps)")
    common.curves(middle, {"learned": curve}, title="validation loss", xlabel="outer step")
    log10 = (learned / math.log(10)).tolist()
    kinds = [log10[:INFORMATIVE], log10[INFORMATIVE:]]
    right.hist(kinds, bins=20, stacked=True, label=["informative features", "others"])
    right.set(title="learned regularisers", xlabel="log10 of a regulariser", ylabel="features")
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    common.run(main)
