"""The implicit rule: what characterises a solution, and derivatives of it from one linear solve.

May import ``linear_solvers``, ``inner_solvers`` and what these stand on. A new kind of condition is
a row of the table in ``conditions``.
"""
