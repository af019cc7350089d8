"""`diagnose`, ``method="auto"``, and the bounds on the error of a hypergradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from problems import PROBLEMS, Flat, Problem, ravel, stack, unraveller
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc.diagnostics import Estimate
from hyperfunc.diagnostics._choice import choose, condition_number
from hyperfunc.linear_solvers import LinearOperator
from hyperfunc.linear_solvers._spectrum import measure
from tests.cells import thinned

F64 = torch.float64
MAPS = [p for p in PROBLEMS if p.condition == "fixed_point"]


def random_matrix(n: int, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=F64) / n**0.5
    identity = torch.eye(n, dtype=F64)
    gram = M @ M.T
    return {
        "positive definite": (gram + gram.T) / 2 + 0.2 * identity,
        "indefinite": M + M.T,
        "singular": torch.diag(torch.arange(n, dtype=F64)) / n,
        "non-symmetric": M + 1.5 * identity,
        "contraction": identity - 0.9 * M / torch.linalg.matrix_norm(M, 2),
        "rotation": torch.linalg.matrix_exp(M - M.T),
        "identity": identity,
        "one eigenvalue apart": identity + 9 * torch.ones(n, n, dtype=F64) / n,
    }[kind]


KINDS = [
    "positive definite",
    "indefinite",
    "singular",
    "non-symmetric",
    "contraction",
    "rotation",
    "identity",
    "one eigenvalue apart",
]


def loss_of(A: Tensor) -> Callable[..., Tensor]:
    return lambda w, h: 0.5 * w @ (A.to(w) @ w) - h @ w


def root_of(A: Tensor) -> Callable[..., Tensor]:
    return lambda w, h: A.to(w) @ w - h


def map_of(A: Tensor) -> Callable[..., Tensor]:
    return lambda w, h: w - A.to(w) @ w + h


def conditions(A: Tensor) -> list[dict[str, Any]]:
    all_of_them = [{"optimality": root_of(A)}, {"fixed_point": map_of(A)}]
    if torch.equal(A, A.T):
        all_of_them.append({"inner_loss": loss_of(A)})
    return all_of_them


def dense_facts(A: Tensor, step_size: Tensor) -> dict[str, Tensor]:
    I_sA = torch.eye(len(A), dtype=A.dtype) - step_size.to(A) * A
    curvatures = torch.linalg.eigvalsh((A + A.T) / 2)
    sigmas = torch.linalg.svdvals(A)
    return {
        "contraction": torch.linalg.matrix_norm(I_sA, 2),
        "spectral_radius": torch.linalg.eigvals(I_sA).abs().max(),
        "eig_min": curvatures[0],
        "eig_max": curvatures[-1],
        "sigma_min": sigmas[-1],
        "sigma_max": sigmas[0],
    }


# diagnose -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_facts_in_full_krylov_spaces_are_those_of_the_matrix(kind: str, dtype: torch.dtype) -> None:
    A = random_matrix(7, kind)
    w, h = torch.ones(7, dtype=dtype), torch.zeros(7, dtype=dtype)
    for condition in conditions(A):
        facts = hf.diagnose(w, h, **condition)
        expected = dense_facts(A, facts.step_size)
        tolerance = 1e-6 if dtype == F64 else 3e-3
        for name, value in expected.items():
            estimate: Estimate = getattr(facts, name)
            error = (estimate.value - value).abs()
            assert error <= estimate.uncertainty, (name, condition)
            assert estimate.uncertainty <= tolerance, (name, condition)
        signs = torch.linalg.eigvalsh((A + A.T) / 2)
        largest = torch.linalg.matrix_norm(A, 2)
        best = 2 / (signs[0] + signs[-1]) if torch.equal(A, A.T) else signs[0] / largest**2
        step_size = best if signs[0] > 1e-5 else 1 / largest
        step_size = torch.ones_like(best) if "fixed_point" in condition else step_size
        torch.testing.assert_close(facts.step_size.double(), step_size, rtol=1e-3, atol=0.0)
        zero = signs.abs() < 1e-5
        counts = [
            int(((signs < 0) & ~zero).sum()),
            int(zero.sum()),
            int(((signs > 0) & ~zero).sum()),
        ]
        assert facts.curvature_signs.tolist() == counts
        kappa = expected["sigma_max"] / expected["sigma_min"]
        if kind == "singular":
            assert facts.condition_number.value == torch.inf
            assert "A is singular" in facts.advice
        else:
            torch.testing.assert_close(
                facts.condition_number.value.double(), kappa, rtol=1e-3, atol=0.0
            )
        torch.testing.assert_close(
            facts.residual.value.double(), torch.linalg.vector_norm(A.sum(1)), rtol=1e-5, atol=1e-5
        )
        assert bool(facts.symmetric) == torch.equal(A, A.T)


@pytest.mark.parametrize("kind", ["positive definite", "indefinite", "non-symmetric"])
@pytest.mark.parametrize("seed", range(3))
def test_estimates_in_small_krylov_spaces_know_how_far_off_they_are(kind: str, seed: int) -> None:
    A = random_matrix(60, kind, seed)
    w = torch.zeros(60, dtype=F64)
    facts = hf.diagnose(w, w, optimality=root_of(A), num_steps=20, seed=seed)
    for name, value in dense_facts(A, facts.step_size).items():
        estimate: Estimate = getattr(facts, name)
        if name == "sigma_min" and kind == "indefinite":
            continue  # in the midst of the spectrum no Krylov space of this size finds it
        assert (estimate.value - value).abs() <= estimate.uncertainty, name
        assert estimate.uncertainty <= 0.3 * facts.sigma_max.value, name
    asymmetry = torch.linalg.matrix_norm(A - A.T) / torch.linalg.matrix_norm(A)
    assert (facts.asymmetry.value - asymmetry).abs() <= 4 * facts.asymmetry.uncertainty
    assert facts.asymmetry.uncertainty <= 0.3 * asymmetry + 1e-13


def test_the_uncertainty_of_the_residual_is_the_rounding_of_params() -> None:
    A = random_matrix(20, "positive definite")
    h = torch.ones(20)
    w = torch.linalg.solve(A.float(), h)
    residual = hf.diagnose(w, h, inner_loss=loss_of(A)).residual
    assert residual.value <= 10 * residual.uncertainty
    assert residual.uncertainty <= 1e-5
    away = hf.diagnose(w + 1e-3, h, inner_loss=loss_of(A)).residual
    assert away.value > 100 * away.uncertainty


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_diagnosis_of_each_task_under_vmap(problem: Problem) -> None:
    tasks = problem.tasks()

    def diagnosis(w: Any, h: Any, args: Any) -> Any:
        return hf.diagnose(w, h, *args, **problem.keywords)

    params = [problem.inner_solver(h, *a) for h, a in tasks]
    alone = [diagnosis(w, h, a) for w, (h, a) in zip(params, tasks, strict=True)]
    stacked = stack(params), stack([h for h, _ in tasks]), stack([a for _, a in tasks])
    together = vmap(diagnosis)(*stacked)
    for name, one, other in zip(
        together._fields, optree.tree_map(lambda *t: torch.stack(t), *alone), together, strict=True
    ):
        for x, y in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-10, msg=name)
    assert "products expected" in str(together)
    assert isinstance(together.method, type(alone[0].method))


def test_products_are_counted() -> None:
    A = random_matrix(6, "non-symmetric")
    counted = {"forward": 0, "backward": 0}

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            return A @ w

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            counted["backward"] += 1
            return Transposed.apply(g)

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, g: Tensor) -> Tensor:
            return A.T @ g

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            counted["forward"] += 1
            return A @ v

    w = torch.zeros(6, dtype=F64)
    facts = hf.diagnose(w, w, optimality=lambda w, h: Product.apply(w) - h)
    # recording the transposed product, from which products with A come, takes one of them
    assert counted["forward"] + counted["backward"] == int(facts.num_products) + 1


def test_the_graph_and_the_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    A = random_matrix(5, "non-symmetric")
    w = torch.zeros(5, dtype=F64, requires_grad=True)
    facts = hf.diagnose(w, w, fixed_point=map_of(A))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(t.requires_grad for t in optree.tree_leaves(facts))
    assert w.grad is None
    other = hf.diagnose(w, w, fixed_point=map_of(A), num_steps=3, seed=1)
    assert other.sigma_max.value != facts.sigma_max.value


def test_nonfinite_operators_are_told_not_raised() -> None:
    A = torch.full((3, 3), torch.nan)
    facts = hf.diagnose(torch.ones(3), torch.ones(3), inner_loss=loss_of(A))
    assert torch.isnan(facts.eig_min.value)
    assert "non-finite" in facts.advice


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({}, "got none of fixed_point=, inner_loss=, optimality="),
        ({"inner_loss": sum, "optimality": sum}, "got inner_loss= and optimality="),
        ({"inner_loss": sum, "num_steps": 0}, "num_steps is 0; expected an integer >= 1"),
    ],
)
def test_bad_arguments(keywords: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        hf.diagnose(torch.ones(2), torch.ones(2), **keywords)
    facts = hf.diagnose(torch.ones(2), torch.ones(2), inner_loss=lambda w, h: (w * w).sum())
    with pytest.raises(ValueError, match=r"accuracy is 1\.5; expected a number between 0 and 1"):
        facts.recommend(1.5)


# What the facts call for --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A matrix and a kind of condition, and the method that is right for it."""

    kind: str
    condition: Callable[[Tensor], dict[str, Any]]
    method: type
    size: int = 40

    @property
    def id(self) -> str:
        return f"{self.kind} {self.size} {next(iter(self.condition(torch.eye(1))))}"


