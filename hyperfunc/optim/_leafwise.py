"""The driver that takes one step rule leaf by leaf, and the elementwise work of the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc import _tree
from hyperfunc._ad import is_tracked, transforms_active
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.optim._base import (
    Coefficient,
    Optimizer,
    State,
    cast,
    check_coefficient,
    describe,
    flatten_like_params,
    is_zero,
    values_by_leaf,
)


def leafwise(
    name: str,
    coefficients: dict[str, Coefficient],
    prepare: Callable[..., tuple[Any, ...]],
    step: Callable[..., tuple[Tensor, Leaves]],
    slots: dict[str, Any],
) -> Optimizer:
    """The optimiser that takes one step leaf by leaf; a slot starts as its value, or as params."""
    for key, coefficient in coefficients.items():
        check_coefficient(name, key, coefficient)
    for start in slots.values():
        if start is not None:
            check_coefficient(name, "initial_accumulator_value", start)

    def init(params: TensorTree) -> State:
        leaves, spec = _tree.flatten_floating(params, "params")
        filled: dict[str, TensorTree] = {}
        for slot, start in slots.items():
            if start is None:
                filled[slot] = params
                continue
            rows = values_by_leaf(
                name, {"initial_accumulator_value": start}, None, params, leaves, spec
            )
            filled[slot] = _tree.unflatten(
                spec,
                [filled_like(leaf, value) for leaf, (value,) in zip(leaves, rows, strict=True)],
            )
        return State(torch.zeros((), dtype=torch.int64, device="cpu"), filled)

    def update(
        grads: TensorTree, state: State, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, State]:
        grad_leaves, leaves, spec = flatten_like_params(name, grads, params)
        old = _flatten_slots(name, state, tuple(slots), spec)
        rows = values_by_leaf(name, coefficients, hparams, params, leaves, spec)
        t = _step_number(state.step)
        new_leaves = []
        new_slots = []
        prepared_for: Any = None
        for index, (leaf, grad, row) in enumerate(zip(leaves, grad_leaves, rows, strict=True)):
            dtype = torch.promote_types(leaf.dtype, torch.float32)
            if prepared_for != (id(row), dtype, leaf.device):
                prepared_for = (id(row), dtype, leaf.device)
                c = cast(prepare(t, *row), dtype, leaf.device)
            before = tuple(slot[index] for slot in old)
            if dtype is leaf.dtype:
                new, after = step(leaf, grad, before, c)
            else:
                raised = tuple(slot.to(dtype) for slot in before)
                new, after = step(leaf.to(dtype), grad.to(dtype), raised, c)
                new, after = new.to(leaf.dtype), tuple(slot.to(leaf.dtype) for slot in after)
            new_leaves.append(new)
            new_slots.append(after)
        filled = {
            slot: _tree.unflatten(spec, values)
            for slot, values in zip(slots, zip(*new_slots, strict=True), strict=True)
        }
        return _tree.unflatten(spec, new_leaves), State(state.step + 1, filled)

    return Optimizer(init, update)


def axpy(alpha: Any, x: Tensor, y: Tensor) -> Tensor:
    """``y + alpha x`` in one pass."""
    if isinstance(alpha, Tensor):
        return torch.addcmul(y, alpha, x)
    return torch.add(y, x, alpha=alpha)


def scale(alpha: Any, x: Tensor) -> Tensor:
    return x * alpha if isinstance(alpha, Tensor) or alpha != 1 else x


def regularised(grad: Tensor, leaf: Tensor, weight_decay: Any, maximize: bool) -> Tensor:
    grad = -grad if maximize else grad
    return grad if is_zero(weight_decay) else axpy(weight_decay, leaf, grad)


def average_square(old: Tensor, grad: Tensor, decay: Any, gain: Any) -> Tensor:
    if isinstance(decay, Tensor):
        return torch.lerp(old, grad * grad, gain)
    decayed = torch.mul(old, decay)
    if not transforms_active():  # under vmap, it may lack the batch dimension
        return decayed.addcmul_(grad, grad, value=gain)
    return torch.addcmul(decayed, grad, grad, value=gain)


def quotient_step(leaf: Tensor, rate: Any, numerator: Tensor, square: Tensor, eps: Any) -> Tensor:
    """``leaf + rate numerator / (sqrt(square) + eps)``."""
    denominator = root_plus(square, eps)
    if isinstance(rate, Tensor):
        return torch.addcmul(leaf, numerator / denominator, rate)
    return torch.addcdiv(leaf, numerator, denominator, value=rate)


def root_plus(square: Tensor, eps: Any) -> Tensor:
    root = safe_root(square) if is_tracked([square]) else square.sqrt()
    return torch.add(root, eps) if transforms_active() else root.add_(eps)


def safe_root(x: Tensor) -> Tensor:
    """The square root, with all derivatives zero at zero; may be overwritten under autograd."""
    zero = torch.eq(x, 0)
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def after_first(t: Any) -> Any:
    """0 at the first step, 1 at all others."""
    return (t - 1).clamp(max=1) if isinstance(t, Tensor) else min(t - 1, 1)


def filled_like(leaf: Tensor, value: Any) -> Tensor:
    zeros = torch.zeros_like(leaf)
    return zeros if is_zero(value) else zeros + value


def _step_number(step: Tensor) -> Any:
    """The number of this step, counted from 1: a Python number unless it differs between tasks."""
    if not torch.compiler.is_compiling():
        try:
            return step.item() + 1
        except RuntimeError:  # batched by vmap
            pass
    return step.to(torch.float64) + 1


def _flatten_slots(
    name: str, state: Any, slots: tuple[str, ...], spec: _tree.TreeSpec
) -> list[list[Tensor]]:
    """The leaves of each slot, in the order of the rule."""
    if not isinstance(state, State) or set(state.slots) != set(slots):
        got = f"slots {sorted(state.slots)}" if isinstance(state, State) else describe(state)
        raise TypeError(
            f"{name}: state has {got}; expected a State with slots {sorted(slots)}. "
            f"Make it with the init of this same optimiser: state = optimizer.init(params)"
        )
    flat = []
    for slot in slots:
        leaves, slot_spec = _tree.flatten(state.slots[slot])
        if slot_spec != spec:
            raise ValueError(
                f"{name}: state.slots[{slot!r}] has another structure than params: got "
                f"{slot_spec}, expected {spec}. Make it with state = optimizer.init(params)"
            )
        flat.append(leaves)
    return flat
