"""What all optimisers share: their form, and the coefficients that may depend on hparams."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import is_number, takes
from hyperfunc._engine.shown import show
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch.containers import loadable
from hyperfunc._torch.internals import forward_mode_active
from hyperfunc._torch.tangents import in_own_dtype
from hyperfunc._types import Leaves, TensorTree

Gradients: TypeAlias = tuple[Tensor | None, ...]
"""The leaves of a gradient; None: the loss does not depend on the parameter."""

Coefficient: TypeAlias = float | TensorTree | Callable[..., Any]
"""A number, a tensor, a tree of them (see the top of this page), a function, or a schedule."""


class Schedule(abc.ABC):
    """A coefficient that depends on the step; made by `schedule` and its kin."""

    @abc.abstractmethod
    def __call__(self, hparams: Any, step: Tensor) -> Any:
        """The value at a step, counted from 0: int64, 0-d."""


class Optimizer(NamedTuple):
    """A pair of pure functions that is one optimiser.

    Attributes:
        init: ``init(params) -> state``, a pytree of tensors.
        update: ``update(grads, state, params, hparams=None) -> (new_params, new_state)``. ``grads``
            is a tree like ``params``, in which None may stand for a leaf that the loss does not
            depend on: those of this module then leave the leaf and its slots as they are, as
            ``torch.optim`` does (the step number still counts). ``hparams`` is handed to the
            coefficients that are functions.

    Example:
        >>> halve = hf.optim.Optimizer(
        ...     init=lambda params: (),
        ...     update=lambda grads, state, params, hparams=None: (0.5 * params, state),
        ... )
        >>> halve.update(None, halve.init(1.0), torch.tensor(4.0))
        (tensor(2.), ())
    """

    init: Callable[[TensorTree], Any]
    update: Callable[..., tuple[TensorTree, Any]]

    def __repr__(self) -> str:
        update: Any = self.update
        if isinstance(update, PrintsAsCall):
            return repr(update)
        return f"Optimizer(init={self.init!r}, update={update!r})"


@loadable
class State(NamedTuple):
    """The state of the optimisers of this module.

    Attributes:
        step: int64, 0-d: the updates made so far.
        slots: the running averages, under the names that ``torch.optim`` gives them: a dict of
            trees like ``params``. For a class that `from_torch` runs, one dict a leaf.

    Example:
        >>> adam = hf.optim.adam(lr=0.1)
        >>> params, state = adam.update(torch.ones(2), adam.init(torch.zeros(2)), torch.zeros(2))
        >>> state.step, sorted(state.slots)
        (tensor(1), ['exp_avg', 'exp_avg_sq'])
    """

    step: Tensor
    slots: Any


@dataclasses.dataclass(frozen=True)
class Initializer:
    """The ``init`` of an update that has one, which compares as the update does."""

    update: Any

    def __call__(self, params: TensorTree) -> Any:
        return self.update.init(params)


def check_optimizer(optimizer: Any, caller: str) -> Optimizer:
    """Return an `Optimizer`, or raise an error that says how to get one.

    Args:
        optimizer: what a user passed.
        caller: the function that it was passed to, with which the error begins.

    Raises:
        TypeError: anything but an `Optimizer`.

    Example:
        >>> hf.optim.check_optimizer(torch.optim.Adam, "minimize")
        Traceback (most recent call last):
        TypeError: minimize: got the class torch.optim.Adam; expected an hf.optim.Optimizer. ...
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    kind = optimizer if inspect.isclass(optimizer) else type(optimizer)
    if issubclass(kind, torch.optim.Optimizer):
        name = class_name(kind)
        got = f"the class {name}" if kind is optimizer else f"an instance of {name}"
        advice = f"Write hf.optim.from_torch({name}, lr=...)"
    elif inspect.isfunction(optimizer) and optimizer.__module__.startswith("hyperfunc.optim"):
        got = f"the function hf.optim.{optimizer.__name__}"
        advice = f"Call it: hf.optim.{optimizer.__name__}(lr=...)"
    else:
        got = describe(optimizer)
        advice = "Write hf.optim.sgd(lr=0.1), or hf.optim.Optimizer(init, update) around your own"
    raise TypeError(f"{caller}: got {got}; expected an hf.optim.Optimizer. {advice}")


def check_coefficient(name: str, key: str, coefficient: Coefficient) -> None:
    if not callable(coefficient):
        _check_values(name, key, coefficient, key)
    elif not isinstance(coefficient, Schedule) and takes(coefficient, 2, 1):
        raise TypeError(
            f"{name}: {key} is a function of two arguments; expected one of hparams alone. For "
            f"one of the step too, write {key}=hf.optim.schedule(lambda hparams, step: ...)"
        )


