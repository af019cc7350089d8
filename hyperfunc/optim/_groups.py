"""Coefficients and optimisers by the names of modules, over the flat names of params."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import (
    ByName,
    Initializer,
    Optimizer,
    check_optimizer,
    describe,
    flatten_like_params,
    names_of,
    of_names,
    skips_unused,
)


def by_name(fn: Callable[[str], Any]) -> ByName:
    """A coefficient that is a function of the name of a parameter.

    Names are those of `hyperfunc.functional`, ``"encoder.0.weight"``; in a nested tree of params
    the keys are joined by dots. For values by module a dictionary does, of module names to values:
    ``lr={"encoder": 1e-4, "encoder.norm": 0.0, "": 1e-3}``. The longest name that fits counts, and
    ``""`` fits all.

    Args:
        fn: ``name -> value``, pure: a number, a tensor, a function of hparams that returns one, or
            a schedule.

    Raises:
        TypeError: ``fn`` is no function.

    Example:
        >>> decay = hf.optim.by_name(lambda name: 0.0 if name.endswith("bias") else 0.5)
        >>> optimizer = hf.optim.sgd(
        ...     lr={"a": 0.1, "b": lambda hparams: hparams}, weight_decay=decay
        ... )
        >>> params = {name: torch.ones(()) for name in ("a.weight", "a.bias", "b.weight", "b.bias")}
        >>> new, _ = optimizer.update(params, optimizer.init(params), params, torch.tensor(0.2))
        >>> {name: round(leaf.item(), 4) for name, leaf in new.items()}
        {'a.weight': 0.85, 'a.bias': 0.9, 'b.weight': 0.7, 'b.bias': 0.8}
    """
    check_callable(fn, "by_name: fn", "name -> number, tensor, function of hparams, or schedule")
    return ByName(fn)


def grouped(groups: Mapping[str, Optimizer]) -> Optimizer:
    """An optimiser of its own for the parameters of each module.

    Args:
        groups: from the names of modules or parameters, with or without a dot at the end, to
            optimisers. Each parameter belongs to the longest name that fits; ``""`` fits all.

    Returns:
        An `Optimizer` whose state is a tuple of theirs, in the order of the names given.

    Raises:
        TypeError: ``groups`` is no dictionary of names to optimisers.
        ValueError: in ``init`` and ``update``, a name fits no parameter, or no name fits one.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> _, params = hf.functional(net)
        >>> optimizer = hf.optim.grouped({"0": hf.optim.sgd(0.1), "1": hf.optim.adam(0.01)})
        >>> [type(state).__name__ for state in optimizer.init(params)]
        ['State', 'State']
    """
    if not isinstance(groups, Mapping) or not groups:
        raise TypeError(
            f"grouped: groups is {describe(groups)}; expected a dictionary from names to optimisers"
        )
    for name, optimizer in groups.items():
        if not isinstance(name, str):
            raise TypeError(f"grouped: a key is {describe(name)}; expected the name of a module")
        check_optimizer(optimizer, f"grouped: groups[{name!r}]")
    update = _Grouped(dict(groups))
    return Optimizer(Initializer(update), update)


def from_groups(
    make: Callable[..., Optimizer], groups: Any, options: Mapping[str, Any]
) -> Optimizer:
    """The optimisers of groups as torch.optim has them, with names for params, as one."""
    expected = (
        'a list of dictionaries with "params", a name or a list of names of modules or parameters, '
        'and the options of the group, as in [{"params": ["encoder"], "lr": 1e-4}, {"params": ""}]'
    )
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise TypeError(f"from_torch: groups is {describe(groups)}; expected {expected}")
    found: dict[str, Optimizer] = {}
    for index, group in enumerate(groups):
        names = group.get("params") if isinstance(group, Mapping) else None
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"from_torch: groups[{index}] is of type {type(group).__name__} without names "
                f'under "params"; expected {expected}'
            )
        own = {key: value for key, value in group.items() if key != "params"}
        optimizer = make(**{**options, **own})
        for name in names:
            if name in found:
                raise ValueError(f"from_torch: {name!r} is in two groups; expected it in one")
            found[name] = optimizer
    return grouped(found)


def split_by_names(options: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The groups that options by names stand for, or None if there are no such options."""
    named = {key: value for key, value in options.items() if isinstance(value, Mapping)}
    if not named:
        return None
    every = {name.removesuffix(".") for value in named.values() for name in value}
    groups = []
    for name in sorted(every):
        fits = {
            key: [k for k in value if _within(name, k.removesuffix("."))]
            for key, value in named.items()
        }
        if all(fits.values()):  # else parameters that only this name fits have no value
            own = {key: named[key][max(names, key=len)] for key, names in fits.items()}
            groups.append({"params": name, **own})
    return groups


def _within(name: str, module: str) -> bool:
    return module == "" or name == module or name.startswith(module + ".")


@dataclasses.dataclass(frozen=True, repr=False)
class _Grouped(PrintsAsCall):
    """The update of `grouped`."""

    groups: dict[str, Optimizer]

    name = "grouped"

    @property
    def skips_unused(self) -> bool:
        return all(skips_unused(optimizer.update) for optimizer in self.groups.values())

    def init(self, params: TensorTree) -> tuple[Any, ...]:
        leaves, spec = trees.flatten_floating(params, "params")
        names = names_of(spec)
        parts = self._parts(spec)
        return tuple(
            optimizer.init({names[i]: leaves[i] for i in part}) for optimizer, part in parts
        )

    def __call__(
        self, grads: TensorTree, state: Any, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, tuple[Any, ...]]:
        grad_leaves, leaves, spec = flatten_like_params(self.name, grads, params)
        names, new_leaves, new_state = names_of(spec), list(leaves), []
        parts = list(self._parts(spec))
        if not isinstance(state, tuple) or len(state) != len(parts):
            raise TypeError(
                f"grouped: state is of type {type(state).__name__}; expected a tuple of "
                f"{len(parts)} states. Make it with state = optimizer.init(params)"
            )
        for (optimizer, part), own in zip(parts, state, strict=True):
            new, after = optimizer.update(
                {names[i]: grad_leaves[i] for i in part},
                own,
                {names[i]: leaves[i] for i in part},
                hparams,
            )
            for i in part:
                new_leaves[i] = new[names[i]]
            new_state.append(after)
        return trees.unflatten(spec, new_leaves), tuple(new_state)

    def _parts(self, spec: trees.TreeSpec) -> Iterator[tuple[Optimizer, list[int]]]:
        """The optimisers, each with the indices of its leaves."""
        chosen = of_names("grouped: groups", {name: name for name in self.groups}, spec)
        for name, optimizer in self.groups.items():
            yield optimizer, [i for i, key in enumerate(chosen) if key == name]
