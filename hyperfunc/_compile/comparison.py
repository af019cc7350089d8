"""Whether two evaluations of one function differ by more than rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine.results import UNFINISHED
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
    paths: Sequence[str] | None = None,
) -> Difference | None:
    """The greatest difference between outputs and what the function gave, if any counts.

    None does within rounding, or 8 times what tiny perturbations of the operands change. Given the
    ``paths`` of the outputs, a loop among them may stop at another step by rounding, which integers
    tell: where it has, they and residual norms may differ by anything, and all else by a tenth. The
    code of a result is the same, but where compiled code leaves what follows to be computed anew.
    """
    outputs, expected = _real(outputs), _real(expected)
    found = {tensor.dtype for tensor in (*operands, *expected) if tensor.is_floating_point()}
    eps = max((torch.finfo(dtype).eps for dtype in {*found, *dtypes}), default=0.0)
    entries = max((tensor.numel() for tensor in (*operands, *expected)), default=1)
    tolerance = min(_UNITS * eps * math.sqrt(entries), eps ** (1 / 3))
    gaps = [_gap(a, b, levels) for a, b in zip(outputs, expected, strict=True)]
    sizes = [_largest(value.double().abs().nan_to_num(0, 0), levels) for value in expected]
    allowed = [tolerance * size for size in sizes]
    if paths is not None:
        _allow_other_stops(allowed, gaps, sizes, outputs, paths, levels)
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

    index: int = max(range(len(wrong)), key=ratio)
    task = int(torch.where(wrong[index], gaps[index].nan_to_num(math.inf), -1).argmax())
    gap, size = float(gaps[index][task]), float(sizes[index][task])
    return Difference(index, gap, size, int(torch.stack(wrong).any(0).sum()), len(wrong[index]))


def _allow_other_stops(
    allowed: list[Tensor],
    gaps: list[Tensor],
    sizes: list[Tensor],
    outputs: Leaves,
    paths: Sequence[str],
    levels: int,
) -> None:
    """Let outputs differ by more in tasks whose loops have stopped at another step."""
    codes = [path.endswith(".result") for path in paths]
    counts = [
        not value.is_floating_point() and not code
        for value, code in zip(outputs, codes, strict=True)
    ]
    unfinished = elsewhere = torch.zeros_like(gaps[0], dtype=torch.bool)
    for value, gap, is_code, is_count in zip(outputs, gaps, codes, counts, strict=True):
        if is_count:
            elsewhere = elsewhere | (gap > 0)
        elif is_code:
            unfinished = unfinished | (_largest(value.double(), levels) == UNFINISHED)
    for i, path in enumerate(paths):
        anything = counts[i] or path.endswith(".residual_norm")
        loose = torch.full_like(sizes[i], math.inf) if anything else _STOPPED_ELSEWHERE * sizes[i]
        if not codes[i]:
            allowed[i] = torch.where(elsewhere, torch.maximum(allowed[i], loose), allowed[i])
        allowed[i] = torch.where(unfinished, math.inf, allowed[i])  # which is computed anew


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
