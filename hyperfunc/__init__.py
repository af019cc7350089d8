"""Hypergradients in PyTorch, in the style of torch.func."""

from hyperfunc import bilevel, optim
from hyperfunc._hypergrad import (
    hypergrad,
    hypergrad_and_solution,
    hypergrad_and_value,
    implicit_diff,
)
from hyperfunc._implicit import HypergradError
from hyperfunc._results import RESULTS, Solution, SolveStats
from hyperfunc.linear_solvers import (
    CG,
    Dense,
    FixedPoint,
    Neumann,
    NormalCG,
    OneStep,
    StochasticAID,
)
from hyperfunc.modules import assign_grads, functional, module_map

__all__ = [
    "CG",
    "RESULTS",
    "Dense",
    "FixedPoint",
    "HypergradError",
    "Neumann",
    "NormalCG",
    "OneStep",
    "Solution",
    "SolveStats",
    "StochasticAID",
    "assign_grads",
    "bilevel",
    "functional",
    "hypergrad",
    "hypergrad_and_solution",
    "hypergrad_and_value",
    "implicit_diff",
    "module_map",
    "optim",
]
