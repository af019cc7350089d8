"""Blocks of steps, and their products, by compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from hyperfunc import _ad
from hyperfunc._compile import Compiler, Variables
from hyperfunc._types import Leaves
from hyperfunc.iterative import _products
from hyperfunc.iterative._segment import split

# A function of the leaves of a state, and of what the steps from there see.
Block = Callable[..., Leaves]


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Compiles functions of ``size`` steps; ``key`` tells apart those of different layouts.

    Cotangents and tangents are given for each differentiable leaf of a state, so that no two blocks
    differ in which there are.
    """

    compiler: Compiler
    variables: Variables
    size: int
    key: Hashable

    def run(self, block: Block, key: Hashable, state: Leaves, seen: Leaves) -> Leaves:
        """The state after a block."""
        key = ("run", self.key, key, len(state))
        result: Leaves = self.compiler.call(block, key, self.variables, (*state, *seen))
        return result

    def pull(
        self,
        block: Block,
        key: Hashable,
        state: Leaves,
        seen: Leaves,
        cotangents: dict[int, Tensor],
        wrt: Sequence[int],
    ) -> dict[int, Tensor]:
        """The transposed product of a block, whose steps are taken again; see `_products.pull`."""
        live = differentiable_indices(state)
        vectors = (
            cotangents[i].contiguous() if i in cotangents else _zeros_like(state[i]) for i in live
        )
        n, m = len(state), len(state) + len(seen)

        def compute(*tensors: Tensor) -> dict[int, Tensor]:
            primals, vectors = split(tensors, m)
            grads = _products.pull(
                block,
                primals,
                (*live, *(n + i for i in wrt)),
                dict(zip(live, vectors, strict=True)),
                batched=False,
                check=True,
            )
            return {i: grad.contiguous() for i, grad in grads.items()}

        key = ("pull", self.key, key, n, tuple(wrt))
        operands = (*state, *seen, *vectors)
        result: dict[int, Tensor] = self.compiler.call(compute, key, self.variables, operands)
        return result

    def push(
        self,
        block: Block,
        key: Hashable,
        state: Leaves,
        seen: Leaves,
        tangents: dict[int, Tensor],
        *,
        batched: bool,
    ) -> tuple[Leaves, dict[int, Tensor]]:
        """The state after a block and its tangents; see `_products.push`."""
        lead = next(iter(tangents.values())).shape[:1] if batched else torch.Size()
        n, m = len(state), len(state) + len(seen)
        dots = {
            i: tangents[i].contiguous() if i in tangents else _zeros_like(state[i], lead)
            for i in (*differentiable_indices(state), *(i for i in tangents if i >= n))
        }
        wrt = tuple(dots)

        def compute(*tensors: Tensor) -> tuple[Leaves, dict[int, Tensor]]:
            primals, vectors = split(tensors, m)
            tangents = dict(zip(wrt, vectors, strict=True))
            outputs, results = _products.push(
                block, primals, tangents, batched=batched, check=True
            )
            return outputs, {i: result.contiguous() for i, result in results.items()}

        key = ("push", self.key, key, n, wrt, batched)
        operands = (*state, *seen, *dots.values())
        result: tuple[Leaves, dict[int, Tensor]] = self.compiler.call(
            compute, key, self.variables, operands
        )
        return result


def differentiable_indices(tensors: Leaves) -> tuple[int, ...]:
    return tuple(i for i, tensor in enumerate(tensors) if _ad.is_differentiable(tensor))


def _zeros_like(leaf: Tensor, lead: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
    return leaf.new_zeros((*lead, *leaf.shape))
