"""Weight decay of an optimiser, of which the loss that it minimises does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.convergence import warn_at_call_site
from hyperfunc._torch import autodiff, tracking
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import (
    ByName,
    Optimizer,
    Schedule,
    evaluate,
    is_zero,
    names_of,
    of_names,
)
from hyperfunc.optim._clip import _ClippedByNorm, _ClippedByValue
from hyperfunc.optim._groups import _Grouped
from hyperfunc.optim._leafwise import Leafwise
from hyperfunc.optim._torch import _TorchUpdate

_KEYS = ("weight_decay", "lambd")  # the latter is that of torch.optim.ASGD


def tell_of_decay(
    optimizer: Optimizer,
    spec: trees.TreeSpec,
    hparams: TensorTree,
    function: str | None,
    constant: str | None,
) -> None:
    """Raise, with the first text, for a decay that depends on hparams; else warn, with the other.

    ``spec`` is the structure of params. Without a text, nothing is said.
    """
    found = [value for value in _decays(optimizer.update, spec) if not is_zero(value)]
    if not found or torch.compiler.is_compiling():
        return
    if any(callable(value) for value in found):
        leaves, like = trees.flatten_floating(hparams, "hparams")

        def values(*leaves: Any) -> list[Any]:
            tree = trees.unflatten(like, leaves)
            return [each for value in found for each in _values(value, spec, tree)]

        leaves = tracking.detach(leaves)
        scheduled = any(isinstance(value, Schedule) for value in found)  # may begin with 0
        if not scheduled and all(map(is_zero, values(*leaves))):
            return
        if function is not None and autodiff.uses(
            lambda *leaves: tuple(map(torch.as_tensor, values(*leaves))), leaves, range(len(leaves))
        ):
            raise ValueError(function)
    if constant is not None:
        warn_at_call_site(UserWarning(constant))


def _decays(update: Any, spec: trees.TreeSpec) -> Iterator[Any]:
    """Numbers, tensors, functions and schedules that the decay of some params is."""
    if isinstance(update, _ClippedByNorm | _ClippedByValue):
        yield from _decays(update.optimizer.update, spec)
    elif isinstance(update, _Grouped):
        names = names_of(spec)
        for optimizer, part in update._parts(spec):
            if part:
                own = trees.flatten({names[i]: torch.zeros(()) for i in part})[1]
                yield from _decays(optimizer.update, own)
    elif isinstance(update, Leafwise):
        yield from _leaves(update.coefficients.get("weight_decay", 0.0), spec)
    elif isinstance(update, _TorchUpdate):
        defaults = update.rule.build([torch.zeros(1, 1)], update.rule.placeholders, {}).defaults
        for key in _KEYS:
            yield from _leaves(update.options.get(key, defaults.get(key, 0.0)), spec)


def _leaves(value: Any, spec: trees.TreeSpec) -> list[Any]:
    """What a coefficient has for the params, by names or in a tree."""
    if isinstance(value, ByName):
        return of_names("weight_decay", value, spec)
    return list(trees.flatten(value)[0])


def _values(value: Any, spec: trees.TreeSpec, hparams: TensorTree) -> list[Any]:
    """The numbers and tensors that a decay is, at the first step."""
    if not callable(value):
        return [value]
    step = torch.zeros((), dtype=torch.int64) if isinstance(value, Schedule) else None
    found = evaluate("optimizer", "weight_decay", value, hparams, step)
    return [each for leaf in _leaves(found, spec) for each in _values(leaf, spec, hparams)]
