"""Optimisers as pure functions, differentiable in their gradients, states and coefficients.

An `Optimizer` is a pair of functions: ``init(params)`` makes a state, and
``update(grads, state, params, hparams)`` returns the next parameters and the next state. Nothing
is mutated, so a step can be differentiated, batched with ``torch.func.vmap``, replayed and
checkpointed. Forward values are those of ``torch.optim``, option by option.

>>> adam = hf.optim.adam(lr=lambda hparams: hparams["lr"])
>>> params, hparams = torch.ones(2), {"lr": torch.tensor(0.1)}
>>> adam.update(2 * params, adam.init(params), params, hparams)[0]
tensor([0.9000, 0.9000])

**Coefficients.** Every number of an optimiser (``lr``, ``momentum``, ``betas``, ``weight_decay``,
``eps``, ...) may be

- a number;
- a tensor: 0-d, or one that broadcasts to each leaf it applies to without enlarging it;
- a tree of those whose structure is that of ``params`` cut off at any depth: one value for a layer
  holds for all leaves of the layer, one tensor like each leaf gives a rate to each coordinate;
- a dictionary from the names of modules to values, ``{"encoder": 1e-4, "": 1e-3}``, for params with
  the flat names of `hyperfunc.functional`: the longest name that fits counts, and ``""`` fits all;
  or a function of the name, made by `by_name`;
- a function of ``hparams`` that returns any of these, and as a value in a tree or by name too;
- a schedule: such a function of ``hparams`` and the step, made by `schedule`, or one of those of
  ``torch.optim.lr_scheduler``: `constant`, `linear`, `cosine`, `exponential`, `polynomial`,
  `warmup`, `piecewise`, `per_step`. The step is that of the optimiser's state, from 0.

Derivatives with respect to coefficients are exact, in reverse and in forward mode, at every order.
Numbers are checked against their range; tensors are not, since looking at their values would wait
for the device and fail under ``vmap``. A function of ``hparams`` sees what `update` was given.

**Parameters that the loss does not use** keep their values, under weight decay and momentum too:
a gradient of None leaves a leaf and its slots alone, as in ``torch.optim``. `hyperfunc.minimize`
finds them by the recorded graph, under ``vmap`` and in every method; an optimiser of your own gets
zeros there. Other than in ``torch.optim``, one step number counts for all leaves.

**Square roots.** ``sqrt(v)`` has no derivative at ``v = 0``, but the steps that contain it have
one: ``g / (sqrt(g^2) + eps)`` has derivative ``1 / eps`` at ``g = 0``. The square roots here have
all their derivatives equal to zero at zero, which gives that value instead of NaN.

**Low precision.** Steps on bfloat16 and float16 leaves are computed in float32 and rounded once, to
the dtype of the leaf; the state has the dtypes of the parameters.
"""

# Here: the optimisers, and what makes them of rules for one leaf. May import ``_engine`` and what
# it stands on. A new optimiser is a rule and a function that makes an `Optimizer` of it, in
# ``_rules``.

from hyperfunc.optim._base import Coefficient, Optimizer, State, check_optimizer
from hyperfunc.optim._clip import clip_grad_norm, clip_grad_value
from hyperfunc.optim._groups import by_name, grouped
from hyperfunc.optim._rules import adagrad, adam, adamw, heavy_ball, rmsprop, sgd
from hyperfunc.optim._schedules import (
    constant,
    cosine,
    exponential,
    linear,
    per_step,
    piecewise,
    polynomial,
    schedule,
    warmup,
)
from hyperfunc.optim._torch import from_torch

__all__ = [
    "Coefficient",
    "Optimizer",
    "State",
    "adagrad",
    "adam",
    "adamw",
    "by_name",
    "check_optimizer",
    "clip_grad_norm",
    "clip_grad_value",
    "constant",
    "cosine",
    "exponential",
    "from_torch",
    "grouped",
    "heavy_ball",
    "linear",
    "per_step",
    "piecewise",
    "polynomial",
    "rmsprop",
    "schedule",
    "sgd",
    "warmup",
]
