"""A proximal operator, made from a rule for one leaf."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.shown import show
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import Coefficient, check_coefficient, describe, values_by_leaf

Dim: TypeAlias = int | tuple[int, ...] | None
"""The dimensions along which the vectors lie; ``None``: all of a leaf."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prox:
    """A proximal operator ``(params, hparams=None, lr=1.0) -> params``, made by this module.

    Attributes:
        name: the function that made it.
        rule: ``(leaf, dims, lr, *settings) -> leaf``.
        settings: the coefficients by name.
        dim: the dimensions of a leaf that the rule couples: ``()`` none, ``None`` all.
        within: the settings that may vary within a vector or matrix.
        shaped: the settings that need not broadcast to a leaf; the rule looks at their shapes.

    Example:
        >>> hf.prox.l1(0.5)
        prox.l1(weight=0.5)
        >>> hf.prox.l1(0.5)(torch.tensor([2.0, -0.3]))
        tensor([1.5000, -0.0000])
    """

    name: str
    rule: Callable[..., Tensor]
    settings: dict[str, Coefficient] = dataclasses.field(default_factory=dict)
    dim: Dim = ()
    within: Collection[str] = ()
    shaped: Collection[str] = ()

    def __post_init__(self) -> None:
        for key, setting in self.settings.items():
            check_coefficient(f"prox.{self.name}", key, setting)
        if self.dim is not None and any(type(dim) is not int for dim in _as_tuple(self.dim)):
            raise TypeError(
                f"prox.{self.name}: dim is {describe(self.dim)}; expected an int, a tuple of ints, "
                f"or None for all of a leaf"
            )

    def __repr__(self) -> str:
        settings = (f"{key}={show(value)}" for key, value in self.settings.items())
        return f"prox.{self.name}({', '.join(settings)})"

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        """The nearest params, with the regulariser weighted by ``lr``, or those in the set."""
        name = f"prox.{self.name}"
        if not isinstance(lr, int | float | Tensor):
            raise TypeError(f"{name}: lr is {describe(lr)}; expected a number or a 0-d tensor")
        functions = [key for key, setting in self.settings.items() if callable(setting)]
        if functions and hparams is None:
            raise TypeError(
                f"{name}: {functions[0]} is a function of hparams, but hparams is None. "
                f"Write prox(params, hparams, lr)"
            )
        leaves, spec = trees.flatten_floating(params, "params")
        rows = values_by_leaf(
            name, self.settings, hparams, params, leaves, spec, any_shape=self.shaped
        )
        parts = zip(leaves, trees.paths(spec, "params"), rows, strict=True)
        return trees.unflatten(spec, [self._apply(x, path, (lr, *row)) for x, path, row in parts])

    def _apply(self, leaf: Tensor, path: str, numbers: tuple[Any, ...]) -> Tensor:
        dims = self._dims(leaf, path)
        if not leaf.numel():
            return leaf
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        # tensors throughout: a number and a 0-d tensor would have a float64 tangent in torch
        lr, *values = (
            number.to(dtype=dtype, device=leaf.device)
            if isinstance(number, Tensor)
            else torch.full((), number, dtype=dtype, device=leaf.device)
            for number in numbers
        )
        for key, value in zip(self.settings, values, strict=True):
            if key in self.within or key in self.shaped:
                continue
            shape = (1,) * (leaf.ndim - value.ndim) + tuple(value.shape)
            if any(shape[dim] != 1 for dim in dims):
                raise ValueError(
                    f"prox.{self.name}: {key} has shape {tuple(value.shape)} for {path}, of shape "
                    f"{tuple(leaf.shape)}; expected one value for each vector or matrix: size 1 in "
                    f"the dimensions {dims}"
                )
        try:
            return self.rule(leaf.to(dtype), dims, lr, *values).to(leaf.dtype)
        except UnfitShape as error:
            raise ValueError(
                f"prox.{self.name}: {error.key} has shape {tuple(error.value.shape)} for {path}, "
                f"of shape {tuple(leaf.shape)}; expected {error.expected}"
            ) from None

    def _dims(self, leaf: Tensor, path: str) -> tuple[int, ...]:
        if self.dim is None:
            return tuple(range(leaf.ndim))
        dims = _as_tuple(self.dim)
        for dim in dims:
            if not -leaf.ndim <= dim < leaf.ndim:
                raise ValueError(
                    f"prox.{self.name}: {path} has shape {tuple(leaf.shape)} and no dimension "
                    f"{dim}. To give parts of params their own operators, write "
                    f"hf.prox.blocks({{...}})"
                )
        return tuple(sorted({dim % leaf.ndim for dim in dims}))


class UnfitShape(Exception):
    """A setting has another shape than a rule expected."""

    def __init__(self, key: str, value: Tensor, expected: str) -> None:
        self.key, self.value, self.expected = key, value, expected


def _as_tuple(dim: int | tuple[int, ...]) -> tuple[int, ...]:
    return dim if isinstance(dim, tuple) else (dim,)


def check_prox(prox: Any, caller: str) -> Callable[..., TensorTree]:
    """Return an operator, or raise an error that says how to get one; it begins with the caller."""
    maker = inspect.isfunction(prox) and prox.__module__.startswith("hyperfunc.prox")
    if maker or not callable(prox):
        got = f"the function hf.prox.{prox.__name__}" if maker else describe(prox)
        advice = f"Call it: hf.prox.{prox.__name__}(...)" if maker else "Write hf.prox.l1(weight)"
        raise TypeError(
            f"{caller}: prox is {got}; expected an operator (params, hparams, lr) -> params. "
            f"{advice}"
        )
    return prox  # type: ignore[no-any-return]
