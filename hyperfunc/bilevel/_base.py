"""What the loops have in common: states, settings, and what the losses give at a point."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import checks, trees
from hyperfunc._engine.finite_differences import (
    DifferencedLinearization,
    Products,
    check_products,
)
from hyperfunc._engine.flat import split
from hyperfunc._engine.shown import show
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.containers import loadable
from hyperfunc._types import Leaves, Loss, TensorTree
from hyperfunc.optim._base import Schedule

StepSize: TypeAlias = float | Tensor | Callable[[Tensor], Any]
"""A number, a 0-d tensor, a function of the step that returns one, or an `optim.schedule`."""


@loadable
class State(NamedTuple):
    """Where a loop stands: a tree of tensors.

    Attributes:
        step: int64, 0-d: the updates made so far.
        params: the inner variables.
        adjoint: the estimate of ``u``, a tree like params; of `f2sa`, `bome`, `pbgd` and `meha`,
            which have none, the second params.
        hparams: the outer variables.
        memory: what the method remembers, if anything: `saba` what it saw on each batch, `sama` the
            state of its optimiser, a method whose directions are averaged or corrected those
            directions, and where it was.

    Example:
        >>> loop = hf.bilevel.soba(
        ...     lambda w, h: (w - h) ** 2, lambda w, h: (w - 1) ** 2, inner_lr=0.1, outer_lr=0.1
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(2.0))
        >>> state = loop.update(state, (), ())
        >>> state.step, state.params, state.hparams
        (tensor(1), tensor(0.4000), tensor(2.))
    """

    step: Tensor
    params: TensorTree
    adjoint: TensorTree
    hparams: TensorTree
    memory: Any


class Loop(NamedTuple):
    """A stochastic bilevel method as a pair of pure functions.

    Attributes:
        init: ``init(params, hparams) -> State``, with an adjoint of zeros, or second params that
            are the first.
        update: ``update(state, inner_batch, outer_batch) -> State``; `saba` takes the indices of
            the batches too.

    Example:
        >>> loop = hf.bilevel.soba(
        ...     lambda w, h, x: (w - h) ** 2,
        ...     lambda w, h, x: (w - x) ** 2,
        ...     inner_lr=0.2,
        ...     outer_lr=0.1,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     batch = (torch.tensor(2.0),)
        ...     state = loop.update(state, batch, batch)
        >>> state.params, state.hparams
        (tensor(2.0000), tensor(2.0000))
    """

    init: Callable[[TensorTree, TensorTree], State]
    update: Callable[..., State]


@dataclasses.dataclass(frozen=True, repr=False)
class Method(PrintsAsCall):
    """What the loops have in common; a loop adds its own settings and its ``update``."""

    inner_loss: Loss
    outer_loss: Loss
    inner_lr: StepSize
    outer_lr: StepSize
    adjoint_lr: StepSize | None
    products: Products = dataclasses.field(default="reverse", kw_only=True)

    def __post_init__(self) -> None:
        if self.adjoint_lr is None:
            object.__setattr__(self, "adjoint_lr", self.inner_lr)
        check_products(self.products)
        for key in ("inner_loss", "outer_loss"):
            signature = "(params, hparams, *batch) -> scalar"
            checks.check_callable(getattr(self, key), f"{self.name}: {key}", signature)
        for key in ("inner_lr", "outer_lr", "adjoint_lr"):
            rate = getattr(self, key)
            if not callable(rate):
                check_rate(self.name, key, rate)

    def loop(self) -> Loop:
        """The pair of functions that a user gets."""
        method: Any = self
        return Loop(self.init, method.update)

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
        return self._inner_gradient(batch, create_graph=False)(*self.w, *self.h)

    def product(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the Hessian of the inner loss with a vector."""
        return self._linearize(batch, range(len(self.w))).pull(v)

    def cross(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the cross derivative of the inner loss with a vector."""
        n = len(self.w)
        return self._linearize(batch, range(n, n + len(self.h))).pull(v)

    def outer_gradient(self, batch: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
        """The gradient of the outer loss with respect to params and hparams."""
        return self.gradients("outer_loss", batch)

    def gradients(self, key: str, batch: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
        """The gradient of one of the losses with respect to params and hparams."""
        w, h = split(autodiff.gradient(self.loss(key, batch), (*self.w, *self.h)), len(self.w))
        return w, h

    def loss(self, key: str, batch: tuple[Any, ...]) -> Callable[..., Tensor]:
        """A loss on a batch as a function of the leaves of params and hparams."""

        def loss(*leaves: Tensor) -> Tensor:
            w, h = split(leaves, len(self.w))
            params = trees.unflatten(self.params_spec, w)
            hparams = trees.unflatten(self.hparams_spec, h)
            value = getattr(self.method, key)(params, hparams, *batch)
            return checks.check_scalar(value, f"{self.method.name}: {key}")

        return loss

    def terms(self, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> list[Leaves]:
        """The terms of the directions as `Memory` names them, with one pass for both products."""
        check_batch(self.method.name, "inner_batch", inner_batch)
        check_batch(self.method.name, "outer_batch", outer_batch)
        n = len(self.w)
        linearization = self._linearize(inner_batch, range(n + len(self.h)))
        products = split(linearization.pull(self.u), n)
        return [linearization.outputs, *products, *self.outer_gradient(outer_batch)]

    def moved(self, terms: list[Leaves]) -> State:
        """The state after a step along all three directions."""
        return self.stepped(*directions(terms))

    def stepped(self, d_w: Leaves, d_u: Leaves, d_h: Leaves) -> State:
        """The state after a step along each direction."""
        return self.leave(
            trees.axpy(-self.rate("inner_lr"), d_w, self.w),
            trees.axpy(-self.rate("adjoint_lr"), d_u, self.u),
            trees.axpy(-self.rate("outer_lr"), d_h, self.h),
        )

    def rate(self, key: str) -> Any:
        """A step size at this step."""
        rate = getattr(self.method, key)
        if isinstance(rate, Schedule):
            rate = rate(self.state.hparams, self.state.step)
            check_rate(self.method.name, f"{key}(hparams, step)", rate)
        elif callable(rate):
            rate = rate(self.state.step)
            check_rate(self.method.name, f"{key}(step)", rate)
        return rate

    def leave(self, w: Leaves, u: Leaves, h: Leaves) -> State:
        """The next state."""
        return self.state._replace(
            step=self.state.step + 1,
            params=trees.unflatten(self.params_spec, w),
            adjoint=trees.unflatten(self.params_spec, u),
            hparams=trees.unflatten(self.hparams_spec, h),
        )

    def _linearize(self, batch: tuple[Any, ...], group: range) -> autodiff.Linearization:
        if self.method.products == "finite_difference":
            loss, primals = self.loss("inner_loss", batch), (*self.w, *self.h)
            return DifferencedLinearization(loss, primals, len(self.w), (tuple(group),))
        gradient = self._inner_gradient(batch, create_graph=True)
        return autodiff.Linearization(gradient, (*self.w, *self.h), (tuple(group),))

    def _inner_gradient(self, batch: tuple[Any, ...], create_graph: bool) -> Callable[..., Leaves]:
        n, loss = len(self.w), self.loss("inner_loss", batch)

        def gradient(*leaves: Tensor) -> Leaves:
            w, h = split(leaves, n)
            return autodiff.gradient(lambda *w: loss(*w, *h), w, create_graph=create_graph)

        return gradient


def directions(terms: list[Leaves]) -> tuple[Leaves, Leaves, Leaves]:
    """The directions of params, adjoint and hparams from `Point.terms`."""
    inner_gradient, product, cross, outer_params, outer_hparams = terms
    return inner_gradient, trees.sub(product, outer_params), trees.sub(outer_hparams, cross)


@dataclasses.dataclass(frozen=True, repr=False)
class TwoLoops(Method, abc.ABC):
    """Steps on the params, a solve for the adjoint, and one step on the hparams."""

    num_inner_steps: int
    num_adjoint_steps: int

    least_adjoint_steps: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("num_inner_steps", 1), ("num_adjoint_steps", self.least_adjoint_steps)):
            checks.check_count(self.name, key, getattr(self, key), least)

    @abc.abstractmethod
    def solve(self, point: Point, batches: list[tuple[Any, ...]], b: Leaves, lr: Any) -> Leaves:
        """The adjoint: an approximate solution of ``Hessian u = b``, a product a batch."""

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        T, Q = self.num_inner_steps, self.num_adjoint_steps
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        batches = unbind(self.name, inner_batches, T + Q + 1)
        inner_lr = point.rate("inner_lr")
        for batch in batches[:T]:
            w = trees.axpy(-inner_lr, point.gradient(batch), point.w)
            point = dataclasses.replace(point, w=w)
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        u = self.solve(point, batches[T : T + Q], outer_params, point.rate("adjoint_lr"))
        d_h = trees.sub(outer_hparams, point.cross(u, batches[-1]))
        h = trees.axpy(-point.rate("outer_lr"), d_h, point.h)
        return point.leave(point.w, u, h)


def check_batch(name: str, key: str, batch: Any) -> None:
    if not isinstance(batch, tuple):
        loss = "outer_loss" if key == "outer_batch" else "inner_loss"
        raise TypeError(
            f"{name}: {key} is of type {type(batch).__name__}; expected the tuple of arguments "
            f"that follow (params, hparams) in {loss}. Write (X, y), (X,) for one, () for none"
        )


def unbind(
    name: str,
    batches: Any,
    length: int,
    formula: str = "num_inner_steps + num_adjoint_steps + 1",
) -> list[tuple[Any, ...]]:
    """One batch for each index of the leading dimension, which ``formula`` is the size of."""
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
                f"size {formula} = {length}, one batch for each"
            )
    if not leaves:
        return [batches] * length
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return [trees.unflatten(spec, row) for row in rows]


def check_rate(name: str, key: str, rate: Any) -> None:
    if isinstance(rate, Tensor):
        if rate.ndim or not rate.is_floating_point():
            raise TypeError(
                f"{name}: {key} is a tensor of shape {tuple(rate.shape)} and dtype {rate.dtype}; "
                f"expected a 0-d floating-point tensor"
            )
    elif checks.is_number(rate):
        checks.check_number(name, key, rate)
    else:
        raise TypeError(
            f"{name}: {key} is {show(rate)} of type {type(rate).__name__}; expected a number or a "
            f"function of the step that returns one"
        )
