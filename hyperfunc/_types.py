"""The types of the functions that users write, and of the trees that go in and out of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

H_contra = TypeVar("H_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

TensorTree: TypeAlias = Any
"""Any pytree of tensors: dict, list, tuple, namedtuple, TensorDict, bare tensor, or a class that is
registered with ``@optree.register_pytree_node_class(namespace="hyperfunc")``."""

Leaves: TypeAlias = tuple[Tensor, ...]
"""The tensors of a tree in flattening order; the form in which vectors are handled inside."""


class InnerSolver(Protocol):
    """``(hparams, *args) -> params``: any code that solves the inner problem."""

    def __call__(self, hparams: Any, /, *args: Any, **keywords: Any) -> TensorTree: ...


class ParamsFunction(Protocol):
    """``(params, hparams, *args) -> tree like params``: fixed-point map or optimality function."""

    def __call__(self, params: Any, hparams: Any, /, *args: Any, **keywords: Any) -> TensorTree: ...


class Loss(Protocol):
    """``(params, hparams, *args) -> scalar tensor``, or ``(scalar, aux)`` for an outer loss."""

    def __call__(self, params: Any, hparams: Any, /, *args: Any, **keywords: Any) -> Any: ...


class HypergradFunction(Protocol[H_contra, R_co]):
    """What the transforms return: ``(hparams, *args, adjoint_init=None)`` to their result."""

    __wrapped__: Callable[..., Any]

    def __call__(
        self, hparams: H_contra, /, *args: Any, adjoint_init: TensorTree = None
    ) -> R_co: ...


class ConditionOptions(TypedDict, total=False):
    """The keywords that say what an inner solution satisfies, and the method."""

    fixed_point: ParamsFunction | None
    inner_loss: Loss | None
    optimality: ParamsFunction | None
    method: Any


class RuleOptions(ConditionOptions, total=False):
    """The keywords that say how an inner solver is differentiated."""

    throw: bool


class ImplicitDiffOptions(ConditionOptions, total=False):
    """The keywords of `implicit_diff`."""

    has_aux: bool
    throw: bool | None
    products: Literal["reverse", "finite_difference"]
    on_backward: Callable[[Any], object] | None


class HypergradOptions(RuleOptions, total=False):
    """The keywords of `hypergrad` that say how it is computed."""

    solver_has_aux: bool
    products: Literal["reverse", "finite_difference"]
    compile: bool | str | Mapping[str, Any]
