"""Stochastic adjoint solves: steps of an optimiser, each with a minibatch of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.convergence import warn_at_call_site
from hyperfunc._engine.shown import show
from hyperfunc._torch import tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, Bounds, LinearOperator, Solved
from hyperfunc.optim import Optimizer, check_optimizer, sgd
from hyperfunc.optim._decay import tell_of_decay

Sampler: TypeAlias = Any
"""``(step, *args) -> args``, a tuple like args with a leading step dimension, or an iterator."""

STARTS = ("zero", "outer_gradient")

_MOST_GROWTH = 10.0  # of the residual, where no minibatch disturbs it
_NUMBERS = {"sampler": "num_cross_batches", "outer_sampler": "num_outer_batches"}


@dataclasses.dataclass(frozen=True, eq=False)
class StochasticAID(AbstractLinearSolver):
    r"""Solves the adjoint system by steps of an optimiser, each with a minibatch of its own.

    With :math:`A_t, b_t, c_t` the operator, the outer gradients and the cross term on minibatch
    :math:`t`, and plain gradient steps of size :math:`\eta`,

    .. math::
        b = \frac{1}{J_o} \sum_{j \le J_o} b_j, \qquad
        u_{t+1} = u_t - \eta_t (A_t^\top u_t - b), \qquad
        \nabla f \approx \partial_\lambda E - \frac{1}{J_c} \sum_{j \le J_c}
        (\partial_\lambda r_{K + j})^\top u_K .

    If minibatches are drawn independently and give ``A`` and ``r`` on average, the expectation of
    this, at given params, is `FixedPoint` of ``K`` steps with all data; without a sampler it is
    that itself. Exactly ``K`` steps are taken, of one product each (the first one from zero needs
    none). Steps of decreasing size also remove the variance.

    The condition is called with the arguments ``sampler(step, *args)`` in place of ``*args``: with
    steps ``0, ..., num_steps - 1`` in the system and the ``num_cross_batches`` that follow in the
    cross term. A sampler is pure, so draw the indices beforehand, as in the example; it may change
    the shapes of tensors, but not the structure of the arguments. It may also be a tuple like
    ``args`` with a leading step dimension, or an iterator of tuples like ``args``, outside
    transforms only: the next call continues where this one stopped, so two calls do not agree.

    The solution map has first derivatives. With a sampler, second derivatives (a derivative of the
    hypergradient) are refused: the solve and its derivative would share their minibatches, which
    is biased.

    Args:
        num_steps: the number of steps ``K``, >= 0.
        optimizer: an `hyperfunc.optim.Optimizer`, which sees ``A_t^T u - b`` as gradient and the
            step number as its hparams, for coefficients such as
            ``hf.optim.sgd(lr=lambda step: 1 / (1 + 0.1 * step))``, or schedules such as
            ``hf.optim.sgd(lr=hf.optim.cosine(1.0, 100))``. Or a function of a list of
            tensors that makes a ``torch.optim.Optimizer``, outside transforms.
        sampler: minibatches of the condition; by default it is called with all of ``*args``.
        outer_sampler: minibatches of the outer loss, with steps ``0, ..., num_outer_batches - 1``.
        num_outer_batches: the outer gradients, and the value, are means over so many minibatches;
            aux is the tuple of what they gave if there is more than one.
        num_cross_batches: the cross term is the mean over so many minibatches.
        start: ``"zero"``, or ``"outer_gradient"`` for ``u_0 = b``. ``adjoint_init`` overrides it.
        scheduler: a function of the ``torch.optim`` optimiser that makes its learning rate
            scheduler, stepped after every step (``ReduceLROnPlateau`` sees the residual norm).

    Raises:
        TypeError: an optimiser or sampler of no kind above.
        ValueError: a number out of its range; several batches without a sampler for them; too few
            steps in a tuple; when called, a sampler that runs out or changes structure.
        RuntimeError: a second derivative, when it is taken.

    The residual norm is that of the last minibatch, before the last step. Growth by more than 10,
    or ``1 / sqrt(eps)`` with a sampler, is divergence.

    Example:
        >>> X, y = torch.randn(100, 3), torch.randn(100)
        >>> indices = torch.randint(100, (60, 10), generator=torch.Generator().manual_seed(0))
        >>> def ridge_loss(w, reg, X, y):
        ...     return 0.5 * ((X @ w - y) ** 2).mean() + 0.5 * reg * (w**2).sum()
        >>> def solve(reg, X, y):
        ...     return torch.linalg.solve(X.T @ X / 100 + reg * torch.eye(3), X.T @ y / 100)
        >>> method = hf.StochasticAID(
        ...     num_steps=50,
        ...     optimizer=hf.optim.sgd(lr=0.2),
        ...     sampler=lambda step, X, y: (X[indices[step]], y[indices[step]]),
        ...     num_cross_batches=10,
        ... )
        >>> outer_loss = lambda w, reg, X, y: (w**2).sum()
        >>> hypergradient = hf.hypergrad(solve, outer_loss, inner_loss=ridge_loss, method=method)
        >>> hypergradient(torch.tensor(0.1), X, y).shape
        torch.Size([])

    References:
        Grazzi, Pontil and Salzo, Bilevel optimization with a lower-level contraction, algorithm 1,
        arXiv 2202.03397.
    """

    num_steps: int = 100
    optimizer: Any = dataclasses.field(default=sgd(lr=1.0), repr=False)
    sampler: Sampler | None = dataclasses.field(default=None, repr=False)
    outer_sampler: Sampler | None = dataclasses.field(default=None, repr=False)
    num_outer_batches: int = 1
    num_cross_batches: int = 1
    start: str = "zero"
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        for field, least in (("num_steps", 0), ("num_outer_batches", 1), ("num_cross_batches", 1)):
            check_count(self, field, getattr(self, field), least)
        if self.start not in STARTS:
            raise ValueError(
                f"StochasticAID: start is {show(self.start)}; expected one of "
                f"{', '.join(map(repr, STARTS))}. To start elsewhere, pass adjoint_init to the call"
            )
        for field, name in _NUMBERS.items():
            number = getattr(self, name)
            if getattr(self, field) is None and number > 1:
                raise ValueError(
                    f"StochasticAID: {name} is {number}, but without {field} all batches are the "
                    f"same. Pass {field}=lambda step, *args: ..., or leave {name} at 1"
                )
        _check_optimizer(self.optimizer, self.scheduler)
        _check_sampler("sampler", self.sampler, self.num_steps + self.num_cross_batches)
        _check_sampler("outer_sampler", self.outer_sampler, self.num_outer_batches)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        if self.sampler is not None or self.outer_sampler is not None:
            raise ValueError(
                "StochasticAID with a sampler was given one operator to solve with, but it needs "
                "to draw the minibatches. Pass it as method= itself, not inside another solver"
            )
        return self.descend(lambda _: operator, b, x0, operator.structure(b), _MOST_GROWTH)

    def descend(
        self,
        operator_at: Callable[[int], LinearOperator],
        b: Leaves,
        x0: Leaves | None,
        spec: trees.TreeSpec,
        growth: float | None = None,
    ) -> Solved:
        """Take the steps, each with the operator of its own minibatch, on trees of a structure."""
        at_zero = x0 is None and self.start == "zero"
        x = trees.zeros_like(b) if at_zero else b if x0 is None else x0
        advance = _make_advance(self.optimizer, self.scheduler, x, spec)
        first = rs = trees.dot(b, b)
        for step in range(self.num_steps):
            if step == 0 and at_zero:
                gradient = trees.neg(b)
            else:
                gradient = trees.sub(operator_at(step).mv(x), b)
                rs = trees.dot(gradient, gradient)
            first = rs if step == 0 else first
            x = advance(gradient, x, step)
        bounds = Bounds.make(0.0, 0.0, b, first, growth)
        return x, bounds.stats(self.num_steps, rs, bounds.open(rs))

    def without_samplers(self) -> StochasticAID:
        """The same steps, for one operator."""
        return dataclasses.replace(
            self, sampler=None, outer_sampler=None, num_cross_batches=1, num_outer_batches=1
        )

    def on_minibatch(
        self, fn: Callable[..., Any], step: int, sampler: str = "sampler"
    ) -> Callable[..., Any]:
        """A function of ``(params, hparams, *args)`` with the arguments of a step's minibatch."""
        draw = functools.partial(_draw, sampler, getattr(self, sampler), step)
        return lambda params, hparams, *args: fn(params, hparams, *draw(args))

    def outer_losses(self, fn: Callable[..., Any]) -> list[Callable[..., Any]]:
        """The outer loss on each of its minibatches."""
        if self.outer_sampler is None:
            return [fn]
        steps = range(self.num_outer_batches)
        return [self.on_minibatch(fn, step, "outer_sampler") for step in steps]


