"""Blocks of steps, and their products, by compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._compile.compiler import Compiler, Variables
from hyperfunc._engine.flat import differentiable_indices, split
from hyperfunc._types import Leaves
from hyperfunc.iterative import _products
from hyperfunc.iterative._partition import forward_and_backward

# A function of the leaves of a state, and of what the steps from there see.
Block = Callable[..., Leaves]


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Compiles functions of ``size`` steps; ``key`` tells apart those of different layouts.

    Cotangents and tangents are given for each differentiable leaf of a state, so that no two blocks
    differ in which there are. ``kept`` are the operands that derivatives are expected with respect
    to, if the values that these take are to be kept from the forward pass; otherwise None.
    """

    compiler: Compiler
    variables: Variables
    size: int
    key: Hashable
    kept: tuple[int, ...] | None = None

    def serves(self, wrt: Sequence[int]) -> bool:
        """Whether what is kept is enough for products with respect to these operands."""
        return self.kept is None or set(wrt) <= set(self.kept)

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
        vectors = _fill(state, cotangents)
        compute = _joint(block, len(state), len(seen), live, wrt)
        key = ("pull", self.key, key, len(state), tuple(wrt))
        operands = (*state, *seen, *vectors)
        grads: dict[int, Tensor] = self.compiler.call(
            lambda *tensors: compute(*tensors)[1], key, self.variables, operands
        )
        return grads

    def record(
        self, block: Block, key: Hashable, state: Leaves, seen: Leaves
    ) -> tuple[Leaves, Leaves]:
        """The state after a block, and what `pull_recorded` needs of it."""
        n = len(state)
        halves = self._halves(block, state, seen)

        def compute(*primals: Tensor) -> tuple[Leaves, Leaves]:
            first, _, _ = halves(primals)
            outputs, values = split(first(*primals), n)
            return outputs, values

        key = ("record", self.key, key, n, self.kept)
        outputs, values = self.compiler.call(compute, key, self.variables, (*state, *seen))
        return outputs, (*state, *values)

    def pull_recorded(
        self,
        block: Block,
        key: Hashable,
        size: int,
        values: Leaves,
        seen: Leaves,
        cotangents: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """`pull`, for a state of ``size`` leaves, from what was kept."""
        state, values = split(values, size)
        m = size + len(seen)
        halves = self._halves(block, state, seen)

        def compute(*tensors: Tensor) -> dict[int, Tensor]:
            values, primals, vectors = split(tensors, len(tensors) - m - len(live), m)
            _, second, indices = halves(primals)
            return dict(zip(indices, second(*values, *primals, *vectors), strict=True))

        live = differentiable_indices(state)
        key = ("recorded", self.key, key, size, self.kept)
        operands = (*values, *state, *seen, *_fill(state, cotangents))
        grads: dict[int, Tensor] = self.compiler.call(compute, key, self.variables, operands)
        return grads

    def _halves(self, block: Block, state: Leaves, seen: Leaves) -> Callable[[Leaves], Any]:
        """`forward_and_backward` at given primals, and which gradients the second one returns."""
        assert self.kept is not None
        compute = _joint(block, len(state), len(seen), differentiable_indices(state), self.kept)
        found: list[Any] = []

        def halves(primals: Leaves) -> Any:
            if found:
                return found
            indices: list[int] = []

            def flat(*tensors: Tensor) -> Leaves:
                outputs, grads = compute(*tensors)
                indices[:] = grads
                return (*outputs, *grads.values())

            vectors = _fill(primals[: len(state)], {})
            operands = (*primals, *vectors)
            first, second = forward_and_backward(flat, operands, len(primals), len(state))
            found[:] = first, second, indices
            return found

        return halves

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
        further = {i: dot.contiguous() for i, dot in tangents.items() if i >= n}
        wrt = (*differentiable_indices(state), *further)
        dots = (*_fill(state, tangents, lead), *further.values())

        def compute(*tensors: Tensor) -> tuple[Leaves, dict[int, Tensor]]:
            primals, vectors = split(tensors, m)
            tangents = dict(zip(wrt, vectors, strict=True))
            outputs, results = _products.push(block, primals, tangents, batched=batched, check=True)
            return outputs, {i: result.contiguous() for i, result in results.items()}

        key = ("push", self.key, key, n, wrt, batched)
        operands = (*state, *seen, *dots)
        result: tuple[Leaves, dict[int, Tensor]] = self.compiler.call(
            compute, key, self.variables, operands
        )
        return result


def _fill(state: Leaves, vectors: dict[int, Tensor], lead: Sequence[int] = ()) -> Leaves:
    """Contiguous vectors for the differentiable leaves of a state: zeros for those not given."""
    return tuple(
        vectors[i].contiguous() if i in vectors else state[i].new_zeros((*lead, *state[i].shape))
        for i in differentiable_indices(state)
    )


def _joint(
    block: Block, num_state: int, num_seen: int, live: Sequence[int], wrt: Sequence[int]
) -> Callable[..., tuple[Leaves, dict[int, Tensor]]]:
    """A block with its transposed product, as a function of primals and cotangents."""

    def compute(*tensors: Tensor) -> tuple[Leaves, dict[int, Tensor]]:
        primals, vectors = split(tensors, num_state + num_seen)
        outputs, grads = _products.value_and_pull(
            block,
            primals,
            (*live, *(num_state + i for i in wrt)),
            dict(zip(live, vectors, strict=True)),
            batched=False,
            check=True,
        )
        return outputs, {i: grad.contiguous() for i, grad in grads.items()}

    return compute
