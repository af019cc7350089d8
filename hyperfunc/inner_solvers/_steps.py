"""Steps of inner solvers, and steps on flat states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hyperfunc import optim
from hyperfunc._engine import trees
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.flat import split
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import tracking
from hyperfunc._torch.containers import loadable
from hyperfunc._types import InnerSolver, Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.inner_solvers._gradients import InnerGradient
from hyperfunc.inner_solvers._proximal import ProximalLoss
from hyperfunc.optim._base import Gradients, skips_unused
from hyperfunc.optim._leafwise import Leafwise
from hyperfunc.optim._rules import SGD

FlatStep = Callable[[Leaves, Leaves, tuple[Any, ...]], tuple[Leaves, Leaves]]
"""``(params, memory, further arguments) -> (next params, next memory)``, all of them leaves."""


Specs = tuple[trees.TreeSpec, trees.TreeSpec]
"""The structures of the params and of the memory."""


class Step(Protocol):
    """One step of an inner solver, with what it remembers from one step to the next."""

    def remember(self, params: TensorTree, hparams: Any, args: tuple[Any, ...], /) -> TensorTree:
        """The memory before the first step."""

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        """The step at given arguments, for params and memory of given structures."""


@loadable
class SolverAux(NamedTuple):
    """What a solver made by `minimize` with ``has_aux`` returns beside its params.

    Attributes:
        state: the optimiser's state after the last step, where the next window of steps goes on.
        num_steps: int64, the steps that were taken; fewer than asked for after an early stop.
        losses: with ``trace``, the inner loss before each step, of shape ``(num_steps,)`` as asked
            for, and NaN for steps that were not taken; else ``()``.
        grad_norms: the Euclidean norms of its gradients, likewise.

    Example:
        >>> solver = hf.minimize(
        ...     lambda w, h: (w - h) ** 2,
        ...     hf.optim.sgd(lr=0.25),
        ...     num_steps=3,
        ...     init=lambda h: torch.zeros_like(h),
        ...     has_aux=True,
        ...     trace=True,
        ... )
        >>> params, aux = solver(torch.tensor(1.0))
        >>> params, aux.num_steps, aux.losses
        (tensor(0.8750), tensor(3), tensor([1.0000, 0.2500, 0.0625]))
    """

    state: Any
    num_steps: Any
    losses: Any
    grad_norms: Any


@dataclass(frozen=True, eq=False)
class MapStep:
    fixed_point: ParamsFunction

    def remember(self, params: TensorTree, hparams: Any, args: tuple[Any, ...], /) -> TensorTree:
        return ()

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        role = "step(params, hparams, *args)"

        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            at = trees.unflatten(specs[0], leaves), hparams, *args, *extra
            params = call(role, self.fixed_point, *at)
            return _checked(params, leaves, specs[0], "the step's result", "params"), memory

        return step


@dataclass(frozen=True, eq=False)
class DescentStep:
    inner_loss: Loss
    optimizer: optim.Optimizer
    first_order: bool = False  # whether gradients are constants
    init_state: InnerSolver | None = None
    has_aux: bool = False  # the memory is then a `SolverAux`, else the state alone
    num_traced: int | None = None  # steps whose losses and gradient norms are kept
    products: Products = "reverse"

    def remember(self, params: TensorTree, hparams: Any, args: tuple[Any, ...], /) -> TensorTree:
        w, _, spec = trees.flatten_state(params, "params")
        state = self.optimizer.init(trees.unflatten(spec.spec, w))
        if self.init_state is not None:
            like, like_spec = trees.flatten(state)
            state = call("init_state(hparams, *args)", self.init_state, hparams, *args)
            leaves, state_spec = trees.flatten(state)
            name = "the state that init_state returned"
            trees.check_like(leaves, state_spec, tuple(like), like_spec, name, "optimizer.init")
        if not self.has_aux:
            return state
        traces: list[Any] = [(), ()]
        if self.num_traced is not None:
            shape, dtype = (self.num_traced,), trees.accumulation_dtype(w)
            traces = [torch.full(shape, torch.nan, dtype=dtype, device=w[0].device)] * 2
        num_steps = torch.zeros((), dtype=torch.int64, device=w[0].device)
        return SolverAux(state, num_steps, *traces)

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        loss, optimizer = self.inner_loss, self.optimizer.update
        state = trees.StateSpec.of(specs[0], like)
        spec, (like, _) = state.spec, state.split(like)
        memory_spec = specs[1].child(0) if self.has_aux else specs[1]
        update = self._update((spec, memory_spec), like, hparams)
        traced = self.num_traced is not None
        regulariser, rate = None, None
        operands, structure = trees.flatten((hparams, args))
        trees.refuse_holders(operands, structure, "(hparams, args)")
        if self.first_order:
            operands = list(tracking.detach(operands))
            hparams, args = trees.unflatten(structure, operands)
        if isinstance(loss, ProximalLoss) and not traced:
            regulariser, loss = loss.at(hparams, like, spec), loss.loss
            counted = self.has_aux or isinstance(regulariser.weight, Tensor)
            if isinstance(optimizer, SGD) and not counted:
                rate = optimizer.plain_rate(like, hparams)
        tracked = tracking.is_tracked(operands)
        skips = regulariser is None and skips_unused(optimizer)
        used: list[bool] | None = [] if skips else None

        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            w, others = state.split(leaves) if state.num_others else (leaves, ())
            seen: list[Any] | None = [] if traced else None
            kept, notes = split(memory, memory_spec.num_leaves)
            w, kept = descend(w, others, kept, extra, seen)
            memory = (*kept, *_noted(notes, seen)) if notes else kept
            return (state.merge(w, others) if state.num_others else w), memory

        def descend(
            leaves: Leaves,
            others: Leaves,
            memory: Leaves,
            extra: tuple[Any, ...],
            seen: list[Any] | None,
        ) -> tuple[Leaves, Leaves]:
            at = leaves
            if self.first_order:
                at, extra = tracking.detach(leaves), trees.tree_map(_detach, extra)
            row = trees.flatten(extra)[0] if extra else ()
            recorded = tracked or tracking.is_tracked((*at, *row))
            row_args = (*args, *extra)
            gradient = InnerGradient(loss, state, hparams, row_args, recorded, self.products)
            if skips:
                found = gradient(at, others, used, seen)
                if seen is not None:
                    seen.append(found)
                return update(leaves, tracking.detach(found) if self.first_order else found, memory)
            grads = gradient(at, others, None, seen)
            if seen is not None:
                seen.append(grads)
            if regulariser is not None:
                if rate is not None:
                    return regulariser.descend(leaves, grads, rate), memory
                grads = regulariser.add_gradient(grads, at)
            return update(leaves, tracking.detach(grads) if self.first_order else grads, memory)

        return step

    def _update(
        self, specs: Specs, like: Leaves, hparams: TensorTree
    ) -> Callable[[Leaves, Gradients, Leaves], tuple[Leaves, Leaves]]:
        update = self.optimizer.update
        if isinstance(update, Leafwise):
            return update.bind(like, specs[0], hparams, counts=self.has_aux)

        def by_trees(leaves: Leaves, grads: Gradients, memory: Leaves) -> tuple[Leaves, Leaves]:
            params, state = update(
                trees.unflatten(specs[0], grads),
                trees.unflatten(specs[1], memory),
                trees.unflatten(specs[0], leaves),
                hparams,
            )
            return (
                _checked(params, leaves, specs[0], "the step's result", "params"),
                _checked(state, memory, specs[1], "the optimizer's new state", "state"),
            )

        return by_trees


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _noted(notes: Leaves, seen: list[Any] | None) -> Leaves:
    """The number of steps, and with a trace the losses and the norms of gradients, one more."""
    count, *traces = notes
    if seen:
        loss, grads = seen[-2:]  # what came before was looked at and taken again
        grads = tuple(grad for grad in grads if grad is not None)
        norm = trees.norm(tracking.detach(grads)) if grads else torch.zeros_like(loss)
        here = torch.arange(len(traces[0]), device=count.device) == count
        pairs = zip((*tracking.detach([loss]), norm), traces, strict=True)
        traces = [torch.where(here, value.to(trace), trace) for value, trace in pairs]
    return (count + 1, *traces)


def _checked(
    tree: TensorTree, like: Leaves, like_spec: trees.TreeSpec, what: str, root: str
) -> Leaves:
    leaves, spec = trees.flatten(tree)
    trees.check_like(leaves, spec, like, like_spec, what, root)
    return tuple(leaves)
