"""The transforms `hypergrad`, `hypergrad_and_value` and `hypergrad_and_solution`: what goes in and
what comes out.
"""

import functools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from problems import PROBLEMS, Problem, ravel, stack, unraveller
from torch import Tensor
from torch.func import grad, jacrev, vmap

import hyperfunc as hf
from hyperfunc._torch import batching

F64 = torch.float64
RIDGE = PROBLEMS[0]
MAP = next(p for p in PROBLEMS if p.name == "non-symmetric map")


def transformed(
    problem: Problem, transform: Callable[..., Any] = hf.hypergrad, **keywords: Any
) -> Any:
    method = {"method": "cg" if problem.symmetric else "normal_cg"}
    keywords = problem.keywords | method | keywords
    return transform(problem.inner_solver, problem.outer_loss, **keywords)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        ravel(actual).double(), ravel(expected).double(), rtol=tolerance, atol=tolerance
    )


# What comes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_value_and_solution(problem: Problem) -> None:
    hparams, args = problem.tasks()[0]
    params = problem.inner_solver(hparams, *args)

    grads, value = transformed(problem, hf.hypergrad_and_value)(hparams, *args)
    assert_close(grads, problem.reference("gradient"))
    assert_close(value, problem.value(hparams, *args))
    assert value.shape == ()

    grads, solution = transformed(problem, hf.hypergrad_and_solution)(hparams, *args)
    assert isinstance(solution, hf.Solution)
    assert isinstance(solution.stats, hf.SolveStats)
    assert_close(grads, problem.reference("gradient"))
    assert_close(solution.params, params)
    assert_close(solution.value, problem.value(hparams, *args))
    assert solution.aux == ()
    assert solution.stats.result.item() == hf.RESULTS.success
    assert [t.shape for t in solution.stats] == [()] * 3
    assert [t.dtype for t in solution.stats] == [torch.int64, F64, torch.int64]


def test_adjoint_solves_the_transposed_system() -> None:
    hparams, args = MAP.tasks()[0]
    _, solution = transformed(MAP, hf.hypergrad_and_solution)(hparams, *args)
    w, u = solution.params, solution.adjoint
    A = torch.eye(3, dtype=F64) - jacrev(MAP.fn)(w, hparams, *args)
    assert_close(A.T @ u, grad(MAP.outer_loss)(w, hparams, *args))


