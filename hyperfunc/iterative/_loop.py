"""The steps of an inner solver as one operation, with its products in reverse and forward mode."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.flat import differentiable_indices, split
from hyperfunc._engine.operations import Operation, Recorded
from hyperfunc._torch import autodiff
from hyperfunc._types import Leaves
from hyperfunc.iterative._compiled import Block, Compiled
from hyperfunc.iterative._products import START, STEP, ByIndex, pull, push
from hyperfunc.iterative._segment import RngAutocastState, Segment
from hyperfunc.iterative._steps import Steps
from hyperfunc.iterative._storage import Mark, Schedule, Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """The result of all steps, as an operation under ``levels`` of vmap, the innermost first."""

    steps: Steps
    schedule: Schedule
    chunk: int | None  # tangents at a time in forward accumulation; None for reverse mode
    rng_autocast: RngAutocastState
    compiled: Compiled | None = None  # blocks of several steps
    memo: list[Trace] = dataclasses.field(default_factory=list)  # takes the trace of its run
    levels: tuple[_Level, ...] = ()

    def run(self, operands: Leaves) -> Leaves:
        state, trace = self.trace(operands, keep=self.chunk is None, first=True)
        self.memo[:] = [trace]
        return state[: self.steps.flat.num_outputs]

    def pull(self, wrt: tuple[int, ...], live: tuple[int, ...]) -> _Product:
        return _Product(self, wrt, live)

    def push(self, wrt: tuple[int, ...]) -> _Product:
        return _Product(self, wrt, None)

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], operands: Leaves) -> Any:
        loop, operands = self.batch(info, in_dims, operands)
        return Recorded.apply(loop, *operands), 0

    def batch(
        self, info: Any, in_dims: Sequence[int | None], operands: Leaves
    ) -> tuple[Loop, Leaves]:
        batched = tuple(dim is not None for dim in in_dims)
        level = _Level(batched, info.batch_size, info.randomness)
        moved = tuple(
            operand if dim is None else operand.movedim(dim, 0)
            for operand, dim in zip(operands, in_dims, strict=True)
        )
        return dataclasses.replace(self, levels=(*self.levels, level)), moved

    def trace(self, operands: Leaves, *, keep: bool, first: bool = False) -> tuple[Leaves, Trace]:
        """Run the steps, keeping iterates by the schedule if they are needed."""
        refuse = self.rng_autocast.refuse_foreign if first else contextlib.nullcontext
        with refuse(START):
            state = self._start(*operands)
        trace = Trace(self.steps.num_steps, [], [])
        hold = 0 if keep else trace.num_steps
        lengths = active = None
        last: Mark | None = None
        advance = self._bind(operands)
        recorded = self.compiled if keep and self._is_recorded else None
        for step in range(0, trace.num_steps, self._width):
            if recorded is not None:
                state, kept = recorded.record(self._block, state, self._at(operands, step))
                trace.marks.append(Mark(step, kept, ()))
                continue
            if step >= hold:
                hold = self._mark(trace, step, state, trace.num_steps, first=True)
            elif keep and (self.steps.flat.can_stop or step == trace.num_steps - self._width):
                last = Mark(step, state, self.rng_autocast.read(trace.marks[-1].streams))
            with refuse(STEP) if step == 0 and self.compiled is None else contextlib.nullcontext():
                outputs = advance(active, state, self._at(operands, step))
            state = outputs[: len(state)]
            if self.steps.flat.can_stop:
                if lengths is None:
                    lengths = torch.zeros_like(outputs[-1], dtype=torch.int64)
                if active is None:
                    active = lengths == step
                lengths = lengths + active
                active = active & ~outputs[-1]
                remaining = int(active.sum())
                if not remaining:
                    break
                active = None if remaining == active.numel() else active
        if last is not None and last.step > trace.marks[-1].step:
            # In hand, and where the way back begins: not one of the iterates that fill the slots.
            trace.marks.append(last)
        if lengths is not None:
            trace = trace._replace(
                num_steps=int(lengths.max()), lengths=lengths, shortest=int(lengths.min())
            )
        return state, trace

    def gradients(
        self, operands: Leaves, cotangents: ByIndex, wrt: tuple[int, ...], *, batched: bool
    ) -> ByIndex:
        """Reverse mode: transposed products, with one step's graph at a time."""
        compiled = self.compiled
        if compiled is not None and (batched or not compiled.serves(wrt)):
            compiled = None if batched else dataclasses.replace(compiled, kept=None)
            loop = dataclasses.replace(self, compiled=compiled, memo=[])
            return loop.gradients(operands, cotangents, wrt, batched=batched)
        trace = self._known_trace(operands, keep=True)
        num_fixed = self.steps.num_fixed
        totals: ByIndex = {}
        rows: dict[int, ByIndex] = {}
        advance = self._bind(operands)
        size, end = self._num_state, trace.num_steps
        while end > 0:
            step, state = self._take_last(trace, end, operands, advance)
            seen = self._at(operands, step)
            if compiled is not None:
                grads = compiled.pull(self._block, state, seen, cotangents, wrt)
            else:
                _, grads = pull(
                    functools.partial(self._advance, trace.active(step)),
                    (*state, *seen),
                    (*differentiable_indices(state), *(size + i for i in wrt)),
                    cotangents,
                    batched=batched,
                    check=STEP if end == trace.num_steps else None,
                )
            cotangents = {i: grad for i, grad in grads.items() if i < size}
            for index in wrt:
                grad = grads.get(size + index)
                if grad is not None and index < num_fixed:
                    _add(totals, index, grad)
                elif grad is not None:
                    rows.setdefault(index, {})[step] = grad
            end = step
        trace.buffers.clear()
        self.rng_autocast.write(self.rng_autocast.states)
        fixed = [i for i in wrt if i < num_fixed]
        _, starts = pull(self._start, operands, fixed, cotangents, batched=batched, check=START)
        for index, grad in starts.items():
            _add(totals, index, grad)
        for index, by_step in rows.items():
            totals[index] = self._stack(index, by_step, batched)
        return totals

    def _take_last(
        self, trace: Trace, end: int, operands: Leaves, advance: Callable[..., Leaves]
    ) -> tuple[int, Leaves]:
        """Where the last step (or block) before ``end`` begins, and what was kept or is there."""
        step, state, streams = trace.marks[-1]
        if not self._is_recorded:
            self.rng_autocast.write(streams)
            hold = step + self.schedule.gap(end - step, len(trace.marks))
            while step < end - self._width:
                outputs = advance(trace.active(step), state, self._at(operands, step))
                state, step = outputs[: len(state)], step + self._width
                if step >= hold:
                    hold = self._mark(trace, step, state, end)
        if trace.marks[-1].step == step:
            trace.marks.pop()
        return step, state

    def tangents(
        self, operands: Leaves, tangents: ByIndex, *, batched: bool
    ) -> tuple[ByIndex, Leaves]:
        """Forward mode: the tangents of the outputs, carried along the steps, and the outputs."""
        trace = Trace(self.steps.num_steps, [], [])
        if self.steps.flat.can_stop:
            trace = self._known_trace(operands, keep=False)
        self.rng_autocast.write(self.rng_autocast.states)
        state, dots = push(self._start, operands, tangents, batched=batched, check=START)
        size = len(state)
        for step in range(0, trace.num_steps, self._width):
            seen = self._at(operands, step)
            for index, tangent in tangents.items():
                dots[size + index] = self._row(index, tangent, step, batched)
            if self.compiled is not None:
                block = self._block
                outputs, dots = self.compiled.push(block, state, seen, dots, batched=batched)
            else:
                outputs, dots = push(
                    functools.partial(self._advance, trace.active(step)),
                    (*state, *seen),
                    dots,
                    batched=batched,
                    check=STEP if step == 0 else None,
                )
            state = outputs[:size]
        outputs = state[: self.steps.flat.num_outputs]
        return {i: dot for i, dot in dots.items() if i < len(outputs)}, outputs

    def accumulate(
        self, operands: Leaves, cotangents: ByIndex, wrt: tuple[int, ...], *, batched: bool
    ) -> ByIndex:
        """Transposed products by forward accumulation: tangents for every entry of the operands."""
        if any(operands[i].is_complex() for i in wrt):
            raise TypeError(
                "ForwardMode has no derivatives with respect to complex tensors in *args or "
                "inputs. Use method='reverse', or pass their real and imaginary parts"
            )
        shapes = [operands[i].shape[self._num_levels(i) :] for i in wrt]
        numels = list(map(math.prod, shapes))
        offsets = [sum(numels[:i]) for i in range(len(numels))]
        count = next(iter(cotangents.values())).shape[0] if batched else 1
        parts: dict[int, list[Tensor]] = {i: [] for i in wrt}
        total = sum(numels)
        chunk = min(self.chunk or total, total)
        for begin in range(0, total, max(chunk, 1)):
            width = min(chunk, total - begin)
            tangents: ByIndex = {}
            spans: dict[int, slice] = {}
            for index, shape, numel, offset in zip(wrt, shapes, numels, offsets, strict=True):
                low, high = max(begin, offset), min(begin + width, offset + numel)
                operand = operands[index]
                if low < high:
                    spans[index] = slice(low - begin, high - begin)
                elif self.compiled is None:
                    continue  # compiled code is for tangents of all operands
                rows = torch.arange(begin - offset, begin - offset + width, device=operand.device)
                basis = rows[:, None] == torch.arange(numel, device=operand.device)
                ones = [1] * self._num_levels(index)
                basis = basis.to(operand.dtype).reshape([width, *ones, *shape])
                tangents[index] = basis.expand([width, *operand.shape])
            dots, _ = self.tangents(operands, tangents, batched=True)
            products = self._contract(dots, cotangents, count, width)
            for index, span in spans.items():
                parts[index].append(self._collect(index, products[:, span]))
        return {
            index: torch.cat(pieces, -1)
            .reshape([*([count] if batched else []), *operands[index].shape])
            .to(operands[index])
            for index, pieces in parts.items()
            if pieces
        }

    def _start(self, *operands: Tensor) -> Leaves:
        fn = self.steps.start
        for level in self.levels:
            fn = level.start(fn, self.steps.num_fixed)
        return fn(operands[: self.steps.num_fixed])

    def _advance(self, active: Tensor | None, *tensors: Tensor) -> Leaves:
        pieces = split(tensors, self._num_state, self.steps.num_fixed)
        return self._batched_advance(active, *pieces)

    def _bind(self, operands: Leaves) -> Callable[[Tensor | None, Leaves, Leaves], Leaves]:
        """The function that takes a step of given operands, without a derivative of it."""
        num_fixed = self.steps.num_fixed
        if self.compiled is not None:
            run = functools.partial(self.compiled.run, self._block)
            return lambda _, state, seen: run(state, seen)
        if self.levels:
            advance = self._batched_advance
            return lambda active, state, seen: advance(active, state, *split(seen, num_fixed))
        bound = self.steps.bind(operands[:num_fixed])
        return lambda active, state, seen: bound(active, state, seen[num_fixed:])

    @property
    def _width(self) -> int:
        """How many steps are taken at a time."""
        return 1 if self.compiled is None else self.compiled.size

    @property
    def _is_recorded(self) -> bool:
        """Whether the marks hold what the steps' products need, not iterates."""
        return self.compiled is not None and self.compiled.kept is not None

    @property
    def _num_state(self) -> int:
        """The number of leaves of a state; known once the loop has started."""
        return sum(spec.num_leaves for spec in self.steps.flat.structure)

    @property
    def _block(self) -> Block:
        """The steps of a block; known once the loop has started."""
        size = self._num_state
        fn = self._batch_steps(functools.partial(self.steps.advance_block, self._width))

        def block(*tensors: Tensor) -> Leaves:
            with self.rng_autocast.refuse_foreign(STEP):
                return fn(None, *split(tensors, size, self.steps.num_fixed))

        return Block(block, (self.levels, *self.steps.flat.structure), size)

    @functools.cached_property
    def _batched_advance(self) -> Callable[..., Leaves]:
        return self._batch_steps(self.steps.advance)

    def _batch_steps(self, fn: Callable[..., Leaves]) -> Callable[..., Leaves]:
        for level in self.levels:
            fn = level.advance(fn, self.steps.num_fixed)
        return fn

    def _at(self, operands: Leaves, step: int) -> Leaves:
        """The operands as one step (or block of steps) sees them."""
        fixed, series = split(operands, self.steps.num_fixed)
        if not series:
            return operands
        rows = (self._row(len(fixed) + i, leaf, step) for i, leaf in enumerate(series))
        return (*fixed, *rows)

    def _row(self, index: int, tensor: Tensor, step: int, batched: bool = False) -> Tensor:
        if index < self.steps.num_fixed:
            return tensor
        dim = self._num_levels(index) + batched
        if self.compiled is not None:
            return tensor.narrow(dim, step, self._width)
        return tensor.select(dim, step)

    def _stack(self, index: int, by_step: ByIndex, batched: bool) -> Tensor:
        zeros = torch.zeros_like(next(iter(by_step.values())))
        rows = [by_step.get(step, zeros) for step in range(0, self.steps.num_steps, self._width)]
        join = torch.stack if self.compiled is None else torch.cat
        return join(rows, self._num_levels(index) + batched)

    def _mark(
        self, trace: Trace, step: int, state: Leaves, end: int, *, first: bool = False
    ) -> int:
        """Keep an iterate; returns the step at which the next one is to be kept."""
        known = trace.marks[-1].streams if trace.marks else self.rng_autocast.states
        trace.marks.append(Mark(step, trace.store(state), self.rng_autocast.read(known)))
        return step + self.schedule.gap(end - step, len(trace.marks), first=first)

    def _known_trace(self, operands: Leaves, *, keep: bool) -> Trace:
        """The trace of the forward pass, or a new one if its marks are used up."""
        if not self.memo or (keep and self.memo[0].num_steps and not self.memo[0].marks):
            self.memo[:] = [self.trace(operands, keep=keep)[1]]
        return self.memo[0]

    def _num_levels(self, index: int) -> int:
        return sum(level.batched[index] for level in self.levels)

    def _contract(self, dots: ByIndex, cotangents: ByIndex, count: int, width: int) -> Tensor:
        """Inner products of tangents and cotangents: shape ``(count, width, *batch sizes)``."""
        sizes = [level.size for level in reversed(self.levels)]
        dtype = trees.accumulation_dtype(tuple(cotangents.values()))
        device = next(iter(cotangents.values())).device
        batch = math.prod(sizes)
        result = torch.zeros(count, width, batch, dtype=dtype, device=device)
        for index in dots.keys() & cotangents.keys():
            dot = dots[index].to(dtype).reshape(width, batch, -1)
            cotangent = cotangents[index].to(dtype).reshape(count, batch, -1)
            result += torch.einsum("kbs,cbs->ckb", dot, cotangent).to(device)
        return result.reshape([count, width, *sizes])

    def _collect(self, index: int, products: Tensor) -> Tensor:
        """Sum over the batches an operand is not part of, and put its entries last."""
        batched = [level.batched[index] for level in reversed(self.levels)]
        summed = [2 + i for i, part in enumerate(batched) if not part]
        return (products.sum(summed) if summed else products).movedim(1, -1)


