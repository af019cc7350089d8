"""Operators made from operators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import match_prefix
from hyperfunc.prox._base import check_prox


def joint(prox: Callable[..., TensorTree]) -> Callable[..., TensorTree]:
    r"""Apply an operator to all leaves as one vector, in flattening order.

    Args:
        prox: ``(params, hparams, lr) -> params``, called with a vector; such as
            ``hf.prox.l2_ball(3.0)``, which then bounds the norm of the whole tree.

    Raises:
        TypeError: ``prox`` is not a function, or is one that still makes an operator.

    Example:
        >>> hf.prox.joint(hf.prox.l2_ball())({"a": torch.tensor(3.0), "b": torch.tensor([4.0])})
        {'a': tensor(0.6000), 'b': tensor([0.8000])}
    """
    return _Joint(check_prox(prox, "prox.joint"))


def blocks(proxes: Any) -> Callable[..., TensorTree]:
    r"""Give parts of params their own operators, and all of them the same hparams.

    Args:
        proxes: a tree of operators with the structure of params cut off at any depth, such as
            ``{"weights": hf.prox.simplex(), "bias": hf.prox.identity()}``.

    Raises:
        TypeError: the tree holds something else than functions.
        ValueError: when called, the tree does not fit params.

    Example:
        >>> prox = hf.prox.blocks({"b": hf.prox.identity(), "w": hf.prox.l1(2.0)})
        >>> prox({"w": torch.tensor([5.0, 1.0]), "b": torch.tensor(1.0)}, None, 1.0)
        {'b': tensor(1.), 'w': tensor([3., 0.])}
    """
    for prox in trees.flatten(proxes)[0]:
        check_prox(prox, "prox.blocks")
    return _Blocks(proxes)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joint:
    prox: Callable[..., TensorTree]

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        leaves, spec = trees.flatten_floating(params, "params")
        dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
        flat = torch.cat([leaf.to(dtype).reshape(-1) for leaf in leaves])
        parts = self.prox(flat, hparams, lr).split([leaf.numel() for leaf in leaves])
        pairs = zip(parts, leaves, strict=True)
        return trees.unflatten(spec, [x.reshape(like.shape).to(like.dtype) for x, like in pairs])


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    proxes: Any

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        parts = match_prefix("prox.blocks", self.proxes, params)
        moved = [prox(part, hparams, lr) for prox, part in parts]
        return trees.unflatten(trees.flatten(self.proxes)[1], moved)
