"""Attention: torch's fast kernels have no second derivative and no forward mode."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of
from hyperfunc._torch.derivative_rules._precision import narrowed, widened


@in_place_of(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.is_nested or query.ndim < 2 or (is_causal and attn_mask is not None):
        return TORCHS_OWN
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (
            t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value)
        )
        with torch.autocast(kind, enabled=False):
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    q, k, v = map(widened, (query, key, value))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.mT
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    weights = scores.softmax(-1) if attn_mask is None else _masked_softmax(scores, attn_mask)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return narrowed(weights @ v, query)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax over what is not masked; zeros in rows where that is nothing, as torch has it."""
    if mask.dtype == torch.bool:
        hidden = ~mask
        dead = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~dead, -math.inf)
    else:
        dead = (mask == -math.inf).all(-1, keepdim=True)
        scores = scores + mask.to(scores.dtype).masked_fill(dead, 0)
    return scores.softmax(-1).masked_fill(dead, 0)


@in_place_of(torch._nested_tensor_from_mask_left_aligned)
def nested_tensor_from_mask_left_aligned(t: Tensor, mask: Tensor) -> bool:
    """What `torch.nn.TransformerEncoder` asks before it takes nested tensors: not here."""
    return False
