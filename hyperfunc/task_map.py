"""``vmap`` over tasks that takes as many at a time as is fastest."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import optree
import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_count
from hyperfunc._engine.convergence import ConvergenceWarning
from hyperfunc._engine.results import RESULTS, ChoiceStats, HypergradError, SolveStats
from hyperfunc._engine.shown import show
from hyperfunc._engine.successes import mean_of, sum_over_successes
from hyperfunc._engine.wrapped_functions import WrappedFunction
from hyperfunc._torch import batching, derivative_rules, tracking
from hyperfunc._types import Leaves

Reduction: TypeAlias = Literal["mean", "sum"]

_RESULT = SolveStats._fields.index("result")
_SMALLEST_BATCH = 6
_SMALLEST_BUDGET = 2**22
_RANDOMNESS = ("error", "same", "different")


def task_map(
    fn: Callable[..., Any],
    in_dims: Any = 0,
    chunk_size: int | Literal["auto"] | None = "auto",
    *,
    reduce: Reduction | None = None,
    randomness: Literal["error", "same", "different"] = "error",
) -> Callable[..., Any]:
    r"""Map a function over tasks, as `torch.func.vmap`, so many at a time as is fastest.

    A batch saves calls, and keeps several intra-op threads at work; but once the vectors of all its
    tasks no longer fit into a processor's cache, a loop is faster. The rule of ``"auto"``:

    - with an argument on a GPU, or on any device but the CPU, all tasks are one batch;
    - on a CPU, a task counts the bytes of its own slices and of all tensors that are not mapped
      (meta-parameters, of which each task makes a version of its own), and as many tasks fit as
      make an eighth of the third-level cache for each intra-op thread (`torch.get_num_threads`),
      4 MiB at least and 16 MiB at most. Where the cache is unknown, or a task has a tensor of four
      or more dimensions, as convolutions have, which gain little from batches, it is 4 MiB. Fewer
      than six are taken one by one, without ``vmap``. Else there are as few chunks as hold the
      tasks, and these are of one size, but for the last.

    The constants were measured beforehand, on 1 and 2 threads of an AMD processor with 32 MiB of
    third-level cache and of an Intel one with 300 MiB; nothing is timed in a call, so that it is
    repeated with the same numbers. Between two chunk sizes, and so between two machines, results
    differ by rounding, as those of batched and single matrix products do.

    Tasks are not run in threads: on idle processors that takes about as long as chunks with several
    intra-op threads. On busy ones, where intra-op threads wait for each other, it can be several
    times as fast. The benchmark compares them, with a way to do it by hand::

        python -m tests.benchmarks.run --problems P3a --threads 2 --only "task_map|threads over"

    Args:
        fn: ``(*args) -> tree of tensors``, for one task, without branches that depend on values of
            tensors.
        in_dims: the dimension that tells tasks apart, for all arguments, or a tuple with one entry
            for each: a number, None for an argument that all tasks share, or a tree of these.
        chunk_size: how many tasks at a time: 1 for a loop, None for one batch, or ``"auto"``.
        reduce: ``"mean"`` or ``"sum"``: what is made over tasks of all floating-point tensors that
            ``fn`` returns, without keeping more of them than those of one chunk. Integers, bools
            and the `hyperfunc.SolveStats` of a `hyperfunc.Solution` remain those of each task.
            Tasks that failed, by such statistics or with entries that are not finite (as
            ``throw=False`` returns them), are left out, as by `mean_over_successes`; a
            `hyperfunc.ConvergenceWarning` tells how many, where no statistics do. None: the results
            of all tasks, with a new first dimension.
        randomness: as for `torch.func.vmap`: whether random numbers are an ``"error"``, the
            ``"same"`` for all tasks, or ``"different"``; these depend on the chunk size. In a loop
            only the default generator of the CPU is looked after.

    Returns:
        A function of the batched arguments, whose results have a new first dimension for tasks, or
        are reduced over them.

    Raises:
        TypeError: if ``fn`` is no function, or returns something that is not a tensor, or
            ``chunk_size`` is of another type.
        ValueError: for other values of ``chunk_size``, ``reduce`` or ``randomness``, and, when
            called, if ``in_dims`` does not suit the arguments, or these differ in their number of
            tasks.
        RuntimeError: when called, if ``fn`` draws random numbers with ``randomness="error"``.
        HypergradError: when called, with ``reduce``, if all tasks failed.

    Example:
        >>> def inner_loss(w, meta, x, y):
        ...     return ((x @ w - y) ** 2).sum() + ((w - meta) ** 2).sum()
        >>> def solve(meta, x, y):
        ...     return torch.linalg.solve(x.mT @ x + torch.eye(2), x.mT @ y + meta)
        >>> def query_loss(w, meta, x, y):
        ...     return (w**2).sum()
        >>> meta_grad = hf.hypergrad(solve, query_loss, inner_loss=inner_loss)
        >>> meta, x, y = torch.zeros(2), torch.ones(3, 4, 2), torch.ones(3, 4)
        >>> hf.task_map(meta_grad, in_dims=(None, 0, 0))(meta, x, y).shape
        torch.Size([3, 2])
        >>> hf.task_map(meta_grad, (None, 0, 0), reduce="mean")(meta, x, y).shape
        torch.Size([2])
    """
    check_callable(fn, "task_map: fn", "(*args) -> tree of tensors, for one task")
    if chunk_size not in ("auto", None):
        check_count("task_map", "chunk_size", chunk_size, also="'auto', None or ")
    if randomness not in _RANDOMNESS:
        raise ValueError(
            f"task_map: randomness is {show(randomness)}; expected one of {', '.join(_RANDOMNESS)}"
        )
    if reduce not in (*get_args(Reduction), None):
        raise ValueError(f"task_map: reduce is {show(reduce)}; expected 'mean', 'sum' or None")
    return _MappedFunction(fn, in_dims, chunk_size, randomness, reduce)


def _budget(cache: int) -> int:
    """Bytes for each intra-op thread, on a processor with so many bytes of third-level cache."""
    return min(max(cache // 8, _SMALLEST_BUDGET), 2**24)


def _cache_size(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache/index3")) -> int:
    """Bytes of third-level cache, as Linux tells, or 0."""
    try:
        return 1024 * int((folder / "size").read_text().strip().removesuffix("K"))
    except (OSError, ValueError):
        return 0


_BUDGET = _budget(_cache_size())


class _MappedFunction(WrappedFunction):
    """What `task_map` returns."""

    maker = "task_map"

    def __init__(
        self, fn: Callable[..., Any], in_dims: Any, chunk_size: Any, randomness: Any, reduce: Any
    ) -> None:
        super().__init__(fn)
        self._fn, self._in_dims, self._reduce = fn, in_dims, reduce
        self._chunk_size, self._randomness = chunk_size, randomness

    def __call__(self, *args: Any) -> Any:
        leaves, spec = trees.flatten(args, none_is_leaf=True)
        dims = _flat_dims(self._in_dims, args, leaves, spec)
        num_tasks = _num_tasks(leaves, dims, spec)
        size = num_tasks if self._chunk_size is None else self._chunk_size
        if size == "auto":
            size = _best_size(num_tasks, leaves, dims)
        call = _MappedCall(self._fn, spec, dims, self._randomness, self._reduce)
        with derivative_rules.active(tracking.transforms_active() or tracking.is_tracked(leaves)):
            if size == 1:
                return call.one_by_one(leaves, num_tasks)
            return call.in_chunks(leaves, num_tasks, size)


class _MappedCall:
    """One call of a mapped function."""

    def __init__(
        self, fn: Any, spec: Any, dims: list[int | None], randomness: str, reduce: Any
    ) -> None:
        self._fn, self._spec, self._dims, self._randomness = fn, spec, dims, randomness
        self._out_spec: trees.TreeSpec | None = None
        self._results = _Stacked() if reduce is None else _Reduced(reduce, _name(fn))

    def one_by_one(self, leaves: Sequence[Any], num_tasks: int) -> Any:
        columns = [
            [leaf] * num_tasks if dim is None else leaf.unbind(dim)
            for leaf, dim in zip(leaves, self._dims, strict=True)
        ]
        start = torch.get_rng_state()
        for task, row in enumerate(zip(*columns, strict=True)):
            if self._randomness == "same" and task:
                torch.set_rng_state(start)
            outputs = tuple(leaf[None] for leaf in self._one(*row))
            self._take(outputs)
        if self._randomness == "error" and not torch.equal(start, torch.get_rng_state()):
            raise RuntimeError(
                f"task_map: {_name(self._fn)} draws random numbers. Write randomness='different' "
                f"for numbers of its own in each task, or 'same' for the same ones in all"
            )
        return self._unflatten(self._results.leaves())

    def in_chunks(self, leaves: Sequence[Any], num_tasks: int, size: int) -> Any:
        mapped = {index: dim for index, dim in enumerate(self._dims) if dim is not None}

        def batched(*tensors: Tensor) -> Leaves:
            row = dict(enumerate(leaves)) | dict(zip(mapped, tensors, strict=True))
            return self._one(*row.values())

        run = torch.func.vmap(batched, tuple(mapped.values()), randomness=self._randomness)
        start = torch.get_rng_state() if self._randomness == "same" else None
        for low in range(0, num_tasks, size):
            if start is not None and low:
                torch.set_rng_state(start)
            length = min(size, num_tasks - low)
            parts = (leaves[i].narrow(dim, low, length) for i, dim in mapped.items())
            outputs = run(*(parts if size < num_tasks else (leaves[i] for i in mapped)))
            self._take(outputs)
        return self._unflatten(self._results.leaves())

    def _one(self, *row: Any) -> Leaves:
        output = self._fn(*optree.tree_unflatten(self._spec, row))
        flat, self._out_spec = trees.flatten(output)
        for index, leaf in enumerate(flat):
            if not isinstance(leaf, Tensor):
                path = trees.paths(self._out_spec, "result")[index]
                raise TypeError(
                    f"task_map: {_name(self._fn)} returned {show(leaf)} "
                    f"of type {type(leaf).__name__} "
                    f"as {path}; expected a tensor"
                )
        return tuple(flat)

    def _take(self, outputs: Leaves) -> None:
        assert self._out_spec is not None
        self._results.add(outputs, self._out_spec)

    def _unflatten(self, leaves: Leaves) -> Any:
        assert self._out_spec is not None
        return trees.unflatten(self._out_spec, leaves)


class _Stacked:
    """The results of all tasks."""

    def __init__(self) -> None:
        self._chunks: list[Leaves] = []

    def add(self, chunk: Leaves, spec: trees.TreeSpec) -> None:
        """Take the results of some tasks: tensors with a first dimension for these."""
        self._chunks.append(chunk)

    def leaves(self) -> Leaves:
        """What is to be returned."""
        if len(self._chunks) == 1:
            return self._chunks[0]
        return tuple(torch.cat(column) for column in zip(*self._chunks, strict=True))


class _Reduced:
    """Sums over the tasks that succeeded, and for each task what is no number to be summed."""

    def __init__(self, reduce: str, name: str) -> None:
        self._reduce, self._name = reduce, name
        self._summed: list[int] = []
        self._each = _Stacked()
        self._sums: Leaves = ()
        self._num_tasks = 0
        self._count: Any = 0
        self._unseen: Any = 0  # failures that no statistics tell of

    def add(self, chunk: Leaves, spec: trees.TreeSpec) -> None:
        """Take the results of some tasks: tensors with a first dimension for these."""
        known = list(_statistics(spec))
        kept = {start + i for start, size in known for i in range(size)}
        self._summed = [i for i, x in enumerate(chunk) if x.is_floating_point() and i not in kept]
        if not self._summed:
            raise TypeError(
                f"task_map: {self._name} returned no floating-point tensor, which reduce="
                f"{self._reduce!r} is for. Write reduce=None"
            )
        terms, num_tasks = tuple(chunk[i] for i in self._summed), len(chunk[0])
        self._each.add(tuple(x for i, x in enumerate(chunk) if i not in self._summed), spec)
        stats: Any = ()
        told: Any = 0
        if known:
            codes = (chunk[start + _RESULT] > int(RESULTS.max_steps) for start, _ in known)
            failed = functools.reduce(
                torch.logical_or, [code.reshape(num_tasks, -1).any(1) for code in codes]
            )
            stats, told = SolveStats(failed, failed, failed * int(RESULTS.breakdown)), failed.sum()
        sums, count = sum_over_successes(terms, stats)
        if self._num_tasks:
            sums = trees.axpy(1.0, sums, self._sums, out=trees.reusable(self._sums, sums))
        self._sums, self._like = sums, tuple(leaf[0] for leaf in terms)
        self._count, self._num_tasks = self._count + count, self._num_tasks + num_tasks
        self._unseen = self._unseen + num_tasks - count - told

    def leaves(self) -> Leaves:
        """What is to be returned."""
        self._tell_of_failures()
        count = self._count if self._reduce == "mean" else torch.ones_like(self._count)
        reduced = dict(zip(self._summed, mean_of(self._sums, count, self._like), strict=True))
        each = iter(self._each.leaves())
        total = len(self._summed) + len(self._each.leaves())
        return tuple(reduced[i] if i in reduced else next(each) for i in range(total))

    def _tell_of_failures(self) -> None:
        if torch.compiler.is_compiling() or not batching.can_look(self._count):
            return
        if batching.any_true(self._count == 0):
            raise HypergradError(
                f"task_map: all {self._num_tasks} tasks failed, so that there is nothing to "
                f"reduce. Call {self._name} for one of them, without throw=False, to see why"
            )
        unseen = int(batching.largest(self._unseen))
        if unseen > 0:
            text = (
                f"task_map: {unseen} of {self._num_tasks} tasks have entries that are not finite, "
                f"and are left out of the {self._reduce}"
            )
            warnings.warn(ConvergenceWarning(text), stacklevel=4)


def _statistics(spec: trees.TreeSpec, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where the leaves of statistics begin, and how many there are."""
    if spec.type in (SolveStats, ChoiceStats):
        yield start, spec.num_leaves
        return
    for child in spec.children():
        yield from _statistics(child, start)
        start += child.num_leaves


