"""A success is a residual, the best answer is the one returned, and nothing is kept."""

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf
from hyperfunc.diagnostics._diagnose import MOST_STEPS
from hyperfunc.linear_solvers import LinearOperator
from hyperfunc.linear_solvers._cycles import rounding
from tests.cells import each_cell
from tests.linear_solvers import auto_table

F64 = torch.float64
JACOBI = hf.JacobiPreconditioner()
SOLVERS: dict[str, Any] = {
    "cg": hf.CG(),
    "cg, jacobi": hf.CG(preconditioner=JACOBI),
    "pipelined": hf.PipelinedCG(),
    "normal_cg": hf.NormalCG(),
    "normal_cg, jacobi": hf.NormalCG(preconditioner=JACOBI),
    "gmres": hf.GMRES(),
    "gmres, jacobi": hf.GMRES(preconditioner=JACOBI),
    "bicgstab": hf.BiCGStab(),
    "fixed_point": hf.FixedPoint(step_size=0.05),
    "neumann": hf.Neumann(step_size=0.1),
    "anderson": hf.AndersonFixedPoint(step_size=0.1),
    "nystrom": hf.Nystrom(rank=3),
    "fallback": hf.Fallback(hf.CG(), hf.GMRES()),
    "dense": hf.Dense(),
    "auto": hf.Auto(),
}


def _power(stop: float, n: int) -> Tensor:
    return torch.diag(torch.logspace(0, stop, n, dtype=F64))


def _weak(left: Tensor, right: Tensor, least: float) -> Tensor:
    """One singular value far below the others."""
    n = len(left)
    values = torch.cat([torch.logspace(0, -1, n - 1, dtype=F64), torch.tensor([least], dtype=F64)])
    return torch.linalg.qr(left)[0] @ torch.diag(values) @ torch.linalg.qr(right)[0].T


def _huge(A: Tensor) -> Tensor:
    A[0, 0] = 1e12
    return A


def _complex(A: Tensor) -> Tensor:
    """The real form of a complex matrix."""
    B = A.flip(0)
    return torch.cat([torch.cat([A, -B], 1), torch.cat([B, A], 1)])


def _rescaled(A: Tensor) -> Tensor:
    """Rows in units from 1e-12 to 1e12, in no order."""
    powers = torch.linspace(-12, 12, len(A), dtype=F64).roll(len(A) // 2)
    return 10 ** powers[:, None] * A


FAMILIES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "singular": lambda A, n: A[:, 1:] @ A[1:],
    "singular, symmetric": lambda A, n: A[:, 1:] @ A[:, 1:].T,
    "nearly singular": lambda A, n: _weak(A, A.T, 1e-13),
    "nearly singular, symmetric": lambda A, n: _weak(A, A, 1e-11),
    "rows": lambda A, n: _power(10, n) @ A,
    "columns": lambda A, n: A @ _power(10, n),
    "both": lambda A, n: _power(4, n) @ (A @ A.T + torch.eye(n)) @ _power(4, n),
    "huge": lambda A, n: _huge(A),
    "indefinite": lambda A, n: A + A.T,
    "negative definite": lambda A, n: -A @ A.T - torch.eye(n),
    "positive definite": lambda A, n: A @ A.T + torch.eye(n),
    "rank one": lambda A, n: A[:, :1] @ A[:1],
    "nilpotent": lambda A, n: A.triu(1),
    "skew": lambda A, n: A - A.T,
    "complex": lambda A, n: _complex(A),
    "rows far apart": lambda A, n: _rescaled(A + 3 * torch.eye(n)),
    "diagonal far apart": lambda A, n: _rescaled(torch.eye(n, dtype=F64)),
    "non-normal": lambda A, n: torch.eye(n) + 3 * torch.eye(n).roll(1, 1).triu() + 0.1 * A,
}
ORACLES = ("cg", "normal_cg", "gmres", "bicgstab", "pipelined", "anderson")
# What is held against two others that succeed. BiCGStab may break down, stationary solvers need a
# contraction, Nystrom is an estimate; CG is for semidefinite operators.
FAIR = ("dense", "auto", "fallback", "gmres", "gmres, jacobi", "normal_cg", "normal_cg, jacobi")
SEMIDEFINITE = (
    "singular, symmetric",
    "both",
    "positive definite",
    "negative definite",
)  # that CG is not told of; on nearly singular ones rounding may look like asymmetry