def refuse_schedule(name: str, key: str, coefficient: Any) -> None:
    """Raise if a coefficient depends on the step, where there is none, or on names."""
    if isinstance(coefficient, ByName):
        raise TypeError(
            f"{name}: {key} is a function of names, but one value is for all of params here; "
            f"expected a number, a 0-d tensor or a function of hparams. An optimizer of hf.optim "
            f"in hf.minimize takes it"
        )
    if isinstance(coefficient, Schedule):
        raise TypeError(
            f"{name}: {key} is a schedule, but no steps are counted here; expected a number, a "
            f"tensor or a function of hparams. An optimizer of hf.optim in hf.minimize takes it"
        )


def check_single(label: str, value: Any, advice: str) -> None:
    if not is_single(value):
        raise TypeError(
            f"{label} is {describe(value)}; expected a number or a 0-d tensor, one value for all "
            f"leaves. For values leaf by leaf, {advice}"
        )


def is_single(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def is_zero(coefficient: Any) -> bool:
    return isinstance(coefficient, int | float) and coefficient == 0


def evaluate(
    name: str, key: str, coefficient: Coefficient, hparams: Any, step: Tensor | None = None
) -> Any:
    """The value of a coefficient at these hparams: a number, a tensor or a tree of them."""
    if not callable(coefficient):
        return coefficient
    arguments: tuple[Any, ...] = (hparams,)
    if isinstance(coefficient, Schedule) and step is not None:
        arguments = (hparams, step)
    elif isinstance(coefficient, Schedule):
        refuse_schedule(name, key, coefficient)
    elif hparams is None:
        raise TypeError(
            f"{name}: {key} is a function of hparams, but update got hparams=None. "
            f"Write optimizer.update(grads, state, params, hparams)"
        )
    value = coefficient(*arguments)
    label = f"{key}(hparams, step)" if len(arguments) == 2 else f"{key}(hparams)"
    if isinstance(value, Schedule) and step is None:
        raise TypeError(
            f"{name}: {label} is a schedule; expected a number, a tensor or a tree of them. Give "
            f"the schedule itself as {key}: its values may be functions of hparams"
        )
    _check_values(name, key, value, label)
    return trees.tree_map(in_own_dtype, value) if forward_mode_active() else value


def values_by_leaf(
    name: str,
    coefficients: dict[str, Coefficient],
    hparams: Any,
    params: TensorTree,
    leaves: Sequence[Tensor],
    spec: trees.TreeSpec,
    any_shape: Collection[str] = (),
    step: Tensor | None = None,
) -> list[tuple[Any, ...]]:
    """The values of all coefficients for each leaf; one and the same tuple if leaves share them.

    Those under the names ``any_shape`` need not broadcast to the leaf that they stand for.
    """

    def evaluated(key: str, value: Coefficient) -> Any:
        return evaluate(name, key, value, hparams, step)

    values = {key: evaluated(key, value) for key, value in coefficients.items()}
    if all(is_single(value) for value in values.values()):
        return [tuple(values.values())] * len(leaves)
    columns = [
        [value] * len(leaves)
        if is_single(value)
        else _by_leaf(
            f"{name}: {key}",
            value,
            functools.partial(evaluated, key),
            params,
            leaves,
            spec,
            key not in any_shape,
        )
        for key, value in values.items()
    ]
    return list(zip(*columns, strict=True))


def cast(values: Iterable[Any], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return tuple(
        value.to(dtype=dtype, device=device) if isinstance(value, Tensor) else value
        for value in values
    )


def flatten_like_params(
    name: str, grads: TensorTree, params: TensorTree
) -> tuple[Gradients, Leaves, trees.TreeSpec]:
    """The leaves of the gradients, some None, those of params, and their common structure."""
    leaves, spec = trees.flatten(params)
    grad_leaves, grad_spec = trees.flatten(grads)
    if grad_spec != spec:
        with contextlib.suppress(ValueError):  # a leaf that is None is no leaf to optree
            parts = spec.flatten_up_to(grads)
            if any(part is None for part in parts):
                grad_leaves, grad_spec = parts, spec
    pairs = zip(grad_leaves, leaves, strict=False)
    like = [leaf if grad is None else grad for grad, leaf in pairs]
    trees.check_like(
        [*like, *grad_leaves[len(like) :]],
        *(grad_spec, tuple(leaves), spec, f"{name}: grads", "params"),
    )
    return tuple(grad_leaves), tuple(leaves), spec


def skips_unused(update: Any) -> bool:
    """Whether an update takes None for the gradient of a leaf, and leaves that as it is."""
    return bool(getattr(update, "skips_unused", False))


def describe(value: Any) -> str:
    return f"{show(value)} of type {type(value).__name__}"


def class_name(optimizer_class: type) -> str:
    name = optimizer_class.__name__
    if getattr(torch.optim, name, None) is optimizer_class:
        return f"torch.optim.{name}"
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


_BELOW_ONE = (0.0, math.nextafter(1.0, 0.0), "in [0, 1)")
_ANY = (-math.inf, math.inf, "that is not NaN")
_RANGES: dict[str, tuple[float, float, str]] = {
    "alpha": (0.0, 1.0, "in [0, 1]"),
    **dict.fromkeys(("heavy_ball: momentum", "betas[0]", "betas[1]"), _BELOW_ONE),
    **dict.fromkeys(("dampening", "lower", "upper", "normal", "offset", "matrix", "vector"), _ANY),
}
_AT_LEAST_ZERO = (0.0, math.inf, "of at least 0")
_KINDS = (
    "a number, a floating-point tensor, a tree of them with the structure of params, a function of "
    "hparams that returns one of these, or a schedule"
)


def _check_values(name: str, key: str, value: Any, label: str) -> None:
    low, high, words = _RANGES.get(f"{name}: {key}") or _RANGES.get(key, _AT_LEAST_ZERO)
    leaves, spec = trees.flatten(value)
    if not leaves:
        raise TypeError(f"{name}: {label} is {describe(value)}; expected {_KINDS}")
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            continue
        if isinstance(leaf, ByName) or callable(leaf):  # whose values are checked as they come
            continue
        path = trees.paths(spec, label)[index]
        if not is_number(leaf):
            got = f"a tensor of dtype {leaf.dtype}" if isinstance(leaf, Tensor) else describe(leaf)
            raise TypeError(f"{name}: {path} is {got}; expected {_KINDS}")
        if not low <= leaf <= high:
            raise ValueError(f"{name}: {path} is {leaf}; expected a number {words}")


def match_prefix(label: str, tree: Any, params: TensorTree) -> list[tuple[Any, Any]]:
    """The leaves of a tree that is a prefix of params, each with the part that it stands for."""
    leaves, prefix = trees.flatten(tree)
    try:
        return list(zip(leaves, prefix.flatten_up_to(params), strict=True))
    except ValueError as error:
        raise ValueError(
            f"{label} has another structure than params: got {prefix}, expected "
            f"{trees.flatten(params)[1]} or that tree cut off at some depth"
        ) from error


def _by_leaf(
    label: str,
    value: Any,
    evaluated: Callable[[Any], Any],
    params: TensorTree,
    leaves: Sequence[Tensor],
    spec: trees.TreeSpec,
    must_broadcast: bool,
) -> list[Any]:
    if _is_by_name(value, spec):
        column = of_names(label, value, spec)
        name, _, key = label.rpartition(": ")
        for item in {id(item): item for item in column if not callable(item)}.values():
            _check_values(name, key, item, f"{key} for a parameter")
    else:
        parts = match_prefix(label, value, params)
        column = [item for item, part in parts for _ in trees.flatten(part)[0]]
    functions = {id(item): evaluated(item) for item in column if callable(item)}
    column = [functions.get(id(item), item) for item in column]
    for path, item, leaf in zip(trees.paths(spec, "params"), column, leaves, strict=True):
        if not isinstance(item, Tensor | int | float):
            raise TypeError(
                f"{label}: what stands for {path} is {describe(item)}; expected a number, a "
                f"tensor, a function of hparams that returns one, or a schedule"
            )
        if must_broadcast and isinstance(item, Tensor) and not _broadcasts(item.shape, leaf.shape):
            raise ValueError(
                f"{label}: a value of shape {tuple(item.shape)} stands for {path}, of shape "
                f"{tuple(leaf.shape)}; expected a 0-d tensor or one that broadcasts to the leaf"
            )
    return column


@dataclasses.dataclass(frozen=True)
class ByName:
    """A coefficient that is a function of the name of a parameter; made by `by_name`."""

    fn: Callable[[str], Any]


def names_of(spec: trees.TreeSpec) -> list[str]:
    """The name of each leaf: the keys to it, joined by dots."""
    return [".".join(map(str, path)) for path in spec.paths()]


def _is_by_name(value: Any, spec: trees.TreeSpec) -> bool:
    """Whether a value goes by names, and not by the structure of params."""
    if isinstance(value, ByName):
        return True
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return named and not trees.flatten(value)[1].is_prefix(spec)


def of_names(label: str, value: Any, spec: trees.TreeSpec) -> list[Any]:
    """What stands for each leaf: that of the longest name of a module that it is in, or its own."""
    names = names_of(spec)
    if isinstance(value, ByName):
        return [value.fn(name) for name in names]
    keys = {key.removesuffix("."): key for key in value}
    unused, column = set(value), []
    for name in names:
        parts = name.split(".")
        modules = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        key = next((keys[module] for module in modules if module in keys), None)
        if key is None:
            raise ValueError(
                f"{label}: no name fits the parameter {name!r}; got {sorted(value)}. Add the name "
                f'of a module that it is in, or "" for all that no other name fits'
            )
        unused.discard(key)
        column.append(value[key])
    if unused:
        raise ValueError(
            f"{label}: the name {sorted(unused)[0]!r} fits no parameter; expected the name of a "
            f"module or parameter, with or without a dot at its end, of {names}"
        )
    return column


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False)
    )
