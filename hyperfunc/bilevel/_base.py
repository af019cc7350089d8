"""What the loops have in common: states, settings, and what the losses give at a point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_number, check_scalar, is_number
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch import autodiff, tracking
from hyperfunc._types import Leaves, Loss, TensorTree

StepSize: TypeAlias = float | Tensor | Callable[[Tensor], Any]
"""A number, a 0-d tensor, or a function of the step that returns one of them."""


class State(NamedTuple):
    """Where a loop stands: a tree of tensors.

    Attributes:
        step: int64, 0-d: the updates made so far.
        params: the inner variables.
        adjoint: the estimate of ``u``, a tree like params.
        hparams: the outer variables.
        memory: what `saba` remembers of each batch, else ``()``.
    """

    step: Tensor
    params: TensorTree
    adjoint: TensorTree
    hparams: TensorTree
    memory: Any


class Loop(NamedTuple):
    """A stochastic bilevel method as a pair of pure functions.

    Attributes:
        init: ``init(params, hparams) -> State``, with an adjoint of zeros.
        update: ``update(state, inner_batch, outer_batch) -> State``; `saba` takes the indices of
            the batches too.
    """

    init: Callable[[TensorTree, TensorTree], State]
    update: Callable[..., State]


class Terms(NamedTuple):
    """The five terms of the directions."""

    inner_gradient: Leaves
    product: Leaves
    cross: Leaves
    outer_params: Leaves
    outer_hparams: Leaves


@dataclasses.dataclass(frozen=True, repr=False)
class Method(PrintsAsCall):
    """What the loops have in common; a loop adds its own settings and its ``update``."""

    inner_loss: Loss
    outer_loss: Loss
    inner_lr: StepSize
    outer_lr: StepSize
    adjoint_lr: StepSize | None

    def __post_init__(self) -> None:
        if self.adjoint_lr is None:
            object.__setattr__(self, "adjoint_lr", self.inner_lr)
        for key in ("inner_loss", "outer_loss"):
            signature = "(params, hparams, *batch) -> scalar"
            check_callable(getattr(self, key), f"{self.name}: {key}", signature)
        for key in ("inner_lr", "outer_lr", "adjoint_lr"):
            rate = getattr(self, key)
            if not callable(rate):
                check_rate(self.name, key, rate)

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        """The start, cut from any graph: a loop is nothing to differentiate through."""
        w, params_spec = trees.flatten_floating(params, "params")
        h, hparams_spec = trees.flatten_floating(hparams, "hparams")
        # copies, as a module whose parameters these are may go on to change them in place
        w, h = (tuple(leaf.clone() for leaf in tracking.detach(leaves)) for leaves in (w, h))
        return State(
            step=torch.zeros((), dtype=torch.int64),
            params=trees.unflatten(params_spec, w),
            adjoint=trees.unflatten(params_spec, trees.zeros_like(w)),
            hparams=trees.unflatten(hparams_spec, h),
            memory=(),
        )

    def enter(self, state: Any) -> Point:
        """The state in flat form."""
        if not isinstance(state, State):
            raise TypeError(
                f"{self.name}: state is of type {type(state).__name__}; expected a State. Write "
                f"state = loop.init(params, hparams), then state = loop.update(state, ...)"
            )
        w, params_spec = trees.flatten_floating(state.params, "state.params")
        u, adjoint_spec = trees.flatten(state.adjoint)
        trees.check_like(u, adjoint_spec, w, params_spec, "state.adjoint", "params")
        h, hparams_spec = trees.flatten_floating(state.hparams, "state.hparams")
        return Point(self, state, w, tuple(u), h, params_spec, hparams_spec)


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """The variables of a state as leaves, and what the losses give there."""

    method: Method
    state: State
    w: Leaves
    u: Leaves
    h: Leaves
    params_spec: trees.TreeSpec
    hparams_spec: trees.TreeSpec

    def gradient(self, batch: tuple[Any, ...]) -> Leaves:
        """The gradient of the inner loss with respect to params."""
        return self._inner_gradient(batch, self.w, self.h, create_graph=False)

    def product(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the Hessian of the inner loss with a vector."""
        return self._linearize(batch, range(len(self.w))).pull(v)

    def cross(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the cross derivative of the inner loss with a vector."""
        n = len(self.w)
        return self._linearize(batch, range(n, n + len(self.h))).pull(v)

    def outer_gradient(self, batch: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
        """The gradient of the outer loss with respect to params and hparams."""
        n = len(self.w)

        def loss(*leaves: Tensor) -> Tensor:
            return self._loss("outer_loss", leaves[:n], leaves[n:], batch)

        gradient = autodiff.gradient(loss, (*self.w, *self.h))
        return gradient[:n], gradient[n:]

    def terms(self, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> Terms:
        """All terms of the directions, with one pass back for both products."""
        n = len(self.w)
        linearization = self._linearize(inner_batch, range(n + len(self.h)))
        products = linearization.pull(self.u)
        outer_params, outer_hparams = self.outer_gradient(outer_batch)
        return Terms(linearization.outputs, products[:n], products[n:], outer_params, outer_hparams)

    def moved(self, terms: Terms) -> State:
        """The state after a step along all three directions."""
        d_u = trees.sub(terms.product, terms.outer_params)
        d_h = trees.sub(terms.outer_hparams, terms.cross)
        return self.leave(
            trees.axpy(-self.rate("inner_lr"), terms.inner_gradient, self.w),
            trees.axpy(-self.rate("adjoint_lr"), d_u, self.u),
            trees.axpy(-self.rate("outer_lr"), d_h, self.h),
        )

    def rate(self, key: str) -> Any:
        """A step size at this step."""
        rate = getattr(self.method, key)
        if not callable(rate):
            return rate
        value = rate(self.state.step)
        check_rate(self.method.name, f"{key}(step)", value)
        return value

    def leave(self, w: Leaves, u: Leaves, h: Leaves) -> State:
        """The next state."""
        return State(
            step=self.state.step + 1,
            params=trees.unflatten(self.params_spec, w),
            adjoint=trees.unflatten(self.params_spec, u),
            hparams=trees.unflatten(self.hparams_spec, h),
            memory=self.state.memory,
        )

    def _linearize(self, batch: tuple[Any, ...], group: range) -> autodiff.Linearization:
        n = len(self.w)
        return autodiff.Linearization(
            lambda *leaves: self._inner_gradient(batch, leaves[:n], leaves[n:], create_graph=True),
            (*self.w, *self.h),
            (tuple(group),),
        )

    def _inner_gradient(
        self, batch: tuple[Any, ...], w: Leaves, h: Leaves, create_graph: bool
    ) -> Leaves:
        def loss(*leaves: Tensor) -> Tensor:
            return self._loss("inner_loss", leaves, h, batch)

        return autodiff.gradient(loss, w, create_graph=create_graph)

    def _loss(self, key: str, w: Leaves, h: Leaves, batch: tuple[Any, ...]) -> Tensor:
        value = getattr(self.method, key)(
            trees.unflatten(self.params_spec, w), trees.unflatten(self.hparams_spec, h), *batch
        )
        return check_scalar(value, f"{self.method.name}: {key}")


def unbind(name: str, batches: Any, length: int) -> list[tuple[Any, ...]]:
    check_batch(name, "inner_batches", batches)
    leaves, spec = trees.flatten(batches)
    for path, leaf in zip(trees.paths(spec, "inner_batches"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: {path} is of type {type(leaf).__name__}; expected a tensor with a "
                f"leading dimension of size {length}"
            )
        if leaf.ndim == 0 or leaf.shape[0] != length:
            raise ValueError(
                f"{name}: {path} has shape {tuple(leaf.shape)}; expected a leading dimension of "
                f"size num_inner_steps + num_adjoint_steps + 1 = {length}, one batch for each"
            )
    if not leaves:
        return [batches] * length
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return [trees.unflatten(spec, row) for row in rows]


def check_batch(name: str, key: str, batch: Any) -> None:
    if not isinstance(batch, tuple):
        loss = "outer_loss" if key == "outer_batch" else "inner_loss"
        raise TypeError(
            f"{name}: {key} is of type {type(batch).__name__}; expected the tuple of arguments "
            f"that follow (params, hparams) in {loss}. Write (X, y), (X,) for one, () for none"
        )


def check_rate(name: str, key: str, rate: Any) -> None:
    if isinstance(rate, Tensor):
        if rate.ndim or not rate.is_floating_point():
            raise TypeError(
                f"{name}: {key} is a tensor of shape {tuple(rate.shape)} and dtype {rate.dtype}; "
                f"expected a 0-d floating-point tensor"
            )
        return
    if not is_number(rate):
        raise TypeError(
            f"{name}: {key} is {rate!r} of type {type(rate).__name__}; expected a number or a "
            f"function of the step that returns one"
        )
    check_number(name, key, rate)
