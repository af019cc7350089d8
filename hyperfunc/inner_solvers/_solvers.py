"""Solvers that repeat a step of a map or of an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyperfunc import optim
from hyperfunc._compile.compiler import Backend, Compiler, check_backend
from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_callable, check_count, check_flags, check_number, takes
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.flat import split
from hyperfunc._engine.shown import show
from hyperfunc._engine.user_functions import call
from hyperfunc._engine.wrapped_functions import name_of
from hyperfunc._torch import batching, derivative_rules, tracking
from hyperfunc._torch.tangents import all_in_own_dtype
from hyperfunc._types import InnerSolver, Leaves, Loss, ParamsFunction, TensorTree
from hyperfunc.inner_solvers._maps import DescentMap
from hyperfunc.inner_solvers._steps import DescentStep, FlatStep, MapStep, Specs, Step

# Steps that are compiled as one, at most: the time of compiling grows with them. In a loop that is
# compiled, they pay where the vectors have few entries.
LONGEST_BLOCK = 4
_FEW = 4096
_INIT = "init(hparams, *args)"


@dataclass(frozen=True, eq=False)
class IterativeSolver:
    """An inner solver that repeats a step; made by `iterate` and `minimize`.

    Attributes:
        step: what is repeated.
        num_steps: how often, at most.
        init: ``(hparams, *args) -> params``, where the steps start.
        inputs: a tree with a leading time dimension, or None.
        rtol, atol: relative and absolute tolerance of the early stop.
        condition: what the solution satisfies, as ``(keyword, function)`` with a keyword of
            `hypergrad`; None where no one function describes it.
        compiler: what compiles the step, if anything does.
        has_aux: whether it returns ``(params, SolverAux)``.
    """

    step: Step
    num_steps: int
    init: InnerSolver
    inputs: TensorTree
    rtol: float
    atol: float
    condition: tuple[str, Callable[..., Any]] | None
    compiler: Compiler | None = None
    has_aux: bool = False

    def __repr__(self) -> str:
        step = self.step
        if isinstance(step, DescentStep):
            return f"minimize({name_of(step.inner_loss)}, {step.optimizer!r}, {self.num_steps})"
        return f"iterate({name_of(getattr(step, 'fixed_point', step))}, {self.num_steps})"

    @property
    def can_stop(self) -> bool:
        """Whether there may be fewer steps than ``num_steps``."""
        return self.rtol > 0 or self.atol > 0

    def compiled(self, backend: Backend) -> IterativeSolver:
        """The solver with its steps compiled, as it says itself or else by this backend."""
        compiler = self.compiler or Compiler(backend, "the inner solver's step", (self.step,))
        return replace(self, compiler=compiler)

    def __call__(self, hparams: TensorTree, /, *args: Any) -> TensorTree:
        """Run the steps; derivatives flow through every one of them."""
        leaves, _ = trees.flatten((hparams, args, self.inputs))
        steps = FlatSteps(self, tracking.transforms_active() or tracking.is_tracked(leaves))
        state = steps.start(hparams, args)
        if self.compiler is not None and self.num_steps:
            tensors, frame = trees.partition((hparams, args, self.inputs))
            if self.compiler.applies((*tensors, *state)):
                if self.compiler.backend.keeps_loops((*state, *tensors)):
                    return steps.result(self._run_compiled(steps, state, tensors, frame))
                advance = _compiled_block(self.compiler, steps, state, hparams, args)
                size = 1 if self.can_stop else block_size(self.num_steps)
                rows = zip(*[iter(unbind(self.inputs, self.num_steps))] * size, strict=True)
                return steps.result(steps.run(advance, state, rows)[0])
        return steps.result(self._run(steps, state, hparams, args, self.inputs)[0])

    def _run(
        self,
        steps: FlatSteps,
        state: Leaves,
        hparams: TensorTree,
        args: tuple[Any, ...],
        inputs: TensorTree,
    ) -> tuple[Leaves, Any]:
        """The last state, and the number of steps."""
        if not loop.is_kept((state, hparams, args, inputs)):
            rows = unbind(inputs, self.num_steps)
            return steps.run(steps.bind(hparams, args), state, rows)
        advance = steps.bind(hparams, args, state)
        leaves, spec = trees.flatten(inputs)

        def row(number: Tensor) -> tuple[Any, ...]:
            at = (leaf.index_select(0, number.reshape(1)).squeeze(0) for leaf in leaves)
            return () if inputs is None else (trees.unflatten(spec, list(at)),)

        return steps.run_kept(advance, state, row, self.num_steps)

    def _run_compiled(
        self, steps: FlatSteps, state: Leaves, tensors: Leaves, frame: trees.Frame
    ) -> Leaves:
        assert self.compiler is not None

        def compute(*operands: Tensor) -> tuple[Leaves, Any]:
            state, rest = split(operands, len(operands) - len(tensors))
            end, count = self._run(steps, state, *frame.fill(rest))
            return end, torch.as_tensor(count)

        key = (frame, *steps.structure)
        variables = self.compiler.read()
        end, _ = self.compiler.call(compute, key, variables, (*state, *tensors))
        return end  # type: ignore[no-any-return]


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
            `gradient_descent_map`, which work whether or not a graph is being recorded. Integers
            and bools in ``params``, such as counters, have no derivative.
        num_steps: the number of steps $T \ge 0$.
        init: ``(hparams, *args) -> params``, the start $w_0$.
        inputs: a tree of tensors with leading dimension ``num_steps`` (minibatches, step sizes, or
            ``torch.arange(num_steps)`` for the step number), as in a scan: step $t$ is called as
            ``step(params, hparams, *args, inputs_t)``. There is then no single fixed-point map, so
            implicit methods must be given a condition.
        rtol: stop once $\lVert w_{t+1} - w_t \rVert \le$ ``atol + rtol`` $\lVert w_{t+1} \rVert$.
            Under ``vmap`` each task stops by itself.
        atol: the absolute part of that tolerance.
        compile: whether to compile the steps by ``torch.compile``; see `hypergrad`. The first call
            with arguments of a shape takes long, all others are faster, under ``vmap`` too, and so
            are first derivatives by `Reverse`, `ReverseUnroll` and `ForwardMode`. Those of higher
            order, or through a solver that stops early or is called without a method, run
            uncompiled. Not for steps that draw random numbers.

    Returns:
        The inner solver, ``(hparams, *args) -> params``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``num_steps`` or a tolerance is negative, or ``inputs`` have another leading
            dimension; when called, if a step changes structure, shape, dtype or device.

    Example:
        >>> solver = hf.iterate(lambda w, h, b: h * w + b, 100, init=lambda h, b: 0 * b)
        >>> solver(torch.tensor(0.5), torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    check_callable(step, "step", "(params, hparams, *args) -> params")
    condition = ("fixed_point", step) if inputs is None else None
    return _build("iterate", MapStep(step), num_steps, init, inputs, rtol, atol, condition, compile)


def minimize(
    inner_loss: Loss,
    optimizer: optim.Optimizer,
    num_steps: int,
    *,
    init: InnerSolver,
    init_state: InnerSolver | None = None,
    inputs: TensorTree = None,
    rtol: float | None = None,
    atol: float | None = None,
    has_aux: bool = False,
    trace: bool = False,
    compile: bool | str | Mapping[str, Any] = False,
) -> IterativeSolver:
    r"""An inner solver that minimises a loss with an optimiser of `hyperfunc.optim`.

    $$(w_{t+1}, s_{t+1}) = \mathrm{update}(\nabla_w \ell(w_t, \lambda, \ldots), s_t, w_t, \lambda)$$

    Implicit methods use the inner loss as their condition, whatever the optimiser: weight decay
    belongs into the loss, as by `proximal`. With one in the optimiser they warn, and raise where it
    depends on ``hparams``.

    Args:
        inner_loss: ``(params, hparams, *args) -> scalar``, pure.
        optimizer: a pair of functions ``(init, update)``, such as ``hf.optim.sgd(lr=0.1)``.
        num_steps: the number of steps $T \ge 0$.
        init: ``(hparams, *args) -> params``, the start $w_0$.
        init_state: ``(hparams, *args) -> state``, the optimiser's state $s_0$ where it goes on
            from other steps; by default ``optimizer.init(params)``.
        inputs: minibatches: a tree of tensors with leading dimension ``num_steps``, such as
            `stack_batches` and `batch_indices` make; step $t$ takes the gradient of
            ``inner_loss(params, hparams, *args, inputs_t)``. Implicit methods must then be given a
            condition.
        rtol: as for `iterate`, on the params.
        atol: as for `iterate`.
        has_aux: whether the solver returns ``(params, aux)``, with a `SolverAux`: the optimiser's
            state, for the next window of steps, and the number of steps. No derivative flows
            through it. The transforms know: `implicit_diff` of the solver returns the pair too,
            and `hypergrad_and_solution` gives it as ``Solution.solver_aux``.
        trace: whether aux holds the losses and gradient norms of all steps too; implies
            ``has_aux``.
        compile: as for `iterate`.

    Returns:
        The inner solver, ``(hparams, *args) -> params``. Errors are those of `iterate`, and a
        ``ValueError`` for a state that is not one of this optimiser and these params.

    Example:
        >>> inner_loss = lambda w, h: ((w - h) ** 2).sum()
        >>> solver = hf.minimize(inner_loss, hf.optim.sgd(lr=0.1), 100, init=torch.zeros_like)
        >>> solver(torch.tensor([1.0, 2.0]))
        tensor([1.0000, 2.0000])

        Windows of two steps of Adam, whose state goes on:

        >>> optimizer = hf.optim.adam(lr=lambda h: h)
        >>> window = hf.minimize(
        ...     lambda w, h, *start: (w - 1) ** 2,
        ...     optimizer,
        ...     num_steps=2,
        ...     init=lambda h, w, state: w,
        ...     init_state=lambda h, w, state: state,
        ...     has_aux=True,
        ... )
        >>> outer_loss = lambda w, h, *start: (w - 1) ** 2
        >>> step = hf.hypergrad_and_solution(window, outer_loss, method="reverse")
        >>> w = torch.tensor(0.0)
        >>> state = optimizer.init(w)
        >>> for _ in range(3):
        ...     grads, solution = step(torch.tensor(0.1), w, state)
        ...     w, state = solution.params, solution.solver_aux.state
        >>> w, state.step
        (tensor(0.5858), tensor(6))
    """
    check_callable(inner_loss, "inner_loss", "(params, hparams, *args) -> scalar")
    optim.check_optimizer(optimizer, "minimize")
    condition = ("inner_loss", inner_loss) if inputs is None else None
    if init_state is not None:
        check_callable(init_state, "minimize: init_state", "(hparams, *args) -> state")
    check_flags("minimize", has_aux=has_aux, trace=trace)
    has_aux = has_aux or trace
    traced = num_steps if trace else None
    step = DescentStep(
        inner_loss, optimizer, init_state=init_state, has_aux=has_aux, num_traced=traced
    )
    solver = _build("minimize", step, num_steps, init, inputs, rtol, atol, condition, compile)
    return replace(solver, has_aux=has_aux)


class FlatSteps:
    """The steps of a solver on flat states; `start` fixes the structure that the rest relies on.

    A state is the leaves of the params, then the leaves of the memory. ``differentiated`` if a
    derivative may be taken of the steps, or they may be taken again for one.
    """

    def __init__(self, solver: IterativeSolver, differentiated: bool = True) -> None:
        self._watches = [derivative_rules.Watch(), derivative_rules.Watch()]
        self._differentiated = differentiated
        self._step = solver.step
        self._init = solver.init
        self._rtol, self._atol = solver.rtol, solver.atol
        self.can_stop = solver.can_stop
        self.has_aux = solver.has_aux

    def start(self, hparams: TensorTree, args: tuple[Any, ...]) -> Leaves:
        """The state before the first step."""
        if self._differentiated:
            params = self._watches[0].run(call, _INIT, self._init, hparams, *args)
        else:
            params = call(_INIT, self._init, hparams, *args)
        leaves, self._params_spec = trees.flatten_floating(params, "params", others=True)
        self._state_spec = trees.StateSpec.of(self._params_spec, leaves)
        memory, self._memory_spec = trees.flatten(self._step.remember(params, hparams, args))
        for path, leaf in zip(trees.paths(self._memory_spec, "state"), memory, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"the optimizer's {path} is {show(leaf)} of type {type(leaf).__name__}; "
                    f"expected a "
                    f"tensor. Write torch.tensor(...) around a number"
                )
        self.num_params = len(leaves)
        self.num_outputs = self.num_params + (len(memory) if self.has_aux else 0)
        return (*leaves, *memory)

    @property
    def structure(self) -> Specs:
        """The structures of the params and of the memory."""
        return self._params_spec, self._memory_spec

    def result(self, state: Leaves) -> TensorTree:
        """What the solver returns at a state, or at as much of it as its outputs."""
        params = trees.unflatten(self._params_spec, state[: self.num_params])
        if not self.has_aux:
            return params
        return params, trees.unflatten(
            self._memory_spec, tracking.detach(state[self.num_params : self.num_outputs])
        )

    def bind(
        self, hparams: TensorTree, args: tuple[Any, ...], state: Leaves = ()
    ) -> Callable[[Tensor | None, Leaves, tuple[Any, ...]], Leaves]:
        """A function ``(active, state, further arguments) -> next state`` for given arguments.

        A task that is not ``active`` keeps its state. After the state comes, where the solver can
        stop, the flag that it should. What all steps share is found now, if a state is given.
        """
        step: FlatStep | None = None
        n = self.num_params
        if state:
            step = self._step.bind(self.structure, state[:n], hparams, args)

        def advance(active: Tensor | None, state: Leaves, extra: tuple[Any, ...]) -> Leaves:
            nonlocal step
            old = state[:n]
            if step is None:
                step = self._step.bind(self.structure, old, hparams, args)
            if self._differentiated:
                new, memory = self._watches[1].run(step, old, state[n:], extra)
            else:
                new, memory = step(old, state[n:], extra)
            result = all_in_own_dtype((*new, *memory))
            if active is not None:
                result = trees.where(active, result, state)
            if not self.can_stop:
                return result
            new, old = (tracking.detach(self._state_spec.split(leaves)[0]) for leaves in (new, old))
            change, size = trees.norm(trees.sub(new, old)), trees.norm(new)
            return (*result, change <= self._atol + self._rtol * size)

        return advance

    def run(
        self,
        advance: Callable[[Tensor | None, Leaves, Any], Leaves],
        state: Leaves,
        inputs: Iterable[Any],
    ) -> tuple[Leaves, int]:
        """The state after a step for each of the inputs, or fewer if it stops; how many."""
        done = active = None
        count = 0
        for extra in inputs:
            outputs = advance(active, state, extra)
            state = outputs[: len(state)]
            count += 1
            if self.can_stop:
                stop = outputs[-1]
                done = stop if done is None else done | stop
                remaining = batching.count_true(~done)
                if remaining == 0:
                    break
                active = None if remaining == batching.count_tasks(done) else ~done
        return state, count

    def run_kept(
        self,
        advance: Callable[[Tensor | None, Leaves, Any], Leaves],
        state: Leaves,
        row: Callable[[Tensor], tuple[Any, ...]],
        num_steps: int,
    ) -> tuple[Leaves, Tensor]:
        """`run` as a loop of what is compiled, with the further arguments of each step."""
        if self.can_stop:

            def step(number: Tensor, at: tuple[Leaves, Tensor]) -> tuple[Leaves, Tensor]:
                state, active = at
                outputs = advance(active, state, row(number))
                return outputs[:-1], active & ~outputs[-1]

            start = state, torch.ones((), dtype=torch.bool, device=state[0].device)
            (state, _), count = loop.repeat(step, start, num_steps, lambda at: at[1])
            return state, count
        few = sum(leaf.numel() for leaf in state) <= _FEW
        size = block_size(num_steps) if few else 1

        def block(number: Tensor, state: Leaves) -> Leaves:
            for i in range(size):
                state = advance(None, state, row(number * size + i))
            return state

        return loop.repeat(block, state, num_steps // size)


def block_size(num_steps: int) -> int:
    """How many steps are compiled as one: a call of compiled code costs as much as a small step."""
    return max(size for size in range(1, LONGEST_BLOCK + 1) if num_steps % size == 0)


def _compiled_block(
    compiler: Compiler,
    steps: FlatSteps,
    state: Leaves,
    hparams: TensorTree,
    args: tuple[Any, ...],
) -> Callable[[Tensor | None, Leaves, Any], Leaves]:
    """The function that takes some steps by compiled code, which is not told of a loop."""
    tensors, frame = trees.partition((hparams, args))
    variables = compiler.read()

    def take(active: Tensor | None, state: Leaves, block: Any) -> Leaves:
        rows, rows_spec = trees.flatten(block)
        flags = () if active is None else (active,)
        sizes = (len(flags), len(state), len(tensors))

        def compute(*operands: Tensor) -> Leaves:
            flags, outputs, held, rows = split(operands, *sizes)
            advance = steps.bind(*frame.fill(held))
            for extra in trees.unflatten(rows_spec, rows):
                outputs = advance(flags[0] if flags else None, outputs[: sizes[1]], extra)
            return outputs

        key = (len(flags), frame, rows_spec, *steps.structure)
        result: Leaves = compiler.call(compute, key, variables, (*flags, *state, *tensors, *rows))
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


def _build(
    caller: str,
    step: Step,
    num_steps: int,
    init: InnerSolver,
    inputs: TensorTree,
    rtol: float | None,
    atol: float | None,
    condition: tuple[str, Callable[..., Any]] | None,
    compile: bool | str | Mapping[str, Any],
) -> IterativeSolver:
    check_count(caller, "num_steps", num_steps, 0)
    check_callable(init, f"{caller}: init", "(hparams, *args) -> params")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            check_number(caller, name, value)
    if inputs is not None:
        _check_inputs(inputs, num_steps)
        descends = isinstance(step, DescentStep)
        fn = getattr(step, "inner_loss" if descends else "fixed_point", step)
        if takes(fn, 2, 3):
            raise TypeError(
                f"{caller}: {'inner_loss' if descends else 'step'} takes two arguments, but "
                f"inputs= adds the minibatch of a step as "
                f"the last one; expected a function of (params, hparams, *args, batch)"
            )
    backend = check_backend(compile)
    solver = IterativeSolver(step, num_steps, init, inputs, rtol or 0.0, atol or 0.0, condition)
    return solver if backend is None else solver.compiled(backend)


def _check_inputs(inputs: TensorTree, num_steps: int) -> None:
    leaves, spec = trees.flatten(inputs)
    if not leaves:
        raise ValueError(
            f"inputs is an empty tree ({type(inputs).__name__}); expected tensors with leading "
            f"dimension num_steps = {num_steps}, or None"
        )
    for path, leaf in zip(trees.paths(spec, "inputs"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            advice = "Pass what is the same in every step in *args"
            if isinstance(leaf, Iterable) and not isinstance(leaf, str):
                advice = f"Write inputs=hf.stack_batches(..., num_steps={num_steps}) around it"
            raise TypeError(
                f"{path} is {show(leaf)} of type {type(leaf).__name__}; expected a tensor with "
                f"leading dimension num_steps = {num_steps}. {advice}"
            )
        if leaf.ndim == 0 or leaf.shape[0] != num_steps:
            advice = ""
            if isinstance(inputs, list):
                advice = ". For a list of batches write inputs=hf.stack_batches(batches, num_steps)"
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)}; expected leading dimension num_steps = "
                f"{num_steps}, one slice a step{advice}"
            )


def with_products(function: Any, products: Products) -> Any:
    """An inner solver or map made here whose gradients have such products; others as they are."""
    if isinstance(function, DescentMap | DescentStep):
        return replace(function, products=products)
    if isinstance(function, MapStep):
        return replace(function, fixed_point=with_products(function.fixed_point, products))
    if isinstance(function, IterativeSolver):
        return replace(function, step=with_products(function.step, products))
    return function
