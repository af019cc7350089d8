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

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

import hyperfunc as hf

WIDTH, DROPOUT, DECAY = 16, 0.5, 5e-3


class Graph(NamedTuple):
    name: str
    X: Tensor  # features of the nodes
    y: Tensor  # their classes
    S: Tensor  # the normalised adjacency matrix D^(-1/2) (A + I) D^(-1/2), sparse
    parts: tuple[Tensor, ...]  # the nodes for training, validation and test

    def accuracy(self, scores: Tensor) -> list[float]:
        hits = (scores.argmax(1) == self.y).double()
        return [hits[part].mean().item() for part in self.parts]


def graph_of(name, X, y, edges, parts):
    index = torch.cat([edges.T, edges.T.flip(0), torch.arange(len(y)).repeat(2, 1)], dim=1)
    root = torch.bincount(index[0]).float().rsqrt()
    S = torch.sparse_coo_tensor(index, root[index].prod(0), (len(y), len(y)), check_invariants=True)
    return Graph(name, F.normalize(X, dim=1), y, S.coalesce(), parts)


def cora(root: Path) -> Graph:
    data = np.load(root / "cora" / "cora.npz")
    keys = ("edges", "y", "row_ptr", "col")
    edges, y, row_ptr, col = (torch.tensor(data[key]).long() for key in keys)
    X = torch.zeros(len(y), 1433)
    X[torch.arange(len(y)).repeat_interleave(row_ptr.diff()), col] = 1  # a bag of words
    parts = torch.arange(140), torch.arange(140, 640), torch.tensor(data["test"])
    return graph_of("Cora", X, y, edges, parts)


def block_model(nodes: int = 600, classes: int = 4, features: int = 32) -> Graph:
    """A synthetic graph: classes whose members are linked more often, and noisy features."""
    y, pairs = torch.randint(classes, (nodes,)), torch.combinations(torch.arange(nodes))
    chance = torch.where(y[pairs[:, 0]] == y[pairs[:, 1]], 0.025, 0.003)
    edges = pairs[torch.rand(len(pairs)) < chance]
    X = torch.randn(nodes, features) + 0.7 * F.one_hot(y, features)
    parts = torch.randperm(nodes).split([10 * classes, 150, nodes - 150 - 10 * classes])
    return graph_of("SYNTHETIC block model", X, y, edges, parts)


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
    args = parser().parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    graph = cora(Path(args.root)) if args.root else block_model()
    rows = {
        "logistic regression, no graph": [linear(graph, 0)],
        "two-hop linear": [linear(graph, 2)],
    }
    with tqdm(total=(len(args.kappa) + args.seeds - 1) * args.epochs, unit="epoch") as bar:
        runs = [implicit(graph, kappa, 0, args, bar) for kappa in args.kappa]
        chosen = max(runs, key=lambda run: run["best"][1])
        more = [implicit(graph, chosen["kappa"], seed, args, bar) for seed in range(1, args.seeds)]
    name = f"implicit network, kappa {chosen['kappa']}"
    rows[name] = [run["best"] for run in (chosen, *more)]
    print(f"\naccuracy on {graph.name}: {len(graph.y)} nodes, {len(graph.parts[0])} labelled")
    for title, accuracies in rows.items():
        _, val, test = (statistics.mean(column) for column in zip(*accuracies, strict=True))
        tests = ", ".join(f"{row[2]:.1%}" for row in accuracies)
        note = f" (seeds: {tests})" if len(accuracies) > 1 else ""
        print(f"{title:32s}validation {val:.1%}   test {test:.1%}{note}")
    numbers = {"graph": graph.name, "rows": rows, "runs": runs}
    settings = vars(args) | {"out": None, "root": None}
    (args.out / "results.json").write_text(json.dumps(numbers | {"settings": settings}) + "\n")

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for run in runs:
        epochs = range(5, args.epochs + 1, 5)
        axis.plot(epochs, [row[1] for row in run["curve"]], label=f"implicit, kappa {run['kappa']}")
    for (title, ((_, val, _), *_)), style in zip(list(rows.items())[:2], (":", "--"), strict=True):
        axis.axhline(val, color="black", ls=style, label=title)
    axis.set(title=f"validation accuracy on {graph.name}", xlabel="epoch")
    axis.legend(fontsize=8)
    figure.savefig(args.out / "picture.png", dpi=110)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--root", default=os.environ.get("HYPERFUNC_DATA"), help="folder with cora/; '': synthetic")
    add("--kappa", type=float, nargs="+", default=[0.5, 0.8, 0.9], help="tried on validation")
    add("--seeds", type=int, default=3, help="networks trained with the chosen kappa")
    add("--epochs", type=int, default=100, help="full-batch steps of Adam")
    add("--out", type=Path, default=Path("out/implicit_graph"), help="folder for results")
    return parser


if __name__ == "__main__":
    main()
