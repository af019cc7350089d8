"""TTSA, BSA, SUSTAIN, MRBO and VRBO: the adjoint from a Neumann series in every step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperfunc._engine import checks, trees
from hyperfunc._engine.finite_differences import Products
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import (
    AdjointSteps,
    Loop,
    Point,
    State,
    StepSize,
    TwoLoops,
    check_batch,
    taking,
    unbind,
)
from hyperfunc.bilevel._random import uniform
from hyperfunc.bilevel._recursive import Remembering, corrected, kept, kept_in_period

if TYPE_CHECKING:
    from typing_extensions import Unpack

Batches = list[tuple[Any, ...]]


@taking(AdjointSteps)
def bsa(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
    seed: int = 0,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""BSA: inner steps, then one random term of the Neumann series.

    As `stocbio`, but of the series one term is drawn in each update, and weighed by their number:

    .. math::
        u = \eta (Q + 1) \prod_{k < q} (I - \eta \nabla^2_{ww} \ell(w, \lambda; B_{T + k}))
        \nabla_w E, \qquad q \text{ uniform in } \{0, \dots, Q\} .

    Its mean is the adjoint of `stocbio`, its variance larger; it does not vanish at the solution,
    so the step sizes of the hparams must decrease. The paper lets the number of inner steps grow
    with the updates: make a new loop with more steps and hand it the state.

    ``seed``, an integer >= 0, and the step of the state alone determine what is drawn: a run that
    is resumed goes on as it would have, and tasks under ``vmap`` draw the same at the same step.
    All :math:`Q` products are computed, as an update never looks at a number. The other arguments,
    the batches and the errors are those of `stocbio`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.5, "outer_lr": 0.1}
        >>> loop = hf.bilevel.bsa(
        ...     inner_loss, outer_loss, num_inner_steps=5, num_adjoint_steps=2, **rates
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(80):
        ...     state = loop.update(state, (torch.full((8,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Ghadimi and Wang, Approximation methods for bilevel programming, arXiv 1802.02246.
    """
    counts = (num_inner_steps, num_adjoint_steps)
    return _BSA(inner_loss, outer_loss, steps, *counts, seed=seed, products=products).loop()


