"""The few-shot examples: images, tasks, and a run that is stopped and resumed."""

import io
import json
import os
import signal
import unicodedata
import zipfile
from pathlib import Path

import fewshot
import imaml
import numpy as np
import pytest
import torch
from PIL import Image

TINY = ["--ways=3", "--queries=2", "--tasks=2", "--inner-steps=2", "--solver-steps=2"]
TINY += ["--test-tasks=5"]


@pytest.fixture(scope="module")
def glyphs():
    return fewshot.load_glyphs()


@pytest.fixture
def run(glyphs, tmp_path, monkeypatch):
    """Run the example with a few tasks; returns the numbers and the last checkpoint."""
    monkeypatch.setattr(fewshot, "load_glyphs", lambda: glyphs)
    monkeypatch.setattr(fewshot, "VALIDATION_TASKS", 4)
    monkeypatch.setattr(fewshot, "VALIDATIONS", 2)

    def call(folder, *options, iterations=6):
        out = tmp_path / folder
        imaml.main([*TINY, "--iterations", str(iterations), "--out", str(out), *options])
        numbers = json.loads((out / "results.json").read_text())
        return numbers, torch.load(out / "checkpoint.pt", weights_only=True)

    return call


# --- Images -----------------------------------------------------------------------------------


def test_glyphs_are_split_by_script(glyphs):
    for split in glyphs:
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split.names), 24, 28, 28)
        scripts = {unicodedata.name(letter).split()[0].capitalize() for letter in split.names}
        assert scripts == set(split.source.split(", "))
    assert glyphs.train.source == glyphs.validation.source == "Latin, Armenian, Digit"
    assert glyphs.test.source == "Greek, Cyrillic, Georgian"
    names = [name for split in glyphs for name in split.names]
    assert len(names) == len(set(names)) > 300


def test_glyphs_are_dark_enough_and_all_differ(glyphs):
    for split in glyphs:
        ink = split.images.float().div(255).sum((2, 3))
        assert ink.min() > 10  # pixels: no blank image
        assert ink.max() < 0.8 * 28 * 28
        assert len(split.images.flatten(0, 1).flatten(1).unique(dim=0)) == 24 * len(split.names)


@pytest.mark.slow
def test_glyphs_are_the_same_every_time(glyphs):
    again = fewshot.load_glyphs()
    assert all(torch.equal(a.images, b.images) for a, b in zip(glyphs, again, strict=True))


def test_lookalikes_are_dropped(glyphs):
    names = [name for split in glyphs for name in split.names]
    assert "A" in names
    assert not {"Α", "А"} & set(names)  # Greek and Cyrillic
    g = torch.Generator().manual_seed(0)
    images = torch.rand(6, 2, 8, 8, generator=g).repeat_interleave(7, 2).repeat_interleave(7, 3)
    images[3] = 0.5 + 0.5 * images[1]  # paler, yet as like as can be
    images[5, 0] = images[2, 0]  # alike in one face of two
    assert fewshot.distinct(images) == [0, 1, 2, 4, 5]
    coarse = images.unflatten(2, (14, 4)).unflatten(4, (14, 4)).mean((3, 5)).flatten(2).numpy()
    likeness = np.mean([np.corrcoef(coarse[:, face]) for face in range(2)], 0)[2, 5]
    assert fewshot.distinct(images, limit=likeness + 1e-4) == [0, 1, 2, 4, 5]
    assert fewshot.distinct(images, limit=likeness - 1e-4) == [0, 1, 2, 4]


def drawing(seed):
    """A drawing as Omniglot has them: one bit a pixel, black on white, 105 x 105."""
    ink = np.zeros((105, 105), bool)
    y, x = np.random.default_rng(seed).integers(10, 60, 2)
    ink[y : y + 30, x : x + 8] = True
    file = io.BytesIO()
    Image.fromarray(~ink).convert("1").save(file, "PNG")
    return file.getvalue(), ink


