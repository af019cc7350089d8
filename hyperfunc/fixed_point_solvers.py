r"""Solvers of fixed-point problems ``z = f(z, hparams, *args)`` on trees of any layout.

Each is a small frozen object, called as ``solver(fixed_point, init, hparams, *args)``, which
returns the solution and `hyperfunc.SolveStats`. It stops when

.. math:: \| f(z) - z \| \le \max(\text{rtol} \, \| f(z) \|, \, \text{atol})

and returns the iterate :math:`z` that this was measured at. The norm is over all leaves. With
``batch_dim`` each index of that dimension is a sample, with its own norm, stop and statistics, as
each task is under ``torch.func.vmap``: a sample that has converged keeps its iterate, bit by bit,
while the others go on. A sample that has not converged gets its iterate with the smallest residual.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.results import RESULTS, HypergradError, SolveStats, of_tasks
from hyperfunc._torch import autodiff, batching, sharding, tracking
from hyperfunc._torch.captured import captured_message
from hyperfunc._types import InnerSolver, Leaves, ParamsFunction, TensorTree
from hyperfunc.linear_solvers import GMRES, AbstractLinearSolver, LinearOperator
from hyperfunc.linear_solvers._anderson import append_row, mixing_coefficients
from hyperfunc.linear_solvers._base import check_settings, check_step_size
from hyperfunc.linear_solvers._preconditioners import check_count
from hyperfunc.linear_solvers._wrappers import check_solver

__all__ = ["AbstractFixedPointSolver", "Anderson", "Broyden", "Newton", "Picard"]

# A residual this many times the best one makes a method with a memory start anew from there.
_GROWTH = 10.0


class AbstractFixedPointSolver(abc.ABC):
    """What every fixed-point solver provides: the call, and `inner_solver`.

    A subclass is final: a frozen dataclass of its settings with one method that is private.
    """

    maxiter: int
    rtol: float | None
    atol: float
    batch_dim: int | None
    throw: bool

    def __call__(
        self, fixed_point: ParamsFunction, init: TensorTree, hparams: TensorTree, /, *args: Any
    ) -> tuple[TensorTree, SolveStats]:
        """Solve ``z = fixed_point(z, hparams, *args)``.

        A pure function; what autograd records of it are the steps. For the derivatives of the
        solution itself use `inner_solver` with `hyperfunc.implicit_diff`.

        Args:
            fixed_point: ``(params, hparams, *args) -> tree like params``.
            init: where to start: the solution for similar ``hparams`` saves steps.
            hparams: passed on to ``fixed_point``.
            args: passed on to ``fixed_point``.

        Returns:
            The solution, a tree like ``init``, and its `hyperfunc.SolveStats`: steps taken (the map
            is evaluated once more, to measure the last one), residual norm of the solution, and
            result. With ``batch_dim`` they have shape ``(batch,)``.

        Raises:
            HypergradError: for non-finite values and divergence, with ``throw``.
            TypeError: if a leaf of ``init`` is not a floating-point tensor.
            ValueError: if the map changes structure, shape, dtype or device, or leaves have no
                common batch dimension.
        """
        layout = _Layout.make(init, self.batch_dim)
        apply = _FlatMap(fixed_point, layout.spec, hparams, args)
        rows, stats = _solve(self, self._iteration(layout, apply), layout)
        if self.throw:
            raise_unless_solved(self, stats)
        if self.batch_dim is None:
            stats = SolveStats(*(field[0] for field in stats))
        return trees.unflatten(layout.spec, layout.unpack(rows)), stats

    def inner_solver(
        self, fixed_point: ParamsFunction, *, init: InnerSolver
    ) -> FixedPointInnerSolver:
        """An inner solver ``(hparams, *args) -> params`` that carries its condition.

        Args:
            fixed_point: ``(params, hparams, *args) -> tree like params``.
            init: ``(hparams, *args) -> params``, where the solver starts.

        Returns:
            The inner solver, for `hyperfunc.hypergrad` and `hyperfunc.implicit_diff`, which then
            need no ``fixed_point=``.

        Example:
            >>> solve = hf.fixed_point_solvers.Anderson().inner_solver(
            ...     lambda z, h: torch.cos(h * z), init=lambda h: torch.zeros_like(h)
            ... )
            >>> torch.func.grad(hf.implicit_diff(solve, method="gmres"))(torch.tensor(1.0))
            tensor(-0.2975)
        """
        for name, value in (("fixed_point", fixed_point), ("init", init)):
            if not callable(value):
                raise TypeError(
                    f"{name} is {value!r} of type {type(value).__name__}; expected a function"
                )
        return FixedPointInnerSolver(self, fixed_point, init)

    @abc.abstractmethod
    def _iteration(self, layout: _Layout, apply: _FlatMap) -> _Iteration:
        """What the solver does in one call."""


@dataclasses.dataclass(frozen=True)
class Picard(AbstractFixedPointSolver):
    r"""The plain iteration :math:`z_{k+1} = z_k + \eta \, (f(z_k) - z_k)`.

    Converges for a contraction, with its factor; a step size :math:`\eta < 1` averages, which also
    makes maps converge whose Jacobian has eigenvalues beyond -1.

    Args:
        maxiter: largest number of steps, >= 0. With ``rtol=0, atol=0`` exactly this many, a
            success, without any host synchronisation but for the check of ``throw`` at the end.
        rtol: relative tolerance, >= 0; by default ``eps ** 0.75`` for the coarsest dtype, that is
            1.8e-12 in float64 and 6.4e-6 in float32. Below ``eps`` it counts as ``eps``.
        atol: absolute tolerance, >= 0.
        step_size: :math:`\eta > 0`.
        batch_dim: the dimension of all leaves that counts samples; None: one problem.
        throw: whether non-finite values and divergence raise; else they are result codes.

    A residual that is larger at the end than at the start is reported as divergence.

    Example:
        >>> solver = hf.fixed_point_solvers.Picard(batch_dim=0)
        >>> f = lambda z, h, x: h * z + x
        >>> z, stats = solver(f, torch.zeros(3), torch.tensor([0.0, 0.25, 0.5]), torch.ones(3))
        >>> z
        tensor([1.0000, 1.3333, 2.0000])
        >>> stats.num_steps
        tensor([ 1,  9, 17])
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    step_size: float = 1.0
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check(self)
        check_step_size(self, self.step_size)

    def _iteration(self, layout: _Layout, apply: _FlatMap) -> _Iteration:
        return _PicardIteration(apply, self.step_size)


