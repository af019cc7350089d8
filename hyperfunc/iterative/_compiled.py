"""Blocks of steps, and their products, by compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from hyperfunc._compile.compiler import Compiler, Variables
from hyperfunc._engine.flat import differentiable_indices, split
from hyperfunc._types import Leaves
from hyperfunc.iterative import _products
from hyperfunc.iterative._partition import forward_and_backward
from hyperfunc.iterative._products import STEP, ByIndex

T = TypeVar("T")


class Block(NamedTuple):
    """Steps as a function of the leaves of a state and of what they see; a layout has its key."""

    fn: Callable[..., Leaves]
    key: Hashable
    num_state: int


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """Compiles blocks of ``size`` steps; ``key`` tells apart those of different calls."""

    compiler: Compiler
    variables: Variables
    size: int
    key: Hashable
    kept: tuple[int, ...] | None = None  # operands for whose derivatives values are kept

    def serves(self, wrt: Sequence[int]) -> bool:
        """Whether what is kept is enough for products with respect to these operands."""
        return self.kept is None or set(wrt) <= set(self.kept)

    def run(self, block: Block, state: Leaves, seen: Leaves) -> Leaves:
        return self._call("run", block, block.fn, (*state, *seen))

    def record(self, block: Block, state: Leaves, seen: Leaves) -> tuple[Leaves, Leaves]:
        """The state after a block, and what `pull` needs of it."""
        halves = self._halves(block, state, seen)

        def compute(*primals: Tensor) -> tuple[Leaves, ...]:
            first, _, _ = halves(primals)
            return split(first(*primals), block.num_state)

        outputs, values = self._call("record", block, compute, (*state, *seen), self.kept)
        return outputs, (*state, *values)

    def pull(
        self, block: Block, kept: Leaves, seen: Leaves, cotangents: ByIndex, wrt: Sequence[int]
    ) -> ByIndex:
        """The transposed product of a block, from what `record` kept or by taking it again."""
        state, values = split(kept, block.num_state)
        operands = (*values, *state, *seen, *_fill(state, cotangents))
        if self.kept is None:
            joint = _joint(block, state, seen, wrt)
            return self._call("pull", block, lambda *each: joint(*each)[1], operands, *wrt)
        halves = self._halves(block, state, seen)
        sizes = len(values), len(state) + len(seen)

        def compute(*tensors: Tensor) -> ByIndex:
            values, primals, vectors = split(tensors, *sizes)
            _, second, indices = halves(primals)
            return dict(zip(indices, second(*values, *primals, *vectors), strict=True))

        return self._call("recorded", block, compute, operands, self.kept)

    def push(
        self, block: Block, state: Leaves, seen: Leaves, tangents: ByIndex, *, batched: bool
    ) -> tuple[Leaves, ByIndex]:
        """The state after a block and its tangents; see `_products.push`."""
        lead = next(iter(tangents.values())).shape[:1] if batched else ()
        n, m = len(state), len(state) + len(seen)
        further = {i: dot.contiguous() for i, dot in tangents.items() if i >= n}
        wrt = (*differentiable_indices(state), *further)

        def compute(*tensors: Tensor) -> tuple[Leaves, ByIndex]:
            primals, vectors = split(tensors, m)
            tangents = dict(zip(wrt, vectors, strict=True))
            outputs, dots = _products.push(block.fn, primals, tangents, batched=batched, check=STEP)
            return outputs, {i: dot.contiguous() for i, dot in dots.items()}

        operands = (*state, *seen, *_fill(state, tangents, lead), *further.values())
        return self._call("push", block, compute, operands, wrt, batched)

    def _call(
        self, name: str, block: Block, fn: Callable[..., T], operands: Leaves, *key: Hashable
    ) -> T:
        key = (name, self.key, block.key, *key)
        result: T = self.compiler.call(fn, key, self.variables, operands)
        return result

    def _halves(self, block: Block, state: Leaves, seen: Leaves) -> Callable[[Leaves], Any]:
        """`forward_and_backward` at given primals, and which gradients the second one returns."""
        assert self.kept is not None
        joint = _joint(block, state, seen, self.kept)
        found: list[Any] = []

        def halves(primals: Leaves) -> Any:
            if found:
                return found
            indices: list[int] = []

            def flat(*tensors: Tensor) -> Leaves:
                outputs, grads = joint(*tensors)
                indices[:] = grads
                return (*outputs, *grads.values())

            n = block.num_state
            operands = (*primals, *_fill(primals[:n], {}))
            found[:] = *forward_and_backward(flat, operands, len(primals), n), indices
            return found

        return halves


def _fill(state: Leaves, vectors: ByIndex, lead: Sequence[int] = ()) -> Leaves:
    """Contiguous vectors for the differentiable leaves of a state: zeros for those not given."""
    return tuple(
        vectors[i].contiguous() if i in vectors else state[i].new_zeros((*lead, *state[i].shape))
        for i in differentiable_indices(state)
    )


def _joint(
    block: Block, state: Leaves, seen: Leaves, wrt: Sequence[int]
) -> Callable[..., tuple[Leaves, ByIndex]]:
    """A block with its transposed product, as a function of primals and cotangents."""
    live = differentiable_indices(state)
    indices = (*live, *(len(state) + i for i in wrt))
    num_primals = len(state) + len(seen)

    def compute(*tensors: Tensor) -> tuple[Leaves, ByIndex]:
        primals, vectors = split(tensors, num_primals)
        cotangents = dict(zip(live, vectors, strict=True))
        outputs, grads = _products.pull(block.fn, primals, indices, cotangents, check=STEP)
        return outputs, {i: grad.contiguous() for i, grad in grads.items()}

    return compute
