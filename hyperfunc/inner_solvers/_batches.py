"""Minibatches as the ``inputs=`` of a solver, which every method replays as they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_flags
from hyperfunc._types import TensorTree


def stack_batches(batches: Iterable[Any], num_steps: int | None = None) -> TensorTree:
    """The batches of a ``DataLoader``, a list or an iterator as one tree, for ``inputs=``.

    What is random in a loader (its order, augmentation in its dataset) is drawn here, once: the
    steps and their derivatives then see the same batches, whatever the method.

    Args:
        batches: trees of tensors (or NumPy arrays and numbers) with one structure and the same
            shapes: a ``DataLoader`` with ``drop_last=True``, a list, or any iterable.
        num_steps: how many batches, at least 1; they are gone through again where there are fewer,
            as in epochs. None takes one pass.

    Returns:
        A tree like one batch, whose leaves have a leading dimension of size ``num_steps``. For data
        too large to be stacked see `batch_indices`.

    Raises:
        TypeError: something that cannot be iterated over, or a leaf of another kind.
        ValueError: batches of different structure or shape; no batch, or an iterator that ends.

    Example:
        >>> X, y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
        >>> data = torch.utils.data.TensorDataset(X, y)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, drop_last=True)
        >>> inputs = hf.stack_batches(loader, num_steps=5)
        >>> inputs[0].shape, inputs[1].shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3]))
        >>> def loss(w, h, batch):
        ...     x, y = batch
        ...     return ((x @ w - y) ** 2).mean()
        >>> init = lambda h: torch.zeros(2)
        >>> solver = hf.minimize(loss, hf.optim.sgd(lambda h: h), 5, init=init, inputs=inputs)
        >>> solver(torch.tensor(0.01)).shape
        torch.Size([2])
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | dict):
        raise TypeError(
            f"stack_batches: batches is of type {type(batches).__name__}; expected a DataLoader, a "
            f"list of batches or another iterable of them. Tensors that have a leading dimension "
            f"of steps are inputs= already"
        )
    if num_steps is not None:
        check_count("stack_batches", "num_steps", num_steps)
    rows: list[list[Tensor]] = []
    first: trees.TreeSpec | None = None
    for batch in itertools.islice(_repeated(batches, num_steps is not None), num_steps):
        leaves, spec = trees.flatten(batch)
        tensors = [_as_tensor(leaf, spec, index) for index, leaf in enumerate(leaves)]
        if first is None:
            first = spec
        like = rows[0] if rows else tensors
        if spec != first or [leaf.shape for leaf in tensors] != [leaf.shape for leaf in like]:
            got = f"{spec} with shapes {[tuple(leaf.shape) for leaf in tensors]}"
            raise ValueError(
                f"stack_batches: batch {len(rows)} is {got}, but batch 0 is {first} with shapes "
                f"{[tuple(leaf.shape) for leaf in like]}. Batches must be alike: write "
                f"DataLoader(..., drop_last=True), or pad them and weigh the padding with zero"
            )
        rows.append(tensors)
    if first is None or (num_steps is not None and len(rows) < num_steps):
        raise ValueError(
            f"stack_batches: got {len(rows)} batches; expected {num_steps or 'at least 1'}. Pass a "
            f"DataLoader or a list, which can be gone through again, or an iterator that is longer"
        )
    return trees.unflatten(first, [torch.stack(column) for column in zip(*rows, strict=True)])


def batch_indices(
    num_samples: int,
    batch_size: int,
    num_steps: int,
    *,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which samples each step takes, for ``inputs=``: the data themselves lie still in ``*args``.

    As a ``DataLoader`` with ``drop_last=True``: each epoch goes once through the samples, in a new
    order, and leaves out those that fill no batch.

    Args:
        num_samples: the number of samples, at least 1.
        batch_size: the samples of a batch, from 1 to ``num_samples``.
        num_steps: the number of steps, at least 1.
        shuffle: whether to draw an order for each epoch.
        generator: what to draw from; by default torch's own.

    Returns:
        int64, of shape ``(num_steps, batch_size)``; step ``t`` takes ``X[indices[t]]``.

    Raises:
        TypeError, ValueError: numbers of another type, or out of their range.

    Example:
        >>> inputs = hf.batch_indices(6, batch_size=2, num_steps=4, shuffle=False)
        >>> inputs.tolist()
        [[0, 1], [2, 3], [4, 5], [0, 1]]
        >>> def loss(w, h, X, y, index):
        ...     return ((X[index] @ w - y[index]) ** 2).mean()
        >>> init = lambda h, X, y: torch.zeros(2)
        >>> solver = hf.minimize(loss, hf.optim.sgd(lambda h: h), 4, init=init, inputs=inputs)
        >>> solver(torch.tensor(0.01), torch.ones(6, 2), torch.ones(6)).shape
        torch.Size([2])
    """
    sizes = {"num_samples": num_samples, "batch_size": batch_size, "num_steps": num_steps}
    for name, value in sizes.items():
        check_count("batch_indices", name, value)
    check_flags("batch_indices", shuffle=shuffle)
    if batch_size > num_samples:
        raise ValueError(
            f"batch_indices: batch_size is {batch_size}; expected at most num_samples = "
            f"{num_samples}, since a batch takes no sample twice"
        )
    in_epoch = num_samples // batch_size
    epochs = []
    for _ in range(-(-num_steps // in_epoch)):
        order = torch.arange(num_samples)
        if shuffle:
            order = torch.randperm(num_samples, generator=generator)
        epochs.append(order[: in_epoch * batch_size].reshape(in_epoch, batch_size))
    return torch.cat(epochs)[:num_steps]


def _repeated(batches: Iterable[Any], again: bool) -> Iterator[Any]:
    """The batches, over and over where they can be gone through again."""
    empty = False
    while not empty:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        empty |= not again


def _as_tensor(leaf: Any, spec: trees.TreeSpec, index: int) -> Tensor:
    try:
        return torch.as_tensor(leaf)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"stack_batches: {trees.paths(spec, 'batch')[index]} is of type {type(leaf).__name__}; "
            f"expected a tensor, an array or a number"
        ) from None
