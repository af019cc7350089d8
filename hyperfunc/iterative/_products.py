"""Products with the Jacobian of a function at a point, where no transform is active."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from hyperfunc._engine.flat import scatter
from hyperfunc._torch import derivative_rules, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._torch.differentiable_once import refuse_once_differentiable
from hyperfunc._types import Leaves

F = TypeVar("F", bound=Callable[..., Any])

STEP = "the inner solver's step"
START = "the inner solver's init"

ByIndex: TypeAlias = dict[int, Tensor]
"""Vectors by the position of the operands or outputs that they belong to."""


def _counted(product: F) -> F:
    """A product that says how many derivatives are taken of its function: one more."""

    @functools.wraps(product)
    def run(*args: Any, batched: bool = False, **keywords: Any) -> Any:
        with derivative_rules.active(False, math.inf if batched else 1):
            return product(*args, batched=batched, **keywords)

    return cast(F, run)


@_counted
def pull(
    fn: Callable[..., Leaves],
    primals: Leaves,
    wrt: Sequence[int],
    cotangents: ByIndex,
    *,
    batched: bool = False,
    check: str | None = None,
) -> tuple[Leaves, ByIndex]:
    """Outputs and transposed products; zeros are left out."""
    inputs, outputs = _record(fn, primals, wrt, check)
    values = tracking.detach(outputs)
    live = [i for i in cotangents if outputs[i].requires_grad]
    if not live or not wrt:
        return values, {}
    grads = _grad(
        [outputs[i] for i in live],
        [inputs[i] for i in wrt],
        [cotangents[i] for i in live],
        batched=batched,
    )
    return values, _nonzero(wrt, grads)


@_counted
def push(
    fn: Callable[..., Leaves],
    primals: Leaves,
    tangents: ByIndex,
    *,
    batched: bool,
    check: str | None = None,
) -> tuple[Leaves, ByIndex]:
    """Outputs and their tangents, as the transpose of a transposed product; zeros are left out."""
    inputs, outputs = _record(fn, primals, tangents, check)
    values = tracking.detach(outputs)
    live = [i for i, out in enumerate(outputs) if out.requires_grad]
    if not live:
        return values, {}
    if check is not None:
        refuse_once_differentiable(outputs, [inputs[i] for i in tangents])
    with torch.enable_grad():
        dummies = [torch.zeros_like(outputs[i], requires_grad=True) for i in live]
        grads = _grad(
            [outputs[i] for i in live], [inputs[i] for i in tangents], dummies, create_graph=True
        )
    linear = {i: grad for i, grad in _nonzero(tuple(tangents), grads).items() if grad.requires_grad}
    if not linear:
        return values, {}
    vectors = [tangents[i] for i in linear]
    return values, _nonzero(live, _grad([*linear.values()], dummies, vectors, batched=batched))


def _grad(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: list[Tensor],
    *,
    batched: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    found: list[int] = []  # the inputs that are reached

    def differentiate(*cotangents: Tensor) -> Leaves:
        grads = derivative_rules.differentiate(
            outputs, inputs, cotangents, allow_unused=True, create_graph=create_graph
        )
        found[:] = [i for i, grad in enumerate(grads) if grad is not None]
        return tuple(grads[i] for i in found)

    # is_grads_batched=True would be an older vmap, which knows no rules but torch's own
    run = torch.func.vmap(differentiate, randomness="same") if batched else differentiate
    with derivative_rules.again():
        grads = run(*cotangents)
    return tuple(scatter(grads, found, len(inputs)))


def _nonzero(indices: Sequence[int], values: Sequence[Tensor | None]) -> ByIndex:
    return {i: value for i, value in zip(indices, values, strict=True) if value is not None}


def _record(
    fn: Callable[..., Leaves], primals: Leaves, wrt: Iterable[int], check: str | None
) -> tuple[Leaves, Leaves]:
    """The graph of a function; with its name, tensors that should be arguments are refused."""
    chosen, since = set(wrt), tracking.now()
    with torch.enable_grad():
        inputs = tuple(
            primal.detach().requires_grad_(i in chosen) for i, primal in enumerate(primals)
        )
        outputs = tuple(fn(*inputs))
    if check is not None and tracking.reaches_foreign_leaf(outputs, inputs, since):
        raise ValueError(captured_message(check))
    return inputs, outputs
