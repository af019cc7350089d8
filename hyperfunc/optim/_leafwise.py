"""The driver that takes one step rule leaf by leaf, and the elementwise work of the rules."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.flat import split
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch import derivative_rules
from hyperfunc._torch.tracking import is_tracked, transforms_active
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.optim._base import (
    ByName,
    Coefficient,
    Gradients,
    Initializer,
    Optimizer,
    Schedule,
    State,
    cast,
    check_coefficient,
    describe,
    flatten_like_params,
    is_zero,
    values_by_leaf,
)


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Leafwise(PrintsAsCall, abc.ABC):
    """A step rule taken leaf by leaf, with flags and coefficients; ``keys`` names the latter."""

    # what each slot starts as, None for the params; and whether `prepare` depends on ``t``
    slots: dict[str, Any] = dataclasses.field(repr=False, compare=False)
    timed: bool = dataclasses.field(default=True, repr=False, compare=False)

    keys: ClassVar[tuple[str, ...]] = ()
    skips_unused: ClassVar[bool] = True

    @property
    def scheduled(self) -> bool:
        """Whether a coefficient depends on the step, or may do so by a function of names."""
        leaves = trees.flatten(tuple(self.coefficients.values()))[0]
        return any(isinstance(leaf, Schedule | ByName) for leaf in leaves)

    @property
    def coefficients(self) -> dict[str, Coefficient]:
        """The coefficients in the order in which `prepare` takes them, under the user's names."""
        return {key: getattr(self, key) for key in self.keys}

    @abc.abstractmethod
    def prepare(self, t: Any, *coefficients: Any) -> tuple[Any, ...]:
        """What step ``t``, counted from 1, needs of the values of the coefficients."""

    @abc.abstractmethod
    def step(
        self, leaf: Tensor, grad: Tensor, slots: Leaves, c: tuple[Any, ...]
    ) -> tuple[Tensor, Leaves]:
        """The new leaf and its new slots; ``c`` is what `prepare` returned."""

    def optimizer(self) -> Optimizer:
        for key, coefficient in self.coefficients.items():
            check_coefficient(self.name, key, coefficient)
        for start in self.slots.values():
            if start is not None:
                check_coefficient(self.name, "initial_accumulator_value", start)
        return Optimizer(Initializer(self), self)

    def init(self, params: TensorTree) -> State:
        leaves, spec = trees.flatten_floating(params, "params")
        filled: dict[str, TensorTree] = dict.fromkeys(self.slots, params)
        for slot, start in self.slots.items():
            if start is not None:
                given = {"initial_accumulator_value": start}
                rows = values_by_leaf(self.name, given, None, params, leaves, spec)
                pairs = zip(leaves, rows, strict=True)
                filled[slot] = trees.unflatten(spec, [_filled_like(w, *row) for w, row in pairs])
        return State(torch.zeros((), dtype=torch.int64, device="cpu"), filled)

    def __call__(
        self, grads: TensorTree, state: State, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, State]:
        grad_leaves, leaves, spec = flatten_like_params(self.name, grads, params)
        slots = sorted(self.slots)
        flat = self._flatten_slots(state, slots, spec)
        update = self.bind(leaves, spec, hparams, counts=True)
        new, (step, *rest) = update(leaves, grad_leaves, (state.step, *flat))
        *parts, _ = split(rest, *[len(leaves)] * len(slots))
        filled = dict(zip(slots, [trees.unflatten(spec, part) for part in parts], strict=True))
        return trees.unflatten(spec, new), State(step, filled)

    def bind(
        self, like: Leaves, spec: trees.TreeSpec, hparams: Any, counts: bool = False
    ) -> Callable[[Leaves, Gradients, Leaves], tuple[Leaves, Leaves]]:
        """The update at given hparams, on leaves: ``(params, grads, state) -> (new, state)``.

        Where no step depends on its number, that is counted if ``counts``.
        """
        counts = counts or self.timed or self.scheduled
        params = trees.unflatten(spec, like)
        with derivative_rules.inactive():  # they look at each attribute that is read
            devices = [leaf.device for leaf in like]
            own_dtypes = [leaf.dtype for leaf in like]
            dtypes = [torch.promote_types(dtype, torch.float32) for dtype in own_dtypes]
        places = [1 + sorted(self.slots).index(slot) * len(like) for slot in self.slots]

        def evaluate(step: Tensor | None) -> list[tuple[Any, ...]]:
            coefficients = self.coefficients
            return values_by_leaf(self.name, coefficients, hparams, params, like, spec, (), step)

        def prepared(t: Any, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
            parts = zip(rows, dtypes, devices, strict=True)
            keys = [(id(row), dtype, device) for row, dtype, device in parts]
            distinct = dict(zip(keys, rows, strict=True))
            values = {key: cast(self.prepare(t, *row), *key[1:]) for key, row in distinct.items()}
            return [values[key] for key in keys]

        fixed = None if self.scheduled else evaluate(None)
        constant = None if fixed is None or self.timed else prepared(1, fixed)

        def update(leaves: Leaves, grads: Gradients, state: Leaves) -> tuple[Leaves, Leaves]:
            values = constant
            if values is None:
                t = _step_number(state[0]) if self.timed else 1
                values = prepared(t, evaluate(state[0]) if fixed is None else fixed)
            new_leaves = []
            new_state = [state[0] + 1 if counts else state[0], *state[1:]]
            leafwise = zip(leaves, grads, values, dtypes, own_dtypes, strict=True)
            for index, (leaf, grad, c, dtype, own_dtype) in enumerate(leafwise):
                if grad is None:
                    new_leaves.append(leaf)
                    continue
                before = tuple([state[place + index] for place in places])
                if dtype is own_dtype:
                    new, after = self.step(leaf, grad, before, c)
                else:
                    raised = tuple(slot.to(dtype) for slot in before)
                    new, after = self.step(leaf.to(dtype), grad.to(dtype), raised, c)
                    new, after = new.to(leaf.dtype), tuple(slot.to(leaf.dtype) for slot in after)
                new_leaves.append(new)
                for place, slot in zip(places, after, strict=True):
                    new_state[place + index] = slot
            return tuple(new_leaves), tuple(new_state)

        return update

    def _flatten_slots(self, state: Any, slots: list[str], spec: trees.TreeSpec) -> list[Tensor]:
        if not isinstance(state, State) or set(state.slots) != set(slots):
            got = f"slots {sorted(state.slots)}" if isinstance(state, State) else describe(state)
            raise TypeError(
                f"{self.name}: state has {got}; expected a State with slots {slots}. "
                f"Make it with the init of this same optimiser: state = optimizer.init(params)"
            )
        flat = []
        for slot in slots:
            leaves, slot_spec = trees.flatten(state.slots[slot])
            if slot_spec != spec:
                raise ValueError(
                    f"{self.name}: state.slots[{slot!r}] has another structure than params: got "
                    f"{slot_spec}, expected {spec}. Make it with state = optimizer.init(params)"
                )
            flat += leaves
        return flat


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


def _filled_like(leaf: Tensor, value: Any) -> Tensor:
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