class _Level(NamedTuple):
    """A ``vmap`` around a loop: which operands it batches, its size and its randomness."""

    batched: tuple[bool, ...]
    size: int
    randomness: str

    @property
    def dims(self) -> tuple[int | None, ...]:
        return tuple(0 if batched else None for batched in self.batched)

    def vmap(self, fn: Callable[..., Leaves], in_dims: tuple[Any, ...]) -> Callable[..., Leaves]:
        return torch.func.vmap(fn, in_dims, randomness=self.randomness)

    def start(self, fn: Callable[..., Leaves], num_fixed: int) -> Callable[..., Leaves]:
        """A function of the operands that every step sees, for a batch."""
        if any(self.batched[:num_fixed]):
            return self.vmap(fn, (self.dims[:num_fixed],))
        return lambda fixed: tuple(leaf.expand(self.size, *leaf.shape) for leaf in fn(fixed))

    def advance(self, fn: Callable[..., Leaves], num_fixed: int) -> Callable[..., Leaves]:
        fixed_dims, row_dims = split(self.dims, num_fixed)

        def advance(active: Tensor | None, *tensors: Leaves) -> Leaves:
            in_dims = (None if active is None else 0, 0, fixed_dims, row_dims)
            return self.vmap(fn, in_dims)(active, *tensors)

        return advance


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """Products with the Jacobian of a loop with respect to the operands ``wrt``."""

    loop: Loop
    wrt: tuple[int, ...]
    live: tuple[int, ...] | None  # outputs that have cotangents; None: products with tangents
    batched: bool = False  # whether these vectors have a leading dimension

    def run(self, operands: Leaves) -> Leaves:
        operands, vectors = split(operands, self.loop.steps.num_operands)
        with self.loop.rng_autocast.restored():
            if self.live is None:
                tangents = dict(zip(self.wrt, vectors, strict=True))
                results, outputs = self.loop.tangents(operands, tangents, batched=self.batched)
                like = {i: outputs[i] for i in differentiable_indices(outputs)}
            else:
                compute = self.loop.gradients if self.loop.chunk is None else self.loop.accumulate
                cotangents = dict(zip(self.live, vectors, strict=True))
                results = compute(operands, cotangents, self.wrt, batched=self.batched)
                like = {i: operands[i] for i in self.wrt}
        lead = vectors[0].shape[:1] if self.batched else ()
        return tuple(
            results[i] if i in results else leaf.new_zeros((*lead, *leaf.shape))
            for i, leaf in like.items()
        )

    def pull(self, wrt: tuple[int, ...], live: tuple[int, ...]) -> Operation:
        return self._segment().pull(wrt, live)

    def push(self, wrt: tuple[int, ...]) -> Operation:
        return self._segment().push(wrt)

    def vmap(self, info: Any, in_dims: tuple[int | None, ...], operands: Leaves) -> Any:
        num_operands, size = self.loop.steps.num_operands, info.batch_size
        dims, vector_dims = (list(part) for part in split(in_dims, num_operands))
        points, vectors = (list(part) for part in split(operands, num_operands))
        product, place = dataclasses.replace(self, batched=True), 0
        if any(dim is not None for dim in dims):
            for i in self.wrt:
                points[i], dims[i] = _with_dim(points[i], dims[i], 0, size), 0
            loop, moved = self.loop.batch(info, dims, tuple(points))
            product, points = dataclasses.replace(self, loop=loop), [*moved]
            place = int(self.batched)
        vectors = [
            _with_dim(vector, dim, place, size)
            for vector, dim in zip(vectors, vector_dims, strict=True)
        ]
        # A batch of vectors at one point needs the steps no more than once.
        merge = product.loop is self.loop and self.batched
        if merge:
            vectors = [vector.flatten(0, 1) for vector in vectors]
        outputs = Recorded.apply(product, *points, *vectors)
        if merge:
            outputs = tuple(out.unflatten(0, (size, -1)) for out in outputs)
        return outputs, place

    def _segment(self) -> Segment:
        return Segment(self._reference, self.loop.rng_autocast, self.loop.steps.num_operands)

    def _reference(self, *tensors: Tensor) -> Leaves:
        operands, vectors = split(tensors, self.loop.steps.num_operands)
        chain = self.loop.steps.chain
        for level in self.loop.levels:
            chain = level.vmap(chain, level.dims)

        def outputs(*leaves: Tensor) -> Leaves:
            params = chain(*leaves)
            live = differentiable_indices(params) if self.live is None else self.live
            return tuple(params[i] for i in live)

        linearized = autodiff.Linearization(outputs, operands, (self.wrt,))
        product = linearized.push if self.live is None else linearized.pull
        if not self.batched:
            return product(vectors)
        rows = zip(*(vector.unbind(0) for vector in vectors), strict=True)
        columns = zip(*(product(row) for row in rows), strict=True)
        return tuple(torch.stack(column) for column in columns)


def _add(totals: ByIndex, index: int, grad: Tensor) -> None:
    totals[index] = totals[index] + grad if index in totals else grad


def _with_dim(tensor: Tensor, dim: int | None, target: int, size: int) -> Tensor:
    """The tensor with its batch dimension, or a new one, at ``target``."""
    if dim is not None:
        return tensor.movedim(dim, target)
    return tensor.unsqueeze(target).expand(*tensor.shape[:target], size, *tensor.shape[target:])
