"""Functions and loops compiled by torch, and compared with what they are without it.

May import ``_engine``, ``_torch`` and ``_types``. A rewrite of traced graphs is a function in
``graph_passes`` and a line in its ``prepare``.
"""
