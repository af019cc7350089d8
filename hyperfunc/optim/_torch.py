"""The classes of torch.optim as pure updates."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.flat import split
from hyperfunc._engine.operations import Recomputed, Recorded
from hyperfunc._engine.shown import show
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.optim._base import (
    ByName,
    Initializer,
    Optimizer,
    State,
    check_single,
    class_name,
    describe,
    evaluate,
    flatten_like_params,
)
from hyperfunc.optim._groups import from_groups, split_by_names
from hyperfunc.optim._leafwise import safe_root
from hyperfunc.optim._rules import adagrad, adam, adamw, rmsprop, sgd


def from_torch(
    optimizer_class: type[torch.optim.Optimizer],
    /,
    *,
    differentiable: bool = False,
    groups: Any = None,
    **options: Any,
) -> Optimizer:
    """Run a ``torch.optim`` class as a pure update.

    SGD, Adam, AdamW, RMSprop and Adagrad become the functions of this module, with all that they
    can do. Any other class takes its own step, on copies, with its state passed in and out. Then

    - options may be numbers, 0-d tensors, functions of ``hparams`` or schedules, also within
      ``betas``;
    - derivatives with respect to gradients, parameters and state are right for Adadelta, Adamax,
      NAdam, RAdam and Rprop, and with respect to ``lr`` for NAdam and RAdam. All others, which
      torch has not or silently has as zero, are refused when asked for;
    - an option may be a dictionary from the names of modules to values, as for `by_name`, with
      numbers for single leaves;
    - ``vmap`` runs the step task by task.

    Args:
        optimizer_class: a subclass of ``torch.optim.Optimizer`` that works on dense gradients and
            needs no closure.
        differentiable: states that the step of a class that is not in ``torch.optim`` has the right
            derivatives in gradients, parameters and state under its option ``differentiable=True``.
        groups: as torch.optim has them, with names in place of tensors: a list of dictionaries with
            ``"params"``, a name or a list of names of modules or parameters, and the options of the
            group; see `grouped`.
        **options: the options of the class, without ``params``. The first five classes ignore
            ``foreach``, ``fused`` and ``capturable``, which change no result.

    Raises:
        TypeError: something that is no such class; an option that it does not know.
        ValueError: LBFGS and SparseAdam; an option out of its range.
        RuntimeError: a derivative that would be wrong, when it is taken.

    Example:
        >>> optimizer = hf.optim.from_torch(torch.optim.NAdam, lr=lambda hparams: hparams["lr"])
        >>> params = {"w": torch.ones(2)}
        >>> state = optimizer.init(params)
        >>> def loss_after_step(hparams):
        ...     new, _ = optimizer.update(params, state, params, hparams)
        ...     return (new["w"] ** 2).sum() / 2
        >>> torch.func.grad(loss_after_step)({"lr": torch.tensor(0.0)})["lr"]
        tensor(-2.1...)

    References:
        The algorithms are described, with their papers, in the documentation of ``torch.optim``.
    """
    _check_torch_class(optimizer_class)
    make = functools.partial(from_torch, optimizer_class, differentiable=differentiable)
    if groups is not None:
        return from_groups(make, groups, options)
    native = _NATIVE.get(optimizer_class)
    if native is not None:
        kept = {name: value for name, value in options.items() if name not in _EXECUTION_OPTIONS}
        return native(**kept)
    for key, value in options.items():
        if isinstance(value, ByName):
            raise TypeError(
                f"from_torch: {key} is a function of names, which {class_name(optimizer_class)} "
                f"does not take; expected a dictionary from the names of modules to values, as in "
                f'{key}={{"encoder": 1e-4, "": 1e-3}}'
            )
    named = split_by_names(options)
    if named is not None:
        return from_groups(make, named, options)
    update = _TorchUpdate(optimizer_class, differentiable, options)
    return Optimizer(Initializer(update), update)


_NATIVE: dict[type[torch.optim.Optimizer], Callable[..., Optimizer]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
}
_EXECUTION_OPTIONS = ("foreach", "fused", "capturable")

# The classes whose step torch differentiates rightly in gradients, parameters and state, and the
# options in which it does too. tests/optim compares every class with finite differences.
_DIFFERENTIABLE: dict[str, frozenset[str]] = {
    "torch.optim.Adadelta": frozenset(),
    "torch.optim.Adamax": frozenset(),
    "torch.optim.NAdam": frozenset({"lr"}),
    "torch.optim.RAdam": frozenset({"lr"}),
    "torch.optim.Rprop": frozenset(),
}


def _check_torch_class(optimizer_class: Any) -> None:
    if isinstance(optimizer_class, torch.optim.Optimizer):
        name = class_name(type(optimizer_class))
        raise TypeError(
            f"from_torch: got an instance of {name}; expected the class and its options. "
            f"Write hf.optim.from_torch({name}, lr=...)"
        )
    if not (
        inspect.isclass(optimizer_class) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise TypeError(
            f"from_torch: got {describe(optimizer_class)}; expected a subclass of "
            f"torch.optim.Optimizer. Write hf.optim.from_torch(torch.optim.NAdam, lr=...)"
        )
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"from_torch: {class_name(optimizer_class)} evaluates the loss itself, through a "
            f"closure, and has no update from gradients. Run it in your own inner solver, and take "
            f"the hypergradient with an implicit method such as method='cg'"
        )
    if issubclass(optimizer_class, torch.optim.SparseAdam):
        raise ValueError(
            "from_torch: torch.optim.SparseAdam works on sparse gradients; trees of params are "
            "dense here. Use hf.optim.adam"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _TorchUpdate(PrintsAsCall):
    """The update of `from_torch` for a class that takes its own step."""

    optimizer_class: type[torch.optim.Optimizer]
    differentiable: bool
    options: dict[str, Any]

    skips_unused: ClassVar[bool] = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return class_name(self.optimizer_class)

    @functools.cached_property
    def rule(self) -> _TorchRule:
        return _TorchRule(self.optimizer_class, self.options)

    def __repr__(self) -> str:
        options = {"differentiable": True, **self.options} if self.differentiable else self.options
        arguments = [self.name, *(f"{key}={show(value)}" for key, value in options.items())]
        return f"from_torch({', '.join(arguments)})"

    def __post_init__(self) -> None:
        accepted = inspect.signature(self.optimizer_class).parameters
        if self.differentiable and "differentiable" not in accepted:
            raise TypeError(
                f"from_torch: differentiable=True, but {self.name} has no option of that name: its "
                f"step cannot be differentiated. Use one of the functions of hf.optim"
            )
        # A wrong option raises here, and not at the first step.
        self.rule.build([torch.zeros(1, 1)], self.rule.placeholders, {})

    def init(self, params: TensorTree) -> State:
        leaves, _ = trees.flatten_floating(params, "params")
        with torch.no_grad():
            zeros = [_zeros(leaf) for leaf in leaves]
            unset = [None] * len(zeros)
            _, states = self.rule.run(zeros, zeros, unset, self.rule.placeholders, {})
        for entries in states:
            for key, value in entries.items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"from_torch: {self.name} keeps {key!r} in its state as {describe(value)}; "
                        f"expected tensors only, since a state is a pytree of tensors"
                    )
        slots = tuple({key: _zeros(x) for key, x in sorted(state.items())} for state in states)
        return State(torch.zeros((), dtype=torch.int64, device="cpu"), slots)

    def __call__(
        self, grads: TensorTree, state: State, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, State]:
        rule, name = self.rule, self.name
        right = _DIFFERENTIABLE.get(name, frozenset())
        grad_leaves, leaves, spec = flatten_like_params(name, grads, params)
        slots = state.slots if isinstance(state, State) else None
        if not isinstance(slots, tuple) or len(slots) != len(leaves):
            raise TypeError(
                f"{name}: got a state that is not one of from_torch({name}) for these params. "
                f"Make it with state = optimizer.init(params)"
            )
        values = rule.evaluate(name, hparams, state.step)
        used = [index for index, grad in enumerate(grad_leaves) if grad is not None]
        slot_leaves, slot_spec = trees.flatten(tuple(slots[index] for index in used))
        chosen = [leaves[index] for index in used]
        n = len(used)
        if not used:
            return params, State(state.step + 1, slots)

        def take_step(traced: bool, *inputs: Tensor) -> Leaves:
            first, second, (steps,), slots, values = split(inputs, n, n, 1, len(slot_leaves))
            numbers = [
                value if traced and label in right else value.item()
                for label, value in zip(rule.labels, values, strict=True)
            ]
            states = [_begun(each, steps) for each in trees.unflatten(slot_spec, slots)]
            execution = rule.traced_execution if traced else {}
            new_leaves, new_states = rule.run(first, second, states, numbers, execution)
            return (*new_leaves, *trees.flatten(tuple(new_states))[0])

        grads_used = (grad for grad in grad_leaves if grad is not None)
        operands = (*chosen, *grads_used, state.step, *slot_leaves, *values)
        if self.differentiable or name in _DIFFERENTIABLE:
            errors = {
                index: f"from_torch: the derivative of a step of {name} with respect to {label} is "
                f"wrong or missing in torch. Use one of the functions of hf.optim, which have it "
                f"for every coefficient"
                for index, label in enumerate(rule.labels, len(operands) - len(values))
                if label not in right
            }
        else:
            errors = dict.fromkeys(
                range(len(operands)),
                f"from_torch: a step of {name} cannot be differentiated. Use one of the functions "
                f"of hf.optim, or an implicit method such as method='cg', which does not "
                f"differentiate steps. If the class is written to be differentiated, write "
                f"from_torch({name}, differentiable=True, ...)",
            )
        operation = _TaskByTask(
            functools.partial(take_step, True), errors, functools.partial(take_step, False)
        )
        outputs = Recorded.apply(operation, *operands)
        new_leaves, new_slots = list(leaves), list(slots)
        parts = zip(used, outputs[:n], trees.unflatten(slot_spec, outputs[n:]), strict=True)
        for index, leaf, slot in parts:
            new_leaves[index], new_slots[index] = leaf, slot
        return trees.unflatten(spec, new_leaves), State(state.step + 1, tuple(new_slots))


class _TorchRule:
    """One step of a torch.optim class on copies, with some of its options left open."""

    def __init__(
        self, optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]
    ) -> None:
        self._class = optimizer_class
        self._leaves, self._spec = trees.flatten(options)
        leaves = enumerate(self._leaves)
        self._open = [i for i, leaf in leaves if callable(leaf) or isinstance(leaf, Tensor)]
        accepted = inspect.signature(optimizer_class).parameters
        labels, placeholders = [], []
        for key, value in sorted(options.items()):
            labels += trees.paths(trees.flatten(value)[1], key)
            placeholders += _placeholders(accepted.get(key), value)
        self.labels = [labels[index] for index in self._open]
        self.placeholders = [placeholders[index] for index in self._open]
        execution = dict.fromkeys((key for key in _EXECUTION_OPTIONS if key in accepted), False)
        self.traced_execution = {"differentiable": True, **execution}

    def evaluate(self, name: str, hparams: Any, step: Tensor) -> list[Tensor]:
        values = []
        for label, index in zip(self.labels, self._open, strict=True):
            value = evaluate(name, label, self._leaves[index], hparams, step)
            check_single(f"{name}: {label}", value, "use the functions of hf.optim")
            number = not isinstance(value, Tensor)
            values.append(torch.tensor(value, dtype=torch.float64) if number else value)
        return values

    def build(
        self, params: list[Tensor], values: Sequence[Any], execution: dict[str, Any]
    ) -> torch.optim.Optimizer:
        leaves = list(self._leaves)
        for index, value in zip(self._open, values, strict=True):
            leaves[index] = value
        options = {**trees.unflatten(self._spec, leaves), **execution}
        return self._class(params, **options)

    def run(
        self,
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor] | None],
        values: Sequence[Any],
        execution: dict[str, Any],
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        params = [leaf.clone() for leaf in leaves]
        optimizer = self.build(params, values, execution)
        for index, param in enumerate(params):
            param.grad = grads[index].clone()
            state = states[index]
            if state is not None:
                # Counters have no derivative, and torch refuses those that carry one.
                optimizer.state[param] = {
                    key: (value.detach() if key == "step" else value).clone()
                    for key, value in state.items()
                }
        with _SafeRoots():
            optimizer.step()
        for param in params:
            param.grad = None
        return params, [dict(optimizer.state[param]) for param in params]


def _begun(state: dict[str, Tensor], steps: Tensor) -> dict[str, Tensor] | None:
    """The state of a leaf, or None before its own first step, which fills it."""
    counter = state.get("step", steps)
    return state if steps.item() and counter.any().item() else None


def _zeros(like: Tensor) -> Tensor:
    """Zeros outside of any ``vmap``."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _placeholders(parameter: inspect.Parameter | None, value: Any) -> list[float]:
    """Valid numbers for the leaves of an option: those of its default, if it has one like that."""
    leaves = trees.flatten(value)[0]
    default = [] if parameter is None else trees.flatten(parameter.default)[0]
    if len(default) == len(leaves) and all(isinstance(x, int | float) for x in default):
        return default
    return [0.5] * len(leaves)


