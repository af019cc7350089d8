"""A scikit-learn estimator that tunes a penalty for each feature by hypergradients.

`PenalisedFeatures` is a logistic regression like scikit-learn's, which fits it; but each feature
has its own L2 penalty, and all of them are tuned on the loss over the folds of a cross-validation,
by its gradient. In `Pipeline`, `cross_validate` and `clone` it is an estimator like any other.

    python examples/sklearn_estimator.py

The data are scikit-learn's `make_classification`, synthetic: most features tell nothing.

`hf.from_numpy` puts scikit-learn's solver between tensors. A fold is a vector of weights, zero for
the samples that are held out, so that folds need not have the same size, and `vmap` maps over them.
"""

from __future__ import annotations

import time

import common
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import hyperfunc as hf

SCORES = ["neg_log_loss", "accuracy"]


def losses(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(X @ w[1:] + w[0], y, reduction="none")


def inner_loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return weights @ losses(w, X, y) + (h.exp() * w[1:] ** 2).sum() / 2


def held_out_loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return (1 - weights) @ losses(w, X, y) / (1 - weights).sum()


@hf.from_numpy
def solve(h: np.ndarray, X: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    scale = np.exp(-h / 2)  # to a feature so scaled, all penalties are the same
    model = LogisticRegression(tol=1e-8, max_iter=1000).fit(X * scale, y, weights)
    return np.concatenate([model.intercept_, model.coef_[0] * scale])


class PenalisedFeatures(ClassifierMixin, BaseEstimator):
    def __init__(self, cv: int = 5, steps: int = 40, lr: float = 0.2) -> None:
        self.cv, self.steps, self.lr = cv, steps, lr

    def fit(self, X: np.ndarray, y: np.ndarray) -> PenalisedFeatures:
        self.classes_, labels = np.unique(y, return_inverse=True)
        data = torch.tensor(X, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
        folds = torch.ones(self.cv, len(X), dtype=torch.float64)
        for weights, (_, held_out) in zip(folds, KFold(self.cv).split(X), strict=True):
            weights[held_out] = 0
        one = hf.hypergrad_and_value(solve, held_out_loss, inner_loss=inner_loss, method="cg")
        every = torch.func.vmap(one, in_dims=(None, None, None, 0))  # fold
        h = torch.zeros(X.shape[1], dtype=torch.float64)
        optimizer = hf.optim.adam(hf.optim.cosine(self.lr, self.steps))
        state, self.losses_ = optimizer.init(h), []
        for _ in range(self.steps):
            grads, values = every(h, *data, folds)
            self.losses_.append(values.mean().item())
            h, state = optimizer.update(grads.mean(0), state, h)
        self.penalties_ = h.exp().numpy()
        self.coef_ = solve(h, *data, torch.ones_like(folds[0])).numpy()
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-(X @ self.coef_[1:] + self.coef_[0])))
        return np.stack([1 - p, p], axis=1)

    def predict(self, X: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(X).argmax(1)]


def main(argv: list[str] | None = None) -> None:
    args = common.options(argv, __doc__, "sklearn_estimator", folds=(5, "none seen in a fit"))
    X, y = make_classification(400, 40, n_informative=5, n_redundant=0, random_state=0)
    models = {
        "LogisticRegression, C = 1": LogisticRegression(max_iter=1000),
        "the best of 13 values of C": GridSearchCV(
            LogisticRegression(max_iter=1000), {"C": np.logspace(-3, 3, 13)}, scoring=SCORES[0]
        ),
        "a penalty for each feature": PenalisedFeatures(),
    }
    cv = KFold(args.folds, shuffle=True, random_state=0)
    rows = {}
    for name, model in models.items():
        pipeline, begin = make_pipeline(StandardScaler(), model), time.process_time()
        scores = cross_validate(pipeline, X, y, cv=cv, scoring=SCORES)
        seconds = (time.process_time() - begin) / args.folds
        rows[name] = [*(scores[f"test_{score}"].mean() for score in SCORES), seconds]
    columns = {"minus log loss": ".3f", "accuracy": ".1%", "seconds a fit": ".3f"}
    common.table(f"mean over {args.folds} folds", columns, rows)
    tuned = make_pipeline(StandardScaler(), PenalisedFeatures()).fit(X, y)[-1]
    figure, (curve, learned) = common.panels(2, (12, 4.2))
    common.curves(curve, {"over the folds": tuned.losses_}, title="loss", xlabel="outer step")
    learned.bar(range(len(tuned.penalties_)), np.log10(tuned.penalties_))
    learned.set(title="penalties (log10)", xlabel="feature")
    common.save(args, figure, rows=rows)


if __name__ == "__main__":
    common.run(main)
