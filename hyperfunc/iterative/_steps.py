"""The steps of one call of an inner solver as functions of flat operands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.flat import split
from hyperfunc._engine.operations import Recorded
from hyperfunc._rule.conditions import Arguments
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.inner_solvers._solvers import FlatSteps
from hyperfunc.iterative._products import STEP
from hyperfunc.iterative._segment import RngAutocastState, Segment


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """The steps of one call: functions of flat operands, those that all of them see first."""

    flat: FlatSteps
    arguments: Arguments
    inputs_spec: trees.TreeSpec
    num_steps: int
    num_theta: int  # tensors of hparams and args; then come the entry state and the vmap marker
    num_entry: int
    num_fixed: int

    @property
    def num_operands(self) -> int:
        return self.num_fixed + self.inputs_spec.num_leaves

    def start(self, fixed: Leaves) -> Leaves:
        """The state before the first step that is differentiated."""
        theta, rest = split(fixed, self.num_theta)
        if self.num_entry:
            return rest[: self.num_entry]
        hparams, *args = self.arguments.unflatten(theta)
        return self.flat.start(hparams, tuple(args))

    def advance(self, active: Tensor | None, state: Leaves, fixed: Leaves, row: Leaves) -> Leaves:
        return self.bind(fixed)(active, state, row)

    def bind(self, fixed: Leaves) -> Callable[[Tensor | None, Leaves, Leaves], Leaves]:
        """The function that takes a step, of the active tasks, with a row of the inputs."""
        hparams, *args = self.arguments.unflatten(fixed[: self.num_theta])
        advance = self.flat.bind(hparams, tuple(args))
        spec = self.inputs_spec
        return lambda active, state, row: advance(
            active, state, (trees.unflatten(spec, row),) if row else ()
        )

    def advance_block(
        self, size: int, _: Tensor | None, state: Leaves, fixed: Leaves, rows: Leaves
    ) -> Leaves:
        advance = self.bind(fixed)
        for row in self._rows(rows, size):
            state = advance(None, state, row)
        return state

    def run(self, operands: Leaves) -> Leaves:
        fixed, series = split(operands, self.num_fixed)
        start = self.start(fixed)
        return self.flat.run(self.bind(fixed), start, self._rows(series, self.num_steps))[0]

    def chain(self, *operands: Tensor) -> Leaves:
        """The result by steps that are segments of their own, differentiable to every order."""
        fixed, series = split(operands, self.num_fixed)

        def advance(active: Tensor | None, state: Leaves, row: Leaves) -> Leaves:
            flags = () if active is None else (active,)
            sizes = len(flags), len(state), len(fixed), len(row)

            def flat(*tensors: Tensor) -> Leaves:
                flag, state, fixed, row, _ = split(tensors, *sizes)
                return self.advance(flag[0] if flag else None, state, fixed, row)

            tensors = (*flags, *state, *fixed, *row, *batching.vmap_marker())
            rng_autocast = RngAutocastState.capture((*tensors, *self.arguments.frame.constants))
            segment = Segment(flat, rng_autocast, len(tensors), STEP)
            outputs: Leaves = Recorded.apply(segment, *tensors)
            return outputs

        state, _ = self.flat.run(advance, self.start(fixed), self._rows(series, self.num_steps))
        return state[: self.flat.num_outputs]

    def _rows(self, series: Leaves, num_steps: int) -> Iterable[Leaves]:
        if not series:
            return [()] * num_steps
        return zip(*(leaf.unbind(0) for leaf in series), strict=True)
