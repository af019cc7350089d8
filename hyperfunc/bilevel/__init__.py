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
alone.

A method is an estimate of the directions in a scheme of updates:

* one step on all three variables at once: `soba`; `saba` (SAGA), `srba` (SARAH), `ma_soba` (moving
  average), `fsla` (STORM's momentum);
* inner steps, then an adjoint for one step on the hparams: `amigo` (by steps), `stocbio` (by a
  Neumann series), `bsa` and, with one inner step, `ttsa` (by a random term of it), `vrbo` (SPIDER);
* one step on the params and, by such an adjoint, on the hparams at once: `mrbo`, `sustain` (STORM);
* inner steps, differentiated one after the other: `truncated`; or taken also at hparams moved along
  random directions, without products: `pzobo`;
* first derivatives alone: `f2sa`, `bome`, `pbgd` and `meha` replace the adjoint by a penalty,
  `sama` and `darts` by one step of the inner optimiser.

>>> loop = hf.bilevel.soba(
...     inner_loss=lambda w, h, x: ((w - h - x) ** 2).mean(),  # w = h + mean
...     outer_loss=lambda w, h, x: ((w - x) ** 2).mean(),
...     inner_lr=0.2,
...     outer_lr=0.05,
... )
>>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
>>> for _ in range(200):
...     inner_batch, outer_batch = 1 + torch.randn(64), 3 + torch.randn(64)
...     state = loop.update(state, (inner_batch,), (outer_batch,))
>>> state.params, state.hparams
(tensor(3.0), tensor(2.0))

Step sizes (``inner_lr``, ``outer_lr``, ``adjoint_lr``) are numbers, functions of the step (a 0-d
int64 tensor, counted from 0) such as `power_decay`, or schedules of `hyperfunc.optim`, which see
the state's hparams and step. In the place of each may stand an optimiser of `hyperfunc.optim`, as
``inner_optimizer``, ``outer_optimizer`` and ``adjoint_optimizer``: with its schedules, which count
its own steps (each of the inner ones), its clipping, its coefficients by leaf or of the state's
hparams. It takes the direction of the method for the gradient, and its state is part of the
`State`. Params that no loss uses it leaves as they are. Inner steps that depend on hparams (a
learned rate, say) are part of the direction in `truncated`, `sama`, `pzobo` and, as ``unroll_lr``,
`darts`; all others follow the minimum of the inner loss, and ``init`` warns of such steps (but for
DTensors). The ``adjoint_lr`` of a Neumann series is a step size only; second params that begin anew
in every update (`bome`, `pbgd`) begin with a new state of their optimiser.

Every variable and batch may hold DTensors; `module_loop` calls a module with its hooks, as
``fully_shard`` needs it. Non-finite values are passed on, not looked for: the loops never wait for
the device.
"""

# Here: a module for each loop, or each kin of them. May import what stands below the transforms. A
# new loop is a function that returns a `Loop`, from the terms of ``_base`` and the estimates of
# ``_recursive``.

from hyperfunc.bilevel._amigo import amigo
from hyperfunc.bilevel._base import Loop, State, StepSize
from hyperfunc.bilevel._module import module_loop
from hyperfunc.bilevel._one_loop import fsla, ma_soba, srba
from hyperfunc.bilevel._one_step import darts, sama
from hyperfunc.bilevel._penalties import bome, f2sa, meha, pbgd
from hyperfunc.bilevel._pzobo import pzobo
from hyperfunc.bilevel._saba import Memory, saba
from hyperfunc.bilevel._series import bsa, mrbo, sustain, ttsa, vrbo
from hyperfunc.bilevel._soba import soba
from hyperfunc.bilevel._step_sizes import power_decay, power_growth
from hyperfunc.bilevel._stocbio import stocbio
from hyperfunc.bilevel._truncated import truncated

__all__ = [
    "Loop",
    "Memory",
    "State",
    "StepSize",
    "amigo",
    "bome",
    "bsa",
    "darts",
    "f2sa",
    "fsla",
    "ma_soba",
    "meha",
    "module_loop",
    "mrbo",
    "pbgd",
    "power_decay",
    "power_growth",
    "pzobo",
    "saba",
    "sama",
    "soba",
    "srba",
    "stocbio",
    "sustain",
    "truncated",
    "ttsa",
    "vrbo",
]