def _may_fail(solver: str, A: Tensor, b: Tensor, answers: list[Tensor]) -> bool:
    """What two others may solve by luck, or by what this one lacks, as its docstring says."""
    eps, A, b = torch.finfo(A.dtype).eps, A.double(), b.double()
    # the rounding errors of the solution alone are more than any solver calls zero
    size = min(float(x.norm()) for x in answers) * torch.linalg.matrix_norm(A, 2)
    if eps * size > 0.25 * eps**0.25 * b.norm():
        return True
    # singular to working precision, for what works with a basis or with A^T r
    if solver.startswith(("gmres", "normal_cg")):
        if solver == "gmres, jacobi":
            operator = LinearOperator.from_matrix(A)
            A = A / JACOBI.scale(operator, (b,))
        return bool(10 * eps * torch.linalg.cond(A) > 1)
    return False


def _false_or_unfair(seeds: range, every: int = 1) -> list[Any]:
    found: list[Any] = []
    for place, (name, make) in enumerate(FAMILIES.items()):
        for seed in (seed for seed in seeds if (seed + place) % every == 0):
            generator = torch.Generator().manual_seed(seed)
            n, dtype = (3, 8, 20)[seed % 3], (F64, torch.float32)[seed // 3 % 2]
            eps = torch.finfo(dtype).eps
            A = make(torch.randn(n, n, generator=generator, dtype=F64), n).to(dtype)
            b = torch.randn(len(A), generator=generator, dtype=F64).to(dtype)
            b = A @ b if seed % 2 else b
            codes, solutions = {}, {}
            for solver, settings in SOLVERS.items():
                (x,), stats = settings.solve(LinearOperator.from_matrix(A), (b,))
                solutions[solver] = x
                residual = (b.double() - A.double() @ x.double()).norm()
                size = torch.linalg.matrix_norm(A.double(), 2) * x.double().norm() + b.norm()
                bound = torch.maximum(eps**0.75 * b.norm(), (5 * eps * size).double())
                bound = torch.minimum(bound, eps**0.25 * b.norm())
                codes[solver] = hf.RESULTS(int(stats.result)).name
                if codes[solver] == "success" and not residual <= 1.01 * bound:
                    found.append((name, seed, solver, float(residual / b.norm())))
            # the iterate that failed is no better for being large
            size = torch.linalg.matrix_norm(A, 2) * solutions["gmres"].norm()
            if codes["gmres"] != "success" and not 10 * eps * size <= b.norm():
                found.append((name, seed, "gmres", float(size / b.norm())))
            for solver in (*FAIR, *(("cg", "cg, jacobi") if name in SEMIDEFINITE else ())):
                others = [o for o in ORACLES if o != solver and codes[o] == "success"]
                if codes[solver] == "success" or len(others) < 2:
                    continue
                if not _may_fail(solver, A, b, [solutions[other] for other in others]):
                    found.append((name, seed, solver, codes[solver], others))
    return found


def test_no_success_is_false_and_no_failure_unfair() -> None:
    assert _false_or_unfair(range(2), every=4) == []


@pytest.mark.slow
def test_no_success_is_false_and_no_failure_unfair_in_4000_cases() -> None:
    assert _false_or_unfair(range(2, 26)) == []


def test_normal_equations_neither_overflow_nor_underflow() -> None:
    """The squared norm of A A^T b is 1e48 in the first case, where float32 ends at 3e38."""
    A = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]])
    x = torch.tensor([1.0, -2.0, 3.0])
    for size in (1e12, 1.0, 1e-12):
        operator = LinearOperator.from_matrix(size * A)
        for solver in (hf.NormalCG(), hf.NormalCG(preconditioner=JACOBI)):
            run = torch.func.vmap(lambda b: solver.solve(operator, (b,)))  # noqa: B023
            (single,), stats = solver.solve(operator, (size * A @ x,))
            (mapped,), both = run(torch.stack([size * A @ x, torch.zeros(3)]))
            assert (int(stats.result), both.result.tolist()) == (0, [0, 0])
            torch.testing.assert_close(single, x)
            torch.testing.assert_close(mapped, torch.stack([x, 0 * x]))


