"""Conditions that compute nothing from hparams, whose derivative is zero whatever a solve finds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from hyperfunc._engine.results import HypergradError
from hyperfunc._rule.conditions import BoundCondition
from hyperfunc._torch import autodiff, tracking
from hyperfunc._types import Leaves

UNUSED = (
    "no derivative reaches hparams: {kind} computes nothing from them. An implicit method "
    "differentiates the solution of {kind}, so that hparams which the inner solver only starts "
    "from count for nothing. Use them in {kind}, for example by hf.proximal(loss, weight), which "
    "keeps the solution near them, differentiate the steps: method='reverse_unroll', or carry the "
    "outer gradient back to the start (first-order MAML): method='first_order'"
)


def is_used(bound: BoundCondition, w: Leaves, theta: Leaves, wrt: Sequence[int]) -> bool:
    """Whether a condition computes something from some of the tensors of theta at wrt."""
    n = len(w)

    def residual(*leaves: Tensor) -> Leaves:
        return bound.residual_at(leaves[:n], leaves[n:])

    return autodiff.uses(residual, tracking.detach((*w, *theta)), [n + i for i in wrt])


@contextlib.contextmanager
def failures_explained(
    bound: BoundCondition, w: Leaves, theta: Leaves, wrt: Sequence[int]
) -> Iterator[None]:
    """Where a linear solve that fails raises what no solve can mend, if hparams are not used."""
    try:
        yield
    except HypergradError as error:
        of_hparams = any(i < bound.arguments.num_hparams for i in wrt)
        if not of_hparams or is_used(bound, w, theta, wrt):
            raise
        raise ValueError(UNUSED.format(kind=bound.condition.kind)) from error
