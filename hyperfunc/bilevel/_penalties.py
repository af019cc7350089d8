"""F2SA, BOME, PBGD and MEHA: a penalty on the inner loss in place of an adjoint."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number, is_number
from hyperfunc._types import Leaves, Loss
from hyperfunc.bilevel._base import (
    BOTH,
    AdjointSteps,
    Loop,
    Method,
    Point,
    State,
    StepSize,
    Variable,
    check_batch,
    check_rate,
    taking,
)
from hyperfunc.bilevel._step_sizes import power_growth

if TYPE_CHECKING:
    from typing_extensions import Unpack


@taking(AdjointSteps)
def f2sa(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    penalty: StepSize | None = None,
    num_inner_steps: int = 1,
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""F2SA: two copies of the params, one of which minimises the inner loss alone.

    With the params :math:`w`, second params :math:`y` (``State.adjoint``) and a penalty
    :math:`c = c_k` that grows with the step, one update is

    .. math::
        w \leftarrow w - \rho \nabla_w \ell(w, \lambda), \qquad
        y \leftarrow y - \rho_u \bigl(\nabla_w \ell + \tfrac1c \nabla_w E\bigr)(y, \lambda)
        \qquad (T \text{ times each}), \\
        \lambda \leftarrow \lambda - \gamma \bigl(\nabla_\lambda E(y, \lambda)
        + c (\nabla_\lambda \ell(y, \lambda) - \nabla_\lambda \ell(w, \lambda))\bigr) .

    The last direction is a hypergradient up to a bias like :math:`1/c`, as
    :math:`c (y - w) \to -u`. First derivatives suffice: ``2 T + 2`` gradients of the inner loss and
    ``T + 1`` of the outer one an update. The paper steps on :math:`y` along
    :math:`c \nabla \ell + \nabla E`, with a step size that is :math:`\rho_u / c` here; and so in
    the other loops with a penalty: ``inner_lr`` need not change as it grows.

    Args:
        inner_loss: ``(params, hparams, *inner_batch) -> scalar``, strongly convex in the params.
        outer_loss: ``(params, hparams, *outer_batch) -> scalar``.
        penalty: :math:`c > 0`, of the kinds that step sizes are of; by default
            ``power_growth(1.0, 1 / 3)``, as the paper has it without noise (1/7 with noise in both
            losses).
        num_inner_steps: :math:`T \ge 1`; all steps of an update see the same batch.
        steps: ``inner_lr``, ``outer_lr`` or optimisers, as in `soba`. ``adjoint_lr`` or
            ``adjoint_optimizer`` is for the second params; by default ``inner_lr``, as it should be
            where the penalty grows: what the two lag behind each other counts :math:`c` times.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch)``.

    Raises:
        TypeError: as `soba`; a penalty of no kind above; a number of steps that is no integer.
        ValueError: as `soba`; a penalty or a number of steps out of its range.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.f2sa(inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.05)
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(300):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Kwon, Kwon, Wright and Nowak, A fully first-order method for stochastic bilevel
        optimization, arXiv 2301.10945.
    """
    check_count("f2sa", "num_inner_steps", num_inner_steps)
    penalty = power_growth(1.0, 1 / 3) if penalty is None else penalty
    return _F2SA(
        inner_loss, outer_loss, steps, penalty=penalty, num_inner_steps=num_inner_steps
    ).loop()


