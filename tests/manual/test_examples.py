"""The smaller examples: that they run, and that their variants agree where they must."""

import json

import datasets
import equilibrium
import fewshot
import implicit_graph
import lasso_path
import learned_learning_rates
import maml
import meta_learning_kin
import pytest
import sharded_hyperparameters
import three_levels
import torch


@pytest.fixture
def run_maml(monkeypatch, tmp_path):
    """Run MAML for three iterations on random drawings; returns its learning curve."""
    images = torch.randint(0, 256, (12, 4, 28, 28), dtype=torch.uint8)
    split = fewshot.Split(images, list("abcdefghijkl"), "noise")
    monkeypatch.setattr(fewshot, "load_glyphs", lambda: fewshot.Data(split, split, split))
    monkeypatch.setattr(fewshot, "VALIDATION_TASKS", 2)
    tiny = ["--ways=2", "--queries=2", "--tasks=2", "--inner-steps=3", "--test-tasks=3"]

    def call(*options):
        out = tmp_path / "-".join(["maml", *options])
        maml.main([*tiny, "--iterations=3", f"--out={out}", *options])
        history = json.loads((out / "results.json").read_text())["history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    return call


def test_maml_replayed_is_maml_unrolled_and_first_order_is_not(run_maml):
    unrolled = run_maml()
    assert run_maml("--replay") == pytest.approx(unrolled, rel=1e-4)
    first_order = run_maml("--first-order")
    assert first_order[0] == pytest.approx(unrolled[0], rel=1e-6)  # before any meta-update
    assert first_order[2] != pytest.approx(unrolled[2], rel=1e-5)


def test_learned_rates_beat_the_best_constant_where_they_are_learned(tmp_path, capsys):
    out = tmp_path / "rates"
    learned_learning_rates.main(["--steps=6", "--iterations=8", f"--out={out}"])
    rows = json.loads((out / "results.json").read_text())["rows"]
    constant, layers, steps = (validation for validation, *_ in rows.values())
    assert steps < layers < constant
    assert (out / "picture.png").stat().st_size > 10_000
    assert "best constant" in capsys.readouterr().out


@pytest.mark.slow
def test_weighted_lasso_lowers_the_loss_that_both_lassos_are_tuned_on(tmp_path, capsys):
    out = tmp_path / "lasso"
    lasso_path.main(["--splits=2", "--iterations=3", f"--out={out}"])
    *_, lasso, weighted = json.loads((out / "results.json").read_text())["rows"].values()
    assert weighted["cv_loss"] < lasso["cv_loss"]
    assert (out / "picture.png").stat().st_size > 10_000
    assert "LassoCV, a grid of 100" in capsys.readouterr().out


def test_the_lasso_is_tuned_on_the_loss_of_cross_validation():
    """Solutions and the loss over the folds are those of scikit-learn's path."""
    folds, _, (X, y, cv) = datasets.diabetes_folds(0)
    alphas = [0.1, 0.01]
    model = lasso_path.LassoCV(alphas=alphas, cv=cv, tol=1e-10, max_iter=10**5).fit(X, y)
    h = torch.tensor(alphas, dtype=torch.float64).log()
    losses = torch.func.vmap(lasso_path.cross_validation, in_dims=(0, None))(h, folds)[1]
    assert losses.tolist() == pytest.approx(model.mse_path_.mean(1), rel=1e-6)


@pytest.mark.slow
def test_maml_and_its_kin_learn(tmp_path, capsys):
    meta_learning_kin.main(["--iterations=40", "--tasks=10", f"--out={tmp_path}"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert set(rows) == set(meta_learning_kin.MEMBERS)
    errors = {name: error for name, (error, *_) in rows.items()}
    assert max(errors.values()) < 4.5  # a sine of these sizes has a mean square of 4.4
    assert errors["Meta-SGD"] < errors["MAML"] < errors["FOMAML"]
    assert "FOMAML" in capsys.readouterr().out


def test_the_implicit_network_uses_the_graph(tmp_path, capsys):
    out = tmp_path / "graph"
    implicit_graph.main(["--epochs=60", "--kappa=0.8", "--seeds=1", "--root=", f"--out={out}"])
    results = json.loads((out / "results.json").read_text())
    alone, two_hop, implicit = (runs[0] for runs in results["rows"].values())
    assert alone[1] < min(two_hop[1], implicit[1]) - 0.1  # on the validation nodes
    assert results["graph"] == "SYNTHETIC block model"
    assert "SYNTHETIC" in capsys.readouterr().out
    assert (out / "picture.png").stat().st_size > 10_000


def test_the_citations_of_cora(data_dir):
    graph = datasets.cora(data_dir)
    assert graph.X.shape == (2708, 1433)
    assert [len(part) for part in graph.parts] == [140, 500, 1000]
    assert len(set(torch.cat(graph.parts).tolist())) == 1640
    degrees = (graph.S.to_dense() != 0).sum(1).double()  # the eigenvector of the eigenvalue 1
    torch.testing.assert_close(graph.S.double() @ degrees.sqrt(), degrees.sqrt())


def test_equilibrium_methods_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(equilibrium, "SIZE", 12)
    equilibrium.main(["--steps=8", "--iterations=4", f"--out={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = list(results["table"].values())
    assert [products for _, products, *_ in rows][:4] == [16, 8, 18, 9]
    assert all(accuracy == pytest.approx(rows[0][0], abs=0.02) for accuracy, *_ in rows[:4])
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "logistic regression" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 5), reason="the DTensors of torch 2.4 lack operations")
def test_a_regulariser_for_each_feature_beats_a_common_one_on_any_number_of_ranks(tmp_path):
    options = ["--features=8192", "--ranks", "1", "2", "--iterations=6", f"--out={tmp_path}"]
    sharded_hyperparameters.main(options)
    one, two = json.loads((tmp_path / "results.json").read_text())
    assert (one["ranks"], two["ranks"], one["features"]) == (1, 2, 8192)
    assert one["own"][1] < 0.7 * one["common"][1]
    assert two["own"] == pytest.approx(one["own"], rel=1e-3)
    assert two["curve"] == pytest.approx(one["curve"], rel=1e-3)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_top_of_three_levels_has_the_slope_of_its_loss(monkeypatch, tmp_path, capsys):
    """Beside differences through both solvers; and the learned regularisers beat one for all."""
    monkeypatch.setattr(three_levels, "SIZES", (40, 20, 60, 60))
    data, _ = three_levels.load()
    h, start = torch.full((10,), -2.0).double(), torch.zeros(40).double()
    grads, _ = three_levels.hypergrad(h, data, start)
    step = 0.05 * torch.eye(10).double()[int(grads.abs().argmax())]
    ends = [
        three_levels.top_loss(three_levels.learn_weights(at, data, start), at, data)
        for at in (h + step, h - step)
    ]
    slope = (ends[0] - ends[1]).item() / 0.1
    assert grads[step > 0].item() == pytest.approx(slope, rel=0.05)
    rows = three_levels.main(["--steps=6", f"--out={tmp_path}"])
    *_, best, learned = (row[1] for row in rows.values())
    assert learned < best
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "one a class learned" in capsys.readouterr().out
