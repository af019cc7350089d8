"""Equilibrium layers: modules whose output is the fixed point of a cell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hyperfunc._compile.compiler import Compiler, check_backend
from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_count, check_flags
from hyperfunc._engine.results import SolveStats
from hyperfunc._engine.shown import show
from hyperfunc._engine.user_functions import call, explain
from hyperfunc._torch import autodiff, derivative_rules, tracking
from hyperfunc._torch.internals import is_exporting
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.fixed_point_solvers import AbstractFixedPointSolver, Anderson, Newton
from hyperfunc.fixed_point_solvers._base import (
    raise_unless_solved,
    solve_compiled,
    warn_unless_solved,
)
from hyperfunc.inner_solvers import iterate
from hyperfunc.iterative import Reverse, ReverseUnroll
from hyperfunc.iterative._segment import RngAutocastState
from hyperfunc.linear_solvers import (
    GMRES,
    AbstractLinearSolver,
    BiCGStab,
)
from hyperfunc.modules import FunctionalModule
from hyperfunc.transforms._hypergrad import implicit_diff, make_differentiable
from hyperfunc.transforms._methods import resolve_method


@final
class EquilibriumLayer(nn.Module):
    r"""A layer with the fixed point of a cell as output, for ordinary training loops.

    ``layer(x)`` is the state :math:`z^*` with

    .. math:: z^* = \mathrm{cell}_\theta(z^*, x),

    found by a fixed-point solver. Gradients with respect to the inputs and to the cell's
    parameters, of any order, come from the implicit function theorem: memory does not grow with the
    number of steps. The cell has to have a fixed point. Random numbers are the same in all
    evaluations of one call, backward pass included, and others in the next: Dropout in the cell is
    variational dropout, one mask for all steps.

    The settings are attributes that may be replaced, and the cell is a submodule, ``layer.cell``,
    whose submodules are attributes of the layer too, ``layer.linear`` for ``layer.cell.linear``;
    its own tensors are not, and parametrisations of these belong on ``layer.cell``. A state
    dictionary of the cell loads into the layer.

    Within one call the cell is a function: its weights, parametrised ones included, are computed
    once, and what its forward writes to buffers is dropped. In training mode, and outside of
    ``torch.func``, running statistics are then updated once, by a further evaluation at the
    solution. Under autocast the cell runs in the lower precision, and the state and the solvers in
    the state's own; tolerances below the lower precision count as that precision.

    ``torch.export``, with ``strict=False`` and under ``torch.no_grad()``, takes a layer whose
    solver makes a fixed number of steps, ``rtol=0, atol=0``: `Picard`, `Anderson` or `Broyden`;
    with a ``batch_dim`` for batches of any size too, where ``init`` has ``x.shape[0]`` in place of
    ``len(x)``. With ``strict=True`` torch reads the code of
    the solvers in place of running it, and stops there with an error of its own.

    Args:
        cell: a module whose ``forward(state, *inputs)`` returns a tree like ``state``; not copied.
        solver: how the fixed point is found. By default each index of the first dimension of the
            state is a sample with a stop of its own, ``batch_dim=0``.
        method: how it is differentiated. A linear solver applies the implicit rule; by default
            `GMRES`, as :math:`I - \partial \mathrm{cell} / \partial z` is not symmetric and the
            cell need not be a contraction, and with ``compile`` `BiCGStab`, which takes half the
            time to compile. ``hf.FixedPoint()`` keeps fewer vectors where it is;
            ``hf.OneStep()`` is the Jacobian-free gradient. ``hf.Reverse(last=K)`` takes K further
            steps of the cell from the solution and differentiates these ("phantom gradient");
            ``hf.ReverseUnroll()`` differentiates every step of the solver, and holds their graphs.
        init: ``(*inputs) -> state``, where the solver starts and what a state looks like; by
            default zeros like the first input. Integers and bools in a state, such as masks, are
            constants: the cell returns some of the same shapes, which are dropped.
        throw: what happens where the solver does not reach its tolerance. By default non-finite
            values raise; else the result is the best iterate, and a `ConvergenceWarning` tells it,
            unless ``return_stats`` does. True raises for all of these, False for none. With
            ``rtol=0, atol=0`` there is no tolerance to reach.
        throw_backward: the same for the linear solver of the backward pass, which by default raises
            for divergence too, and with True for all that `RESULTS` calls a failure.
        on_backward: called with the `SolveStats` of the backward pass, as ``history.append``.
        compile: whether to compile the solve and the backward pass, as by the ``compile`` of
            `hyperfunc.hypergrad`: as loops that stop by themselves. The cell draws no random
            numbers. ``return_trace``, ``at_steps``, second derivatives and those of torch.func run
            uncompiled.

    Raises:
        TypeError: a setting of another kind.
        ValueError: a ``method`` that replays the steps of `hyperfunc.iterate`.

    Example:
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(4, 4)
        ...
        ...     def forward(self, z, x):
        ...         return torch.tanh(self.linear(z) + x)
        >>> layer = hf.EquilibriumLayer(Cell())
        >>> x = torch.randn(8, 4)
        >>> z, stats = layer(x, return_stats=True)
        >>> torch.allclose(z, layer.cell(z, x), atol=1e-4)
        True
        >>> z.square().sum().backward()
        >>> layer.linear.weight.grad.shape
        torch.Size([4, 4])

    References:
        Bai, Kolter and Koltun, Deep equilibrium models, arXiv 1909.01377; Fung et al.,
        Jacobian-free backpropagation, arXiv 2103.12803; Geng et al., On training implicit models
        (phantom gradients), arXiv 2111.05177; Gal and Ghahramani (variational dropout),
        arXiv 1512.05287; Bai et al. (corrections of the fixed point), arXiv 2204.08442.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: AbstractFixedPointSolver = Anderson(maxiter=200, batch_dim=0),
        method: Any = None,
        *,
        init: Callable[..., TensorTree] | None = None,
        throw: bool | None = None,
        throw_backward: bool | None = None,
        on_backward: Callable[[SolveStats], object] | None = None,
        compile: bool | str | Mapping[str, Any] = False,
    ) -> None:
        super().__init__()
        flags = {"throw": throw, "throw_backward": throw_backward}
        check_flags(self, **{name: flag is not None and flag for name, flag in flags.items()})
        self.backend = check_backend(compile)
        self._compilers: dict[Any, tuple[Compiler, Compiler]] = {}
        default = GMRES() if self.backend is None else BiCGStab()
        self.solver, self.method, self.init = solver, default if method is None else method, init
        self.throw, self.throw_backward, self.on_backward = throw, throw_backward, on_backward
        self.cell = cell
        self.training = cell.training

    def __getattr__(self, name: str) -> Any:
        cell = self._cell_with(name)
        return super().__getattr__(name) if cell is None else getattr(cell, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "method":
            value = _check_method(value)
        if name in _SIGNATURES and value is not None:
            check_callable(value, f"EquilibriumLayer: {name}", _SIGNATURES[name])
        kind, expected = _EXPECTED.get(name, (object, ""))
        if not isinstance(value, kind):
            raise TypeError(f"EquilibriumLayer: {name} is {show(value)}; expected {expected}")
        if self._cell_with(name) is not None:
            setattr(self.cell, name, value)
        elif name == "cell":
            super().__setattr__(name, value)
            self._compilers.clear()  # which are of the cell before
        elif name == "init":  # has no derivative, so that a module is no part of the layer
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        *inputs: Any,
        init: TensorTree = None,
        return_stats: bool = False,
        return_trace: bool = False,
        at_steps: Sequence[int] = (),
    ) -> TensorTree:
        """The fixed point for these inputs.

        Args:
            inputs: what the cell takes after the state: trees of tensors, and anything else.
            init: the state to start from, such as the solution for similar inputs, a constant.
            return_stats: whether to return ``(state, SolveStats)``, the statistics of shape
                ``(batch,)`` with a ``batch_dim`` of the solver.
            return_trace: whether to return the residual norms of all iterates last, of shape
                ``(iterates, batch)`` or ``(iterates,)``, for a plot.
            at_steps: numbers of steps of the solver, each at least 0. The states after these come
                last, as a list, each with the derivative that ``method`` gives at that state, so
                that losses of several states can be added up (a correction of the fixed point).
                A sample that needs fewer steps has the state that it stopped at.

        Returns:
            The state, a tree like ``init``; in a tuple with what else was asked for.

        Raises:
            HypergradError: if the solver failed in a way that ``throw`` does not allow.
            ValueError: if the cell changes the structure, shape or dtype of the state.
        """
        run = self._forward
        if is_exporting():
            self._check_exportable()
        elif torch.compiler.is_compiling():  # loops that stop by values are no graph
            run = torch.compiler.disable(run)
        check_flags(self, return_stats=return_stats, return_trace=return_trace)
        state, stats, trace, states = run(inputs, init, return_stats, return_trace, at_steps)
        further: tuple[Any, ...] = (stats,) if return_stats else ()
        further += ((trace,) if return_trace else ()) + ((states,) if at_steps else ())
        return (state, *further) if further else state

    def extra_repr(self) -> str:
        """What the layer's repr says besides its submodules."""
        return f"solver={self.solver!r}, method={self.method!r}"

    def _forward(
        self,
        inputs: tuple[Any, ...],
        init: TensorTree,
        stats_are_seen: bool,
        return_trace: bool,
        at_steps: Sequence[int],
    ) -> tuple[TensorTree, SolveStats, Any, list[TensorTree]]:
        state = self._initial_state(inputs) if init is None else init
        apply, weights, buffers = _snapshot(self.cell, "batch")
        leaves, constants, _ = trees.flatten_state(state, "init")
        device_type, dtype = _autocast_of(leaves)
        recorded = torch.compiler.is_compiling()  # by torch.export, which knows no values
        rng = None
        if not recorded and self.backend is None:
            rng = RngAutocastState.capture(trees.flatten((state, weights, inputs))[0])
        zeros = init is None and self.init is None
        cell = _Cell(apply, device_type, dtype, rng, zeros, bool(constants))
        # what the backward pass needs must not change when the buffers are updated
        args = (({name: buffer.clone() for name, buffer in buffers.items()}, constants), *inputs)
        solver = _reachable(self.solver, dtype, throw=False)
        with torch.autocast(device_type, enabled=False) if dtype else contextlib.nullcontext():
            unroll = isinstance(self.method, ReverseUnroll)
            point = (state, (weights, state), *args)
            with contextlib.nullcontext() if unroll else torch.enable_grad():
                arguments = point if unroll else _detach(point)
                watched: dict[str, Any] = {"return_trace": return_trace, "at_steps": at_steps}
                compilers = (None, None) if recorded else self._compilers_for(dtype)
                if compilers[0] is None or return_trace or at_steps:
                    solution, stats, *rest = solver(cell, *arguments, **watched)
                else:
                    solution, stats, *rest = solve_compiled(solver, compilers[0], cell, *arguments)
            if self.throw is not False and not recorded:
                raise_unless_solved(self.solver, stats, finished=self.throw)
            if not stats_are_seen and not recorded:
                warn_unless_solved(self.solver, stats)
            states = rest.pop() if at_steps else []
            if not unroll and not recorded:
                solution, *states = (
                    self._attach(cell, weights, _detach(state), args, dtype, compilers[1])
                    for state in (solution, *states)
                )
        if self.training and buffers and not tracking.transforms_active():
            apply, _, _ = _snapshot(self.cell, "update")
            with torch.no_grad():
                _, updated = apply(weights, solution, *inputs, buffers=buffers)
                for name, buffer in updated.items():
                    buffers[name].copy_(buffer)
        return solution, stats, rest[0] if rest else None, states

    def _compilers_for(self, dtype: torch.dtype | None) -> tuple[Compiler | None, Compiler | None]:
        """What compiles the solve and the backward pass with the present settings."""
        if self.backend is None:
            return None, None
        key = (dtype, self.solver, self.method, self.throw_backward)
        if key not in self._compilers:
            functions = (functools.partial(self.cell), self.solver, self.method)
            names = "the fixed-point solve", "the backward pass"
            first, second = (Compiler(self.backend, name, functions) for name in names)
            self._compilers[key] = first, second
        return self._compilers[key]

    def _check_exportable(self) -> None:
        fixed = self.solver.rtol == 0 and self.solver.atol == 0
        if fixed and not isinstance(self.solver, Newton) and not torch.is_grad_enabled():
            return
        raise RuntimeError(
            f"torch.export records no derivatives, and no loop that stops by a residual: got "
            f"{self.solver!r}, with gradients {'on' if torch.is_grad_enabled() else 'off'}. Write "
            f"layer.solver = hf.fixed_point_solvers.Anderson(maxiter=K, rtol=0, batch_dim=0), or "
            f"Picard or Broyden, for K steps, and export under torch.no_grad()"
        )

    def _initial_state(self, inputs: tuple[Any, ...]) -> TensorTree:
        if self.init is not None:
            return call("init(*inputs)", self.init, *inputs)
        if not inputs or not tracking.is_differentiable(inputs[0]):
            first = f"of type {type(inputs[0]).__name__}" if inputs else "missing"
            if inputs and isinstance(inputs[0], Tensor):
                first += f" and {inputs[0].dtype}"
            raise TypeError(
                f"EquilibriumLayer: the first input is {first}; expected a floating-point tensor, "
                f"as the state starts as zeros like it. Write EquilibriumLayer(cell, "
                f"init=lambda *inputs: ...) with a function that returns the state to start from"
            )
        return torch.zeros_like(inputs[0])

    def _attach(
        self,
        cell: _Cell,
        weights: TensorTree,
        solution: TensorTree,
        args: tuple[Any, ...],
        dtype: torch.dtype | None,
        compiler: Compiler | None,
    ) -> TensorTree:
        """The solution with its derivatives, which its integers and bools have none of."""
        method = _reachable(self.method, dtype)
        w, constants, state = trees.flatten_state(solution, "state")

        def found(hparams: Any, held: Any, /, *inputs: Any) -> TensorTree:
            return state.fill(trees.flatten(hparams[1])[0], held[1])

        if isinstance(method, Reverse):
            assert method.last is not None
            rule = implicit_diff(iterate(cell, method.last, init=found), method=method)
        else:
            options = (method, self.throw_backward, self.on_backward)
            rule = make_differentiable((cell, None, None), *options, found, compiler=compiler)
        hparams = weights, trees.unflatten(state.spec, w)
        return rule(hparams, (args[0][0], constants), *args[1:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of a cell, as layers saved it before they had "cell." in their names.
        cell = self.cell
        registered = {*cell._parameters, *cell._buffers, *cell._modules}
        names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        paths = [name.split(".") for name in names]
        with_cell = sum(path[0] == "cell" and path[1] in registered for path in paths)
        if with_cell < sum(path[0] in registered for path in paths):
            values = {f"{prefix}cell.{name}": state_dict.pop(prefix + name) for name in names}
            state_dict.update(values)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _cell_with(self, name: str) -> nn.Module | None:
        """The cell, if a name that the layer has no use for is that of a submodule there."""
        modules = vars(self).get("_modules", {})  # a copy in the making has none
        cell = modules.get("cell")
        if cell is None or name in vars(self) or name in modules:
            return None
        if name in cell._parameters or name in cell._buffers:
            raise AttributeError(
                f"EquilibriumLayer: {name!r} is a tensor of the cell; write layer.cell.{name}, and "
                f"layer.cell where a function of torch takes a module and the name of its tensor"
            )
        return cell if name in cell._modules and name != "parametrizations" else None


def jacobian_frobenius_squared(
    fn: Callable[..., TensorTree],
    params: TensorTree,
    /,
    *args: Any,
    num_probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An unbiased estimate of the squared Frobenius norm of a Jacobian, as a regulariser.

    Hutchinson's estimate with :math:`m` probes, vectors of random signs,

    .. math::
        \| J \|_F^2 = \mathbb{E}_v \, \| J^\top v \|^2 \approx
            \frac{1}{m} \sum_{i=1}^m \| J^\top v_i \|^2, \qquad
        J = \partial_{\text{params}} \, \text{fn}(\text{params}, *\text{args}),

    at one evaluation and one product a probe. It is differentiable with respect to ``params``,
    ``args``, and the parameters of a module as ``fn``. A small penalty at an equilibrium,
    ``jacobian_frobenius_squared(layer.cell, z, x) / z.numel()``, bounds the spectral radius and so
    keeps the cell a contraction. Detach ``z`` to leave the solution out of its derivative.

    Args:
        fn: ``(params, *args) -> tree``; a fixed-point map or a cell.
        params: where the Jacobian is taken.
        args: passed on.
        num_probes: :math:`m \ge 1`.
        generator: of the random signs; by default torch's own. ``torch.func.vmap`` needs its
            keyword ``randomness``.

    Returns:
        A scalar, in the accumulation dtype (float32 at least).

    Example:
        >>> W = torch.tensor([[0.5, 1.0], [0.0, 2.0]])
        >>> hf.jacobian_frobenius_squared(lambda z: W @ z, torch.ones(2), num_probes=20000)
        tensor(5.2...)

    References:
        Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989;
        Bai, Koltun and Kolter, Stabilizing equilibrium models by Jacobian regularization,
        arXiv 2106.14342.
    """
    check_count("jacobian_frobenius_squared", "num_probes", num_probes)
    leaves, others, state = trees.flatten_state(params, "params")

    def flat(*z: Tensor) -> Leaves:
        return trees.flatten_state(fn(state.fill(z, others), *args), "the output of fn")[0]

    linearization = autodiff.Linearization(flat, leaves, (tuple(range(len(leaves))),), tracked=True)
    terms = []
    for _ in range(num_probes):
        signs = []
        for out in linearization.outputs:
            bits = torch.randint(0, 2, out.shape, generator=generator, device=out.device)
            signs.append((2 * bits - 1).to(out.dtype))
        product = linearization.pull(tuple(signs))
        terms.append(trees.dot(product, product))
    return torch.stack(terms).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class _Cell:
    """A cell as fixed-point map, whose hparams are its weights and what the solver starts from."""

    apply: FunctionalModule
    device_type: str
    dtype: torch.dtype | None
    rng: RngAutocastState | None
    zeros: bool  # whether the state began as zeros like the first input
    has_constants: bool  # integers and bools in the state
    draws: list[bool] = dataclasses.field(default_factory=list)  # whether it does, once called

    def __call__(
        self, state: TensorTree, hparams: TensorTree, held: tuple[Any, Any], /, *inputs: Any
    ) -> TensorTree:
        buffers, _ = held
        if self.rng is None:
            return self._evaluate(state, hparams, buffers, *inputs)
        if not self.draws:
            output = self._evaluate(state, hparams, buffers, *inputs)
            now = zip(self.rng.read(self.rng.states), self.rng.states, strict=True)
            self.draws.append(any(new is not old for new, old in now))
            return output
        if not self.draws[0]:
            return self._evaluate(state, hparams, buffers, *inputs)
        present = self.rng.read(self.rng.states)
        self.rng.write(self.rng.states)
        try:
            return self._evaluate(state, hparams, buffers, *inputs)
        finally:
            self.rng.write(present)

    def _evaluate(
        self, state: TensorTree, hparams: TensorTree, buffers: dict[str, Tensor], /, *inputs: Any
    ) -> TensorTree:
        on = self.dtype is not None
        try:
            with torch.autocast(self.device_type, self.dtype) if on else contextlib.nullcontext():
                output = self.apply(hparams[0], state, *inputs, buffers=buffers)
        except Exception as error:
            cell: Any = self.apply._module
            explain(error, "the cell(state, *inputs)", cell.forward, (state, *inputs))
            if not self.zeros or type(error) is not RuntimeError:
                raise
            raise RuntimeError(f"EquilibriumLayer: the cell says: {error}. {_ZEROS}") from error
        if self.zeros and isinstance(output, Tensor) and output.shape != state.shape:
            shapes = f"of shape {tuple(output.shape)} for a state of shape {tuple(state.shape)}"
            raise ValueError(f"EquilibriumLayer: the cell returned a tensor {shapes}. {_ZEROS}")
        if not (on or self.has_constants):
            return output
        leaves, spec = trees.flatten(output)
        like, like_spec = trees.flatten(state)
        if spec != like_spec:
            return output
        return trees.unflatten(spec, list(map(_settled, leaves, like)))


_ZEROS = (
    "The state began as zeros like the first input; if it is to have another shape, pass "
    "init=lambda x: x.new_zeros(...)"
)
_SOLVER = "a fixed-point solver such as hf.fixed_point_solvers.Anderson(batch_dim=0)"
_EXPECTED: dict[str, tuple[type[Any], str]] = {
    "cell": (nn.Module, "a torch.nn.Module with forward(state, *inputs) -> state"),
    "solver": (AbstractFixedPointSolver, _SOLVER),
}
_SIGNATURES = {
    "init": "(*inputs) -> state",
    "on_backward": "of the SolveStats; of a list history write history.append",
}


def _settled(leaf: Any, like: Tensor) -> Any:
    """A leaf of the next state in the dtype of the state, whose integers and bools stay."""
    if like.is_floating_point():
        return leaf.to(like.dtype)
    kept = isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    return like if kept else leaf


def _detach(tree: TensorTree) -> TensorTree:
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, tracking.detach(leaves))


def _check_method(method: Any) -> Any:
    method = resolve_method(method)
    if isinstance(method, AbstractLinearSolver | ReverseUnroll) or (
        isinstance(method, Reverse) and method.last is not None
    ):
        return method
    raise ValueError(
        f"EquilibriumLayer: method is {method!r}, which replays the steps of a solver made by "
        f"hf.iterate; expected a linear solver such as hf.GMRES(), hf.Reverse(last=K), which "
        f"differentiates K steps from the solution, or hf.ReverseUnroll()"
    )


def _snapshot(
    cell: nn.Module, mode: Any
) -> tuple[FunctionalModule, dict[str, Tensor], dict[str, Tensor]]:
    """A cell as a function, with its weights and buffers as they are now."""
    module = _shallow_copy(cell, {})
    named, buffers = module.named_parameters(), dict(module.named_buffers())
    weights: dict[str, Tensor] = {name: p for name, p in named if p.is_floating_point()}
    return FunctionalModule(module, tuple(weights), mode), weights, buffers


def _shallow_copy(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A module of the same tensors, in which parametrised ones are plain, computed once."""
    if id(module) in done:
        return done[id(module)]
    parametrized = parametrize.is_parametrized(module)
    cls: Any = type(module).__bases__[0] if parametrized else type(module)
    copy: nn.Module = cls.__new__(cls)
    vars(copy).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(copy)[name] = dict(vars(module)[name])
    done[id(module)] = copy
    if parametrized:
        parametrizations: Any = copy._modules.pop("parametrizations")
        for name in parametrizations:
            copy._parameters[name] = _weight(module, name)
    for name, child in copy._modules.items():
        if child is not None:
            copy._modules[name] = _shallow_copy(child, done)
    return copy


def _weight(module: nn.Module, name: str) -> Any:
    """A parametrised weight."""
    with derivative_rules.active():
        return getattr(module, name)


def _autocast_of(leaves: Leaves) -> tuple[str, torch.dtype | None]:
    """The device type of a state, and the dtype of autocast if that is on there."""
    device_type = leaves[0].device.type
    available = torch.amp.is_autocast_available(device_type)
    on = available and torch.is_autocast_enabled(device_type)
    return device_type, torch.get_autocast_dtype(device_type) if on else None


def _reachable(settings: Any, dtype: torch.dtype | None, **changes: Any) -> Any:
    """A solver with changes, and no relative tolerance below the precision of autocast."""
    if dtype is None or not hasattr(settings, "rtol"):
        return dataclasses.replace(settings, **changes)
    eps = torch.finfo(dtype).eps
    rtol = eps**0.75 if settings.rtol is None else settings.rtol
    exact = settings.rtol == 0 and settings.atol == 0
    return dataclasses.replace(settings, rtol=0.0 if exact else max(rtol, eps), **changes)
