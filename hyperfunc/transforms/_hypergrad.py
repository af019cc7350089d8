"""The transforms: ``hypergrad`` and its two variants, and ``implicit_diff``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, overload

from hyperfunc._compile.compiler import Backend, Compiler, check_backend
from hyperfunc._engine.checks import check_flags
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.results import Solution, SolveStats
from hyperfunc._engine.shown import show
from hyperfunc._rule.error_bound import ErrorBound
from hyperfunc._types import (
    HypergradFunction,
    HypergradOptions,
    ImplicitDiffOptions,
    InnerSolver,
    Loss,
    ParamsFunction,
    TensorTree,
)
from hyperfunc.inner_solvers._solvers import LONGEST_BLOCK, IterativeSolver
from hyperfunc.iterative import ReverseUnroll
from hyperfunc.linear_solvers import StochasticAID
from hyperfunc.transforms._evaluation import Hypergradient, make_rule
from hyperfunc.transforms._methods import is_implicit, resolve_method, unrolls
from hyperfunc.transforms._transformed_solver import Transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    H = TypeVar("H")
    P = ParamSpec("P")
    R = TypeVar("R")
    V = TypeVar("V")
    Solver: TypeAlias = Callable[Concatenate[H, ...], Any]


@overload
def hypergrad(
    inner_solver: Solver[H],
    outer_loss: Loss,
    *,
    has_aux: Literal[False] = False,
    **options: Unpack[HypergradOptions],
) -> HypergradFunction[H, H]: ...


@overload
def hypergrad(
    inner_solver: Solver[H],
    outer_loss: Loss,
    *,
    has_aux: Literal[True],
    **options: Unpack[HypergradOptions],
) -> HypergradFunction[H, tuple[H, Any]]: ...


@overload
def hypergrad(
    inner_solver: None = None,
    *,
    outer_loss: Loss,
    has_aux: Literal[False] = False,
    **options: Unpack[HypergradOptions],
) -> Callable[[Solver[H]], HypergradFunction[H, H]]: ...


@overload
def hypergrad(
    inner_solver: None = None,
    *,
    outer_loss: Loss,
    has_aux: Literal[True],
    **options: Unpack[HypergradOptions],
) -> Callable[[Solver[H]], HypergradFunction[H, tuple[H, Any]]]: ...


def hypergrad(
    inner_solver: InnerSolver | None = None,
    outer_loss: Loss | None = None,
    *,
    has_aux: bool = False,
    **options: Unpack[HypergradOptions],
) -> Any:
    r"""Turn an inner solver and an outer loss into a function that returns hypergradients.

    With the inner solution :math:`w^*(\lambda)` for outer variables :math:`\lambda` (``hparams``),
    the hypergradient of :math:`f(\lambda) = E(w^*(\lambda), \lambda)` is

    .. math::
        \nabla f = \partial_\lambda E - (\partial_\lambda r)^\top u,
        \qquad (\partial_w r)^\top u = \partial_w E,

    where the residual :math:`r` is :math:`w - \phi(w, \lambda)` for a fixed-point map,
    :math:`\nabla_w \ell(w, \lambda)` for an inner loss, and :math:`F(w, \lambda)` for an optimality
    function. A linear solver as ``method`` evaluates this formula (approximate implicit
    differentiation); an iterative method differentiates the steps of the inner solver instead.

    Without ``inner_solver`` this is a decorator: ``@hf.hypergrad(outer_loss=..., ...)``.

    Args:
        inner_solver: ``(hparams, *args) -> params``. Any code under an implicit method, which runs
            it once, with gradient mode on, on detached arguments. Iterative methods differentiate
            it, or its steps.
        outer_loss: ``(params, hparams, *args) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        fixed_point: ``(params, hparams, *args) -> tree like params``, a map with
            ``params = fixed_point(params, ...)`` at the solution.
        inner_loss: ``(params, hparams, *args) -> scalar``, minimised by the solution.
        optimality: ``(params, hparams, *args) -> tree like params``, zero at the solution.
            Implicit methods need exactly one of the three; a solver made by `hyperfunc.iterate`
            or `hyperfunc.minimize` carries its own.
        method: a method object such as ``hf.CG(maxiter=20)``, or its short name; ``"auto"``
            measures what the methods assume and chooses, see `hyperfunc.Auto`.
        has_aux: whether the outer loss returns ``(scalar, aux)``.
        solver_has_aux: whether the inner solver returns ``(params, aux)``: a tree of tensors and
            numbers, such as steps taken, which has no derivative and comes back detached as
            ``Solution.solver_aux`` of `hypergrad_and_solution`. The other functions see params.
        products: how products with second derivatives of the inner loss :math:`\ell` are taken:
            ``"reverse"``, exact, from a graph of its gradient that is kept; or
            ``"finite_difference"``, as
            :math:`(\nabla \ell(w + t u) - \nabla \ell(w - t u)) / 2t`, two gradients a product.
            That takes first derivatives alone, so that it serves attention kernels, quantised
            modules and other code that has no second ones, and no more memory than a gradient. The
            relative error is about 1e-10 in float64, 1e-4 in float32 and 0.1 in bfloat16; larger
            ones warn. For an ``inner_loss`` with an implicit method, and for solvers made by
            `minimize`, or by `iterate` of a `gradient_descent_map`, with `Reverse` and
            `ReverseUnroll`. Other conditions are differentiated once as they are.
        throw: whether non-finite values, breakdown and divergence raise. With ``throw=False`` the
            numbers come back as they are; `hypergrad_and_solution` returns the codes.
        compile: whether to compile the outer gradient, the linear solve and the cross term by
            ``torch.compile``: True, or a backend of it by name, a mode such as
            ``"reduce-overhead"`` (CUDA graphs), or a dictionary of options of its default backend.
            With an iterative method it is the inner solver's steps and their derivatives that are
            compiled, as by the ``compile`` of `minimize`; of up to four steps, as in MAML, all is,
            the outer loss too. The first call with arguments of a shape takes ten to twenty
            seconds, all others are faster, under ``vmap`` too. With the default backend on a CPU
            and torch 2.13 or later, loops are compiled as loops, with their tolerances; an older
            torch warns and runs uncompiled. Other backends unroll them, for
            solvers of a fixed number of steps (``rtol=0, atol=0``). Functions must not draw random
            numbers; where derivatives of the hypergradient are asked for,
            it runs uncompiled. Compiled code takes up what changes between calls in the variables,
            globals and defaults of your functions: tensors, numbers, strings, the functions
            themselves; in lists, dicts, deques, sets and other collections (their first 1000
            items); in attributes, properties and methods that your functions name, of objects,
            classes and imported modules; of a `torch.nn.Module` the mode and numbers of each part.
            Pass as an argument what is not looked through: parameters that a module gets in place
            of others, the globals of functions that you import, what an iterator gives next or
            ``os.environ.get`` returns. Threads run compiled code one at a time. With an implicit
            method, for the inner solver see `minimize`.

    Returns:
        ``fn(hparams, *args, adjoint_init=None)``, which returns a tree like ``hparams``, or
        ``(tree, aux)`` with ``has_aux``. ``adjoint_init`` is a tree like params from which the
        linear solve starts; `torch.func.vmap` maps no keywords, so to map it write
        ``vmap(lambda h, start: fn(h, adjoint_init=start))``. The transforms of ``torch.func`` and
        plain autograd apply to the function.

    Raises:
        ValueError: a user function returned the wrong structure, shape, or dtype; none or several
            conditions; an unknown method; a function that closes over a differentiable tensor.
        HypergradError: the solution or the linear solve failed, and ``throw`` is on.

    Example:
        Ridge regression, with the regulariser tuned on held-out data:

        >>> X, y = torch.randn(20, 5), torch.randn(20)
        >>> X_val, y_val = torch.randn(20, 5), torch.randn(20)
        >>> def ridge_loss(w, reg, X, y):
        ...     return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * reg.exp() * (w**2).sum()
        >>> def val_loss(w, reg, X, y):
        ...     return ((X_val @ w - y_val) ** 2).mean()
        >>> @hf.hypergrad(outer_loss=val_loss, inner_loss=ridge_loss, method="cg")
        ... def solve(reg, X, y):
        ...     return torch.linalg.solve(X.T @ X + reg.exp() * torch.eye(5), X.T @ y)
        >>> solve(torch.tensor(0.0), X, y).shape
        torch.Size([])

    References:
        Pedregosa, Hyperparameter optimization with approximate gradient, arXiv 1602.02355;
        Grazzi, Franceschi, Pontil and Salzo, arXiv 2006.16218.
    """
    return _transform(hypergrad, inner_solver, outer_loss, has_aux, **options)


@overload
def hypergrad_and_value(
    inner_solver: Solver[H],
    outer_loss: Callable[..., V],
    *,
    has_aux: bool = False,
    **options: Unpack[HypergradOptions],
) -> HypergradFunction[H, tuple[H, V]]: ...


@overload
def hypergrad_and_value(
    inner_solver: None = None,
    *,
    outer_loss: Callable[..., V],
    has_aux: bool = False,
    **options: Unpack[HypergradOptions],
) -> Callable[[Solver[H]], HypergradFunction[H, tuple[H, V]]]: ...


def hypergrad_and_value(
    inner_solver: InnerSolver | None = None,
    outer_loss: Loss | None = None,
    *,
    has_aux: bool = False,
    **options: Unpack[HypergradOptions],
) -> Any:
    """Like `hypergrad`, with the same arguments, returning the value of the outer loss too.

    Returns:
        ``fn(hparams, *args, adjoint_init=None) -> (hypergradient, value)``, or
        ``(hypergradient, (value, aux))`` with ``has_aux``, as `torch.func.grad_and_value`.

    Example:
        >>> fn = hf.hypergrad_and_value(
        ...     lambda h: h / 2, lambda w, h: (w - 1) ** 2, fixed_point=lambda w, h: (w + h / 2) / 2
        ... )
        >>> fn(torch.tensor(4.0))
        (tensor(1.), tensor(1.))
    """
    return _transform(hypergrad_and_value, inner_solver, outer_loss, has_aux, **options)


@overload
def hypergrad_and_solution(
    inner_solver: Solver[H],
    outer_loss: Loss,
    *,
    has_aux: bool = False,
    error_bound: bool | ErrorBound = False,
    **options: Unpack[HypergradOptions],
) -> HypergradFunction[H, tuple[H, Solution]]: ...


@overload
def hypergrad_and_solution(
    inner_solver: None = None,
    *,
    outer_loss: Loss,
    has_aux: bool = False,
    error_bound: bool | ErrorBound = False,
    **options: Unpack[HypergradOptions],
) -> Callable[[Solver[H]], HypergradFunction[H, tuple[H, Solution]]]: ...


def hypergrad_and_solution(  # noqa: D417
    inner_solver: InnerSolver | None = None,
    outer_loss: Loss | None = None,
    *,
    has_aux: bool = False,
    error_bound: bool | ErrorBound = False,
    **options: Unpack[HypergradOptions],
) -> Any:
    """Like `hypergrad`, returning the whole `hyperfunc.Solution` too.

    Args:
        error_bound: whether to bound the error of the hypergradient, by residuals and estimated
            norms; or a `hyperfunc.ErrorBound` with the contraction factor or the strong convexity
            of the inner problem, which are estimated otherwise. It takes about ``10 num_steps``
            products more. Implicit methods only, without minibatches.

    All other arguments are those of `hypergrad`.

    Returns:
        ``fn(hparams, *args, adjoint_init=None) -> (hypergradient, Solution)``. The adjoint of the
        solution may be passed as ``adjoint_init`` next time. The error bound is detached.

    Raises:
        ValueError: as `hypergrad`; or where the method or condition has no bound.

    Example:
        An inner solution that is off by 0.1 gives a hypergradient that is off by 0.1:

        >>> fn = hf.hypergrad_and_solution(
        ...     lambda h: h / 2 + 0.1,
        ...     lambda w, h: (w - 1) ** 2,
        ...     fixed_point=lambda w, h: (w + h / 2) / 2,
        ...     error_bound=True,
        ... )
        >>> grads, solution = fn(torch.tensor(4.0))
        >>> solution.params, solution.adjoint, solution.stats.result
        (tensor(2.1000), tensor(4.4000), tensor(0))
        >>> grads, solution.error_bound.bound
        (tensor(1.1000), tensor(0.1000))
    """
    given = (inner_solver, outer_loss, has_aux, error_bound)
    return _transform(hypergrad_and_solution, *given, **options)


@overload
def implicit_diff(
    inner_solver: Callable[P, R], **options: Unpack[ImplicitDiffOptions]
) -> Callable[P, R]: ...


@overload
def implicit_diff(
    inner_solver: None = None, **options: Unpack[ImplicitDiffOptions]
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def implicit_diff(
    inner_solver: InnerSolver | None = None,
    *,
    fixed_point: ParamsFunction | None = None,
    inner_loss: Loss | None = None,
    optimality: ParamsFunction | None = None,
    method: Any = "cg",
    has_aux: bool = False,
    throw: bool | None = True,
    on_backward: Callable[[SolveStats], object] | None = None,
    products: Products = "reverse",
) -> Any:
    r"""Make any inner solver differentiable, with a method as its differentiation rule.

    The result is an ordinary function: `torch.func.grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`,
    `hessian` and `vmap` in any nesting, plain ``.backward()`` and double backward all work, with
    respect to ``hparams`` and to every floating-point tensor in ``*args``. With residual
    :math:`r(w, \lambda)` (see `hypergrad`) the Jacobian is

    .. math:: \partial_\lambda w^* = -(\partial_w r)^{-1} \partial_\lambda r .

    The starting point of an iterative solver, if it is an argument, has derivative zero. All
    arguments but ``has_aux`` and the last are those of `hypergrad`. With ``has_aux`` the inner
    solver returns ``(params, aux)``, and so does the result: aux, a tree of tensors and numbers
    such as the statistics of a solver of `fixed_point_solvers`, has no derivative.

    Nobody sees the statistics of the linear solves: one that does not converge, and does not raise,
    warns with a `ConvergenceWarning`. ``throw`` may also be None, for which non-finite values and
    divergence raise alone. ``on_backward``, such as ``history.append``, is called with the
    `SolveStats` of each solve for a derivative that is taken outside of `torch.func` transforms, as
    by ``backward()``.

    Returns:
        ``fn(hparams, *args) -> params``; without ``inner_solver``, a decorator.

    Example:
        >>> @hf.implicit_diff(optimality=lambda w, a: w**2 - a)
        ... def sqrt(a):
        ...     with torch.no_grad():
        ...         w = torch.ones_like(a)
        ...         for _ in range(20):
        ...             w = 0.5 * (w + a / w)
        ...     return w
        >>> torch.func.grad(sqrt)(torch.tensor(4.0))
        tensor(0.2500)
        >>> torch.func.grad(torch.func.grad(sqrt))(torch.tensor(4.0))
        tensor(-0.0312)

    References:
        Blondel et al., Efficient and modular implicit differentiation, arXiv 2105.15183.
    """
    check_flags("implicit_diff", has_aux=has_aux, throw=throw is not None and throw)
    method = resolve_method(method)
    if isinstance(method, StochasticAID) and method.outer_sampler is not None:
        raise ValueError(
            "implicit_diff: the method has an outer_sampler, but there is no outer loss here to "
            "take minibatches of. Leave outer_sampler and num_outer_batches out"
        )
    conditions = (fixed_point, inner_loss, optimality)
    options = (conditions, method, throw, on_backward)
    transform = functools.partial(make_differentiable, *options, has_aux=has_aux, products=products)
    return transform if inner_solver is None else transform(inner_solver)


def _transform(
    function: Any,
    inner_solver: InnerSolver | None,
    outer_loss: Loss | None,
    has_aux: bool,
    error_bound: bool | ErrorBound = False,
    /,
    *,
    fixed_point: ParamsFunction | None = None,
    inner_loss: Loss | None = None,
    optimality: ParamsFunction | None = None,
    method: Any = "cg",
    throw: bool = True,
    solver_has_aux: bool = False,
    products: Products = "reverse",
    compile: bool | str | Mapping[str, Any] = False,
    **unknown: Any,
) -> Any:
    """What a public function returns; everything is checked before there is an inner solver."""
    name = function.__name__
    if unknown:
        raise TypeError(
            f"{name} got the keyword argument {next(iter(unknown))!r}, which it does not know; "
            f"expected some of {', '.join(inspect.signature(function).parameters)}"
        )
    check_flags(name, has_aux=has_aux, throw=throw, solver_has_aux=solver_has_aux)
    method, backend = resolve_method(method), check_backend(compile)
    bound = _check_error_bound(error_bound, method)
    if outer_loss is None or not callable(outer_loss):
        raise TypeError(
            f"{name}: outer_loss is {show(outer_loss)}; expected a function of (params, hparams, "
            f"*args). Write {name}(inner_solver, outer_loss, ...) or, as a decorator, "
            f"@{name}(outer_loss=..., ...)"
        )
    conditions = (fixed_point, inner_loss, optimality)
    transform = _Transform(
        *(name, outer_loss, has_aux, conditions, method, throw, solver_has_aux, products),
        *(backend, bound),
    )
    return transform if inner_solver is None else transform(inner_solver)


def _show_options(function: Any) -> None:
    """Put what ``**options`` stands for into a function's signature, as ``help`` shows it."""
    signature = inspect.signature(function)
    known = inspect.signature(_transform).parameters
    named = list(signature.parameters.values())[:-1]
    options = [known[name] for name in HypergradOptions.__annotations__]
    function.__signature__ = signature.replace(parameters=named + options)


