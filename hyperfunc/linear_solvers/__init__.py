"""Linear solvers for the adjoint system ``A^T u = dE/dw``, matrix-free on trees of any layout.

Each solver is a small frozen object. It sees a `LinearOperator` and a right-hand side as tuples of
leaves, works under ``torch.func.vmap`` (a task that has converged is frozen, with its own
``num_steps`` and result code), never looks at the operator's entries unless it says so, and
returns the iterate together with `hyperfunc.SolveStats`.
"""

# Here: one module a solver or family of solvers. May import ``optim``, ``_engine`` and what these
# stand on. A new solver is a frozen dataclass with the one method of `AbstractLinearSolver`, in a
# module of its own; for a short name, it gets a row of the table in ``transforms/_methods``.

from hyperfunc.linear_solvers._anderson import AndersonFixedPoint
from hyperfunc.linear_solvers._auto import Auto
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator
from hyperfunc.linear_solvers._dense import Dense
from hyperfunc.linear_solvers._gmres import GMRES
from hyperfunc.linear_solvers._krylov import CG, BiCGStab, LeastSquares, NormalCG
from hyperfunc.linear_solvers._nystrom import Nystrom
from hyperfunc.linear_solvers._pipelined import PipelinedCG
from hyperfunc.linear_solvers._preconditioners import (
    AbstractPreconditioner,
    JacobiPreconditioner,
    NystromPreconditioner,
)
from hyperfunc.linear_solvers._stationary import FixedPoint, Neumann, OneStep
from hyperfunc.linear_solvers._stochastic import StochasticAID
from hyperfunc.linear_solvers._wrappers import Blockwise, Damped, Fallback

__all__ = [
    "CG",
    "GMRES",
    "AbstractLinearSolver",
    "AbstractPreconditioner",
    "AndersonFixedPoint",
    "Auto",
    "BiCGStab",
    "Blockwise",
    "Damped",
    "Dense",
    "Fallback",
    "FixedPoint",
    "JacobiPreconditioner",
    "LeastSquares",
    "LinearOperator",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "OneStep",
    "PipelinedCG",
    "StochasticAID",
]
