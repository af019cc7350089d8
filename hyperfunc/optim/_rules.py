"""The optimisers of this package, each a step rule on one leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_flags
from hyperfunc._engine.shown import show
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.optim._base import Coefficient, Optimizer, evaluate, is_zero
from hyperfunc.optim._leafwise import (
    Leafwise,
    after_first,
    average_square,
    axpy,
    quotient_step,
    regularised,
    root_plus,
    scale,
)


def sgd(
    lr: Coefficient = 1e-3,
    momentum: Coefficient = 0.0,
    dampening: Coefficient = 0.0,
    weight_decay: Coefficient = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    r"""Stochastic gradient descent, with momentum.

    With g the gradient plus ``weight_decay * w`` (the gradient negated first with ``maximize``),

        b_1 = g_1,    b_t = momentum b_{t-1} + (1 - dampening) g_t,    w_t = w_{t-1} - lr b_t,

    and w_t = w_{t-1} - lr (g_t + momentum b_t) with ``nesterov``. Without momentum b_t = g_t.

    Args:
        lr: step size, at least 0; a `Coefficient`, as are the next three.
        momentum: decay of the buffer b, at least 0.
        dampening: share of the gradient that is kept out of the buffer.
        weight_decay: factor of ``w`` that is added to the gradient, at least 0.
        nesterov: look ahead along the buffer; needs momentum and no dampening.
        maximize: climb instead of descend.

    Returns:
        An `Optimizer` whose slots are ``momentum_buffer``, or none without momentum.

    Raises:
        ValueError: a number out of its range; ``nesterov`` without momentum or with dampening.
        TypeError: a coefficient that is none of the kinds above.

    Example:
        The derivative of one step with respect to the learning rate is minus the gradient:

        >>> optimizer = hf.optim.sgd(lr=lambda hparams: hparams["lr"])
        >>> params, grads = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
        >>> state = optimizer.init(params)
        >>> step = lambda hparams: optimizer.update(grads, state, params, hparams)[0]
        >>> torch.func.jacrev(step)({"lr": torch.tensor(0.1)})
        {'lr': tensor([-0.5000, -4.0000])}

    References:
        Sutskever et al. On the importance of initialization and momentum in deep learning. 2013.
    """
    check_flags("sgd", nesterov=nesterov, maximize=maximize)
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(
            f"sgd: nesterov=True needs momentum and no dampening; got momentum={show(momentum)}, "
            f"dampening={show(dampening)}. Write sgd(lr, momentum=0.9, nesterov=True)"
        )
    return SGD(
        *(lr, momentum, dampening, weight_decay, nesterov, maximize),
        slots={} if is_zero(momentum) else {"momentum_buffer": 0.0},
        timed=not is_zero(dampening),
    ).optimizer()


@dataclasses.dataclass(frozen=True, repr=False)
class SGD(Leafwise):
    lr: Coefficient
    momentum: Coefficient
    dampening: Coefficient
    weight_decay: Coefficient
    nesterov: bool
    maximize: bool

    name = "sgd"
    keys = ("lr", "momentum", "dampening", "weight_decay")

    def plain_rate(self, like: Leaves, hparams: Any) -> float | None:
        """The number ``lr`` where a step on such leaves is ``w - lr g`` in their own dtypes."""
        plain = not self.slots and is_zero(self.weight_decay) and not self.maximize
        rounded = any(torch.promote_types(w.dtype, torch.float32) is not w.dtype for w in like)
        if not plain or rounded or self.scheduled:
            return None
        lr = evaluate(self.name, "lr", self.lr, hparams)
        return lr if isinstance(lr, int | float) else None

    def prepare(self, t: Any, lr: Any, momentum: Any, dampening: Any, weight_decay: Any) -> Any:
        gain = 1 - dampening * after_first(t) if self.timed else 1
        return -lr, momentum, gain, weight_decay

    def step(self, leaf: Tensor, grad: Tensor, slots: Leaves, c: Any) -> Any:
        rate, momentum, gain, weight_decay = c
        grad = regularised(grad, leaf, weight_decay, self.maximize)
        if not slots:
            return axpy(rate, grad, leaf), ()
        buffer = axpy(momentum, slots[0], scale(gain, grad))
        direction = axpy(momentum, buffer, grad) if self.nesterov else buffer
        return axpy(rate, direction, leaf), (buffer,)


def heavy_ball(
    lr: Coefficient, momentum: Coefficient | None = None, *, beta: Any = None
) -> Optimizer:
    """Polyak's heavy ball, started at rest.

        w_{t+1} = w_t - lr g_t + momentum (w_t - w_{t-1}),    w_{-1} = w_0

    For a constant ``lr`` these are the iterates of `sgd` with the same momentum; for one that
    changes they are not, since here the rate multiplies the newest gradient alone.

    Args:
        lr: step size, at least 0; a `Coefficient`, as is the next.
        momentum: the share of the last displacement that is kept, in [0, 1).
        beta: the old name of ``momentum``, which is refused.

    Returns:
        An `Optimizer` whose slot ``previous`` is the iterate before the current one.

    Raises:
        ValueError: a number out of its range.
        TypeError: a coefficient of another kind, or none.

    Example:
        >>> optimizer = hf.optim.heavy_ball(lr=0.1, momentum=0.5)
        >>> w = torch.tensor(1.0)
        >>> state = optimizer.init(w)
        >>> for _ in range(2):
        ...     w, state = optimizer.update(w, state, w)  # the gradient of w^2 / 2 is w
        >>> w
        tensor(0.7600)

    References:
        Polyak. Some methods of speeding up the convergence of iteration methods. 1964.
    """
    if beta is not None or momentum is None:
        got = "got no momentum" if beta is None else "beta is called momentum, as in sgd"
        raise TypeError(f"heavy_ball: {got}. Write heavy_ball(lr=0.1, momentum=0.9)")
    return _HeavyBall(lr, momentum, slots={"previous": None}, timed=False).optimizer()


@dataclasses.dataclass(frozen=True, repr=False)
class _HeavyBall(Leafwise):
    lr: Coefficient
    momentum: Coefficient

    name = "heavy_ball"
    keys = ("lr", "momentum")

    def prepare(self, t: Any, lr: Any, momentum: Any) -> Any:
        return -lr, 1 + momentum

    def step(self, leaf: Tensor, grad: Tensor, slots: Leaves, c: Any) -> Any:
        rate, reach = c
        # One pass over the leaves: lerp goes from the previous iterate through this one and beyond.
        return axpy(rate, grad, torch.lerp(slots[0], leaf, reach)), (leaf,)


def adam(
    lr: Coefficient = 1e-3,
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999),
    eps: Coefficient = 1e-8,
    weight_decay: Coefficient = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    r"""Adam: steps scaled by running averages of the gradient and of its square.

    With g the gradient plus ``weight_decay * w`` (the gradient negated first with ``maximize``),

        m_t = beta1 m_{t-1} + (1 - beta1) g_t          m^ = m_t / (1 - beta1^t)
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2        v^ = v_t / (1 - beta2^t)
        w_t = w_{t-1} - lr m^ / (sqrt(v^) + eps)

    With ``amsgrad``, the largest v so far stands in v^.

    Args:
        lr: step size, at least 0; a `Coefficient`, as are both betas, ``eps`` and ``weight_decay``.
        betas: decays of the two averages, each in [0, 1).
        eps: added to the root, at least 0.
        weight_decay: factor of ``w`` that is added to the gradient, at least 0.
        amsgrad: never let the scale of the steps grow again.
        maximize: climb instead of descend.
        decoupled_weight_decay: shrink ``w`` by ``1 - lr * weight_decay`` instead, as `adamw` does.

    Returns:
        An `Optimizer` with slots ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` for amsgrad.

    Raises:
        ValueError: a number out of its range.
        TypeError: ``betas`` that are not a pair, or a coefficient of another kind.

    Example:
        A zero gradient is no obstacle to derivatives: the first step is ``-lr g / (|g| + eps)``,
        whose slope at zero is ``-lr / eps``.

        >>> optimizer = hf.optim.adam(lr=0.1, eps=0.01)
        >>> w = torch.tensor(1.0)
        >>> state = optimizer.init(w)
        >>> torch.func.grad(lambda g: optimizer.update(g, state, w)[0])(torch.tensor(0.0))
        tensor(-10.)

    References:
        Kingma, Ba. Adam: a method for stochastic optimization. ICLR 2015.
        Reddi, Kale, Kumar. On the convergence of Adam and beyond. ICLR 2018.
    """
    flags = {"amsgrad": amsgrad, "maximize": maximize}
    check_flags("adam", **flags, decoupled_weight_decay=decoupled_weight_decay)
    return _Adam(
        *(lr, _pair("adam", betas), eps, weight_decay, amsgrad, maximize, decoupled_weight_decay),
        slots=_adam_slots(amsgrad),
    ).optimizer()


def adamw(
    lr: Coefficient = 1e-3,
    betas: tuple[Coefficient, Coefficient] = (0.9, 0.999),
    eps: Coefficient = 1e-8,
    weight_decay: Coefficient = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Adam whose weight decay acts on the parameters, not through the averages.

        w_t = (1 - lr weight_decay) w_{t-1} - lr m^ / (sqrt(v^) + eps)

    with m^ and v^ the averages of the bare gradient. The arguments, slots and errors are those of
    `adam`, with ``weight_decay`` relative to ``lr``.

    Example:
        >>> optimizer = hf.optim.adamw(lr=0.1, weight_decay=lambda hparams: hparams)
        >>> w = torch.tensor(2.0)
        >>> state = optimizer.init(w)
        >>> step = lambda decay: optimizer.update(torch.tensor(1.0), state, w, decay)[0]
        >>> step(torch.tensor(0.5)), torch.func.grad(step)(torch.tensor(0.5))
        (tensor(1.8000), tensor(-0.2000))

    References:
        Loshchilov, Hutter. Decoupled weight decay regularization. ICLR 2019.
    """
    check_flags("adamw", amsgrad=amsgrad, maximize=maximize)
    return _AdamW(
        *(lr, _pair("adamw", betas), eps, weight_decay, amsgrad, maximize),
        slots=_adam_slots(amsgrad),
    ).optimizer()


def _pair(name: str, betas: Any) -> tuple[Coefficient, Coefficient]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(
            f"{name}: betas is {show(betas)}; "
            f"expected a pair of coefficients such as (0.9, 0.999), "
            f"either of which may be a function of hparams"
        )
    return betas[0], betas[1]


def _adam_slots(amsgrad: bool) -> dict[str, Any]:
    return dict.fromkeys(["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad, 0.0)


@dataclasses.dataclass(frozen=True, repr=False)
class _Adam(Leafwise):
    lr: Coefficient
    betas: tuple[Coefficient, Coefficient]
    eps: Coefficient
    weight_decay: Coefficient
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    name = "adam"

    @property
    def coefficients(self) -> dict[str, Coefficient]:
        betas = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        return {"lr": self.lr, **betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def prepare(self, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any) -> Any:
        correction = (1 - beta2**t) ** 0.5
        # The root of v^ is multiplied out: one pass over the leaves less.
        rate = -lr * correction / (1 - beta1**t)
        return rate, 1 - beta1, beta2, 1 - beta2, eps * correction, weight_decay, lr * weight_decay

    def step(self, leaf: Tensor, grad: Tensor, slots: Leaves, c: Any) -> Any:
        rate, gain1, beta2, gain2, eps, weight_decay, shrink = c
        decoupled = self.decoupled_weight_decay
        grad = regularised(grad, leaf, 0.0 if decoupled else weight_decay, self.maximize)
        leaf = scale(1 - shrink, leaf) if decoupled else leaf
        mean = torch.lerp(slots[0], grad, gain1)
        square = average_square(slots[1], grad, beta2, gain2)
        largest = (torch.maximum(slots[2], square),) if self.amsgrad else ()
        new = quotient_step(leaf, rate, mean, *(largest or (square,)), eps)
        return new, (mean, square, *largest)


@dataclasses.dataclass(frozen=True, repr=False)
class _AdamW(_Adam):
    decoupled_weight_decay: bool = dataclasses.field(default=True, init=False, repr=False)

    name = "adamw"


def rmsprop(
    lr: Coefficient = 1e-2,
    alpha: Coefficient = 0.99,
    eps: Coefficient = 1e-8,
    weight_decay: Coefficient = 0.0,
    momentum: Coefficient = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Steps scaled by a running average of the squared gradient.

    With g the gradient plus ``weight_decay * w`` (the gradient negated first with ``maximize``),

        v_t = alpha v_{t-1} + (1 - alpha) g_t^2
        b_t = momentum b_{t-1} + g_t / (sqrt(v_t) + eps),    w_t = w_{t-1} - lr b_t.

    With ``centered`` the root is of the variance ``v_t - m_t^2``, m the average of the gradient.

    ``alpha``, in [0, 1], is the decay of the averages. All other arguments are those of `sgd`, with
    ``eps`` as in `adam`, and so are the errors.

    Returns:
        An `Optimizer` with slots ``square_avg``, ``momentum_buffer`` (with momentum) and
        ``grad_avg`` (with ``centered``).

    Example:
        The first step is ``lr / sqrt(1 - alpha)`` long, whatever the gradient:

        >>> optimizer = hf.optim.rmsprop(lr=0.1, alpha=0.75)
        >>> w = torch.tensor([0.0, 0.0])
        >>> optimizer.update(torch.tensor([3.0, -0.1]), optimizer.init(w), w)[0]
        tensor([-0.2000,  0.2000])

    References:
        Tieleman, Hinton. Lecture 6.5: rmsprop. Neural networks for machine learning, 2012.
        Graves. Generating sequences with recurrent neural networks. arXiv:1308.0850 (``centered``).
    """
    check_flags("rmsprop", centered=centered, maximize=maximize)
    momenta = [] if is_zero(momentum) else ["momentum_buffer"]
    slots = ["square_avg", *momenta] + ["grad_avg"] * centered
    return _RMSprop(
        *(lr, alpha, eps, weight_decay, momentum, centered, maximize),
        slots=dict.fromkeys(slots, 0.0),
        timed=False,
    ).optimizer()


@dataclasses.dataclass(frozen=True, repr=False)
class _RMSprop(Leafwise):
    lr: Coefficient
    alpha: Coefficient
    eps: Coefficient
    weight_decay: Coefficient
    momentum: Coefficient
    centered: bool
    maximize: bool

    name = "rmsprop"
    keys = ("lr", "alpha", "eps", "weight_decay", "momentum")

    def prepare(self, t: Any, lr: Any, alpha: Any, *others: Any) -> Any:
        return -lr, alpha, 1 - alpha, *others

    def step(self, leaf: Tensor, grad: Tensor, slots: Leaves, c: Any) -> Any:
        rate, alpha, gain, eps, weight_decay, momentum = c
        grad = regularised(grad, leaf, weight_decay, self.maximize)
        square = spread = average_square(slots[0], grad, alpha, gain)
        means: Leaves = ()
        if self.centered:
            means = (torch.lerp(slots[-1], grad, gain),)
            # Rounding can make the variance negative; its root would be NaN.
            spread = torch.addcmul(square, *means, *means, value=-1).clamp(min=0)
        if is_zero(self.momentum):
            return quotient_step(leaf, rate, grad, spread, eps), (square, *means)
        buffer = axpy(momentum, slots[1], grad / root_plus(spread, eps))
        return axpy(rate, buffer, leaf), (square, buffer, *means)


def adagrad(
    lr: Coefficient = 1e-2,
    lr_decay: Coefficient = 0.0,
    weight_decay: Coefficient = 0.0,
    initial_accumulator_value: float | TensorTree = 0.0,
    eps: Coefficient = 1e-10,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Steps scaled by the root of the sum of all squared gradients.

    With g the gradient plus ``weight_decay * w`` (the gradient negated first with ``maximize``),

        s_t = s_{t-1} + g_t^2    (the slot ``sum``)
        w_t = w_{t-1} - lr / (1 + (t - 1) lr_decay) g_t / (sqrt(s_t) + eps)

    The coefficient ``lr_decay`` and the number, tensor or tree ``initial_accumulator_value``, s_0,
    are at least 0; the latter is no function, since ``init`` sees no hparams. All other arguments
    are those of `sgd`, with ``eps`` as in `adam`, and so are the errors.

    Example:
        >>> optimizer = hf.optim.adagrad(lr=1.0)
        >>> w, g = torch.tensor(0.0), torch.tensor(5.0)
        >>> state = optimizer.init(w)
        >>> for _ in range(2):
        ...     w, state = optimizer.update(g, state, w)  # -1, then -1 / sqrt(2)
        >>> w
        tensor(-1.7071)

    References:
        Duchi, Hazan, Singer. Adaptive subgradient methods for online learning and stochastic
        optimization. JMLR 12, 2011.
    """
    if callable(initial_accumulator_value):
        raise TypeError(
            "adagrad: initial_accumulator_value is a function, but it is needed in init(params), "
            "which sees no hparams. Pass a number or a tensor, or put the value into the state: "
            "state._replace(slots={'sum': ...})"
        )
    check_flags("adagrad", maximize=maximize)
    return _Adagrad(
        *(lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize),
        slots={"sum": initial_accumulator_value},
        timed=not is_zero(lr_decay),
    ).optimizer()


@dataclasses.dataclass(frozen=True, repr=False)
class _Adagrad(Leafwise):
    lr: Coefficient
    lr_decay: Coefficient
    weight_decay: Coefficient
    initial_accumulator_value: float | TensorTree
    eps: Coefficient
    maximize: bool

    name = "adagrad"
    keys = ("lr", "lr_decay", "weight_decay", "eps")

    def prepare(self, t: Any, lr: Any, lr_decay: Any, weight_decay: Any, eps: Any) -> Any:
        return -lr / (1 + (t - 1) * lr_decay), weight_decay, eps

    def step(self, leaf: Tensor, grad: Tensor, slots: Leaves, c: Any) -> Any:
        rate, weight_decay, eps = c
        grad = regularised(grad, leaf, weight_decay, self.maximize)
        total = torch.addcmul(slots[0], grad, grad)
        return quotient_step(leaf, rate, grad, total, eps), (total,)
