"""Variables that a module makes of what it computes, such as for adapters and checkpoints.

Under a transform torch refuses `requires_grad_`, and elsewhere its result would look like a
variable of the user's that a loss closes over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperfunc._torch import checkpointing, tracking
from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of


@in_place_of(torch.Tensor.requires_grad_, right_up_to=-1)
def requires_grad_(input: Tensor, requires_grad: bool = True) -> Tensor:
    if not requires_grad or not checkpointing.made_inside(input):
        return TORCHS_OWN
    if not input.requires_grad:
        input.requires_grad = True
        setattr(input, tracking.OWN_LEAF, True)
    return input


@in_place_of(torch.Tensor.requires_grad.__set__, right_up_to=-1)  # type: ignore[attr-defined]
def set_requires_grad(input: Tensor, value: bool) -> Tensor | None:
    return TORCHS_OWN if requires_grad_(input, value) is TORCHS_OWN else None
