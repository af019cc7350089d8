"""The types of the functions that users write, and of the trees that go in and out of them."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from torch import Tensor

TensorTree: TypeAlias = Any
"""Any pytree of tensors: dict, list, tuple, namedtuple, bare tensor, or a class that is registered
with ``@optree.register_pytree_node_class(namespace="hyperfunc")``."""

Leaves: TypeAlias = tuple[Tensor, ...]
"""The tensors of a tree in flattening order; the form in which vectors are handled inside."""


class InnerSolver(Protocol):
    """``(hparams, *args) -> params``: any code that solves the inner problem."""

    def __call__(self, hparams: TensorTree, /, *args: Any) -> TensorTree: ...


class ParamsFunction(Protocol):
    """``(params, hparams, *args) -> tree like params``: fixed-point map or optimality function."""

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> TensorTree: ...


class Loss(Protocol):
    """``(params, hparams, *args) -> scalar tensor``, or ``(scalar, aux)`` for an outer loss."""

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> Any: ...
