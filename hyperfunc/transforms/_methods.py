"""The table of methods: from the short names to the objects."""

from __future__ import annotations

import difflib
from typing import Any

from hyperfunc import iterative, linear_solvers
from hyperfunc._engine.shown import show
from hyperfunc.linear_solvers import AbstractLinearSolver

METHODS: dict[str, type] = {
    "cg": linear_solvers.CG,
    "normal_cg": linear_solvers.NormalCG,
    "fixed_point": linear_solvers.FixedPoint,
    "neumann": linear_solvers.Neumann,
    "least_squares": linear_solvers.LeastSquares,
    "dense": linear_solvers.Dense,
    "one_step": linear_solvers.OneStep,
    "gmres": linear_solvers.GMRES,
    "bicgstab": linear_solvers.BiCGStab,
    "nystrom": linear_solvers.Nystrom,
    "stoch_aid": linear_solvers.StochasticAID,
    "auto": linear_solvers.Auto,
    "reverse_unroll": iterative.ReverseUnroll,
    "reverse": iterative.Reverse,
    "forward": iterative.ForwardMode,
    "first_order": iterative.FirstOrder,
}

# what is looked for under the name of a paper
PAPERS = {
    "maml": "reverse_unroll",
    "anil": "reverse_unroll",
    "fomaml": "first_order",
    "imaml": "cg",
}


def resolve_method(method: Any) -> Any:
    """The method object for a method or its short name."""
    if isinstance(method, str):
        if method in METHODS:
            return METHODS[method]()
        key = method.lower().replace("-", "_")
        near = [PAPERS[key]] if key in PAPERS else difflib.get_close_matches(key, METHODS)
        advice = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"unknown method {show(method)}. {advice}Known methods: {', '.join(map(repr, METHODS))}"
        )
    if isinstance(method, type) and method in METHODS.values():
        raise TypeError(
            f"method={method.__name__} is a class; expected an object. "
            f"Write method=hf.{method.__name__}()"
        )
    if isinstance(method, AbstractLinearSolver) or callable(getattr(method, "solution_map", None)):
        return method
    raise TypeError(
        f"method={show(method)} is not a method; expected one of {', '.join(map(repr, METHODS))} "
        f"or an object such as hf.CG(maxiter=20)"
    )


def is_implicit(method: Any) -> bool:
    """Whether a method is a linear solver for the implicit rule (else it differentiates steps)."""
    return isinstance(method, AbstractLinearSolver)


def unrolls(method: Any) -> bool:
    """Whether a method gives what differentiating all steps gives."""
    if isinstance(method, iterative.Reverse):
        return method.last is None
    return isinstance(method, iterative.ReverseUnroll)
