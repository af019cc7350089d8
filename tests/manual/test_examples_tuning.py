"""The examples that tune, weigh and distil: that they run, and that what they claim holds."""

import json

import any_solver
import data_weights_lm
import dataset_distillation
import datasets
import hyper_cleaning
import influence
import logistic_regression
import per_feature_l2
import pytest
import sklearn_estimator
import torch
import training_loop
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


@pytest.fixture
def texts(monkeypatch):
    """A few sparse texts instead of the docstrings, with words that tell and words that do not."""

    def load(*shares, seed=0):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(3).repeat_interleave(80)[torch.randperm(240, generator=generator)]
        x = (torch.rand(240, 24, generator=generator) < 0.2).float()
        x[torch.arange(240), 2 * y] = 1
        x = torch.nn.functional.normalize(x)
        rows = [round(share * 240) for share in shares]
        parts = zip(x[: sum(rows)].split(rows), y[: sum(rows)].split(rows), strict=True)
        sparse = [datasets.Rows(part.to_sparse().coalesce(), labels) for part, labels in parts]
        return sparse, [f"word{j}" for j in range(24)]

    monkeypatch.setattr(any_solver, "docstrings", load)
    monkeypatch.setattr(per_feature_l2, "docstrings", load)


def check_files(out):
    assert (out / "picture.png").stat().st_size > 10_000
    return json.loads((out / "results.json").read_text())


def test_hypergradients_do_not_depend_on_the_solver(texts, tmp_path):
    rows = any_solver.main(["--iterations=2", f"--out={tmp_path}"])["rows"]
    expected = rows.pop("central differences")
    assert set(rows) == set(any_solver.SOLVERS)
    for row in rows.values():
        for name in expected:
            assert row[name] == pytest.approx(expected[name], rel=1e-3)
    check_files(tmp_path)


def test_regularisers_tell_words_apart_and_fit_the_validation_part(texts, tmp_path):
    rows = per_feature_l2.main(["--iterations=40", "--outer-lr=0.1", f"--out={tmp_path}"])
    single, early, late, _ = rows.values()
    assert late["validation"][0] < single["validation"][0]
    assert early["stop"][0] <= min(single["stop"][0], late["stop"][0])
    results = check_files(tmp_path)
    assert len(results["history"]) == 40
    log_l2 = torch.tensor(results["log_l2"])
    tell = torch.tensor([0, 2, 4])
    assert log_l2[tell].max() < log_l2.median()


@pytest.mark.slow
def test_errors_fall_with_k_and_learned_regularisers_pay(tmp_path):
    result = logistic_regression.main(["--iterations=60", "--outer-lr=0.1", f"--out={tmp_path}"])
    errors = result["errors"]
    for reverse, fixed_point, cg in zip(*errors.values(), strict=True):
        assert cg < fixed_point < reverse
    assert all(values[-1] < 0.05 for values in errors.values())
    _, single, learned = result["rows"].values()
    assert learned[1] < single[1]  # on the test rows
    check_files(tmp_path)


def test_wrong_labels_get_small_weights(tmp_path):
    rows = hyper_cleaning.main(["--data=digits", "--iterations=25", f"--out={tmp_path}"])
    assert rows["auc"] > 0.9
    assert rows["a learned weight a sample"] > rows["noisy labels as they are"]
    check_files(tmp_path)


@pytest.mark.slow
def test_every_method_tells_sequences_from_noise(monkeypatch, tmp_path):
    def documents(length, *counts):
        more = [(torch.randint(96, (60, 1)) + 3 * torch.arange(length)) % 96 for _ in counts]
        return [torch.cat([more[0], torch.randint(96, (60, length))]), *more[1:]]

    monkeypatch.setattr(data_weights_lm, "docstrings_and_code", documents)
    rows = data_weights_lm.main(["--steps=60", f"--out={tmp_path}"])
    assert len(rows) == 6
    assert rows["the good half alone"][1] < rows["all documents"][1]
    for name in ("sama", "f2sa", "soba", "truncated"):
        assert rows[name][2] > 0.8, name
        assert rows[name][1] < rows["all documents"][1], name
    check_files(tmp_path)


@pytest.mark.slow
def test_influences_are_what_leaving_out_does(tmp_path):
    rows = influence.main(["--samples=30", f"--out={tmp_path}"])
    for model, bound in zip(influence.MODELS, (0.95, 0.6), strict=True):
        for name in ("the Hessian", "Gauss-Newton", "the Hessian, damped"):
            assert rows[f"{model}, {name}"][0] > bound, name
        assert rows[f"{model}, gradients alone"][0] < rows[f"{model}, Gauss-Newton"][0]
    check_files(tmp_path)


