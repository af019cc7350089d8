"""Any inner solver: sparse inputs, and four programs that fit the same model, one not torch's.

Multinomial logistic regression on sparse features of texts. The outer variables are the logarithm
of an L2 regulariser and a logarithmic weight for each class:

    W*(h) = argmin_W  mean_i exp(c[y_i]) cross_entropy_i(W) + exp(l) / 2 ||W||^2

An implicit method asks only what the solution satisfies, here that it minimises `inner_loss`; how
it was found is nobody's business. The script takes it from a loop over torch.optim.SGD, from
torch.optim.LBFGS, from `hf.minimize`, and from scikit-learn, compares the hypergradients with
finite differences through scikit-learn, and tunes h with scikit-learn as the inner solver.

    python examples/any_solver.py
"""

from __future__ import annotations

import functools
import time

import common
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Rows, csr_matrix, docstrings
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

HParams = dict[str, Tensor]


def inner_loss(W: Tensor, h: HParams, train: Rows) -> Tensor:
    losses = F.cross_entropy(train.x @ W, train.y, reduction="none")
    weights = h["log_class_weight"].exp()[train.y]
    return (weights * losses).mean() + 0.5 * h["log_l2"].exp() * (W**2).sum()


def zeros(h: HParams, train: Rows) -> Tensor:
    return torch.zeros(train.x.shape[1], len(h["log_class_weight"]), dtype=torch.float64)


def by_sgd(h: HParams, train: Rows) -> Tensor:
    """The loop that anyone writes over an optimiser of torch.optim."""
    W = zeros(h, train).requires_grad_()
    optimizer = torch.optim.SGD([W], lr=20.0, momentum=0.9, nesterov=True)
    for _ in range(300):
        optimizer.zero_grad()
        inner_loss(W, h, train).backward()
        optimizer.step()
    return W.detach()


def by_lbfgs(h: HParams, train: Rows) -> Tensor:
    settings = {"max_iter": 200, "tolerance_grad": 1e-9}
    return common.lbfgs(lambda W: inner_loss(W, h, train), zeros(h, train), **settings)


def by_scikit_learn(h: HParams, train: Rows, tolerance: float = 1e-9) -> Tensor:
    """The same minimum by other code: arrays go in, arrays come out."""
    C = 1 / (len(train.y) * h["log_l2"].exp().item())
    model = LogisticRegression(C=C, fit_intercept=False, tol=tolerance, max_iter=1000)
    weights = h["log_class_weight"].exp()[train.y]
    model.fit(csr_matrix(train.x), train.y.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(np.ascontiguousarray(model.coef_.T))


SOLVERS = {
    "a loop over torch.optim.SGD": by_sgd,
    "torch.optim.LBFGS": by_lbfgs,
    "hf.minimize": hf.minimize(
        inner_loss, hf.optim.sgd(lr=20.0, momentum=0.9, nesterov=True), 300, init=zeros
    ),
    "scikit-learn": by_scikit_learn,
}


def main(argv: list[str] | None = None) -> dict:
    args = common.options(
        argv,
        __doc__,
        "any_solver",
        iterations=(12, "outer steps"),
        outer_lr=(0.3, "of Adam on h"),
        seed=(0, "of the split"),
    )
    parts, words = docstrings(0.3, 0.3, 0.4, seed=args.seed)
    train, validation, test = (Rows(part.x.double(), part.y) for part in parts)
    classes = 1 + max(int(part.y.max()) for part in parts)
    start = {
        "log_l2": torch.tensor(-7.0, dtype=torch.float64),
        "log_class_weight": torch.zeros(classes, dtype=torch.float64),
    }
    print(f"{len(words)} sparse features, {len(train.y)} training samples, {classes} classes")

    def outer_loss(W: Tensor, h: HParams, train: Rows) -> Tensor:
        return F.cross_entropy(validation.x @ W, validation.y)

    def difference(name: str, index: tuple[int, ...], size: float = 1e-2) -> float:
        """A central difference of the outer loss through scikit-learn."""
        values = []
        for sign in (1, -1):
            h = {key: tensor.clone() for key, tensor in start.items()}
            h[name][index] += sign * size
            values.append(outer_loss(by_scikit_learn(h, train), h, train).item())
        return (values[0] - values[1]) / (2 * size)

    expected = difference("log_l2", ()), difference("log_class_weight", (0,))
    rows = {"central differences": {"log_l2": expected[0], "class 0": expected[1]}}
    by_class = {}
    for name, solver in SOLVERS.items():
        hypergradient = hf.hypergrad(solver, outer_loss, inner_loss=inner_loss, method="cg")
        began = time.perf_counter()
        grads = hypergradient(start, train)
        seconds = time.perf_counter() - began
        log_l2, by_class[name] = grads["log_l2"].item(), grads["log_class_weight"]
        rows[name] = {"log_l2": log_l2, "class 0": by_class[name][0].item(), "seconds": seconds}
    columns = {"log_l2": ".7f", "class 0": ".7f", "seconds": ".2f"}
    cells = {name: map(row.get, columns) for name, row in rows.items()}
    common.table("hypergradient", columns, cells)

    roughly = functools.partial(by_scikit_learn, tolerance=1e-5)
    cg = hf.CG(rtol=1e-4)
    tune = hf.hypergrad_and_solution(roughly, outer_loss, inner_loss=inner_loss, method=cg)
    h = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = torch.optim.Adam(h.values(), lr=args.outer_lr)
    curve: dict[str, list[float]] = {"validation": [], "test": []}
    for _ in (bar := tqdm(range(args.iterations), desc="tuning by scikit-learn", unit="it")):
        grads, solution = tune(h, train)
        curve["validation"].append(solution.value.item())
        curve["test"].append(F.cross_entropy(test.x @ solution.params, test.y).item())
        bar.set_postfix(validation=f"{curve['validation'][-1]:.4f}")
        hf.assign_grads(h, grads)
        optimizer.step()
    ends = {name: (values[0], values[-1]) for name, values in curve.items()}
    common.table("cross-entropy", {"at the start": ".4f", "tuned": ".4f"}, ends)

    figure, (left, right) = common.panels(2, (10, 3.8))
    for index, (name, grad) in enumerate(by_class.items()):
        common.curves(left, {name: grad}, ".", [k + 0.15 * index for k in range(classes)])
    left.set(title="hypergradient for the class weights", xlabel="class", xticks=range(classes))
    common.curves(right, curve, title="cross-entropy, scikit-learn inside", xlabel="outer step")
    common.save(args, figure, rows=rows, curve=curve)
    return {"rows": rows, "curve": curve}


if __name__ == "__main__":
    common.run(main)
