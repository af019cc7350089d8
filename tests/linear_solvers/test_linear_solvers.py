"""The basic linear solvers, on operators that are known entry by entry."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.linear_solvers import LinearOperator

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
SOLVERS: dict[str, Any] = {
    "cg": hf.CG(maxiter=100),
    "pipelined_cg": hf.PipelinedCG(maxiter=100),
    "normal_cg": hf.NormalCG(maxiter=100),
    "fixed_point": hf.FixedPoint(maxiter=100),
    "neumann": hf.Neumann(maxiter=100),
    "dense": hf.Dense(),
    "auto": hf.Auto(),
}
OTHERS: dict[str, Any] = {
    "gmres": hf.GMRES(),
    "gmres, restarted": hf.GMRES(restart=2),
    "bicgstab": hf.BiCGStab(),
    "pipelined_cg, replaced": hf.PipelinedCG(replace=2),
}
ITERATIVE = [hf.CG, hf.PipelinedCG, hf.NormalCG, hf.FixedPoint, hf.Neumann]


def tensor(*entries: Any) -> Tensor:
    return torch.tensor(entries, dtype=F64)


def diag(*entries: float) -> Tensor:
    return torch.diag(tensor(*entries))


def solve(solver: Any, A: Tensor, b: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Any]:
    start = None if x0 is None else (x0,)
    (x,), stats = solver.solve(LinearOperator.from_matrix(A), (b,), start)
    return x, stats


B = tensor(1.0, 2.0, 3.0)
SPD = tensor([1.0, 0.3, 0.1], [0.3, 1.2, 0.2], [0.1, 0.2, 0.8])
SKEW = tensor([1.0, 0.4, 0.0], [-0.4, 1.0, 0.3], [0.1, 0.0, 1.0])


# Systems and what becomes of them -----------------------------------------------------------------

# The matrix, the right-hand side, and the results other than success.
SYSTEMS: dict[str, tuple[Tensor, Tensor, dict[str, str]]] = {
    "identity": (diag(1, 1, 1), B, {}),
    "multiple of the identity": (diag(1.5, 1.5, 1.5), B, {}),
    "positive definite": (SPD, B, {}),
    "zero right-hand side": (SPD, 0 * B, {}),
    "large right-hand side": (SPD, 1e100 * B, {}),
    "small right-hand side": (SPD, 1e-100 * B, {}),
    "an eigenvector": (diag(0.5, 0.7, 1.1), tensor(0, 1, 0), {}),
    "non-symmetric": (SKEW, B, {"cg": "breakdown", "pipelined_cg": "breakdown"}),
    "indefinite": (
        diag(1, -1, 0.5),
        B,
        {
            "cg": "breakdown",
            "pipelined_cg": "breakdown",
            "fixed_point": "divergence",
            "neumann": "divergence",
        },
    ),
    "negative definite": (
        -SPD,
        B,
        {
            "pipelined_cg": "breakdown",
            "fixed_point": "divergence",
            "neumann": "divergence",
        },
    ),
    "no contraction": (
        2.5 * diag(1, 1, 1),
        B,
        {"fixed_point": "divergence", "neumann": "divergence"},
    ),
    "on the edge of contraction": (
        2 * diag(1, 1, 1),
        B,
        {"fixed_point": "max_steps", "neumann": "max_steps"},
    ),
    "singular": (
        diag(1, 0, 0.5),
        B,
        {
            "cg": "divergence",
            "pipelined_cg": "breakdown",
            "normal_cg": "breakdown",
            "fixed_point": "max_steps",
            "neumann": "max_steps",
            "dense": "breakdown",
            "auto": "breakdown",
        },
    ),
    "zero": (
        0 * SPD,
        B,
        {
            "cg": "breakdown",
            "pipelined_cg": "breakdown",
            "normal_cg": "breakdown",
            "fixed_point": "max_steps",
            "neumann": "max_steps",
            "dense": "breakdown",
            "auto": "breakdown",
        },
    ),
    "NaN on the right": (SPD, tensor(1, NAN, 2), dict.fromkeys(SOLVERS, "nonfinite")),
    "Inf on the right": (SPD, tensor(1, INF, 2), dict.fromkeys(SOLVERS, "nonfinite")),
    "NaN in the operator": (NAN * SPD, B, dict.fromkeys(SOLVERS, "nonfinite")),
    "Inf in the operator": (INF * SPD, B, dict.fromkeys(SOLVERS, "nonfinite")),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("batched", [False, True])
def test_results(name: str, system: str, batched: bool) -> None:
    A, b, failures = SYSTEMS[system]
    if batched:
        x, stats = vmap(lambda A, b: solve(SOLVERS[name], A, b))(A.expand(2, 3, 3), b.expand(2, 3))
        x, stats = x[1], hf.SolveStats(*(s[1] for s in stats))
    else:
        x, stats = solve(SOLVERS[name], A, b)
    result = hf.RESULTS(int(stats.result))
    assert result.name == failures.get(name, "success")
    assert result.failed == (result.name not in ("success", "max_steps"))
    assert x.dtype == stats.residual_norm.dtype == F64
    assert stats.num_steps.dtype == stats.result.dtype == torch.int64
    if result == hf.RESULTS.success:
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-10, atol=0)
        residual_norm = torch.linalg.vector_norm(b - A @ x)
        slack = 1e-11 * float(b.norm())
        assert float(stats.residual_norm) == pytest.approx(float(residual_norm), abs=slack)


STEPS = {
    "identity": {"cg": 1, "normal_cg": 1, "fixed_point": 2, "neumann": 1, "dense": 3},
    "multiple of the identity": {"cg": 1, "normal_cg": 1, "dense": 3},
    "an eigenvector": {"cg": 1, "normal_cg": 1, "dense": 3},
    "positive definite": {"cg": 3, "normal_cg": 3, "dense": 3},
    "zero right-hand side": {"cg": 0, "normal_cg": 0},
    "zero": {"cg": 0, "normal_cg": 0, "fixed_point": 100, "neumann": 100},
}


@pytest.mark.parametrize("system", STEPS)
def test_number_of_steps(system: str) -> None:
    """As many as there are distinct eigenvalues for CG; a step that finds the solution counts."""
    A, b, _ = SYSTEMS[system]
    steps = {name: int(solve(SOLVERS[name], A, b)[1].num_steps) for name in STEPS[system]}
    assert steps == STEPS[system]


def krylov_minimiser(A: Tensor, b: Tensor, metric: Tensor, K: int) -> Tensor:
    """The element of the Krylov space nearest to the solution, by solving for coefficients."""
    basis = torch.stack([torch.linalg.matrix_power(A, k) @ b for k in range(K)], dim=1)
    basis, _ = torch.linalg.qr(basis)
    target = basis.T @ metric @ torch.linalg.solve(A, b)
    return basis @ torch.linalg.solve(basis.T @ metric @ basis, target)


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_iterates_are_the_best_of_the_krylov_space(K: int) -> None:
    """Right alpha and beta in each step, by their definition and not by their recurrence."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(6, 6, generator=generator, dtype=F64)
    A, b = M @ M.T + torch.eye(6, dtype=F64), torch.randn(6, generator=generator, dtype=F64)
    exactly = {"maxiter": K, "rtol": 0, "atol": 0}
    x, stats = solve(hf.CG(**exactly), A, b)
    torch.testing.assert_close(x, krylov_minimiser(A, b, A, K), rtol=1e-9, atol=1e-9)
    assert (int(stats.num_steps), int(stats.result)) == (K, hf.RESULTS.success)

    # of the normal equations M^T M x = M^T b, whose matrix is also their metric
    x, stats = solve(hf.NormalCG(**exactly), M, b)
    N = M.T @ M
    torch.testing.assert_close(x, krylov_minimiser(N, M.T @ b, N, K), rtol=1e-8, atol=1e-8)
    assert (int(stats.num_steps), int(stats.result)) == (K, hf.RESULTS.success)