@pytest.mark.parametrize("method", ["cg", "reverse_unroll"])
@pytest.mark.parametrize("batched", [False, True])
def test_aux(method: str, batched: bool) -> None:
    """Aux is passed on in its structure: under vmap tensors only, without it anything."""
    X = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=F64)

    def outer_loss(w: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        extra = {} if batched else {"name": "outer", "nothing": None}
        return ((w - x) ** 2).sum(), {"distance": (w - x).abs(), "count": torch.tensor(2), **extra}

    keywords: dict[str, Any] = {"method": method, "has_aux": True}
    if method == "cg":
        keywords["inner_loss"] = lambda w, h, x: ((w - h * x) ** 2).sum()

    def solver(h: Tensor, x: Tensor) -> Tensor:
        return h * x

    h = torch.tensor(3.0, dtype=F64)
    fns = [
        transform(solver, outer_loss, **keywords)
        for transform in (hf.hypergrad, hf.hypergrad_and_value, hf.hypergrad_and_solution)
    ]
    if batched:
        fns = [vmap(fn, in_dims=(None, 0)) for fn in fns]
    x = X if batched else X[0]
    (grads, aux), (grads2, (value, aux2)), (grads3, solution) = (fn(h, x) for fn in fns)
    for g in (grads, grads2, grads3):
        assert_close(g, (2 * (h * x - x) * x).sum(-1))
    assert_close(value, ((h * x - x) ** 2).sum(-1))
    for a in (aux, aux2, solution.aux):
        assert_close(a["distance"], (h * x - x).abs())
        assert a["count"].tolist() == ([2, 2] if batched else 2)
        assert batched or (a["name"], a["nothing"]) == ("outer", None)
        assert not a["distance"].requires_grad


def test_iterative_methods_leave_adjoint_and_stats_empty() -> None:
    fn = hf.hypergrad_and_solution(lambda h: h**2, lambda w, h: w.sum(), method="reverse_unroll")
    grads, solution = fn(torch.tensor([3.0]))
    assert grads.tolist() == [6.0]
    assert solution.adjoint == solution.stats == solution.aux == ()


def test_direct_and_implicit_dependence() -> None:
    """w = a, E = w^2 b + c^2: a counts through w only, b and c directly only."""
    hparams = {
        k: torch.tensor(v, dtype=F64) for k, v in zip("abcd", (2.0, 3.0, 5.0, 7.0), strict=True)
    }
    fn = hf.hypergrad(
        lambda h: h["a"].clone(),
        lambda w, h: w**2 * h["b"] + h["c"] ** 2,
        optimality=lambda w, h: w - h["a"],
    )
    grads = fn(hparams)
    assert {k: g.item() for k, g in grads.items()} == {"a": 12.0, "b": 4.0, "c": 10.0, "d": 0.0}


UNUSED: dict[str, tuple[Any, Any, list[float]]] = {
    "w by the outer loss": (lambda w, h: h[0].sum(), lambda w, h: ((w - h[0]) ** 2).sum(), [1, 1]),
    "h by the outer loss": (lambda w, h: w.sum(), lambda w, h: ((w - h[0]) ** 2).sum(), [1, 1]),
    "h by the inner loss": (
        lambda w, h: (w * h[0]).sum(),
        lambda w, h: ((w - 1) ** 2).sum(),
        [1, 1],
    ),
    "both": (lambda w, h: torch.ones((), dtype=F64), lambda w, h: ((w - 1) ** 2).sum(), [0, 0]),
}


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize(
    "method",
    ["cg", "normal_cg", hf.FixedPoint(step_size=0.4), hf.Neumann(step_size=0.4), "dense"],
    ids=str,
)
def test_unused_variables_give_zeros(name: str, method: Any) -> None:
    outer_loss, inner_loss, expected = UNUSED[name]
    h = (torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([[5.0]], dtype=F64))
    fn = hf.hypergrad(
        lambda h: torch.ones(2, dtype=F64),
        outer_loss,
        inner_loss=inner_loss,
        method=method,
        throw=name != "both",  # where it is told that nothing is used
    )
    for grads in (fn(h), optree.tree_map(lambda g: g[0], vmap(fn)(stack([h, h])))):
        assert_close(grads[0], torch.tensor(expected), 1e-11)
        assert grads[1].tolist() == [[0.0]]


def test_tied_hparams_get_their_own_gradients() -> None:
    t = torch.tensor(3.0, dtype=F64)
    fn = hf.hypergrad(
        lambda h: h["a"] * h["b"], lambda w, h: w, optimality=lambda w, h: w - h["a"] * h["b"] ** 2
    )
    assert {k: g.item() for k, g in fn({"a": t, "b": t}).items()} == {"a": 9.0, "b": 18.0}


# How it is called ---------------------------------------------------------------------------------


def documented(reg: Tensor, *args: Tensor) -> Tensor:
    """Ridge regression."""
    return RIDGE.inner_solver(reg, *args)


@pytest.mark.parametrize(
    "transform", [hf.hypergrad, hf.hypergrad_and_value, hf.hypergrad_and_solution]
)
def test_decorator_is_the_function(transform: Any) -> None:
    hparams, args = RIDGE.tasks()[0]
    keywords = {"outer_loss": RIDGE.outer_loss, "inner_loss": RIDGE.fn, "method": hf.CG(maxiter=7)}
    decorated = transform(**keywords)(documented)
    called = transform(documented, **keywords)
    positional = transform(documented, keywords["outer_loss"], inner_loss=RIDGE.fn, method="cg")
    grads = [ravel(optree.tree_leaves(fn(hparams, *args))[0]) for fn in (decorated, called)]
    assert torch.equal(*grads)
    assert_close(optree.tree_leaves(positional(hparams, *args))[0], grads[0])
    for fn in (decorated, called):
        assert fn.__wrapped__ is documented
        assert (fn.__name__, fn.__doc__) == ("documented", "Ridge regression.")
        assert fn.__module__ == __name__
        assert repr(fn).startswith(f"{transform.__name__}(documented, method=CG(maxiter=7, ")


def test_implicit_diff_decorator() -> None:
    hparams, args = RIDGE.tasks()[0]
    decorated = hf.implicit_diff(inner_loss=RIDGE.fn, method="dense")(documented)
    called = hf.implicit_diff(documented, inner_loss=RIDGE.fn, method="dense")
    assert torch.equal(decorated(hparams, *args), called(hparams, *args))
    assert repr(decorated) == repr(called) == "implicit_diff(documented, method=Dense())"
    assert decorated.__doc__ == "Ridge regression."


def test_solvers_without_a_name() -> None:
    solver = functools.partial(RIDGE.inner_solver)
    fn = hf.hypergrad(solver, RIDGE.outer_loss, inner_loss=RIDGE.fn, method="dense")
    assert "method=Dense()" in repr(fn)
    hparams, args = RIDGE.tasks()[0]
    assert_close(fn(hparams, *args), RIDGE.reference("gradient"))


def test_the_solver_runs_once_on_detached_arguments_with_grad_mode_on() -> None:
    calls = []

    def solver(reg: Tensor, *args: Tensor) -> Tensor:
        calls.append((torch.is_grad_enabled(), any(t.requires_grad for t in (reg, *args))))
        return RIDGE.inner_solver(reg, *args)

    keywords = {"inner_loss": RIDGE.fn, "method": "cg"}
    fn = hf.hypergrad(solver, RIDGE.outer_loss, **keywords)
    implicit = hf.implicit_diff(solver, **keywords)
    hparams, args = RIDGE.tasks()[0]
    fn(hparams, *args)
    with torch.no_grad():
        fn(hparams, *args)
    fn(hparams.clone().requires_grad_(), *args)
    implicit(hparams.clone().requires_grad_(), *args).sum().backward()
    grad(lambda h: implicit(h, *args).sum())(hparams)
    assert calls == [(True, False)] * 5


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_mode_does_not_matter(grad_mode: Any) -> None:
    hparams, args = MAP.tasks()[0]
    fn = transformed(MAP, hf.hypergrad_and_solution)
    with grad_mode():
        grads, solution = fn(hparams, *args)
    assert_close(grads, MAP.reference("gradient"))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((grads, solution)))


