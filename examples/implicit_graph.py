"""An implicit graph network: node classification by a fixed point over the whole graph.

The states Z of the nodes are a graph convolution repeated for ever, so that all nodes contribute:

    Z = tanh(S (kappa Z W + X B) + b).

S, the normalised adjacency matrix, and W have spectral norm 1, so that for kappa < 1 there is one
solution. `hf.implicit_diff` differentiates it in the memory of one convolution; the rest is an
ordinary training loop. The data are the citations of Cora, in DIR/cora/cora.npz (by default DIR is
the variable HYPERFUNC_DATA), or else a SYNTHETIC graph, a stochastic block model. Kappa, the epoch
and the regulariser of the linear baselines are chosen on the validation nodes.

    python examples/implicit_graph.py --root DIR

References: Gu et al., Implicit graph neural networks, 2020, arXiv 2009.06211; the baseline: Wu et
al., Simplifying graph convolutional networks, 2019, arXiv 1902.07153.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import common
import torch
import torch.nn.functional as F
from datasets import Graph, block_model, cora
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import hyperfunc as hf

WIDTH, DROPOUT, DECAY = 16, 0.5, 5e-3


def linear(graph: Graph, hops: int) -> list[float]:
    """Logistic regression on features averaged over neighbours, `hops` times."""
    X, runs, train = graph.X, [], graph.parts[0]
    for _ in range(hops):
        X = graph.S @ X
    for C in [10.0**k for k in range(-1, 4)]:
        model = LogisticRegression(C=C, max_iter=500).fit(X[train], graph.y[train])
        runs.append(graph.accuracy(torch.tensor(model.decision_function(X))))
    return max(runs, key=lambda accuracies: accuracies[1])


def implicit(graph: Graph, kappa: float, seed: int, args: Any, bar: Any) -> dict[str, Any]:
    """Train one network; its accuracies are those of the epoch that is best on validation."""
    torch.manual_seed(seed)
    width, classes, features = WIDTH, int(graph.y.max()) + 1, graph.X.shape[1]
    sizes = {"W": (width, width), "B": (features, width), "b": (width,), "out": (width, classes)}
    weights = {k: torch.randn(n) * (2 / sum(n)) ** 0.5 for k, n in sizes.items()}
    weights["W"] = torch.zeros(width, width)  # to which the identity is added
    weights = {k: weight.requires_grad_() for k, weight in weights.items()}

    SX = graph.S @ graph.X

    def phi(Z, hparams):
        return torch.tanh(kappa * (graph.S @ Z) @ hparams["W"] + hparams["input"])

    solver = hf.iterate(phi, 300, init=lambda h: torch.zeros_like(h["input"]), rtol=1e-3)
    equilibrium = hf.implicit_diff(solver, method=hf.FixedPoint(maxiter=300, rtol=1e-3))

    def scores(dropout):
        W = weights["W"] + torch.eye(width)
        hparams = {
            "W": W / torch.linalg.matrix_norm(W, 2),
            "input": F.dropout(SX @ weights["B"], dropout) + weights["b"],
        }
        return F.dropout(equilibrium(hparams), dropout) @ weights["out"]

    optimizer = torch.optim.Adam(weights.values(), lr=0.03, weight_decay=DECAY)
    curve = []
    for epoch in range(args.epochs):
        optimizer.zero_grad()
        train = graph.parts[0]
        F.cross_entropy(scores(DROPOUT)[train], graph.y[train]).backward()
        optimizer.step()
        if epoch % 5 == 4:
            with torch.no_grad():
                curve.append(graph.accuracy(scores(0.0)))
            bar.set_postfix(kappa=kappa, validation=curve[-1][1])
        bar.update()
    return {
        "kappa": kappa,
        "best": max(curve, key=lambda accuracies: accuracies[1]),
        "curve": curve,
    }


def main(argv: list[str] | None = None) -> None:
    args = common.options(
        argv,
        __doc__,
        "implicit_graph",
        root=(os.environ.get("HYPERFUNC_DATA"), "folder with cora/; '': synthetic"),
        kappa=([0.5, 0.8, 0.9], "tried on validation"),
        seeds=(3, "networks trained with the chosen kappa"),
        epochs=(100, "full-batch steps of Adam"),
    )
    torch.manual_seed(0)
    graph = cora(args.root) if args.root else block_model()
    with tqdm(total=(len(args.kappa) + args.seeds - 1) * args.epochs, unit="epoch") as bar:
        runs = [implicit(graph, kappa, 0, args, bar) for kappa in args.kappa]
        chosen = max(runs, key=lambda run: run["best"][1])
        more = [implicit(graph, chosen["kappa"], seed, args, bar) for seed in range(1, args.seeds)]
    rows = {
        "logistic regression, no graph": [linear(graph, 0)],
        "two-hop linear": [linear(graph, 2)],
        f"implicit network, kappa {chosen['kappa']}": [run["best"] for run in (chosen, *more)],
    }
    nodes = f"{len(graph.y)} nodes, {len(graph.parts[0])} labelled"
    cells = {}
    for title, accuracies in rows.items():
        _, val, test = (statistics.mean(column) for column in zip(*accuracies, strict=True))
        tests = ", ".join(f"{row[2]:.1%}" for row in accuracies) if len(accuracies) > 1 else ""
        cells[title] = val, test, tests
    columns = {"validation": ".1%", "test": ".1%", "test, by seed": "s"}
    common.table(f"accuracy on {graph.name}: {nodes}", columns, cells)

    figure, (axis,) = common.panels(1, (7, 3.6))
    lines = {f"implicit, kappa {run['kappa']}": [row[1] for row in run["curve"]] for run in runs}
    epochs = range(5, args.epochs + 1, 5)
    for (title, (val, *_)), style in zip(list(cells.items())[:2], (":", "--"), strict=True):
        axis.axhline(val, color="black", ls=style, label=title)
    title = f"validation accuracy on {graph.name}"
    common.curves(axis, lines, x=epochs, title=title, xlabel="epoch")
    axis.legend(fontsize=8, loc="lower right")
    common.save(args, figure, graph=graph.name, rows=rows, runs=runs)


if __name__ == "__main__":
    common.run(main)
