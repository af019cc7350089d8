"""Tasks in parallel: each rank adapts its share, and their hypergradients are added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_count
from hyperfunc._engine.contact import LostContact, in_contact
from hyperfunc._engine.results import Solution
from hyperfunc._engine.shown import show
from hyperfunc._engine.wrapped_functions import WrappedFunction
from hyperfunc._torch import sharding, tracking
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.distributed._ranks import Ranks, fingerprint

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

    A call takes two collectives of a few integers, before and after the tasks, which tell whether
    all is well; one all-reduce for each dtype of ``hparams``; and, for what else ``fn`` returns,
    one all-gather for each dtype. Half precision is summed in float32. Without an initialised
    process group nothing is sent.

    ``hparams`` may hold DTensors, over ranks that adapt the same tasks: with a mesh of dimensions
    ``tasks`` and ``shard``, distribute them over ``mesh["shard"]``, and share the tasks by
    ``group=mesh["tasks"].get_group()``. ``fn`` returns hypergradients that are DTensors too. What
    else it returns is gathered whole.

    Args:
        fn: ``(hparams, tasks, *args) -> hypergradients`` or ``(hypergradients, rest)``, a function
            of a batch of tasks: all tensors of ``tasks``, of the hypergradients, which form a tree
            like ``hparams``, and of ``rest`` have a first dimension that counts them. Such is
            ``torch.func.vmap(adapt, in_dims=(None, 0))`` for an ``adapt`` made by
            `hyperfunc.hypergrad` or its kin.
        group: the ranks that take part, by default all: each makes the call, with the same
            ``hparams`` and ``args``.
        reduce: ``"mean"`` or ``"sum"`` of the hypergradients over all tasks, or None for those of
            each task, gathered like ``rest``.
        chunk_size: call ``fn`` with so many tasks at a time, >= 1, and add up a chunk's
            hypergradients over the ranks while the next is under way. Between two chunks an integer
            more is sent, which tells whether a rank has failed. None: all at once.

    Returns:
        ``call(hparams, tasks, *args)``, with this rank's own tasks, any number of them, or none
        (see `local_tasks`). It returns what ``fn`` returns, with the hypergradients reduced, and
        with ``rest`` for the tasks of all ranks, in their order. Of a `hyperfunc.Solution`,
        ``params`` and ``adjoint`` stay those of this rank's tasks, to start from in the next call.
        Results carry no graph.

    Raises:
        TypeError: if ``fn`` is no function, or ``chunk_size`` no integer.
        ValueError: for a ``reduce`` or ``chunk_size`` not listed above; when called, inside a
            ``torch.func`` transform, with no tasks on any rank, with DTensors over ranks that have
            different tasks, or, on every rank, where one was called otherwise than another: with
            another structure, dtype, shape, or value of ``hparams`` (values of DTensors are not
            compared), other arguments, or other results of ``fn`` beside the hypergradients.
        HypergradError: when called, on every rank, if the arguments of one of them are of no use,
            or ``fn`` raised there, or returned a hypergradient that is not finite. The text names
            the rank and the task, which is found by calling ``fn`` with one task at a time. With
            ``chunk_size``, no rank goes on for more than a chunk. A rank that is to end, by Ctrl-C
            or an exit in ``fn``, raises that itself, and the others this. So do they where a rank
            dies or does not answer within the timeout of the group.

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
    signature = "(hparams, tasks, *args) such as torch.func.vmap(adapt, in_dims=(None, 0))"
    check_callable(fn, "task_parallel: fn", signature)
    if reduce not in (*get_args(Reduction), None):
        raise ValueError(f"task_parallel: reduce is {show(reduce)}; expected 'mean', 'sum' or None")
    if chunk_size is not None:
        check_count("task_parallel", "chunk_size", chunk_size, also="None or ")
    return _TaskParallel(fn, group, reduce, chunk_size)


class _TaskParallel(WrappedFunction):
    """What `task_parallel` returns."""

    maker = "task_parallel"

    def __init__(self, fn: Callable[..., Any], group: Any, reduce: Any, chunk_size: Any) -> None:
        super().__init__(fn)
        self.fn, self.group, self.reduce, self.chunk_size = fn, group, reduce, chunk_size

    def __call__(self, hparams: TensorTree, tasks: TensorTree, *args: Any) -> Any:
        if tracking.transforms_active():
            raise ValueError(
                "task_parallel was called inside a torch.func transform, which cannot see what "
                "other processes do. Put it into fn, as in fn = torch.func.vmap(adapt, "
                "in_dims=(None, 0))"
            )
        with in_contact("task_parallel", self.group):
            return self._run(hparams, tasks, args)

    def _run(self, hparams: TensorTree, tasks: TensorTree, args: Any) -> Any:
        ranks = Ranks(self.group)
        share = _Share(self, ranks, hparams, tasks, args)
        counts = share.agree_on_inputs()
        total = _Total(share.zeros())
        most = max(counts)  # every rank takes part in as many sums as the one with the most chunks
        size = self.chunk_size or most
        for start in range(0, most, size):
            sums = share.adapt(slice(start, min(start + size, share.count)))
            if total.add_pending():
                break
            is_last = start + size >= most
            total.start(ranks, sums, failed=None if is_last else share.error is not None)
        share.agree_on_results(counts)
        gathered, rest_spec = share.gather(counts)
        if self.reduce is None:
            num = len(share.flat.like)
            grads = share.flat.wrap_tasks(gathered[:num])
            gathered = gathered[num:]
        else:
            total.add_pending()
            factor = 1 / sum(counts) if self.reduce == "mean" else 1.0
            grads = share.flat.restore(total.sums, factor)
        hypergradients = trees.unflatten(share.flat.spec, grads)
        if rest_spec is None:
            return hypergradients
        return hypergradients, share.with_own(trees.unflatten(rest_spec, gathered))


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
    ranks = Ranks(group)
    start, stop = ((ranks.rank + i) * count // ranks.size for i in (0, 1))
    return trees.tree_map(lambda leaf: leaf[start:stop], tasks)


class _Flat:
    """How trees like hparams become one vector for each dtype, in which they are summed.

    Of DTensors, it is what this rank holds of them.
    """

    def __init__(self, hparams: TensorTree) -> None:
        leaves, self.spec = trees.flatten_floating(hparams, "hparams")
        self.like: Leaves = tracking.detach(leaves)
        self.layout = sharding.layout_of(self.like)

    def local_tasks(self, leaves: Leaves) -> Leaves:
        """What this rank holds of leaves with a first dimension for tasks."""
        return leaves if self.layout is None else self.layout.stacked().local(leaves)

    def wrap_tasks(self, parts: Sequence[Tensor]) -> Leaves:
        """The inverse of `local_tasks`."""
        if self.layout is None:
            return tuple(parts)
        like = tuple(
            torch.empty(len(part), *leaf.shape, device="meta")
            for part, leaf in zip(parts, self.like, strict=True)
        )
        return self.layout.stacked().wrap(parts, like)

    def check_finite(self, leaves: Leaves) -> None:
        """Raise for the first leaf with NaN or Inf, and its first such task, on all that share."""
        parts = self.local_tasks(leaves)
        bad = torch.stack([~part.isfinite().reshape(len(part), -1).all(1) for part in parts])
        if self.layout is not None:
            bad = self.layout.sum(bad.int()) > 0
        if bad.any():
            leaf, task = bad.nonzero()[0].tolist()
            raise NonfiniteError(trees.paths(self.spec, "hparams")[leaf], task)

    def flatten(self, leaves: Leaves) -> list[Tensor]:
        leaves = leaves if self.layout is None else self.layout.local(leaves)
        return [
            trees.ravel_local(tuple(leaves[i] for i in indices), dtype).to(leaves[0].device)
            for dtype, indices in self._groups().items()
        ]

    def restore(self, vectors: Sequence[Tensor], factor: float) -> Leaves:
        result: dict[int, Tensor] = {}
        for indices, vector in zip(self._groups().values(), vectors, strict=True):
            like = tuple(self.like[i] for i in indices)
            result.update(zip(indices, trees.unravel(factor * vector, like), strict=True))
        return tuple(result[i] for i in range(len(result)))

    def _groups(self) -> dict[torch.dtype, list[int]]:
        groups: dict[torch.dtype, list[int]] = {}
        for index, leaf in enumerate(self.like):
            groups.setdefault(trees.accumulation_dtype((leaf,)), []).append(index)
        return groups


class _Total:
    """Sums over chunks and ranks, of which one is under way while the next chunk is adapted."""

    def __init__(self, zeros: list[Tensor]) -> None:
        self.sums = zeros
        self._sums: list[Callable[[], Tensor]] = []
        self._failures: Callable[[], Tensor] | None = None

    def start(self, ranks: Ranks, sums: list[Tensor], failed: bool | None) -> None:
        """Start to sum over the ranks, and to count those that failed; None where nobody asks."""
        self._sums = [ranks.start_sum(part) for part in sums]
        self._failures = None
        if failed is not None:
            self._failures = ranks.start_sum(torch.tensor(int(failed), device=ranks.device()))

    def add_pending(self) -> bool:
        """Wait for what was started, and add it; returns whether a rank failed."""
        if self._sums:
            self.sums = [total + wait() for total, wait in zip(self.sums, self._sums, strict=True)]
        return self._failures is not None and bool(self._failures())


class _Share:
    """The tasks of this rank: what came of them, or why nothing did."""

    def __init__(
        self, owner: _TaskParallel, ranks: Ranks, hparams: TensorTree, tasks: TensorTree, args: Any
    ) -> None:
        self._owner, self._ranks, self._tasks, self._args = owner, ranks, tasks, args
        self._own: list[tuple[TensorTree, TensorTree]] = []
        self._parts: list[Leaves] = []
        self.rest_spec: trees.TreeSpec | None = None
        self.count, self._failed_task = 0, -1
        self.error: BaseException | None = None
        try:
            self.flat = _Flat(hparams)
            self.count = _count_tasks(tasks)
            _check_apart(self.flat, ranks)
        except BaseException as error:
            self.error = error

    def agree_on_inputs(self) -> list[int]:
        """The numbers of tasks on the ranks, or the same error on all if one was called amiss."""
        lines: dict[str, Callable[[], list[str]]] = {
            "reduce and chunk_size": lambda: [repr((self._owner.reduce, self._owner.chunk_size))],
            "hparams": lambda: _types(self.flat.like, self.flat.spec, "hparams", shapes=True),
            "the values of hparams": lambda: _values(self.flat),
            "further arguments": lambda: _types(*trees.flatten(self._args), "args"),
            "tasks": lambda: _types(*trees.flatten(self._tasks), "tasks") if self.count else [],
        }
        compared = self.error is None and self._ranks.size > 1
        alike = {what: make() if compared else [] for what, make in lines.items()}
        rows = self._ranks.agree("task_parallel", self.error, (self.count,), alike=alike)
        counts = [row[0] for row in rows]
        if not any(counts):
            raise ValueError("task_parallel: no rank has a task. Pass at least one in all")
        return counts

    def agree_on_results(self, counts: list[int]) -> None:
        """Raise the same error on all ranks if one has failed, or has other results."""

        def where(rank: int, rows: list[list[int]]) -> str:
            task = rows[rank][0]
            number = sum(counts[:rank]) + task
            return f" at its task {task}, number {number} of {sum(counts)}" if task >= 0 else ""

        lines = [f"{part.dtype} of shape {tuple(part.shape[1:])}" for part in self._all_parts()]
        lines.append(f"structure {self.rest_spec}")
        alike = {"the results of fn for each task": lines if self.count else []}
        advice = "Return the same structure, dtypes and shapes on all ranks"
        task = (self._failed_task,)
        self._ranks.agree("task_parallel", self.error, task, where, alike, advice)

    def zeros(self) -> list[Tensor]:
        """What `adapt` returns where there is nothing to add."""
        like = self.flat.like
        return [] if self._owner.reduce is None else self.flat.flatten(trees.zeros_like(like))

    def adapt(self, chunk: slice) -> list[Tensor]:
        """Adapt some tasks; returns the sums of their hypergradients, zeros after a failure."""
        if self.error is None and chunk.start < chunk.stop:
            try:
                return self._adapt(chunk)
            except BaseException as error:
                self._note(error, chunk)
        return self.zeros()

    def gather(self, counts: list[int]) -> tuple[list[Tensor], trees.TreeSpec | None]:
        """What the ranks have for each of their tasks, put together, and its structure."""
        parts, spec = self._all_parts(), self.rest_spec
        if 0 in counts:  # a rank without tasks does not know what fn returns
            kinds = [(part.dtype, tuple(part.shape[1:])) for part in parts]
            busy = next(rank for rank, count in enumerate(counts) if count)
            spec, kinds = self._ranks.from_rank(busy, (spec, kinds))
            if not self.count:
                parts = [torch.empty((0, *shape), dtype=dtype) for dtype, shape in kinds]
        gathered, device = list(parts), self.flat.like[0].device
        for dtype in dict.fromkeys(part.dtype for part in parts):
            sizes = {i: math.prod(p.shape[1:]) for i, p in enumerate(parts) if p.dtype == dtype}
            columns = [parts[i].reshape(self.count, n).to(device) for i, n in sizes.items()]
            rows = self._ranks.gather_rows(torch.cat(columns, 1), counts)
            for i, column in zip(sizes, rows.split(list(sizes.values()), 1), strict=True):
                gathered[i] = column.reshape(-1, *parts[i].shape[1:]).to(parts[i].device)
        return gathered, spec

    def _all_parts(self) -> list[Tensor]:
        """What is to be gathered, for all tasks of this rank."""
        return [torch.cat(chunks) for chunks in zip(*self._parts, strict=True)]

    def with_own(self, rest: Any) -> Any:
        """What was gathered, with the solutions and adjoints of this rank's own tasks."""
        if not isinstance(rest, Solution) or not self._own:
            return rest
        params, adjoint = (
            trees.tree_map(lambda *parts: torch.cat(parts), *chunks)
            for chunks in zip(*self._own, strict=True)
        )
        return rest._replace(params=params, adjoint=adjoint)

    def _adapt(self, chunk: slice) -> list[Tensor]:
        output, flat, count = self._call(chunk), self.flat, chunk.stop - chunk.start
        grads, spec = trees.flatten(output)
        leaves: list[Any] = []
        if spec != flat.spec and isinstance(output, tuple) and len(output) == 2:
            (grads, spec), rest = trees.flatten(output[0]), output[1]
            if isinstance(rest, Solution):
                self._own.append(trees.tree_map(torch.detach, (rest.params, rest.adjoint)))
                rest = rest._replace(params=(), adjoint=())
            leaves, self.rest_spec = trees.flatten(rest)
        like = tuple(leaf.detach().expand(count, *leaf.shape) for leaf in flat.like)
        what = "the hypergradients that fn returned"
        trees.check_like(grads, spec, like, flat.spec, what, "hparams")
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
                assert self.rest_spec is not None
                path = trees.paths(self.rest_spec, "rest")[index]
                shape = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else ""
                raise ValueError(
                    f"fn returned (hypergradients, rest) with {path} a {type(leaf).__name__} "
                    f"{shape}; expected a tensor whose first dimension counts the {count} tasks. "
                    f"Map a function of one task by torch.func.vmap"
                )
        gradients = tracking.detach(grads)
        flat.check_finite(gradients)
        kept = flat.local_tasks(gradients) if self._owner.reduce is None else ()
        whole = map(sharding.full, leaves)
        self._parts.append((*kept, *tracking.detach(tuple(whole))))
        if self._owner.reduce is None:
            return []
        wide = (leaf.to(trees.accumulation_dtype((leaf,))) for leaf in gradients)
        return flat.flatten(tuple(leaf.sum(0) for leaf in wide))

    def _call(self, chunk: slice) -> Any:
        tasks = trees.tree_map(lambda leaf: leaf[chunk], self._tasks)
        return self._owner.fn(trees.unflatten(self.flat.spec, self.flat.like), tasks, *self._args)

    def _note(self, error: BaseException, chunk: slice) -> None:
        """Note an error and the task at fault: the first to fail on its own, if any does."""
        self.error = error
        if isinstance(error, NonfiniteError):
            self._failed_task = chunk.start + error.index
        known = NonfiniteError | MemoryError | LostContact
        if not isinstance(error, Exception) or isinstance(error, known):
            return
        for task in range(chunk.start, chunk.stop):
            try:
                self._call(slice(task, task + 1))
            except BaseException as alone:
                self.error = alone
                self._failed_task = task if isinstance(alone, Exception) else -1
                return


