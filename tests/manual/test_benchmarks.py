"""The runner of ``make bench``: it goes on where it stopped, and says what it leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu, harness, memory, run, unrolled

Measured = list[tuple[str, int]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """What is measured, in a runner whose processes are replaced."""
    calls: Measured = []

    def run_child(key: str, threads: int, options: Any) -> dict[str, Any]:
        calls.append((key, threads))
        rows = [
            {"name": "a", "group": "floor", "seconds": 1.0, "first_call": 2.0, "repeats": 3},
            {"name": "b", "group": "hyperfunc", "seconds": 1.5, "first_call": 9.0, "repeats": 3},
            {"name": "c", "group": "peer", "not_run": "needs c, which is not installed"},
        ]
        return {"key": key, "title": "work", "threads": threads, "rows": rows}

    monkeypatch.setattr(run, "run_child", run_child)
    monkeypatch.setattr(run, "picture", lambda results, path: path.write_text("") == 0)
    return calls


def bench(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(out), *words])
    run.main()


def stops_at(monkeypatch: pytest.MonkeyPatch, key: str, error: BaseException) -> None:
    inner = run.run_child

    def run_child(asked: str, threads: int, options: Any) -> dict[str, Any]:
        if asked == key:
            raise error
        return inner(asked, threads, options)

    monkeypatch.setattr(run, "run_child", run_child)


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("--problems", "P1", "P4", "P7", "--threads", "1")
    with monkeypatch.context() as patch:
        stops_at(patch, "P4", KeyboardInterrupt())
        with pytest.raises(SystemExit, match=r"Stopped\. .* the same command goes on"):
            bench(patch, tmp_path, *words)
    assert set(json.loads((tmp_path / "bench.json").read_text())["results"]) == {"P1/1"}
    assert "## P1: work; threads: 1" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").exists()
    assert measured == [("P1", 1)]
    bench(monkeypatch, tmp_path, *words)
    assert measured == [("P1", 1), ("P4", 1), ("P7", 1)]
    assert "needs c, which is not installed" in (tmp_path / "bench.md").read_text()


def changed_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run.importlib.metadata, "version", lambda name: "0")


CALLS: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None], Measured]] = {
    "nothing changed": ((), lambda patch: None, []),
    "again": (("--again",), lambda patch: None, [("P7", 1)]),
    "other entries": (("--only", "b"), lambda patch: None, [("P7", 1)]),
    "more seconds": (("--seconds", "20"), lambda patch: None, [("P7", 1)]),
    "other threads": (("--threads", "1", "2"), lambda patch: None, [("P7", 2)]),
    "other versions": ((), changed_version, [("P7", 1)]),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_is_measured_anew(
    case: str, measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench(monkeypatch, tmp_path, "--problems", "P7", "--threads", "1")
    measured.clear()
    words, change, expected = CALLS[case]
    change(monkeypatch)
    bench(monkeypatch, tmp_path, "--problems", "P7", "--threads", "1", *words)
    assert measured == expected


def test_every_problem_by_default_and_the_same_work_once(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench(monkeypatch, tmp_path)
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    keys = [result["key"] for result in results.values()]
    assert list(dict.fromkeys(keys)) == list(run.PROBLEMS)
    assert {key for key, _ in measured} == set(run.PROBLEMS) - set(run.SAME)
    assert results["P5-16/2"]["rows"] == results["P3a/2"]["rows"]


def test_a_process_that_fails_does_not_end_the_run(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stops_at(monkeypatch, "P1", subprocess.CalledProcessError(-9, "python"))
    with pytest.raises(SystemExit, match=r"Failed: P1/1; see above"):
        bench(monkeypatch, tmp_path, "--problems", "P1", "P7", "--threads", "1")
    assert measured == [("P7", 1)]


def test_an_unknown_problem_is_named(
    measured: Measured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        bench(monkeypatch, tmp_path, "--problems", "P7", "P9")
    assert "no such problem: P9; there are P1, P2, P3a" in capsys.readouterr().err
    assert measured == []


def test_a_process_checks_and_times_and_leaves_out(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.run", "--out", str(tmp_path)]
    command += ["--problems", "P7", "--threads", "1", "--seconds", "0", "--only", "hand|torchdeq"]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert "Ctrl-C stops" in done.stdout
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"].values()
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["by hand"]["repeats"] >= 3
    assert rows["by hand"]["first_call"] > 0
    assert rows["by hand"]["error"] < 1e-3
    assert rows["hyperfunc, hypergrad"]["not_run"] == "not chosen"
    missing = result["versions"]["torchdeq"] == "not installed"
    assert ("needs torchdeq" in rows["torchdeq"].get("not_run", "")) == missing


def test_an_entry_that_is_wrong_missing_or_failing_is_not_timed() -> None:
    def entry(name: str, call: Callable[[], Any]) -> harness.Entry:
        return harness.Entry(name, harness.PEER, lambda: call)

    def missing() -> Any:
        import no_such_peer  # noqa: F401

    def failing() -> Any:
        raise RuntimeError("no\nmore")

    def refused() -> Any:
        raise harness.NotRun("too old")

    entries = [
        entry("right", lambda: [torch.ones(2)]),
        entry("wrong", lambda: [torch.tensor([1.0, 1.1])]),
        entry("missing", missing),
        entry("failing", failing),
        entry("refused", refused),
    ]
    problem = harness.Problem("P", "p", entries, lambda: [torch.ones(2).double()])
    rows = harness.measure(problem, 0.0, lambda text: None)
    assert [row.get("not_run") for row in rows] == [
        None,
        "wrong: relative error 7.1e-02",
        "needs no_such_peer, which is not installed",
        "failed: RuntimeError: no",
        "too old",
    ]
    assert [row.get("repeats") for row in rows] == [3, None, None, None, None]


def test_the_median_counts_and_a_long_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(harness.time, "sleep", lambda seconds: None)
    order: list[str] = []

    def call(name: str, *durations: float) -> Callable[[], Any]:
        rest = list(durations)

        def function() -> list[torch.Tensor]:
            order.append(name)
            clock["now"] += rest.pop(0) if len(rest) > 1 else rest[0]
            return [torch.ones(1)]

        return function

    functions = [call("a", 0.5, 0.5, 0.3, 0.9, 0.4), call("b", 2.0), call("c", 30.0)]
    times = harness.interleaved(functions, 10.0)
    assert times == [pytest.approx([0.3, 0.9, 0.4, 0.4, 0.4]), [2.0] * 6, [30.0]]
    assert "".join(order) == "aabc" + "ab" * 5
    entry = harness.Entry("a", harness.FLOOR, lambda: call("a", 0.1, 0.5, 0.5, 0.3, 0.9, 0.4))
    problem = harness.Problem("P", "p", [entry], lambda: [torch.ones(1)])
    (row,) = harness.measure(problem, 1.0, lambda text: None)
    assert (row["seconds"], row["first_call"]) == (pytest.approx(0.4), pytest.approx(0.1))


@pytest.mark.parametrize("name", [name for name in memory.BUILD if name not in memory.IMPORTS])
def test_rows_of_memory_are_one_computation(name: str) -> None:
    work = unrolled.mlp(3)
    got = memory.BUILD[name](work)()
    if name != "gradients and products":
        torch.testing.assert_close(got, unrolled.by_hand(work)(), rtol=1e-3, atol=1e-5)


def test_on_a_gpu_what_fails_leaves_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> Any:
        raise RuntimeError("no\nmore")

    def hanging() -> Any:
        while True:
            pass

    calls = {
        "right": lambda: [torch.ones(5, 2), torch.ones(())],  # of five tasks, the first two count
        "wrong": lambda: [torch.tensor([[1.0, 1.1], [1.0, 1.0]]), torch.ones(())],
        "right, TF32": lambda: [torch.full((2, 2), 1.1), torch.ones(())],
        "failing": failing,
        "hanging": hanging,
        "compiled": failing,
    }
    entries = [gpu.entry(name, harness.OURS, lambda call: call, f) for name, f in calls.items()]
    reference = [torch.ones(2, 2).double(), torch.ones(()).double()]
    problem = harness.Problem("P7", "p", entries, lambda: reference)
    monkeypatch.setattr(gpu, "make", lambda *_: problem)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    monkeypatch.setitem(gpu.JOBS, "P7", (40, 1))
    gpu.child("P7", "cpu")
    planned, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert planned["entries"] == [row["name"] for row in rows] == list(calls)[:5]
    assert [row.get("wrong") for row in rows] == [False, True, False, None, None]
    assert rows[1]["error"] == pytest.approx(0.1 / 5**0.5)
    notes = ["failed: RuntimeError: no more", "failed: TimeoutError: more than 1 s"]
    assert [row.get("note") for row in rows[3:]] == notes


def test_on_a_gpu_what_hangs_or_dies_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"name": "a", "group": "floor", "seconds": 2.0, "first_call": 3.0, "error": 0.0}
    start = (
        f"print({json.dumps({'entries': ['a', 'b']})!r}); print({json.dumps(row)!r}, flush=True)"
    )
    ends = {"P1": "import time; time.sleep(99)", "P7": "raise SystemExit('no driver')"}
    found = {}
    for job, end in ends.items():
        monkeypatch.setattr(gpu, "COMMAND", [sys.executable, "-c", f"{start}; {end}"])
        found[job] = gpu.run_child(job, "cpu", 0.5 if job == "P1" else 30.0)
        assert found[job][0] == {"job": job, **row}
    assert found["P1"][1] == {"job": "P1", "name": "b", "note": "stopped after 0 s"}
    assert found["P7"][1]["note"] == "failed: the process returned 1: no driver"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "run_child", lambda job, *_: found.get(job, []))
    gpu.main()
    table = (tmp_path / "gpu.md").read_text()
    assert "| P1 | a | 2000.00 | 1.00 | 3.0 | 0e+00 |  |  |" in table
    assert "| P1 | b |  |  |  |  |  | stopped after 0 s |" in table
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 4


@pytest.mark.slow
def test_the_check_of_a_gpu_on_a_cpu(tmp_path: Path) -> None:
    command = [*gpu.COMMAND, "--device", "cpu", "--out", str(tmp_path), "--only", "P7", "sync"]
    subprocess.run(command, check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not [row for row in rows if row.get("wrong") or "failed" in row.get("note", "")]
    assert {row["name"] for row in rows} >= {"cg", "hyperfunc, hypergrad", "by hand"}