_DECAY = (
    "StochasticAID: the optimizer has a weight decay, which shifts the adjoint, and so the "
    "hypergradient. Leave weight_decay at 0 (Adam in place of AdamW)"
)


def _make_advance(
    optimizer: Any, scheduler: Callable[..., Any] | None, x: Leaves, spec: trees.TreeSpec
) -> Callable[[Leaves, Leaves, int], Leaves]:
    """``(gradient, x, step) -> x``, which keeps the optimiser's state to itself."""
    if not isinstance(optimizer, Optimizer):
        return _make_torch_advance(optimizer, scheduler, x)
    tell_of_decay(optimizer, spec, None, None, _DECAY)
    state = optimizer.init(trees.unflatten(spec, x))

    def advance(gradient: Leaves, x: Leaves, step: int) -> Leaves:
        nonlocal state
        adjoint = trees.unflatten(spec, x)
        new, state = optimizer.update(trees.unflatten(spec, gradient), state, adjoint, step)
        leaves, new_spec = trees.flatten(new)
        trees.check_like(leaves, new_spec, x, spec, "the optimizer's result", "adjoint")
        return tuple(leaves)

    return advance


def _make_torch_advance(
    factory: Callable[..., Any], scheduler_factory: Callable[..., Any] | None, x: Leaves
) -> Callable[[Leaves, Leaves, int], Leaves]:
    if tracking.transforms_active():
        raise ValueError(
            "StochasticAID: torch.optim updates tensors in place, which is not possible under "
            "torch.func transforms and in inference mode. Write "
            "optimizer=hf.optim.from_torch(torch.optim.Adam, lr=...) or another optimizer of "
            "hf.optim, with schedules such as lr=lambda step: ..."
        )
    owned = [leaf.detach().clone() for leaf in x]
    optimizer = factory(list(owned))  # a copy, for a factory that changes the list
    advice = "Write optimizer=lambda tensors: torch.optim.Adam(tensors, lr=...)"
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"StochasticAID: optimizer= returned {type(optimizer).__name__}; expected a "
            f"torch.optim.Optimizer of the tensors it was given. {advice}"
        )
    held = {id(leaf) for group in optimizer.param_groups for leaf in group["params"]}
    missing = sum(id(leaf) not in held for leaf in owned)
    if missing:
        raise ValueError(
            f"StochasticAID: optimizer= returned a {type(optimizer).__name__} without {missing} of "
            f"the {len(owned)} tensors it was given, which would never move. {advice}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "StochasticAID: torch.optim.LBFGS evaluates a loss several times a step, and the "
            "adjoint system has none. Take an optimizer of gradients alone, such as "
            "torch.optim.SGD, or method='gmres' for a system without minibatches"
        )
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        warn_at_call_site(UserWarning(_DECAY))
    scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"StochasticAID: scheduler= returned {type(scheduler).__name__}, which has no step(). "
            f"Write scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, ...)"
        )

    def advance(gradient: Leaves, x: Leaves, step: int) -> Leaves:
        for leaf, value in zip(owned, gradient, strict=True):
            leaf.grad = value.detach().clone()
        optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(trees.norm(gradient).item())
        elif scheduler is not None:
            scheduler.step()
        return tuple(leaf.clone() for leaf in owned)

    return advance


