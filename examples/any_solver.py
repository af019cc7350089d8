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

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from datasets import Rows, docstrings
from matplotlib.figure import Figure
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


def by_torch_optim(make, steps: int):
    """A solver that is the loop anyone writes over an optimiser of torch.optim."""

    def solver(h: HParams, train: Rows) -> Tensor:
        W = zeros(h, train).requires_grad_()
        optimizer = make([W])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = inner_loss(W, h, train)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return W.detach()

    return solver


def by_scikit_learn(h: HParams, train: Rows, tolerance: float = 1e-9) -> Tensor:
    """The same minimum by other code: arrays go in, arrays come out."""
    indices, n = train.x.indices().numpy(), len(train.y)
    x = scipy.sparse.csr_matrix((train.x.values().numpy(), indices), train.x.shape)
    model = LogisticRegression(
        C=1 / (n * h["log_l2"].exp().item()), fit_intercept=False, tol=tolerance, max_iter=1000
    )
    weights = h["log_class_weight"].exp()[train.y]
    model.fit(x, train.y.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(np.ascontiguousarray(model.coef_.T))


SOLVERS = {
    "a loop over torch.optim.SGD": by_torch_optim(
        lambda W: torch.optim.SGD(W, lr=20.0, momentum=0.9, nesterov=True), 300
    ),
    "torch.optim.LBFGS": by_torch_optim(
        lambda W: torch.optim.LBFGS(
            W, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
        ),
        1,
    ),
    "hf.minimize": hf.minimize(
        inner_loss, hf.optim.sgd(lr=20.0, momentum=0.9, nesterov=True), 300, init=zeros
    ),
    "scikit-learn": by_scikit_learn,
}


def main(argv: list[str] | None = None) -> dict:
    args = parser().parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small
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

    expected = {
        "log_l2": difference("log_l2", ()),
        "class 0": difference("log_class_weight", (0,)),
    }
    rows: dict[str, dict[str, float]] = {"central differences": expected}
    for name, solver in SOLVERS.items():
        hypergradient = hf.hypergrad(solver, outer_loss, inner_loss=inner_loss, method="cg")
        began = time.perf_counter()
        grads = hypergradient(start, train)
        rows[name] = {
            "log_l2": grads["log_l2"].item(),
            "class 0": grads["log_class_weight"][0].item(),
            "seconds": time.perf_counter() - began,
        }
    print(f"\n{'hypergradient':30s}{'log_l2':>12s}{'class 0':>12s}{'seconds':>9s}")
    for name, row in rows.items():
        seconds = f"{row['seconds']:9.2f}" if "seconds" in row else ""
        print(f"{name:30s}{row['log_l2']:12.7f}{row['class 0']:12.7f}{seconds}")

    roughly = functools.partial(by_scikit_learn, tolerance=1e-5)
    tune = hf.hypergrad_and_solution(
        roughly, outer_loss, inner_loss=inner_loss, method=hf.CG(rtol=1e-4)
    )
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
    print(f"\n{'cross-entropy':14s}{'at the start':>14s}{'tuned':>10s}")
    for name, values in curve.items():
        print(f"{name:14s}{values[0]:14.4f}{values[-1]:10.4f}")

    args.out.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "curve": curve, "settings": vars(args)}
    (args.out / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    picture(args.out / "picture.png", rows, curve)
    return {"rows": rows, "curve": curve}


def picture(path: Path, rows: dict, curve: dict) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    bars.barh(list(rows)[::-1], [row["log_l2"] for row in rows.values()][::-1], color="#30638e")
    bars.set(title="hypergradient for log_l2, by inner solver")
    for name, values in curve.items():
        curves.plot(values, label=name)
    curves.set(title="cross-entropy, tuned with scikit-learn inside", xlabel="outer step")
    curves.legend(frameon=False)
    figure.savefig(path, dpi=100)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Hypergradients through solvers that nothing can differentiate",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--iterations", type=int, default=12, help="outer steps")
    add("--outer-lr", type=float, default=0.3, help="of Adam on h")
    add("--seed", type=int, default=0, help="of the split")
    add("--out", type=Path, default=Path("out/any_solver"), help="folder for results")
    return parser


if __name__ == "__main__":
    main()