@dataclasses.dataclass(frozen=True)
class Anderson(AbstractFixedPointSolver):
    r"""Anderson acceleration: the combination of the last steps with the smallest residual.

    With :math:`f_k = f(z_k) - z_k` and the differences :math:`\Delta z_i, \Delta f_i` of the last
    ``memory`` steps,

    .. math::
        z_{k+1} = z_k + \eta f_k - \sum_i \gamma_i (\Delta z_i + \eta \Delta f_i),
        \qquad \gamma = \arg\min_\gamma \| f_k - \sum_i \gamma_i \Delta f_i \|^2
            + \text{ridge} \sum_i \gamma_i^2 \| \Delta f_i \|^2 .

    One evaluation a step, as `Picard`, and fewer steps; it converges for many maps that are no
    contraction. A sample whose memory is full and whose residual is 10 times its best one forgets
    its memory and takes a plain step from its best iterate.

    Args:
        maxiter: see `Picard`, as for all other arguments.
        rtol: see `Picard`.
        atol: see `Picard`.
        memory: differences to keep, two vectors each; >= 1.
        step_size: :math:`\eta > 0`, "mixing" or "beta" elsewhere.
        ridge: relative regularisation, >= 0; by default ``10 eps``, which only keeps the
            least-squares problem solvable. Larger values are for noisy maps.
        batch_dim: see `Picard`; each sample has coefficients of its own.
        throw: see `Picard`.

    Example:
        >>> rotate = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
        >>> f = lambda z, h: rotate @ z + h
        >>> z, stats = hf.fixed_point_solvers.Anderson()(f, torch.zeros(2), torch.ones(2))
        >>> z, stats.num_steps
        (tensor([0.0552, 1.0497]), tensor(3))
        >>> hf.fixed_point_solvers.Picard()(f, torch.zeros(2), torch.ones(2))[1].num_steps
        tensor(117)

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, 2011.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    memory: int = 5
    step_size: float = 1.0
    ridge: float | None = None
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check(self)
        check_count(self, "memory", self.memory)
        check_step_size(self, self.step_size)
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise ValueError(f"Anderson: ridge is {self.ridge!r}; expected a number >= 0, or None")

    def _iteration(self, layout: _Layout, apply: _FlatMap) -> _Iteration:
        return _AndersonIteration(apply, self)


@dataclasses.dataclass(frozen=True)
class Broyden(AbstractFixedPointSolver):
    r"""Broyden's method: Newton's with an inverse Jacobian that is learned from the steps.

    For the root of :math:`g(z) = f(z) - z`, from :math:`H_0 = -I`,

    .. math::
        z_{k+1} = z_k - H_k g_k, \qquad
        H_{k+1} = H_k + \frac{(\Delta z - H_k \Delta g) \, \Delta z^\top H_k}
            {\Delta z^\top H_k \Delta g} .

    The first step is a plain one. One evaluation a step; the updates are kept as ``memory`` pairs
    of vectors, all forgotten when there is no room for another, and an update with a denominator
    at rounding level is left out. Growth of the residual is dealt with as in `Anderson`.

    Args:
        maxiter: see `Picard`, as for all other arguments.
        rtol: see `Picard`.
        atol: see `Picard`.
        memory: updates to keep, two vectors each; >= 1.
        batch_dim: see `Picard`; each sample has an inverse Jacobian of its own.
        throw: see `Picard`.

    Example:
        >>> f = lambda z, h: torch.tanh(h - 3 * z)  # not a contraction
        >>> z, stats = hf.fixed_point_solvers.Broyden()(f, torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> z
        tensor([0.2487, 0.4886])

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, 1965; limited
        memory: Kelley, Iterative methods for linear and nonlinear equations, 1995, chapter 7.
    """

    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0
    memory: int = 20
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check(self)
        check_count(self, "memory", self.memory)

    def _iteration(self, layout: _Layout, apply: _FlatMap) -> _Iteration:
        return _BroydenIteration(apply, self.memory)


@dataclasses.dataclass(frozen=True)
class Newton(AbstractFixedPointSolver):
    r"""Newton's method, whose linear systems are solved by products.

    .. math:: z_{k+1} = z_k + \delta, \qquad (I - f'(z_k)) \, \delta = f(z_k) - z_k

    Converges quadratically from a start that is close enough; no contraction is needed. A step
    takes one evaluation of the map and the products of the linear solver.

    Samples (``batch_dim``) have their own stop and statistics, and those that are done have a zero
    right-hand side, but the linear system is one for all of them. Where samples do not interact,
    ``Blockwise(GMRES(), blocks="batch")`` solves one for each.

    Args:
        maxiter: see `Picard`, as for all other arguments.
        rtol: see `Picard`.
        atol: see `Picard`.
        linear_solver: any of the linear solvers, such as ``hf.NormalCG()``. A solve that stops
            early or fails is no failure of Newton's method unless its step is bad.
        batch_dim: see `Picard`.
        throw: see `Picard`.

    Its steps cannot be differentiated: autograd or a transform that would record them is refused.

    Example:
        >>> f = lambda z, a: z + z**2 - a  # expands
        >>> z, stats = hf.fixed_point_solvers.Newton()(f, torch.ones(2), torch.tensor([2.0, 3.0]))
        >>> z
        tensor([1.4142, 1.7321])
    """

    maxiter: int = 50
    rtol: float | None = None
    atol: float = 0.0
    linear_solver: AbstractLinearSolver = GMRES()
    batch_dim: int | None = None
    throw: bool = True

    def __post_init__(self) -> None:
        _check(self)
        check_solver(self, "linear_solver", self.linear_solver)

    def _iteration(self, layout: _Layout, apply: _FlatMap) -> _Iteration:
        tensors = (*layout.init, *trees.flatten((apply.hparams, apply.args))[0])
        recorded = torch.is_grad_enabled() or tracking.transforms_active()
        if recorded and any(map(tracking.is_attached, tensors)):
            raise ValueError(
                "Newton: its steps cannot be differentiated, but init, hparams or *args require "
                "grad or belong to an enclosing torch.func transform. Use "
                "hf.implicit_diff(solver.inner_solver(fixed_point, init=...)) for the derivatives "
                "of the solution, detach the tensors, or take Anderson or Broyden"
            )
        return _NewtonIteration(apply, layout, self.linear_solver)


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPointInnerSolver:
    """An inner solver made by `AbstractFixedPointSolver.inner_solver`.

    Attributes:
        solver: the fixed-point solver.
        fixed_point: the map that it solves.
        init: ``(hparams, *args) -> params``, where it starts.
    """

    solver: AbstractFixedPointSolver
    fixed_point: ParamsFunction
    init: InnerSolver

    @property
    def condition(self) -> tuple[str, ParamsFunction]:
        """What the solution satisfies, for `hypergrad`."""
        return ("fixed_point", self.fixed_point)

    def __call__(self, hparams: TensorTree, /, *args: Any) -> TensorTree:
        """The solution."""
        return self.solver(self.fixed_point, self.init(hparams, *args), hparams, *args)[0]


def raise_unless_solved(
    solver: AbstractFixedPointSolver, stats: SolveStats, *, finished: bool = False
) -> None:
    """Raise if a solve failed, or with ``finished`` if it only stopped at its step limit.

    The message says why, and for which of the samples of all batch and vmap dimensions.
    """
    accepted = RESULTS.success if finished else RESULTS.max_steps
    failed = stats.result > int(accepted)
    if not batching.any_true(failed.sum()):
        return
    code = next(
        code
        for code in RESULTS
        if code > accepted and batching.count_true((stats.result == int(code)).sum())
    )
    raise HypergradError(
        f"the fixed-point solve with {solver!r} failed{of_tasks(failed, 'samples')}: "
        f"{_ADVICE[code]}. Pass throw=False to get the best iterates and the result codes instead"
    )


_ADVICE = {
    RESULTS.max_steps: "the tolerance was not reached. Raise maxiter or rtol, start closer, or "
    "take a solver that needs fewer steps (Anderson, Broyden, Newton)",
    RESULTS.nonfinite: "non-finite values (NaN or Inf) appeared. Check the start and the inputs, "
    "or bound the map",
    RESULTS.divergence: "the residual grew instead of shrinking: the map is no contraction there. "
    "Take Anderson, Broyden or Newton, start closer, or bound the map's Lipschitz constant "
    "(torch.nn.utils.parametrizations.spectral_norm)",
}


class _Point(NamedTuple):
    """Iterates as rows, one a sample, with the values of the map and the residual norms there."""

    z: Tensor
    value: Tensor
    norm: Tensor

    @property
    def residual(self) -> Tensor:
        return self.value - self.z


class _Iteration(Protocol):
    """The steps of one solve: the map, and from a point the next iterate; holds the memory."""

    @property
    def memory(self) -> int | None:
        """After how many steps it may have to start anew; None if it has no memory."""
        ...

    def apply(self, leaves: Leaves, /) -> Leaves:
        """The map on flat trees."""
        ...

    def advance(self, point: _Point, active: Tensor, restart: Tensor) -> Tensor:
        """The next iterates; samples to ``restart`` have no memory any more."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class _FlatMap:
    """The user's map on flat trees."""

    fixed_point: ParamsFunction
    spec: trees.TreeSpec
    hparams: TensorTree
    args: tuple[Any, ...]

    def __call__(self, leaves: Leaves) -> Leaves:
        output = self.fixed_point(trees.unflatten(self.spec, leaves), self.hparams, *self.args)
        values, spec = trees.flatten(output)
        trees.check_like(values, spec, leaves, self.spec, "the output of fixed_point", "params")
        return tuple(values)


@dataclasses.dataclass(frozen=True, eq=False)
class _Layout:
    """How the leaves of a tree are laid out as a matrix with one row a sample."""

    init: Leaves
    spec: trees.TreeSpec
    batch_dim: int | None
    num_rows: int
    dtype: torch.dtype

    @staticmethod
    def make(init: TensorTree, batch_dim: int | None) -> _Layout:
        leaves, spec = trees.flatten_floating(init, "init")
        for leaf, path in zip(leaves, trees.paths(spec, "init"), strict=True):
            if sharding.is_sharded(leaf):
                raise ValueError(
                    f"{path} is a DTensor that is sharded, but fixed-point solvers keep iterates "
                    f"as one matrix. Use an inner solver made by hf.iterate or hf.minimize"
                )
        num_rows = 1
        if batch_dim is not None:
            paths = trees.paths(spec, "init")
            for leaf, path in zip(leaves, paths, strict=True):
                if not -leaf.ndim <= batch_dim < leaf.ndim:
                    raise ValueError(
                        f"{path} has shape {tuple(leaf.shape)}, without dimension {batch_dim}; "
                        f"batch_dim={batch_dim} says that all leaves have one, which counts "
                        f"samples. Write batch_dim=None for one problem"
                    )
                if leaf.shape[batch_dim] != leaves[0].shape[batch_dim]:
                    raise ValueError(
                        f"{paths[0]} has shape {tuple(leaves[0].shape)} and {path} has shape "
                        f"{tuple(leaf.shape)}; expected the same size in dimension {batch_dim} "
                        f"(batch_dim), which counts samples"
                    )
            num_rows = leaves[0].shape[batch_dim]
        return _Layout(leaves, spec, batch_dim, num_rows, trees.accumulation_dtype(leaves))

    def pack(self, leaves: Leaves) -> Tensor:
        """The leaves as rows, in the accumulation dtype."""
        device = self.init[0].device
        rows = [
            (leaf if self.batch_dim is None else leaf.movedim(self.batch_dim, 0))
            .reshape(self.num_rows, size)
            .to(device=device, dtype=self.dtype)
            for leaf, size in zip(leaves, self._sizes, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def unpack(self, rows: Tensor) -> Leaves:
        """The inverse of `pack`."""
        leaves = []
        for part, leaf in zip(rows.split(self._sizes, dim=1), self.init, strict=True):
            if self.batch_dim is None:
                part = part.reshape(leaf.shape)
            else:
                part = part.reshape(leaf.movedim(self.batch_dim, 0).shape)
                part = part.movedim(0, self.batch_dim)
            leaves.append(part.to(device=leaf.device, dtype=leaf.dtype))
        return tuple(leaves)

    def round(self, rows: Tensor) -> Tensor:
        """The rows with each entry in the precision of its leaf."""
        if all(leaf.dtype == self.dtype for leaf in self.init):
            return rows
        return self.pack(self.unpack(rows))

    @property
    def _sizes(self) -> list[int]:
        if self.batch_dim is None:
            return [leaf.numel() for leaf in self.init]
        return [leaf.movedim(self.batch_dim, 0).shape[1:].numel() for leaf in self.init]


def _solve(
    solver: AbstractFixedPointSolver, iteration: _Iteration, layout: _Layout
) -> tuple[Tensor, SolveStats]:
    eps = trees.epsilon(layout.init)
    adaptive = solver.rtol != 0 or solver.atol != 0
    rtol = max(eps**0.75 if solver.rtol is None else solver.rtol, eps)

    def measure(z: Tensor) -> tuple[_Point, Tensor]:
        value = layout.pack(iteration.apply(layout.unpack(z)))
        return _Point(z, value, _norms(value - z)), _norms(value)

    z = layout.pack(layout.init)
    point, size = measure(z)
    best, first, largest = point, point.norm, torch.maximum(point.norm, size)
    active = torch.ones(layout.num_rows, dtype=torch.bool, device=z.device)
    done = ~active
    num_steps = age = torch.zeros_like(active, dtype=torch.int64)
    for step in range(solver.maxiter + adaptive):
        if step > 0:
            new, size = measure(z)
            point = new._replace(norm=torch.where(active, new.norm, point.norm))
        if adaptive:
            met = active & (point.norm <= (rtol * size).clamp_min(solver.atol))
            best = _select(active & (met | (point.norm < best.norm)), point, best)
            done = done | met
            active = active & ~met & (point.norm < largest / eps)
            if step == solver.maxiter or not batching.any_true(active.any()):
                break
        elif iteration.memory is not None:
            best = _select(point.norm < best.norm, point, best)
        start, restart = point, torch.zeros_like(active)
        if iteration.memory is not None:
            restart = active & (age > iteration.memory) & (point.norm > _GROWTH * best.norm)
            start = _select(restart, best, point)
            age = torch.where(restart, 0, age + 1)
        following = layout.round(iteration.advance(start, active, restart))
        z = torch.where(active[:, None], following, z) if adaptive else following
        num_steps = num_steps + active
    if not adaptive:
        finite = torch.isfinite(point.norm) & torch.isfinite(z.detach()).all(dim=1)
        result = torch.where(finite, int(RESULTS.success), int(RESULTS.nonfinite))
        return z, SolveStats(num_steps, point.norm, result)
    # rounding noise around a start that is the solution may grow
    grown = ~active | (point.norm > 1.001 * torch.maximum(first, eps * largest))
    result = torch.where(grown, int(RESULTS.divergence), int(RESULTS.max_steps))
    result = torch.where(torch.isfinite(point.norm), result, int(RESULTS.nonfinite))
    result = torch.where(done, int(RESULTS.success), result)
    return best.z, SolveStats(num_steps, best.norm, result)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows.detach(), dim=1)
    return norms


def _select(mask: Tensor, a: _Point, b: _Point) -> _Point:
    column = mask[:, None]
    return _Point(
        torch.where(column, a.z, b.z),
        torch.where(column, a.value, b.value),
        torch.where(mask, a.norm, b.norm),
    )


class _PicardIteration:
    memory = None

    def __init__(self, apply: _FlatMap, step_size: float) -> None:
        self.apply = apply
        self._step_size = step_size

    def advance(self, point: _Point, active: Tensor, restart: Tensor) -> Tensor:
        if self._step_size == 1:
            return point.value
        return torch.lerp(point.z, point.value, self._step_size)


class _AndersonIteration:
    def __init__(self, apply: _FlatMap, solver: Anderson) -> None:
        self.apply = apply
        self.memory = solver.memory
        self._step_size = solver.step_size
        self._ridge = solver.ridge
        self._previous: tuple[Tensor, Tensor] | None = None

    def advance(self, point: _Point, active: Tensor, restart: Tensor) -> Tensor:
        z, f = point.z, point.residual
        new = point.value if self._step_size == 1 else z + self._step_size * f
        if self._previous is None:
            self._z_steps = self._f_steps = z.new_empty(len(z), 0, z.shape[1])
            self._alive = restart.new_empty(len(z), 0)
        else:
            old_z, old_f = self._previous
            self._z_steps = append_row(self._z_steps, z - old_z, self.memory)
            self._f_steps = append_row(self._f_steps, f - old_f, self.memory)
            alive = torch.cat([self._alive, active[:, None]], dim=1)[:, -self.memory :]
            self._alive = alive & ~restart[:, None]
            gamma = mixing_coefficients(self._f_steps, f, ridge=self._ridge, alive=self._alive)
            steps = torch.add(self._z_steps, self._f_steps, alpha=self._step_size)
            new = new - (gamma[:, None] @ steps)[:, 0]
        self._previous = z, f
        return new


class _BroydenIteration:
    """Holds the inverse Jacobian as ``H = -I + sum_i u_i v_i^T``."""

    def __init__(self, apply: _FlatMap, memory: int) -> None:
        self.apply = apply
        self.memory = memory
        self._previous: tuple[Tensor, Tensor] | None = None

    def advance(self, point: _Point, active: Tensor, restart: Tensor) -> Tensor:
        z, g = point.z, point.residual
        if self._previous is None:
            self._u = self._v = z.new_empty(len(z), 0, z.shape[1])
        else:
            if self._u.shape[1] == self.memory:
                self._u = self._v = self._u[:, :0]
            z_step, g_step = z - self._previous[0], g - self._previous[1]
            row = _combine(z_step, self._u, self._v) - z_step
            error = z_step + g_step - _combine(g_step, self._v, self._u)
            denominator = (row * g_step).sum(dim=1)
            noise = torch.finfo(z.dtype).eps * _norms(row) * _norms(g_step)
            sound = active & (denominator.abs() > noise)
            column = error / torch.where(sound, denominator, 1.0)[:, None]
            self._u = append_row(self._u, torch.where(sound[:, None], column, 0.0), self.memory)
            self._v = append_row(self._v, row, self.memory)
            self._u = torch.where(restart[:, None, None], 0.0, self._u)
        self._previous = z, g
        return point.value - _combine(g, self._v, self._u)


def _combine(vectors: Tensor, by: Tensor, rows: Tensor) -> Tensor:
    """For each sample ``sum_i (vector . by_i) rows_i``."""
    coefficients = by @ vectors.unsqueeze(-1)
    return (coefficients.mT @ rows)[:, 0]


class _NewtonIteration:
    memory = None

    def __init__(
        self, apply: _FlatMap, layout: _Layout, linear_solver: AbstractLinearSolver
    ) -> None:
        self._map = apply
        self._layout = layout
        self._linear_solver = linear_solver

    def apply(self, leaves: Leaves, /) -> Leaves:
        inputs = tracking.detach(leaves)
        self._linearization = autodiff.Linearization(
            lambda *z: self._map(z), inputs, (tuple(range(len(inputs))),)
        )
        if self._linearization.captures_gradient and torch.is_grad_enabled():
            raise ValueError(captured_message("fixed_point"))
        return tracking.detach(self._linearization.outputs)

    def advance(self, point: _Point, active: Tensor, restart: Tensor) -> Tensor:
        layout, column = self._layout, active[:, None]

        def masked(product: Callable[[Leaves], Leaves]) -> Callable[[Leaves], Leaves]:
            # a sample that is NaN must not reach the others by the inner products of the solver
            if layout.batch_dim is None:
                return product
            return lambda v: layout.unpack(torch.where(column, layout.pack(product(v)), 0.0))

        operator = LinearOperator(
            product=masked(self._linearization.push),
            transposed_product=masked(self._linearization.pull),
            shift=1.0,
            scale=-1.0,
            spec=layout.spec,
        )
        rhs = layout.unpack(torch.where(column, point.residual, 0.0))
        step, _ = self._linear_solver.solve(operator, rhs)
        return point.z + layout.pack(step).detach()


def _check(solver: AbstractFixedPointSolver) -> None:
    name = type(solver).__name__
    check_settings(solver, solver.maxiter, solver.rtol, solver.atol)
    if solver.batch_dim is not None and not (
        isinstance(solver.batch_dim, int) and not isinstance(solver.batch_dim, bool)
    ):
        raise ValueError(
            f"{name}: batch_dim is {solver.batch_dim!r}; expected an integer, or None for one "
            f"problem"
        )