def test_least_squares_neither_overflow_nor_underflow() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(7, 3, generator=generator) @ torch.randn(3, 7, generator=generator)
    b = torch.randn(7, generator=generator)
    best = torch.linalg.pinv(A, rtol=1e-5) @ b
    for size, rhs in ((1e17, 1e12), (1.0, 1.0), (1e-12, 1e-15), (1e-25, 1.0)):
        operator = LinearOperator.from_matrix(size * A)
        (x,), stats = hf.LeastSquares().solve(operator, (rhs * b,), (rhs / size * best / 2,))
        assert int(stats.result) == 0
        torch.testing.assert_close(x * (size / rhs), best, rtol=1e-3, atol=1e-4)
        atol = 0.5 * rhs * size * float((A.mT @ b).norm())
        (x,), early = hf.LeastSquares(rtol=0, atol=atol).solve(operator, (rhs * b,))
        assert 0 < early.num_steps < stats.num_steps
        assert early.residual_norm <= atol
    (x,), stats = hf.LeastSquares().solve(LinearOperator.from_matrix(1e-25 * A), (1e15 * b,))
    assert int(stats.result) == hf.RESULTS.nonfinite
    for M in (JACOBI, lambda r: r / (1e24 * (A * A).sum(0))):
        solver = hf.LeastSquares(preconditioner=M)
        (x,), stats = solver.solve(LinearOperator.from_matrix(1e12 * A), (1e12 * b,))
        assert int(stats.result) == 0
        torch.testing.assert_close(A.mT @ (b - A @ x), 0 * x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [hf.CG(), hf.Dense(), hf.GMRES()])
def test_a_solution_too_small_for_float32_is_no_success(solver: Any) -> None:
    A, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), (torch.tensor([1e-25, 2e-25]),)
    for size, code in ((1.0, True), (1e10, True), (1e30, False)):
        _, stats = solver.solve(LinearOperator.from_matrix(size * A), b)
        assert (int(stats.result) == hf.RESULTS.success) is code


def test_derivatives_of_any_size_are_solved_for() -> None:
    """In float32 the squares of 1e-25 and 1e20 are zero and Inf, which no residual shows."""
    A = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]])
    S = A @ A.mT
    h, scales = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1e-25, 1.0, 1e20])
    with each_cell() as cell:
        for method in ("cg", "gmres", hf.CG(5, rtol=0)):
            solution = hf.implicit_diff(
                lambda h: torch.linalg.solve(S, h),
                inner_loss=lambda w, h: 0.5 * w @ S @ w - h @ w,
                method=method,
            )
            with cell(str(method)):
                pull = lambda s: torch.func.vjp(solution, h)[1](s * h)[0] / s  # noqa: B023, E731
                push = lambda s: torch.func.jvp(solution, (h,), (s * h,))[1] / s  # noqa: B023, E731
                expected = torch.linalg.solve(S, h).expand(3, 3)
                for product in (pull, push):
                    for got in (
                        torch.stack([product(s) for s in scales]),
                        torch.func.vmap(product)(scales),
                    ):
                        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    fn = hf.hypergrad_and_solution(
        lambda h: h, lambda w, h: 1e-25 * w.sum(), inner_loss=lambda w, h: ((w - h) ** 2).sum()
    )
    grads, solution = fn(h)
    torch.testing.assert_close(grads / 1e-25, torch.ones(3))
    assert int(solution.stats.result) == 0
    assert solution.stats.residual_norm.dtype == torch.float32


def test_gmres_keeps_what_its_basis_resolves() -> None:
    """Rows in other units, where the last step gains though rounding is said to hide it."""
    for seed in (7, 31, 43):
        generator = torch.Generator().manual_seed(seed)
        A = _power(10, 8) @ torch.randn(8, 8, generator=generator, dtype=F64)
        b = A @ torch.randn(8, generator=generator, dtype=F64)
        solver = hf.GMRES(preconditioner=JACOBI)
        (x,), stats = solver.solve(LinearOperator.from_matrix(A), (b,))
        assert int(stats.result) == hf.RESULTS.success
        assert (b - A @ x).norm() <= 1e-11 * b.norm()
    for seed in (10, 34):  # beyond what float32 resolves, the part that it does is kept
        generator = torch.Generator().manual_seed(seed)
        A = FAMILIES["both"](torch.randn(8, 8, generator=generator, dtype=F64), 8).float()
        b = torch.randn(8, generator=generator, dtype=F64).float()
        (x,), stats = hf.GMRES().solve(LinearOperator.from_matrix(A), (b,))
        assert hf.RESULTS(int(stats.result)).failed
        assert 0.1 * b.norm() < (b - A @ x).norm() < 0.7 * b.norm()
        torch.testing.assert_close(stats.residual_norm, (b - A @ x).norm(), rtol=1e-2, atol=0.0)


