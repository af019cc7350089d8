"""Whether several tasks at a time, compiled code and one more derivative give the same numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._torch import derivative_rules, internals, tracking
from hyperfunc._torch.recording import Call, recorded
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.diagnostics._differences import (
    directional_derivative,
    noise_level,
    random_direction,
)
from hyperfunc.task_map import task_map

Route: TypeAlias = Literal["vmap", "compile", "derivative"]
ROUTES = get_args(Route)

# Derivatives that an operation is looked at with.
_MOST_DERIVATIVES = 3
_TASKS = 3

# What code says that a route is not for.
REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError)


class Tasks(NamedTuple):
    """Arguments of a hypergradient for several tasks, batched and one by one."""

    in_dims: Any
    batched: tuple[Any, ...]
    single: list[tuple[Any, ...]]

    @staticmethod
    def of(in_dims: Any, arguments: tuple[Any, ...]) -> Tasks:
        """The tasks that batched arguments hold."""
        single: list[tuple[Any, ...]] = []

        def note(*each: Any) -> Tensor:
            single.append(each)
            return torch.zeros(())

        task_map(note, in_dims, chunk_size=1)(*arguments)
        return Tasks(in_dims, arguments, single)

    @staticmethod
    def near(hparams: TensorTree, args: tuple[Any, ...], direction: Leaves) -> Tasks:
        """Two tasks that differ in their hparams."""
        leaves, spec = trees.flatten(hparams)
        moved = trees.axpy(0.25, direction, tuple(leaves))
        stacked = [torch.stack(pair) for pair in zip(leaves, moved, strict=True)]
        single = [(hparams, *args), (trees.unflatten(spec, moved), *args)]
        return Tasks((0, *[None] * len(args)), (trees.unflatten(spec, stacked), *args), single)


def gap_of_vmap(fn: Callable[..., TensorTree], tasks: Tasks) -> float:
    """How far the results of all tasks at once are from those of one by one, relative to these."""
    found = trees.flatten(task_map(fn, tasks.in_dims, chunk_size=None)(*tasks.batched))[0]
    results = [trees.flatten(fn(*task))[0] for task in tasks.single]
    expected = [torch.stack(column) for column in zip(*results, strict=True)]
    return gap(found, expected)


def gap_of_derivative(
    fn: Callable[..., TensorTree], hparams: TensorTree, args: tuple[Any, ...], direction: Leaves
) -> float:
    """How far a derivative of the hypergradient is from differences, beyond the error of these."""
    h, spec = trees.flatten(hparams)
    weights = random_direction(tuple(map(torch.ones_like, h)), torch.Generator().manual_seed(2))

    def product(*leaves: Tensor) -> Tensor:
        grads = trees.flatten(fn(trees.unflatten(spec, leaves), *args))[0]
        return trees.dot(tuple(grads), weights)

    def value(leaves: Leaves) -> float:
        return float(product(*leaves).detach())

    derivative = torch.func.grad(product, tuple(range(len(h))))(*h)
    found = float(trees.dot(derivative, direction))
    noise = noise_level(value, tuple(h), direction)
    expected, error = directional_derivative(value, tuple(h), direction, noise)
    scale = max(abs(found), abs(expected))
    beyond = abs(found - expected) - 2 * error
    return max(beyond, 0.0) / scale if scale else 0.0


def gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of entries, relative to the largest entry; infinite for NaN."""
    size = max((float(leaf.detach().abs().max()) for leaf in expected if leaf.numel()), default=0)
    pairs = zip(found, expected, strict=True)
    worst = max((float((a - b).detach().abs().max()) for a, b in pairs if b.numel()), default=0)
    if math.isnan(worst):
        return math.inf
    return worst / size if size else worst


def suspect(fn: Callable[..., Any], args: Sequence[Any], route: str) -> dict[str, Tensor]:
    """The operation that is at fault by itself, if one was found, and how far it is off."""
    with recorded() as calls:
        fn(*args)
    for call in calls.calls():
        try:
            off = _off(call, route)
        except REFUSALS:
            continue
        if off:
            return {call.name: torch.tensor(off)}
    return {}


