"""The one loop: run by Python, or kept as a loop in what is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._torch import batching, loops

State = TypeVar("State")


def repeat(
    step: Callable[[Any, State], State],
    state: State,
    most: int | Tensor | None = None,
    go_on: Callable[[State], Any] | None = None,
) -> tuple[State, Any]:
    """``state = step(number, state)`` while ``go_on(state)`` holds for a task, ``most`` times.

    Args:
        step: the number is an int, or a 0-d tensor where the loop is kept.
        state: a tree of tensors; where the loop is not kept, anything.
        most: the largest number of steps, or None for no limit.
        go_on: a 0-d flag, or None for a fixed number of steps, which are never looked at.

    Returns:
        The last state, and the number of steps.
    """
    if is_kept(state):
        return _keep(step, state, most, go_on)
    count = 0
    while most is None or count < most:
        if go_on is not None and not batching.any_true(go_on(state)):
            break
        state = step(count, state)
        count += 1
    return state, count


def when(flag: Tensor | bool, change: Callable[[State], State], state: State) -> State:
    """``change(state)`` if the flag holds for a task, else the state as it is."""
    if isinstance(flag, bool):
        return change(state) if flag else state
    if not is_kept((state, flag)):
        return change(state) if batching.any_true(flag) else state
    return _keep(lambda _, pair: change(pair), state, flag.to(torch.int64), None)[0]


def is_kept(state: Any) -> bool:
    """Whether a loop from such a state stays a loop in what is being compiled."""
    return loops.are_kept() and loops.are_kept(trees.tensors(state))


def _keep(
    step: Callable[[Any, State], State],
    state: State,
    most: int | Tensor | None,
    go_on: Callable[[State], Any] | None,
) -> tuple[State, Tensor]:
    leaves, spec = trees.flatten(state)

    def advance(number: Tensor, leaves: Any) -> Any:
        return tuple(trees.flatten(step(number, trees.unflatten(spec, leaves)))[0])

    flag = None if go_on is None else lambda leaves: go_on(trees.unflatten(spec, leaves))
    end, count = loops.while_loop(flag, advance, tuple(leaves), most)
    return trees.unflatten(spec, end), count
