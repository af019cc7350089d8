"""Dataset distillation: one synthetic image a class that trains a classifier of handwritten digits.

The outer variables are the pixels of ten images, one for each digit. A softmax regression is fitted
to these ten images alone, with an L2 regulariser,

    W*(images) = argmin_W  cross_entropy(images W, 0..9) + reg / 2 ||W||^2,

and the images are moved to lower the loss of W* on 1000 real digits. L-BFGS of torch.optim solves
the inner problem and the implicit gradient takes a few steps of CG, both from where they stood, so
no step of the fit is differentiated or stored.

    python examples/dataset_distillation.py

Reference: Wang, Zhu, Torralba and Efros, Dataset distillation, 2018, arXiv 1811.10959; by implicit
gradients: Lorraine, Vicol and Duvenaud, 2019, arXiv 1911.02590, section 5.4.
"""

from __future__ import annotations

import common
import torch
import torch.nn.functional as F
from datasets import Rows, digits
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

REG = 0.01
LABELS = torch.arange(10)


def inner_loss(W: Tensor, images: Tensor, real: Rows, start: Tensor) -> Tensor:
    return F.cross_entropy(images @ W, LABELS) + 0.5 * REG * (W**2).sum()


def outer_loss(W: Tensor, images: Tensor, real: Rows, start: Tensor) -> Tensor:
    return F.cross_entropy(real.x @ W, real.y)


def fit(images: Tensor, real: Rows, start: Tensor) -> Tensor:
    """The minimum of the inner loss, by an optimiser of torch.optim as anyone would call it."""
    return common.lbfgs(lambda W: inner_loss(W, images, real, start), start, max_iter=25)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = common.options(
        argv,
        __doc__,
        "dataset_distillation",
        iterations=(800, "outer steps"),
        lr=(0.05, "of Adam on the pixels"),
        seed=(0, "of the split and the start"),
    )
    train, test = digits(1000, 797, seed=args.seed)

    zeros = torch.zeros(64, 10)

    def hits(W: Tensor) -> float:
        return ((test.x @ W).argmax(1) == test.y).float().mean().item()

    def accuracy(images: Tensor) -> float:
        return hits(fit(images, train, zeros))

    means = torch.stack([train.x[train.y == label].mean(0) for label in range(10)])
    random = torch.Generator().manual_seed(args.seed)
    firsts = []  # one real image a class, drawn at random, twenty times
    for _ in range(20):
        order = torch.randperm(len(train.y), generator=random)
        x, y = train.x[order], train.y[order]
        firsts.append(torch.stack([x[y == label][0] for label in range(10)]))
    rows = {
        "a random real image a class (mean of 20)": sum(map(accuracy, firsts)) / len(firsts),
        "the mean image of each class": accuracy(means),
    }

    hypergradient = hf.hypergrad_and_solution(
        fit, outer_loss, inner_loss=inner_loss, method=hf.CG(rtol=1e-3)
    )
    images, W, adjoint = firsts[0].clone(), zeros, None
    optimizer = torch.optim.Adam([images], lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    curve = []
    for _ in (bar := tqdm(range(args.iterations), desc="distilling", unit="it")):
        grads, solution = hypergradient(images, train, W, adjoint_init=adjoint)
        W, adjoint = solution.params, solution.adjoint
        hf.assign_grads(images, grads)
        optimizer.step()
        schedule.step()
        images.clamp_(0, 1)  # pixels are ink
        curve.append(solution.value.item())
        bar.set_postfix(loss=f"{curve[-1]:.3f}")
    rows["one learned image a class"] = accuracy(images)

    def full_loss(W: Tensor) -> Tensor:
        return outer_loss(W, images, train, zeros) + 0.5e-3 * (W**2).sum()

    rows[f"all {len(train.y)} real images"] = hits(common.lbfgs(full_loss, zeros, max_iter=25))

    cells = {title: [value] for title, value in rows.items()}
    common.table("softmax regression trained on", {"test accuracy": ".1%"}, cells)
    figure = picture([firsts[0], means, images], list(rows.values()))
    common.save(args, figure, rows=rows, curve=curve)
    return rows


def picture(sets: list[Tensor], accuracies: list[float]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(3, 10)
    titles = ("a real image", "mean images", "learned images")
    for row, images, title, value in zip(axes, sets, titles, accuracies, strict=False):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{title}\n{value:.1%}", fontsize=9)
    figure.suptitle("Ten images that a classifier is trained on, and its accuracy on real digits")
    return figure


if __name__ == "__main__":
    common.run(main)
