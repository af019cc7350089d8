r"""Stochastic bilevel loops: params, adjoint and hparams move together, on minibatches.

Each loop minimises :math:`f(\lambda) = E(w^*(\lambda), \lambda)` over the hparams
:math:`\lambda`, where :math:`w^*` minimises the inner loss :math:`\ell`, by steps along

.. math::
    D_w = \nabla_w \ell, \qquad
    D_u = \nabla^2_{ww} \ell \, u - \nabla_w E, \qquad
    D_\lambda = \nabla_\lambda E - \nabla^2_{\lambda w} \ell \, u,

which vanish together at a solution, with :math:`u` the adjoint. Minibatches estimate them without
bias, as they are linear in the losses.

A `Loop` is a pair of pure functions. ``init(params, hparams)`` makes a `State`, a tree of tensors
that ``torch.save`` stores and from which a run continues as if it had not stopped;
``update(state, inner_batch, outer_batch)`` makes one step. A batch is the tuple of arguments that
follow ``(params, hparams)`` in a loss; the caller draws it, so that a step depends on its arguments
alone. `soba` and `saba` make one step on all three variables at once; `stocbio` and `amigo` several
on the params and on the adjoint before one on the hparams. These six take first derivatives alone:
`f2sa`, `bome`, `pbgd` and `meha` replace the adjoint by a penalty, `sama` and `darts` by one step
of the inner optimiser.

Step sizes are numbers, functions of the step (a 0-d int64 tensor, counted from 0) such as
`power_decay`, or schedules of `hyperfunc.optim`, which see the state's hparams and step. Non-finite
values are passed on, not looked for: the loops never wait for the device.
"""

# Here: one module a loop. May import what stands below the transforms. A new loop is a function in
# a module of its own that returns a `Loop`, from the terms of ``_base``.

from hyperfunc.bilevel._amigo import amigo
from hyperfunc.bilevel._base import Loop, State, StepSize
from hyperfunc.bilevel._one_step import darts, sama
from hyperfunc.bilevel._penalties import bome, f2sa, meha, pbgd
from hyperfunc.bilevel._saba import Memory, saba
from hyperfunc.bilevel._soba import soba
from hyperfunc.bilevel._step_sizes import power_decay, power_growth
from hyperfunc.bilevel._stocbio import stocbio

__all__ = ["Loop", "Memory", "State", "StepSize", "amigo", "power_decay", "saba", "soba", "stocbio"]
__all__ += ["bome", "darts", "f2sa", "meha", "pbgd", "power_growth", "sama"]