def test_influences_of_a_softmax_regression_have_their_closed_form():
    """By the Hessian ``X^T (diag p - p p^T) X / n + reg``, which the Gauss-Newton matrix equals."""
    rows, other = (datasets.Rows(x.double(), y) for x, y in datasets.digits(60, 40))
    w, _ = influence.fit(torch.zeros(640, dtype=torch.float64), torch.ones(60).double(), rows)
    W, eye = w.view(64, 10), torch.eye(10, dtype=torch.float64)
    p, p_other = (rows.x @ W).softmax(1), (other.x @ W).softmax(1)
    middle = p[:, :, None] * eye - p[:, :, None] * p[:, None]
    H = torch.einsum("na,nb,ncd->acbd", rows.x, rows.x, middle).reshape(640, 640) / 60
    H = H + influence.REG * torch.eye(640, dtype=torch.float64)
    of_samples = (rows.x[:, :, None] * (p - eye[rows.y])[:, None]).reshape(60, 640) / 60
    of_other = (other.x.T @ (p_other - eye[other.y])).reshape(640) / 40
    expected = of_samples @ torch.linalg.solve(H, of_other)
    for name in ("the Hessian", "Gauss-Newton"):
        found = influence.influences(w, rows, other, *influence.METHODS[name])
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def test_ten_learned_images_train_better_than_ten_means(tmp_path):
    rows = dataset_distillation.main(["--iterations=25", f"--out={tmp_path}"])
    assert rows["one learned image a class"] > rows["the mean image of each class"]
    check_files(tmp_path)


@pytest.mark.slow
def test_a_loop_that_starts_too_slowly_speeds_up(tmp_path):
    rows = training_loop.main(["--windows=30", f"--out={tmp_path}"])
    left, _, tuned = rows.values()
    assert tuned["history"][-1]["lr"] > 3 * training_loop.START["lr"]
    (left_loss, _), (tuned_loss, _) = left["scores"][1], tuned["scores"][1]
    assert tuned_loss < 0.8 * left_loss  # on the test digits
    check_files(tmp_path)


@pytest.mark.slow
def test_the_estimator_is_one_of_scikit_learn_and_prunes_features():
    data = {"n_informative": 3, "n_redundant": 0, "shuffle": False, "class_sep": 1.5}
    X, y = make_classification(150, 12, random_state=0, **data)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).numpy()
    X, y = X[order], y[order]
    model = sklearn_estimator.PenalisedFeatures(cv=4, steps=15)
    assert clone(model).get_params() == {"cv": 4, "steps": 15, "lr": 0.2}
    names = ["no", "yes"]
    pipeline = make_pipeline(StandardScaler(), model)
    scores = cross_val_score(pipeline, X, [names[label] for label in y], cv=3)
    assert scores.mean() > 0.7
    fitted = pipeline.fit(X, y)[-1]
    assert fitted.losses_[-1] < fitted.losses_[0]
    assert fitted.penalties_[:3].max() < sorted(fitted.penalties_[3:])[4]


def test_docstrings_are_sparse_texts_of_many_modules():
    (train, test), words = datasets.docstrings(0.5, 0.5)
    assert train.x.is_sparse
    assert train.x.shape[1] == test.x.shape[1] == len(words) > 1000
    assert set(train.y.tolist()) == set(range(len(datasets.DOCUMENTED)))
    again, _ = datasets.docstrings(0.5, 0.5)
    assert torch.equal(again[0].x.to_dense(), train.x.to_dense())


def test_newsgroups_are_not_downloaded(tmp_path):
    with pytest.raises(OSError, match=r"(?i)20newsgroups|download"):
        datasets.newsgroups(tmp_path, 0.5, 0.5)


@pytest.mark.parametrize(
    ("load", "count", "pixels"),
    [
        (datasets.digits, 1797, 64),
        pytest.param(datasets.mnist, 5000, 784, marks=pytest.mark.slow),
    ],
)
def test_images_come_in_parts_that_do_not_overlap(load, count, pixels):
    parts = load(700, count - 700)
    again = load(700, count - 700)
    rows, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert rows.shape == (count, pixels)
    assert len(rows.unique(dim=0)) > 0.99 * count  # hardly any image is there twice
    assert set(labels.tolist()) == set(range(10))
    assert rows.min() == 0
    assert rows.max() == 1
    assert torch.equal(parts[1].x, again[1].x)
