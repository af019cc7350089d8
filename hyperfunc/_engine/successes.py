"""Means over the tasks that succeeded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, HypergradError, find_failure
from hyperfunc._torch import batching, sharding
from hyperfunc._types import Leaves, TensorTree


def mean_over_successes(
    tree: TensorTree, stats: Any = (), *, throw: bool = True
) -> tuple[TensorTree, Tensor]:
    r"""The mean over the tasks that succeeded, and how many these are.

    .. math:: n = \sum_t s_t, \qquad \bar g = \frac 1 n \sum_{t:\, s_t = 1} g_t

    Task t succeeded, :math:`s_t = 1`, if its code is no failure (``success`` and ``max_steps`` are
    none) and all its entries, in every leaf, are finite. What the others hold does not enter, NaN
    or not. So tasks that were called with ``throw=False``, and of which some have failed, still
    give a step of the outer optimiser. The mean is then one of the tasks that could be solved, no
    estimate of that of all: look at the count.

    Args:
        tree: floating-point tensors of shape ``(T, ...)`` for T tasks: hypergradients, or these and
            values, from `torch.func.vmap` or `task_map`. Those of a ``vmap`` inside a ``vmap``, of
            shape ``(T1, T2, ...)``, are averaged over all their tasks.
        stats: the ``Solution.stats`` of the same call, with codes of shape ``(T,)``; or ``()``, as
            iterative methods have it, where all that is asked for is finite entries.
        throw: whether it raises where no task succeeded. If not, the mean is zero there, and so is
            the count.

    Returns:
        The mean, a tree of tensors of shape ``(...)``, and the count, a 0-d tensor of int64. Half
        precision is summed in float32.

    Raises:
        HypergradError: no task succeeded, and ``throw`` is on. The text says why the first failed.
        ValueError: a tensor is not of the shape that the codes call for.
        TypeError: a leaf is no floating-point tensor, or ``stats`` holds no codes.

    Example:
        >>> fn = hf.hypergrad_and_solution(
        ...     lambda h, c: h / c,
        ...     lambda w, h, c: w.sum(),
        ...     inner_loss=lambda w, h, c: (c * w**2).sum() / 2 - (h * w).sum(),
        ...     throw=False,
        ... )
        >>> curvature = torch.tensor([[1.0, 2.0], [1.0, -2.0], [2.0, 4.0]])  # the second: a saddle
        >>> grads, solution = torch.func.vmap(fn, in_dims=(None, 0))(torch.ones(2), curvature)
        >>> hf.mean_over_successes(grads, solution.stats)
        (tensor([0.7500, 0.3750]), tensor(2))
    """
    sums, count = sum_over_successes(tree, stats)
    if throw and batching.can_look(count) and batching.any_true(count == 0):
        failure = None if stats == () else find_failure(stats.result)
        why = "no entries are finite" if failure is None else failure[0].message
        raise HypergradError(
            f"mean_over_successes: none of the tasks succeeded, so there is no mean: {why}. With "
            f"throw=False it is zero, and the count too"
        )
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, mean_of(sums, count, tuple(leaves))), count


def mean_of(sums: Leaves, count: Tensor, like: Leaves) -> Leaves:
    """Sums over successes divided by their number, in the dtypes of others; zero for none."""
    count = count.clamp_min(1)
    means = []
    for total, leaf in zip(sums, like, strict=True):
        divisor = sharding.spread_like(count.to(total.device), total)
        means.append((total / divisor).to(leaf.dtype))
    return tuple(means)


def sum_over_successes(tree: TensorTree, stats: Any = ()) -> tuple[Leaves, Tensor]:
    """The sum over the tasks that `mean_over_successes` counts, leaf by leaf, and their number.

    In the accumulation dtype of each leaf: sums and numbers of several chunks may be added up.
    """
    found, spec = trees.flatten_floating(tree, "mean_over_successes: tree")
    leaves = tuple(found)
    shape = _shape_of_tasks(leaves, spec, stats)
    first = leaves[0]
    succeeded = torch.ones(shape, dtype=torch.bool, device=first.device)
    if stats != ():
        succeeded = (stats.result <= int(RESULTS.max_steps)).to(first.device)
    for leaf in leaves:
        # u - u is zero, or NaN where u is not finite
        defect = (leaf - leaf).detach()
        if leaf.ndim > len(shape):
            defect = defect.sum(tuple(range(len(shape), leaf.ndim)))
        succeeded = succeeded & (sharding.full(defect) == 0).to(first.device)
    sums = []
    for leaf in leaves:
        mask = succeeded.to(leaf.device).reshape(*shape, *[1] * (leaf.ndim - len(shape)))
        kept = torch.where(sharding.spread_like(mask, leaf), leaf, 0.0)
        sums.append(kept.sum(tuple(range(len(shape))), dtype=trees.accumulation_dtype((leaf,))))
    return tuple(sums), succeeded.sum()


def _shape_of_tasks(leaves: Leaves, spec: trees.TreeSpec, stats: Any) -> tuple[int, ...]:
    """The first dimensions of every leaf, those of the codes."""
    result = getattr(stats, "result", None)
    if stats != () and not isinstance(result, Tensor):
        raise TypeError(
            f"mean_over_successes: stats is of type {type(stats).__name__}; expected the "
            f"Solution.stats of the call that the tree comes from, or () for an iterative method. "
            f"Write grads, solution = fn(...) with hf.hypergrad_and_solution, and solution.stats"
        )
    shape = tuple(leaves[0].shape[:1]) if result is None else tuple(result.shape)
    for leaf, path in zip(leaves, trees.paths(spec, "tree"), strict=True):
        if not shape or leaf.shape[: len(shape)] != shape:
            given = f"tasks of shape {shape}" if shape else "one task, without a dimension for it"
            raise ValueError(
                f"mean_over_successes: {path} has shape {tuple(leaf.shape)}, and "
                f"{'the first leaf' if result is None else 'stats'} {given}; expected first "
                f"dimensions that count the same tasks, one at least, as torch.func.vmap makes them"
            )
    if math.prod(shape) == 0:
        raise ValueError("mean_over_successes: there are no tasks; expected one at least")
    return shape