def test_untracked_arguments_give_untracked_results() -> None:
    """No graph is left behind, which would hold memory for as long as the results live."""
    hparams, args = MAP.tasks()[0]
    leaves = optree.tree_leaves(transformed(MAP, hf.hypergrad_and_solution)(hparams, *args))
    assert not any(leaf.requires_grad or leaf.grad_fn for leaf in leaves)


# Warm starts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_adjoint_as_start_needs_no_more_steps(problem: Problem) -> None:
    hparams, args = problem.tasks()[0]
    for name, method in problem.methods(F64).items():
        fn = transformed(problem, hf.hypergrad_and_solution, method=method)
        grads, solution = fn(hparams, *args)
        again, warm = fn(hparams, *args, adjoint_init=solution.adjoint)
        assert_close(again, grads)
        if name != "dense":
            assert warm.stats.num_steps.item() <= 1, name


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("size", [1.0, 1e9])
def test_any_start_gives_the_same_result(problem: Problem, size: float) -> None:
    """A bad start costs steps, but neither accuracy nor a false report of divergence."""
    hparams, args = problem.tasks()[0]
    for method in problem.methods(F64).values():
        fn = transformed(problem, hf.hypergrad_and_solution, method=method)
        params = problem.inner_solver(hparams, *args)
        start = optree.tree_map(lambda w: size * torch.ones_like(w), params)
        grads, solution = fn(hparams, *args, adjoint_init=start)
        assert_close(grads, problem.reference("gradient"))
        assert solution.stats.result.item() == hf.RESULTS.success


