"""Whether two evaluations of one function differ by more than rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._types import Leaves

# Rounding errors of one evaluation, in units of eps and for a root of the entries that are summed.
_UNITS = 32.0
# Where a loop has stopped at another step: one more changes little, as it was near its tolerance.
_STOPPED_ELSEWHERE = 0.1
# The relative size of the perturbations, in eps, and how much more than they do may be rounding.
_PERTURBATION = 4.0
_DRAWS = 4
_MARGIN = 8.0


class Difference(NamedTuple):
    """The output that differs most, by its position, and in how many tasks outputs differ."""

    position: int
    gap: float
    size: float
    wrong: int
    tasks: int


def difference(
    outputs: Leaves,
    expected: Leaves,
    function: Callable[..., Sequence[Tensor]],
    operands: Leaves,
    *,
    levels: int = 0,
    dtypes: Sequence[torch.dtype] = (),
    may_stop_elsewhere: bool = False,
) -> Difference | None:
    """The greatest difference between outputs and what the function gave, if any counts.

    None does within rounding, or 8 times what tiny perturbations of the operands change. What
    ``may_stop_elsewhere`` may so by rounding, which the integers among the outputs tell: there
    vectors may differ by a tenth, and numbers by anything.
    """
    outputs, expected = _real(outputs), _real(expected)
    found = {tensor.dtype for tensor in (*operands, *expected) if tensor.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in {*found, *dtypes}), default=0.0)
    entries = max((tensor.numel() for tensor in (*operands, *expected)), default=1)
    tolerance = min(_UNITS * eps * math.sqrt(entries), eps ** (1 / 3))
    gaps = [_gap(a, b, levels) for a, b in zip(outputs, expected, strict=True)]
    sizes = [_largest(value.double().abs().nan_to_num(0, 0), levels) for value in expected]
    allowed = [tolerance * size for size in sizes]
    if may_stop_elsewhere:
        counts = [i for i, value in enumerate(expected) if not value.is_floating_point()]
        elsewhere = sum((gaps[i] > 0 for i in counts), torch.zeros_like(gaps[0], dtype=torch.bool))
        for i, largest in enumerate(sizes):
            single = expected[i].numel() == len(largest)
            loose = torch.full_like(largest, math.inf) if single else _STOPPED_ELSEWHERE * largest
            allowed[i] = torch.where(elsewhere, torch.maximum(allowed[i], loose), allowed[i])
    if not any(map(torch.any, _above(gaps, allowed))):
        return None
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        near = (_perturb(leaf, _PERTURBATION * eps, generator) for leaf in operands)
        nearby = _real(function(*near))
        noise = [_gap(a, b, levels) for a, b in zip(nearby, expected, strict=True)]
        allowed = [
            torch.maximum(a, _MARGIN * b.nan_to_num(math.inf))
            for a, b in zip(allowed, noise, strict=True)
        ]
    wrong = _above(gaps, allowed)
    if not any(map(torch.any, wrong)):
        return None

    def ratio(index: int) -> float:
        shares = torch.where(wrong[index], gaps[index] / sizes[index], 0)
        return float(shares.nan_to_num(math.inf, math.inf).max())

    index = max(range(len(wrong)), key=ratio)
    task = int(torch.where(wrong[index], gaps[index].nan_to_num(math.inf), -1).argmax())
    gap, size = float(gaps[index][task]), float(sizes[index][task])
    return Difference(index, gap, size, int(torch.stack(wrong).any(0).sum()), len(wrong[index]))


def _real(leaves: Sequence[Tensor]) -> Leaves:
    return tuple(torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves)


def _above(gaps: Sequence[Tensor], limits: Sequence[Tensor]) -> list[Tensor]:
    return [~(gap <= limit) for gap, limit in zip(gaps, limits, strict=True)]


def _gap(output: Tensor, expected: Tensor, levels: int) -> Tensor:
    """The largest difference of entries in each task; none where both are NaN or infinite."""
    a, b = output.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return _largest(torch.where(same, 0.0, (a - b).abs()), levels)


def _largest(values: Tensor, levels: int) -> Tensor:
    tasks = math.prod(values.shape[:levels])
    return values.reshape(tasks, -1).amax(1) if values.numel() else values.new_zeros(tasks)


def _perturb(tensor: Tensor, size: float, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(2, tensor.shape, generator=generator).to(tensor)
    return tensor * (1 + size * (2 * signs - 1)).to(tensor.dtype)
