"""Layers of ``torch.nn`` whose forward is not a pure function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm

from hyperfunc._torch.derivative_rules import normalisation


def is_compiled(layer: nn.Module) -> bool:
    """Whether ``torch.compile`` made a module."""
    return hasattr(layer, "_orig_mod")


def needs_rules(layer: nn.Module) -> bool:
    """Whether torch's own operation does not do in values and first gradients either.

    With ``max_norm`` it writes to the weight, and the gradient of bags that is scaled by frequency
    takes the counts of other rows.
    """
    by_frequency = isinstance(layer, nn.EmbeddingBag) and layer.scale_grad_by_freq
    return by_frequency or getattr(layer, "max_norm", None) is not None


def use_values(layer: nn.Module, mode: str) -> None:
    """Change a layer so that it writes no state in place, by a mode of `hyperfunc.functional`."""
    if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.training:
        if mode == "frozen":
            layer.training = False
        elif mode == "batch":
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False  # SyncBatchNorm would ask for the number
        elif type(layer).forward is _BatchNorm.forward:
            vars(layer)["forward"] = partial(_batch_norm, layer)
        elif isinstance(layer, _InstanceNorm):
            vars(layer)["_apply_instance_norm"] = partial(_instance_norm, layer)
    elif isinstance(layer, _SpectralNorm):
        if mode == "frozen":
            layer.training = False
        vars(layer)["_power_method"] = partial(_power_method, layer)


def _batch_norm(self: Any, x: Tensor) -> Tensor:
    """BatchNorm in training mode, with derivatives into its statistics, by traceable operations.

    With ``momentum=None`` the step size is 1 / count, which differs from task to task.
    """
    self._check_input_dim(x)
    F._verify_batch_size(x.size())  # type: ignore[attr-defined]
    self.num_batches_tracked = self.num_batches_tracked + 1
    momentum = self.momentum
    if momentum is None:
        momentum = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
    state = self.running_mean, self.running_var
    return normalisation.batch_norm(x, self.weight, self.bias, *state, True, momentum, self.eps)


def _instance_norm(self: Any, x: Tensor) -> Tensor:
    """What `_batch_norm` is for InstanceNorm."""
    F._verify_spatial_size(x.size())  # type: ignore[attr-defined]
    momentum = self.momentum or 0.0
    state = self.running_mean, self.running_var
    return normalisation.instance_norm(x, self.weight, self.bias, *state, True, momentum, self.eps)


def _power_method(self: Any, weight: Tensor, steps: int) -> None:
    """The power iteration of spectral_norm, by assignment instead of in place."""
    weight = weight.detach()
    for _ in range(steps):
        self._u = F.normalize(weight.mv(self._v), dim=0, eps=self.eps)
        self._v = F.normalize(weight.mH.mv(self._u), dim=0, eps=self.eps)
