r"""Stochastic bilevel loops: params, adjoint and hparams move together, on minibatches.

Each loop minimises :math:`f(\lambda) = E(w^*(\lambda), \lambda)` over the hparams
:math:`\lambda`, where :math:`w^*` minimises the inner loss :math:`\ell`, by steps along

.. math::
    D_w = \nabla_w \ell, \qquad
    D_u = \nabla^2_{ww} \ell \, u - \nabla_w E, \qquad
    D_\lambda = \nabla_\lambda E - \nabla^2_{\lambda w} \ell \, u,

which vanish together at a solution, with :math:`u` the adjoint. All three are linear in the losses,
so that minibatches estimate them without bias.

A `Loop` is a pair of pure functions. ``init(params, hparams)`` makes a `State`, a tree of tensors
that ``torch.save`` stores and from which a run continues as if it had not stopped;
``update(state, inner_batch, outer_batch)`` makes one step. A batch is the tuple of arguments that
follow ``(params, hparams)`` in ``inner_loss(params, hparams, *inner_batch)`` and in
``outer_loss(params, hparams, *outer_batch)``; drawing it is up to the caller, so that a step
depends on its arguments alone. `soba` and `saba` make one call of each oracle a step, at one point;
`stocbio` and `amigo` make several steps on the params and on the adjoint before one on the hparams.

Step sizes are numbers, or functions of the step (a 0-d int64 tensor, counted from 0) such as
`power_decay`. Non-finite values are passed on, not looked for: the loops never wait for the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._engine.wrapped_functions import picklable
from hyperfunc._torch import autodiff, tracking
from hyperfunc._types import Leaves, Loss, TensorTree

__all__ = ["Loop", "Memory", "State", "StepSize", "amigo", "power_decay", "saba", "soba", "stocbio"]

StepSize: TypeAlias = float | Tensor | Callable[[Tensor], Any]
"""A number, a 0-d tensor, or a function of the step that returns one of them."""


class State(NamedTuple):
    """Where a loop stands: a tree of tensors.

    Attributes:
        step: int64, 0-d: the updates made so far.
        params: the inner variables.
        adjoint: the estimate of ``u``, a tree like params.
        hparams: the outer variables.
        memory: what `saba` remembers of each batch, else ``()``.
    """

    step: Tensor
    params: TensorTree
    adjoint: TensorTree
    hparams: TensorTree
    memory: Any


class Memory(NamedTuple):
    """What `saba` saw last on each batch: trees like params or hparams, with a leading index.

    Attributes:
        inner_gradient: the gradient of the inner loss, like params.
        product: the product of its Hessian with the adjoint, like params.
        cross: the product of its cross derivative with the adjoint, like hparams.
        outer_params: the gradient of the outer loss with respect to params.
        outer_hparams: the gradient of the outer loss with respect to hparams.
    """

    inner_gradient: TensorTree
    product: TensorTree
    cross: TensorTree
    outer_params: TensorTree
    outer_hparams: TensorTree


class Loop(NamedTuple):
    """A stochastic bilevel method as a pair of pure functions.

    Attributes:
        init: ``init(params, hparams) -> State``, with an adjoint of zeros.
        update: ``update(state, inner_batch, outer_batch) -> State``; `saba` takes the indices of
            the batches too.
    """

    init: Callable[[TensorTree, TensorTree], State]
    update: Callable[..., State]


@picklable
def soba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    adjoint_lr: StepSize | None = None,
) -> Loop:
    r"""SOBA: one stochastic gradient step on all three variables at once.

    .. math::
        w \leftarrow w - \rho D_w, \qquad u \leftarrow u - \rho_u D_u, \qquad
        \lambda \leftarrow \lambda - \gamma D_\lambda

    with the directions at the top of this page, all at the old point, of one inner and one outer
    batch. With constant step sizes it ends in a neighbourhood of a solution whose size grows with
    them; it converges if they decrease, ``inner_lr`` like ``t ** -0.4`` and ``outer_lr`` like
    ``t ** -0.6``.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        inner_lr: step size on the params, below 2 over the largest curvature of the inner loss.
        outer_lr: step size on the hparams.
        adjoint_lr: step size on the adjoint; by default ``inner_lr``.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Raises:
        TypeError: a loss that is no function; a batch that is no tuple; a step size of no kind
            above; a state that is no `State`.
        ValueError: a negative step size; a loss that is not scalar.

    Example:
        >>> loop = hf.bilevel.soba(
        ...     lambda w, h, x: (w - h * x) ** 2 / 2,
        ...     lambda w, h, y: (w - y) ** 2 / 2,
        ...     inner_lr=0.5,
        ...     outer_lr=0.05,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(200):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Dagreou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms, arXiv 2201.13409.
    """
    settings = _Settings.make("soba", inner_loss, outer_loss, inner_lr, outer_lr, adjoint_lr)

    def update(state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> State:
        point = settings.enter(state)
        _check_batch("soba", "inner_batch", inner_batch)
        _check_batch("soba", "outer_batch", outer_batch)
        return point.moved(point.terms(inner_batch, outer_batch))

    return Loop(settings.init, update)


@picklable
def saba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_batches: int,
    num_outer_batches: int,
    inner_lr: StepSize,
    outer_lr: StepSize,
    adjoint_lr: StepSize | None = None,
) -> Loop:
    r"""SABA: `soba` with variance reduction, as SAGA has it.

    The data are split once into ``n`` inner batches and ``m`` outer batches of equal weight, so
    that the losses are the means :math:`\frac1n \sum_i \ell_i` and :math:`\frac1m \sum_j E_j` (a
    batch may be a single sample). For each of the five terms that make up the directions, the loop
    remembers the value :math:`g_i` that it saw last on batch :math:`i`, and steps along

    .. math:: g_i^{new} - g_i + \frac1n \sum_k g_k ,

    which has the same mean and, near a solution, no variance: with constant step sizes it converges
    at the rate of gradient descent. The memory starts at zero. It holds ``n (2 |w| + |h|)`` and
    ``m (|w| + |h|)`` numbers and is copied in every step, as the update is pure.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        num_inner_batches: the number ``n`` of inner batches, >= 1.
        num_outer_batches: the number ``m`` of outer batches, >= 1.
        inner_lr: as for `soba`.
        outer_lr: as for `soba`.
        adjoint_lr: as for `soba`.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch, inner_index, outer_index)``. The
        indices say which of the batches these are: integers or 0-d integer tensors, in
        ``[0, num_inner_batches)`` and ``[0, num_outer_batches)``, drawn uniformly. The same index
        must always come with the same batch.

    Raises:
        TypeError: as `soba`; an index that is no integer.
        ValueError: as `soba`; a number of batches below 1; an index out of range, as far as it is a
            Python integer.

    Example:
        >>> x, y = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
        >>> loop = hf.bilevel.saba(
        ...     lambda w, h, x: (w - h * x) ** 2 / 2,
        ...     lambda w, h, y: (w - y) ** 2 / 2,
        ...     num_inner_batches=2,
        ...     num_outer_batches=2,
        ...     inner_lr=0.2,
        ...     outer_lr=0.02,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for i, j in torch.randint(2, (1000, 2)).tolist():
        ...     state = loop.update(state, (x[i],), (y[j],), i, j)
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Dagreou, Ablin, Vaiter and Moreau, arXiv 2201.13409; Defazio, Bach and Lacoste-Julien,
        SAGA, arXiv 1407.0202.
    """
    settings = _Settings.make("saba", inner_loss, outer_loss, inner_lr, outer_lr, adjoint_lr)
    n = _check_count("saba", "num_inner_batches", num_inner_batches, 1)
    m = _check_count("saba", "num_outer_batches", num_outer_batches, 1)

    def init(params: TensorTree, hparams: TensorTree) -> State:
        state = settings.init(params, hparams)

        def table(tree: TensorTree, size: int) -> TensorTree:
            return trees.tree_map(
                lambda leaf: (
                    leaf.new_zeros(size, *leaf.shape) if isinstance(leaf, Tensor) else leaf
                ),
                tree,
            )

        memory = Memory(
            inner_gradient=table(state.params, n),
            product=table(state.params, n),
            cross=table(state.hparams, n),
            outer_params=table(state.params, m),
            outer_hparams=table(state.hparams, m),
        )
        return state._replace(memory=memory)

    def update(
        state: State,
        inner_batch: tuple[Any, ...],
        outer_batch: tuple[Any, ...],
        inner_index: int | Tensor,
        outer_index: int | Tensor,
    ) -> State:
        point = settings.enter(state)
        _check_batch("saba", "inner_batch", inner_batch)
        _check_batch("saba", "outer_batch", outer_batch)
        i = _check_index("saba", "inner_index", inner_index, n)
        j = _check_index("saba", "outer_index", outer_index, m)
        seen = point.terms(inner_batch, outer_batch)
        if not isinstance(state.memory, Memory):
            raise TypeError(
                "saba: state.memory is not a Memory; make the state with the init of saba itself"
            )
        reduced, memory = [], []
        for new, old, index in zip(seen, state.memory, (i, i, i, j, j), strict=True):
            table, spec = trees.flatten(old)
            pairs = [_saga(*each, index) for each in zip(new, table, strict=True)]
            reduced.append(tuple(direction for direction, _ in pairs))
            memory.append(trees.unflatten(spec, [rows for _, rows in pairs]))
        moved = point.moved(_Terms(*reduced))
        return moved._replace(memory=Memory(*memory))

    return Loop(init, update)


@picklable
def stocbio(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    adjoint_lr: StepSize | None = None,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
) -> Loop:
    r"""StocBiO: inner steps from the last params, then a truncated Neumann series.

    With :math:`T` steps on the params, :math:`Q` on the adjoint, and one batch :math:`B` for each,
    one update is

    .. math::
        w \leftarrow w - \rho \nabla_w \ell(w, \lambda; B_t) \;\; (t < T), \qquad
        u = \eta \sum_{q=0}^{Q} \prod_{k < q} (I - \eta \nabla^2_{ww} \ell(w, \lambda; B_{T + k}))
        \nabla_w E, \qquad
        \lambda \leftarrow \lambda - \gamma D_\lambda .

    The series is begun anew in every update: its truncation leaves a bias that shrinks with
    :math:`Q` alone.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        inner_lr: as for `soba`.
        outer_lr: as for `soba`.
        adjoint_lr: the step size in the series; by default ``inner_lr``.
        num_inner_steps: the number ``T``, >= 1.
        num_adjoint_steps: the number ``Q``, >= 0.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``. Each leaf of ``inner_batches``
        has a leading dimension of size ``T + Q + 1``: batches for the ``T`` steps, for the ``Q``
        products, and for the cross term.

    Raises:
        TypeError: as `soba`; a batch with leaves that are no tensors.
        ValueError: as `soba`; another leading dimension.

    Example:
        >>> loop = hf.bilevel.stocbio(
        ...     lambda w, h, x: (w - h * x) ** 2 / 2,
        ...     lambda w, h, y: (w - y) ** 2 / 2,
        ...     inner_lr=0.5,
        ...     outer_lr=0.2,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(50):
        ...     state = loop.update(state, (torch.full((21,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Ji, Yang and Liang, Bilevel optimization: convergence analysis and enhanced design,
        algorithms 2 and 3, arXiv 2010.07962.
    """

    def neumann(point: _Point, batches: list[tuple[Any, ...]], b: Leaves, lr: Any) -> Leaves:
        term = total = b
        for batch in batches:
            term = trees.axpy(-lr, point.product(term, batch), term)
            total = trees.add(total, term)
        return trees.scale(lr, total)

    settings = _Settings.make("stocbio", inner_loss, outer_loss, inner_lr, outer_lr, adjoint_lr)
    return _two_loops("stocbio", settings, neumann, num_inner_steps, num_adjoint_steps)


@picklable
def amigo(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    inner_lr: StepSize,
    outer_lr: StepSize,
    adjoint_lr: StepSize | None = None,
    num_inner_steps: int = 10,
    num_adjoint_steps: int = 10,
) -> Loop:
    r"""AmIGO: inner steps from the last params, then steps on the adjoint from the last adjoint.

    As `stocbio`, but the adjoint is carried from one update to the next and improved by

    .. math::
        u \leftarrow u - \eta (\nabla^2_{ww} \ell(w, \lambda; B_{T + q}) u - \nabla_w E)
        \;\; (q < Q) .

    As the hparams settle, its error vanishes for any :math:`Q \ge 1`.

    Args:
        inner_loss: as for `stocbio`.
        outer_loss: as for `stocbio`.
        inner_lr: as for `stocbio`.
        outer_lr: as for `stocbio`.
        adjoint_lr: the step size on the adjoint; by default ``inner_lr``.
        num_inner_steps: the number ``T``, >= 1.
        num_adjoint_steps: the number ``Q``, >= 1.

    Returns:
        A `Loop`, with ``update(state, inner_batches, outer_batch)``; its batches are those of
        `stocbio`.

    Raises:
        TypeError: as `stocbio`.
        ValueError: as `stocbio`.

    Example:
        >>> loop = hf.bilevel.amigo(
        ...     lambda w, h, x: (w - h * x) ** 2 / 2,
        ...     lambda w, h, y: (w - y) ** 2 / 2,
        ...     inner_lr=0.5,
        ...     outer_lr=0.2,
        ...     num_inner_steps=2,
        ...     num_adjoint_steps=1,
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.full((4,), 2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization,
        arXiv 2111.14580.
    """

    def descend(point: _Point, batches: list[tuple[Any, ...]], b: Leaves, lr: Any) -> Leaves:
        u = point.u
        for batch in batches:
            u = trees.axpy(-lr, trees.sub(point.product(u, batch), b), u)
        return u

    settings = _Settings.make("amigo", inner_loss, outer_loss, inner_lr, outer_lr, adjoint_lr)
    _check_count("amigo", "num_adjoint_steps", num_adjoint_steps, 1)
    return _two_loops("amigo", settings, descend, num_inner_steps, num_adjoint_steps)


def power_decay(initial: float, exponent: float) -> Callable[[int | Tensor], float | Tensor]:
    """The step sizes ``initial / (1 + step) ** exponent``.

    Args:
        initial: the first step size, > 0.
        exponent: how fast they decrease, >= 0. `soba` converges with 0.4 for the params and the
            adjoint and 0.6 for the hparams.

    Returns:
        A function of the step, an integer or a 0-d tensor: for the step sizes of the loops, and for
        the coefficients of the optimiser of `hyperfunc.StochasticAID`.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> hf.bilevel.power_decay(0.5, exponent=0.5)(torch.tensor(3))
        tensor(0.2500, dtype=torch.float64)
    """
    if not initial > 0:
        raise ValueError(f"power_decay: initial is {initial!r}; expected a number > 0")
    if not exponent >= 0:
        raise ValueError(f"power_decay: exponent is {exponent!r}; expected a number >= 0")
    return functools.partial(_decayed, initial, exponent)


def _decayed(initial: float, exponent: float, step: int | Tensor) -> float | Tensor:
    # float32 counts to 16 million only
    count = step.to(torch.float64) if isinstance(step, Tensor) else float(step)
    return initial / (1.0 + count) ** exponent


class _Terms(NamedTuple):
    """The five terms of the directions."""

    inner_gradient: Leaves
    product: Leaves
    cross: Leaves
    outer_params: Leaves
    outer_hparams: Leaves


@dataclasses.dataclass(frozen=True, eq=False)
class _Settings:
    """What the loops have in common."""

    name: str
    inner_loss: Loss
    outer_loss: Loss
    inner_lr: StepSize
    outer_lr: StepSize
    adjoint_lr: StepSize

    @staticmethod
    def make(
        name: str, inner_loss: Any, outer_loss: Any, inner_lr: Any, outer_lr: Any, adjoint_lr: Any
    ) -> _Settings:
        for key, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            if not callable(loss):
                raise TypeError(
                    f"{name}: {key} is {loss!r} of type {type(loss).__name__}; expected a function "
                    f"(params, hparams, *batch) -> scalar"
                )
        adjoint_lr = inner_lr if adjoint_lr is None else adjoint_lr
        rates = {"inner_lr": inner_lr, "outer_lr": outer_lr, "adjoint_lr": adjoint_lr}
        for key, rate in rates.items():
            if not callable(rate):
                _check_rate(name, key, rate)
        return _Settings(name, inner_loss, outer_loss, **rates)

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        """The start, cut from any graph: a loop is nothing to differentiate through."""
        w, params_spec = trees.flatten_floating(params, "params")
        h, hparams_spec = trees.flatten_floating(hparams, "hparams")
        # copies, as a module whose parameters these are may go on to change them in place
        w, h = (tuple(leaf.clone() for leaf in tracking.detach(leaves)) for leaves in (w, h))
        return State(
            step=torch.zeros((), dtype=torch.int64),
            params=trees.unflatten(params_spec, w),
            adjoint=trees.unflatten(params_spec, trees.zeros_like(w)),
            hparams=trees.unflatten(hparams_spec, h),
            memory=(),
        )

    def enter(self, state: Any) -> _Point:
        """The state in flat form."""
        if not isinstance(state, State):
            raise TypeError(
                f"{self.name}: state is of type {type(state).__name__}; expected a State. Write "
                f"state = loop.init(params, hparams), then state = loop.update(state, ...)"
            )
        w, params_spec = trees.flatten_floating(state.params, "state.params")
        u, adjoint_spec = trees.flatten(state.adjoint)
        trees.check_like(u, adjoint_spec, w, params_spec, "state.adjoint", "params")
        h, hparams_spec = trees.flatten_floating(state.hparams, "state.hparams")
        return _Point(self, state, w, tuple(u), h, params_spec, hparams_spec)


@dataclasses.dataclass(frozen=True, eq=False)
class _Point:
    """The variables of a state as leaves, and what the losses give there."""

    settings: _Settings
    state: State
    w: Leaves
    u: Leaves
    h: Leaves
    params_spec: trees.TreeSpec
    hparams_spec: trees.TreeSpec

    def gradient(self, batch: tuple[Any, ...]) -> Leaves:
        """The gradient of the inner loss with respect to params."""
        return self._inner_gradient(batch, self.w, self.h, create_graph=False)

    def product(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the Hessian of the inner loss with a vector."""
        return self._linearize(batch, range(len(self.w))).pull(v)

    def cross(self, v: Leaves, batch: tuple[Any, ...]) -> Leaves:
        """The product of the cross derivative of the inner loss with a vector."""
        n = len(self.w)
        return self._linearize(batch, range(n, n + len(self.h))).pull(v)

    def outer_gradient(self, batch: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
        """The gradient of the outer loss with respect to params and hparams."""
        n = len(self.w)

        def loss(*leaves: Tensor) -> Tensor:
            return self._loss("outer_loss", leaves[:n], leaves[n:], batch)

        gradient = autodiff.gradient(loss, (*self.w, *self.h))
        return gradient[:n], gradient[n:]

    def terms(self, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> _Terms:
        """All terms of the directions, with one pass back for both products."""
        n = len(self.w)
        linearization = self._linearize(inner_batch, range(n + len(self.h)))
        products = linearization.pull(self.u)
        outer_params, outer_hparams = self.outer_gradient(outer_batch)
        return _Terms(
            linearization.outputs, products[:n], products[n:], outer_params, outer_hparams
        )

    def moved(self, terms: _Terms) -> State:
        """The state after a step along all three directions."""
        d_u = trees.sub(terms.product, terms.outer_params)
        d_h = trees.sub(terms.outer_hparams, terms.cross)
        return self.leave(
            trees.axpy(-self.rate("inner_lr"), terms.inner_gradient, self.w),
            trees.axpy(-self.rate("adjoint_lr"), d_u, self.u),
            trees.axpy(-self.rate("outer_lr"), d_h, self.h),
        )

    def rate(self, key: str) -> Any:
        """A step size at this step."""
        rate = getattr(self.settings, key)
        if not callable(rate):
            return rate
        value = rate(self.state.step)
        _check_rate(self.settings.name, f"{key}(step)", value)
        return value

    def leave(self, w: Leaves, u: Leaves, h: Leaves) -> State:
        """The next state."""
        return State(
            step=self.state.step + 1,
            params=trees.unflatten(self.params_spec, w),
            adjoint=trees.unflatten(self.params_spec, u),
            hparams=trees.unflatten(self.hparams_spec, h),
            memory=self.state.memory,
        )

    def _linearize(self, batch: tuple[Any, ...], group: range) -> autodiff.Linearization:
        n = len(self.w)
        return autodiff.Linearization(
            lambda *leaves: self._inner_gradient(batch, leaves[:n], leaves[n:], create_graph=True),
            (*self.w, *self.h),
            (tuple(group),),
        )

    def _inner_gradient(
        self, batch: tuple[Any, ...], w: Leaves, h: Leaves, create_graph: bool
    ) -> Leaves:
        def loss(*leaves: Tensor) -> Tensor:
            return self._loss("inner_loss", leaves, h, batch)

        return autodiff.gradient(loss, w, create_graph=create_graph)

    def _loss(self, key: str, w: Leaves, h: Leaves, batch: tuple[Any, ...]) -> Tensor:
        value = getattr(self.settings, key)(
            trees.unflatten(self.params_spec, w), trees.unflatten(self.hparams_spec, h), *batch
        )
        return check_scalar(value, f"{self.settings.name}: {key}")


def _two_loops(
    name: str,
    settings: _Settings,
    solve: Callable[[_Point, list[tuple[Any, ...]], Leaves, Any], Leaves],
    num_inner_steps: int,
    num_adjoint_steps: int,
) -> Loop:
    """Steps on the params, a solve for the adjoint, and one step on the hparams."""
    T = _check_count(name, "num_inner_steps", num_inner_steps, 1)
    Q = _check_count(name, "num_adjoint_steps", num_adjoint_steps, 0)

    def update(state: State, inner_batches: tuple[Any, ...], outer_batch: tuple[Any, ...]) -> State:
        point = settings.enter(state)
        _check_batch(name, "outer_batch", outer_batch)
        batches = _unbind(name, inner_batches, T + Q + 1)
        inner_lr = point.rate("inner_lr")
        for batch in batches[:T]:
            w = trees.axpy(-inner_lr, point.gradient(batch), point.w)
            point = dataclasses.replace(point, w=w)
        outer_params, outer_hparams = point.outer_gradient(outer_batch)
        u = solve(point, batches[T : T + Q], outer_params, point.rate("adjoint_lr"))
        d_h = trees.sub(outer_hparams, point.cross(u, batches[-1]))
        h = trees.axpy(-point.rate("outer_lr"), d_h, point.h)
        return point.leave(point.w, u, h)

    return Loop(settings.init, update)


def _saga(new: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of reduced variance, and the table with the new row."""
    index = index.to(table.device)
    old = table.index_select(0, index.reshape(1))[0]
    rows = torch.arange(table.shape[0], device=table.device) == index
    mask = rows.reshape(-1, *[1] * new.ndim)
    # the mean is taken anew, as a running one gathers rounding errors
    return new - old + table.mean(0), torch.where(mask, new, table)


def _unbind(name: str, batches: Any, length: int) -> list[tuple[Any, ...]]:
    _check_batch(name, "inner_batches", batches)
    leaves, spec = trees.flatten(batches)
    for path, leaf in zip(trees.paths(spec, "inner_batches"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: {path} is of type {type(leaf).__name__}; expected a tensor with a "
                f"leading dimension of size {length}"
            )
        if leaf.ndim == 0 or leaf.shape[0] != length:
            raise ValueError(
                f"{name}: {path} has shape {tuple(leaf.shape)}; expected a leading dimension of "
                f"size num_inner_steps + num_adjoint_steps + 1 = {length}, one batch for each"
            )
    if not leaves:
        return [batches] * length
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return [trees.unflatten(spec, row) for row in rows]


def _check_batch(name: str, key: str, batch: Any) -> None:
    if not isinstance(batch, tuple):
        loss = "outer_loss" if key == "outer_batch" else "inner_loss"
        raise TypeError(
            f"{name}: {key} is of type {type(batch).__name__}; expected the tuple of arguments "
            f"that follow (params, hparams) in {loss}. Write (X, y), (X,) for one, () for none"
        )


def _check_count(name: str, key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {key} is {value!r}; expected an integer >= {least}")
    return value


def _check_index(name: str, key: str, index: Any, size: int) -> Tensor:
    if isinstance(index, Tensor):
        if index.ndim or index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(
                f"{name}: {key} is a tensor of shape {tuple(index.shape)} and dtype {index.dtype}; "
                f"expected an integer or a 0-d integer tensor"
            )
        return index
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(
            f"{name}: {key} is {index!r} of type {type(index).__name__}; expected an integer or a "
            f"0-d integer tensor"
        )
    if not 0 <= index < size:
        raise ValueError(f"{name}: {key} is {index}; expected an integer in [0, {size})")
    return torch.tensor(index)


def _check_rate(name: str, key: str, rate: Any) -> None:
    if isinstance(rate, Tensor):
        if rate.ndim or not rate.is_floating_point():
            raise TypeError(
                f"{name}: {key} is a tensor of shape {tuple(rate.shape)} and dtype {rate.dtype}; "
                f"expected a 0-d floating-point tensor"
            )
        return
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(
            f"{name}: {key} is {rate!r} of type {type(rate).__name__}; expected a number or a "
            f"function of the step that returns one"
        )
    if not rate >= 0:
        raise ValueError(f"{name}: {key} is {rate}; expected a number >= 0")
