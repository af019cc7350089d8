"""Derivative rules that hold at every order and in every nest, in place of those of torch.

Several operations of torch have fused rules that are wrong or missing once a gradient is
differentiated again, or in a ``vmap``. While `active` is on, in this thread, each of them is
computed by elementary operations instead, or by a rule of ours. What is called and what comes out
stay the same; the user's code does not change.

Add a row: decorate a function with the signature of the operation by ``@in_place_of(operation)`` in
the module that it belongs to, and add a case to ``tests/_torch/test_derivative_rules.py``. A
function of ``torch.nn.functional`` in Python that calls the operation is found by itself.
"""

from hyperfunc._torch.derivative_rules import (
    _mode,
    activations,
    attention,
    convolutions,
    distances,
    embeddings,
    losses,
    normalisation,
    recurrence,
    scattering,
    variables,
)
from hyperfunc._torch.derivative_rules._mode import (
    Record,
    Watch,
    active,
    again,
    counting,
    derivatives,
    differentiate,
    evaluate,
    inactive,
    known_to_be_right,
    rules,
)

_mode.open_functionals()

__all__ = [
    "Record",
    "Watch",
    "activations",
    "active",
    "again",
    "attention",
    "convolutions",
    "counting",
    "derivatives",
    "differentiate",
    "distances",
    "embeddings",
    "evaluate",
    "inactive",
    "known_to_be_right",
    "losses",
    "normalisation",
    "recurrence",
    "rules",
    "scattering",
    "variables",
]
