"""Whether a hypergradient is right, and which method an inner problem calls for.

`hyperfunc.check_hypergrad` compares a method with independent ones on a problem of the user's, and
says which ingredient is off. `hyperfunc.diagnose` measures what the methods assume.
"""

# Here: checks of a user's problem and of the answers to it. May import all but ``equilibrium``. A
# new cause of a wrong hypergradient is a field of `Causes` and a test of it in ``_check``; a new
# measurement is a field of `Diagnosis` and what it recommends in ``_diagnose``.

from hyperfunc.diagnostics._check import check_hypergrad
from hyperfunc.diagnostics._diagnose import Diagnosis, Recommendation, diagnose
from hyperfunc.diagnostics._report import Causes, HypergradCheck
from hyperfunc.linear_solvers._spectrum import Estimate

__all__ = [
    "Causes",
    "Diagnosis",
    "Estimate",
    "HypergradCheck",
    "Recommendation",
    "check_hypergrad",
    "diagnose",
]
