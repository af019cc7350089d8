"""What the examples share: their options, tables and files, and how long they may be."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import common
import pytest

EXAMPLES = Path(common.__file__).parent
SHARED = {"bilevel_problems", "common", "datasets", "fewshot"}
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)


def parse(*argv):
    return common.options(
        argv,
        "What it does.\n\nMore.",
        "name",
        steps=(10, "a count"),
        lr=(0.5, "a size"),
        seed=(0, "a seed"),
        data=(("one", "two"), "a choice"),
        kappa=([0.5, 0.8], "several"),
        root=(None, "a folder"),
    )


def test_options(tmp_path, capsys):
    args = parse(f"--out={tmp_path / 'new' / 'folder'}", "--steps=3", "--kappa", "1", "2", "3")
    assert args.out.is_dir()
    assert (args.steps, args.lr, args.seed, args.data, args.root) == (3, 0.5, 0, "one", None)
    assert args.kappa == [1.0, 2.0, 3.0]
    assert capsys.readouterr().out == "What it does.\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "'0' is not a positive int"),
        ("--steps=2.5", "'2.5' is not a positive int"),
        ("--lr=-1", "'-1' is not a positive float"),
        ("--lr=nan", "'nan' is not a positive float"),
        ("--seed=x", "'x' is not int"),
        ("--data=three", "invalid choice: 'three'"),
        ("--kappa=0", "'0' is not a positive float"),
        (f"--out={__file__}/out", "Not a directory; expected a folder to write to"),
    ],
)
def test_wrong_options(option, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(option)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_table(capsys):
    rows = {"first": (0.5, None), "the second": (0.25, 12)}
    common.table("title", {"share": ".1%", "a count": "d"}, rows)
    assert capsys.readouterr().out.split("\n") == [
        "",
        "title       share  a count",
        "first       50.0%",
        "the second  25.0%       12",
        "",
    ]


def test_saved(tmp_path, capsys):
    args = parse(f"--out={tmp_path}")
    figure, (axis,) = common.panels(1, (3, 2))
    common.curves(axis, {"a": [1, 2]}, title="title")
    common.save(args, figure, rows={"a": 1.5})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == {"a": 1.5}
    assert results["settings"]["steps"] == 10
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) in capsys.readouterr().out


LONGER = {"sharded_hyperparameters": 230, "meta_learning_kin": 190}  # the latter is seven in one


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_is(path):
    lines = path.read_text().split("\n")
    assert len(lines) <= LONGER.get(path.stem, 151)
    assert lines[0].startswith('"""')
    assert f"    python examples/{path.name}" in path.read_text()
    assert f"python examples/{path.name}" in (EXAMPLES / "README.md").read_text()
    assert 0 < (EXAMPLES / "pictures" / f"{path.stem}.png").stat().st_size < 200_000


@pytest.mark.slow
def test_interrupted_without_a_traceback(tmp_path):
    script = EXAMPLES / "logistic_regression.py"
    command = [sys.executable, script, "--iterations=100000", f"--out={tmp_path}"]
    # a shell that runs the tests in the background has them ignore Ctrl-C
    settings = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, **settings) as process:
        shown = b""
        while b"outer steps" not in shown:
            shown += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        shown += process.communicate()[1]
    assert process.returncode == 1
    assert b"Stopped. Nothing was saved; run it again to start anew." in shown
    assert b"Traceback" not in shown