def omniglot(*alphabets, characters=2, drawings=3, folder="images_background"):
    """Paths and contents of a small set in Omniglot's layout."""
    return {
        f"{folder}/{alphabet}/character{c:02}/{c:04}_{d:02}.png": drawing([a, c, d])[0]
        for a, alphabet in enumerate(alphabets)
        for c in range(1, characters + 1)
        for d in range(1, drawings + 1)
    }


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_folder(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


EIGHT = ("Aramaic", "Braille", "Cree", "Danish", "Ewe", "Faroese", "Greek", "Hebrew")


@pytest.mark.parametrize("layout", ["folder", "inner folder", "zips", "one zip", "zip and folder"])
def test_omniglot_layouts(tmp_path, layout):
    files = omniglot(*EIGHT)
    root = tmp_path
    if "folder" in layout:
        write_folder(tmp_path, files)
        write_folder(tmp_path, {"images_background/README.png": b"not a drawing"})
    if layout == "inner folder":
        root = tmp_path / "images_background"
    if "zip" in layout:
        write_zip(tmp_path / "images_background.zip", files)
    if layout == "zips":  # as the two small sets, which share alphabets
        some = {name: data for name, data in files.items() if "Cree" in name or "Greek" in name}
        write_zip(tmp_path / "images_background_small2.zip", some)
    if layout == "one zip":
        root = tmp_path / "images_background.zip"
    data = fewshot.load_omniglot(root)
    assert [split.source for split in data] == [
        "Aramaic, Braille, Cree, Danish, Ewe",
        "Faroese",
        "Greek, Hebrew",
    ]
    assert data.train.images.shape == (4 * 5 * 2, 3, 28, 28)
    assert data.validation.images.shape == (2, 3, 28, 28)
    assert data.test.images.shape == (4, 3, 28, 28)
    assert data.test.names == [
        "Greek character01",
        "Greek character02",
        "Hebrew character01",
        "Hebrew character02",
    ]
    ink = drawing([6, 2, 3])[1]  # Greek is the seventh
    ours = data.test.images[1, 2].float() / 255
    assert ours.sum() * (105 / 28) ** 2 == pytest.approx(ink.sum(), rel=0.02)
    centre = (ours * torch.arange(28.0)[:, None]).sum() / ours.sum()
    assert (centre + 0.5) * 105 / 28 == pytest.approx(np.argwhere(ink)[:, 0].mean() + 0.5, abs=0.2)
    quarter = data.train.images[10:20]  # the same ten characters, turned once
    assert torch.equal(quarter, data.train.images[:10].rot90(1, (2, 3)))


def test_omniglot_tests_on_the_evaluation_set_if_it_is_there(tmp_path):
    write_zip(tmp_path / "images_background.zip", omniglot("Aramaic", "Braille", "Zulu"))
    write_zip(
        tmp_path / "images_evaluation.zip",
        omniglot("Cree", "Danish", drawings=2, folder="images_evaluation"),
    )
    data = fewshot.load_omniglot(tmp_path)
    assert [split.source for split in data] == ["Aramaic, Braille", "Zulu", "Cree, Danish"]
    assert [split.images.shape[1] for split in data] == [3, 3, 2]


def test_published_omniglot(data_dir):
    data = fewshot.load_omniglot(data_dir / "omniglot")
    assert data.train.source == "Balinese, Early_Aramaic, Greek, Japanese_(katakana), Korean"
    assert data.validation.source == "Latin"
    assert data.test.source == "Sanskrit, Tagalog"
    assert [len(split.images) for split in data] == [4 * 157, 26, 59]
    assert len(data.train.names) + 4 * (26 + 59) == 4 * 242
    for split in data:
        assert split.images.shape[1:] == (20, 28, 28)
        assert 0.02 < split.images.float().div(255).mean() < 0.2  # ink is 255, paper 0
    tasks = fewshot.sample_tasks(data.test, 200, 5, 1, 5, torch.Generator().manual_seed(0))
    assert 0.3 < fewshot.accuracy(fewshot.nearest_pixels, tasks).mean() < 0.6


# --- Tasks ------------------------------------------------------------------------------------


@pytest.fixture
def numbered():
    """Seven classes of nine drawings; each image is filled with its number."""
    numbers = torch.arange(63, dtype=torch.uint8).view(7, 9, 1, 1).expand(7, 9, 28, 28)
    return fewshot.Split(numbers.clone(), list("abcdefg"), "none")


def test_tasks_hold_what_their_labels_say(numbered):
    tasks = fewshot.sample_tasks(numbered, 50, 4, 2, 3, torch.Generator().manual_seed(0))
    assert tasks.support_x.shape == (50, 8, 1, 28, 28)
    assert tasks.query_x.shape == (50, 12, 1, 28, 28)
    support = (tasks.support_x[:, :, 0, 0, 0] * 255).round().int()
    query = (tasks.query_x[:, :, 0, 0, 0] * 255).round().int()
    for s, q, ys, yq in zip(support, query, tasks.support_y, tasks.query_y, strict=True):
        assert len({*s.tolist(), *q.tolist()}) == 20  # no drawing twice, in support or query
        assert sorted(ys.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(yq.bincount(), torch.full((4,), 3))
        classes = {int(y): int(n) // 9 for n, y in zip(s, ys, strict=True)}
        assert len(set(classes.values())) == 4
        assert all(
            classes[int(y)] == int(n) // 9 for n, y in zip([*s, *q], [*ys, *yq], strict=True)
        )
    assert len(support.unique()) == 63  # all drawings get their turn


def test_tasks_follow_from_their_generator(glyphs):
    def draw(seed):
        return fewshot.sample_tasks(glyphs.test, 3, 5, 1, 2, torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1).query_x, draw(2).query_x)


def test_nearest_pixels(glyphs):
    tasks = fewshot.sample_tasks(glyphs.test, 30, 5, 1, 2, torch.Generator().manual_seed(0))
    labels = fewshot.nearest_pixels(tasks)
    distance = (tasks.query_x[:, :, None] - tasks.support_x[:, None]).flatten(3).norm(dim=3)
    assert torch.equal(labels, tasks.support_y.gather(1, distance.argmin(2)))
    share = fewshot.accuracy(fewshot.nearest_pixels, tasks, chunk=7)
    torch.testing.assert_close(share, (labels == tasks.query_y).float().mean(1))


# --- A run ------------------------------------------------------------------------------------


def assert_same(a, b):
    """Bit by bit the same, but for the time it took."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "training_seconds"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def stop_at(monkeypatch, iteration, stop):
    """Have the run stopped when it records an iteration."""
    calls = []
    record = fewshot.Run.record

    def stopping(self, **numbers):
        record(self, **numbers)
        calls.append(None)
        if len(calls) == iteration:
            stop()

    monkeypatch.setattr(fewshot.Run, "record", stopping)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("power cut")


@pytest.mark.parametrize(
    ("stop", "error", "done"),
    [
        (interrupt, SystemExit, 4),
        pytest.param(crash, RuntimeError, 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    run, monkeypatch, tmp_path, capsys, stop, error, done
):
    whole = run("whole")
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("sys.argv", ["examples/imaml.py", "--out", "a b"])
    with monkeypatch.context() as patch:
        stop_at(patch, 4, stop)
        with pytest.raises(error) as caught:
            run("parts")
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["iteration"] == done
    if stop is interrupt:
        assert caught.value.code == 130
        said = capsys.readouterr().out
        assert "Stopped after 4 of 6 iterations." in said
        assert "python examples/imaml.py --out 'a b' --resume" in said
    assert_same(run("parts", "--resume"), whole)
    assert_same(run("parts", "--resume"), whole)  # nothing is left to do but the report
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "checkpoint.pt",
        "picture.png",
        "results.json",
    ]


def test_a_run_that_was_stopped_in_its_test(run, monkeypatch, capsys):
    def stop(tasks):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fewshot, "nearest_pixels", stop)
        with pytest.raises(SystemExit) as caught:
            run("out")
    assert caught.value.code == 130
    assert "the training is complete" in capsys.readouterr().out
    numbers, state = run("out", "--resume")
    assert state["iteration"] == 6
    assert len(numbers["results"]) == 3


def test_a_failed_write_leaves_the_old_checkpoint(run, monkeypatch, tmp_path):
    def torn(state, path):
        Path(path).write_bytes(b"half a checkp")
        raise OSError("disk full")

    run("out")
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        run("out")
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_seeds_change_the_run_but_not_its_test_tasks(run):
    (a, _), (b, _) = run("a"), run("b", "--seed", "1")
    pixels = [numbers["results"]["nearest pixel neighbour"] for numbers in (a, b)]
    assert pixels[0] == pixels[1]
    assert a["history"] != b["history"]


@pytest.mark.parametrize(
    "method",
    [
        "cg",
        "neumann",
        pytest.param("fixed_point", marks=pytest.mark.slow),
        pytest.param("normal_cg", marks=pytest.mark.slow),
    ],
)
def test_every_method_runs(run, method, capsys):
    numbers, state = run("out", "--method", method, iterations=1)
    assert numbers["settings"]["method"] == method
    assert [entry["iteration"] for entry in numbers["history"]] == [0, 1]
    assert all(tensor.isfinite().all() for tensor in state["meta"].values())
    said = capsys.readouterr().out
    assert f"iMAML ({method}), 3-way 1-shot: accuracy on 5 tasks from Greek" in said
    assert said.count(" ± ") == 3


def test_the_interval_is_that_of_the_mean_over_tasks(run, monkeypatch):
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    monkeypatch.setattr(fewshot, "accuracy", lambda predict, tasks: shares[: len(tasks.query_y)])
    numbers, _ = run("out", iterations=1)
    result = numbers["results"]["iMAML"]
    assert result["accuracy"] == pytest.approx(0.6)
    assert result["interval95"] == pytest.approx(1.96 * np.std(shares.numpy(), ddof=1) / 5**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data omniglot", "--data omniglot needs --root DIR"),
        ("--data omniglot --root nowhere", "nowhere does not exist; expected a folder with"),
        ("--data omniglot --root .", "holds no drawings; expected images_background.zip"),
        ("--data omniglot --root broken.zip", "File is not a zip file"),
        ("--data omniglot --root two.zip", "['Aramaic', 'Braille']; expected at least three"),
        ("--root .", "--root is for --data omniglot"),
        ("--ways 0", "'0' is not a positive int"),
        ("--reg -1", "'-1' is not a positive float"),
        ("--reg nan", "'nan' is not a positive float"),
        ("--ways 70", "--ways 70: validation has only 62 classes"),
        ("--shots 20", "--shots 20 --queries 15: their sum must be at most 24"),
        ("--method newton", "invalid choice: 'newton'"),
        ("--device tpu9", "--device tpu9: "),
        ("--resume", "--resume: there is no"),
        (
            "--out broken.zip/out",
            "--out broken.zip/out: Not a directory; expected a folder to write",
        ),
    ],
)
def test_wrong_options(glyphs, monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.setattr(fewshot, "load_glyphs", lambda: glyphs)
    monkeypatch.setattr(fewshot, "Run", None)  # an option that gets past the checks fails here
    monkeypatch.chdir(tmp_path)
    Path("broken.zip").write_bytes(b"not a zip")
    if "two.zip" in options:
        write_zip("two.zip", omniglot("Aramaic", "Braille"))
    if "--root ." in options:
        Path("broken.zip").unlink()
    with pytest.raises(SystemExit) as caught:
        imaml.main(["--out", "out", *options.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_resuming_with_other_settings(run):
    run("out", iterations=1)
    with pytest.raises(SystemExit, match=r"was made with --iterations 1 --reg 1\.0\. Give these"):
        run("out", "--resume", "--reg", "2", iterations=2)


@pytest.mark.slow
def test_a_short_run_learns(run):
    options = ["--ways", "5", "--queries", "10", "--tasks", "8", "--test-tasks", "100"]
    options += ["--inner-steps", "6", "--solver-steps", "3"]
    numbers, _ = run("out", *options, iterations=150)
    scores = [result["accuracy"] for result in numbers["results"].values()]
    assert scores[0] > max(scores[1:]) + 0.15