def test_starts_under_transforms() -> None:
    """Under vmap each task has its own start, and no derivative goes through a start."""
    tasks = MAP.tasks()
    hparams, args = stack([h for h, _ in tasks]), stack([a for _, a in tasks])
    start = torch.randn(3, 3, dtype=F64)
    fn = transformed(MAP, method=hf.FixedPoint(maxiter=3, rtol=0, atol=0))
    batched = vmap(lambda h, a, u: fn(h, *a, adjoint_init=u))(hparams, args, start)
    for i, (h, a) in enumerate(tasks):
        expected = fn(h, *a, adjoint_init=start[i])
        assert_close([g[i] for g in batched], expected)

    exact, (h, a) = transformed(MAP, method="normal_cg"), tasks[0]
    unravel = unraveller(h)
    hessian = jacrev(lambda v: ravel(exact(unravel(v), *a, adjoint_init=v[1:])))(ravel(h))
    assert_close(hessian, MAP.reference("hessian"))


def test_a_start_for_a_zero_right_hand_side() -> None:
    fn = hf.hypergrad_and_solution(
        lambda h: h.clone(),
        lambda w, h: 0 * w.sum(),
        fixed_point=lambda w, h: 0.9 * w + 0.1 * h,
        method="fixed_point",
    )
    grads, solution = fn(torch.ones(2), adjoint_init=torch.ones(2))
    assert grads.tolist() == solution.adjoint.tolist() == [0.0, 0.0]


# Tasks under vmap ---------------------------------------------------------------------------------


def difficult_tasks() -> tuple[Tensor, Tensor]:
    """Right-hand sides and matrices with condition numbers 1, 2, 10, and 40."""
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(4, 4, generator=generator, dtype=F64)
    Q, _ = torch.linalg.qr(torch.randn(4, 4, 4, generator=generator, dtype=F64))
    spectra = torch.stack([torch.linspace(1 / c, 1, 4, dtype=F64) for c in (1, 2, 10, 40)])
    return b, Q @ torch.diag_embed(spectra) @ Q.mT


def quadratic(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
    return 0.5 * w @ A @ w - h @ w


def quadratic_transformed(method: Any, transform: Any = hf.hypergrad_and_solution) -> Any:
    return transform(
        lambda h, A: torch.linalg.solve(A, h),
        lambda w, h, A: (w**2).sum(),
        inner_loss=quadratic,
        method=method,
        throw=False,
    )


LOOSE = {
    "cg": hf.CG(rtol=1e-1),
    "normal_cg": hf.NormalCG(rtol=1e-1),
    "fixed_point": hf.FixedPoint(rtol=1e-3, maxiter=150),
    "neumann": hf.Neumann(rtol=1e-3, maxiter=150),
}


@pytest.mark.parametrize("method", LOOSE)
def test_tasks_stop_on_their_own(method: str) -> None:
    """Each task has the steps, result and solution that it has when it runs alone."""
    b, A = difficult_tasks()
    fn = quadratic_transformed(LOOSE[method])
    grads, solution = vmap(fn)(b, A)
    alone = [fn(b[i], A[i]) for i in range(4)]
    steps = solution.stats.num_steps.tolist()
    assert steps == [s.stats.num_steps.item() for _, s in alone]
    assert min(steps) < max(steps)
    assert solution.stats.result.tolist() == [s.stats.result.item() for _, s in alone]
    # a Krylov method multiplies the rounding by which batched products differ
    tolerance = 1e-11 if "cg" in method else 1e-15
    for i, (g, s) in enumerate(alone):
        assert_close(grads[i], g, tolerance)
        assert_close(solution.adjoint[i], s.adjoint, tolerance)
        assert_close(solution.stats.residual_norm[i], s.stats.residual_norm, 1e-11)


def test_each_task_has_its_own_result() -> None:
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, float("nan")], [0.0, 0.0]], dtype=F64)
    A = torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 1.0], [1.0, 2.0]], dtype=F64))
    grads, solution = vmap(quadratic_transformed("cg"))(b, A)
    R = hf.RESULTS
    assert solution.stats.result.tolist() == [R.success, R.breakdown, R.nonfinite, R.success]
    assert solution.stats.num_steps.tolist() == [2, 1, 0, 0]
    assert torch.isnan(grads[2]).all()
    assert grads[3].tolist() == [0.0, 0.0]
    assert_close(grads[0], torch.tensor([2.0, 0.5]), 1e-15)