def _flat_dims(
    in_dims: Any, args: tuple[Any, ...], leaves: Sequence[Any], spec: trees.TreeSpec
) -> list[int | None]:
    tree: Any = args
    prefix: Any = (in_dims,) * len(args) if isinstance(in_dims, int) else in_dims
    prefix = tuple(prefix) if isinstance(prefix, list) else prefix
    try:
        dims: list[int | None] = optree.broadcast_prefix(
            prefix, tree, none_is_leaf=True, namespace=trees.NAMESPACE
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"task_map: in_dims is {show(in_dims)}, which does not suit the {len(args)} arguments; "
            f"expected a number, or a tuple with one entry for each argument: a number, None, or a "
            f"tree of these"
        ) from error
    for leaf, dim, path in zip(leaves, dims, trees.paths(spec, "args"), strict=True):
        if dim is None:
            continue
        if type(dim) is not int:
            raise TypeError(
                f"task_map: in_dims is {show(dim)} at {path}; expected an integer or None"
            )
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"task_map: {path} is {show(leaf)} "
                f"of type {type(leaf).__name__}, and in_dims is {dim} "
                f"there; expected a tensor to take slices of. Write torch.as_tensor(...) around an "
                f"array of tasks, or None in in_dims for what all of them share"
            )
        if not -leaf.ndim <= dim < leaf.ndim:
            raise ValueError(
                f"task_map: {path} has shape {tuple(leaf.shape)}, and in_dims is {dim} there; "
                f"expected a dimension that it has"
            )
    return [dim if dim is None else dim % leaf.ndim for leaf, dim in zip(leaves, dims, strict=True)]


