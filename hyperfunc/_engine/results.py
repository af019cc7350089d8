"""What a solve reports: result codes, statistics, and the solution that carries them."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine.shown import show
from hyperfunc._torch import batching
from hyperfunc._torch.containers import loadable
from hyperfunc._types import TensorTree


class RESULTS(enum.IntEnum):
    """Outcome of a solve; the code travels as an integer tensor, ``message`` is its explanation.

    In order, from 0: ``success``, ``max_steps``, ``breakdown``, ``nonfinite``, ``divergence`` and
    ``stagnation``. Those above ``max_steps`` are failures, which raise unless ``throw=False``.

    Example:
        >>> hf.RESULTS(0)
        <RESULTS.success: 0>
        >>> hf.RESULTS.breakdown.message
        'the recurrence broke down: the operator is not what the method assumes ...'
    """

    message: str

    def __new__(cls, code: int, message: str) -> RESULTS:
        member = int.__new__(cls, code)
        member._value_ = code
        member.message = message
        return member

    @classmethod
    def _missing_(cls, value: object) -> None:
        codes = ", ".join(map(str, map(int, cls)))
        raise ValueError(
            f"RESULTS has no code {show(value)}; expected one of {codes}. Of many solves write "
            f"[hf.RESULTS(code) for code in stats.result.tolist()]"
        )

    success = 0, "the solve succeeded"
    max_steps = 1, "the step limit was reached before the tolerance; raise maxiter or rtol"
    breakdown = (
        2,
        "the recurrence broke down: the operator is not what the method assumes "
        "(CG needs a symmetric positive definite one and Nystrom a symmetric one; NormalCG, GMRES "
        "and Dense need an invertible one, or a system with a solution, on which BiCGStab may "
        "break down all the same). An inner loss with negative curvature at these params is no "
        "minimum: take more inner steps; or write inner_loss as composed(model, loss), whose "
        "curvature is never negative (with hf.proximal: proximal(composed(model, loss), weight)); "
        'or use Damped, GMRES or CG(negative_curvature="stop"); and where the system has no '
        "solution, LeastSquares",
    )
    nonfinite = 3, "non-finite values (NaN or Inf) appeared"
    divergence = (
        4,
        "the residual grew instead of shrinking: the iteration is not a contraction here, or the "
        "operator is nearly singular (use a smaller step_size, a method that needs no contraction: "
        "NormalCG, GMRES, Dense, or for a singular operator Damped)",
    )
    stagnation = (
        5,
        "the residual stopped shrinking above the tolerance "
        "(raise restart or rtol, add a preconditioner, or use NormalCG)",
    )

    @property
    def failed(self) -> bool:
        """Whether this outcome raises by default."""
        return self > RESULTS.max_steps


@loadable
class SolveStats(NamedTuple):
    """What an iterative solve did; every field is a 0-d tensor (batched under ``vmap``).

    Attributes:
        num_steps: int64, the steps that were taken.
        residual_norm: Euclidean norm of the last residual, in float32 at least.
        result: int64, a code of `RESULTS`.

    Example:
        >>> gradient = hf.hypergrad_and_solution(
        ...     lambda h: h, lambda w, h: (w**2).sum(), inner_loss=lambda w, h: ((w - h) ** 2).sum()
        ... )
        >>> stats = gradient(torch.ones(2))[1].stats
        >>> stats.num_steps, hf.RESULTS(int(stats.result))
        (tensor(1), <RESULTS.success: 0>)
    """

    num_steps: Tensor
    residual_norm: Tensor
    result: Tensor


@loadable
class ChoiceStats(NamedTuple):
    """`SolveStats` of a solver that chooses among others, and its choice.

    Attributes:
        num_steps: as in `SolveStats`, over all solvers that were tried.
        residual_norm: as in `SolveStats`.
        result: as in `SolveStats`.
        choice: int64, whose answer it is: of `hyperfunc.Auto`, an index into ``Auto.CHOICES``; of
            `hyperfunc.Fallback`, 0 for ``first`` and 1 for ``then``.

    Example:
        >>> gradient = hf.hypergrad_and_solution(
        ...     lambda h: h, lambda w, h: w**2, inner_loss=lambda w, h: (w - h) ** 2, method="auto"
        ... )
        >>> stats = gradient(torch.tensor(1.0))[1].stats
        >>> hf.Auto.CHOICES[int(stats.choice)]
        'cg'
    """

    num_steps: Tensor
    residual_norm: Tensor
    result: Tensor
    choice: Tensor


@loadable
class Solution(NamedTuple):
    """All that one hypergradient computation found; a field without a meaning is ``()``.

    Attributes:
        params: the inner solution ``w*``.
        value: the outer loss there, a scalar.
        aux: the second output of an outer loss with ``has_aux=True``.
        adjoint: ``u`` with ``A^T u = dE/dw``, a tree like ``params`` (zeros for integers); pass it
            back as ``adjoint_init`` to warm-start the next solve.
        stats: `SolveStats` of the linear solve; `ChoiceStats` for `hyperfunc.Auto` and
            `hyperfunc.Fallback`.
        error_bound: the `hyperfunc.HypergradBound` that ``error_bound=`` asked for.
        solver_aux: the second output of an inner solver with ``solver_has_aux=True``, detached,
            numbers as tensors; for `hyperfunc.minimize` with ``has_aux`` or ``trace`` a
            `hyperfunc.SolverAux`; ``()`` without.

    Example:
        >>> gradient = hf.hypergrad_and_solution(
        ...     lambda h: 2 * h, lambda w, h: w**2, inner_loss=lambda w, h: (w - 2 * h) ** 2
        ... )
        >>> hypergradient, solution = gradient(torch.tensor(1.0))
        >>> hypergradient, solution.params, solution.value, solution.adjoint
        (tensor(8.), tensor(2.), tensor(4.), tensor(2.))
    """

    params: TensorTree
    value: Tensor
    aux: Any
    adjoint: TensorTree
    stats: SolveStats | ChoiceStats | tuple[()]
    error_bound: Any = ()
    solver_aux: Any = ()


# The code of a solve that compiled code did not see to its end: what runs it does so by Python.
UNFINISHED = 100

_MOST_NAMED = 8  # tasks in a message


class HypergradError(RuntimeError):
    """A solve failed: non-finite values, breakdown or divergence; the message says which.

    Example:
        >>> gradient = hf.hypergrad(
        ...     lambda h: h, lambda w, h: w**2, inner_loss=lambda w, h: -((w - h) ** 2)
        ... )
        >>> gradient(torch.tensor(1.0))  # at a maximum, where CG breaks down
        Traceback (most recent call last):
            ...
        hyperfunc.HypergradError: the linear solve with CG(...) failed: the recurrence broke down...
    """

    __module__ = "hyperfunc"  # the name that users catch it by


def explain(code: RESULTS, kind: str) -> str:
    """A code's message, with advice for a condition of some kind, such as ``"fixed_point"``."""
    head, loss, _ = code.message.partition(" An inner loss with")
    if not loss or kind != "fixed_point":
        return code.message
    return (
        f"{head} The derivative of a map is seldom symmetric: use hf.GMRES() or hf.BiCGStab(), "
        f"and where the system has no solution, LeastSquares"
    )


