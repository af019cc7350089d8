"""What an inner solver returns beside its params: data that no derivative flows through."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.wrapped_functions import Wrapped
from hyperfunc._torch import tracking

UNTOLD = (
    ". If the inner solver returns (params, aux), pass has_aux=True to implicit_diff, or "
    "solver_has_aux=True to hypergrad and its kin"
)


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """Params, and aux with its numbers as tensors, all of them detached; ``()`` without aux."""
    if not has_aux:
        return result, ()
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"the inner solver returned {type(result).__name__}; expected a tuple (params, aux), "
            f"since has_aux=True (of hypergrad and its kin: solver_has_aux=True)"
        )
    params, aux = result
    leaves, spec = trees.flatten(aux)
    leaves = list(tracking.detach(list(map(_as_tensor, leaves))))
    trees.refuse_holders(leaves, spec, "aux")
    return params, trees.unflatten(spec, leaves)


class WithAux(Wrapped):
    """An inner solver that is known to return ``(params, aux)``."""

    has_aux = True

    def __call__(self, hparams: Any, /, *args: Any) -> Any:
        return self.__wrapped__(hparams, *args)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)


def without_aux(inner_solver: Any, has_aux: bool) -> Any:
    """An inner solver that returns the params alone."""
    if not (has_aux or getattr(inner_solver, "has_aux", False)):
        return inner_solver
    if dataclasses.is_dataclass(inner_solver) and hasattr(inner_solver, "has_aux"):
        return dataclasses.replace(inner_solver, has_aux=False)  # type: ignore[type-var]
    return lambda hparams, *args: inner_solver(hparams, *args)[0]


def _as_tensor(leaf: Any) -> Any:
    """A number as a tensor, since a batch has one for each task."""
    if isinstance(leaf, bool | int):
        return torch.tensor(leaf)
    if isinstance(leaf, numbers.Integral):  # of NumPy
        return torch.tensor(int(leaf))
    if isinstance(leaf, numbers.Real):
        return torch.tensor(float(leaf), dtype=torch.float64)
    return leaf
