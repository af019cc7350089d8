"""The methods: each turns an inner solver into one with the same values and its derivatives."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.operations import Recorded
from hyperfunc._engine.shown import show
from hyperfunc._rule.conditions import Arguments
from hyperfunc._torch import batching, sharding, tracking
from hyperfunc._types import InnerSolver, Leaves
from hyperfunc.inner_solvers._solvers import FlatSteps, IterativeSolver, block_size
from hyperfunc.iterative._compiled import Compiled
from hyperfunc.iterative._loop import Loop
from hyperfunc.iterative._segment import RngAutocastState
from hyperfunc.iterative._steps import Steps
from hyperfunc.iterative._storage import Schedule


@dataclasses.dataclass(frozen=True)
class ReverseUnroll:
    """Plain differentiation through the inner solver, whatever its code: ``"reverse_unroll"``.

    The whole graph is kept, so memory grows with the number of steps; nothing is computed twice.
    A solver that is a closed form gives the exact hypergradient.

    Example:
        >>> solver = hf.iterate(lambda w, h: h * w + 1, 50, init=lambda h: torch.zeros(()))
        >>> hf.hypergrad(solver, lambda w, h: w, method=hf.ReverseUnroll())(torch.tensor(0.5))
        tensor(4.)

    References:
        Maclaurin, Duvenaud and Adams, arXiv 1502.03492; Franceschi et al., arXiv 1703.01785.
    """

    def solution_map(self, inner_solver: InnerSolver) -> InnerSolver:
        """The solver itself; or with compiled steps, those, and what their products need."""
        solver = inner_solver
        if not isinstance(solver, IterativeSolver) or solver.compiler is None or solver.can_stop:
            return solver
        return functools.partial(_solve, solver, _Plan(keeps_values=True))


@dataclasses.dataclass(frozen=True)
class Reverse:
    r"""Reverse mode over replayed steps, with bounded memory: ``"reverse"``.

    With the adjoint $u_T = \partial_w E$ the steps are gone through backwards,

    $$u_t = (\partial_w \varphi_t)^\top u_{t+1}, \qquad
      \nabla f = \partial_\lambda E + \sum_t (\partial_\lambda \varphi_t)^\top u_{t+1},$$

    where $\varphi_t$ is differentiated at the iterate $w_t$. Some iterates are kept, the others
    are computed again from the last one that was, and never more than one step has a graph. The
    result is that of `ReverseUnroll`, with the minibatches and random numbers of the forward pass.
    Module buffers (the statistics of a batch norm) would be advanced again: keep them out of the
    step. Second derivatives replay each step too, but keep all iterates.

    If the solver compiles its steps, what is run, kept and differentiated are blocks of up to four
    of them. ``last`` is then best a multiple of 4, and the steps before those are not compiled.

    Args:
        checkpoint: which iterates are kept. An integer $k \ge 1$ keeps each $k$-th and, while
            going backwards, those in between two of them: $T/k + k$ iterates. ``"binomial"`` keeps
            ``slots`` iterates, the first one included, where the fewest steps are repeated.
            ``"sqrt"`` is that with about $\sqrt{T/2}$: each step is run at most three times, and
            once more with its graph.
        slots: for ``"binomial"``: how many, at least 1; None takes $\log_2 T$, for which each step
            is repeated a handful of times.
        last: differentiate the last ``last`` steps only, at least 1 (truncated reverse mode): what
            comes before them is a constant. At a fixed point that is a truncated Neumann series.

    Raises:
        TypeError, ValueError: for values of other types, and outside these ranges.

    Example:
        >>> solver = hf.iterate(lambda w, h: h * w + 1, 50, init=lambda h: torch.zeros(()))
        >>> outer_loss = lambda w, h: w
        >>> hf.hypergrad(solver, outer_loss, method=hf.Reverse("sqrt"))(torch.tensor(0.5))
        tensor(4.)
        >>> hf.hypergrad(solver, outer_loss, method=hf.Reverse(last=2))(torch.tensor(0.5))
        tensor(3.)

    References:
        Franceschi et al., arXiv 1703.01785; Shaban et al., arXiv 1810.10667 (truncation);
        Griewank and Walther, Algorithm 799: revolve, ACM TOMS 26 (2000).
    """

    checkpoint: int | Literal["sqrt", "binomial"] = 1
    slots: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str):
            check_count(self, "checkpoint", self.checkpoint, also="'sqrt', 'binomial' or ")
        elif self.checkpoint not in ("sqrt", "binomial"):
            raise ValueError(
                f"Reverse: checkpoint is {show(self.checkpoint)}; "
                f"expected 'sqrt', 'binomial' or an "
                f"integer >= 1"
            )
        for name, value in (("slots", self.slots), ("last", self.last)):
            if value is not None:
                check_count(self, name, value, also="None or ")
        if self.slots is not None and self.checkpoint != "binomial":
            raise ValueError(
                f"slots={self.slots} has no meaning with checkpoint={show(self.checkpoint)}. "
                f"Write Reverse(checkpoint='binomial', slots={self.slots})"
            )

    def solution_map(self, inner_solver: InnerSolver) -> InnerSolver:
        """The solver, with derivatives by replayed steps."""
        solver = _check_solver(inner_solver, self)
        if self.last is not None and solver.can_stop:
            raise ValueError(
                f"last={self.last} needs a fixed number of steps, but the inner solver stops "
                f"early. Drop rtol and atol from it, or last from {self!r}"
            )
        return functools.partial(_solve, solver, _Plan(self._schedule, last=self.last))

    def _schedule(self, num_steps: int) -> Schedule:
        if self.checkpoint == "sqrt":
            return Schedule(slots=max(1, math.ceil(math.sqrt(num_steps / 2))))
        if self.checkpoint == "binomial":
            return Schedule(slots=self.slots or max(1, num_steps.bit_length()))
        return Schedule(stride=int(self.checkpoint))


@dataclasses.dataclass(frozen=True)
class ForwardMode:
    r"""Forward accumulation of the derivative along the steps: ``"forward"``.

    $$Z_{t+1} = \partial_w \varphi_t\, Z_t + \partial_\lambda \varphi_t, \qquad
      \nabla f = \partial_\lambda E + Z_T^\top \partial_w E$$

    Memory does not grow with the number of steps, but $Z_t$ has one column for each entry of
    ``hparams``, and each costs a few times what a step costs: right for a handful of
    hyperparameters. For many, such as meta-parameters, take `Reverse`.

    Args:
        chunk_size: how many columns go along at a time, at least 1; the steps are run again for
            each chunk. None takes all columns at once.

    Raises:
        TypeError, ValueError: for a ``chunk_size`` that is not a positive integer.

    Example:
        >>> solver = hf.iterate(lambda w, h: h * w + 1, 50, init=lambda h: torch.zeros(()))
        >>> hf.hypergrad(solver, lambda w, h: w, method=hf.ForwardMode())(torch.tensor(0.5))
        tensor(4.)

    References:
        Franceschi, Donini, Frasconi and Pontil, arXiv 1703.01785.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count(self, "chunk_size", self.chunk_size, also="None or ")

    def solution_map(self, inner_solver: InnerSolver) -> InnerSolver:
        """The solver, with derivatives accumulated forwards."""
        solver = _check_solver(inner_solver, self)
        plan = _Plan(lambda _: Schedule(slots=1), chunk=self.chunk_size or sys.maxsize)

        def forward(hparams: Any, /, *args: Any) -> Any:
            if any(map(sharding.is_dtensor, trees.flatten((hparams, *args))[0])):
                raise ValueError(
                    f"{self!r} got a DTensor, for which torch has no forward mode. Use "
                    f"method=hf.Reverse() or an implicit method such as method='cg'"
                )
            return _solve(solver, plan, hparams, *args)

        return forward


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the last of so many steps (None: all) are differentiated; ``chunk`` is that of `Loop`."""

    schedule: Callable[[int], Schedule] = lambda _: Schedule(stride=1)
    chunk: int | None = None
    last: int | None = None
    keeps_values: bool = False  # those that products of compiled steps need


def _solve(solver: IterativeSolver, plan: _Plan, hparams: Any, /, *args: Any) -> Any:
    arguments, theta, _ = Arguments.flatten(hparams, args)
    inputs, inputs_spec = trees.flatten(solver.inputs)
    if not tracking.is_tracked((*theta, *inputs)):
        return solver(hparams, *args)
    flat = FlatSteps(solver)
    num_steps = min(plan.last or solver.num_steps, solver.num_steps)
    skipped = solver.num_steps - num_steps
    entry: Leaves = ()
    if skipped:
        constants = tracking.detach(theta)
        before = [leaf[:skipped] for leaf in tracking.detach(inputs)]
        inputs = [leaf[skipped:] for leaf in inputs]
        with torch.no_grad():
            prefix = Steps(flat, arguments, inputs_spec, skipped, len(theta), 0, len(theta))
            entry = tracking.detach(prefix.run((*constants, *before)))
    fixed = (*theta, *entry, *batching.vmap_marker())
    steps = Steps(flat, arguments, inputs_spec, num_steps, len(theta), len(entry), len(fixed))
    rng_autocast = RngAutocastState.capture((*theta, *inputs, *arguments.frame.constants))
    operands = (*fixed, *inputs)
    compiled = _compiled(solver, steps)
    if compiled is not None and plan.keeps_values:
        attached = (i for i, leaf in enumerate(operands) if tracking.is_attached(leaf))
        compiled = dataclasses.replace(compiled, kept=tuple(attached))
    loop = Loop(steps, plan.schedule(num_steps), plan.chunk, rng_autocast, compiled)
    return flat.result(Recorded.apply(loop, *operands))


def _compiled(solver: IterativeSolver, steps: Steps) -> Compiled | None:
    if solver.compiler is None or solver.can_stop or not steps.num_steps:
        return None
    key = (steps.arguments, steps.inputs_spec, steps.num_theta, steps.num_entry, steps.num_fixed)
    return Compiled(solver.compiler, solver.compiler.read(), block_size(steps.num_steps), key)


def _check_solver(inner_solver: Any, method: Any) -> IterativeSolver:
    if not isinstance(inner_solver, IterativeSolver):
        raise TypeError(
            f"{method!r} replays the steps of the inner solver, but {show(inner_solver)} does not "
            f"tell them. Make the solver with hf.iterate or hf.minimize, or use hf.ReverseUnroll()"
        )
    return inner_solver