class NonfiniteError(ValueError):
    """A hypergradient with NaN or Inf in it."""

    def __init__(self, path: str, index: int) -> None:
        super().__init__(f"the hypergradient with respect to {path} is not finite (NaN or Inf)")
        self.index = index


def _check_apart(flat: _Flat, ranks: Ranks) -> None:
    """Raise for DTensors over ranks among which tasks are shared too."""
    for leaf, path in zip(flat.like, trees.paths(flat.spec, "hparams"), strict=True):
        if not sharding.is_dtensor(leaf):
            continue
        mesh: Any = leaf.device_mesh  # type: ignore[attr-defined]
        sharing = set(mesh.mesh.flatten().tolist())
        if len(sharing & set(ranks.global_ranks())) > 1:
            raise ValueError(
                f"{path} is a DTensor over ranks {sorted(sharing)}, among which tasks are shared "
                f"too; each of them would need the others for each of its tasks. Pass "
                f"{path}.full_tensor(), or share tasks and tensors over two dimensions of a mesh: "
                f'mesh = init_device_mesh("{mesh.device_type}", (4, 2), mesh_dim_names=("tasks", '
                f'"shard")), with DTensors on mesh["shard"] and group=mesh["tasks"].get_group()'
            )


def _types(
    leaves: Sequence[Any], spec: trees.TreeSpec, root: str, shapes: bool = False
) -> list[str]:
    """A line for each leaf, with what the ranks have to have in common, and one for the nodes."""
    lines = []
    for leaf, path in zip(leaves, trees.paths(spec, root), strict=True):
        kind = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
        shape = f" of shape {tuple(leaf.shape)}" if shapes else ""
        lines.append(f"{path} {kind}{shape}")
    return [*lines, f"structure {spec}"]


def _values(flat: _Flat) -> list[str]:
    """A line for each leaf; none for DTensors, of which ranks hold different parts."""
    if flat.layout is not None:
        return []
    paths = trees.paths(flat.spec, "hparams")
    return [f"{path} with {fingerprint(leaf)}" for path, leaf in zip(paths, flat.like, strict=True)]


def _count_tasks(tasks: TensorTree) -> int:
    leaves, spec = trees.flatten(tasks)
    if not leaves:
        raise ValueError(f"tasks is an empty tree ({show(tasks)}); expected at least one tensor")
    paths = trees.paths(spec, "tasks")
    for leaf, path in zip(leaves, paths, strict=True):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            raise ValueError(
                f"{path} is {show(leaf)}; "
                f"expected a tensor whose first dimension counts tasks. Pass "
                f"what all tasks share as a further argument: call(hparams, tasks, *args)"
            )
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                f"{paths[0]} has {leaves[0].shape[0]} tasks, but {path} has {leaf.shape[0]}; "
                f"expected the same first dimension"
            )
    return int(leaves[0].shape[0])