for _function in (hypergrad, hypergrad_and_value, hypergrad_and_solution):
    _show_options(_function)


@dataclasses.dataclass(frozen=True, eq=False)
class _Transform:
    name: str
    outer_loss: Loss
    has_aux: bool
    conditions: tuple[Any, Any, Any]
    method: Any
    throw: bool
    solver_has_aux: bool
    products: Products
    backend: Backend | None
    bound: ErrorBound | None

    def __call__(self, inner_solver: InnerSolver) -> Transformed:
        solver, compiler, method = inner_solver, None, self.method
        if self.backend is not None and not is_implicit(method):
            solver = self._compile_steps(self.backend, inner_solver)
            if 0 < solver.num_steps <= LONGEST_BLOCK and unrolls(method):
                # few steps are compiled with all else, which takes no replay
                parts = (solver.step, solver.init, self.outer_loss)
                compiler = Compiler(self.backend, "the hypergradient", parts)
                solver, method = inner_solver, ReverseUnroll()
        options = (method, self.throw, None, self.solver_has_aux, self.products)
        rule = make_rule(solver, self.conditions, *options)
        condition = rule.condition
        if self.bound is not None and condition is not None:
            self.bound.check(condition.kind)
        if self.backend is not None and is_implicit(self.method):
            functions = (condition.fn if condition else None, self.outer_loss, self.method)
            compiler = Compiler(self.backend, "the adjoint", functions)
        compute = Hypergradient(rule, self.outer_loss, self.has_aux, self.bound, compiler)
        call = functools.partial(_call, self.name, compute)
        return Transformed(self.name, inner_solver, self.method, call)

    def _compile_steps(self, backend: Backend, inner_solver: Any) -> IterativeSolver:
        """The inner solver with compiled steps, which are all that an iterative method runs."""
        if not isinstance(inner_solver, IterativeSolver):
            raise ValueError(
                f"{self.name}: with {self.method!r}, compile compiles the inner solver's steps, "
                f"but {show(inner_solver)} does not tell them. Make the solver with hf.iterate or "
                f"hf.minimize, or leave compile out"
            )
        if inner_solver.can_stop:
            raise ValueError(
                f"{self.name}: with {self.method!r}, compile needs a fixed number of steps, but "
                f"the inner solver stops early. Drop rtol and atol from it, or leave compile out"
            )
        return inner_solver.compiled(backend)


