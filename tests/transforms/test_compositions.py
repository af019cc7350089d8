"""Every linear solver as a method: under all transforms, and from warm starts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Flat, Problem, ravel
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.linear_solvers import LinearOperator
from tests._torch.test_derivatives import BATCHED_SECOND, FIRST, SECOND, Table
from tests.cells import each_cell, thinned

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

BY_NAME = {problem.name: problem for problem in PROBLEMS}
RIDGE, TREE = BY_NAME["ridge with one regulariser"], BY_NAME["biased least squares"]
MAP, SCALAR = BY_NAME["non-symmetric map"], BY_NAME["scalar loss"]

# name: the method, a problem that it can solve, its accuracy
METHODS: dict[str, tuple[Any, Problem, float]] = {
    "gmres": (hf.GMRES(rtol=1e-15), MAP, 1e-9),
    "gmres, restarted": (hf.GMRES(rtol=1e-15, restart=2), RIDGE, 1e-9),
    "gmres, jacobi": (
        hf.GMRES(rtol=1e-15, preconditioner=hf.JacobiPreconditioner(2)),
        MAP,
        1e-9,
    ),
    "bicgstab": (hf.BiCGStab(rtol=1e-15), MAP, 1e-9),
    "anderson": (hf.AndersonFixedPoint(rtol=1e-14), MAP, 1e-9),
    "fallback": (hf.Fallback(hf.CG(maxiter=1), hf.GMRES()), MAP, 1e-9),
    "cg, checked": (hf.CG(rtol=1e-15, check_symmetry=True), RIDGE, 1e-9),
    "cg, jacobi": (hf.CG(rtol=1e-15, preconditioner=hf.JacobiPreconditioner(2)), RIDGE, 1e-9),
    "cg, nystrom": (hf.CG(rtol=1e-15, preconditioner=hf.NystromPreconditioner()), RIDGE, 1e-9),
    "cg, user's": (hf.CG(rtol=1e-15, preconditioner=lambda v: v / 2), RIDGE, 1e-9),
    "damped": (hf.Damped(hf.CG(rtol=1e-15), damping=1e-12), RIDGE, 1e-9),
    "nystrom": (hf.Nystrom(rho=1e-7), RIDGE, 1e-5),
    "blockwise": (
        hf.Blockwise(hf.Fallback(hf.CG(maxiter=1), hf.Dense()), "leaves"),
        SCALAR,
        1e-9,
    ),
    "stoch_aid": (hf.StochasticAID(120, hf.optim.sgd(lr=SCALAR.step_size)), SCALAR, 1e-9),
}


@pytest.mark.parametrize("name", thinned(METHODS))
def test_every_method_under_a_third_of_the_transforms(name: str, device: torch.device) -> None:
    """Another third for each next method, of the first and of the second derivatives."""
    table = FIRST | SECOND | BATCHED_SECOND
    some = list(table)[list(METHODS).index(name) % 3 :: 3]
    check_transforms(name, {transform: table[transform] for transform in some}, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_transform_of_every_method(name: str, device: torch.device) -> None:
    check_transforms(name, FIRST | SECOND | BATCHED_SECOND, device)


def check_transforms(name: str, table: Table, device: torch.device) -> None:
    method, problem, tolerance = METHODS[name]
    with each_cell() as cell:
        for transform, (compute, expect) in table.items():
            with cell(transform):
                got = compute(Flat(problem, method, device=device)).cpu()
                torch.testing.assert_close(got, expect(problem), rtol=tolerance, atol=tolerance)


# Warm starts --------------------------------------------------------------------------------------

N = 60
Q = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0)).double())[0]
A = Q @ torch.diag(torch.linspace(0.5, 1.5, N, dtype=torch.float64)) @ Q.T
SOLUTION = torch.linspace(-1, 1, N, dtype=torch.float64)

# name: the solver, its products at the solution, and those that do not depend on the start
STARTED: dict[str, tuple[Any, int, int]] = {
    "cg": (hf.CG(rtol=1e-10), 1, 0),
    "cg, checked": (hf.CG(rtol=1e-10, check_symmetry=True), 1, 2),
    "cg, jacobi": (hf.CG(rtol=1e-10, preconditioner=hf.JacobiPreconditioner(3)), 1, 3),
    "cg, nystrom": (hf.CG(rtol=1e-10, preconditioner=hf.NystromPreconditioner(4)), 1, 4),
    "normal_cg": (hf.NormalCG(rtol=1e-10), 1, 0),
    "gmres": (hf.GMRES(rtol=1e-10), 1, 0),
    "bicgstab": (hf.BiCGStab(rtol=1e-10), 1, 0),
    # the first step shows the residual of the start, and one more product that of its result
    "fixed_point": (hf.FixedPoint(rtol=1e-10), 2, 0),
    "neumann": (hf.Neumann(rtol=1e-10), 2, 0),
    "anderson": (hf.AndersonFixedPoint(rtol=1e-10), 1, 0),
    "damped": (hf.Damped(hf.CG(rtol=1e-10), 1e-12), 1, 0),
    "fallback": (hf.Fallback(hf.CG(rtol=1e-10), hf.GMRES()), 1, 0),
    "blockwise": (hf.Blockwise(hf.CG(rtol=1e-10), "leaves"), 1, 0),
    "one_step": (hf.OneStep(), 0, 0),
}


def solve_counted(solver: Any, b: Tensor, x0: Tensor | None) -> tuple[Tensor, hf.SolveStats, int]:
    count = []

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        count.append(1)
        return (A @ v[0],)

    operator = LinearOperator(product, product)
    (x,), stats = solver.solve(operator, (b,), None if x0 is None else (x0,))
    return x, stats, len(count)


@pytest.mark.parametrize("name", STARTED)
def test_products_from_the_solution_and_from_near_it(name: str) -> None:
    solver, products, setup = STARTED[name]
    b = A @ SOLUTION
    x, stats, count = solve_counted(solver, b, SOLUTION)
    assert count == products + setup
    assert stats.result == hf.RESULTS.success
    if name == "one_step":
        return
    torch.testing.assert_close(x, SOLUTION, rtol=1e-12, atol=1e-12)
    # a start near the solution saves steps
    noise = 1e-6 * torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
    x, stats, near = solve_counted(solver, b, SOLUTION + noise)
    _, cold_stats, cold = solve_counted(solver, b, None)
    torch.testing.assert_close(x, SOLUTION, rtol=1e-8, atol=1e-8)
    assert stats.result == hf.RESULTS.success
    assert near < cold
    assert stats.num_steps < cold_stats.num_steps


@pytest.mark.parametrize("make", [hf.CG, hf.NormalCG])
@pytest.mark.parametrize("K", [0, 1, 5, 30])
def test_exactly_maxiter_products(make: Any, K: int) -> None:
    """More than the problem needs, too; a start takes one more for its residual."""
    each = 2 if make is hf.NormalCG else 1
    for x0, extra in ((None, 0), (torch.ones(N, dtype=torch.float64), 1)):
        _, stats, count = solve_counted(make(K, rtol=0), A @ SOLUTION, x0)
        assert count == each * K + extra
        assert stats.result == hf.RESULTS.success


@pytest.mark.parametrize("name", METHODS)
def test_the_adjoint_of_one_call_starts_the_next(name: str) -> None:
    """By the public functions, alone and with a start for each task."""
    method, problem, tolerance = METHODS[name]
    fn = hf.hypergrad_and_solution(
        problem.inner_solver, problem.outer_loss, **problem.keywords, method=method
    )
    hparams, args = problem.tasks()[0]
    grads, solution = fn(hparams, *args)
    again, warm = fn(hparams, *args, adjoint_init=solution.adjoint)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(ravel(again), ravel(grads))
    close(ravel(warm.adjoint), ravel(solution.adjoint))
    if name not in ("nystrom", "stoch_aid", "fallback", "blockwise"):
        assert warm.stats.num_steps <= min(1, solution.stats.num_steps)
    call: Callable[..., Any] = lambda u: fn(hparams, *args, adjoint_init=u)  # noqa: E731
    stacked = torch.utils._pytree.tree_map(lambda u: torch.stack([u, -u]), solution.adjoint)
    both, _ = vmap(call)(stacked)
    close(ravel(torch.utils._pytree.tree_map(lambda g: g[0], both)), ravel(grads))
    close(ravel(torch.utils._pytree.tree_map(lambda g: g[1], both)), ravel(grads))