CASES = [
    Case("positive definite", lambda A: {"inner_loss": loss_of(A)}, hf.CG),
    Case("positive definite", lambda A: {"optimality": root_of(A)}, hf.CG),
    Case("identity", lambda A: {"fixed_point": map_of(A)}, hf.CG),
    Case("one eigenvalue apart", lambda A: {"fixed_point": map_of(A)}, hf.CG),
    Case("contraction", lambda A: {"fixed_point": map_of(A)}, hf.Dense),
    Case("contraction", lambda A: {"fixed_point": map_of(A)}, hf.GMRES, 300),
    Case("indefinite", lambda A: {"inner_loss": loss_of(A)}, hf.Dense, 6),
    Case("indefinite", lambda A: {"inner_loss": loss_of(A)}, hf.NormalCG, 300),
    Case("non-symmetric", lambda A: {"optimality": root_of(A)}, hf.GMRES, 300),
    Case("non-symmetric", lambda A: {"fixed_point": map_of(A)}, hf.GMRES, 300),
    Case("rotation", lambda A: {"optimality": root_of(A)}, hf.NormalCG),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_recommended_methods_solve_within_the_products_that_were_told(case: Case) -> None:
    A = random_matrix(case.size, case.kind)
    h = torch.randn(case.size, dtype=F64)
    w = torch.linalg.solve(A, h)
    for accuracy in (1e-3, 1e-8):
        facts = hf.diagnose(w, h, **case.condition(A), num_steps=min(case.size, 60))
        chosen = facts.recommend(accuracy)
        assert isinstance(chosen.method, case.method)
        operator = LinearOperator.from_matrix(A)
        (u,), stats = chosen.method.solve(operator, (h,))
        assert stats.result == hf.RESULTS.success
        if case.kind != "indefinite":
            assert torch.linalg.vector_norm(A @ u - h) <= 1.01 * accuracy * h.norm()
        name = {hf.CG: "cg", hf.GMRES: "gmres", hf.Dense: "dense", hf.NormalCG: "normal_cg"}
        most = chosen.num_products.get(name[case.method])
        assert most is None or stats.num_steps <= most
        _, stats = hf.NormalCG(maxiter=10**4, rtol=accuracy).solve(operator, (h,))
        if case.kind not in ("indefinite", "singular"):
            assert 2 * stats.num_steps <= chosen.num_products["normal_cg"]


def test_a_map_that_contracts_fast_is_iterated() -> None:
    A = torch.eye(300, dtype=F64) + 0.2 * (random_matrix(300, "contraction") - torch.eye(300))
    w = torch.zeros(300, dtype=F64)
    facts = hf.diagnose(w, w, fixed_point=map_of(A))
    for accuracy in (1e-2, 1e-8):
        chosen = facts.recommend(accuracy)
        assert isinstance(chosen.method, hf.FixedPoint)
        products = chosen.num_products["fixed_point"]
        exactly = hf.FixedPoint(maxiter=products + 1, rtol=0)
        h = torch.ones(300, dtype=F64)
        (u,), _ = exactly.solve(LinearOperator.from_matrix(A), (h,))
        truth = torch.linalg.solve(A, h)
        assert (u - truth).norm() <= accuracy * truth.norm()


def test_advice_names_negative_curvature_and_loose_estimates() -> None:
    A = random_matrix(300, "indefinite")
    w = torch.zeros(300, dtype=F64)
    assert "negative curvature" in hf.diagnose(w, w, inner_loss=loss_of(A)).advice
    steep = torch.diag(torch.logspace(0, 5, 300, dtype=F64))
    assert "raise num_steps" in hf.diagnose(w, w, inner_loss=loss_of(steep)).advice


def test_advice_at_the_edges() -> None:
    """A text for facts just beyond a bound, and none for those just within."""
    w, A = torch.zeros(2, dtype=F64), torch.diag(torch.tensor([1.0, 3.0], dtype=F64))
    facts = hf.diagnose(w, w, inner_loss=loss_of(A))

    def advice(**changes: Any) -> str:
        return facts._replace(**changes).advice

    def estimate(value: float, uncertainty: float = 0.0) -> Estimate:
        return Estimate(torch.tensor(value, dtype=F64), torch.tensor(uncertainty, dtype=F64))

    assert "raise num_steps" not in advice(condition_number=estimate(10.0, 4.9))
    assert "raise num_steps" in advice(condition_number=estimate(10.0, 5.1))
    saddle = {"curvature_signs": torch.tensor([1, 0, 1])}
    assert "A has negative curvature" in advice(**saddle)
    assert "A has negative curvature" not in advice(**saddle, symmetric=torch.tensor(False))
    assert "A has negative curvature" not in advice(curvature_signs=torch.tensor([0, 2, 0]))
    assert "non-finite entries" not in advice(sigma_max=estimate(1e300))
    assert "non-finite entries" in advice(sigma_max=estimate(torch.inf))
    assert "singular to working precision" in advice(condition_number=estimate(torch.inf))
    for factor, singular in ((0.9, True), (1.1, False)):
        smallest = factor * 3.0 * torch.finfo(F64).eps
        spectrum = measure(LinearOperator.from_matrix(A), (w,), 2, is_map=False, full=False)
        kappa = condition_number(spectrum._replace(sigma_min=estimate(smallest))).value
        assert bool(kappa.isinf()) is singular

    # a map is iterated for 30 products at most, and few inner parameters are those up to 256
    facts = hf.diagnose(w, w, fixed_point=map_of(torch.tensor([[0.5, 0.3], [0.0, 0.4]]).double()))
    assert not facts.symmetric
    for products, size, method in [
        (30, 1000, hf.FixedPoint),
        (31, 1000, hf.GMRES),
        (1000, 257, hf.GMRES),
        (1000, 256, hf.Dense),
        (256, 256, hf.GMRES),
        (257, 256, hf.Dense),
    ]:
        changed = facts._replace(
            contraction=estimate(1e-3 ** (1 / (products + 0.5))), size=torch.tensor(size)
        )
        recommended = changed.recommend(1e-3)
        assert recommended.num_products["fixed_point"] == products
        assert isinstance(recommended.method, method)


# method="auto" ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", thinned(PROBLEMS))
def test_auto_under_every_transform(problem: Problem) -> None:
    f = Flat(problem, "auto")
    calls = {
        "gradient": lambda: f.hypergrad(f.v, *f.a),
        "hessian": lambda: jacrev(f.hypergrad)(f.v, *f.a),
    }
    for what, call in calls.items():
        torch.testing.assert_close(call(), problem.reference(what), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        vmap(f.hypergrad)(f.V, *f.A), problem.references("gradient"), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        vmap(grad(f.value))(f.V, *f.A), problem.references("gradient"), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        jacfwd(f.value)(f.v, *f.a), problem.reference("gradient"), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        hessian(f.value)(f.v, *f.a), problem.reference("hessian"), rtol=1e-9, atol=1e-9
    )
    v = f.v.clone().requires_grad_()
    f.value(v, *f.a).backward()
    torch.testing.assert_close(v.grad, problem.reference("gradient"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, 5) for kind in KINDS if kind != "singular"),
        # of this size the indefinite one has a condition number beyond what iterations reach
        *((kind, 300) for kind in KINDS if kind not in ("singular", "indefinite")),
    ],
)
def test_auto_solves_what_there_is_to_solve(kind: str, size: int) -> None:
    A = random_matrix(size, kind)
    b = torch.randn(size, dtype=F64)
    (u,), stats = hf.Auto().solve(LinearOperator.from_matrix(A), (b,))
    assert stats.result == hf.RESULTS.success
    torch.testing.assert_close(A @ u, b, rtol=1e-8, atol=1e-8)