def test_pipelined_cg_takes_the_steps_of_cg() -> None:
    """With replacements and without, and a preconditioner; and the products it says it takes."""
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(30, 30, generator=generator, dtype=F64)
    A, b = M @ M.T + 10 * torch.eye(30, dtype=F64), torch.randn(30, generator=generator, dtype=F64)
    inverse = 1 / A.diagonal()
    count = 0

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal count
        count += 1
        return (A @ v[0],)

    operator = LinearOperator(product, product)
    for K in (1, 2, 7, 10):
        settings: dict[str, Any] = {"maxiter": K, "rtol": 0, "atol": 0}
        settings["preconditioner"] = lambda v: (v[0] * inverse,)
        expected, _ = hf.CG(**settings).solve(operator, (b,))
        for replace in (3, 50):
            count = 0
            x, stats = hf.PipelinedCG(replace=replace, **settings).solve(operator, (b,))
            assert count == K + 2 + 4 * ((K - 1) // replace)
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12)
            residual = torch.linalg.vector_norm(b - A @ x[0])
            torch.testing.assert_close(stats.residual_norm, residual, rtol=1e-9, atol=0)
            assert (int(stats.num_steps), int(stats.result)) == (K, hf.RESULTS.success)


@pytest.mark.parametrize(
    ("dtype", "condition", "replace", "reached"),
    [(F64, 1e2, 50, True), (torch.float32, 1e2, 50, True), (F64, 1e8, 10**6, False)],
)
def test_pipelined_cg_reports_the_residual_itself(
    dtype: torch.dtype, condition: float, replace: int, reached: bool
) -> None:
    """Of a recurrence that drifts: in float32 it starts again, and at last it gives up."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=F64))[0]
    A = (Q @ torch.diag(torch.linspace(0, 1, 100, dtype=F64) ** 4 + 1 / condition) @ Q.T).to(dtype)
    b = A @ torch.ones(100, dtype=dtype)
    x, stats = solve(hf.PipelinedCG(maxiter=400, replace=replace), A, b)
    residual = torch.linalg.vector_norm((b - A @ x).double())
    size = float(b.double().norm())
    assert float(stats.residual_norm) == pytest.approx(float(residual), rel=0.1)
    assert (hf.RESULTS(int(stats.result)) is hf.RESULTS.success) is reached
    assert (float(residual) < 10 * torch.finfo(dtype).eps ** 0.75 * size) is reached


@pytest.mark.parametrize("step_size", [1.0, 0.7])
@pytest.mark.parametrize("K", [0, 1, 2, 6])
def test_iterates_of_richardson_and_neumann(K: int, step_size: float) -> None:
    exactly = {"maxiter": K, "rtol": 0, "atol": 0, "step_size": step_size}
    for make, x in ((hf.FixedPoint, 0 * B), (hf.Neumann, step_size * B)):
        for _ in range(K):
            x = x + step_size * (B - SKEW @ x)
        actual, stats = solve(make(**exactly), SKEW, B)
        torch.testing.assert_close(actual, x, rtol=1e-14, atol=0)
        assert (int(stats.num_steps), int(stats.result)) == (K, hf.RESULTS.success)
    start = tensor(3, -1, 2)
    x = start
    for _ in range(K):
        x = x + step_size * (B - SKEW @ x)
    for make in (hf.FixedPoint, hf.Neumann):
        torch.testing.assert_close(solve(make(**exactly), SKEW, B, start)[0], x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("make", [hf.FixedPoint, hf.Neumann, hf.AndersonFixedPoint])
def test_few_steps_from_a_start_worse_than_zero_are_no_divergence(make: Any) -> None:
    A, start = diag(0.5, 0.6, 1.2), tensor(1e3, -1e3, 1e3)
    for maxiter in (2, 3):
        x, stats = solve(make(maxiter=maxiter, rtol=0, atol=0), A, B, start)
        residual = torch.linalg.vector_norm(B - A @ x)
        assert float(B.norm()) < float(residual) < float((B - A @ start).norm())
        assert int(stats.result) == hf.RESULTS.success
    # a residual that grows is one
    _, stats = solve(make(maxiter=2, rtol=0, atol=0, step_size=10.0), A, B, start)
    assert make is hf.AndersonFixedPoint or int(stats.result) == hf.RESULTS.divergence


@pytest.mark.parametrize(("skew", "code"), [(1e-5, "success"), (1e-3, "breakdown")])
def test_how_much_asymmetry_cg_bears(skew: float, code: str) -> None:
    """Successive residuals overlap by no more than ``eps ** 0.25``, that is 1.2e-4."""
    generator = torch.Generator().manual_seed(0)
    M, b = torch.randn(12, 12, generator=generator, dtype=F64), torch.ones(12, dtype=F64)
    A = diag(*range(1, 13)) + skew * (M - M.T)
    _, stats = solve(hf.CG(rtol=1e-3), A, b)
    assert hf.RESULTS(int(stats.result)).name == code


@pytest.mark.parametrize(("skew", "code"), [(1e-13, "success"), (1e-10, "breakdown")])
def test_how_much_asymmetry_the_check_of_cg_bears(skew: float, code: str) -> None:
    A = SPD.clone()
    A[0, 1] += skew
    _, stats = solve(hf.CG(check_symmetry=True), A, B)
    assert hf.RESULTS(int(stats.result)).name == code


@pytest.mark.parametrize("make", ITERATIVE)
def test_steps_after_convergence_change_nothing(make: Any) -> None:
    """Neither 0 / 0 nor drift, with A = I among others."""
    for A in (diag(1, 1, 1), SPD):
        exact = torch.linalg.solve(A, B)
        for maxiter in (60, 200):
            x, stats = solve(make(maxiter=maxiter, rtol=0, atol=0), A, B)
            torch.testing.assert_close(x, exact, rtol=1e-14, atol=0)
            assert int(stats.result) == hf.RESULTS.success


@pytest.mark.parametrize("make", ITERATIVE)
def test_tolerances(make: Any) -> None:
    """``||r|| <= max(rtol ||b||, atol)``, and not much less than asked for."""
    A, norm = diag(0.5, 0.6, 1.2), float(B.norm())
    for settings, bound in [
        ({"rtol": 0.3}, 0.3 * norm),
        ({"rtol": 0, "atol": 0.2}, 0.2),
        ({"rtol": 1e-9, "atol": 0.2}, 0.2),
        ({"rtol": 0.3, "atol": 1e-9}, 0.3 * norm),
        ({"rtol": 1e-6}, 1e-6 * norm),
        ({}, torch.finfo(F64).eps ** 0.75 * norm),
    ]:
        x, stats = solve(make(**settings), A, B)
        assert int(stats.result) == hf.RESULTS.success
        assert float(torch.linalg.vector_norm(B - A @ x)) <= bound * 1.001
        # plain iterations learn of a residual one step late, but for the one at the end
        late = 2 if make in (hf.FixedPoint, hf.Neumann) else 1
        fewer = dataclasses.replace(make(**settings), maxiter=max(int(stats.num_steps) - late, 0))
        x, stats = solve(fewer, A, B)
        assert int(stats.result) == hf.RESULTS.max_steps


@pytest.mark.parametrize("make", ITERATIVE)
def test_no_steps(make: Any) -> None:
    x, stats = solve(make(maxiter=0), SPD, B)
    assert x.tolist() == (B.tolist() if make is hf.Neumann else [0.0] * 3)
    assert (int(stats.num_steps), int(stats.result)) == (0, hf.RESULTS.max_steps)
    _, stats = solve(make(maxiter=0, rtol=0, atol=0), SPD, B)
    assert int(stats.result) == hf.RESULTS.success


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e6, INF, NAN])
def test_starts(name: str, dtype: torch.dtype, size: float) -> None:
    """No start is too bad: its size must not stay in the rounding errors of the residual."""
    A, b = diag(0.5, 1, 1.2).to(dtype), 1e-3 * B.to(dtype)
    x, stats = solve(SOLVERS[name], A, b, size * torch.ones(3, dtype=dtype))
    finite = size < INF or name in ("cg", "pipelined_cg", "normal_cg", "dense", "auto")
    assert int(stats.result) == (hf.RESULTS.success if finite else hf.RESULTS.nonfinite)
    if finite:
        rtol = 1e-10 if dtype is F64 else 2e-5
        torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_solution_as_start(name: str) -> None:
    exact = torch.linalg.solve(SPD, B)
    x, stats = solve(SOLVERS[name], SPD, B, exact)
    torch.testing.assert_close(x, exact, rtol=1e-14, atol=0)
    assert int(stats.num_steps) <= (3 if name == "dense" else 1)


# Random systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [hf.CG, hf.PipelinedCG])
@pytest.mark.parametrize("kind", ["symmetric", "general", "nearly symmetric"])
def test_cg_never_calls_a_wrong_result_a_success(make: Any, kind: str) -> None:
    """On operators that are not what it assumes it breaks down, or happens to be right."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        M = torch.randn(5, 5, generator=generator, dtype=F64)
        noise = torch.randn(5, 5, generator=generator, dtype=F64)
        A = {
            "symmetric": M + M.T,
            "general": M + 2 * torch.eye(5, dtype=F64),
            "nearly symmetric": M @ M.T + torch.eye(5, dtype=F64) + 1e-2 * noise,
        }[kind]
        b = torch.randn(5, generator=generator, dtype=F64)
        operator = dataclasses.replace(LinearOperator.from_matrix(A), symmetric=kind == "symmetric")
        (x,), stats = make(maxiter=50).solve(operator, (b,))
        result = hf.RESULTS(int(stats.result))
        stagnation = (hf.RESULTS.stagnation,) if make is hf.PipelinedCG else ()
        known = (hf.RESULTS.success, hf.RESULTS.breakdown, hf.RESULTS.divergence, *stagnation)
        assert result in known
        if result == hf.RESULTS.success:
            torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)


