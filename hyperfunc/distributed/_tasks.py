"""Tasks in parallel: each rank adapts its share, and their hypergradients are added up."""

from __future__ import annotations

import dataclasses
import math
import pickle
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc import _ad, _sharding, _tree
from hyperfunc._implicit import HypergradError
from hyperfunc._results import Solution
from hyperfunc._types import Leaves, TensorTree

Reduction: TypeAlias = Literal["mean", "sum"]


def task_parallel(
    fn: Callable[..., Any],
    *,
    group: dist.ProcessGroup | None = None,
    reduce: Reduction | None = "mean",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    r"""Make a function of many tasks one of all tasks on all ranks.

    With :math:`T_r` tasks on rank :math:`r` and :math:`g_{rt}` the hypergradient of its task
    :math:`t`, every rank gets

    .. math:: \Big( \sum_r T_r \Big)^{-1} \sum_r \sum_{t \le T_r} g_{rt} ,

    the mean over all tasks, however unevenly they are spread, or the sum. The numbers are those of
    one process up to the order of summation.

    A call takes a collective of a few integers, by which the ranks tell each other how many tasks
    they have and whether all went well; one all-reduce for each dtype of ``hparams``, of all leaves
    flattened; and, for what else ``fn`` returns, one all-gather for each dtype. Half precision is
    summed in float32. Without an initialised process group this is a world of one, and nothing is
    sent.

    Args:
        fn: ``(hparams, tasks, *args) -> hypergradients`` or ``(hypergradients, rest)``, a function
            of a batch of tasks: all tensors of ``tasks``, of the hypergradients, which form a tree
            like ``hparams``, and of ``rest`` have a first dimension that counts them. That is what
            ``torch.func.vmap(adapt, in_dims=(None, 0))`` is for an ``adapt`` made by
            `hyperfunc.hypergrad`, `hypergrad_and_value` or `hypergrad_and_solution`.
        group: the ranks that take part; by default all. Each of them has to make the call, with
            the same ``hparams``.
        reduce: ``"mean"`` or ``"sum"`` of the hypergradients over all tasks, or None for those of
            each task, gathered like ``rest``.
        chunk_size: call ``fn`` with so many tasks at a time, >= 1, and add up a chunk's
            hypergradients over the ranks while the next is under way, where the backend sends in
            the background. Takes an all-reduce for each chunk in place of one. None: all at once.

    Returns:
        ``call(hparams, tasks, *args)``, with this rank's own tasks, any number of them, or none:
        see `local_tasks` for a share of a batch. It returns what ``fn`` returns, with the
        hypergradients reduced, and with ``rest`` for the tasks of all ranks, in their order. Of a
        `hyperfunc.Solution`, ``value``, ``aux`` and ``stats`` are gathered; ``params`` and
        ``adjoint`` stay those of this rank's tasks, to start from in the next call. Results carry
        no graph.

    Raises:
        ValueError: for a ``reduce`` or ``chunk_size`` not listed above; when called, inside a
            ``torch.func`` transform, with DTensors as ``hparams``, with no tasks on any rank, or
            where ranks return something else beside the hypergradients than others do.
        HypergradError: when called, on every rank and with the same text, if ``fn`` raised or
            returned a hypergradient that is not finite on one of them. The text names the rank
            and the task, which is found by calling ``fn`` with one task at a time.

    Example:
        >>> def adapt(m, task):  # min_w (w - task)^2 + (w - m)^2, and then (w - 1)^2
        ...     return (m + task) / 2
        >>> fn = hf.hypergrad_and_value(
        ...     adapt,
        ...     lambda w, m, task: (w - 1) ** 2,
        ...     inner_loss=lambda w, m, task: (w - task) ** 2 + (w - m) ** 2,
        ... )
        >>> call = hf.distributed.task_parallel(torch.func.vmap(fn, in_dims=(None, 0)))
        >>> tasks = torch.tensor([0.0, 2.0, 4.0])
        >>> call(torch.tensor(0.0), hf.distributed.local_tasks(tasks))
        (tensor(0.), tensor([1., 0., 1.]))
    """
    if not callable(fn):
        raise TypeError(
            f"task_parallel: fn is {fn!r}; expected a function (hparams, tasks, *args) such as "
            f"torch.func.vmap(adapt, in_dims=(None, 0))"
        )
    if reduce not in (*get_args(Reduction), None):
        raise ValueError(f"task_parallel: reduce is {reduce!r}; expected 'mean', 'sum' or None")
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(
            f"task_parallel: chunk_size is {chunk_size!r}; expected an integer >= 1, or None"
        )

    def call(hparams: TensorTree, tasks: TensorTree, *args: Any) -> Any:
        flat = _Flat(*_check_hparams(hparams))
        ranks = _Ranks(group, flat.device)
        share = _Share(fn, flat, reduce, tasks, args)
        pending = []
        if chunk_size is None:
            share.adapt(slice(0, share.count))
        else:
            # every rank takes part in as many sums as the one with the most chunks
            for start in range(0, ranks.largest(share.count), chunk_size):
                sums = share.adapt(slice(start, min(start + chunk_size, share.count)))
                pending.append([ranks.start_sum(part) for part in sums])
        counts = ranks.agree(share)
        if chunk_size is None:
            pending.append([ranks.start_sum(part) for part in share.sums])
        gathered, rest_spec = ranks.gather(share, counts)
        if reduce is None:
            num = len(flat.like)
            grads, gathered = tuple(gathered[:num]), gathered[num:]
        else:
            totals = [sum(wait() for wait in waits) for waits in zip(*pending, strict=True)]
            grads = flat.restore(totals, 1 / sum(counts) if reduce == "mean" else 1.0)
        hypergradients = _tree.unflatten(flat.spec, grads)
        if rest_spec is None:
            return hypergradients
        return hypergradients, share.with_own(_tree.unflatten(rest_spec, gathered))

    return call


def local_tasks(tasks: TensorTree, *, group: dist.ProcessGroup | None = None) -> TensorTree:
    """This rank's share of a batch of tasks that every rank holds.

    Args:
        tasks: a tree of tensors whose first dimension counts ``T`` tasks.
        group: the ranks to share them; by default all.

    Returns:
        The same tree with tasks ``r T // R`` up to ``(r + 1) T // R`` on rank ``r`` of ``R``, which
        may be none. Views, not copies.

    Raises:
        ValueError: for tensors whose first dimensions differ, or without one.

    Example:
        >>> hf.distributed.local_tasks({"x": torch.zeros(5, 2)})["x"].shape  # one rank
        torch.Size([5, 2])
    """
    count = _count_tasks(tasks)
    ranks = _Ranks(group, torch.device("cpu"))
    start, stop = (rank * count // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return _tree.tree_map(lambda leaf: leaf[start:stop], tasks)


@dataclasses.dataclass(frozen=True, eq=False)
class _Flat:
    """How trees like hparams become one vector for each dtype, in which they are summed."""

    like: Leaves
    spec: _tree.TreeSpec

    @property
    def device(self) -> torch.device:
        return self.like[0].device

    def zeros(self) -> list[Tensor]:
        return self.flatten([torch.zeros_like(leaf, requires_grad=False) for leaf in self.like])

    def flatten(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.cat([leaves[i].to(self.device, dtype).reshape(-1) for i in indices])
            for dtype, indices in self._groups().items()
        ]

    def restore(self, vectors: Sequence[Any], factor: float) -> Leaves:
        result: dict[int, Tensor] = {}
        for indices, vector in zip(self._groups().values(), vectors, strict=True):
            parts = torch.split(factor * vector, [self.like[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                leaf = self.like[i]
                result[i] = part.reshape(leaf.shape).to(leaf.device, leaf.dtype)
        return tuple(result[i] for i in range(len(self.like)))

    def _groups(self) -> dict[torch.dtype, list[int]]:
        groups: dict[torch.dtype, list[int]] = {}
        for index, leaf in enumerate(self.like):
            groups.setdefault(_tree.accumulation_dtype((leaf,)), []).append(index)
        return groups


class _Share:
    """The tasks of this rank: what came of them, or why nothing did."""

    def __init__(
        self,
        fn: Callable[..., Any],
        flat: _Flat,
        reduce: Reduction | None,
        tasks: TensorTree,
        args: tuple[Any, ...],
    ) -> None:
        self._fn, self._flat, self._reduce = fn, flat, reduce
        self._tasks, self._args = tasks, args
        self._own: list[tuple[TensorTree, TensorTree]] = []
        self._parts: list[Leaves] = []
        self.rest_spec: _tree.TreeSpec | None = None
        self.sums: list[Tensor] = [] if reduce is None else flat.zeros()
        self.count, self.failed_task = 0, -1
        self.error: Exception | None = None
        try:
            self.count = _count_tasks(tasks)
        except Exception as error:
            self.error = error

    def adapt(self, chunk: slice) -> list[Tensor]:
        """Adapt some tasks; returns the sums of their hypergradients, zeros after a failure."""
        sums = [torch.zeros_like(total) for total in self.sums]
        if self.error is None and chunk.start < chunk.stop:
            try:
                sums = self._adapt(chunk)
            except Exception as error:
                self.error, self.failed_task = self._locate(error, chunk)
            else:
                self.sums = [total + part for total, part in zip(self.sums, sums, strict=True)]
        return sums

    def parts(self) -> list[Tensor]:
        """What is to be gathered, for all tasks of this rank."""
        return [torch.cat(chunks) for chunks in zip(*self._parts, strict=True)]

    def with_own(self, rest: Any) -> Any:
        """What was gathered, with the solutions and adjoints of this rank's own tasks."""
        if not isinstance(rest, Solution) or not self._own:
            return rest
        params, adjoint = (
            _tree.tree_map(lambda *parts: torch.cat(parts), *trees)
            for trees in zip(*self._own, strict=True)
        )
        return rest._replace(params=params, adjoint=adjoint)

    def _adapt(self, chunk: slice) -> list[Tensor]:
        count = chunk.stop - chunk.start
        grads, leaves, spec, own = self._split(self._call(chunk), count)
        for leaf, path in zip(grads, _tree.paths(self._flat.spec, "hparams"), strict=True):
            finite = torch.isfinite(leaf.detach()).reshape(count, -1).all(1)
            if not finite.all():
                raise _NonfiniteError(path, int(finite.logical_not().nonzero()[0]))
        self._parts.append(_ad.detach((*grads, *leaves) if self._reduce is None else leaves))
        self._own.extend(own)
        self.rest_spec = spec
        if self._reduce is None:
            return []
        return self._flat.flatten([wide.detach().sum(0) for wide in map(_widen, grads)])

    def _call(self, chunk: slice) -> Any:
        tasks = _tree.tree_map(lambda leaf: leaf[chunk], self._tasks)
        return self._fn(_tree.unflatten(self._flat.spec, self._flat.like), tasks, *self._args)

    def _split(
        self, output: Any, count: int
    ) -> tuple[Leaves, Leaves, _tree.TreeSpec | None, list[tuple[TensorTree, TensorTree]]]:
        """Hypergradients, the leaves and structure of the rest, and what of it stays here."""
        grads, spec = _tree.flatten(output)
        leaves: list[Any] = []
        rest_spec, own = None, []
        if spec != self._flat.spec and isinstance(output, tuple) and len(output) == 2:
            grads, spec = _tree.flatten(output[0])
            rest = output[1]
            if isinstance(rest, Solution):
                own = [_tree.tree_map(torch.detach, (rest.params, rest.adjoint))]
                rest = rest._replace(params=(), adjoint=())
            leaves, rest_spec = _tree.flatten(rest)
        like = tuple(leaf.detach().expand(count, *leaf.shape) for leaf in self._flat.like)
        what = "the hypergradients that fn returned"
        _tree.check_like(grads, spec, like, self._flat.spec, what, "hparams")
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
                assert rest_spec is not None
                path = _tree.paths(rest_spec, "rest")[index]
                shape = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
                raise ValueError(
                    f"fn returned (hypergradients, rest) with {path} a {type(leaf).__name__} "
                    f"{shape}; expected a tensor whose first dimension counts the {count} tasks. "
                    f"Map a function of one task by torch.func.vmap"
                )
        return tuple(grads), tuple(leaves), rest_spec, own

    def _locate(self, error: Exception, chunk: slice) -> tuple[Exception, int]:
        """The first task to fail on its own, and how; or the error of all together."""
        if isinstance(error, _NonfiniteError):
            return error, chunk.start + error.index
        for task in range(chunk.start, chunk.stop):
            try:
                self._call(slice(task, task + 1))
            except Exception as alone:
                return alone, task
        return error, -1


class _NonfiniteError(ValueError):
    """A hypergradient with NaN or Inf in it."""

    def __init__(self, path: str, index: int) -> None:
        super().__init__(f"the hypergradient with respect to {path} is not finite (NaN or Inf)")
        self.index = index


class _Ranks:
    """The ranks of a group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self._alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"this process, rank {dist.get_rank()} of all, is not in the group that was "
                f"passed. Make the call on the ranks of the group alone"
            )

    def largest(self, number: int) -> int:
        """The largest of a number over the ranks."""
        return max(row[0] for row in self._exchange([number]))

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Start a sum over the ranks; the function that is returned waits for it."""
        if self._alone:
            return lambda: values
        values = values.clone()
        work = dist.all_reduce(values, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    def agree(self, share: _Share) -> list[int]:
        """The numbers of tasks on the ranks, or the same error on all if one has failed."""
        kinds = repr((share.rest_spec, [(p.dtype, p.shape[1:]) for p in share.parts()]))
        status = [
            share.count,
            share.error is not None,
            share.failed_task,
            zlib.crc32(kinds.encode()),
        ]
        rows = self._exchange(status)
        counts = [row[0] for row in rows]
        failed = [rank for rank, row in enumerate(rows) if row[1]]
        if failed:
            first = failed[0]
            cause = f"{type(share.error).__name__}: {share.error}"
            cause = self._from_rank(first, cause)
            where, task = f"rank {first} of {self.size}", rows[first][2]
            if task >= 0:
                where += (
                    f" at its task {task}, number {sum(counts[:first]) + task} of {sum(counts)}"
                )
            more = f" ({len(failed)} ranks failed, this one first)" if len(failed) > 1 else ""
            raise HypergradError(f"task_parallel failed on {where}{more}: {cause}") from share.error
        if not sum(counts):
            raise ValueError("task_parallel: no rank has a task. Pass at least one in all")
        busy = [rank for rank, count in enumerate(counts) if count]
        for rank in busy:
            if rows[rank][3] != rows[busy[0]][3]:
                raise ValueError(
                    f"task_parallel: fn returned something else beside the hypergradients on rank "
                    f"{rank} than on rank {busy[0]}; expected the same structure, dtypes and "
                    f"shapes, but for the number of tasks"
                )
        return counts

    def gather(
        self, share: _Share, counts: list[int]
    ) -> tuple[list[Tensor], _tree.TreeSpec | None]:
        """What the ranks have for each of their tasks, put together, and its structure."""
        parts, spec = share.parts(), share.rest_spec
        if self._alone:
            return parts, spec
        if 0 in counts:  # a rank without tasks does not know what fn returns
            kinds = [(part.dtype, tuple(part.shape[1:])) for part in parts]
            busy = next(rank for rank, count in enumerate(counts) if count)
            spec, kinds = self._from_rank(busy, (spec, kinds))
            if not share.count:
                parts = [torch.empty((0, *shape), dtype=dtype) for dtype, shape in kinds]
        result: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(part.dtype for part in parts):
            indices = [i for i, part in enumerate(parts) if part.dtype == dtype]
            sizes = [math.prod(parts[i].shape[1:]) for i in indices]
            columns = [
                parts[i].reshape(share.count, n) for i, n in zip(indices, sizes, strict=True)
            ]
            rows = self._gather_rows(torch.cat(columns, 1).to(self._device), counts)
            for i, column in zip(indices, torch.split(rows, sizes, 1), strict=True):
                result[i] = column.reshape(-1, *parts[i].shape[1:]).to(parts[i].device)
        return [result[i] for i in range(len(parts))], spec

    def _gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks, each of which has its own number of them."""
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padded = sent.new_zeros(max(counts), rows.shape[1])
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded, group=self._group)
        kept = [part[:count] for part, count in zip(received, counts, strict=True)]
        return torch.cat(kept).to(rows.dtype)

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        """A few integers of each rank."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        if self._alone:
            return [own.tolist()]
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self._group)
        return [row.tolist() for row in rows]

    def _from_rank(self, rank: int, value: Any) -> Any:
        """An object of one rank, or the same error on all if it cannot be sent."""
        if self._alone:
            return value
        message: list[Any] = [None]
        if rank == self.rank:
            try:
                message = [pickle.dumps(value)]
            except Exception as error:
                message = [f"{type(error).__name__}: {error}"]
        source = rank if self._group is None else dist.get_global_rank(self._group, rank)
        dist.broadcast_object_list(message, source, group=self._group, device=self._device)
        if isinstance(message[0], str):
            raise TypeError(
                f"task_parallel: a rank without tasks needs to know what fn returns, which cannot "
                f"be pickled ({message[0]}). Return dicts, tuples, and classes of a module"
            )
        return pickle.loads(message[0])


def _check_hparams(hparams: TensorTree) -> tuple[Leaves, _tree.TreeSpec]:
    if _ad.transforms_active():
        raise ValueError(
            "task_parallel was called inside a torch.func transform, which cannot see what other "
            "processes do. Put it into fn, as in fn = torch.func.vmap(adapt, in_dims=(None, 0))"
        )
    leaves, spec = _tree.flatten_floating(hparams, "hparams")
    for leaf, path in zip(leaves, _tree.paths(spec, "hparams"), strict=True):
        if _sharding.is_dtensor(leaf):
            raise ValueError(
                f"task_parallel: {path} is a DTensor; expected tensors that every rank holds. Pass "
                f"{path}.full_tensor(), or call the hypergradient itself, with the tasks as a "
                f"DTensor too"
            )
    return leaves, spec


def _count_tasks(tasks: TensorTree) -> int:
    leaves, spec = _tree.flatten(tasks)
    if not leaves:
        raise ValueError(f"tasks is an empty tree ({tasks!r}); expected at least one tensor")
    paths = _tree.paths(spec, "tasks")
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise ValueError(
                f"{path} is {leaf!r}; expected a tensor whose first dimension counts tasks. Pass "
                f"what all tasks share as a further argument: call(hparams, tasks, *args)"
            )
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                f"{paths[0]} has {leaves[0].shape[0]} tasks, but {path} has {leaf.shape[0]}; "
                f"expected the same first dimension"
            )
    return int(leaves[0].shape[0])


def _widen(leaf: Tensor) -> Tensor:
    return leaf.to(_tree.accumulation_dtype((leaf,)))