@pytest.mark.parametrize("nested", [False, True])
def test_failures_under_vmap_are_counted(nested: bool) -> None:
    b = torch.ones(4, 2, dtype=F64)
    A = torch.diag_embed(torch.tensor([[1.0, 2], [1, -2], [-1, 3], [2, 2]], dtype=F64))
    fn = hf.hypergrad(
        lambda h, A: h / A.diagonal(), lambda w, h, A: (w**2).sum(), inner_loss=quadratic
    )
    run, shape = (vmap(vmap(fn)), (2, 2)) if nested else (vmap(fn), (4,))
    which = r"\(0, 1\), \(1, 0\)" if nested else "1, 2"
    text = rf"CG\(.*\) failed for 2 of 4 tasks \(index {which}\): .*broke down"
    with pytest.raises(hf.HypergradError, match=text):
        run(b.reshape(*shape, 2), A.reshape(*shape, 2, 2))
    with pytest.raises(hf.HypergradError, match=r"CG\(.*\) failed: the recurrence broke down"):
        fn(b[1], A[1])


# Counting work ------------------------------------------------------------------------------------


def count_products(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[int, int]:
    """The products with the operator, and the host synchronisations, that a call makes."""
    products, syncs = [0], [0]
    mv, richardson = (
        hf.linear_solvers.LinearOperator.mv,
        hf.linear_solvers.LinearOperator.richardson,
    )
    count_true = batching.count_true

    def counted(fn: Callable[..., Any], counter: list[int]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            counter[0] += 1
            return fn(*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(hf.linear_solvers.LinearOperator, "mv", counted(mv, products))
        patch.setattr(hf.linear_solvers.LinearOperator, "richardson", counted(richardson, products))
        patch.setattr(batching, "count_true", counted(count_true, syncs))
        run()
    return products[0], syncs[0]


PRODUCTS = {
    "cg": (hf.CG, 7),
    "normal_cg": (hf.NormalCG, 14),
    "fixed_point": (hf.FixedPoint, 6),
    "neumann": (hf.Neumann, 7),
}


@pytest.mark.parametrize("method", PRODUCTS)
@pytest.mark.parametrize("batched", [False, True])
def test_fixed_steps_are_exact_and_need_no_synchronisation(
    monkeypatch: pytest.MonkeyPatch, method: str, batched: bool
) -> None:
    make, products = PRODUCTS[method]
    b, A = difficult_tasks()
    fn = quadratic_transformed(make(maxiter=7, rtol=0, atol=0))
    run = (lambda: vmap(fn)(b, A)) if batched else (lambda: fn(b[3], A[3]))
    assert count_products(monkeypatch, run) == (products, 0)
    stats = run()[1].stats
    assert stats.result.flatten().tolist() == [hf.RESULTS.success] * (4 if batched else 1)


@pytest.mark.parametrize("method", LOOSE)
def test_the_loop_ends_with_the_last_task(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    b, A = difficult_tasks()
    fn = quadratic_transformed(LOOSE[method])
    steps = int(vmap(fn)(b, A)[1].stats.num_steps.max())
    products, syncs = count_products(monkeypatch, lambda: vmap(fn)(b, A))
    # and one product at the end, which shows the residual itself
    assert products <= (2 * steps + 2 if method == "normal_cg" else steps + 1)
    assert syncs <= steps + 3


# Parity with HyperTorch's formulas ----------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize(
    "problem", [p for p in PROBLEMS if p.condition == "fixed_point"], ids=lambda p: p.name
)
def test_fixed_point_and_neumann_formulas(problem: Problem, K: int) -> None:
    """``v <- J^T v + b`` from ``v = 0``, K times; Neumann starts at ``v = b``."""
    hparams, args = problem.tasks()[0]
    w = problem.inner_solver(hparams, *args)
    J = jacrev(problem.fn)(w, hparams, *args)
    _, pull = torch.func.vjp(lambda h: problem.fn(w, h, *args), hparams)
    b, direct = grad(problem.outer_loss, (0, 1))(w, hparams, *args)

    def formula(v: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            v = J.T @ v + b
        return ravel(pull(v)[0]) + ravel(direct)

    for method, start in ((hf.FixedPoint, 0 * b), (hf.Neumann, b)):
        fn = transformed(problem, method=method(maxiter=K, rtol=0, atol=0))
        assert_close(fn(hparams, *args), formula(start, K), 1e-14)
    longer = transformed(problem, method=hf.FixedPoint(maxiter=K + 1, rtol=0, atol=0))
    assert_close(fn(hparams, *args), longer(hparams, *args), 1e-14)


def test_fixed_point_on_a_gradient_step_is_richardson_on_the_loss() -> None:
    hparams, args = PROBLEMS[2].tasks()[0]
    settings = {"maxiter": 4, "rtol": 0, "atol": 0}
    on_map = transformed(PROBLEMS[2], method=hf.FixedPoint(**settings))
    on_loss = hf.hypergrad(
        PROBLEMS[2].inner_solver,
        PROBLEMS[2].outer_loss,
        inner_loss=RIDGE.fn,
        method=hf.FixedPoint(**settings, step_size=0.85),
    )
    assert_close(on_map(hparams, *args), on_loss(hparams, *args), 1e-14)


def test_cg_formula() -> None:
    """One step of CG on ``A u = b`` is ``u = (b b / b A b) b``."""
    b, A = difficult_tasks()
    fn = quadratic_transformed(hf.CG(maxiter=1, rtol=0, atol=0), hf.hypergrad)
    g = 2 * torch.linalg.solve(A[3], b[3])
    assert_close(fn(b[3], A[3]), (g @ g) / (g @ A[3] @ g) * g, 1e-13)


def test_one_step_is_one_step_of_the_map() -> None:
    hparams, args = MAP.tasks()[0]
    w = MAP.inner_solver(hparams, *args)
    expected = grad(lambda h: MAP.outer_loss(MAP.fn(w, h, *args), h, *args))(hparams)
    assert_close(transformed(MAP, method="one_step")(hparams, *args), expected)


def test_strings_are_the_methods_with_their_defaults() -> None:
    hparams, args = RIDGE.tasks()[0]
    for name, method in {
        "cg": hf.CG(),
        "normal_cg": hf.NormalCG(),
        "dense": hf.Dense(),
        "one_step": hf.OneStep(),
        "fixed_point": hf.FixedPoint(),
        "neumann": hf.Neumann(),
    }.items():
        fn = transformed(RIDGE, method=name)
        assert f"method={method!r}" in repr(fn)
        assert torch.equal(fn(hparams, *args), transformed(RIDGE, method=method)(hparams, *args))
