"""Functions and loops compiled by torch, and compared with what they are without it.

May import ``_engine``, ``_torch`` and ``_types``. A change of every traced graph goes to the end of
``Compiler._trace``.
"""