@taking(AdjointSteps)
def ttsa(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_adjoint_steps: int = 10,
    seed: int = 0,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""TTSA: one inner step, then one step on the hparams, on two time scales.

    `bsa` with one inner step. The params follow the hparams as their step size is larger by
    orders: for a strongly convex value function ``inner_lr`` decreases like ``t ** -(2/3)`` and
    ``outer_lr`` like ``1 / t``, else like ``t ** -0.4`` and ``t ** -0.6``; see `power_decay`.

    The arguments and the errors are those of `bsa`; each leaf of ``inner_batches`` has a leading
    dimension of size ``num_adjoint_steps + 2``.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.5, "outer_lr": 0.05}
        >>> loop = hf.bilevel.ttsa(inner_loss, outer_loss, num_adjoint_steps=2, **rates)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(160):
        ...     state = loop.update(state, (torch.full((4,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Hong, Wai, Wang and Yang, A two-timescale framework for bilevel optimization: complexity
        analysis and application to actor-critic, arXiv 2007.05170.
    """
    counts = (1, num_adjoint_steps)
    return _TTSA(inner_loss, outer_loss, steps, *counts, seed=seed, products=products).loop()


@taking(AdjointSteps)
def sustain(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_weight: StepSize = 0.1,
    outer_weight: StepSize = 0.1,
    num_adjoint_steps: int = 10,
    seed: int = 0,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""SUSTAIN: one step on params and hparams at once, both with STORM's momentum.

    With :math:`D_\lambda` by the adjoint of `bsa`, and primes for the same batches (and the same
    draw) at the point before,

    .. math::
        d_w \leftarrow D_w + (1 - a_w) (d_w - D_w'), \qquad
        d_\lambda \leftarrow D_\lambda + (1 - a_\lambda) (d_\lambda - D_\lambda'), \qquad
        w \leftarrow w - \rho d_w, \qquad \lambda \leftarrow \lambda - \gamma d_\lambda .

    In the first step the weights are 1. With ``outer_lr`` like ``t ** -(1/3)`` and weights like
    ``t ** -(2/3)`` the rate is that of the best one-level methods.

    ``inner_weight`` and ``outer_weight`` are :math:`a_w` and :math:`a_\lambda`, in [0, 1]: numbers
    or functions of the step. The other arguments and the errors are those of `bsa`. One update
    takes ``2 (Q + 2)`` passes through the inner loss and two through the outer one; the memory
    holds two trees like params and hparams.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size ``Q + 2``: batches for the gradient, for the ``Q`` products,
        and for the cross term.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.5, "outer_lr": 0.05}
        >>> loop = hf.bilevel.sustain(inner_loss, outer_loss, num_adjoint_steps=2, **rates)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(160):
        ...     state = loop.update(state, (torch.full((4,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Khanduri, Zeng, Hong, Wai, Wang and Yang, A near-optimal algorithm for stochastic bilevel
        optimization via double-momentum, arXiv 2102.07367; Cutkosky and Orabona, STORM,
        arXiv 1905.10018.
    """
    counts = (1, num_adjoint_steps)
    weights: Any = {"inner_weight": inner_weight, "outer_weight": outer_weight}
    return _SUSTAIN(
        inner_loss, outer_loss, steps, *counts, **weights, seed=seed, products=products
    ).loop()


@taking(AdjointSteps)
def mrbo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_weight: StepSize = 0.1,
    outer_weight: StepSize = 0.1,
    num_adjoint_steps: int = 10,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""MRBO: `sustain` with the whole Neumann series of `stocbio` in place of one random term.

    The weights decrease like the squares of the step sizes: with ``inner_lr`` and ``outer_lr`` like
    ``t ** -(1/3)`` they go like ``t ** -(2/3)``. The arguments, the batches, the cost and the
    errors are those of `sustain`; nothing is drawn. The truncation of the series leaves a bias.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.5, "outer_lr": 0.1}
        >>> loop = hf.bilevel.mrbo(inner_loss, outer_loss, num_adjoint_steps=2, **rates)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.full((4,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Yang, Ji and Liang, Provably faster algorithms for bilevel optimization, algorithm 1,
        arXiv 2106.04692.
    """
    counts = (1, num_adjoint_steps)
    weights: Any = {"inner_weight": inner_weight, "outer_weight": outer_weight}
    return _MRBO(inner_loss, outer_loss, steps, *counts, **weights, products=products).loop()


@taking(AdjointSteps)
def vrbo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    period: int,
    num_inner_steps: int = 3,
    num_adjoint_steps: int = 10,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""VRBO: two loops, with directions that are corrected from step to step, as SPIDER has it.

    With :math:`D_\lambda` by the adjoint of `stocbio`, one update is

    .. math::
        d \leftarrow D \;\text{ if } t \bmod p = 0, \qquad
        \lambda \leftarrow \lambda - \gamma d_\lambda, \qquad
        \bigl[\, d \leftarrow d + D - D', \;\; w \leftarrow w - \rho d_w \,\bigr]
        \text{ for } T \text{ batches},

    for :math:`d = (d_w, d_\lambda)`, with :math:`D'` on the same batches at the point where
    :math:`d` was taken last: for the first of the inner steps, the params before the last inner
    step and the hparams before this update. (The paper corrects the directions once more after the
    last inner step.) Where ``state.step % period == 0``, hand over batches of many samples: the
    directions begin anew there. One outer batch serves a whole update.

    ``period`` is :math:`p \ge 1`; ``num_inner_steps`` and ``num_adjoint_steps`` are those of
    `stocbio`. All other arguments are those of `soba`. One update takes ``(2 T + 1) (Q + 2)``
    passes through the inner loss and ``2 T + 1`` through the outer one; the memory holds two trees
    like params and one like hparams.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size ``(T + 1) (Q + 2)``: for the new beginning, then for each of
        the ``T`` steps, batches for the gradient, for the ``Q`` products, and for the cross term.

    Raises:
        TypeError: as `stocbio`; a state of another loop.
        ValueError: as `stocbio`; a period below 1.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.5, "outer_lr": 0.1}
        >>> loop = hf.bilevel.vrbo(inner_loss, outer_loss, period=4, num_adjoint_steps=2, **rates)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(60):
        ...     state = loop.update(state, (torch.full((16,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Yang, Ji and Liang, Provably faster algorithms for bilevel optimization, algorithm 2,
        arXiv 2106.04692; Fang, Li, Lin and Zhang, SPIDER, arXiv 1807.01695.
    """
    counts = (num_inner_steps, num_adjoint_steps)
    return _VRBO(inner_loss, outer_loss, steps, *counts, period, products=products).loop()


def series(point: Point, b: Leaves, batches: Batches) -> Leaves:
    """The truncated Neumann series, a batch a product."""
    lr = point.value("adjoint_lr", point.method.steps["adjoint"])
    term = total = b
    for batch in batches:
        term = trees.axpy(-lr, point.product(term, batch), term)
        total = trees.add(total, term)
    return trees.scale(lr, total)


def random_term(point: Point, b: Leaves, batches: Batches, seed: int) -> Leaves:
    """One term of that series, weighed by the number of terms."""
    lr = point.value("adjoint_lr", point.method.steps["adjoint"])
    [draw] = uniform(seed, point.state.step, 1)
    num_factors = (draw * (len(batches) + 1)).floor()
    term = b
    for index, batch in enumerate(batches):
        factor = (index < num_factors).to(torch.float64) * -lr
        term = trees.axpy(factor, point.product(term, batch), term)
    return trees.scale(lr * (len(batches) + 1), term)


@dataclasses.dataclass(frozen=True, repr=False)
class Series(TwoLoops):
    """Loops whose adjoint is the truncated Neumann series."""

    adjoint = "series"
    least_adjoint_steps = 0

    def solve(self, point: Point, batches: Batches, b: Leaves) -> Point:
        return dataclasses.replace(point, u=series(point, b, batches))


@dataclasses.dataclass(frozen=True, repr=False)
class _RandomTerm(TwoLoops):
    """Loops whose adjoint is one random term of it."""

    seed: int = dataclasses.field(default=0, kw_only=True)

    adjoint = "series"
    least_adjoint_steps = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_count(self.name, "seed", self.seed, least=0)

    def solve(self, point: Point, batches: Batches, b: Leaves) -> Point:
        return dataclasses.replace(point, u=random_term(point, b, batches, self.seed))


class _BSA(_RandomTerm):
    name = "bsa"


class _TTSA(_RandomTerm):
    name = "ttsa"


@dataclasses.dataclass(frozen=True, repr=False)
class _Corrected(TwoLoops, Remembering):
    """Directions of params and hparams that are corrected from step to step."""

    directed = ("params", "hparams")

    def directions(
        self, point: Point, batches: Batches, outer_batch: tuple[Any, ...]
    ) -> tuple[list[Leaves], Leaves]:
        """Those of params and hparams, and the adjoint."""
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        u = self.solve(point, batches[1:-1], outer_params).u
        d_h = trees.sub(outer_hparams, point.cross(u, batches[-1]))
        return [point.gradient(batches[0]), d_h], u


@dataclasses.dataclass(frozen=True, repr=False)
class _Momentum(_Corrected):
    inner_weight: StepSize = dataclasses.field(kw_only=True)
    outer_weight: StepSize = dataclasses.field(kw_only=True)

    looks_back = ("params", "hparams")
    weights = ("inner_weight", "outer_weight")

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.enter(state)
        check_batch(self.name, "outer_batch", outer_batch)
        formula = "num_adjoint_steps + 2"
        batches = unbind(self.name, inner_batches, self.num_adjoint_steps + 2, formula)
        last, before = self.recall(point)
        new, u = self.directions(point, batches, outer_batch)
        old, _ = self.directions(before, batches, outer_batch)
        keep = [kept(point, key) for key in self.weights]
        d = [corrected(*each) for each in zip(keep, new, old, last, strict=True)]
        end = dataclasses.replace(point, u=u).step("inner", d[0]).step("outer", d[1])
        return self.remember(point, end.leave(), d)


@dataclasses.dataclass(frozen=True, repr=False)
class _MRBO(_Momentum, Series):
    name = "mrbo"


@dataclasses.dataclass(frozen=True, repr=False)
class _SUSTAIN(_Momentum, _RandomTerm):
    name = "sustain"


@dataclasses.dataclass(frozen=True, repr=False)
class _VRBO(_Corrected, Series):
    period: int

    name = "vrbo"
    looks_back = ("params",)

    def update(
        self, state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point, width = self.enter(state), self.num_adjoint_steps + 2
        check_batch(self.name, "outer_batch", outer_batch)
        length = (self.num_inner_steps + 1) * width
        formula = "(num_inner_steps + 1) * (num_adjoint_steps + 2)"
        batches = unbind(self.name, inner_batches, length, formula)
        groups = [batches[start : start + width] for start in range(0, length, width)]
        d, before = self.recall(point)
        begun, u = self.directions(point, groups[0], outer_batch)
        keep = kept_in_period(point, self.period)
        taken_at = trees.axpy(keep, trees.sub(before.w, point.w), point.w)
        d = [trees.axpy(keep, trees.sub(a, b), b) for a, b in zip(d, begun, strict=True)]
        before, now = dataclasses.replace(point, w=taken_at), point.step("outer", d[1])
        one: Tensor = torch.ones((), dtype=torch.float64)
        for group in groups[1:]:
            new, u = self.directions(now, group, outer_batch)
            old, _ = self.directions(before, group, outer_batch)
            d = [corrected(one, *each) for each in zip(new, old, d, strict=True)]
            before, now = now, now.step("inner", d[0])
        params = trees.unflatten(point.params_spec, before.w)
        past = dataclasses.replace(point, state=state._replace(params=params))
        return self.remember(past, dataclasses.replace(now, u=u).leave(), d)
