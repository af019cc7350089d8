"""Layers of ``torch.nn`` whose forward is not a pure function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm


def is_compiled(layer: nn.Module) -> bool:
    """Whether ``torch.compile`` made a module."""
    return hasattr(layer, "_orig_mod")


def use_values(layer: nn.Module, mode: str) -> None:
    """Change a layer so that it writes no state in place, by a mode of `hyperfunc.functional`."""
    if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.training:
        if mode == "frozen":
            layer.training = False
        elif mode == "batch":
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        elif layer.momentum is None and type(layer).forward is _BatchNorm.forward:
            vars(layer)["forward"] = partial(_cumulative_batch_norm, layer)
    elif isinstance(layer, _SpectralNorm):
        if mode == "frozen":
            layer.training = False
        vars(layer)["_power_method"] = partial(_power_method, layer)


def _cumulative_batch_norm(self: Any, x: Tensor) -> Tensor:
    """BatchNorm with ``momentum=None``, whose step size 1 / count differs from task to task."""
    self._check_input_dim(x)
    # With momentum 1, what batch_norm writes to the statistics is those of the batch.
    mean = x.new_zeros(self.running_mean.shape, dtype=self.running_mean.dtype)
    var = torch.zeros_like(mean)
    output = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
    self.num_batches_tracked = self.num_batches_tracked + 1
    step = 1.0 / self.num_batches_tracked.to(mean.dtype)
    self.running_mean = (1.0 - step) * self.running_mean + step * mean
    self.running_var = (1.0 - step) * self.running_var + step * var
    return output


def _power_method(self: Any, weight: Tensor, steps: int) -> None:
    """The power iteration of spectral_norm, by assignment instead of in place."""
    weight = weight.detach()
    for _ in range(steps):
        self._u = F.normalize(weight.mv(self._v), dim=0, eps=self.eps)
        self._v = F.normalize(weight.mH.mv(self._u), dim=0, eps=self.eps)