# Alone, these tasks get CG, GMRES with NormalCG, and the fixed-point iteration.
def test_one_method_that_is_safe_for_all_tasks() -> None:
    kinds = ["positive definite", "non-symmetric", "rotation", "contraction", "identity"]
    A = torch.stack([random_matrix(6, kind) for kind in kinds])
    h = torch.randn(5, 6, dtype=F64)

    def fn(A: Tensor, h: Tensor) -> Any:
        return hf.hypergrad_and_solution(
            lambda h, A: torch.linalg.solve(A, h),
            lambda w, h, A: (w**3).sum(),
            optimality=lambda w, h, A: A @ w - h,
            method="auto",
        )(h, A)

    grads, solution = vmap(fn)(A, h)
    w = torch.linalg.solve(A, h)
    torch.testing.assert_close(grads, torch.linalg.solve(A.mT, 3 * w**2), rtol=1e-9, atol=1e-9)
    assert solution.stats.result.tolist() == [0] * 5
    nested, _ = vmap(vmap(fn))(A[None], h[None])
    torch.testing.assert_close(nested[0], grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (["positive definite", "identity"], "cg"),
        (["positive definite", "rotation"], "gmres"),
        (["identity", "rotation"], "normal_cg"),
    ],
)
def test_assumptions_must_hold_in_every_task(kinds: list[str], name: str) -> None:
    A = torch.stack([random_matrix(300, kind) for kind in kinds])
    names = []

    def task(A: Tensor) -> Tensor:
        operator = LinearOperator.from_matrix(A)
        spectrum = measure(operator, (A[0],), 20, is_map=False, full=False)
        names.append(choose(spectrum, 300, False, 1e-6).name)
        return A.sum()

    vmap(task)(A)
    vmap(vmap(task))(A[:, None])
    assert names == [name] * 2
    facts = vmap(lambda A: hf.diagnose(A[0], A[0], optimality=lambda w, h: A @ w - h))(A)
    solver = {"cg": hf.CG, "gmres": hf.GMRES, "normal_cg": hf.NormalCG}[name]
    assert isinstance(facts.method, solver)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"maxiter": -1}, {"rtol": -1.0}])