def test_gmres_reports_rounding_in_units_of_the_operator() -> None:
    A = 1e-8 * _random(6, torch.arange(1.0, 7, dtype=F64))
    b = A @ torch.ones(6, dtype=F64)
    eps = torch.finfo(F64).eps
    for preconditioner in (None, JACOBI):
        solver = hf.GMRES(12, rtol=0, preconditioner=preconditioner)
        _, stats = solver.solve(LinearOperator.from_matrix(A), (b,))
        assert eps * b.norm() <= stats.residual_norm <= 10 * eps * b.norm()


def test_a_cycle_of_gmres_that_gains_next_to_nothing_is_the_last() -> None:
    shift = torch.eye(6, dtype=F64).roll(1, 0)
    for gain, steps in ((1e-5, 2), (1e-3, 4)):  # the squared residual's is that squared
        operator = LinearOperator.from_matrix(shift + gain * torch.eye(6))
        _, stats = hf.GMRES(restart=2).solve(operator, (torch.eye(6, dtype=F64)[0],))
        assert (int(stats.result), int(stats.num_steps)) == (hf.RESULTS.stagnation, steps)


def test_rounding_excuses_no_residual_of_the_size_of_the_right_hand_side() -> None:
    A = torch.diag(torch.tensor([1.0, 1e20], dtype=F64))
    for size in (100.0, 0.01):
        b, x = torch.tensor([size, 0.0], dtype=F64), torch.ones(2, dtype=F64)
        squared = rounding(LinearOperator.from_matrix(A), (x,), (b - A @ x,), (b,), b @ b)
        torch.testing.assert_close(squared, torch.finfo(F64).eps ** 0.5 * size**2 + 0 * squared)


def test_gmres_does_not_return_a_large_vector_for_nothing() -> None:
    """Of a singular matrix, which rounding makes regular, and an inconsistent right-hand side."""
    for seed in (0, 1, 18, 42):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(3, 3, generator=generator, dtype=F64)
        A, b = A[:, 1:] @ A[:, 1:].T, torch.randn(3, generator=generator, dtype=F64)
        (x,), stats = hf.GMRES().solve(LinearOperator.from_matrix(A), (b,))
        assert hf.RESULTS(int(stats.result)).failed
        best = torch.linalg.pinv(A, rtol=1e-12) @ b
        assert x.norm() < 1e3 * best.norm()
        torch.testing.assert_close(stats.residual_norm, (b - A @ best).norm())


def _symmetric(A: Tensor) -> LinearOperator:
    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (A @ v[0],)

    return LinearOperator(product, product, symmetric=True)


class Counted:
    """An operator that counts its products."""

    def __init__(self, A: Tensor, symmetric: bool = True) -> None:
        self.count = 0
        self.operator = LinearOperator(
            lambda v: self._times(A, v), lambda v: self._times(A.mT, v), symmetric=symmetric
        )

    def _times(self, A: Tensor, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.count += 1
        return (A @ v[0],)


def _random(n: int, values: Tensor, seed: int = 0) -> Tensor:
    Q = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    Q = torch.linalg.qr(Q)[0]
    return Q @ torch.diag(values) @ Q.T


def test_auto_costs_what_cg_costs_and_says_whose_answer_it_is() -> None:
    n = 300
    values = torch.logspace(0, 2, n, dtype=F64)
    scaled = _power(3, n) @ _random(n, torch.linspace(1, 5, n, dtype=F64)) @ _power(3, n)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=F64)
    few_large = torch.cat([values[:-20], values[-20:] ** 4])
    cases: dict[str, tuple[Tensor, bool, str]] = {
        "easy": (_random(n, values**0.5), True, "cg"),
        "harder": (_random(n, values), True, "cg"),
        "out of steps": (_random(n, values**4), True, "cg"),
        "scaled": (scaled, True, "cg, jacobi"),
        "a few large": (_random(n, few_large), True, "cg, nystrom"),
        # of which the estimated diagonal spreads as widely as for a scaled one
        "decaying": (_random(n, torch.arange(1, n + 1, dtype=F64) ** -3.0), True, "cg, nystrom"),
        "diagonal": (torch.diag(values**3), True, "cg, jacobi"),
        "not symmetric": (torch.eye(n) + 0.4 * noise / n**0.5, False, "gmres"),
        "few": (noise[:40, :40], False, "dense"),
        "few, singular": (noise[:40, :10] @ noise[:40, :10].T, True, "cg"),
    }
    with each_cell() as cell:
        for name, (A, symmetric, choice) in cases.items():
            with cell(name):
                b = A @ torch.ones(len(A), dtype=F64)
                ours, cg = Counted(A, symmetric), Counted(A, symmetric)
                (x,), stats = hf.Auto(maxiter=500).solve_and_tell(ours.operator, (b,))
                (y,), alone = hf.CG(maxiter=500).solve(cg.operator, (b,))
                assert hf.Auto.CHOICES[int(stats.choice)] == choice
                assert stats.result <= alone.result
                assert (b - A @ x).norm() <= 1.01 * (b - A @ y).norm() + 1e-11 * b.norm()
                if choice.startswith("cg"):
                    assert ours.count <= 1.2 * cg.count + 1


