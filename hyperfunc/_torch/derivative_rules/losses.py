"""Losses: no second derivative, none in forward mode, or a look at values under vmap."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch import internals
from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_mode, in_place_of, unguarded
from hyperfunc._torch.derivative_rules._precision import narrowed, widened

_NONE, _MEAN, _SUM = 0, 1, 2


@in_place_of(torch._C._nn.mse_loss, right_up_to=2, in_vmap=True)
def mse_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    return _reduced(_difference(input, target).square(), reduction)


@in_place_of(torch._C._nn.huber_loss, right_up_to=2, in_vmap=True)
def huber_loss(input: Tensor, target: Tensor, reduction: int = _MEAN, delta: float = 1.0) -> Tensor:
    x = _difference(input, target)
    inner = x.clamp(-delta, delta)
    return _reduced(inner * (x - 0.5 * inner), reduction)


@in_place_of(torch._C._nn.soft_margin_loss, right_up_to=2, in_vmap=True)
def soft_margin_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    return _reduced(-F.logsigmoid(widened(input) * target), reduction, input)


@in_place_of(F.gaussian_nll_loss)
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Without a look at the values under ``vmap``: a negative variance gives NaN there."""
    reductions = {"none": _NONE, "mean": _MEAN, "sum": _SUM}
    fits = isinstance(var, Tensor) and var.shape in (input.shape, input.shape[:-1])
    if reduction not in reductions or not fits or not (_in_vmap() or bool((var >= 0).all())):
        return TORCHS_OWN  # torch says what is wrong
    var = var if var.shape == input.shape else var.unsqueeze(-1)
    positive = torch.where(var < 0, math.nan, var + (var.clamp(min=eps) - var).detach())
    loss = 0.5 * (positive.log() + (input - target).square() / positive)
    return _reduced(loss + (0.5 * math.log(2 * math.pi) if full else 0), reductions[reduction])


@in_place_of(torch._C._nn.multi_margin_loss)
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Tensor:
    x, labels = torch.atleast_2d(widened(input)), target.reshape(-1)
    own = labels.unsqueeze(-1)
    gaps = (margin - x.gather(1, own) + x).clamp(min=0) ** p
    if weight is not None:
        gaps = gaps * weight[labels].unsqueeze(-1)
    others = torch.ones_like(x, dtype=torch.bool).scatter(1, own, False)
    loss = torch.where(others, gaps, 0).sum(1) / x.shape[1]
    return _reduced(loss if input.ndim > 1 else loss.squeeze(0), reduction, input)


@in_place_of(torch._C._nn.multilabel_margin_loss)
def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    x, labels = torch.atleast_2d(widened(input)), torch.atleast_2d(target)
    given = (labels >= 0).cumprod(1).bool()  # up to the first that is negative
    index = labels.clamp(min=0)
    is_target = torch.zeros_like(x).scatter_add(1, index, given.to(x.dtype)) > 0
    gaps = (1 - x.gather(1, index).unsqueeze(2) + x.unsqueeze(1)).relu()
    counted = given.unsqueeze(2) & ~is_target.unsqueeze(1)
    loss = torch.where(counted, gaps, 0).sum((1, 2)) / x.shape[1]
    return _reduced(loss if input.ndim > 1 else loss.squeeze(0), reduction, input)


@in_place_of(torch._C._nn.cross_entropy_loss, right_up_to=2, in_vmap=True)
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    if input.ndim <= 2 or target.is_floating_point():
        return TORCHS_OWN
    flat = input.movedim(1, -1).flatten(0, -2)
    own: Any = torch._C._nn.cross_entropy_loss
    loss: Tensor = own(flat, target.flatten(), weight, reduction, ignore_index, label_smoothing)
    return loss.reshape(target.shape) if reduction == _NONE else loss


@in_place_of(torch._C._nn.nll_loss_nd, right_up_to=2, in_vmap=True)
def nll_loss_nd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
) -> Tensor:
    if input.ndim <= 2:
        return TORCHS_OWN
    flat = input.movedim(1, -1).flatten(0, -2)
    own: Any = torch._C._nn.nll_loss_nd
    loss: Tensor = own(flat, target.flatten(), weight, reduction, ignore_index)
    return loss.reshape(target.shape) if reduction == _NONE else loss


