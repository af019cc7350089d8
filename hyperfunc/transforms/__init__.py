"""The transforms: `hypergrad` and its kin, `implicit_diff`, and the table of methods."""

# Here: user functions and a method become one function. May import all but what is built from
# transforms, ``equilibrium`` and ``diagnostics``. A new method is a row of the table in
# ``_methods``.

from hyperfunc.transforms._hypergrad import (
    hypergrad,
    hypergrad_and_solution,
    hypergrad_and_value,
    implicit_diff,
)

__all__ = ["hypergrad", "hypergrad_and_solution", "hypergrad_and_value", "implicit_diff"]
