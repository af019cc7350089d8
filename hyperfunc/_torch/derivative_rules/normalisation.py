"""Normalisation layers, and weights normalised by their length.

Torch's rules are wrong in the third derivative, and for affine weights and batch statistics also in
the second one taken outside of a ``vmap``, where the statistics are treated as constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfunc._torch import tracking
from hyperfunc._torch.derivative_rules._mode import TORCHS_OWN, in_place_of
from hyperfunc._torch.derivative_rules._precision import narrowed, widened


@in_place_of(torch.layer_norm, torch.nn.functional.layer_norm, right_up_to=2, in_vmap=True)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    if tuple(input.shape[dims[0] :]) != tuple(normalized_shape):
        return TORCHS_OWN  # torch says what is wrong
    x = widened(input)
    return narrowed(
        _affine(_standardised(x, dims, eps), weight, bias),
        input,
        stays_wide_in_autocast=input.device.type != "cpu",
    )


@in_place_of(torch.rms_norm, torch.nn.functional.rms_norm, right_up_to=2, in_vmap=True)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    if tuple(input.shape[dims[0] :]) != tuple(normalized_shape):
        return TORCHS_OWN
    x = widened(input)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    square = (x * x).sum(dims, keepdim=True) / math.prod(normalized_shape)
    y = x * (square + eps).rsqrt()
    return narrowed(
        _affine(y, weight, None), input, stays_wide_in_autocast=input.device.type != "cpu"
    )


@in_place_of(torch.group_norm)  # several products at a time raise, or are wrong
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = widened(input)
    groups = x.unflatten(1, (num_groups, -1)) if x.shape[1] % num_groups == 0 else None
    if groups is None:
        return TORCHS_OWN
    y = _standardised(groups, tuple(range(2, groups.ndim)), eps).flatten(1, 2)
    return narrowed(_affine_channels(y, weight, bias), input)


@in_place_of(torch.batch_norm, right_up_to=2, state=(3, 4))
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = widened(input)
    if training:
        dims = (0, *range(2, x.ndim))
        y = _standardised(x, dims, eps, _Statistics(running_mean, running_var, momentum))
    else:
        y = _by_running_statistics(x, running_mean, running_var, eps)
    return narrowed(_affine_channels(y, weight, bias), input)


@in_place_of(torch.instance_norm, right_up_to=2, state=(3, 4))
def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = widened(input)
    if use_input_stats:
        dims = tuple(range(2, x.ndim))
        y = _standardised(x, dims, eps, _Statistics(running_mean, running_var, momentum))
    else:
        y = _by_running_statistics(x, running_mean, running_var, eps)
    return narrowed(_affine_channels(y, weight, bias), input)


# Those that return statistics too, of which torch takes no derivative.


@in_place_of(torch.native_layer_norm, right_up_to=0)
def native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...] | Tensor:
    y = layer_norm(input, normalized_shape, weight, bias, eps)
    if y is TORCHS_OWN:
        return y
    kind = (input if weight is None else weight).dtype
    return y, *_moments(input, tuple(range(-len(normalized_shape), 0)), eps, kind)


@in_place_of(torch.native_group_norm, right_up_to=0)
def native_group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple[Tensor, ...] | Tensor:
    if C % group or input.numel() != N * C * HxW:
        return TORCHS_OWN
    y = group_norm(input.reshape(N, C, HxW), group, weight, bias, eps).reshape(input.shape)
    mean, rstd = _moments(input.reshape(N, group, -1), (-1,), eps, input.dtype)
    return y, mean.squeeze(-1), rstd.squeeze(-1)


@in_place_of(torch.native_batch_norm, right_up_to=0, state=(3, 4))
def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    y = batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    if not training:
        return y, input.new_empty(0), input.new_empty(0)
    mean, rstd = _moments(input, (0, *range(2, input.ndim)), eps, input.dtype)
    return y, mean.flatten(), rstd.flatten()


@in_place_of(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    wide = widened(v)
    dims = None if dim == -1 else [i for i in range(v.ndim) if i != dim % v.ndim]
    if dims == []:  # torch.linalg.vector_norm takes no dimensions for all of them
        return v * (g / v.abs())
    length: Tensor = torch.linalg.vector_norm(wide, dim=dims, keepdim=dims is not None)
    return (wide * (widened(g) / length)).to(v.dtype)


class _Statistics:
    """The running mean and variance of a layer, which move towards those of a batch.

    Derivatives flow into them where they are the buffers of a call of `hyperfunc.functional` that
    returns them, and not into those of a module of the user's, which outlive the call.
    """

    def __init__(self, mean: Tensor | None, var: Tensor | None, momentum: float | Tensor) -> None:
        self._running = (mean, var)
        self._momentum = momentum

    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        unbiased = var * (count / (count - 1) if count > 1 else math.nan)
        for running, value in zip(self._running, (mean, unbiased), strict=True):
            if running is not None:
                value = value if getattr(running, tracking.STATE, False) else value.detach()
                channels = value.movedim(1, 0).flatten(1).mean(1)
                running.copy_(torch.lerp(running, channels.to(running.dtype), self._momentum))


def _standardised(
    x: Tensor, dims: tuple[int, ...], eps: float, statistics: _Statistics | None = None
) -> Tensor:
    count = math.prod([x.shape[i] for i in dims])
    mean = x.sum(dims, keepdim=True) / count  # of x.mean() each gradient divides a whole tensor
    centred = x - mean
    var = (centred * centred).sum(dims, keepdim=True) / count  # var_mean is ten times as slow
    if statistics is not None:
        statistics.update(mean, var, count)
    return centred * (var + eps).rsqrt()


def _moments(
    input: Tensor, dims: tuple[int, ...], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = widened(input)
    mean = x.mean(dims, keepdim=True)
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return mean.to(dtype), rstd.to(dtype)


def _by_running_statistics(
    x: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    assert mean is not None
    assert var is not None
    factor = (var + eps).rsqrt()
    return (x - _channels(mean, x)) * _channels(factor, x)


def _channels(value: Tensor, like: Tensor) -> Tensor:
    """A value of each channel, in the shape that goes with dimension 1."""
    return value.reshape(-1, *[1] * (like.ndim - 2))


def _affine_channels(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (t if t is None else _channels(t, y) for t in (weight, bias))
    return _affine(y, weight, bias)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
