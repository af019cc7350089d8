"""Inner solvers built from a step or from an optimiser: ``(hparams, *args) -> params``."""

# Here: steps, the loops over them, and losses with a proximal term. May import ``optim``, ``prox``,
# ``_compile`` and what these stand on. A new kind of step is a class with ``remember`` and ``bind``
# in ``_steps``.

from hyperfunc.inner_solvers._batches import batch_indices, stack_batches
from hyperfunc.inner_solvers._composed import composed
from hyperfunc.inner_solvers._maps import gradient_descent_map, proximal_gradient_map
from hyperfunc.inner_solvers._numpy import from_numpy
from hyperfunc.inner_solvers._proximal import proximal
from hyperfunc.inner_solvers._solvers import IterativeSolver as IterativeSolver
from hyperfunc.inner_solvers._solvers import iterate, minimize
from hyperfunc.inner_solvers._steps import SolverAux

__all__ = [
    "SolverAux",
    "batch_indices",
    "composed",
    "from_numpy",
    "gradient_descent_map",
    "iterate",
    "minimize",
    "proximal",
    "proximal_gradient_map",
    "stack_batches",
]