def code_where(mask: Tensor, code: RESULTS | Tensor, other: RESULTS | Tensor) -> Tensor:
    """A code where the mask holds, else the other one; either may be a tensor of codes."""
    codes: list[Any] = [int(c) if isinstance(c, RESULTS) else c for c in (code, other)]
    return torch.where(mask, codes[0], codes[1])


def find_failure(
    result: Tensor, accepted: RESULTS = RESULTS.max_steps, what: str = "tasks"
) -> tuple[RESULTS, str] | None:
    """The first code beyond the accepted ones and which tasks have such; None if all are fine."""
    failed = result > int(accepted)
    if not batching.any_true(failed.sum()):
        return None
    codes = [code for code in RESULTS if code > accepted]
    code = next(c for c in codes if batching.count_true((result == int(c)).sum()))
    return code, of_tasks(failed, what)


def of_tasks(failed: Tensor, what: str = "tasks") -> str:
    """How many of the tasks a flag holds for, and which they are; nothing for a single task."""
    total = batching.count_tasks(failed.sum()) * failed.numel()
    if total == 1:
        return ""
    found = batching.true_indices(failed.squeeze() if failed.numel() == 1 else failed)
    names = [str(index[0] if len(index) == 1 else index) for index in found[:_MOST_NAMED]]
    more = ", ..." if len(found) > _MOST_NAMED else ""
    return f" for {len(found)} of {total} {what} (index {', '.join(names)}{more})"
