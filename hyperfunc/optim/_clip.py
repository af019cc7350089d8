"""Gradient clipping, as wrappers around an optimiser."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import (
    ByName,
    Coefficient,
    Optimizer,
    Schedule,
    State,
    cast,
    check_coefficient,
    check_optimizer,
    check_single,
    evaluate,
    flatten_like_params,
    skips_unused,
    values_by_leaf,
)
from hyperfunc.optim._leafwise import safe_root


def clip_grad_norm(optimizer: Optimizer, max_norm: Coefficient) -> Optimizer:
    """The optimiser on gradients scaled down to a Euclidean norm of at most ``max_norm``.

        g <- min(1, max_norm / (||g|| + 1e-6)) g,    ||.|| over all leaves together

    as ``torch.nn.utils.clip_grad_norm_``. Under ``vmap`` each task has its own norm.

    Args:
        optimizer: the `Optimizer` to wrap; its state is the state of the whole.
        max_norm: a number of at least 0, a 0-d tensor, a function of hparams that returns one, or
            a schedule, for an optimiser whose state counts steps, as those of this module.

    Raises:
        TypeError: something that is no `Optimizer`, or no such coefficient.
        ValueError: a number below 0.

    Example:
        >>> optimizer = hf.optim.clip_grad_norm(hf.optim.sgd(lr=1.0), max_norm=1.0)
        >>> w = torch.zeros(2)
        >>> optimizer.update(torch.tensor([30.0, 40.0]), optimizer.init(w), w)[0]
        tensor([-0.6000, -0.8000])

    References:
        Pascanu et al. On the difficulty of training recurrent neural networks. ICML 2013.
    """
    inner = check_optimizer(optimizer, "clip_grad_norm")
    check_coefficient("clip_grad_norm", "max_norm", max_norm)
    if not callable(max_norm):
        check_single("clip_grad_norm: max_norm", max_norm, "use clip_grad_value")
    return Optimizer(inner.init, _ClippedByNorm(inner, max_norm))


def clip_grad_value(optimizer: Optimizer, clip_value: Coefficient) -> Optimizer:
    """The optimiser on gradients whose entries are cut off at ``-clip_value`` and ``clip_value``.

        g <- min(max(g, -clip_value), clip_value)

    ``clip_value`` is a `Coefficient`, at least 0. The rest is as for `clip_grad_norm`.

    Example:
        >>> optimizer = hf.optim.clip_grad_value(hf.optim.sgd(lr=1.0), clip_value=0.5)
        >>> w = torch.zeros(2)
        >>> optimizer.update(torch.tensor([30.0, -0.1]), optimizer.init(w), w)[0]
        tensor([-0.5000,  0.1000])

    References:
        Mikolov. Statistical language models based on neural networks. PhD thesis, Brno, 2012.
    """
    inner = check_optimizer(optimizer, "clip_grad_value")
    check_coefficient("clip_grad_value", "clip_value", clip_value)
    return Optimizer(inner.init, _ClippedByValue(inner, clip_value))


@dataclasses.dataclass(frozen=True, repr=False)
class _ClippedByNorm(PrintsAsCall):
    optimizer: Optimizer
    max_norm: Coefficient

    name = "clip_grad_norm"

    @property
    def skips_unused(self) -> bool:
        return skips_unused(self.optimizer.update)

    def __call__(
        self, grads: TensorTree, state: Any, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, Any]:
        leaves, _, spec = flatten_like_params(self.name, grads, params)
        step = _step(self.name, "max_norm", self.max_norm, state)
        limit = evaluate(self.name, "max_norm", self.max_norm, hparams, step)
        check_single(f"{self.name}: max_norm", limit, "use clip_grad_value")
        known = tuple(leaf for leaf in leaves if leaf is not None)
        if not known:
            return self.optimizer.update(grads, state, params, hparams)
        total = safe_root(trees.dot(known, known))
        scaled = iter(trees.scale((limit / (total + 1e-6)).clamp(max=1.0), known))
        clipped = [None if leaf is None else next(scaled) for leaf in leaves]
        return self.optimizer.update(trees.unflatten(spec, clipped), state, params, hparams)


@dataclasses.dataclass(frozen=True, repr=False)
class _ClippedByValue(PrintsAsCall):
    optimizer: Optimizer
    clip_value: Coefficient

    name = "clip_grad_value"

    @property
    def skips_unused(self) -> bool:
        return skips_unused(self.optimizer.update)

    def __call__(
        self, grads: TensorTree, state: Any, params: TensorTree, hparams: Any = None
    ) -> tuple[TensorTree, Any]:
        leaves, like, spec = flatten_like_params(self.name, grads, params)
        limits = {"clip_value": self.clip_value}
        step = _step(self.name, "clip_value", self.clip_value, state)
        rows = values_by_leaf(self.name, limits, hparams, params, like, spec, (), step)
        clipped: list[Tensor | None] = []
        for leaf, row in zip(leaves, rows, strict=True):
            if leaf is None:
                clipped.append(None)
                continue
            (limit,) = cast(row, leaf.dtype, leaf.device)
            clipped.append(torch.clamp(leaf, -limit, limit))
        return self.optimizer.update(trees.unflatten(spec, clipped), state, params, hparams)


def _step(name: str, key: str, coefficient: Coefficient, state: Any) -> Tensor | None:
    """The step that a schedule is taken at: that of the state of the optimiser."""
    leaves = trees.flatten(coefficient)[0]
    if not any(isinstance(leaf, Schedule | ByName) for leaf in leaves):
        return None
    while isinstance(state, tuple) and not isinstance(state, State) and state:
        state = state[0]  # of several optimisers, which count alike
    if not isinstance(state, State):
        if not any(isinstance(leaf, Schedule) for leaf in leaves):
            return None
        raise TypeError(
            f"{name}: {key} is a schedule, which needs the step, but the optimiser's state is of "
            f"type {type(state).__name__}; expected an hf.optim.State, which counts steps"
        )
    return state.step
