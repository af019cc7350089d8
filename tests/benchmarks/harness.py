"""What the benchmarks share: entries, their check against float64, and interleaved timing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Work = TypeVar("Work", bound=Any)

FLOOR, RAW, OURS, PEER = "floor", "raw torch", "hyperfunc", "peer"

# Threads that wait for work keep spinning for a while; the next entry starts after that.
_PAUSE = 0.005
_LEAST_SECONDS = 0.01
_LONG = 1.0


class NotRun(Exception):
    """An entry that cannot take part here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to do a problem's work.

    ``prepare`` imports and sets up what the entry needs, and returns the function that is timed:
    it gives the hypergradient as a list of tensors or arrays, or None for a floor, which does the
    products and gradients alone.
    """

    name: str
    group: str
    prepare: Callable[[], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A piece of work with the ways to do it, and its hypergradient in float64."""

    key: str
    title: str
    entries: Sequence[Entry]
    reference: Callable[[], Sequence[torch.Tensor]]
    tolerance: float = 1e-3


def converted(work: Work, convert: Callable[[torch.Tensor], torch.Tensor]) -> Work:
    """A piece of work, a dataclass, with the tensors in its lists and tuples converted."""
    changes = {
        name: type(value)(map(convert, value))
        for name, value in vars(work).items()
        if isinstance(value, list | tuple) and all(isinstance(v, torch.Tensor) for v in value)
    }
    return dataclasses.replace(work, **changes)


def in_double(work: Work) -> Work:
    """A piece of work in float64."""
    return converted(work, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def array(leaf: torch.Tensor) -> Any:
    """A tensor as an array of NumPy, wherever it is."""
    return leaf.cpu().numpy()


def as_tensor(leaf: Any) -> torch.Tensor:
    """A tensor or array of any library, in float64 on the CPU."""
    if not isinstance(leaf, torch.Tensor):
        import numpy as np

        leaf = torch.from_numpy(np.array(leaf))
    return leaf.detach().cpu().double()


def measure(
    problem: Problem, seconds: float, log: Callable[[str], None], only: str = ""
) -> list[dict[str, Any]]:
    """Check every entry, then time them in turn, again and again, for so many seconds."""
    expected = _flat(problem.reference())
    rows: list[dict[str, Any]] = []
    functions: dict[int, Callable[[], Any]] = {}
    for entry in problem.entries:
        row: dict[str, Any] = {"name": entry.name, "group": entry.group}
        rows.append(row)
        if not any(part in entry.name for part in only.split("|")) and entry.group != FLOOR:
            row["not_run"] = "not chosen"
            continue
        begin = time.perf_counter()
        try:
            function = entry.prepare()
            result = function()
        except ModuleNotFoundError as error:
            row["not_run"] = f"needs {error.name}, which is not installed"
        except NotRun as error:
            row["not_run"] = str(error)
        except Exception as error:
            if entry.group in (FLOOR, RAW):
                raise
            row["not_run"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            row["first_call"] = time.perf_counter() - begin
            if result is not None:
                row["error"] = float((_flat(result) - expected).norm() / expected.norm())
            if row.get("error", 0.0) <= problem.tolerance:
                functions[len(rows) - 1] = function
            else:
                row["not_run"] = f"wrong: relative error {row['error']:.1e}"
        took = f"checked; the first call took {row.get('first_call', 0.0):.1f} s"
        log(f"  {entry.name}: {row.get('not_run', took)}")
    log(f"  timing {len(functions)} entries in turn, for {seconds:.0f} s or three rounds")
    for index, times in zip(functions, interleaved(list(functions.values()), seconds), strict=True):
        rows[index].update(seconds=statistics.median(times), fastest=min(times), repeats=len(times))
    return rows


def interleaved(functions: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Times of the functions in turn, again and again, for so many seconds.

    There are three rounds at least; a call that alone takes longer than those seconds is made once.
    """
    counts, times = [], []
    for function in functions:
        once = _time(function, 1)
        if once < _LONG:  # it has warmed the processor's caches up, and is not counted
            once = min(once, _time(function, 1))
        counts.append(max(1, round(_LEAST_SECONDS / once)))  # short calls are timed many at once
        times.append([once] if once >= _LONG else [])
    end = time.perf_counter() + seconds
    repeated = [index for index, samples in enumerate(times) if not samples or samples[0] < seconds]
    while repeated and (time.perf_counter() < end or len(times[repeated[-1]]) < 3):
        for index in repeated:
            time.sleep(_PAUSE)
            times[index].append(_time(functions[index], counts[index]))
    return times


def _time(function: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - begin) / count


def _flat(leaves: Sequence[Any]) -> torch.Tensor:
    return torch.cat([as_tensor(leaf).reshape(-1) for leaf in leaves])