def test_bad_settings_of_auto(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Auto: {next(iter(settings))} is"):
        hf.Auto(**settings)


def test_auto_measures_once_a_call_and_reports_what_fails() -> None:
    A = torch.full((3, 3), torch.nan)
    with pytest.raises(hf.HypergradError, match="non-finite"):
        hf.hypergrad(
            lambda h: torch.ones(3), lambda w, h: w.sum(), optimality=root_of(A), method="auto"
        )(torch.ones(3))


# Error bounds -------------------------------------------------------------------------------------


def truncated(problem: Problem, num_steps: int) -> Callable[..., Any]:
    """Some steps of the contraction that the problem has, from zero."""

    def solver(hparams: Any, *args: Tensor) -> Any:
        solution = problem.inner_solver(hparams, *args)
        unravel = unraveller(solution)
        w = torch.zeros_like(ravel(solution))
        condition = problem.fn
        for _ in range(num_steps):
            if problem.condition == "fixed_point":
                w = ravel(condition(unravel(w), hparams, *args))
                continue
            if problem.condition == "inner_loss":
                step = grad(lambda w: problem.fn(unravel(w), hparams, *args))(w)
            else:
                step = ravel(condition(unravel(w), hparams, *args))
            w = w - problem.step_size * step
        return unravel(w)

    return solver


def bounded(problem: Problem, solver: Any, method: Any, bound: Any = True) -> Any:
    """The errors and the bounds, of all tasks under `vmap`."""
    tasks = problem.tasks()
    fn = hf.hypergrad_and_solution(
        solver, problem.outer_loss, method=method, error_bound=bound, **problem.keywords
    )
    hparams, args = stack([h for h, _ in tasks]), stack([a for _, a in tasks])
    grads, solution = vmap(lambda h, a: fn(h, *a))(hparams, args)
    flat = vmap(lambda g: ravel(g))(grads)
    errors = torch.linalg.vector_norm(flat - problem.references("gradient"), dim=1)
    return errors, solution.error_bound


@pytest.mark.parametrize("problem", thinned(PROBLEMS))
def test_bounds_hold_and_are_not_far_off(problem: Problem) -> None:
    short = hf.FixedPoint(maxiter=3, rtol=0, step_size=problem.step_size)
    cases = [
        (truncated(problem, 8), hf.Dense()),
        (problem.inner_solver, short),
        (truncated(problem, 8), short),
        (truncated(problem, 5), hf.NormalCG(maxiter=1, rtol=0)),
    ]
    for solver, method in cases:
        errors, bound = bounded(problem, solver, method)
        assert (errors <= bound.bound).all()
        noise = errors < 1e-12
        assert (noise | (bound.bound <= 2 * errors)).all(), (bound.bound / errors, method)
        assert bound.gamma_is_estimate.all()
        _, loose = bounded(problem, solver, method, hf.ErrorBound(sharpen=False))
        torch.testing.assert_close(
            loose.bound, loose.inner_term + loose.linear_term, rtol=1e-6, atol=1e-12
        )
        assert (errors <= loose.bound).all()
        assert (bound.bound <= loose.bound).all()


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_bounds_of_exact_hypergradients_are_rounding_errors(problem: Problem) -> None:
    errors, bound = bounded(problem, problem.inner_solver, hf.Dense())
    assert (errors <= bound.bound).all()
    assert (bound.bound <= 1e-12).all()


@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=lambda p: p.name)
def test_constants_that_are_given(problem: Problem) -> None:
    is_map = problem.condition == "fixed_point"
    given = {"contraction": 0.5} if is_map else {"strong_convexity": 0.5}
    solver, method = truncated(problem, 6), hf.FixedPoint(maxiter=3, rtol=0, step_size=0.5)
    errors, bound = bounded(problem, solver, method, hf.ErrorBound(**given))
    assert not bound.gamma_is_estimate.any()
    assert (bound.gamma.value == 0.5).all()
    assert (bound.gamma.uncertainty == 0).all()
    assert (errors <= bound.bound).all()
    _, estimated = bounded(problem, solver, method)
    assert (estimated.gamma.value > 0.5).all()
    assert (estimated.bound < bound.bound).all()
    torch.testing.assert_close(bound.inner_distance, bound.inner_residual / 0.5)


