"""The seam to torch: its private API, what its derivative rules lack, and its limits explained.

May import ``_types`` alone. A private name of torch gets a name of ours in ``internals``, or in
``layers`` for ``torch.nn``; only what compiling needs is in ``_compile``. What works around a fault
of torch goes into the module of its subject.
"""
