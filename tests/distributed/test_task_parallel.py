"""Tasks spread over ranks: the numbers of one process, and the same error on all ranks."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hyperfunc as hf
from tests import ranks
from tests.ranks import OLD, Replicate, Shard, distribute_tensor, mesh_of

newer_dtensors = pytest.mark.skipif(OLD, reason="the DTensors of torch 2.4 lack operations")

F64 = torch.float64


def _task_loss(w: Tensor, m: Any, task: Any) -> Tensor:
    return 0.5 * ((task["x"] @ w - task["y"]) ** 2).sum() + 0.5 * ((w - m["w"]) ** 2).sum()


def _query_loss(w: Tensor, m: Any, task: Any) -> tuple[Tensor, Tensor]:
    return (w**3).sum() + m["shift"] * w.sum(), w[0] > 0


def _solve_task(m: Any, task: Any) -> Tensor:
    x = task["x"]
    return torch.linalg.solve(x.mT @ x + torch.eye(3, dtype=F64), x.mT @ task["y"] + m["w"])


def _task_arguments(num_tasks: int = 6) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    tasks = {"x": randn(num_tasks, 4, 3), "y": randn(num_tasks, 4)}
    return {"w": randn(3), "shift": randn()}, tasks


TASK_TRANSFORMS = {"grads": hf.hypergrad, "value": hf.hypergrad_and_value}
TASK_TRANSFORMS["solution"] = hf.hypergrad_and_solution


def _adapt(transform: str, throw: bool = True) -> Any:
    has_aux = transform != "grads"
    return TASK_TRANSFORMS[transform](
        _solve_task,
        _query_loss if has_aux else lambda *args: _query_loss(*args)[0],
        inner_loss=_task_loss,
        has_aux=has_aux,
        method=hf.CG(),
        throw=throw,
    )


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def _my_tasks(tasks: Any, split: int) -> Any:
    mine = slice(0, split) if dist.get_rank() == 0 else slice(split, None)
    return {name: leaf[mine] for name, leaf in tasks.items()}


def _tasks_like_one_process(
    transform: str, split: int, reduce: Any, chunk_size: Any, at_once: Any = None
) -> None:
    hparams, tasks = _task_arguments()
    fn = torch.func.vmap(_adapt(transform), in_dims=(None, 0))
    mine = _my_tasks(tasks, split)
    mapped = fn if at_once is None else hf.task_map(_adapt(transform), (None, 0), at_once)
    call = hf.distributed.task_parallel(mapped, reduce=reduce, chunk_size=chunk_size)
    actual, expected = call(hparams, mine), fn(hparams, tasks)
    if transform == "grads":
        actual, expected = (actual,), (expected,)
    how = {"mean": lambda t: t.mean(0), "sum": lambda t: t.sum(0), None: lambda t: t}[reduce]
    close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-14)
    close(actual[0], {name: how(grad) for name, grad in expected[0].items()})
    if transform == "value":
        close(actual[1], expected[1])
    if transform == "solution":
        solution, whole = actual[1], expected[1]
        for field in ("value", "aux", "stats"):
            close(getattr(solution, field), getattr(whole, field))
        if len(mine["x"]):
            own = fn(hparams, mine)[1]
            close((solution.params, solution.adjoint), (own.params, own.adjoint))
        else:
            assert (solution.params, solution.adjoint) == ((), ())


@pytest.mark.parametrize("split", [*map(slow, (3, 6)), 5, 0])
@pytest.mark.parametrize(
    ("transform", "reduce", "chunk_size"),
    [
        ("grads", "mean", None),
        pytest.param("value", "sum", None, marks=pytest.mark.slow),
        ("solution", "mean", None),
        ("solution", "mean", 2),
        ("value", None, None),
        pytest.param("value", None, 4, marks=pytest.mark.slow),
    ],
)
def test_tasks_give_the_numbers_of_one_process(
    pair: ranks.Ranks, transform: str, split: int, reduce: Any, chunk_size: Any
) -> None:
    pair.run(_tasks_like_one_process, transform, split, reduce, chunk_size)


@pytest.mark.parametrize("split", [5, *map(slow, (3, 0))])
@pytest.mark.parametrize("at_once", ["auto", 1, 2])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_task_map_within_ranks(
    pair: ranks.Ranks, at_once: Any, split: int, chunk_size: int | None
) -> None:
    pair.run(_tasks_like_one_process, "solution", split, "mean", chunk_size, at_once)


# fn on this rank's tasks -> the same number of leading dimensions, without a solve
def _plain(hparams: Any, tasks: Any, *args: Any) -> Any:
    grads = {name: tasks["x"][:, 0, :1] * leaf for name, leaf in hparams.items()}
    return {"w": grads["w"], "shift": grads["shift"][:, 0]}, tasks["y"]


# name: what rank 1 is called with in place of the same on rank 0, and what both ranks say
AMISS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong type": ({"shift": 3}, "rank 1 of 2: TypeError: hparams['shift'] is 3 of type int"),
    "no floating type": ({"shift": torch.tensor(1)}, "on rank 1 of 2: TypeError: hparams['shift']"),
    "other shape": (
        {"w": torch.ones(4, dtype=F64)},
        "hparams on rank 1 differ from those on rank 0: got hparams['w'] torch.float64 of shape "
        "(4,), expected hparams['w'] torch.float64 of shape (3,). Make the call alike",
    ),
    "other dtype": ({"w": torch.ones(3)}, "got hparams['w'] torch.float32 of shape (3,), expected"),
    "one more": ({"z": torch.ones(3)}, "got hparams['z'] torch.float32 of shape (3,), expected st"),
    "NaN": (
        {"w": torch.full((3,), torch.nan, dtype=F64)},
        "the values of hparams on rank 1 differ from those on rank 0: got hparams['w'] with check",
    ),
    "signs": (
        {"w": _task_arguments()[0]["w"] * torch.tensor([-1.0, -1.0, 1.0])},
        "the values of hparams on rank 1 differ from those on rank 0: got hparams['w'] with check",
    ),
    "dtype of tasks": (
        {"tasks": {"x": torch.ones(3, 4, 3), "y": torch.ones(3, 4, dtype=F64)}},
        "tasks on rank 1 differ from those on rank 0: got tasks['x'] torch.float32, expected "
        "tasks['x'] torch.float64",
    ),
    "no tasks": (
        {"tasks": {}},
        "rank 1 of 2: ValueError: tasks is an empty tree ({}); expected at least one tensor",
    ),
    "tree of tasks": (
        {"tasks": {"x": torch.ones(2, 4, 3, dtype=F64)}},
        "tasks on rank 1 differ from those on rank 0: got structure",
    ),
    "one argument more": (
        {"args": (torch.ones(2), 1)},
        "further arguments on rank 1 differ from those on rank 0: got args[1] int, expected struct",
    ),
    "type of an argument": ({"args": (1,)}, "got args[0] int, expected args[0] torch.float32"),
    "reduce": (
        {"reduce": "sum"},
        "reduce and chunk_size on rank 1 differ from those on rank 0: got ('sum', CHUNK), "
        "expected ('mean', CHUNK)",
    ),
}


def _amiss(name: str, chunk_size: int | None) -> str:
    hparams, tasks = _task_arguments()
    given = dict(AMISS[name][0]) if dist.get_rank() == 1 else {}
    tasks, args = given.pop("tasks", _my_tasks(tasks, 3)), given.pop("args", (torch.ones(2),))
    reduce = given.pop("reduce", "mean")
    call = hf.distributed.task_parallel(_plain, reduce=reduce, chunk_size=chunk_size)
    with pytest.raises((hf.HypergradError, ValueError)) as error:
        call({**hparams, **given}, tasks, *args)
    assert _sum_of_ranks() == 1.0  # the group still works
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("name", AMISS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_what_one_rank_was_given_amiss_ends_the_call_on_all_ranks(
    pair: ranks.Ranks, name: str, chunk_size: int | None
) -> None:
    first, second = pair.run(_amiss, name, chunk_size)
    assert first == second
    assert AMISS[name][1].replace("CHUNK", str(chunk_size)) in first


def _amiss_everywhere() -> None:
    call = hf.distributed.task_parallel(_plain)
    with pytest.raises(TypeError, match=r"^hparams\['w'\] is 3 of type int"):
        call({"w": 3}, _my_tasks(_task_arguments()[1], 2))


def test_what_all_ranks_do_amiss_is_said_as_in_one_process(pair: ranks.Ranks) -> None:
    pair.run(_amiss_everywhere)


ENDINGS: dict[str, Any] = {
    "Ctrl-C": (KeyboardInterrupt, (), "KeyboardInterrupt"),
    "exit": (SystemExit, (3,), "SystemExit: 3"),
    "memory": (MemoryError, ("of the host",), "MemoryError: of the host"),
    "device memory": (RuntimeError, ("out of memory: got 9 TB",), "RuntimeError: out of memory"),
}


def _ending(name: str, chunk_size: int | None, reduce: Any) -> tuple[str, str, int]:
    """The error on this rank, and the calls of fn, when rank 1 ends in a batch of several tasks."""
    kind, details, _ = ENDINGS[name]
    hparams, tasks = _task_arguments(8)
    calls = []

    def fn(hparams: Any, tasks: Any) -> Any:
        calls.append(len(tasks["x"]))
        if dist.get_rank() == 1 and len(tasks["x"]) > 1:
            raise kind(*details)
        return _plain(hparams, tasks)

    call = hf.distributed.task_parallel(fn, chunk_size=chunk_size, reduce=reduce)
    with pytest.raises(BaseException) as error:  # noqa: PT011
        call(hparams, _my_tasks(tasks, 6 if chunk_size else 4))
    assert _sum_of_ranks() == 1.0
    return type(error.value).__name__, str(error.value), len(calls)


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize(("chunk_size", "reduce"), [(None, "mean"), (2, "mean"), (2, None)])
def test_a_rank_that_ends_or_runs_out_of_memory_ends_the_call_on_all_ranks(
    pair: ranks.Ranks, name: str, chunk_size: int | None, reduce: Any
) -> None:
    kind, _, text = ENDINGS[name]
    (first, said, calls), (second, _, failed) = pair.run(_ending, name, chunk_size, reduce)
    assert first == "HypergradError"
    assert f"task_parallel failed on rank 1 of 2: {text}" in said
    assert second == ("HypergradError" if issubclass(kind, Exception) else kind.__name__)
    # rank 0 has three chunks, of which the second is under way when it learns of the failure
    assert calls == (2 if chunk_size else 1)
    # no task is run alone to find the one at fault, unless it might be one
    assert (failed == 1) is (name != "device memory")


def _one_by_one(adapt: Any) -> Any:
    """A loop over tasks in place of vmap, with an exception for one of them."""

    def one(hparams: Any, task: Any) -> Any:
        if task["x"].isnan().any():
            raise ArithmeticError("bad data")
        grads, (value, _) = adapt(hparams, task)
        return grads, value

    def fn(hparams: Any, tasks: Any) -> Any:
        each = [one(hparams, {k: t[i] for k, t in tasks.items()}) for i in range(len(tasks["x"]))]
        grads = {name: torch.stack([grads[name] for grads, _ in each]) for name in hparams}
        return grads, torch.stack([value for _, value in each])

    return fn


def _failing(name: str, chunk_size: int | None) -> str:
    """The error on this rank when the fifth of six tasks, the first of rank 1, is bad."""
    hparams, tasks = _task_arguments()
    tasks["x"][4, 0, 0] = torch.nan
    fn: Any = {
        "raises, mapped": torch.func.vmap(_adapt("value"), in_dims=(None, 0)),
        "raises, one by one": _one_by_one(_adapt("value")),
        "NaN": torch.func.vmap(_adapt("value", throw=False), in_dims=(None, 0)),
    }.get(name, lambda hparams, tasks: 1 / 0)
    mine = _my_tasks(tasks, 3)
    if name == "no tree" and dist.get_rank() == 1:
        mine["y"] = mine["y"][:2]
    if name in ("no tree", "other parts"):
        tasks["x"][4, 0, 0] = 0.0

        def fn(hparams: Any, tasks: Any) -> Any:
            grads = {"w": tasks["x"][:, 0], "shift": tasks["y"][:, 0]}
            return (grads, tasks["y"]) if dist.get_rank() else (grads, tasks["x"])

    call = hf.distributed.task_parallel(fn, chunk_size=chunk_size)
    with pytest.raises((hf.HypergradError, ValueError)) as error:
        call(hparams, mine)
    torch.testing.assert_close(_sum_of_ranks(), 1.0)  # the group still works
    return f"{type(error.value).__name__}: {error.value}"


def _sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total)


TASK = "task_parallel failed on rank 1 of 2 at its task 1, number 4 of 6"
FAILURES = {
    "raises, mapped": (TASK, "the inner solver returned non-finite values"),
    "raises, one by one": (TASK, "ArithmeticError: bad data"),
    "NaN": (TASK, "the hypergradient with respect to hparams['shift'] is not finite"),
    "no tree": ("rank 1 of 2: ValueError", "tasks['x'] has 3 tasks, but tasks['y'] has 2"),
    "division": ("rank 0 of 2 at its task 0, number 0 of 6 (2 ranks", "ZeroDivisionError"),
    "other parts": (
        "ValueError: task_parallel: the results of fn for each task on rank 1 differ from those on",
        "rank 0: got torch.float64 of shape (4,), expected torch.float64 of shape (4, 3). Return",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_failure_ends_the_call_on_all_ranks(
    pair: ranks.Ranks, name: str, chunk_size: int | None
) -> None:
    first, second = pair.run(_failing, name, chunk_size)
    assert first == second
    for part in FAILURES[name]:
        assert part in first


def _sent_by_tasks(chunk_size: int | None) -> list[tuple[str, int]]:
    hparams, tasks = _task_arguments()
    hparams["half"] = torch.ones(5, dtype=torch.bfloat16)
    fn = torch.func.vmap(
        lambda m, task: (m, {"loss": task["y"].sum(), "hit": task["y"][0] > 0}), in_dims=(None, 0)
    )
    sent = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reducing(values: Tensor, **keywords: Any) -> Any:
        sent.append(("all_reduce", values.nbytes))
        return all_reduce(values, **keywords)

    def gathering(out: Any, values: Tensor, **keywords: Any) -> Any:
        sent.append(("all_gather", values.nbytes))
        return all_gather(out, values, **keywords)

    dist.all_reduce, dist.all_gather = reducing, gathering
    try:
        call = hf.distributed.task_parallel(fn, chunk_size=chunk_size)
        grads, _ = call(hparams, _my_tasks(tasks, 2))
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
    assert grads["half"].dtype == torch.bfloat16
    torch.testing.assert_close(grads, hparams)
    return sent


def test_what_tasks_send(pair: ranks.Ranks) -> None:
    """Status, a vector for each dtype in at least float32, losses and hits of the busier rank.

    Between two chunks, ranks count those that failed.
    """
    before, after = ("all_gather", 8 * 8), ("all_gather", 4 * 8)
    sums = [("all_reduce", 5 * 4), ("all_reduce", 4 * 8)]
    failures = ("all_reduce", 8)
    rest = [("all_gather", 4), ("all_gather", 4 * 8)]
    for sent in pair.run(_sent_by_tasks, None):
        assert sent == [before, *sums, after, *rest]
    for sent in pair.run(_sent_by_tasks, 3):
        assert sent == [before, *sums, failures, *sums, after, *rest]


def _overlap() -> list[str]:
    """What rank 0 does in turn with three chunks: fn, and the start and the end of each sum.

    There is one of hypergradients, and, but for the last chunk, one of the ranks that failed.
    """
    hparams, tasks = _task_arguments()
    events: list[str] = []
    all_reduce = dist.all_reduce

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("end")
            self.work.wait()

    def reducing(values: Tensor, **keywords: Any) -> Any:
        assert keywords["async_op"]
        events.append("start")
        return Work(all_reduce(values, **keywords))

    def fn(hparams: Any, tasks: Any) -> Any:
        events.append("fn")
        return _plain(hparams, tasks)

    with mock.patch.object(dist, "all_reduce", reducing):
        grads, _ = hf.distributed.task_parallel(fn, chunk_size=1)(hparams, _my_tasks(tasks, 3))
    expected = _plain(hparams, tasks)[0]
    torch.testing.assert_close(grads, {name: grad.mean(0) for name, grad in expected.items()})
    return events


def test_a_chunk_is_summed_while_the_next_is_adapted(pair: ranks.Ranks) -> None:
    start, end = ["start", "start"], ["end", "end"]
    for events in pair.run(_overlap):
        assert events == ["fn", *start, "fn", *end, *start, "fn", *end, "start", "end"]


# Hyperparameters sharded over one dimension of a mesh, tasks shared over the other ----------------


def _sharded_loss(w: Tensor, m: Tensor, task: Any) -> Tensor:
    residual = (task["x"] * w).sum(-1) - task["y"]
    return 0.5 * (residual**2).sum() + 0.5 * ((w - m) ** 2).sum()


def _sharded_query(w: Tensor, m: Tensor, task: Any) -> tuple[Tensor, Tensor]:
    return (w**3).sum() + (m * w).sum(), w > 0


def _sharded_solve(m: Tensor, task: Any) -> Tensor:
    w = m
    for _ in range(4):
        w = w - 0.05 * torch.func.grad(_sharded_loss)(w, m, task)
    return w


def _two_dimensions(
    shape: tuple[int, int], dim: int | None, reduce: Any, chunk_size: int | None
) -> None:
    tasks = _task_arguments(5)[1]
    hparams = torch.linspace(-1, 1, 3, dtype=F64)
    adapt = hf.hypergrad_and_solution(
        _sharded_solve, _sharded_query, inner_loss=_sharded_loss, has_aux=True
    )
    fn = torch.func.vmap(adapt, in_dims=(None, 0))
    expected, solution = fn(hparams, tasks)
    mesh = mesh_of(*shape)
    placements = [Replicate() if dim is None else Shard(dim)]
    sharded = distribute_tensor(hparams, mesh["b"], placements)
    group = mesh["a"].get_group()
    mine = {
        name: distribute_tensor(leaf, mesh["b"], [Replicate()])
        for name, leaf in hf.distributed.local_tasks(tasks, group=group).items()
    }
    call = hf.distributed.task_parallel(fn, group=group, reduce=reduce, chunk_size=chunk_size)
    grads, gathered = call(sharded, mine)
    if reduce == "mean":
        expected = expected.mean(0)
        assert tuple(grads.placements) == tuple(placements)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    close(grads.full_tensor(), expected)
    close(gathered.value, solution.value)
    close(gathered.stats, solution.stats)
    close(gathered.aux, solution.aux)
    assert gathered.params.shape == (len(mine["x"]), 3)


@newer_dtensors
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize(("reduce", "chunk_size"), [("mean", None), ("mean", 2), (None, None)])
def test_sharded_hyperparameters_beside_shared_tasks(
    pair: ranks.Ranks, shape: tuple[int, int], reduce: Any, chunk_size: int | None
) -> None:
    pair.run(_two_dimensions, shape, 0, reduce, chunk_size)
    pair.run(_two_dimensions, shape, None, reduce, chunk_size)


@pytest.mark.slow
@newer_dtensors
@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize(("reduce", "chunk_size"), [("mean", None), ("mean", 2), (None, None)])
def test_sharded_hyperparameters_beside_shared_tasks_on_four_ranks(
    four: ranks.Ranks, dim: int | None, reduce: Any, chunk_size: int | None
) -> None:
    four.run(_two_dimensions, (2, 2), dim, reduce, chunk_size)


def _refused_dtensors(case: str) -> str:
    mesh = mesh_of(2) if case == "shared ranks" else mesh_of(1, 2)["b"]
    group = None if case == "shared ranks" else mesh_of(1, 2)["a"].get_group()
    hparams = distribute_tensor(torch.ones(4, dtype=F64), mesh, [Shard(0)])

    def fn(hparams: Any, tasks: Tensor) -> Any:
        grads = torch.stack([hparams] * len(tasks))
        if case == "NaN":
            grads = grads / tasks.unsqueeze(1)
            grads = grads - grads
        return grads

    tasks = torch.tensor([1.0, 2.0, 0.0 if case == "NaN" else 3.0], dtype=F64)
    if case != "shared ranks":
        tasks = distribute_tensor(tasks, mesh, [Replicate()])
    with pytest.raises((hf.HypergradError, ValueError)) as error:
        hf.distributed.task_parallel(fn, group=group)(hparams, tasks)
    return str(error.value)


@newer_dtensors
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shared ranks", "hparams is a DTensor over ranks [0, 1], among which tasks are shared"),
        ("shared ranks", 'DTensors on mesh["shard"] and group=mesh["tasks"].get_group()'),
        ("NaN", "at its task 2, number 2 of 3"),
    ],
)
def test_dtensors_that_are_refused(pair: ranks.Ranks, case: str, message: str) -> None:
    first, second = pair.run(_refused_dtensors, case)
    assert first == second
    assert message in first


def _shares(num_tasks: int) -> list[int]:
    return hf.distributed.local_tasks({"x": torch.arange(num_tasks)})["x"].tolist()


@pytest.mark.parametrize("num_tasks", [5, 1, 0])
def test_shares_are_even_and_in_order(pair: ranks.Ranks, num_tasks: int) -> None:
    first, second = pair.run(_shares, num_tasks)
    assert first + second == list(range(num_tasks))
    assert 0 <= len(second) - len(first) <= 1


def _more_ranks_than_tasks(split: tuple[int, ...], at_once: Any, chunk_size: Any) -> None:
    hparams, tasks = _task_arguments(sum(split))
    start = sum(split[: dist.get_rank()])
    mine = {name: leaf[start : start + split[dist.get_rank()]] for name, leaf in tasks.items()}
    adapt = _adapt("value")
    expected, (values, aux) = torch.func.vmap(adapt, in_dims=(None, 0))(hparams, tasks)
    fn = hf.task_map(adapt, (None, 0), at_once)
    grads, rest = hf.distributed.task_parallel(fn, chunk_size=chunk_size)(hparams, mine)
    torch.testing.assert_close(grads, {name: grad.mean(0) for name, grad in expected.items()})
    torch.testing.assert_close(rest, (values, aux))


@pytest.mark.slow
@pytest.mark.parametrize("split", [(1, 0, 3, 2), (0, 0, 1, 0), (2, 2, 2, 2)])
@pytest.mark.parametrize(("at_once", "chunk_size"), [("auto", None), (1, 2)])
def test_tasks_on_four_ranks(
    four: ranks.Ranks, split: tuple[int, ...], at_once: Any, chunk_size: Any
) -> None:
    four.run(_more_ranks_than_tasks, split, at_once, chunk_size)


def _two_groups() -> tuple[float, float]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    call = hf.distributed.task_parallel(lambda m, tasks: (m * tasks, tasks), group=groups[rank % 2])
    mine = torch.full((rank,), float(rank))
    (grad, values) = call(torch.tensor(2.0), mine)
    with pytest.raises(ValueError, match="not in the group"):
        hf.distributed.task_parallel(lambda m, tasks: m, group=groups[1 - rank % 2])(
            torch.tensor(1.0), mine
        )
    return float(grad), values.tolist()


@pytest.mark.slow
def test_groups_of_ranks(four: ranks.Ranks) -> None:
    even, odd = (4.0, [2.0, 2.0]), (2 * (1 + 3 * 3) / 4, [1.0, 3.0, 3.0, 3.0])
    assert four.run(_two_groups) == [even, odd, even, odd]


def test_alone_without_a_process_group() -> None:
    hparams, tasks = _task_arguments()
    adapt = _adapt("value")
    fn = torch.func.vmap(adapt, in_dims=(None, 0))
    expected, values = fn(hparams, tasks)
    for chunk_size, mapped in ((None, fn), (4, hf.task_map(adapt, (None, 0), chunk_size=3))):
        call = hf.distributed.task_parallel(mapped, chunk_size=chunk_size)
        grads, (value, _) = call(hparams, hf.distributed.local_tasks(tasks))
        torch.testing.assert_close(grads, {name: grad.mean(0) for name, grad in expected.items()})
        torch.testing.assert_close(value, values[0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduce": "max"}, "expected 'mean', 'sum' or None"),
        ({"chunk_size": 0}, "chunk_size is 0; expected None or an integer >= 1"),
        ({}, "Put it into fn"),
    ],
)
def test_bad_arguments_of_task_parallel(keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(
            lambda t: hf.distributed.task_parallel(lambda m, t: m, **keywords)(torch.ones(()), t)
        )(torch.ones(2, 2))


def _run_imaml(out: Path) -> tuple[list[Any], list[Any]]:
    """Hypergradients and learning curve of three iterations of iMAML in float64, on noise."""
    import fewshot
    import imaml

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 4, 28, 28), dtype=torch.uint8, generator=generator)
    split = fewshot.Split(images, list("abcdefghijkl"), "noise")
    data = fewshot.Data(split, split, split)
    options = "--ways=2 --queries=2 --tasks=3 --inner-steps=3 --test-tasks=3 --iterations=3"
    options += " --meta-lr=1e-4"
    torch.set_default_dtype(F64)
    try:
        with (
            mock.patch.object(fewshot, "load_glyphs", return_value=data),
            mock.patch.object(fewshot, "VALIDATION_TASKS", 2),
            mock.patch.object(hf, "assign_grads", wraps=hf.assign_grads) as assigned,
        ):
            imaml.main([*options.split(), f"--out={out}"])
    finally:
        torch.set_default_dtype(torch.float32)
    grads = [{k: g.numpy() for k, g in call.args[1].items()} for call in assigned.call_args_list]
    files = sorted(path.name for path in out.iterdir())
    results = out / "results.json"
    return grads, json.loads(results.read_text())["history"] if results.name in files else files


@pytest.mark.slow
def test_imaml_on_two_ranks_is_imaml_on_one(pair: ranks.Ranks, tmp_path: Path) -> None:
    expected, history = _run_imaml(tmp_path / "one")
    (first, curve), (second, _) = pair.run(_run_imaml, tmp_path / "two")
    assert len(expected) == 3
    for grads in (first, second):
        for actual, single in zip(grads, expected, strict=True):
            for name, grad in single.items():
                scale = abs(grad).max()
                assert abs(actual[name] - grad).max() <= 1e-12 * scale, name
    for entry, single in zip(curve, history, strict=True):
        assert entry == pytest.approx(single, rel=1e-12)


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_of_torchrun_and_the_run_goes_on(tmp_path: Path) -> None:
    """The ranks stop at the same iteration, nothing is left running, and --resume goes on."""
    folder = Path(__file__).parents[2]
    options = ["--ways=2", "--queries=2", "--tasks=3", "--inner-steps=2", "--test-tasks=3"]
    options += ["--iterations=100"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "examples" / "imaml.py"), *options, f"--out={tmp_path}"]
    run = functools.partial(
        subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process = run(command)
    path = tmp_path / "checkpoint.pt"
    while not path.exists() or torch.load(path)["iteration"] == 0:  # both ranks are in the loop
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("Go on with:\n") == 1  # not once a rank
    assert "torchrun --standalone --nproc-per-node 2 " in output
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left
    assert 0 < torch.load(path)["iteration"] < 100
    process = run([*command, "--resume"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "100/100" in output


def test_no_tasks_at_all() -> None:
    with pytest.raises(ValueError, match="no rank has a task"):
        hf.distributed.task_parallel(lambda m, tasks: m)(torch.ones(()), torch.ones(0))