def make_differentiable(
    conditions: tuple[Any, Any, Any],
    method: Any,
    throw: bool | None,
    on_backward: Callable[[SolveStats], object] | None,
    inner_solver: InnerSolver,
    has_aux: bool = False,
    products: Products = "reverse",
    compiler: Compiler | None = None,
) -> Transformed:
    """What `implicit_diff` returns, with its backward pass compiled if a compiler is given."""
    rule = make_rule(inner_solver, conditions, method, throw, on_backward, has_aux, products)
    rule = dataclasses.replace(rule, compiler=compiler)
    return Transformed("implicit_diff", inner_solver, method, rule.solution_map)


def _call(
    name: str,
    compute: Hypergradient,
    hparams: TensorTree,
    *args: Any,
    adjoint_init: TensorTree = None,
) -> Any:
    grads, solution = compute(hparams, args, adjoint_init)
    has_aux = compute.has_aux
    if name == "hypergrad":
        return (grads, solution.aux) if has_aux else grads
    if name == "hypergrad_and_value":
        return grads, (solution.value, solution.aux) if has_aux else solution.value
    return grads, solution


def _check_error_bound(value: bool | ErrorBound, method: Any) -> ErrorBound | None:
    if value is False:
        return None
    if not (value is True or isinstance(value, ErrorBound)):
        raise TypeError(
            f"error_bound is {show(value)}; expected True, False, or an object such as "
            f"hf.ErrorBound(contraction=0.9)"
        )
    if not is_implicit(method) or isinstance(method, StochasticAID):
        raise ValueError(
            f"error_bound is for implicit methods with a deterministic linear solve, but the "
            f"method is {method!r}. Use one such as method='cg', or leave error_bound out"
        )
    return ErrorBound() if value is True else value
