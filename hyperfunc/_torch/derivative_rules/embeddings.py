"""Embeddings with options, and bags of them.

The row of ``padding_idx`` is a constant, in every order and mode; in torch's forward mode, and
outside of a ``vmap``, it is none. ``max_norm`` shortens the rows that are looked up, as a
differentiable function of them, where torch writes to the weight. Gradients are dense.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_mode, in_place_of, torch_is_right


@in_place_of(torch.embedding, right_up_to=-1)
def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not sparse and torch_is_right(1, False):
        return TORCHS_OWN
    rows = torch.embedding(weight, indices)
    if padding_idx >= 0:
        rows = torch.where((indices == padding_idx).unsqueeze(-1), rows.detach(), rows)
    if scale_grad_by_freq:
        flat = indices.reshape(-1)
        counts = rows.new_zeros(weight.shape[0]).index_add(0, flat, torch.ones_like(flat).to(rows))
        constant = rows.detach()
        rows = constant + (rows - constant) / counts[indices].unsqueeze(-1)
    return rows


@in_place_of(F.embedding, right_up_to=-1)
def embedding_with_max_norm(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows, shortened to ``max_norm``: torch would write to the weight, in any order."""
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    rows: Tensor = in_mode(torch.embedding, weight, input, padding, scale_grad_by_freq, sparse)
    return rows if max_norm is None else _shortened(rows, max_norm, norm_type)


@in_place_of(F.embedding_bag, right_up_to=-1)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    # by frequency, torch's first gradient is wrong: it takes the counts of other rows
    is_right = not (sparse or scale_grad_by_freq) and torch_is_right(1, False)
    if (max_norm is None and is_right) or mode not in ("sum", "mean", "max"):
        return TORCHS_OWN
    if input.ndim == 2:
        bag = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        num_bags = len(input)
    elif input.ndim == 1 and offsets is not None:
        place = torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(offsets.to(place.dtype), place, right=True) - 1
        num_bags = len(offsets) - include_last_offset
    else:
        return TORCHS_OWN
    flat = input.reshape(-1)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    rows: Tensor = in_mode(torch.embedding, weight, flat, padding, scale_grad_by_freq, sparse)
    if max_norm is not None:
        rows = _shortened(rows, max_norm, norm_type)
    counted = torch.ones_like(flat, dtype=rows.dtype)
    if padding_idx is not None:
        counted = (flat != padding).to(rows.dtype)
    if mode == "max":
        return _largest(rows, bag, num_bags, counted)
    if per_sample_weights is not None:
        counted = counted * per_sample_weights.reshape(-1)
    zeros = rows.new_zeros(num_bags, rows.shape[-1])
    total = zeros.index_add(0, bag, rows * counted.unsqueeze(-1))
    if mode == "sum":
        return total
    sizes = zeros[:, 0].index_add(0, bag, counted)
    return total / sizes.clamp(min=1).unsqueeze(-1)


def _shortened(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    length = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    factor = max_norm / (length + 1e-7)
    return torch.where(length > max_norm, rows * factor, rows)


def _largest(rows: Tensor, bag: Tensor, num_bags: int, counted: Tensor) -> Tensor:
    """For each bag and column, the first of the largest entries; zeros for an empty bag."""
    index = bag.unsqueeze(-1).expand_as(rows)
    values = torch.where(counted.unsqueeze(-1) > 0, rows.detach(), -torch.inf)
    lowest = values.new_full((num_bags, rows.shape[-1]), -torch.inf)
    largest = lowest.scatter_reduce(0, index, values, "amax")
    place = torch.arange(len(rows), device=rows.device).unsqueeze(-1).expand_as(rows)
    first = place.new_full((num_bags, rows.shape[-1]), len(rows)).scatter_reduce(
        0, index, torch.where(values == largest.gather(0, index), place, len(rows)), "amin"
    )
    is_empty = largest == -torch.inf
    chosen = rows.gather(0, first.clamp(max=len(rows) - 1))
    return torch.where(is_empty, 0, chosen)