@taking(AdjointSteps)
def bome(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    barrier: float = 0.5,
    num_inner_steps: int = 10,
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""BOME: descent on the outer loss while the value function of the inner one decreases.

    From :math:`z_0 = w`, each update takes :math:`T` steps
    :math:`z \leftarrow z - \rho_u \nabla_w \ell(z, \lambda)` to the second params
    (``State.adjoint``) and then, with :math:`q = \ell(w, \lambda) - \ell(z_T, \lambda)`, where
    :math:`z_T` is held fixed, one step

    .. math::
        w \leftarrow w - \rho (\nabla_w E + c \nabla_w q), \qquad
        \lambda \leftarrow \lambda - \gamma (\nabla_\lambda E + c \nabla_\lambda q), \qquad
        c = \max\Bigl(\eta - \frac{\langle \nabla E, \nabla q \rangle}{\|\nabla q\|^2}, 0\Bigr),

    with the inner products over params and hparams together: the smallest change of
    :math:`\nabla E` that makes :math:`q` decrease at the rate :math:`\eta \|\nabla q\|^2`, the
    dynamic barrier. The penalty :math:`c` finds its own size, which is without bound at a solution:
    with constant step sizes the loop ends in a neighbourhood whose size grows with them.
    Small inner batches bias it, as they do `pbgd`. ``T + 2`` gradients of the inner loss and one of
    the outer loss an update.

    ``barrier`` is :math:`\eta > 0`, ``num_inner_steps`` :math:`T \ge 1`; the inner loss is as for
    `pbgd`, and all other arguments, what is returned and the errors are those of `f2sa`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> decay = hf.bilevel.power_decay(0.5, 0.5)
        >>> loop = hf.bilevel.bome(
        ...     inner_loss, outer_loss, inner_lr=decay, outer_lr=decay, adjoint_lr=0.5
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> (state.params - 6.0).abs() < 0.01, (state.hparams - 3.0).abs() < 0.01
        (tensor(True), tensor(True))

    References:
        Ye, Liu, Wright, Stone and Liu, BOME! Bilevel optimization made easy: a simple first-order
        approach, arXiv 2209.08709.
    """
    check_count("bome", "num_inner_steps", num_inner_steps)
    return _BOME(
        inner_loss, outer_loss, steps, barrier=barrier, num_inner_steps=num_inner_steps
    ).loop()


@taking(AdjointSteps)
def pbgd(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    penalty: StepSize = 10.0,
    num_inner_steps: int = 10,
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""PBGD: gradient descent on the outer loss plus a penalty times what the inner one lacks.

    From :math:`z_0 = w`, each update takes :math:`T` steps
    :math:`z \leftarrow z - \rho_u \nabla_w \ell(z, \lambda)` to the second params
    (``State.adjoint``) and then one on :math:`E + c (\ell(w, \lambda) - \min_z \ell(z, \lambda))`:

    .. math::
        w \leftarrow w - \rho \bigl(\nabla_w \ell + \tfrac1c \nabla_w E\bigr)(w, \lambda), \qquad
        \lambda \leftarrow \lambda - \gamma \bigl(\nabla_\lambda E(w, \lambda)
        + c (\nabla_\lambda \ell(w, \lambda) - \nabla_\lambda \ell(z_T, \lambda))\bigr) .

    With a constant penalty the params end at a distance like :math:`1/c` from a minimum of the
    inner loss, and the hparams as far from the solution if :math:`T` is of the order of
    :math:`\log c` or more, as :math:`z_T` is to be as near that minimum. All :math:`T` steps see
    one batch, so that :math:`z_T` nears the minimum of the loss of that batch: on small batches the
    direction of the hparams is biased, however small the steps and large the penalty. Hand over
    inner batches whose minima hardly differ, or take `f2sa`. ``T + 2`` gradients of the inner loss
    and one of the outer loss an update. The paper has one step size for
    both, which is :math:`\gamma = \rho / c`: a large penalty asks for a small ``outer_lr``, and one
    that grows for one that falls as fast.

    ``penalty`` is :math:`c > 0`, and ``num_inner_steps`` :math:`T \ge 1`; the inner loss may have
    many minima, if it grows away from them (the condition of Polyak and Lojasiewicz). All other
    arguments, what is returned and the errors are those of `f2sa`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.pbgd(
        ...     inner_loss, outer_loss, inner_lr=0.5, outer_lr=0.15, penalty=2.0, num_inner_steps=4
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Shen and Chen, On penalty-based bilevel gradient descent method, algorithm 1,
        arXiv 2302.05185.
    """
    check_count("pbgd", "num_inner_steps", num_inner_steps)
    return _PBGD(
        inner_loss, outer_loss, steps, penalty=penalty, num_inner_steps=num_inner_steps
    ).loop()


@taking(AdjointSteps)
def meha(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    penalty: StepSize | None = None,
    proximal: float = 1.0,
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""MEHA: a penalty with the Moreau envelope of the inner loss, which need not be convex.

    The envelope :math:`\min_z \ell(z, \lambda) + \frac1{2 \gamma} \|z - w\|^2` takes the place of
    the minimum in the penalty of `pbgd`: its minimiser is one point, and one step an update follows
    it. With the second params :math:`z` (``State.adjoint``) and step sizes
    :math:`\rho, \rho_u, \rho_\lambda`, all in turn, each with the newest values, are

    .. math::
        z &\leftarrow z - \rho_u \bigl(\nabla_w \ell(z, \lambda) + \tfrac1\gamma (z - w)\bigr), \\
        \lambda &\leftarrow \lambda - \rho_\lambda \bigl(\tfrac1c \nabla_\lambda E(w, \lambda)
        + \nabla_\lambda \ell(w, \lambda) - \nabla_\lambda \ell(z, \lambda)\bigr), \\
        w &\leftarrow w - \rho \bigl(\tfrac1c \nabla_w E(w, \lambda)
        + \nabla_w \ell(w, \lambda) - \tfrac1\gamma (w - z)\bigr) .

    Four gradients of the inner loss and two of the outer loss an update. The direction of the
    hparams is a hypergradient over :math:`c`, other than in the other loops. Noise in the inner
    loss leaves a bias like :math:`\rho_u c`: let ``inner_lr`` and ``adjoint_lr`` fall faster than
    the penalty grows.

    ``proximal`` is :math:`\gamma > 0`, below :math:`1/m` where the inner loss has curvature of
    :math:`-m` and more (the paper asks for half of that). ``adjoint_lr`` is below 2 over the
    largest curvature plus :math:`1/\gamma`, and ``inner_lr`` below
    :math:`\rho_u (1 - \gamma m) / (1 + \gamma m)`, for a convex loss below ``adjoint_lr``: where it
    is flat, the params run away from second params that follow more slowly. ``penalty`` is
    :math:`c > 0`, by default ``power_growth(1.0, 1 / 4)``; the paper has exponents below 1/2. All
    other arguments, what is returned and the errors are those of `f2sa`.

    Example:
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> loop = hf.bilevel.meha(
        ...     inner_loss, outer_loss, inner_lr=0.3, outer_lr=0.1, adjoint_lr=0.6
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(300):
        ...     state = loop.update(state, (torch.tensor(2.0),), (torch.tensor(6.0),))
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Liu, Liu, Yao, Zeng and Zhang, Moreau envelope for nonconvex bi-level optimization: a
        single-loop and Hessian-free solution strategy, arXiv 2405.09927.
    """
    penalty = power_growth(1.0, 1 / 4) if penalty is None else penalty
    return _MEHA(inner_loss, outer_loss, steps, penalty=penalty, proximal=proximal).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _SecondParams(Method):
    """What the four have in common: second params, which start where the params do."""

    adjoint: ClassVar[Any] = "params"
    first_order = True

    def start(self, state: State, inner_batch: Any, outer_batch: Any) -> Point:
        """The state in flat form, with checks of all that an update takes."""
        point = self.enter(state)
        for key, batch in (("inner_batch", inner_batch), ("outer_batch", outer_batch)):
            check_batch(self.name, key, batch)
        return point


@dataclasses.dataclass(frozen=True, repr=False)
class _Penalised(_SecondParams):
    penalty: StepSize = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.penalty):
            check_rate(self.name, "penalty", self.penalty)
        self._check_positive("penalty", self.penalty)

    def penalty_at(self, point: Point) -> Any:
        """The penalty at this step."""
        self._check_positive("penalty(step)", penalty := point.rate("penalty"))
        return penalty

    def _check_positive(self, key: str, penalty: Any) -> None:
        if is_number(penalty):
            check_number(self.name, key, penalty, above=True)


@dataclasses.dataclass(frozen=True, repr=False)
class _F2SA(_Penalised):
    num_inner_steps: int = dataclasses.field(kw_only=True)

    name = "f2sa"

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.start(state, inner_batch, outer_batch)
        c, y = self.penalty_at(point), dataclasses.replace(point, w=point.u)
        for _ in range(self.num_inner_steps):
            outer_params, _ = y.gradients("outer_loss", outer_batch, by="w")
            direction = trees.axpy(1 / c, outer_params, y.gradient(inner_batch))
            y = y.step("adjoint", direction, BOTH, on="w")
        z = _descend("inner", _beside(point, y), inner_batch, self.num_inner_steps)
        _, outer_hparams = y.gradients("outer_loss", outer_batch, by="h")
        at_y, at_z = (each.gradients("inner_loss", inner_batch, by="h")[1] for each in (y, z))
        d_h = trees.axpy(c, trees.sub(at_y, at_z), outer_hparams)
        return z.step("outer", d_h).leave()


@dataclasses.dataclass(frozen=True, repr=False)
class _PBGD(_Penalised):
    num_inner_steps: int = dataclasses.field(kw_only=True)

    name = "pbgd"
    adjoint = "restarted"

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.start(state, inner_batch, outer_batch)
        c = self.penalty_at(point)
        z = _descend("adjoint", point, inner_batch, self.num_inner_steps)
        outer_params, outer_hparams = point.gradients("outer_loss", outer_batch)
        q_w, q_h = _gap(point, z, inner_batch)
        end = _beside(point, z).step("inner", trees.axpy(1 / c, outer_params, q_w), BOTH)
        return end.step("outer", trees.axpy(c, q_h, outer_hparams)).leave()


@dataclasses.dataclass(frozen=True, repr=False)
class _BOME(_SecondParams):
    barrier: float = dataclasses.field(kw_only=True)
    num_inner_steps: int = dataclasses.field(kw_only=True)

    name = "bome"
    adjoint = "restarted"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "barrier", self.barrier, above=True)

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.start(state, inner_batch, outer_batch)
        z = _descend("adjoint", point, inner_batch, self.num_inner_steps)
        outer_params, outer_hparams = point.gradients("outer_loss", outer_batch)
        q_w, q_h = q = _gap(point, z, inner_batch)
        along, square = _dot((outer_params, outer_hparams), q), _dot(q, q)
        c = (self.barrier - along / torch.where(square > 0, square, 1.0)).clamp(min=0)
        end = _beside(point, z).step("inner", trees.axpy(c, q_w, outer_params), BOTH)
        return end.step("outer", trees.axpy(c, q_h, outer_hparams)).leave()


@dataclasses.dataclass(frozen=True, repr=False)
class _MEHA(_Penalised):
    proximal: float = dataclasses.field(kw_only=True)

    name = "meha"
    shares = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "proximal", self.proximal, above=True)

    def update(
        self, state: State, inner_batch: tuple[Any, ...], outer_batch: tuple[Any, ...]
    ) -> State:
        point = self.start(state, inner_batch, outer_batch)
        c, pull = self.penalty_at(point), 1 / self.proximal
        z = dataclasses.replace(point, w=point.u)
        d_z = trees.axpy(pull, trees.sub(z.w, point.w), z.gradient(inner_batch))
        z = z.step("adjoint", d_z, on="w")
        _, outer_hparams = point.gradients("outer_loss", outer_batch, by="h")
        _, q_h = _gap(point, z, inner_batch, by="h")
        moved = _beside(point, z).step("outer", trees.axpy(1 / c, outer_hparams, q_h))
        outer_params, _ = moved.gradients("outer_loss", outer_batch, by="w")
        d_w = trees.axpy(1 / c, outer_params, moved.gradient(inner_batch))
        d_w = trees.axpy(-pull, trees.sub(point.w, z.w), d_w)
        return moved.step("inner", d_w, BOTH).leave()


def _descend(key: Variable, point: Point, batch: tuple[Any, ...], num_steps: int) -> Point:
    """Steps on the inner loss, of the params or of second params in their place."""
    for _ in range(num_steps):
        point = point.step(key, point.gradient(batch), on="w")
    return point


def _beside(point: Point, z: Point) -> Point:
    """The point after steps on second params, which stood in the place of the params."""
    return dataclasses.replace(z, w=point.w, u=z.w)


def _gap(
    point: Point, z: Point, batch: tuple[Any, ...], by: Literal["wh", "h"] = "wh"
) -> tuple[Leaves, Leaves]:
    """The gradient of ``inner_loss(w, h) - inner_loss(z, h)``, with z held fixed."""
    at_w, at_h = point.gradients("inner_loss", batch, by)
    return at_w, trees.sub(at_h, z.gradients("inner_loss", batch, by="h")[1])


def _dot(a: tuple[Leaves, Leaves], b: tuple[Leaves, Leaves]) -> Tensor:
    """The inner product over params and hparams, which may lie on different devices."""
    of_params, of_hparams = trees.dot(a[0], b[0]), trees.dot(a[1], b[1])
    return of_params + of_hparams.to(of_params.device)
