"""Three levels: a regulariser of learned weights of the data, learned on data that neither saw.

Of the labels of the training images, half are drawn anew. The lowest level trains a classifier on
them, with a weight for each; the middle one learns these weights from a few clean images, and the
top one learns, on further images, how strongly the weights are pulled back to one half: by one
regulariser for each class. The solution of the lowest level is `hf.implicit_diff` of its solver, so
that the middle loss is an ordinary function, and the hypergradient of the top goes through both.

    python examples/three_levels.py --out out/three_levels
"""

from __future__ import annotations

from typing import Any

import common
import datasets
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

SIZES = (200, 40, 400, 1000)  # images for the three levels and for the test
Data = tuple[datasets.Rows, ...]


def load() -> tuple[Data, Tensor]:
    """Images of 4 x 4 pixels with a constant, and which of the labels for training are wrong."""
    parts = datasets.digits(*SIZES)
    pooled = [F.avg_pool2d(part.x.double().reshape(-1, 1, 8, 8), 2).flatten(1) for part in parts]
    rows = [
        datasets.Rows(F.pad(2 * x - 1, (0, 1), value=1.0), part.y)
        for x, part in zip(pooled, parts, strict=True)
    ]
    noisy, wrong = datasets.mislabelled(rows[0], share=0.5)
    return (noisy, *rows[1:]), wrong


def training_loss(W: Tensor, logits: Tensor, data: Data) -> Tensor:
    """The lowest level: weights of samples times their losses."""
    losses = F.cross_entropy(data[0].x @ W, data[0].y, reduction="none")
    return (logits.sigmoid() * losses).mean() + 5e-4 * (W**2).sum()


@hf.implicit_diff(inner_loss=training_loss, method="dense")
def train(logits: Tensor, data: Data) -> Tensor:
    start = torch.zeros(data[0].x.shape[1], 10, dtype=data[0].x.dtype)
    settings = {"max_iter": 200, "tolerance_grad": 1e-7, "tolerance_change": 1e-14}
    return common.lbfgs(lambda W: training_loss(W, logits, data), start, **settings)


def weighting_loss(logits: Tensor, log_reg: Tensor, data: Data, *args: Any) -> Tensor:
    """The middle level: the loss on clean images, and a regulariser for each (noisy) class."""
    pull = (log_reg.exp()[data[0].y] * logits**2).mean()
    return cross_entropy(train(logits, data), data[1]) + pull


def learn_weights(log_reg: Tensor, data: Data, start: Tensor) -> Tensor:
    settings = {"max_iter": 60, "tolerance_grad": 1e-6, "tolerance_change": 1e-12}
    return common.lbfgs(lambda logits: weighting_loss(logits, log_reg, data), start, **settings)


def top_loss(logits: Tensor, log_reg: Tensor, data: Data, *args: Any) -> Tensor:
    return cross_entropy(train(logits, data), data[2])


def cross_entropy(W: Tensor, rows: datasets.Rows) -> Tensor:
    return F.cross_entropy(rows.x @ W, rows.y)


hypergrad = hf.hypergrad_and_solution(
    learn_weights, top_loss, inner_loss=weighting_loss, method=hf.CG(rtol=1e-3)
)


def learn_regularisers(data: Data, start: Tensor, steps: tqdm) -> dict[str, Any]:
    """Adam on one regulariser a class, from one for all, with warm starts below."""
    log_reg, logits = torch.full((10,), -3.0, dtype=torch.float64), start
    optimizer = hf.optim.adam(lr=0.5)
    memory, values = optimizer.init(log_reg), []
    for _ in steps:
        grads, solution = hypergrad(log_reg, data, logits)
        values.append(solution.value.item())
        logits, best = solution.params, log_reg
        log_reg, memory = optimizer.update(grads, memory, log_reg)
    return {"log_reg": best, "logits": logits, "values": values}


def row(W: Tensor, data: Data, wrong: Tensor, logits: Tensor | None = None) -> list[float | None]:
    """Losses on the clean images of the middle and of the top level, accuracy on the test, AUC."""
    losses = [cross_entropy(W, part).item() for part in data[1:3]]
    hits = ((data[3].x @ W).argmax(1) == data[3].y).double().mean().item()
    auc = None if logits is None else roc_auc_score(wrong, -logits)
    return [*losses, hits, auc]


def picture(grid: dict[float, float], learned: dict[str, Any]) -> Figure:
    figure, (left, right) = common.panels(2, (10, 4))
    common.curves(
        left, {"one for all classes": [*grid.values()]}, "o-", [*grid], xlabel="log regulariser"
    )
    left.axhline(learned["values"][-1], color="C1", label="one a class, learned")
    left.set_ylabel("loss on the images of the top level")
    left.legend()
    right.bar(range(10), learned["log_reg"].tolist(), color="C1")
    right.set(xlabel="class", ylabel="log regulariser, learned", xticks=range(10))
    return figure


def main(argv: list[str] | None = None) -> dict[str, list[float | None]]:
    args = common.options(argv, __doc__, "three_levels", steps=(15, "outer steps"))
    data, wrong = load()
    logits = torch.zeros(len(wrong), dtype=torch.float64)
    alone = (data[1], *data[1:])
    rows = {
        "all weights alike": row(train(logits, data), data, wrong),
        "the clean images alone": row(train(logits[: len(data[1].y)], alone), data, wrong),
    }
    grid, found = {}, {}
    for level in tqdm((-2.0, -3.0, -4.0, -5.0, -6.0), desc="one regulariser", unit="value"):
        log_reg = torch.full((10,), level, dtype=torch.float64)
        logits = learn_weights(log_reg, data, logits)
        grid[level], found[level] = top_loss(logits, log_reg, data).item(), logits
    best = min(grid, key=grid.__getitem__)
    for name, level in (
        ("weights, hardly regularised", min(grid)),
        ("weights, the best of 5", best),
    ):
        rows[name] = row(train(found[level], data), data, wrong, found[level])
    steps = tqdm(range(args.steps), desc="one a class", unit="step")
    learned = learn_regularisers(data, found[-3.0], steps)
    weights = learned["logits"]
    rows["weights, one a class learned"] = row(train(weights, data), data, wrong, weights)
    columns = {"middle loss": ".3f", "top loss": ".3f", "test accuracy": ".1%", "AUC": ".3f"}
    common.table(f"{wrong.sum()} of {len(wrong)} labels wrong", columns, rows)
    common.save(args, picture(grid, learned), rows=rows, grid=grid, values=learned["values"])
    return rows


if __name__ == "__main__":
    common.run(main)
