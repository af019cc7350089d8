r"""Solvers of fixed-point problems ``z = f(z, hparams, *args)`` on trees of any layout.

Each is a small frozen object, called as ``solver(fixed_point, init, hparams, *args)``, which
returns the solution and `hyperfunc.SolveStats`. It stops when

.. math:: \| f(z) - z \| \le \max(\text{rtol} \, \| f(z) \|, \, \text{atol})

and returns that iterate :math:`z`, or else the one with the smallest residual. The norm is over all
leaves. With ``batch_dim`` each index of that dimension is a sample, with its own norm, stop and
statistics, as each task is under ``torch.func.vmap``: what has converged keeps its iterate.

>>> solver = hf.fixed_point_solvers.Anderson(rtol=1e-6)
>>> z, stats = solver(lambda z, h: torch.cos(h * z), torch.tensor(0.0), torch.tensor(1.0))
>>> z, hf.RESULTS(int(stats.result))
(tensor(0.7391), <RESULTS.success: 0>)
"""

# Here: one module a solver, and in ``_base`` the loop of all. May import the rule, the linear
# solvers and what these stand on. A new solver is a frozen dataclass in a module of its own, whose
# iteration maps a point to the next one.

from hyperfunc.fixed_point_solvers._anderson import Anderson
from hyperfunc.fixed_point_solvers._base import AbstractFixedPointSolver
from hyperfunc.fixed_point_solvers._broyden import Broyden
from hyperfunc.fixed_point_solvers._newton import Newton
from hyperfunc.fixed_point_solvers._picard import Picard

__all__ = ["AbstractFixedPointSolver", "Anderson", "Broyden", "Newton", "Picard"]
