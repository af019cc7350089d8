"""Whether a hypergradient is right, and which method an inner problem calls for.

`hyperfunc.check_hypergrad` compares a method with independent ones on a problem of the user's, and
says which ingredient is off. `hyperfunc.diagnose` measures what the methods assume.
"""

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
