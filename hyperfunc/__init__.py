"""Hypergradients in PyTorch, in the style of torch.func.

By task; the [guides](guides/index.html), in ``examples/guides`` of the repository, show each:

- derivatives through an inner problem: `hypergrad`, `hypergrad_and_value`,
  `hypergrad_and_solution`; through a solver of any kind: `implicit_diff`
- inner solvers: `minimize` with an optimiser of `hyperfunc.optim`, `iterate`, `from_numpy`;
  minibatches: `stack_batches`, `batch_indices`; inner losses: `proximal`, `composed`; constraints:
  `proximal_gradient_map` with `hyperfunc.prox`
- methods that solve for the adjoint: `CG`, `NormalCG`, `GMRES`, `BiCGStab`, `Dense`, `Auto` and
  their kin
- methods that differentiate steps: `ReverseUnroll`, `Reverse`, `ForwardMode`, `FirstOrder`
- modules as functions: `functional`, `module_map`, `checkpoint`; into `.grad`: `assign_grads`
- many tasks: `task_map`, `mean_over_successes`; many processes: `hyperfunc.distributed`
- fixed points: `EquilibriumLayer`, `hyperfunc.fixed_point_solvers`
- everything at once, on minibatches: `hyperfunc.bilevel`
- is it right, and which method fits: `check_hypergrad`, `diagnose`
- what a call reports: `Solution`, `SolveStats`, `RESULTS`, `HypergradError`, `ConvergenceWarning`
"""

# Here: the public names. The rooms of the package and who may import whom are the table in
# ``tests/test_architecture.py``.

from hyperfunc import bilevel, distributed, fixed_point_solvers, optim, prox
from hyperfunc._engine.convergence import ConvergenceWarning
from hyperfunc._engine.results import RESULTS, ChoiceStats, HypergradError, Solution, SolveStats
from hyperfunc._engine.successes import mean_over_successes
from hyperfunc._rule.error_bound import ErrorBound, HypergradBound
from hyperfunc.diagnostics import Diagnosis, HypergradCheck, check_hypergrad, diagnose
from hyperfunc.equilibrium import EquilibriumLayer, jacobian_frobenius_squared
from hyperfunc.inner_solvers import (
    SolverAux,
    batch_indices,
    composed,
    from_numpy,
    gradient_descent_map,
    iterate,
    minimize,
    proximal_gradient_map,
    stack_batches,
)
from hyperfunc.inner_solvers._proximal import proximal
from hyperfunc.iterative import FirstOrder, ForwardMode, Reverse, ReverseUnroll, checkpoint
from hyperfunc.linear_solvers import (
    CG,
    GMRES,
    AndersonFixedPoint,
    Auto,
    BiCGStab,
    Blockwise,
    Damped,
    Dense,
    Fallback,
    FixedPoint,
    JacobiPreconditioner,
    LeastSquares,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    OneStep,
    PipelinedCG,
    StochasticAID,
)
from hyperfunc.modules import assign_grads, functional, module_map
from hyperfunc.task_map import task_map
from hyperfunc.transforms._hypergrad import (
    hypergrad,
    hypergrad_and_solution,
    hypergrad_and_value,
    implicit_diff,
)

__all__ = [
    "CG",
    "GMRES",
    "RESULTS",
    "AndersonFixedPoint",
    "Auto",
    "BiCGStab",
    "Blockwise",
    "ChoiceStats",
    "ConvergenceWarning",
    "Damped",
    "Dense",
    "Diagnosis",
    "EquilibriumLayer",
    "ErrorBound",
    "Fallback",
    "FirstOrder",
    "FixedPoint",
    "ForwardMode",
    "HypergradBound",
    "HypergradCheck",
    "HypergradError",
    "JacobiPreconditioner",
    "LeastSquares",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromPreconditioner",
    "OneStep",
    "PipelinedCG",
    "Reverse",
    "ReverseUnroll",
    "Solution",
    "SolveStats",
    "SolverAux",
    "StochasticAID",
    "assign_grads",
    "batch_indices",
    "bilevel",
    "check_hypergrad",
    "checkpoint",
    "composed",
    "diagnose",
    "distributed",
    "fixed_point_solvers",
    "from_numpy",
    "functional",
    "gradient_descent_map",
    "hypergrad",
    "hypergrad_and_solution",
    "hypergrad_and_value",
    "implicit_diff",
    "iterate",
    "jacobian_frobenius_squared",
    "mean_over_successes",
    "minimize",
    "module_map",
    "optim",
    "prox",
    "proximal",
    "proximal_gradient_map",
    "stack_batches",
    "task_map",
]
