"""Hypergradients in PyTorch, in the style of torch.func.

By task; the [guides](guides/index.html), in ``examples/guides`` of the repository, show each:

- **Tune a training loop**: `hypergrad`, `hypergrad_and_value` and `hypergrad_and_solution`, with an
  inner solver made by `minimize` and an optimiser of `hyperfunc.optim`, or by `iterate`; on
  minibatches, `stack_batches` and `batch_indices`. Methods that differentiate the steps:
  `ReverseUnroll`, `Reverse`, `ForwardMode`, `FirstOrder`
- **Tune what any program solves**, such as SciPy or scikit-learn: `from_numpy`. Methods that solve
  for the adjoint: `CG`, `PipelinedCG`, `NormalCG`, `LeastSquares`, `GMRES`, `BiCGStab`, `Dense`,
  `Neumann`, `FixedPoint`, `AndersonFixedPoint`, `OneStep`, `Nystrom`, `StochasticAID`; made of
  others: `Auto`, `Fallback`, `Damped`, `Blockwise`; to precede them: `JacobiPreconditioner`,
  `NystromPreconditioner`
- **Meta-learn**: `proximal` pulls towards a start, `task_map` goes over tasks,
  `mean_over_successes` leaves out those that failed, and `hyperfunc.distributed` spreads them
- **Make a solver differentiable**: `implicit_diff`
- **Constrain and regularise**: `gradient_descent_map` and `proximal_gradient_map`, with the
  operators of `hyperfunc.prox`
- **Train equilibrium models**: `EquilibriumLayer`, `jacobian_frobenius_squared`,
  `hyperfunc.fixed_point_solvers`
- **Learn on minibatches**, everything at once: `hyperfunc.bilevel`
- **Use modules of torch**: `functional`, `module_map`, `checkpoint`; losses of networks:
  `composed`; into `.grad`: `assign_grads`
- **Ask whether it is right, and which method fits**: `check_hypergrad` gives a `HypergradCheck`,
  `diagnose` a `Diagnosis`, and `ErrorBound` a `HypergradBound`
- **Read what a call reports**: `Solution`, `SolveStats`, `ChoiceStats`, `SolverAux`, `RESULTS`;
  what it raises or warns of: `HypergradError`, `ConvergenceWarning`

>>> def inner_loss(w, reg, x):  # what is solved
...     return ((w - x) ** 2).sum() + reg * (w**2).sum()
>>> def outer_loss(w, reg, x):  # what is to be small
...     return ((w - 1) ** 2).sum()
>>> @hf.hypergrad(outer_loss=outer_loss, inner_loss=inner_loss)
... def solve(reg, x):
...     return x / (1 + reg)
>>> solve(torch.tensor(1.0), torch.tensor([2.0, 4.0]))
tensor(-2.)
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
