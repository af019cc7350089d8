"""Warnings of solves that did not converge where nobody gets to see their statistics."""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from hyperfunc._engine.results import RESULTS, SolveStats, find_failure
from hyperfunc._torch import batching

# Where the code of torch and of this package lies.
_INTERNAL = tuple(
    os.path.join(path, "")
    for path in (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
)


class ConvergenceWarning(UserWarning):
    """A solve did not reach its tolerance, and its statistics cannot be seen.

    So it is in the backward pass of an `EquilibriumLayer` and of a function made by
    `implicit_diff`, and in inner solvers made by ``hf.fixed_point_solvers``. It is shown once for
    each line of code that such a call was made from. To get an error instead, write
    ``warnings.simplefilter("error", hf.ConvergenceWarning)``.

    Attributes:
        num_steps: how many steps were taken, the most over all tasks.
        residual_norm: Euclidean norm of the last residual, the largest over all tasks.

    Example:
        >>> import warnings
        >>> loss = lambda w, h: (torch.tensor([1.0, 10.0]) * (w - h) ** 2).sum()
        >>> solve = hf.implicit_diff(lambda h: h.clone(), inner_loss=loss, method=hf.CG(maxiter=1))
        >>> h = torch.ones(2, requires_grad=True)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", hf.ConvergenceWarning)
        ...     solve(h).sum().backward()
        >>> caught[0].category, caught[0].message.num_steps
        (<class 'hyperfunc.ConvergenceWarning'>, 1)
    """

    __module__ = "hyperfunc"  # the name that users filter it by

    def __init__(self, text: str, num_steps: int = 0, residual_norm: float = float("nan")) -> None:
        super().__init__(text)
        self.num_steps = num_steps
        self.residual_norm = residual_norm


def warn_unless_converged(
    solver: Any,
    stats: SolveStats,
    solve: str,
    remedy: Callable[[RESULTS], str],
    tasks: str = "tasks",
) -> None:
    """Warn of a solve, which has a name, unless it was a success or had no tolerance to reach."""
    has_tolerance = (getattr(solver, "rtol", None), getattr(solver, "atol", None)) != (0, 0)
    if torch.compiler.is_compiling() or not has_tolerance:
        return
    failure = find_failure(stats.result, RESULTS.success, tasks)
    if failure is None:
        return
    code, which = failure
    steps, residual = map(batching.largest, (stats.num_steps, stats.residual_norm))
    text = (
        f"{solve} did not converge{which}: it took {steps:.0f} steps and left a residual of norm "
        f"{residual:.1e} ({code.name}). {remedy(code)}"
    )
    filename, line, module, registry = _call_site()
    # What is shown once for each line is shown once for each text too: so the text stays.
    site = (ConvergenceWarning, line, solve)
    text = registry.get(site, text)
    warning: Any = ConvergenceWarning(text, int(steps), residual)
    warnings.warn_explicit(warning, None, filename, line, module, registry)  # type: ignore[arg-type]
    registry[site] = text  # afterwards, for new filters clear the registry


def warn_at_call_site(warning: Warning) -> None:
    """Warn once for each line of a user's code that a call was made from."""
    filename, line, module, registry = _call_site()
    warnings.warn_explicit(warning, None, filename, line, module, registry)  # type: ignore[arg-type]


def _call_site() -> tuple[str, int, str, dict[object, str]]:
    """The innermost line of code that is neither torch's nor this package's, and its registry."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
    if frame is None:  # autograd may run in a thread of its own
        frame = sys._getframe(1)
    known = frame.f_globals
    registry = known.setdefault("__warningregistry__", {})
    return frame.f_code.co_filename, frame.f_lineno, known.get("__name__", "unknown"), registry