@pytest.mark.slow
def test_auto_on_ten_problems() -> None:
    """The table that README shows."""
    with each_cell() as cell:
        for name, row in auto_table.rows():
            with cell(name):
                (residual, products, code, *_), (ours, our_products, our_code, *_) = row.values()
                assert ours <= 1.01 * residual + 1e-11
                assert our_code == "success" or code != "success"
                if code == "success":
                    assert our_products <= 1.2 * products


def test_trials_under_vmap_are_those_of_each_task() -> None:
    n = 60
    steep = torch.logspace(0, 2, n, dtype=F64)
    tasks = torch.stack(
        [
            _random(n, steep),
            _power(3, n) @ _random(n, torch.linspace(1, 5, n, dtype=F64)) @ _power(3, n),
            _random(n, torch.cat([steep[:-5], steep[-5:] ** 3])),
            _random(n, steep, seed=1),
        ]
    )
    b = torch.ones(n, dtype=F64)
    solver = hf.Auto(num_steps=3)

    def solve(A: Tensor) -> Any:
        return solver.solve_and_tell(_symmetric(A), (b,))

    (x,), stats = torch.func.vmap(solve)(tasks)
    each = [solve(A) for A in tasks]
    assert stats.choice.tolist() == [int(alone.choice) for _, alone in each]
    assert {"cg", "cg, jacobi", "cg, nystrom"} == {hf.Auto.CHOICES[i] for i in stats.choice}
    torch.testing.assert_close(x, torch.linalg.solve(tasks, b.expand(4, n)), rtol=1e-7, atol=1e-9)
    for i in (0, 3):  # what does not pay for them does not touch them
        assert abs(int(stats.num_steps[i]) - int(each[i][1].num_steps)) <= 1


def test_fallback_keeps_the_smallest_residual() -> None:
    A = torch.diag(torch.logspace(-2, 2, 400, dtype=F64))
    b = torch.ones(400, dtype=F64)
    first, then = hf.CG(maxiter=300), hf.GMRES(maxiter=60)
    for pair, choice in (((first, then), 0), ((then, first), 1)):
        operator = Counted(A).operator
        (x,), stats = hf.Fallback(*pair).solve_and_tell(operator, (b,))
        (best,), alone = first.solve(operator, (b,))
        assert torch.equal(x, best)
        assert (int(stats.choice), int(stats.result)) == (choice, hf.RESULTS.max_steps)
        torch.testing.assert_close(stats.residual_norm, (b - A @ x).norm())
        assert stats.num_steps == alone.num_steps + then.solve(operator, (b,))[1].num_steps
    # the limit is no failure, whatever happens to the other; nor is NaN an answer
    B = torch.diag(torch.tensor([1.0, -1.0, 0.5], dtype=F64))
    limited = hf.Fallback(hf.GMRES(maxiter=1), hf.CG())
    _, stats = limited.solve(Counted(B).operator, (torch.ones(3, dtype=F64),))
    assert int(stats.result) == hf.RESULTS.max_steps
    saddle = torch.diag(torch.tensor([9.0, 4.0, 1.0, -0.5], dtype=F64))
    failing = hf.Fallback(hf.CG(), hf.GMRES(maxiter=1))  # whose answer is the better one
    hidden = torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=F64)
    _, stats = failing.solve_and_tell(_symmetric(saddle), (hidden,))
    assert (int(stats.choice), int(stats.result)) == (0, hf.RESULTS.max_steps)
    # a hypergradient carries the choice, also through vmap and where derivatives are asked for
    fn = hf.hypergrad_and_solution(
        lambda h: h / A.diagonal(),
        lambda w, h: w.sum(),
        inner_loss=lambda w, h: 0.5 * (w * A.diagonal()) @ w - w @ h,
        method=hf.Auto(),
    )
    for solution in (fn(b)[1], torch.func.vmap(fn)(b[None])[1], fn(b.requires_grad_())[1]):
        assert int(solution.stats.choice.sum()) == 1