def _check_optimizer(optimizer: Any, scheduler: Any) -> None:
    module = getattr(optimizer, "__module__", None) or ""
    is_factory = callable(optimizer) and not module.startswith("hyperfunc.optim")
    if not is_factory:
        check_optimizer(optimizer, "StochasticAID")
    if scheduler is not None and not callable(scheduler):
        raise TypeError(
            f"StochasticAID: scheduler is {show(scheduler)} of type {type(scheduler).__name__}; "
            f"expected a function of the torch.optim optimizer that makes its scheduler"
        )
    if scheduler is not None and not is_factory:
        raise ValueError(
            "StochasticAID: scheduler= goes with a torch.optim factory; an optimizer of hf.optim "
            "takes its schedule as a coefficient. Write hf.optim.sgd(lr=lambda step: ...)"
        )


def _check_sampler(name: str, sampler: Any, length: int) -> None:
    if sampler is None or callable(sampler) or isinstance(sampler, Iterator):
        return
    advice = (
        "expected a function (step, *args) -> args, a tuple like args of tensors with a leading "
        "step dimension, or an iterator of such tuples"
    )
    if not isinstance(sampler, tuple):
        hint = ". Write iter(...) around it" if hasattr(sampler, "__iter__") else ""
        raise TypeError(
            f"StochasticAID: {name} is of type {type(sampler).__name__}; {advice}{hint}"
        )
    leaves, spec = trees.flatten(sampler)
    for path, leaf in zip(trees.paths(spec, name), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"StochasticAID: {path} is of type {type(leaf).__name__}; {advice}")
        if leaf.ndim == 0 or leaf.shape[0] < length:
            raise ValueError(
                f"StochasticAID: {path} has shape {tuple(leaf.shape)}; expected a leading step "
                f"dimension of at least {length}, one slice for each minibatch"
            )
        if tracking.is_attached(leaf):
            raise ValueError(
                f"StochasticAID: {path} requires grad or belongs to a transform, whose derivative "
                f"would be lost. Call .detach() on it, or pass it in *args and use a function "
                f"(step, *args) -> args"
            )


