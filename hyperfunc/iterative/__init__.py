"""Iterative differentiation: derivatives of an inner solver's result through its steps.

Each method turns an inner solver into a function with the same values, whose derivatives of every
order, in reverse and in forward mode, are those of the steps. What `Reverse` and `ForwardMode` do
not keep in memory they compute again, on the same inputs and with the same random numbers.
"""

# Here: the methods, the loop that they share, and recomputation under every transform. May import
# the rule, ``inner_solvers`` and what these stand on. A new method is a frozen dataclass with
# ``solution_map`` in ``_methods`` or a module of its own, and for a short name a row of the table
# in ``transforms/_methods``.

from hyperfunc.iterative._first_order import FirstOrder
from hyperfunc.iterative._methods import ForwardMode, Reverse, ReverseUnroll
from hyperfunc.iterative._segment import checkpoint

__all__ = ["FirstOrder", "ForwardMode", "Reverse", "ReverseUnroll", "checkpoint"]
