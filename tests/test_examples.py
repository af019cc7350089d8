"""The smaller examples: that they run, and that their variants agree where they must."""

import json

import fewshot
import learned_learning_rates
import maml
import pytest
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
