"""What drives an iteration in cycles, and holds what its recurrence says against the residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.results import RESULTS, UNFINISHED, code_where
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import Bounds, LinearOperator, Solved, no_steps

COARSEST = torch.finfo(torch.bfloat16).eps  # what products may be rounded to
FEW = 8  # entries
SLACK = 4.0  # times what rounding does to a residual, up to which it counts as zero


class State(NamedTuple):
    """Iterate, residual, its squared norm, steps so far, and whether to go on.

    Tensors, or numbers where the bounds are. At the end of a cycle ``rs`` and ``active`` are what
    the recurrence says, and ``r`` is not used. ``accepted``: where it broke down,
    its iterate is an answer all the same, as if it were out of steps. ``memory``: what the method
    takes from one cycle to the next.
    """

    x: Leaves
    r: Leaves
    rs: Any
    num_steps: Any
    active: Any
    accepted: Any = False
    memory: Leaves = ()


Cycle: TypeAlias = Callable[[State, Bounds, Any], tuple[State, Any]]
"""``(start, bounds, most steps) -> (end, steps tried)``: until none is active, or for a while."""


class _Progress(NamedTuple):
    """The state after some cycles, the codes of tasks that end there or -1, and the steps left."""

    state: State
    verdict: Tensor
    left: Any


def begin(
    solver: Any, operator: LinearOperator, b: Leaves, x0: Leaves | None, atol: Any = None
) -> tuple[State, Bounds]:
    """The better of ``x0`` and zeros, and the bounds on what starts there; ``atol`` may differ."""
    x, r = trees.zeros_like(b), b
    if x0 is not None:
        residual = operator.residual(x0, b)
        better = trees.dot(residual, residual) < trees.dot(b, b)
        x, r = trees.where(better, x0, x), trees.where(better, residual, b)
    rs = trees.dot(r, r)
    bounds = Bounds.make(solver.rtol, solver.atol if atol is None else atol, b, rs)
    return State(x, r, rs, no_steps(rs), bounds.open(rs)), bounds


def run_cycles(
    solver: Any,
    operator: LinearOperator,
    b: Leaves,
    start: State,
    bounds: Bounds,
    cycle: Cycle,
    *,
    always: bool = False,
    retry: bool = False,
    restarts: bool = False,
) -> Solved:
    """Run cycles until the residual itself meets the tolerance, or one gains too little.

    One product at the end of each finds the residual. It is below the tolerance, or as small as
    `rounding` lets it be, or the next cycle starts from there, or that is stagnation. A fixed
    number of steps ends without this product, unless it is ``always`` to be taken. With ``retry``
    what broke down starts again too, as it may only have drifted.

    Compiled code holds a loop over cycles where a method ``restarts``, and else one of them: where
    another is called for, the code is `UNFINISHED`.
    """
    start = bounds.as_tensors(start)

    def advance(_: Any, before: _Progress) -> _Progress:
        end, taken = cycle(before.state, bounds, before.left)
        left = before.left - taken
        end = bounds.as_tensors(end)
        return _check(operator, b, before._replace(left=left), end, bounds, retry)

    progress = _Progress(start, torch.full_like(start.rs, -1, dtype=torch.int64), solver.maxiter)
    kept = loop.is_kept(start)
    if bounds.adaptive and kept and restarts:
        progress = progress._replace(left=bounds.tensor(solver.maxiter, torch.int64))
    if bounds.adaptive and (restarts or not kept):
        progress, _ = loop.repeat(advance, progress, None, lambda p: p.state.active & (p.left > 0))
    elif bounds.adaptive and progress.left:
        progress = advance(0, progress)
    while not bounds.adaptive and progress.left:
        end, taken = cycle(progress.state, bounds, progress.left)
        end = bounds.as_tensors(end)
        # a loop that is kept has taken all of its steps
        left = progress.left - taken if isinstance(taken, int) else 0
        progress = progress._replace(left=left)
        if left or always:
            progress = _check(operator, b, progress, end, bounds, retry)
        else:
            progress = progress._replace(state=end)
    state, verdict, left = progress
    stats = bounds.stats(state.num_steps, state.rs, state.active)
    result = torch.where(verdict >= 0, verdict, stats.result)
    accepted = state.accepted & (result == int(RESULTS.breakdown))
    result = code_where(accepted, RESULTS.max_steps, result)
    if bounds.adaptive and kept:
        result = torch.where(state.active & (left > 0), UNFINISHED, result)
    return state.x, stats._replace(result=result)


def _check(
    operator: LinearOperator, b: Leaves, before: _Progress, end: State, bounds: Bounds, retry: bool
) -> _Progress:
    """What there is after a cycle, by the residual itself."""
    start, verdict, left = before
    r = operator.residual(end.x, b)
    rs = trees.dot(r, r)
    if not bounds.adaptive:  # what has converged before is none the worse for rounding
        rs_now = torch.where(end.active, rs, end.rs)
        active = end.active & bounds.open(rs_now)
        return _Progress(end._replace(r=r, rs=rs_now, active=active), verdict, left)
    said_solved = start.active & (end.rs <= bounds.converged)
    # a recurrence that blew up tells more than the residual it leaves behind
    kept = start.active & (said_solved | (end.rs < bounds.diverged))
    rs_now = torch.where(start.active, torch.where(kept, rs, end.rs), start.rs)
    missed = kept & (rs > bounds.converged) & torch.isfinite(rs)
    unsure = missed & (said_solved | end.active)
    # GMRES may gain little in many cycles; a recurrence that has drifted must not do so for long
    little = start.rs * (1 - trees.epsilon(b) ** 0.5)
    gained = rs < torch.where(end.active, little, start.rs / 4)
    wanted = unsure | (missed & (left > 0)) if retry else unsure
    again = wanted & (gained | (end.active & (left == 0)))
    doubtful = missed & ~(again & end.active)

    def excuse(found: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rs_now, again, verdict = found
        excused = doubtful & (rs <= rounding(operator, x, r, b, bounds.bb))
        again = again & ~excused
        verdict = torch.where(unsure & ~again, int(RESULTS.stagnation), verdict)
        verdict = torch.where(excused, int(RESULTS.success), verdict)
        # what it called solved may be worse than its start
        worse = said_solved & ~excused & ~(rs <= start.rs)
        return trees.where(worse, start.x, x), torch.where(worse, start.rs, rs_now), again, verdict

    x, rs_now, again, verdict = loop.when(doubtful, excuse, (end.x, rs_now, again, verdict))
    active = again & bounds.open(rs)
    return _Progress(end._replace(x=x, r=r, rs=rs_now, active=active), verdict, left)


def rounding(operator: LinearOperator, x: Leaves, r: Leaves, b: Leaves, bb: Tensor) -> Tensor:
    """The squared norm of a residual r that is due to rounding, by two products.

    ``SLACK`` times what relative changes of the size of ``eps``, with random signs, do to
    ``b - A x``; but no more than ``eps^0.25 ||b||``. Where products are in a lower precision than
    b, as by autocast, ``eps`` is what they show: A x is not the sum of the products of two halves.
    With few entries the changes may cancel, as A x does, and other signs, by two products more, are
    tried too.
    """
    eps, bound = trees.epsilon(b), torch.zeros_like(bb)
    seeds = (0, 2) if sum(leaf.numel() for leaf in b) <= FEW else (0,)
    for seed in seeds:
        signs = random_signs(x, seed)
        positive = tuple(leaf * (sign > 0) for leaf, sign in zip(x, signs, strict=True))
        first, second = operator.mv(positive), operator.mv(trees.sub(x, positive))
        change = trees.sub(first, second)
        defect = trees.sub(trees.add(first, second), trees.sub(b, r))
        scale = trees.dot(change, change) + bb
        shown = trees.dot(defect, defect) / torch.where(scale > 0, scale, 1.0)
        squared = shown.clamp(eps**2, max(eps, COARSEST) ** 2)
        most = squared**0.25 * bb
        bound = torch.maximum(bound, torch.minimum(SLACK**2 * squared * scale, most))
    return bound