# The operator -------------------------------------------------------------------------------------


def test_operator() -> None:
    """``A = shift I + scale P`` on several leaves, with its transpose and the fused steps."""
    P = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = 2.0 * torch.eye(5, dtype=F64) - 3.0 * P

    def split(v: Tensor) -> tuple[Tensor, ...]:
        return v[0], v[1:].reshape(2, 2)

    def join(v: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in v])

    operator = LinearOperator(
        lambda v: split(P @ join(v)), lambda v: split(P.T @ join(v)), shift=2.0, scale=-3.0
    )
    v, b = torch.arange(5, dtype=F64), torch.ones(5, dtype=F64)
    for actual, expected in [
        (operator.mv(split(v)), A @ v),
        (operator.T.mv(split(v)), A.T @ v),
        (operator.T.T.mv(split(v)), A @ v),
        (operator.residual(split(v), split(b)), b - A @ v),
        (operator.richardson(split(v), split(b), 0.3), v + 0.3 * (b - A @ v)),
        (hf.Dense().solve(operator, split(b))[0], torch.linalg.solve(A, b)),
        (hf.Dense().solve(operator.T, split(b))[0], torch.linalg.solve(A.T, b)),
        (hf.NormalCG().solve(operator.T, split(b))[0], torch.linalg.solve(A.T, b)),
        (hf.OneStep(step_size=0.5).solve(operator, split(b))[0], 0.5 * b),
    ]:
        assert [leaf.shape for leaf in actual] == [(), (2, 2)]
        torch.testing.assert_close(join(actual), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, torch.tensor(2.0, dtype=F64)], ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("step_size", [1.0, 0.5])
