"""Random numbers that are a function of a seed and of the step, so that an update stays pure."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(seed: int, step: Tensor, count: int) -> Tensor:
    """``count`` numbers, uniform in (0, 1), float64: the same for the same seed and step."""
    index = torch.arange(count, device=step.device)
    bits = _mixed(_mixed(_mixed(step & _MASK) + (seed & _MASK)) + index)
    return (bits.to(torch.float64) + 0.5) / 2**32


def normal(seed: int, step: Tensor, count: int) -> Tensor:
    """``count`` numbers of the standard normal distribution, float64."""
    return 2**0.5 * torch.erfinv(2 * uniform(seed, step, count) - 1)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits after which neighbours look unrelated; products fit in 63 bits."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