def _draw(name: str, sampler: Any, step: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(sampler, Iterator) and tracking.transforms_active():
        raise ValueError(
            f"{name} is an iterator, which cannot be replayed as torch.func transforms and "
            f"inference mode need it. Pass a function (step, *args) -> args that indexes into "
            f"the data"
        )
    try:
        if isinstance(sampler, Iterator):
            batch = next(sampler)
        elif callable(sampler):
            batch = sampler(step, *args)
        else:
            batch = trees.tree_map(lambda leaf: leaf[step], sampler)
    except (IndexError, StopIteration) as error:
        raise ValueError(
            f"{name} has no minibatch for step {step} ({type(error).__name__}: {error}). Let it "
            f"provide num_steps + num_cross_batches minibatches (outer_sampler: num_outer_batches)"
        ) from error
    if not isinstance(batch, tuple):
        raise TypeError(
            f"{name} gave {type(batch).__name__} at step {step}; expected the tuple of arguments "
            f"that follow (params, hparams). Write `return (X[indices[step]], y[indices[step]])`"
        )
    leaves, spec = trees.flatten(batch)
    expected, expected_spec = trees.flatten(args)
    kinds, expected_kinds = ([isinstance(leaf, Tensor) for leaf in v] for v in (leaves, expected))
    if spec != expected_spec or kinds != expected_kinds:
        raise ValueError(
            f"{name} changed the structure of args at step {step}: got {spec}, expected "
            f"{expected_spec}. Let it return all of *args, those that are not sampled unchanged"
        )
    if tracking.reaches_foreign_leaf(trees.tensors(batch), trees.tensors(args)):
        raise ValueError(captured_message(name))
    return batch
