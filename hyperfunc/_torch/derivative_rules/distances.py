"""Distances between all pairs: no second derivative, and no forward mode."""

from __future__ import annotations

import torch
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import in_place_of

_LARGE = 25  # rows from which torch takes products of matrices


@in_place_of(torch.cdist)
def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    by_product = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode == "use_mm_for_euclid_dist_if_necessary"
        and max(x1.shape[-2], x2.shape[-2]) > _LARGE
    )
    if p == 2 and by_product:
        shift = x1.mean(-2, keepdim=True).detach()  # distances are small numbers near the shift
        a, b = x1 - shift, x2 - shift
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
        return _root(squares - 2 * a @ b.mT)
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


@in_place_of(torch.pdist)
def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    rows, columns = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[rows] - input[columns], p)


def _length(x: Tensor, p: float) -> Tensor:
    if p == 2:
        return _root(x.square().sum(-1))
    length: Tensor = torch.linalg.vector_norm(x, p, dim=-1)
    return length


def _root(squares: Tensor) -> Tensor:
    """The square root, whose derivatives at zero are zeros."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)