def test_fused_steps(shift: float, scale: float, step_size: float) -> None:
    operator = dataclasses.replace(LinearOperator.from_matrix(SKEW), shift=shift, scale=scale)
    A = shift * torch.eye(3, dtype=F64) + scale * SKEW
    v = tensor(3, -1, 2)
    torch.testing.assert_close(operator.mv((v,))[0], A @ v)
    torch.testing.assert_close(operator.residual((v,), (B,))[0], B - A @ v)
    step = operator.richardson((v,), (B,), step_size)[0]
    torch.testing.assert_close(step, v + step_size * (B - A @ v))


@pytest.mark.parametrize("solver", [hf.CG, hf.NormalCG])
def test_derivatives_through_a_solve(solver: Any) -> None:
    """Where one is asked for, by the operator alone even, no scalar is a mere number."""
    diagonal = tensor(1.0, 2.0, 4.0).requires_grad_()
    operator = LinearOperator(
        lambda v: (diagonal * v[0],), lambda v: (diagonal * v[0],), symmetric=True
    )
    (x,), _ = solver(maxiter=3, rtol=0, atol=0).solve(operator, (B,))
    (grad,) = torch.autograd.grad(x.sum(), diagonal)
    torch.testing.assert_close(grad, -B / diagonal.detach() ** 2)


