"""Steps of inner solvers, and steps on flat states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hyperfunc import optim
from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._torch import autodiff, tracking
from hyperfunc._types import Leaves, Loss, ParamsFunction, TensorTree
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

    def remember(self, params: TensorTree, /) -> TensorTree:
        """The memory before the first step."""

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        """The step at given arguments, for params and memory of given structures."""


@dataclass(frozen=True, eq=False)
class MapStep:
    fixed_point: ParamsFunction

    def remember(self, params: TensorTree, /) -> TensorTree:
        return ()

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            params = self.fixed_point(trees.unflatten(specs[0], leaves), hparams, *args, *extra)
            return _checked(params, leaves, specs[0], "the step's result", "params"), memory

        return step


@dataclass(frozen=True, eq=False)
class DescentStep:
    inner_loss: Loss
    optimizer: optim.Optimizer
    first_order: bool = False  # whether gradients are constants

    def remember(self, params: TensorTree, /) -> TensorTree:
        w, _, state = trees.flatten_state(params, "params")
        return self.optimizer.init(trees.unflatten(state.spec, w))

    def bind(self, specs: Specs, like: Leaves, hparams: Any, args: tuple[Any, ...]) -> FlatStep:
        loss, optimizer = self.inner_loss, self.optimizer.update
        state = trees.StateSpec.of(specs[0], like)
        spec, (like, _) = state.spec, state.split(like)
        update = self._update((spec, specs[1]), like, hparams)
        regulariser, rate = None, None
        operands, structure = trees.flatten((hparams, args))
        trees.refuse_holders(operands, structure, "(hparams, args)")
        if self.first_order:
            operands = list(tracking.detach(operands))
            hparams, args = trees.unflatten(structure, operands)
        if isinstance(loss, ProximalLoss):
            regulariser, loss = loss.at(hparams, like, spec), loss.loss
            if isinstance(optimizer, SGD) and not isinstance(regulariser.weight, Tensor):
                rate = optimizer.plain_rate(like, hparams)
        tracked = tracking.is_tracked(operands)
        skips = regulariser is None and skips_unused(optimizer)
        used: list[bool] | None = [] if skips else None

        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            if not state.num_others:
                return descend(leaves, (), memory, extra)
            w, others = state.split(leaves)
            w, memory = descend(w, others, memory, extra)
            return state.merge(w, others), memory

        def descend(
            leaves: Leaves, others: Leaves, memory: Leaves, extra: tuple[Any, ...]
        ) -> tuple[Leaves, Leaves]:
            def value(*flat: Tensor) -> Tensor:
                params = state.fill(flat, others) if others else trees.unflatten(spec, flat)
                result = loss(params, hparams, *args, *extra)
                return check_scalar(result, "inner_loss")

            at = leaves
            if self.first_order:
                at, extra = tracking.detach(leaves), trees.tree_map(_detach, extra)
            row = trees.flatten(extra)[0] if extra else ()
            recorded = tracked or tracking.is_tracked((*at, *row))
            if skips:
                found = autodiff.gradient_used(value, at, create_graph=recorded, used=used)
                return update(leaves, tracking.detach(found) if self.first_order else found, memory)
            grads = autodiff.gradient(value, at, create_graph=recorded)
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
            return update.bind(like, specs[0], hparams)

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


def _checked(
    tree: TensorTree, like: Leaves, like_spec: trees.TreeSpec, what: str, root: str
) -> Leaves:
    leaves, spec = trees.flatten(tree)
    trees.check_like(leaves, spec, like, like_spec, what, root)
    return tuple(leaves)
