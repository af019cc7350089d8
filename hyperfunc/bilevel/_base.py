"""What the loops have in common: states, settings, and what the losses give at a point."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeAlias,
    TypedDict,
    TypeVar,
)

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
from hyperfunc._engine.user_functions import call
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch import autodiff, tracking
from hyperfunc._torch.containers import loadable
from hyperfunc._types import Leaves, Loss, TensorTree
from hyperfunc.bilevel._unseen import tell_of_decays, tell_of_learned
from hyperfunc.optim._base import Optimizer, Schedule, check_optimizer, skips_unused

StepSize: TypeAlias = float | Tensor | Callable[[Tensor], Any]
"""A number, a 0-d tensor, a function of the step that returns one, or an `optim.schedule`."""

Variable: TypeAlias = Literal["inner", "adjoint", "outer"]
"""What a loop steps on, as its settings call it: params, adjoint (or second params), hparams."""

_PLACES = {"inner": ("w", "params"), "adjoint": ("u", "adjoint"), "outer": ("h", "hparams")}
_CURVATURE = "Stay below 2 / the largest curvature of the inner loss, eig_max of hf.diagnose"
_SIZES = {"inner": _CURVATURE, "adjoint": _CURVATURE, "outer": "Raise it as long as the loss falls"}
BOTH = ("inner_loss", "outer_loss")

Function = TypeVar("Function", bound=Callable[..., Any])


class Steps(TypedDict, total=False):
    """What params and hparams are stepped on with: of each pair, one."""

    inner_lr: StepSize | None
    inner_optimizer: Optimizer | None
    outer_lr: StepSize | None
    outer_optimizer: Optimizer | None


class AdjointSteps(Steps, total=False):
    """The same, and what the adjoint is stepped on with."""

    adjoint_lr: StepSize | None
    adjoint_optimizer: Optimizer | None


def taking(steps: Any) -> Callable[[Function], Function]:
    """Show in a function's signature, as ``help`` does, what ``**steps`` stands for."""

    def shown(function: Any) -> Any:
        signature = inspect.signature(function)
        named = list(signature.parameters.values())[:-1]
        options = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for key, kind in steps.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=[*named, *options])
        return function

    return shown


@loadable
class State(NamedTuple):
    """Where a loop stands: a tree of tensors.

    Attributes:
        step: int64, 0-d: the updates made so far.
        params: the inner variables.
        adjoint: the estimate of ``u``, a tree like params; of `f2sa`, `bome`, `pbgd` and `meha`,
            which have none, the second params.
        hparams: the outer variables.
        memory: what the method remembers, if anything: `saba` what it saw on each batch, a method
            whose directions are averaged or corrected those directions, and where it was.
        optimizers: the states of the optimisers, under ``"inner"``, ``"adjoint"`` and ``"outer"``;
            nothing for a step size, nor for second params that begin anew in every update.

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
    optimizers: Mapping[str, Any] = {}


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
    steps: Mapping[str, Any]  # what the user gave, then one for each `Variable`
    products: Products = dataclasses.field(default="reverse", kw_only=True)

    # what the adjoint is: the last of steps, a series, second params that are carried on or begin
    # anew as the params in every update, or nothing
    adjoint: ClassVar[Literal["steps", "series", "params", "restarted", ""]] = "steps"
    shares: ClassVar[bool] = True  # whether its step size is by default that of the params
    first_order: ClassVar[bool] = False  # whether first derivatives of the losses suffice
    follows: ClassVar[str] = ""  # whose steps the direction of hparams is that of
    unseen: ClassVar[str] = (
        "but the direction of hparams is that of the minimum of inner_loss, whatever the steps to "
        "it. To learn it, take hf.bilevel.truncated or sama, or hf.minimize in hf.hypergrad with "
        "method='reverse'"
    )

    def __post_init__(self) -> None:
        check_products(self.products)
        for key in BOTH:
            signature = "(params, hparams, *batch) -> scalar"
            checks.check_callable(getattr(self, key), f"{self.name}: {key}", signature)
        object.__setattr__(self, "steps", _resolved(self))

    def loop(self) -> Loop:
        """The pair of functions that a user gets."""
        method: Any = self
        return Loop(self.init, method.update)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers whose states are carried from update to update."""
        return {
            key: rule
            for key, rule in self.steps.items()
            if isinstance(rule, Optimizer) and (key, self.adjoint) != ("adjoint", "restarted")
        }

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        """The start, cut from any graph: a loop is nothing to differentiate through."""
        w, params_spec = trees.flatten_floating(params, "params")
        h, hparams_spec = trees.flatten_floating(hparams, "hparams")
        # copies, as a module whose parameters these are may go on to change them in place
        w, h = (tuple(leaf.clone() for leaf in tracking.detach(leaves)) for leaves in (w, h))
        second = self.adjoint in ("params", "restarted")
        u = tuple(leaf.clone() for leaf in w) if second else trees.zeros_like(w)
        state = State(
            step=torch.zeros((), dtype=torch.int64),
            params=trees.unflatten(params_spec, w),
            adjoint=trees.unflatten(params_spec, u),
            hparams=trees.unflatten(hparams_spec, h),
            memory=(),
        )
        tell_of_decays(self, params_spec, hparams)
        state = state._replace(
            optimizers={
                key: rule.init(getattr(state, _PLACES[key][1]))
                for key, rule in self.optimizers.items()
            }
        )
        tell_of_learned(self, self.enter(state))
        return state

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
        got, expected = sorted(state.optimizers), sorted(self.optimizers)
        if got != expected:
            raise ValueError(
                f"{self.name}: state.optimizers has those of {got}; expected those of {expected}. "
                f"Make the state with the init of this loop, or give it those that it makes: "
                f"state._replace(optimizers=loop.init(state.params, state.hparams).optimizers)"
            )
        return Point(self, state, w, tuple(u), h, params_spec, hparams_spec, state.optimizers)


