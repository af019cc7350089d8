"""Inner solvers built from a step or from an optimiser: ``(hparams, *args) -> params``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from hyperfunc import optim
from hyperfunc._compile.compiler import Backend, Compiler, applies, check_backend
from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_scalar
from hyperfunc._torch import autodiff, batching, tracking
from hyperfunc._types import InnerSolver, Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.optim._base import Pull
from hyperfunc.optim._leafwise import Leafwise
from hyperfunc.prox import check_prox
from hyperfunc.proximal import ProximalLoss

# Steps that are compiled as one, at most: the time of compiling grows with them.
_LONGEST_BLOCK = 4

Coefficient = float | Tensor | Callable[[TensorTree], Any]
"""A number, a 0-d tensor, or a function of the hparams that returns one of them."""


FlatStep = Callable[[Leaves, Leaves, tuple[Any, ...]], tuple[Leaves, Leaves]]
"""``(params, memory, further arguments) -> (next params, next memory)``, all of them leaves."""


class Step(Protocol):
    """One step of an inner solver, with what it remembers from one step to the next."""

    def remember(self, params: TensorTree, /) -> TensorTree:
        """The memory before the first step."""
        ...

    def bind(
        self,
        specs: tuple[trees.TreeSpec, trees.TreeSpec],
        like: Leaves,
        hparams: TensorTree,
        args: tuple[Any, ...],
    ) -> FlatStep:
        """The step at given arguments, for params and memory of given structures."""
        ...


@dataclass(frozen=True, eq=False)
class IterativeSolver:
    """An inner solver that repeats a step; made by `iterate` and `minimize`.

    Attributes:
        step: what is repeated.
        num_steps: how often, at most.
        init: ``(hparams, *args) -> params``, where the steps start.
        inputs: a tree with a leading time dimension, or None.
        rtol: relative tolerance of the early stop.
        atol: absolute tolerance of the early stop.
        condition: what the solution satisfies, as ``(keyword, function)`` with a keyword of
            `hypergrad`; None where no one function describes it.
        compiler: what compiles the step, if anything does.
    """

    step: Step
    num_steps: int
    init: InnerSolver
    inputs: TensorTree
    rtol: float
    atol: float
    condition: tuple[str, Callable[..., Any]] | None
    compiler: Compiler | None = None

    @property
    def can_stop(self) -> bool:
        """Whether there may be fewer steps than ``num_steps``."""
        return self.rtol > 0 or self.atol > 0

    @property
    def makes_result(self) -> bool:
        """Whether it is known that the params it returns share no memory with anything else."""
        return (
            self.num_steps > 0
            and self.compiler is None
            and isinstance(self.step, _DescentStep)
            and isinstance(self.step.optimizer.update, Leafwise)
        )

    def compiled(self, backend: Backend) -> IterativeSolver:
        """The solver with its steps compiled, as it says itself or else by this backend."""
        compiler = self.compiler or Compiler(backend, "the inner solver's step", (self.step,))
        return replace(self, compiler=compiler)

    def __call__(self, hparams: TensorTree, /, *args: Any) -> TensorTree:
        """Run the steps; derivatives flow through every one of them."""
        steps = FlatSteps(self)
        state = steps.start(hparams, args)
        rows = unbind(self.inputs, self.num_steps)
        compiled = _compiled(self.compiler, steps, state, hparams, args) if self.compiler else None
        if compiled is None:
            return steps.params(steps.run(steps.bind(hparams, args), state, rows))
        size = 1 if steps.can_stop else block_size(self.num_steps)
        return steps.params(steps.run(compiled, state, zip(*[iter(rows)] * size, strict=True)))


def iterate(
    step: ParamsFunction,
    num_steps: int,
    *,
    init: InnerSolver,
    inputs: TensorTree = None,
    rtol: float | None = None,
    atol: float | None = None,
    compile: bool | str | Mapping[str, Any] = False,
) -> IterativeSolver:
    r"""An inner solver that repeats a fixed-point map.

    $$w_{t+1} = \varphi(w_t, \lambda, \ldots), \qquad t = 0, \ldots, T - 1$$

    Because the solver knows its step, `Reverse` and `ForwardMode` can replay it, and implicit
    methods use the step as their fixed-point map when no other condition is given.

    Args:
        step: ``(params, hparams, *args) -> params``, pure, with a result of the same structure,
            shapes and dtypes as ``params``. Take gradients in it with `torch.func.grad` or
            `gradient_descent_map`, which work whether or not a graph is being recorded.
        num_steps: the number of steps $T \ge 0$.
        init: ``(hparams, *args) -> params``, the start $w_0$.
        inputs: a tree of tensors with leading dimension ``num_steps`` (minibatches, step sizes, or
            ``torch.arange(num_steps)`` for the step number), as in a scan: step $t$ is called as
            ``step(params, hparams, *args, inputs_t)``. There is then no single fixed-point map, so
            implicit methods must be given a condition.
        rtol: stop once $\lVert w_{t+1} - w_t \rVert \le$ ``atol + rtol`` $\lVert w_{t+1} \rVert$.
            Under ``vmap`` each task stops by itself.
        atol: the absolute part of that tolerance.
        compile: whether to compile steps by ``torch.compile``; see `hypergrad`. The
            first call with arguments of a shape takes long, all others are faster, under ``vmap``
            too. So are the derivatives by `Reverse`, `ReverseUnroll` and `ForwardMode` of the first
            order, for blocks of steps whose products are compiled; those of higher order, or
            through a solver that stops early or is called without a method, run uncompiled. Not
            for steps that draw random numbers.

    Returns:
        The inner solver, ``(hparams, *args) -> params``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``num_steps`` or a tolerance is negative, or ``inputs`` have another leading
            dimension. When called, the solver raises it for a step that changes structure, shape,
            dtype or device.

    Example:
        >>> solver = hf.iterate(
        ...     lambda w, h, b: h * w + b,
        ...     100,
        ...     init=lambda h, b: torch.zeros_like(b),
        ... )
        >>> solver(torch.tensor(0.5), torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    _check_callable(step, "step", "(params, hparams, *args) -> params")
    condition = ("fixed_point", step) if inputs is None else None
    return _build(_MapStep(step), num_steps, init, inputs, rtol, atol, condition, compile)


def minimize(
    inner_loss: Loss,
    optimizer: optim.Optimizer,
    num_steps: int,
    *,
    init: InnerSolver,
    inputs: TensorTree = None,
    rtol: float | None = None,
    atol: float | None = None,
    compile: bool | str | Mapping[str, Any] = False,
) -> IterativeSolver:
    r"""An inner solver that minimises a loss with an optimiser of `hyperfunc.optim`.

    $$(w_{t+1}, s_{t+1}) = \mathrm{update}(\nabla_w \ell(w_t, \lambda, \ldots), s_t, w_t, \lambda)$$

    Implicit methods use the inner loss as their condition, whatever the optimiser.

    Args:
        inner_loss: ``(params, hparams, *args) -> scalar``, pure.
        optimizer: a pair of functions ``(init, update)``, such as ``hf.optim.sgd(lr=0.1)``.
        num_steps: the number of steps $T \ge 0$.
        init: ``(hparams, *args) -> params``, the start $w_0$.
        inputs: minibatches: a tree of tensors with leading dimension ``num_steps``; step $t$ takes
            the gradient of ``inner_loss(params, hparams, *args, inputs_t)``. Implicit methods must
            then be given a condition.
        rtol: stop once $\lVert w_{t+1} - w_t \rVert \le$ ``atol + rtol`` $\lVert w_{t+1} \rVert$.
            Under ``vmap`` each task stops by itself.
        atol: the absolute part of that tolerance.
        compile: whether to compile steps by ``torch.compile``; see `hypergrad`. The
            first call with arguments of a shape takes long, all others are faster, under ``vmap``
            too. So are the derivatives by `Reverse`, `ReverseUnroll` and `ForwardMode` of the first
            order, for blocks of steps whose products are compiled; those of higher order, or
            through a solver that stops early or is called without a method, run uncompiled. Not
            for steps that draw random numbers.

    Returns:
        The inner solver, ``(hparams, *args) -> params``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: as `iterate`.

    Example:
        >>> solver = hf.minimize(
        ...     lambda w, h: ((w - h) ** 2).sum(),
        ...     hf.optim.sgd(lr=0.1),
        ...     100,
        ...     init=lambda h: torch.zeros_like(h),
        ... )
        >>> solver(torch.tensor([1.0, 2.0]))
        tensor([1.0000, 2.0000])
    """
    _check_callable(inner_loss, "inner_loss", "(params, hparams, *args) -> scalar")
    optim.check_optimizer(optimizer, "minimize")
    condition = ("inner_loss", inner_loss) if inputs is None else None
    step = _DescentStep(inner_loss, optimizer)
    return _build(step, num_steps, init, inputs, rtol, atol, condition, compile)


def gradient_descent_map(inner_loss: Loss, lr: Coefficient) -> ParamsFunction:
    r"""The fixed-point map of gradient descent.

    $$\varphi(w, \lambda, \ldots) = w - \eta(\lambda)\, \nabla_w \ell(w, \lambda, \ldots)$$

    Args:
        inner_loss: ``(params, hparams, *args) -> scalar``, pure.
        lr: the step size $\eta$: a number, a 0-d tensor, or a function of the hparams.

    Returns:
        The map ``(params, hparams, *args) -> params``.

    Raises:
        TypeError: if ``inner_loss`` is not a function.

    Example:
        >>> phi = hf.gradient_descent_map(lambda w, h: h * (w**2).sum(), lr=0.25)
        >>> phi(torch.tensor([2.0, 4.0]), torch.tensor(1.0))
        tensor([1., 2.])
    """
    _check_callable(inner_loss, "inner_loss", "(params, hparams, *args) -> scalar")
    return _GradientDescentMap(inner_loss, lr)


def proximal_gradient_map(
    loss: Loss, prox: Callable[..., TensorTree], lr: Coefficient
) -> ParamsFunction:
    r"""The fixed-point map of proximal gradient descent, for constraints and non-smooth terms.

    $$\varphi(w, \lambda, \ldots) = \mathrm{prox}_{\eta g}\big(w - \eta(\lambda)\, \nabla_w \ell(w,
    \lambda, \ldots)\big)$$

    Its fixed points minimise $\ell + g$ for convex $g$; where $g$ is the indicator of a set, $\ell$
    over that set. Iterate it with `iterate`, or give it as ``fixed_point=`` for a solution found by
    other means. Its operator is not symmetric, so `CG` does not apply: `GMRES`, `NormalCG` and
    `FixedPoint` do. The solution has a kink where the set of zeros (or of active constraints)
    changes; everywhere else the hypergradient is exact, as the derivative on that set.

    Args:
        loss: ``(params, hparams, *args) -> scalar``, the smooth part $\ell$, pure.
        prox: ``(params, hparams, lr) -> params``, the proximal operator of $g$; see
            `hyperfunc.prox`.
        lr: the step size $\eta$, below 2 over the largest curvature of the loss: a number, a 0-d
            tensor, or a function of the hparams. The operator gets its value.

    Returns:
        The map ``(params, hparams, *args) -> params``.

    Raises:
        TypeError: if ``loss`` or ``prox`` is not a function, or ``prox`` is a function of
            `hyperfunc.prox` that was not called.

    Example:
        The lasso, and the derivative of its solution with respect to the regulariser:

        >>> X, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 0.5])
        >>> def loss(w, log_reg):
        ...     return 0.5 * ((X @ w - y) ** 2).sum()
        >>> phi = hf.proximal_gradient_map(loss, hf.prox.l1(lambda log_reg: log_reg.exp()), lr=0.2)
        >>> solver = hf.iterate(phi, 50, init=lambda log_reg: torch.zeros(2))
        >>> solve = hf.implicit_diff(solver, method="gmres")
        >>> solve(torch.tensor(0.0)), torch.func.jacrev(solve)(torch.tensor(0.0))
        (tensor([1.2500, 0.0000]), tensor([-0.2500, 0.0000]))

    References:
        Bertrand et al., Implicit differentiation of Lasso-type models for hyperparameter
        optimization, 2020, arXiv 2002.08943.
    """
    _check_callable(loss, "loss", "(params, hparams, *args) -> scalar")
    return _ProximalGradientMap(loss, check_prox(prox, "proximal_gradient_map"), lr)


class FlatSteps:
    """The steps of a solver on flat states; `start` fixes the structure that the rest relies on.

    A state is the leaves of the params, then the leaves of the memory.
    """

    def __init__(self, solver: IterativeSolver) -> None:
        self._step = solver.step
        self._init = solver.init
        self._rtol, self._atol = solver.rtol, solver.atol
        self.can_stop = solver.can_stop

    def start(self, hparams: TensorTree, args: tuple[Any, ...]) -> Leaves:
        """The state before the first step."""
        params = self._init(hparams, *args)
        leaves, self._params_spec = trees.flatten_floating(params, "params")
        memory, self._memory_spec = trees.flatten(self._step.remember(params))
        for path, leaf in zip(trees.paths(self._memory_spec, "state"), memory, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"the optimizer's {path} is {leaf!r} of type {type(leaf).__name__}; expected a "
                    f"tensor. Write torch.tensor(...) around a number"
                )
        self.num_params = len(leaves)
        return (*leaves, *memory)

    @property
    def structure(self) -> tuple[trees.TreeSpec, trees.TreeSpec]:
        """The structures of the params and of the memory."""
        return self._params_spec, self._memory_spec

    def params(self, state: Leaves) -> TensorTree:
        """The params of a state."""
        return trees.unflatten(self._params_spec, state[: self.num_params])

    def bind(
        self, hparams: TensorTree, args: tuple[Any, ...]
    ) -> Callable[[Tensor | None, Leaves, tuple[Any, ...]], Leaves]:
        """A function ``(active, state, further arguments) -> next state`` for given arguments.

        A task that is not ``active`` keeps its state. After the state comes, where the solver can
        stop, the flag that it should.
        """
        step: FlatStep | None = None
        n = self.num_params

        def advance(active: Tensor | None, state: Leaves, extra: tuple[Any, ...]) -> Leaves:
            nonlocal step
            old = state[:n]
            if step is None:
                step = self._step.bind(self.structure, old, hparams, args)
            new, memory = step(old, state[n:], extra)
            result = (*new, *memory)
            if active is not None:
                result = trees.where(active, result, state)
            if not self.can_stop:
                return result
            return (*result, self._is_small(tracking.detach(new), tracking.detach(old)))

        return advance

    def run(
        self,
        advance: Callable[[Tensor | None, Leaves, Any], Leaves],
        state: Leaves,
        inputs: Iterable[Any],
    ) -> Leaves:
        """The state after one step for each of the inputs, or fewer if the solver stops early."""
        done: Tensor | None = None
        active: Tensor | None = None
        for extra in inputs:
            outputs = advance(active, state, extra)
            state = outputs[: len(state)]
            if self.can_stop:
                stop = outputs[-1]
                done = stop if done is None else done | stop
                remaining = batching.count_true(~done)
                if remaining == 0:
                    break
                active = None if remaining == batching.count_tasks(done) else ~done
        return state

    def _is_small(self, new: Leaves, old: Leaves) -> Tensor:
        change = trees.norm(trees.sub(new, old))
        return change <= self._atol + self._rtol * trees.norm(new)


def block_size(num_steps: int) -> int:
    """How many steps are compiled as one: a call of compiled code costs as much as a small step."""
    return max(size for size in range(1, _LONGEST_BLOCK + 1) if num_steps % size == 0)


def _compiled(
    compiler: Compiler,
    steps: FlatSteps,
    state: Leaves,
    hparams: TensorTree,
    args: tuple[Any, ...],
) -> Callable[[Tensor | None, Leaves, Any], Leaves] | None:
    """The function that takes some steps by compiled code, or None where it cannot."""
    leaves, spec = trees.flatten((hparams, args))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    if not applies((*tensors, *state)):
        return None
    variables = compiler.read()

    def take(active: Tensor | None, state: Leaves, block: Any) -> Leaves:
        row, row_spec = trees.flatten(block)
        flags = () if active is None else (active,)
        low, high = len(flags) + len(state), len(flags) + len(state) + len(tensors)

        def compute(*operands: Tensor) -> Leaves:
            held = iter(operands[low:high])
            filled = [next(held) if leaf is None else leaf for leaf in constants]
            hparams, args = trees.unflatten(spec, filled)
            advance = steps.bind(hparams, args)
            outputs = operands[len(flags) : low]
            for extra in trees.unflatten(row_spec, operands[high:]):
                active = operands[0] if flags else None
                outputs = advance(active, outputs[: len(state)], extra)
            return outputs

        key = (len(flags), spec, constants, row_spec, *steps.structure)
        operands = (*flags, *state, *tensors, *row)
        result: Leaves = compiler.call(compute, key, variables, operands)
        return result

    return take


def unbind(inputs: TensorTree, num_steps: int) -> Iterable[tuple[Any, ...]]:
    """What each step gets as further arguments: a slice of the inputs, or nothing."""
    if inputs is None:
        return [()] * num_steps
    leaves, spec = trees.flatten(inputs)
    # One unbind has one backward; an index a step would fill a whole gradient at each.
    rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    return ((trees.unflatten(spec, row),) for row in rows)


@dataclass(frozen=True, eq=False)
class _MapStep:
    fixed_point: ParamsFunction

    def remember(self, params: TensorTree, /) -> TensorTree:
        return ()

    def bind(
        self,
        specs: tuple[trees.TreeSpec, trees.TreeSpec],
        like: Leaves,
        hparams: TensorTree,
        args: tuple[Any, ...],
    ) -> FlatStep:
        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            params = self.fixed_point(trees.unflatten(specs[0], leaves), hparams, *args, *extra)
            return _checked(params, leaves, specs[0], "the step's result", "params"), memory

        return step


@dataclass(frozen=True, eq=False)
class _DescentStep:
    inner_loss: Loss
    optimizer: optim.Optimizer

    def remember(self, params: TensorTree, /) -> TensorTree:
        return self.optimizer.init(params)

    def bind(
        self,
        specs: tuple[trees.TreeSpec, trees.TreeSpec],
        like: Leaves,
        hparams: TensorTree,
        args: tuple[Any, ...],
    ) -> FlatStep:
        loss, spec = self.inner_loss, specs[0]
        pull = None
        if isinstance(loss, ProximalLoss):
            center = loss.center_at(hparams, like, spec)
            pull = Pull(loss.weight_at(hparams), center)
            loss = loss.loss
        update = self._update(specs, like, hparams)
        tracked = tracking.is_tracked(trees.flatten((hparams, args))[0])

        def step(leaves: Leaves, memory: Leaves, extra: tuple[Any, ...]) -> tuple[Leaves, Leaves]:
            def value(*flat: Tensor) -> Tensor:
                result = loss(trees.unflatten(spec, flat), hparams, *args, *extra)
                return check_scalar(result, "inner_loss")

            row = trees.flatten(extra)[0] if extra else ()
            recorded = tracked or tracking.is_tracked((*leaves, *row))
            grads = autodiff.gradient(value, leaves, create_graph=recorded)
            return update(leaves, grads, memory, pull)

        return step

    def _update(
        self, specs: tuple[trees.TreeSpec, trees.TreeSpec], like: Leaves, hparams: TensorTree
    ) -> Callable[..., tuple[Leaves, Leaves]]:
        bind = getattr(self.optimizer.update, "bind", None)
        if bind is not None:
            update: Callable[..., tuple[Leaves, Leaves]] = bind(like, specs[0], hparams)
            return update

        def by_trees(
            leaves: Leaves, grads: Leaves, memory: Leaves, pull: Pull | None
        ) -> tuple[Leaves, Leaves]:
            if pull is not None:
                reuse = pull.may_overwrite(leaves, grads)
                grads = tuple(
                    pull.add(grad, leaf, i, reuse)
                    for i, (grad, leaf) in enumerate(zip(grads, leaves, strict=True))
                )
            params, state = self.optimizer.update(
                trees.unflatten(specs[0], grads),
                trees.unflatten(specs[1], memory),
                trees.unflatten(specs[0], leaves),
                hparams,
            )
            return (
                _checked(params, leaves, specs[0], "the step's result", "params"),
                _checked(state, memory, specs[1], "the optimizer's new state", "state"),
            )

        return by_trees


@dataclass(frozen=True, eq=False)
class _GradientDescentMap:
    inner_loss: Loss
    lr: Coefficient

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> TensorTree:
        lr = self.lr(hparams) if callable(self.lr) else self.lr
        return _descend(self.inner_loss, lr, params, hparams, args)


@dataclass(frozen=True, eq=False)
class _ProximalGradientMap:
    loss: Loss
    prox: Callable[..., TensorTree]
    lr: Coefficient

    def __call__(self, params: TensorTree, hparams: TensorTree, /, *args: Any) -> TensorTree:
        lr = self.lr(hparams) if callable(self.lr) else self.lr
        return self.prox(_descend(self.loss, lr, params, hparams, args), hparams, lr)


def _descend(
    loss: Loss, lr: Any, params: TensorTree, hparams: TensorTree, args: tuple[Any, ...]
) -> TensorTree:
    leaves, spec = trees.flatten(params)
    grads, _ = trees.flatten(_gradient(loss, params, hparams, args))
    return trees.unflatten(spec, trees.axpy(-lr, tuple(grads), tuple(leaves)))


def _gradient(
    loss: Loss, params: TensorTree, hparams: TensorTree, args: tuple[Any, ...]
) -> TensorTree:
    leaves, spec = trees.flatten_floating(params, "params")
    differentiated = loss.loss if isinstance(loss, ProximalLoss) else loss

    def value(*flat: Tensor) -> Tensor:
        result = differentiated(trees.unflatten(spec, flat), hparams, *args)
        return check_scalar(result, "inner_loss")

    tracked = tracking.is_tracked(trees.flatten((params, hparams, args))[0])
    grads = autodiff.gradient(value, leaves, create_graph=tracked)
    if isinstance(loss, ProximalLoss):
        offset = trees.sub(leaves, loss.center_at(hparams, leaves, spec))
        weight = loss.weight_at(hparams)
        grads = trees.axpy(weight, offset, grads, out=trees.reusable(offset, grads))
    return trees.unflatten(spec, grads)


def _checked(
    tree: TensorTree, like: Leaves, like_spec: trees.TreeSpec, what: str, root: str
) -> Leaves:
    leaves, spec = trees.flatten(tree)
    trees.check_like(leaves, spec, like, like_spec, what, root)
    return tuple(leaves)


def _build(
    step: Step,
    num_steps: int,
    init: InnerSolver,
    inputs: TensorTree,
    rtol: float | None,
    atol: float | None,
    condition: tuple[str, Callable[..., Any]] | None,
    compile: bool | str | Mapping[str, Any],
) -> IterativeSolver:
    if not isinstance(num_steps, int) or isinstance(num_steps, bool):
        raise TypeError(f"num_steps is {num_steps!r}; expected an integer, 0 or more")
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; expected 0 or more")
    _check_callable(init, "init", "(hparams, *args) -> params")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} is {value!r}; expected a number, 0 or more")
    if inputs is not None:
        _check_inputs(inputs, num_steps)
    backend = check_backend(compile)
    solver = IterativeSolver(step, num_steps, init, inputs, rtol or 0.0, atol or 0.0, condition)
    return solver if backend is None else solver.compiled(backend)


def _check_callable(value: Any, name: str, signature: str) -> None:
    if not callable(value):
        raise TypeError(
            f"{name} is {value!r} of type {type(value).__name__}; expected a function {signature}"
        )


def _check_inputs(inputs: TensorTree, num_steps: int) -> None:
    leaves, spec = trees.flatten(inputs)
    if not leaves:
        raise ValueError(
            f"inputs is an empty tree ({inputs!r}); expected tensors with leading dimension "
            f"num_steps = {num_steps}, or None"
        )
    for path, leaf in zip(trees.paths(spec, "inputs"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{path} is {leaf!r} of type {type(leaf).__name__}; expected a tensor with leading "
                f"dimension num_steps = {num_steps}. Pass what is the same in every step in *args"
            )
        if leaf.ndim == 0 or leaf.shape[0] != num_steps:
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}; expected leading dimension num_steps = "
                f"{num_steps}, one slice a step"
            )