class _SafeRoots(torch.overrides.TorchFunctionMode):
    """Within this context, square roots have derivative zero at zero."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.sqrt, torch.Tensor.sqrt) and isinstance(args[0], Tensor) and not kwargs:
            return safe_root(args[0])
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True, eq=False)
class _TaskByTask(Recomputed):
    """An operation that ``vmap`` runs task by task; ``plain`` gives values alone."""

    fn: Callable[..., Leaves]
    errors: dict[int, str]  # why there is no derivative in some of the operands
    plain: Callable[..., Leaves] | None = None

    def run(self, operands: Leaves) -> Leaves:
        return (self.plain or self.fn)(*operands)

    def derivative(self, fn: Callable[..., Leaves], wrt: tuple[int, ...]) -> _TaskByTask:
        for index in wrt:
            if index in self.errors:
                raise RuntimeError(self.errors[index])
        return _TaskByTask(fn, self.errors)

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], operands: Leaves) -> Any:
        pairs = list(zip(operands, in_dims, strict=True))
        tasks = []
        for task in range(info.batch_size):
            rows = (x if dim is None else x.select(dim, task) for x, dim in pairs)
            tasks.append(Recorded.apply(self, *rows))
        return tuple(torch.stack(values) for values in zip(*tasks, strict=True)), 0
