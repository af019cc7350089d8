"""What every family of solvers stands on: trees and their vector algebra, results, checks.

May import ``_torch`` and ``_types``. Vectors are tuples of leaves everywhere above: their algebra
goes into ``trees``, picking some of them into ``flat``, a check of what users pass into ``checks``.
"""
