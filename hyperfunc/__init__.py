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
from hyperfunc.inner_solvers import gradient_descent_map, iterate, minimize
from hyperfunc.iterative import ForwardMode, Reverse, ReverseUnroll, checkpoint
from hyperfunc.linear_solvers import (
    CG,
    GMRES,
    AndersonFixedPoint,
    BiCGStab,
    Blockwise,
    Damped,
    Dense,
    Fallback,
    FixedPoint,
    JacobiPreconditioner,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    OneStep,
    StochasticAID,
)
from hyperfunc.modules import assign_grads, functional, module_map
from hyperfunc.proximal import proximal

__all__ = [
    "CG",
    "GMRES",
    "RESULTS",
    "AndersonFixedPoint",
    "BiCGStab",
    "Blockwise",
    "Damped",
    "Dense",
    "Fallback",
    "FixedPoint",
    "ForwardMode",
    "HypergradError",
    "JacobiPreconditioner",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "OneStep",
    "Reverse",
    "ReverseUnroll",
    "Solution",
    "SolveStats",
    "StochasticAID",
    "assign_grads",
    "bilevel",
    "checkpoint",
    "functional",
    "gradient_descent_map",
    "hypergrad",
    "hypergrad_and_solution",
    "hypergrad_and_value",
    "implicit_diff",
    "iterate",
    "minimize",
    "module_map",
    "optim",
    "proximal",
]
