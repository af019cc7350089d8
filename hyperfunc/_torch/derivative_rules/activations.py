"""Activations: no second derivative of the gates of mobile networks, gaps in the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of


@in_place_of(torch._C._nn.hardsigmoid)
def hardsigmoid(input: Tensor) -> Tensor:
    return F.hardtanh(input + 3, 0.0, 6.0) / 6


@in_place_of(torch._C._nn.hardsigmoid_)
def hardsigmoid_(input: Tensor) -> Tensor:
    return input.copy_(hardsigmoid(input))


@in_place_of(torch._C._nn.glu, right_up_to=2, in_vmap=True)
def glu(input: Tensor, dim: int = -1) -> Tensor:
    if input.ndim == 0 or input.shape[dim] % 2:
        return TORCHS_OWN
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


@in_place_of(torch.rrelu, right_up_to=2)
def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Tensor:
    if training:  # torch draws no numbers for what is positive: other ones than here
        return TORCHS_OWN
    return F.leaky_relu(input, (lower + upper) / 2)