if hasattr(F, "linear_cross_entropy"):  # not in older versions of torch
    _linear_cross_entropy = unguarded(F.linear_cross_entropy)

    @in_place_of(F.linear_cross_entropy)
    def linear_cross_entropy(*args: Any, options: Any = None, **keywords: Any) -> Tensor:
        """Not in chunks, whose gradients torch cannot differentiate again."""
        loss: Tensor = in_mode(functools.partial(_linear_cross_entropy, *args, **keywords))
        return loss


@in_place_of(torch.ctc_loss)
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | tuple[int, ...],
    target_lengths: Tensor | tuple[int, ...],
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """The sum over alignments, step by step in time (Graves et al., 2006)."""
    single = log_probs.ndim == 2
    x = widened(log_probs.unsqueeze(1) if single else log_probs)
    steps, tasks = x.shape[:2]
    lengths = _as_tensor(target_lengths, x)
    labels = targets.to(x.device)
    if labels.ndim == 1 and not single:
        begin = lengths.cumsum(0) - lengths
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=x.device)
        labels = labels[(begin.unsqueeze(1) + place).clamp(max=len(labels) - 1)]
    labels = labels.reshape(tasks, -1)
    inside = torch.arange(labels.shape[1], device=x.device) < lengths.unsqueeze(1)
    labels = torch.where(inside, labels, blank)
    # blank, label, blank, label, ..., blank
    states = torch.stack([torch.full_like(labels, blank), labels], -1).flatten(1)
    states = F.pad(states, (0, 1), value=blank)
    emitted = x.gather(2, states.expand(steps, *states.shape))
    impossible = torch.finfo(x.dtype).min / 8
    skips = F.pad((states[:, 2:] != states[:, :-2]) & (states[:, 2:] != blank), (2, 0))
    first = torch.arange(states.shape[1], device=x.device) < 2
    alpha = torch.where(first, emitted[0], impossible)
    ends = _as_tensor(input_lengths, x)
    for step in range(1, steps):
        ways = [alpha, F.pad(alpha[:, :-1], (1, 0), value=impossible)]
        skipped = F.pad(alpha[:, :-2], (2, 0), value=impossible)
        ways.append(torch.where(skips, skipped, impossible))
        moved = torch.stack(ways).logsumexp(0) + emitted[step]
        moved = moved.clamp(min=impossible)
        alpha = torch.where((step < ends).unsqueeze(1), moved, alpha)
    last = 2 * lengths.unsqueeze(1)
    final = alpha.gather(1, torch.cat([last, (last - 1).clamp(min=0)], 1))
    final = torch.where(torch.cat([last >= 0, last > 0], 1), final, impossible)
    loss = -final.logsumexp(1)
    lost = loss > -impossible / 2
    loss = torch.where(lost, 0.0 if zero_infinity else torch.inf, loss)
    if reduction == _MEAN:
        loss = (loss / lengths.clamp(min=1)).mean()
    elif reduction == _SUM:
        loss = loss.sum()
    elif single:
        loss = loss.squeeze(0)
    return narrowed(loss, log_probs, stays_wide_in_autocast=True)


def _in_vmap() -> bool:
    return any(t.key() == internals.VMAP for t in internals.active_transforms() or ())


def _difference(input: Tensor, target: Tensor) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        return widened(input) - widened(target)
    return input - target


def _reduced(loss: Tensor, reduction: int, like: Tensor | None = None) -> Tensor:
    """The mean or sum, if asked for, in the precision of the input where that was widened."""
    if reduction != _NONE:
        loss = loss.mean() if reduction == _MEAN else loss.sum()
    return loss if like is None else narrowed(loss, like, stays_wide_in_autocast=True)


def _as_tensor(lengths: Tensor | tuple[int, ...], like: Tensor) -> Tensor:
    return torch.as_tensor(lengths, device=like.device).to(torch.int64).reshape(-1)
