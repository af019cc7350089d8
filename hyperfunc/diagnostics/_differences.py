"""Finite differences with an error estimate, the step chosen by the noise of the function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from hyperfunc._engine import trees
from hyperfunc._types import Leaves

ScalarFunction: TypeAlias = Callable[[Leaves], float]


class DerivativeEstimate(NamedTuple):
    value: float
    error: float


def random_direction(x: Leaves, generator: torch.Generator) -> Leaves:
    """Normal entries of the size of those of each leaf (of size 1 for a leaf of zeros)."""
    direction = []
    for leaf in x:
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        size = leaf.double().square().mean().sqrt().item() if leaf.numel() else 0.0
        direction.append((noise * (max(size, 1e-3) if size else 1.0)).to(leaf))
    return tuple(direction)


def magnitude(fn: ScalarFunction, x: Leaves, direction: Leaves) -> float:
    """The largest finite absolute value of a function at a point and close by."""
    nearby = [abs(fn(trees.axpy(t, direction, x))) for t in (-0.1, 0.0, 0.1)]
    return max(filter(math.isfinite, nearby), default=0.0)


def noise_level(fn: ScalarFunction, x: Leaves, direction: Leaves) -> float:
    """The standard deviation of a function's noise, from a table of differences (More and Wild)."""
    step = trees.epsilon(x) ** 0.4  # its cube is below the rounding of a smooth function
    values = [fn(trees.axpy(i * step, direction, x)) for i in range(7)]
    rounding = max(map(abs, values)) * trees.epsilon(x)
    levels, table = [], values
    for order in range(1, 7):
        table = [b - a for a, b in itertools.pairwise(table)]
        factor = math.factorial(order) ** 2 / math.factorial(2 * order)
        levels.append(math.sqrt(factor * sum(v * v for v in table) / len(table)))
    return max(*levels[2:], rounding)


def directional_derivative(
    fn: ScalarFunction, x: Leaves, direction: Leaves, noise: float
) -> DerivativeEstimate:
    """By central differences, extrapolated to fourth order, with the smallest estimated error."""
    size = max(magnitude(fn, x, direction), noise, torch.finfo(torch.float64).tiny)
    start = max(noise / size, trees.epsilon(x)) ** 0.2
    found = []
    for shrink in (1.0, 2.0**-2, 2.0**-4, 2.0**-8):
        step = start * shrink
        wide, narrow = _central(fn, x, direction, step), _central(fn, x, direction, step / 2)
        value = (4 * narrow - wide) / 3
        found.append(DerivativeEstimate(value, abs(value - narrow) + 6 * noise / step))
    finite = [each for each in found if math.isfinite(each.value)]
    if len(finite) < 2:
        return DerivativeEstimate(math.nan, math.inf)
    best = min(finite, key=lambda each: each.error)
    distance = min(abs(best.value - each.value) for each in finite if each is not best)
    return DerivativeEstimate(best.value, max(best.error, distance))  # two may agree by chance


def _central(fn: ScalarFunction, x: Leaves, direction: Leaves, step: float) -> float:
    above, below = (trees.axpy(sign * step, direction, x) for sign in (1.0, -1.0))
    # what was really stepped, after rounding
    change = float(trees.dot(trees.sub(above, below), direction))
    length = float(trees.dot(direction, direction))
    return (fn(above) - fn(below)) * length / change if change else math.nan