def test_dense_solves_what_has_a_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 7, generator=generator, dtype=F64)
    temperature = 0.03
    weights = torch.softmax(torch.tensor([1.0, 0.9, 0.2, 0.1], dtype=F64) / temperature, 0)
    kkt = torch.ones(5, 5, dtype=F64)
    kkt[:4, :4], kkt[4, 4] = torch.diag(temperature / weights), 0
    for A in (X.T @ X, X.T @ torch.randn(4, 7, generator=generator, dtype=F64), kkt, 0 * kkt):
        exact = torch.linalg.pinv(A, rtol=1e-15) @ (A @ torch.ones(len(A), dtype=F64))
        b = A @ exact
        for dtype, accuracy in ((F64, 1e-9), (torch.float32, 1e-4)):
            operator = LinearOperator.from_matrix(A.to(dtype))
            (x,), stats = hf.Dense().solve(operator, (b.to(dtype),))
            assert int(stats.result) == hf.RESULTS.success
            torch.testing.assert_close(x.double(), exact, rtol=accuracy, atol=accuracy)
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    nearly = torch.tensor([1.0, 1.0, 1e-6], dtype=F64)  # more than rounding leaves
    for A, b in ((X.T @ X, torch.ones(7, dtype=F64)), (flat, nearly)):
        _, stats = hf.Dense().solve(LinearOperator.from_matrix(A), (b,))
        assert int(stats.result) == hf.RESULTS.breakdown
    # products in bfloat16 hide a residual of 0.004, but not from the matrix
    coarse = lambda v: (flat.float() @ v[0].bfloat16().float(),)  # noqa: E731
    for last, code in ((0.004, hf.RESULTS.breakdown), (0.0, hf.RESULTS.success)):
        b = torch.tensor([1.2383, 0.777, last])
        _, stats = hf.Dense().solve(LinearOperator(coarse, coarse, symmetric=True), (b,))
        assert int(stats.result) == code


def test_dense_takes_products_in_batches_where_it_can() -> None:
    A = torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=F64)
    b = torch.ones(50, dtype=F64)
    counted = Counted(A, symmetric=False)
    (x,), _ = hf.Dense().solve(counted.operator, (b,))
    assert counted.count == 3  # the first one, all others, and the check
    # one that looks at a value has to go one by one
    operator = LinearOperator(lambda v: (A @ v[0] if v[0].sum() > -9 else v[0],), lambda v: v)
    torch.testing.assert_close(hf.Dense().solve(operator, (b,))[0][0], x)
    torch.testing.assert_close(x, torch.linalg.solve(A, b))


def test_least_squares_where_there_is_no_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 7, generator=generator, dtype=F64)
    b = torch.randn(7, generator=generator, dtype=F64)
    for A in (X.T @ X, X.T @ torch.randn(4, 7, generator=generator, dtype=F64)):
        operator = LinearOperator.from_matrix(A)
        (x,), stats = hf.LeastSquares().solve(operator, (b,))
        assert int(stats.result) == hf.RESULTS.success
        torch.testing.assert_close(x, torch.linalg.pinv(A) @ b, rtol=1e-7, atol=1e-9)
        assert stats.residual_norm <= 1e-11 * (A.T @ b).norm()
        (y,), stats = hf.NormalCG().solve(operator, (b,))
        assert int(stats.result) == hf.RESULTS.breakdown
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-7)
    fn = hf.hypergrad(
        lambda h: torch.linalg.pinv(X) @ h,
        lambda w, h: (w**3).sum(),
        inner_loss=lambda w, h: 0.5 * ((X @ w - h) ** 2).sum(),
        method="least_squares",
    )
    h = torch.randn(4, generator=generator, dtype=F64)
    expected = torch.func.grad(lambda h: ((torch.linalg.pinv(X) @ h) ** 3).sum())(h)
    torch.testing.assert_close(fn(h), expected)
    with pytest.raises(RuntimeError, match="LeastSquares gives first derivatives only"):
        torch.func.jacrev(fn)(h)


