"""The seam to torch: its private API, what its derivative rules lack, and its limits explained.

May import `hyperfunc._types` alone. Whatever touches a name of torch with an underscore, or works
around a fault of torch, is a function with a name of ours: here, or in ``_compile`` for compiling.
"""