# Layouts and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", ["single", "vmap", "nested vmap"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", [*SOLVERS, *OTHERS])
def test_vectors_of_the_caller_are_not_written_to(name: str, symmetric: bool, batched: str) -> None:
    """Not even where the operator returns what it is given, and with a start."""
    A = torch.stack([diag(1, 1, 1), SPD, 0.5 * SPD, SPD + 0.1 * diag(1, 2, 3)]).reshape(2, 2, 3, 3)
    b, x0 = torch.stack([B, 2 * B]), tensor(0.1, 0.2, 0.3)
    kept = A.clone(), b.clone(), x0.clone()

    def run(A: Tensor, b: Tensor, own: bool = False) -> Tensor:
        def product(v: Any) -> Any:
            return v if own else (A @ v[0],)

        operator = LinearOperator(product, product, symmetric=symmetric)
        (x,), _ = {**SOLVERS, **OTHERS}[name].solve(operator, (b,), (x0,))
        return x

    if batched == "single":
        result = torch.stack(
            [torch.stack([run(A[i, j], b[j]) for j in range(2)]) for i in range(2)]
        )
        torch.testing.assert_close(run(A[0, 0], b[0], own=True), b[0])
    elif batched == "vmap":
        result = torch.stack([vmap(run)(A[i], b) for i in range(2)])
    else:
        result = vmap(vmap(run), (0, None))(A, b)
    expected = torch.linalg.solve(A, b.expand(2, 2, 3))
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)
    for before, after in zip(kept, (A, b, x0), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Results in the dtype of the leaves, statistics in float32, accuracy of the dtype."""
    n = 200
    spectrum = torch.linspace(0.8, 1.2, n)
    operator = LinearOperator(
        lambda v: (spectrum.to(dtype) * v[0],), lambda v: (spectrum.to(dtype) * v[0],)
    )
    (x,), stats = SOLVERS[name].solve(operator, (torch.ones(n, dtype=dtype),))
    assert (x.dtype, stats.residual_norm.dtype) == (dtype, torch.float32)
    assert int(stats.result) == hf.RESULTS.success
    error = (x.float() * spectrum.to(dtype).float() - 1).abs().max()
    assert error < 3 * torch.finfo(dtype).eps ** 0.75


@pytest.mark.parametrize("name", SOLVERS)
def test_mixed_leaves(name: str) -> None:
    """Each leaf keeps its shape, dtype and layout, and the coarsest sets the accuracy."""
    b = (
        torch.tensor(1.0, dtype=F64),
        torch.ones(2, 3, dtype=torch.float32).T,
        torch.ones(2, 4, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last),
        torch.ones(0, 2, dtype=F64),
    )
    operator = LinearOperator(
        lambda v: tuple(1.25 * leaf for leaf in v), lambda v: tuple(1.25 * leaf for leaf in v)
    )
    x, stats = SOLVERS[name].solve(operator, b)
    assert stats.residual_norm.dtype == F64
    for leaf, like in zip(x, b, strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        torch.testing.assert_close(leaf, 0.8 * like, rtol=2e-3, atol=0)


def test_inner_products_in_float16_do_not_overflow() -> None:
    """The squared norm is 6e7, where float16 ends at 65504."""
    b = (torch.full((60000,), 32.0, dtype=torch.float16),)
    operator = LinearOperator(lambda v: v, lambda v: v)
    for solver in (hf.CG(), hf.NormalCG(), hf.FixedPoint(), hf.Neumann()):
        (x,), stats = solver.solve(operator, b)
        assert torch.equal(x, b[0])
        assert int(stats.result) == hf.RESULTS.success


# The objects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_values(name: str) -> None:
    solver = SOLVERS[name]
    assert solver == copy.deepcopy(solver) == pickle.loads(pickle.dumps(solver))
    assert hash(solver) == hash(copy.deepcopy(solver))
    assert eval(repr(solver), vars(hf)) == solver
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.maxiter = 3


def test_result_codes_explain_themselves() -> None:
    assert [code.value for code in hf.RESULTS] == list(range(len(hf.RESULTS)))
    assert all(len(code.message) > 20 or code == 0 for code in hf.RESULTS)
    assert [code.failed for code in hf.RESULTS][:3] == [False, False, True]
    assert hf.RESULTS(torch.tensor(2).item()) is hf.RESULTS.breakdown
