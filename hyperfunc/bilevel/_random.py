"""Random numbers that are a function of a seed and of the step, so that an update stays pure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(seed: int, step: Tensor, count: int) -> Tensor:
    """``count`` numbers, uniform in (0, 1), float64: the same for the same seed and step."""
    index = torch.arange(count, device=step.device)
    bits: Tensor = _mixed(_mixed(_mixed(step) + _key(seed)) + index)
    return (bits.to(torch.float64) + 0.5) / 2**32


def normal(seed: int, step: Tensor, count: int) -> Tensor:
    """``count`` numbers of the standard normal distribution, float64."""
    return 2**0.5 * torch.erfinv(2 * uniform(seed, step, count) - 1)


def _key(seed: int) -> int:
    """32 bits that all bits of a seed have a part in."""
    key = 0
    while seed > 0 or key == 0:
        key, seed = int(_mixed(key + seed)), seed >> 32
    return key


def _mixed(x: Any) -> Any:
    """A bijection of 32 bits after which neighbours look unrelated; products fit in 63 bits."""
    x = (x + 0x9E3779B9) & _MASK  # without which 0 would stay 0, in the first step for the seed 0
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