def test_a_preconditioner_for_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 12
    upper = torch.randn(n, n, generator=generator, dtype=F64).triu(1)
    A = _power(3, n) @ (torch.eye(n) + 0.5 * upper)
    M = torch.linalg.inv(A * (1 + 1e-3 * torch.randn(n, n, generator=generator, dtype=F64)))
    h, c, v = torch.randn(3, n, generator=generator, dtype=F64)

    def residual(w: Tensor, h: Tensor) -> Tensor:
        return A @ w - h + 0.01 * (w**2).sum()

    def solve(h: Tensor) -> Tensor:
        w = torch.zeros(n, dtype=F64)
        for _ in range(20):
            w = w - torch.linalg.solve(torch.func.jacrev(residual)(w, h), residual(w, h))
        return w

    exact = hf.implicit_diff(solve, optimality=residual, method="dense")
    pair = (lambda r: M @ r, lambda r: M.T @ r)
    lone = lambda r: M.T @ r  # noqa: E731
    with each_cell() as cell:
        for make in (hf.GMRES, hf.BiCGStab, hf.NormalCG, hf.FixedPoint, hf.Neumann):
            with cell(make.__name__):
                mapped = hf.implicit_diff(
                    solve, optimality=residual, method=make(preconditioner=pair)
                )
                second = [lambda s: torch.func.hessian(lambda h: c @ s(h))(h)]
                for derivative in (
                    lambda s: torch.func.vjp(s, h)[1](c)[0],
                    lambda s: torch.func.jvp(s, (h,), (v,))[1],
                    *(second if make is hf.GMRES else []),
                ):
                    torch.testing.assert_close(
                        derivative(mapped), derivative(exact), rtol=1e-7, atol=1e-9
                    )
                one = hf.implicit_diff(solve, optimality=residual, method=make(preconditioner=lone))
                with pytest.raises(ValueError, match=r"preconditioner is one function.*\(M, MT\)"):
                    torch.func.jvp(one, (h,), (v,))
                if make is not hf.NormalCG:
                    torch.testing.assert_close(
                        torch.func.vjp(one, h)[1](c)[0], torch.func.vjp(exact, h)[1](c)[0]
                    )


def test_nystrom_does_not_diverge_from_warm_starts() -> None:
    X = torch.randn(8, 40, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = X.T @ X + 0.05 * torch.eye(40)
    b, x, before = torch.ones(40, dtype=F64), None, torch.inf
    for _ in range(8):
        x, stats = hf.Nystrom().solve(LinearOperator.from_matrix(A), (b,), x)
        assert stats.residual_norm <= 1.001 * before
        before = float(stats.residual_norm)


def test_negative_curvature() -> None:
    b = torch.ones(4, dtype=F64)
    negative = -torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64))
    (x,), stats = hf.CG().solve(Counted(negative, symmetric=False).operator, (b,))
    assert int(stats.result) == hf.RESULTS.success
    torch.testing.assert_close(x, b / negative.diagonal())
    _, stats = hf.CG().solve(Counted(negative).operator, (b,))  # an inner loss, at a maximum
    assert int(stats.result) == hf.RESULTS.breakdown
    # the iterate before the direction of negative curvature
    saddle = torch.diag(torch.tensor([9.0, 4.0, 1.0, -0.5], dtype=F64))
    stop = hf.CG(negative_curvature="stop")
    for solver in (stop, hf.CG(10, rtol=0, negative_curvature="stop")):
        (x,), stats = solver.solve(Counted(saddle).operator, (b,))
        assert int(stats.result) == hf.RESULTS.max_steps
        steps = int(stats.num_steps)
        assert 0 < steps < 4
        torch.testing.assert_close(
            x, hf.CG(steps, rtol=0).solve(Counted(saddle).operator, (b,))[0][0]
        )
    both = torch.stack([saddle, saddle.abs()])
    _, stats = torch.func.vmap(lambda A: stop.solve(LinearOperator.from_matrix(A), (b,)))(both)
    assert stats.result.tolist() == [hf.RESULTS.max_steps, hf.RESULTS.success]
    # what a breakdown leaves is the same under vmap, where the curvature is no rounding noise
    generator = torch.Generator().manual_seed(0)
    A, rows = (torch.randn(20, 10, k, generator=generator, dtype=F64) for k in (10, 1))
    tasks = (A + A.mT, rows[..., 0])
    for solver in (hf.CG(), hf.CG(12, rtol=0), hf.CG(preconditioner=JACOBI)):
        run = lambda A, b, solver=solver: solver.solve(_symmetric(A), (b,))  # noqa: E731
        (x,), stats = torch.func.vmap(run)(*tasks)
        assert (stats.result == int(hf.RESULTS.breakdown)).any()
        for index in range(20):
            (alone,), one = run(tasks[0][index], tasks[1][index])
            assert (one.result, one.num_steps) == (stats.result[index], stats.num_steps[index])
            torch.testing.assert_close(x[index], alone, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="negative_curvature is 'keep'; expected 'raise' or"):
        hf.CG(negative_curvature="keep")  # type: ignore[arg-type]
    fn = hf.hypergrad(
        lambda h: torch.zeros(4, dtype=F64),
        lambda w, h: w.sum(),
        inner_loss=lambda w, h: 0.5 * w @ saddle @ w - h @ w,
    )
    with pytest.raises(hf.HypergradError, match=r"Damped, GMRES or CG.negative_curvature=.stop.."):
        fn(b)