def _off(call: Call, route: str) -> float:
    """How far an operation, or a derivative of it, is off by a route, if by more than rounding."""
    leaves = internals.tree_leaves((call.args, call.kwargs))
    places = [i for i, leaf in enumerate(leaves) if tracking.is_differentiable(leaf)]
    points = [leaves[i] for i in places]
    if not points:
        return 0.0

    def scalar(*primals: Tensor) -> Tensor:
        """A weighted sum of what the operation returns at these points."""
        put = dict(zip(places, primals, strict=True))
        count = iter(range(len(leaves)))
        args, kwargs = internals.tree_map(
            lambda leaf: put.get(next(count), leaf), (call.args, call.kwargs)
        )
        outputs = internals.tree_leaves(call.function(*args, **kwargs))
        outputs = [leaf for leaf in outputs if tracking.is_differentiable(leaf)]
        return sum((_weighted(leaf) for leaf in outputs), start=primals[0].new_zeros(()))

    generator = torch.Generator().manual_seed(0)
    moved = [[_nearby(leaf, generator) for leaf in points] for _ in range(_TASKS)]
    directions = [_nearby(leaf, generator) + 1 for leaf in points]
    check = _differs_from_differences if route == "derivative" else _differs_in_vmap
    eps = max(torch.finfo(leaf.dtype).eps for leaf in points)
    with derivative_rules.active(order=math.inf):
        return next((off for off in check(scalar, moved, directions) if off > eps**0.3), 0.0)


def _differs_in_vmap(
    scalar: Callable[..., Tensor], tasks: list[list[Tensor]], directions: list[Tensor]
) -> Iterator[float]:
    """The gaps between a batch and its members, for each way to batch and each derivative."""
    count = len(directions)
    ways = [tuple(range(count)), *([(i,) for i in range(count)] if count > 1 else [])]
    for batched in ways:
        rows = [[x if i in batched else tasks[0][i] for i, x in enumerate(row)] for row in tasks]
        columns = [
            torch.stack([row[i] for row in rows]) if i in batched else rows[0][i]
            for i in range(count)
        ]
        in_dims = tuple(0 if i in batched else None for i in range(count))
        one = scalar
        mapped = torch.func.vmap(scalar, in_dims)

        def whole(*points: Tensor, mapped: Any = mapped) -> Tensor:
            total: Tensor = mapped(*points).sum()
            return total

        inside = whole
        for _ in range(1 + _MOST_DERIVATIVES):
            single = torch.stack([one(*row) for row in rows])
            yield gap([torch.func.vmap(one, in_dims)(*columns)], [single])
            yield gap([inside(*columns)], [single.sum()])
            one, inside = (functools.partial(_along, f, directions) for f in (one, inside))


def _differs_from_differences(
    scalar: Callable[..., Tensor], tasks: list[list[Tensor]], directions: list[Tensor]
) -> Iterator[float]:
    """The gaps between derivatives of an operation and differences of the one before."""
    fn, x = scalar, tuple(tasks[0])
    for _ in range(_MOST_DERIVATIVES):

        def value(leaves: Leaves, fn: Any = fn) -> float:
            return float(fn(*leaves).detach())

        noise = noise_level(value, x, tuple(directions))
        expected, error = directional_derivative(value, x, tuple(directions), noise)
        fn = functools.partial(_along, fn, directions)
        found = float(fn(*x).detach())
        scale = max(abs(found), abs(expected))
        yield max(abs(found - expected) - 4 * error, 0.0) / scale if scale else 0.0


def _along(fn: Callable[..., Tensor], directions: list[Tensor], *points: Tensor) -> Tensor:
    """The derivative of a scalar function along fixed directions."""
    grads = torch.func.grad(fn, tuple(range(len(points))))(*points)
    total: Tensor = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    return total


def _weighted(leaf: Tensor) -> Tensor:
    weights = torch.arange(leaf.numel(), dtype=leaf.dtype, device=leaf.device).cos()
    return (leaf * weights.reshape(leaf.shape)).sum()


def _nearby(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """A point close to that of a tensor, off the kinks that zeros are at."""
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
    return leaf * (1 + 0.1 * noise) + 0.01 * noise