def _num_tasks(leaves: Sequence[Any], dims: Sequence[int | None], spec: trees.TreeSpec) -> int:
    sizes = {
        index: leaf.shape[dim]
        for index, (leaf, dim) in enumerate(zip(leaves, dims, strict=True))
        if dim is not None
    }
    if not sizes:
        raise ValueError(
            "task_map: in_dims is None for every argument; expected one at least that differs "
            "between tasks"
        )
    counts = sorted(set(sizes.values()))
    if len(counts) > 1 or counts[0] == 0:
        paths = trees.paths(spec, "args")
        got = ", ".join(f"{size} in {paths[index]}" for index, size in sizes.items())
        raise ValueError(f"task_map: got numbers of tasks {got}; expected one number, 1 or more")
    return int(counts[0])


def _best_size(num_tasks: int, leaves: Sequence[Any], dims: Sequence[int | None]) -> int:
    """The rule that the docstring of `task_map` states."""
    size, budget = 0, _BUDGET
    for leaf, dim in zip(leaves, dims, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.device.type != "cpu":
            return num_tasks
        if leaf.ndim - (dim is not None) >= 4:
            budget = _SMALLEST_BUDGET
        size += leaf.numel() * leaf.element_size() // (1 if dim is None else leaf.shape[dim])
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    fitting = budget * threads // max(size, 1)
    if fitting < _SMALLEST_BATCH:
        return 1
    return math.ceil(num_tasks / math.ceil(num_tasks / fitting))


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", None) or repr(fn)