def test_diagnose_recommends_nothing_hopeless() -> None:
    saddle = torch.linspace(-1, 2, 600, dtype=F64) + 1e-9
    for values, words in (
        (torch.cat([1e-13 + 0 * saddle[:1], saddle[200:] + 1]), r"no method is good .* condition"),
        (saddle, r"not at a minimum, with negative curvature in \d+ of 60 directions"),
    ):
        facts = hf.diagnose(
            0 * values,
            0 * values,
            inner_loss=lambda w, h, values=values: 0.5 * (values * w) @ w - h @ w,
            num_steps=60,
        )
        assert getattr(facts.method, "maxiter", 0) <= MOST_STEPS
        assert re.search(words, facts.advice)


def _inner_loss(w: Tensor, h: Tensor) -> Tensor:
    return 0.5 * ((w - h) ** 2).sum() + 0.1 * (w**4).sum()


def _contraction(w: Tensor, h: Tensor) -> Tensor:
    return w - 0.3 * (w - h + 0.4 * w**3)


def _solve(h: Tensor) -> Tensor:
    w = h.clone()
    for _ in range(40):
        w = w - ((w - h) + 0.4 * w**3) / (1 + 1.2 * w**2)
    return w


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_kept(every: bool) -> None:
    """With the collector of cycles off, as many tensors are alive after a call as before."""
    h = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=F64)
    loss, fixed_point = {"inner_loss": _inner_loss}, {"fixed_point": _contraction}
    methods = {"auto": loss, "dense": loss, "nystrom": loss, "cg": loss, "normal_cg": fixed_point}
    if every:
        names = ("gmres", "bicgstab", "fixed_point", "neumann", "one_step", "least_squares")
        methods |= dict.fromkeys((*names, "stoch_aid", "minibatches"), fixed_point)
    drawn = hf.StochasticAID(num_steps=3, sampler=lambda step: ())
    objects = {"stoch_aid": hf.StochasticAID(num_steps=3), "minibatches": drawn}

    def backward(fn: Any) -> None:
        leaf = h.clone().requires_grad_()
        fn(leaf).sum().backward()

    with each_cell() as cell:
        for method, condition in list(methods.items())[0 if every else 3 :]:
            keywords: dict[str, Any] = {**condition, "method": objects.get(method, method)}
            solution = hf.implicit_diff(_solve, **keywords)
            gradient = hf.hypergrad(_solve, lambda w, h: (w**2).sum(), **keywords)
            calls: dict[str, Callable[[], Any]] = {
                "hypergrad": lambda fn=gradient: fn(h),
                "grad": lambda fn=solution: torch.func.grad(lambda h: fn(h).sum())(h),
                "jvp": lambda fn=solution: torch.func.jvp(fn, (h,), (h,)),
                "hvp": lambda fn=gradient: torch.func.jvp(fn, (h,), (h,)),
                "vmap": lambda fn=gradient: torch.func.vmap(fn)(h.reshape(2, 3)),
                "backward": lambda fn=solution: backward(fn),
                "backward twice": lambda fn=gradient: backward(fn),
            }
            if method in ("least_squares", "minibatches"):  # which have first derivatives only
                del calls["hvp"], calls["backward twice"]
            for name, call in calls.items():
                with cell(f"{method}, {name}"):
                    call()
                    gc.collect()
                    gc.disable()
                    try:
                        before = _tensors()
                        call()
                        assert _tensors() == before
                    finally:
                        gc.enable()


def _tensors() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())