def test_the_formula_of_the_bound() -> None:
    """On matrices: L = |w|^2/2 - u^T (A w - B h), so that its curvatures are I and 0."""
    generator = torch.Generator().manual_seed(0)
    A = random_matrix(4, "contraction")
    B = torch.randn(4, 2, generator=generator, dtype=F64)
    h, off = torch.ones(2, dtype=F64), 1e-2 * torch.ones(4, dtype=F64)
    _, solution = hf.hypergrad_and_solution(
        lambda h: torch.linalg.solve(A, B @ h) + off,
        lambda w, h: 0.5 * (w**2).sum(),
        fixed_point=lambda w, h: w - A @ w + B @ h,
        method=hf.FixedPoint(maxiter=2, rtol=0),
        error_bound=True,
    )(h)
    bound, w = solution.error_bound, solution.params
    gamma = 1 - torch.linalg.matrix_norm(torch.eye(4) - A, 2)
    cross, r = torch.linalg.matrix_norm(B, 2), torch.linalg.vector_norm(A @ off)
    rho = torch.linalg.vector_norm(w - A.T @ solution.adjoint)
    for actual, expected in (
        (bound.gamma.value, gamma),
        (bound.cross_norm.value, cross),
        (bound.curvature.value, torch.ones((), dtype=F64)),
        (bound.cross_curvature.value, torch.zeros((), dtype=F64)),
        (bound.inner_residual, r),
        (bound.linear_residual, rho),
        (bound.inner_term, cross / gamma * r / gamma),
        (bound.linear_term, cross / gamma * rho),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_bounds_are_on_the_derivative_of_the_solution_itself() -> None:
    """Not on that of a problem with the operator that is solved with: Gauss-Newton, or damped."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)

    def model(w: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(X @ w)

    def misfit(outputs: Tensor, h: Tensor) -> Tensor:
        return ((outputs - y - h) ** 2).sum() / 2

    given = hf.proximal(hf.composed(model, misfit), 1.0, center=lambda h: torch.zeros_like(X[0]))
    plain = lambda w, h: misfit(model(w, h), h) + (w**2).sum() / 2  # noqa: E731
    outer = lambda w, h: (w**3).sum() + w.sum()  # noqa: E731
    h, w = torch.tensor(0.1, dtype=torch.float64), torch.zeros_like(X[0])
    for _ in range(8):
        hessian = torch.func.hessian(plain)(w, h)
        w = w - torch.linalg.solve(hessian, torch.func.grad(plain)(w, h))
    truth = hf.hypergrad(lambda h: w, outer, inner_loss=plain, method="dense")(h)
    for inner_loss, method in ((given, hf.CG()), (plain, hf.Damped(hf.CG(), 0.3))):
        fn = hf.hypergrad_and_solution(
            lambda h: w,
            outer,
            inner_loss=inner_loss,
            method=method,
            error_bound=hf.ErrorBound(num_steps=3),
        )
        grads, solution = fn(h)
        error = (grads - truth).abs()
        assert 1e-3 < error <= solution.error_bound.bound < 2 * error
        rho = torch.func.grad(outer)(w, h) - hessian @ solution.adjoint
        torch.testing.assert_close(solution.error_bound.linear_residual, rho.norm())


def test_no_bound_without_a_contraction() -> None:
    A = random_matrix(4, "rotation")
    _, solution = hf.hypergrad_and_solution(
        lambda h: torch.linalg.solve(A, h) + 1,
        lambda w, h: (w**2).sum(),
        fixed_point=map_of(2 * A),
        method="normal_cg",
        error_bound=True,
    )(torch.ones(4, dtype=F64))
    assert solution.error_bound.bound == torch.inf


def test_bounds_of_trees_proximal_losses_and_aux_under_transforms() -> None:
    def loss(w: Any, h: Any, x: Tensor) -> Tensor:
        return ((w["a"] * x).sum() - h["b"]) ** 2 / 2

    def outer(w: Any, h: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return (w["a"] ** 2).sum() + w["b"] * h["b"], x

    weight = 2.0
    inner_loss = hf.proximal(loss, weight)

    def by_hand(w: Any, h: Any, x: Tensor) -> Any:
        distance = sum(((w[k] - h[k]) ** 2).sum() for k in ("a", "b"))
        return loss(w, h, x) + weight / 2 * distance

    def solver(h: Any, x: Tensor) -> Any:
        A = torch.outer(x, x) + weight * torch.eye(3, dtype=F64)
        a = torch.linalg.solve(A, x * h["b"] + weight * h["a"])
        return optree.tree_map(torch.add, {"a": a, "b": h["b"]}, off)

    off = {"a": torch.full((3,), 1e-3, dtype=F64), "b": torch.tensor(-1e-3, dtype=F64)}

    hparams = {"a": torch.ones(3, dtype=F64), "b": torch.tensor(0.5, dtype=F64)}
    x = torch.tensor([0.3, 0.1, -0.2], dtype=F64)
    bounds = []
    for inner in (inner_loss, by_hand):
        fn = hf.hypergrad_and_solution(
            solver, outer, inner_loss=inner, has_aux=True, error_bound=True, method="cg"
        )
        grads, solution = fn(hparams, x)
        bounds.append(solution.error_bound)
        exact, _ = hf.hypergrad(
            lambda h, x: optree.tree_map(torch.sub, solver(h, x), off),
            outer,
            inner_loss=inner,
            has_aux=True,
            method="dense",
        )(hparams, x)
        error = (ravel(grads) - ravel(exact)).norm()
        assert error <= solution.error_bound.bound <= 10 * error
    for one, other in zip(*map(optree.tree_leaves, bounds), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-10)

    # the hypergradient keeps its derivatives, the bound has none
    jacobian = jacrev(lambda b: fn(hparams | {"b": b}, x)[1].error_bound.bound)(hparams["b"])
    assert jacobian == 0
    tracked = optree.tree_map(lambda t: t.clone().requires_grad_(), hparams)
    grads, solution = fn(tracked, x)
    assert grads["b"].requires_grad
    assert not solution.error_bound.bound.requires_grad


RIDGE, MAP = PROBLEMS[0], MAPS[0]


@pytest.mark.parametrize(
    ("problem", "keywords", "error", "match"),
    [
        (RIDGE, {"error_bound": 1}, TypeError, "error_bound is 1; expected True, False, or"),
        (RIDGE, {"error_bound": True, "method": "reverse_unroll"}, ValueError, "implicit methods"),
        (RIDGE, {"error_bound": True, "method": "stoch_aid"}, ValueError, "implicit methods"),
        (
            RIDGE,
            {"error_bound": hf.ErrorBound(contraction=0.5)},
            ValueError,
            r"which has no map. Write ErrorBound\(strong_convexity=mu\)",
        ),
        (
            MAP,
            {"error_bound": hf.ErrorBound(strong_convexity=0.5)},
            ValueError,
            r"Give its contraction factor: ErrorBound\(contraction=q\)",
        ),
    ],
)
def test_bounds_that_there_are_none_of(
    problem: Problem, keywords: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        hf.hypergrad_and_solution(
            problem.inner_solver, problem.outer_loss, **(problem.keywords | keywords)
        )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"contraction": 1.0}, "contraction is 1.0; expected a number from 0 to below 1"),
        ({"strong_convexity": 0.0}, "strong_convexity is 0.0; expected a finite number > 0"),
        ({"contraction": 0.5, "strong_convexity": 0.5}, "expected one of them"),
        ({"num_steps": 0}, "num_steps is 0; expected an integer >= 1"),
    ],
)
def test_bad_settings_of_bounds(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        hf.ErrorBound(**settings)


def test_solutions_without_a_bound_have_an_empty_field() -> None:
    hparams, args = RIDGE.tasks()[0]
    _, solution = hf.hypergrad_and_solution(RIDGE.inner_solver, RIDGE.outer_loss, **RIDGE.keywords)(
        hparams, *args
    )
    assert solution.error_bound == ()