class TakesOwnGradient(abc.ABC):
    """A loss with a way of its own to its gradient."""

    @abc.abstractmethod
    def gradient_used(
        self, point: Point, key: str, batch: tuple[Any, ...], chosen: slice
    ) -> tuple[Tensor | None, ...]:
        """That by some of the params and hparams, None for those that it does not use."""


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
    optimizers: Mapping[str, Any]
    # for each loss, which params it was seen to use in this update; shared by all its points
    used: dict[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    def at(self, h: Leaves) -> Point:
        """The point with other hparams, which its steps see as well."""
        hparams = trees.unflatten(self.hparams_spec, h)
        return dataclasses.replace(self, h=h, state=self.state._replace(hparams=hparams))

    def gradient(self, batch: tuple[Any, ...]) -> Leaves:
        """The gradient of the inner loss with respect to params."""
        return self.gradients("inner_loss", batch, by="w")[0]

    def product(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the Hessian of the inner loss with a vector."""
        return self.linearize(batch, range(len(self.w))).pull(v)

    def cross(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the cross derivative of the inner loss with a vector."""
        n = len(self.w)
        return self.linearize(batch, range(n, n + len(self.h))).pull(v)

    def outer_gradient(self, batch: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
        """The gradient of the outer loss with respect to params and hparams."""
        return self.gradients("outer_loss", batch)

    def gradients(
        self, key: str, batch: tuple[Any, ...], by: Literal["wh", "w", "h"] = "wh"
    ) -> tuple[Leaves, Leaves]:
        """The gradient of a loss with respect to params and hparams, or one of them and nothing."""
        n, loss = len(self.w), getattr(self.method, key)
        primals = (*self.w, *self.h)
        chosen = slice(0 if "w" in by else n, None if "h" in by else n)
        if isinstance(loss, TakesOwnGradient):
            found = loss.gradient_used(self, key, batch, chosen)
        else:
            value, before, after = self.loss(key, batch), primals[: chosen.start], self.h
            after = () if "h" in by else after
            found = autodiff.gradient_used(
                lambda *leaves: value(*before, *leaves, *after),
                primals[chosen],
                create_graph=False,
                used=self._looked_for(),
            )
        if "w" in by:
            self._note(key, [grad is not None for grad in found])
        w, h = split(autodiff.zeros_for_none(found, primals[chosen]), n if "w" in by else 0)
        return w, h

    def loss(self, key: str, batch: tuple[Any, ...]) -> Callable[..., Tensor]:
        """A loss on a batch as a function of the leaves of params and hparams."""

        def loss(*leaves: Tensor) -> Tensor:
            w, h = split(leaves, len(self.w))
            params = trees.unflatten(self.params_spec, w)
            hparams = trees.unflatten(self.hparams_spec, h)
            role = f"{self.method.name}: {key}(params, hparams, *batch)"
            value = call(role, getattr(self.method, key), params, hparams, *batch)
            return checks.check_scalar(value, f"{self.method.name}: {key}")

        return loss

    def terms(self, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> list[Leaves]:
        """The terms of the directions as `Memory` names them, with one pass for both products."""
        check_batch(self.method.name, "inner_batch", inner_batch)
        check_batch(self.method.name, "outer_batch", outer_batch)
        n = len(self.w)
        linearization = self.linearize(inner_batch, range(n + len(self.h)))
        products = split(linearization.pull(self.u), n)
        return [linearization.outputs, *products, *self.outer_gradient(outer_batch)]

    def step(
        self,
        key: Variable,
        direction: Leaves,
        of: tuple[str, ...] | None = None,
        on: str | None = None,
    ) -> Point:
        """The point after a step on one variable, along a direction of descent.

        ``of`` are the losses that the direction is taken from: an optimiser leaves params that none
        of them uses as they are. ``on`` is where second params stand that are handled as params.
        """
        rule, place = self.method.steps[key], on or _PLACES[key][0]
        leaves: Leaves = getattr(self, place)
        changes: dict[str, Any] = {}
        if not isinstance(rule, Optimizer):
            rate = self.value(f"{key}_lr", rule)
            changes[place] = trees.axpy(-rate, direction, leaves)
            return dataclasses.replace(self, **changes)
        spec = self.hparams_spec if place == "h" else self.params_spec
        grads: list[Tensor | None] = list(direction)
        if place == "w" and skips_unused(rule.update):
            of = ("inner_loss",) if of is None else of
            used = [any(each) for each in zip(*(self.used[loss] for loss in of), strict=True)]
            grads = [grad if is_used else None for grad, is_used in zip(grads, used, strict=True)]
        tree = trees.unflatten(spec, leaves)
        # second params that begin anew have no state yet
        state = self.optimizers[key] if key in self.optimizers else rule.init(tree)
        grads_tree, hparams = trees.unflatten(spec, grads), self.state.hparams
        new_tree, state = rule.update(grads_tree, state, tree, hparams)
        new, new_spec = trees.flatten(new_tree)
        what = f"{self.method.name}: the result of {key}_optimizer"
        trees.check_like(new, new_spec, leaves, spec, what, _PLACES[key][1])
        changes |= {place: tuple(new), "optimizers": {**self.optimizers, key: state}}
        return dataclasses.replace(self, **changes)

    def stepped(self, d_w: Leaves, d_u: Leaves, d_h: Leaves) -> Point:
        """The point after a step along each direction."""
        return self.step("inner", d_w).step("adjoint", d_u).step("outer", d_h)

    def rate(self, key: str) -> Any:
        """A setting that may depend on the step, at this step."""
        return self.value(key, getattr(self.method, key))

    def value(self, key: str, rate: Any) -> Any:
        """A step size at this step."""
        if isinstance(rate, Schedule):
            rate = rate(self.state.hparams, self.state.step)
            check_rate(self.method.name, f"{key}(hparams, step)", rate)
        elif callable(rate):
            rate = rate(self.state.step)
            check_rate(self.method.name, f"{key}(step)", rate)
        return rate

    def leave(self) -> State:
        """The next state."""
        return self.state._replace(
            step=self.state.step + 1,
            params=trees.unflatten(self.params_spec, self.w),
            adjoint=trees.unflatten(self.params_spec, self.u),
            hparams=trees.unflatten(self.hparams_spec, self.h),
            optimizers={key: self.optimizers[key] for key in self.state.optimizers},
        )

    def linearize(self, batch: tuple[Any, ...], group: range) -> autodiff.Linearization:
        n, loss = len(self.w), self.loss("inner_loss", batch)
        primals = (*self.w, *self.h)
        if self.method.products == "finite_difference":
            linearization = DifferencedLinearization(loss, primals, n, (tuple(group),))
            self._note("inner_loss", linearization.used_params)
            return linearization

        def gradient(*leaves: Tensor) -> Leaves:
            w, h = split(leaves, n)
            found = autodiff.gradient_used(
                lambda *w: loss(*w, *h), w, create_graph=True, used=self._looked_for()
            )
            self._note("inner_loss", [grad is not None for grad in found])
            return autodiff.zeros_for_none(found, w)

        return autodiff.Linearization(gradient, primals, (tuple(group),))

    def _looked_for(self) -> list[bool] | None:
        """Where the leaves that a loss uses are to be looked for under transforms too."""
        return (
            [] if any(isinstance(rule, Optimizer) for rule in self.method.steps.values()) else None
        )

    def _note(self, key: str, used: Sequence[bool]) -> None:
        n = len(self.w)
        before = self.used.get(key, (False,) * n)
        self.used[key] = tuple(a or b for a, b in zip(before, used[:n], strict=True))


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
    def solve(self, point: Point, batches: list[tuple[Any, ...]], b: Leaves) -> Point:
        """The point with the adjoint that nearly solves ``Hessian u = b``, a product a batch."""

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        T, Q = self.num_inner_steps, self.num_adjoint_steps
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        batches = unbind(self.name, inner_batches, T + Q + 1)
        for batch in batches[:T]:
            point = point.step("inner", point.gradient(batch))
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        point = self.solve(point, batches[T : T + Q], outer_params)
        d_h = trees.sub(outer_hparams, point.cross(point.u, batches[-1]))
        return point.step("outer", d_h).leave()


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
        variable, _, kind = key.partition("_")
        by_name = f". An optimizer goes to {variable}_optimizer" if kind == "lr" else ""
        raise TypeError(
            f"{name}: {key} is {show(rate)} of type {type(rate).__name__}; expected a number or a "
            f"function of the step that returns one{by_name}"
        )


def _resolved(method: Method) -> dict[str, Any]:
    """The step size or the optimiser for each variable."""
    name, given, adjoint = method.name, method.steps, method.adjoint
    for key in given:
        if key not in AdjointSteps.__annotations__:
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
    rules: dict[str, Any] = {}
    for variable in _PLACES:
        for key in (f"{variable}_lr", f"{variable}_optimizer"):
            rule = given.get(key)
            if rule is None:
                continue
            if variable in rules:
                raise TypeError(
                    f"{name}: got {variable}_lr and {key}; expected one of them, as an optimizer "
                    f"has a step size of its own"
                )
            if key.endswith("optimizer"):
                check_optimizer(rule, f"{name}: {key}")
            elif not callable(rule):
                check_rate(name, key, rule)
            rules[variable] = rule
    if adjoint == "" and "adjoint" in rules:
        raise TypeError(
            f"{name}: got a step for the adjoint, but takes none; leave out adjoint_lr and "
            f"adjoint_optimizer"
        )
    if adjoint == "series" and isinstance(rules.get("adjoint"), Optimizer):
        raise TypeError(
            f"{name}: got adjoint_optimizer, but its adjoint is a Neumann series, no sequence of "
            f"steps; expected adjoint_lr, the step size in the series"
        )
    lent = method.shares and not isinstance(rules.get("inner"), Optimizer)
    if adjoint and lent and "adjoint" not in rules:
        rules["adjoint"] = rules.get("inner")
    missing = [key for key in _PLACES if rules.get(key) is None and (adjoint or key != "adjoint")]
    if missing:
        key, what, size = missing[0], _PLACES[missing[0]][1], _SIZES[missing[0]]
        if key == "adjoint" and adjoint in ("params", "restarted"):
            what, size = "adjoint, here second params,", "What steps on the params will do"
        also = (
            ""
            if (key, adjoint) == ("adjoint", "series")
            else (f", or {key}_optimizer=hf.optim.adam(1e-3)")
        )
        raise TypeError(
            f"{name}: no step for the {what} was given; expected {key}_lr=, a step size{also}. "
            f"{size}"
        )
    return rules
