"""GMRES, BiCGStab, Nystrom, Anderson, preconditioners, and the solvers that wrap solvers."""

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import hyperfunc as hf
from hyperfunc import linear_solvers
from hyperfunc._engine import trees
from hyperfunc._engine.random_vectors import random_signs, random_uniform
from hyperfunc._torch import batching
from hyperfunc.linear_solvers import LinearOperator
from tests.cells import slow_but
from tests.problems import PROBLEMS, Problem, ravel, stack, unraveller

N = 12


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def orthogonal(n: int = N, seed: int = 1) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def symmetric(eigenvalues: Tensor, seed: int = 1) -> Tensor:
    Q = orthogonal(len(eigenvalues), seed)
    return Q @ torch.diag(eigenvalues) @ Q.T


def linspace(a: float, b: float, n: int = N) -> Tensor:
    return torch.linspace(a, b, n, dtype=torch.float64)


def logspace(a: float, b: float, n: int = N) -> Tensor:
    return torch.logspace(a, b, n, dtype=torch.float64)


SPD = symmetric(linspace(1, 20))
INDEFINITE = symmetric(torch.cat([linspace(-3, -1, 4), linspace(1, 4, N - 4)]))
NONSYMMETRIC = randn(N, N, seed=2) + 6 * torch.eye(N, dtype=torch.float64)
SINGULAR = symmetric(torch.cat([torch.zeros(3).double(), linspace(1, 4, N - 3)]))
ILL = symmetric(logspace(-8, 0))
ILL_NONSYMMETRIC = orthogonal() @ torch.diag(logspace(-8, 0)) @ orthogonal(seed=3)
ROTATION = torch.roll(torch.eye(N, dtype=torch.float64), 1, 0)
SKEW = randn(N, N, seed=4) - randn(N, N, seed=4).T

# name: the matrix, what may be asked of it, and the accuracy that its condition allows
SYSTEMS: dict[str, tuple[Tensor, str, float]] = {
    "spd": (SPD, "spd", 1e-10),
    "indefinite": (INDEFINITE, "symmetric", 1e-10),
    "non-symmetric": (NONSYMMETRIC, "any", 1e-10),
    "singular but consistent": (SINGULAR, "spd", 1e-10),
    "ill-conditioned": (ILL, "ill spd", 1e-6),
    "ill-conditioned, non-symmetric": (ILL_NONSYMMETRIC, "ill", 1e-6),
}

# name: the solver, and the kinds of systems that it is made for
SOLVERS: dict[str, tuple[Any, set[str]]] = {
    "gmres": (hf.GMRES(restart=N), {"spd", "symmetric", "any", "ill spd", "ill"}),
    "gmres, restarted": (hf.GMRES(restart=6), {"spd", "symmetric", "any"}),
    "gmres, jacobi": (
        hf.GMRES(preconditioner=hf.JacobiPreconditioner()),
        {"spd", "symmetric", "any", "ill spd", "ill"},
    ),
    "bicgstab": (hf.BiCGStab(), {"spd", "symmetric", "any"}),
    "bicgstab, jacobi": (hf.BiCGStab(preconditioner=hf.JacobiPreconditioner()), {"spd", "any"}),
    "cg, checked": (hf.CG(check_symmetry=True), {"spd", "ill spd"}),
    "cg, jacobi": (hf.CG(preconditioner=hf.JacobiPreconditioner()), {"spd", "ill spd"}),
    "cg, nystrom": (hf.CG(preconditioner=hf.NystromPreconditioner(4)), {"spd", "ill spd"}),
    "cg, user's": (hf.CG(preconditioner=lambda v: 2 * v), {"spd", "ill spd"}),
    "pipelined cg": (hf.PipelinedCG(), {"spd"}),
    "pipelined cg, jacobi": (
        hf.PipelinedCG(preconditioner=hf.JacobiPreconditioner(), replace=5),
        {"spd"},
    ),
    "anderson": (hf.AndersonFixedPoint(step_size=0.1), {"spd", "any"}),
    "anderson, long": (
        hf.AndersonFixedPoint(step_size=0.3, memory=N),
        {"spd", "symmetric", "any"},
    ),
    "fallback": (
        hf.Fallback(hf.CG(), hf.GMRES(restart=N)),
        {"spd", "symmetric", "any", "ill spd", "ill"},
    ),
    "auto": (hf.Auto(), {"spd", "symmetric", "any", "ill spd", "ill"}),
    "blockwise": (hf.Blockwise(hf.GMRES(restart=N), blocks="leaves"), {"spd", "symmetric", "any"}),
}

APPROXIMATE: dict[str, Any] = {
    "nystrom": hf.Nystrom(rank=4),
    "nystrom, full": hf.Nystrom(rank=N, rho=1.0),
    "damped": hf.Damped(hf.CG(), damping=0.3),
}

ALL = {name: solver for name, (solver, _) in SOLVERS.items()} | APPROXIMATE


class Counted:
    """An operator that counts its products."""

    def __init__(self, matrix: Tensor, **settings: Any) -> None:
        self.count = 0
        settings.setdefault("spec", LinearOperator.from_matrix(matrix).spec)
        self.operator = LinearOperator(
            lambda v: self._product(matrix, v), lambda v: self._product(matrix.mT, v), **settings
        )

    def _product(self, matrix: Tensor, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.count += 1
        return (matrix @ v[0],)


def run(
    solver: Any, A: Tensor, b: Tensor, x0: Tensor | None = None, **settings: Any
) -> tuple[Tensor, hf.SolveStats]:
    operator = dataclasses.replace(LinearOperator.from_matrix(A), **settings)
    (x,), stats = solver.solve(operator, (b,), None if x0 is None else (x0,))
    return x, stats


def code(stats: hf.SolveStats) -> hf.RESULTS:
    return hf.RESULTS(int(stats.result))


# Solutions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "system"),
    [
        (name, system)
        for name, (_, kinds) in SOLVERS.items()
        for system, (_, kind, _) in SYSTEMS.items()
        if kind in kinds
    ],
)
def test_against_a_dense_solve(name: str, system: str) -> None:
    solver = ALL[name]
    A, _, accuracy = SYSTEMS[system]
    exact = torch.linalg.pinv(A) @ (A @ randn(N))
    b = A @ exact
    for x0 in (None, randn(N, seed=5)):
        x, stats = run(solver, A, b, x0)
        assert code(stats) is hf.RESULTS.success
        if "singular" in system:  # any part in the null space will do
            x = torch.linalg.pinv(A) @ (A @ x)
        assert (x - exact).norm() <= accuracy * exact.norm()
        assert stats.residual_norm <= 10 * accuracy * b.norm()
        if not system.startswith("ill"):
            torch.testing.assert_close(
                stats.residual_norm, (b - A @ x).norm(), rtol=1, atol=1e-11 * float(b.norm())
            )


# a residual that grows by many orders on its way to zero
JORDAN = torch.eye(20, dtype=torch.float64) + torch.diag(3 * torch.ones(19, dtype=torch.float64), 1)


@pytest.mark.parametrize("name", slow_but("cg, jacobi", "gmres", "bicgstab", of=SOLVERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batched", [False, True])
def test_a_success_is_a_residual_within_the_tolerance(
    name: str, dtype: torch.dtype, batched: bool
) -> None:
    """The residual itself, whatever the recurrence of the method says."""
    matrices = torch.stack([JORDAN] * 6 + [orthogonal(20) @ torch.diag(logspace(-5, 0, 20))] * 2)
    solver, matrices = ALL[name], matrices.to(dtype)
    if name.startswith("gmres"):
        solver = dataclasses.replace(solver, restart=20)
    b = torch.einsum("tij,tj->ti", matrices, randn(8, 20).to(dtype))
    if batched:
        x, stats = vmap(lambda A, b: run(solver, A, b))(matrices, b)
    else:
        x, stats = stack([run(solver, A, b) for A, b in zip(matrices, b, strict=True)])
    residual = torch.einsum("tij,tj->ti", matrices.double(), x.double()) - b.double()
    eps = torch.finfo(dtype).eps
    rounding = eps * (torch.linalg.matrix_norm(matrices, 2) * x.norm(dim=1) + b.norm(dim=1))
    bound = torch.maximum(eps**0.75 * b.norm(dim=1), 4 * rounding)
    success = stats.result == hf.RESULTS.success
    assert (residual.norm(dim=1) <= 1.01 * bound)[success].all()
    if name.startswith("gmres") and dtype is torch.float64:
        assert success.all()


@pytest.mark.parametrize("name", ALL)
def test_zero_right_hand_side_gives_zero(name: str) -> None:
    x, stats = run(ALL[name], SPD, torch.zeros(N, dtype=torch.float64))
    assert x.eq(0).all()
    assert stats.residual_norm == 0
    assert code(stats) is hf.RESULTS.success


@pytest.mark.parametrize("name", SOLVERS)
def test_identity_gives_the_right_hand_side(name: str) -> None:
    b = randn(N)
    x, stats = run(ALL[name], torch.eye(N, dtype=torch.float64), b)
    torch.testing.assert_close(x, b)
    assert code(stats) is hf.RESULTS.success


@pytest.mark.parametrize("name", ALL)
def test_two_calls_give_the_same(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(ALL[name], SPD, randn(N))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(ALL[name], SPD, randn(N))[0], first[0])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e3, 1e6, torch.inf, torch.nan])
def test_bad_starts(name: str, dtype: torch.dtype, size: float) -> None:
    """None is so bad that its size stays in the rounding errors of the residual."""
    A, b = SPD.to(dtype), 1e-3 * randn(N).to(dtype)
    x, stats = run(ALL[name], A, b, size * torch.ones(N, dtype=dtype))
    if "anderson" in name and not size < torch.inf:
        assert code(stats) is hf.RESULTS.nonfinite
        return
    assert code(stats) is hf.RESULTS.success
    rtol = 1e-9 if dtype is torch.float64 else 1e-4
    exact = torch.linalg.solve(A, b)
    assert (x - exact).norm() <= rtol * exact.norm()


# Iterates of scipy --------------------------------------------------------------------------------

DIAGONAL = SPD.diagonal()
INVERSE = linspace(0.5, 2)


def _scipy_gmres(A: Any, b: Any, K: int, restart: int, M: Any) -> Any:
    # its preconditioner acts from the left, unlike the one here
    assert M is None
    return scipy.sparse.linalg.gmres(A, b, rtol=0, atol=0, restart=restart, maxiter=K // restart)[0]


SCIPY: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool, bool]] = {
    # scipy's iterate K, ours, whether for the symmetric system, whether preconditioned
    "cg": (
        lambda A, b, K, M: scipy.sparse.linalg.cg(A, b, rtol=0, atol=0, maxiter=K, M=M)[0],
        lambda K, M: hf.CG(K, rtol=0, preconditioner=M),
        True,
        False,
    ),
    "bicgstab": (
        lambda A, b, K, M: scipy.sparse.linalg.bicgstab(A, b, rtol=0, atol=0, maxiter=K, M=M)[0],
        lambda K, M: hf.BiCGStab(K, rtol=0, preconditioner=M),
        False,
        False,
    ),
    "gmres": (
        lambda A, b, K, M: _scipy_gmres(A, b, K, K, M),
        lambda K, M: hf.GMRES(K, rtol=0, restart=K),
        False,
        False,
    ),
    "gmres, restarted": (
        lambda A, b, K, M: _scipy_gmres(A, b, 2 * K, K, M),
        lambda K, M: hf.GMRES(2 * K, rtol=0, restart=K),
        False,
        False,
    ),
}
SCIPY["cg, preconditioned"] = (*SCIPY["cg"][:3], True)
SCIPY["bicgstab, preconditioned"] = (*SCIPY["bicgstab"][:3], True)


@pytest.mark.parametrize("name", SCIPY)
def test_iterates_are_those_of_scipy(name: str) -> None:
    theirs, ours, is_symmetric, preconditioned = SCIPY[name]
    A, b = SPD if is_symmetric else NONSYMMETRIC, randn(N)
    M = np.diag(INVERSE.numpy()) if preconditioned else None
    for K in range(1, 7):
        expected = torch.from_numpy(theirs(A.numpy(), b.numpy(), K, M))
        solver = ours(K, (lambda v: INVERSE * v) if preconditioned else None)
        x, stats = run(solver, A, b)
        assert code(stats) is hf.RESULTS.success
        assert stats.num_steps == K * (2 if "restarted" in name else 1)
        torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-10)


def test_preconditioned_gmres_minimises_over_the_right_space() -> None:
    A, b, K = NONSYMMETRIC, randn(N), 4
    x, _ = run(hf.GMRES(K, rtol=0, preconditioner=lambda v: INVERSE * v), A, b)
    AM = A @ torch.diag(INVERSE)
    powers = [b]
    for _ in range(K - 1):
        powers.append(AM @ powers[-1])
    space = INVERSE[:, None] * torch.stack(powers, dim=1)
    expected = space @ torch.linalg.lstsq(A @ space, b[:, None])[0][:, 0]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_anderson_is_a_plain_step_from_the_iterate_of_gmres(K: int) -> None:
    b, step_size = randn(N), 0.1
    x, _ = run(hf.GMRES(K, restart=K, rtol=0), NONSYMMETRIC, b)
    solver = hf.AndersonFixedPoint(K + 1, rtol=0, step_size=step_size, memory=K)
    y, stats = run(solver, NONSYMMETRIC, b)
    torch.testing.assert_close(y, x + step_size * (b - NONSYMMETRIC @ x), rtol=1e-9, atol=1e-10)
    assert stats.num_steps == K + 1


def test_anderson_keeps_as_many_steps_as_it_is_told() -> None:
    b, step_size, memory = randn(N), 0.1, 2
    xs, fs = [torch.zeros(N, dtype=torch.float64)], [step_size * b]
    for K in range(1, 7):
        new = xs[-1] + fs[-1]
        if K > 1:
            window = slice(max(K - 1 - memory, 0), None)
            dx, df = (torch.stack(v).diff(dim=0)[window].T for v in (xs, fs))
            new = new - (dx + df) @ torch.linalg.lstsq(df, fs[-1][:, None])[0][:, 0]
        xs.append(new)
        fs.append(step_size * (b - NONSYMMETRIC @ new))
        solver = hf.AndersonFixedPoint(K, rtol=0, step_size=step_size, memory=memory)
        torch.testing.assert_close(run(solver, NONSYMMETRIC, b)[0], new, rtol=1e-9, atol=1e-10)


# Products and synchronisations --------------------------------------------------------------------

K = 7
PRODUCTS: dict[str, tuple[Any, int]] = {
    "gmres": (hf.GMRES(K, rtol=0), K),
    "gmres, two restarts": (hf.GMRES(K, restart=3, rtol=0), K + 2),
    "gmres, whole cycles": (hf.GMRES(6, restart=3, rtol=0), 6 + 1),
    "bicgstab": (hf.BiCGStab(K, rtol=0), 2 * K),
    "cg, user's": (hf.CG(K, rtol=0, preconditioner=lambda v: 2 * v), K),
    "cg, checked": (hf.CG(K, rtol=0, check_symmetry=True), K + 2),
    "cg, jacobi": (hf.CG(K, rtol=0, preconditioner=hf.JacobiPreconditioner(3)), K + 3),
    "cg, nystrom": (hf.CG(K, rtol=0, preconditioner=hf.NystromPreconditioner(4)), K + 4),
    "anderson": (hf.AndersonFixedPoint(K, rtol=0, step_size=0.1), K - 1),
    "nystrom": (hf.Nystrom(rank=5), 5 + 1),
    "damped": (hf.Damped(hf.CG(K, rtol=0), 1.0), K),
    "fallback": (hf.Fallback(hf.CG(K, rtol=0), hf.GMRES()), K),
    "blockwise": (hf.Blockwise(hf.CG(K, rtol=0), "leaves"), K),
    "blockwise, checked": (hf.Blockwise(hf.CG(K, rtol=0), "leaves", check_blocks=True), K + 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("batched", [False, True])
def test_products_and_no_synchronisation(
    name: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver, expected = PRODUCTS[name]
    syncs = []
    any_true = batching.any_true
    monkeypatch.setattr(batching, "any_true", lambda flag: syncs.append(1) or any_true(flag))
    counted = Counted(SPD)
    solve = lambda b: solver.solve(counted.operator, (b,))  # noqa: E731
    (vmap(solve) if batched else solve)(randn(3, N) if batched else randn(N))
    assert counted.count == expected
    assert len(syncs) == (1 if name == "fallback" else 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_synchronisation_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    any_true = batching.any_true
    monkeypatch.setattr(batching, "any_true", lambda flag: syncs.append(1) or any_true(flag))
    counted = Counted(SPD)
    _, stats = ALL[name].solve(counted.operator, (randn(N),))
    # and at the end of each cycle, where the residual is checked, and the result by Fallback
    cycles = 1 if name != "gmres, restarted" else 1 + (int(stats.num_steps) - 1) // 6
    more = 2 if "anderson" in name else 3 * cycles + 1
    assert len(syncs) <= stats.num_steps + more
    # one product at the end is for the check
    if name in ("bicgstab", "gmres", "cg, user's"):
        assert counted.count == (2 if name == "bicgstab" else 1) * stats.num_steps + 1


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "anderson, long", "cg, user's"])
def test_warm_start_at_the_solution_takes_one_product(name: str) -> None:
    x = randn(N)
    counted = Counted(SPD)
    solver = dataclasses.replace(ALL[name], rtol=1e-10)
    (y,), stats = solver.solve(counted.operator, (SPD @ x,), (x,))
    assert counted.count == 1
    assert stats.num_steps == 0
    assert torch.equal(x, y)


# Tasks --------------------------------------------------------------------------------------------

TASKS = torch.stack([symmetric(logspace(0, h), seed=7) for h in (0, 1, 0.3, 1.6)])
TASKS_B = randn(4, N, seed=8).index_fill(0, torch.tensor([2]), 0.0)


@pytest.mark.parametrize("name", ALL)
def test_tasks_are_solved_as_alone(name: str) -> None:
    def solve(A: Tensor, b: Tensor) -> tuple[Tensor, hf.SolveStats]:
        return run(ALL[name], A, b)

    alone = [solve(A, b) for A, b in zip(TASKS, TASKS_B, strict=True)]
    expected = torch.stack([x for x, _ in alone])
    num_steps = torch.stack([stats.num_steps for _, stats in alone])
    result = torch.stack([stats.result for _, stats in alone])
    if name in SOLVERS:
        assert num_steps[2] == 0
        assert 0 < num_steps[0] < num_steps[3]
    nested_A, nested_b = TASKS.reshape(2, 2, N, N), TASKS_B.reshape(2, 2, N)
    for fn, arguments in (
        (vmap(solve), (TASKS, TASKS_B)),
        (vmap(vmap(solve)), (nested_A, nested_b)),
        (vmap(solve, chunk_size=3), (TASKS, TASKS_B)),
    ):
        x, stats = fn(*arguments)
        torch.testing.assert_close(x.reshape(4, N), expected, rtol=1e-8, atol=1e-10)
        assert stats.result.reshape(4).tolist() == result.tolist()
        # rounding may move the step at which a tolerance is met
        assert (stats.num_steps.reshape(4) - num_steps).abs().max() <= 1


@pytest.mark.parametrize(
    "solver",
    [
        hf.GMRES(rtol=1e-2),
        hf.GMRES(rtol=1e-2, restart=2),
        hf.BiCGStab(rtol=1e-2),
        hf.CG(rtol=1e-2, preconditioner=hf.JacobiPreconditioner(2)),
        hf.AndersonFixedPoint(rtol=1e-2, step_size=0.05),
        hf.Fallback(hf.CG(2, rtol=1e-2), hf.BiCGStab(rtol=1e-2)),
        hf.Blockwise(hf.CG(rtol=1e-2), "leaves"),
    ],
    ids=lambda solver: repr(solver)[:40],
)
def test_a_task_that_has_converged_is_frozen(solver: Any) -> None:
    x, stats = vmap(lambda A, b: run(solver, A, b))(TASKS, TASKS_B)
    for i in range(4):
        alone, own = run(solver, TASKS[i], TASKS_B[i])
        torch.testing.assert_close(x[i], alone, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(stats.residual_norm[i], own.residual_norm, rtol=1e-6, atol=1e-12)
        assert stats.num_steps[i] == own.num_steps
    assert len(stats.num_steps.unique()) >= 3


@pytest.mark.parametrize("name", ALL)
def test_levels_that_batch_the_operator_and_the_right_hand_side_apart(name: str) -> None:
    fn = vmap(vmap(lambda A, b: run(ALL[name], A, b)[0], in_dims=(None, 0)), in_dims=(0, None))
    x = fn(TASKS[:2], TASKS_B)
    for i, j in ((0, 1), (1, 0), (1, 3)):
        torch.testing.assert_close(
            x[i, j], run(ALL[name], TASKS[i], TASKS_B[j])[0], rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("solver", [hf.GMRES(restart=4), hf.BiCGStab(), hf.GMRES(restart=N)])
def test_a_failing_task_does_not_touch_the_others(solver: Any) -> None:
    nan = SPD.index_fill(0, torch.tensor([3]), torch.nan)
    matrices = torch.stack([SPD, nan, torch.zeros_like(SPD), INDEFINITE, ROTATION])
    b = randn(5, N).index_fill(0, torch.tensor([4]), 0.0)
    b[4, 0] = 1.0
    x, stats = vmap(lambda A, b: run(solver, A, b))(matrices, b)
    alone = [run(solver, A, b) for A, b in zip(matrices, b, strict=True)]
    assert stats.result.tolist() == [int(s.result) for _, s in alone]
    assert stats.result.tolist()[:3] == [0, 3, 2]
    for i in (0, 3):
        torch.testing.assert_close(x[i], alone[i][0], rtol=1e-8, atol=1e-10)
        assert code(alone[i][1]) is hf.RESULTS.success


# Layouts and dtypes -------------------------------------------------------------------------------

LAYOUT_SOLVERS = {
    "gmres": hf.GMRES(restart=3),
    "bicgstab": hf.BiCGStab(),
    "cg, jacobi": hf.CG(preconditioner=hf.JacobiPreconditioner()),
    "cg, nystrom": hf.CG(preconditioner=hf.NystromPreconditioner(3)),
    "cg, user's": hf.CG(preconditioner=lambda tree: [-tree[0].neg(), *tree[1:]]),
    "anderson": hf.AndersonFixedPoint(step_size=0.5),
    "nystrom": hf.Nystrom(rho=1e-2),
    "damped": hf.Damped(hf.CG(check_symmetry=True), 1e-3),
    "fallback": hf.Fallback(hf.CG(maxiter=1), hf.GMRES()),
    "blockwise": hf.Blockwise(hf.CG(), "leaves"),
    "blockwise, children": hf.Blockwise(hf.CG(), "children"),
}


@pytest.mark.parametrize("name", LAYOUT_SOLVERS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float64,) * 3,
        (torch.float32,) * 3,
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_trees_of_any_dtype(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """The operator is ``(1 + i / 2) I`` on leaf i: a 0-d one, a transposed one, a vector."""
    shapes = [(), (3, 2), (1,)]
    b = tuple(randn(*s, seed=i).to(d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True)))
    b = (b[0], b[1].t(), b[2])
    operator = LinearOperator(
        lambda v: tuple(i * leaf / 2 for i, leaf in enumerate(v)),
        lambda v: tuple(i * leaf / 2 for i, leaf in enumerate(v)),
        shift=1.0,
        symmetric=True,
        spec=trees.flatten([1, 2, 3])[1],
    )
    before = [leaf.clone() for leaf in b]
    x, stats = LAYOUT_SOLVERS[name].solve(operator, b)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    tolerance = max(4 * eps**0.75, 2e-2 if name in ("nystrom", "damped") else 0)
    for i, (leaf, rhs, old) in enumerate(zip(x, b, before, strict=True)):
        assert leaf.dtype == rhs.dtype
        assert leaf.shape == rhs.shape
        assert torch.equal(rhs, old)
        expected = rhs.double() / (1 + i / 2)
        torch.testing.assert_close(leaf.double(), expected, rtol=tolerance, atol=tolerance)
    # the solution of nystrom is that of a system with rho added
    solved = name != "nystrom" or stats.residual_norm <= eps**0.75 * trees.norm(b)
    assert code(stats) is hf.RESULTS["success" if solved else "max_steps"]
    assert stats.residual_norm.dtype == (
        torch.float64 if torch.float64 in dtypes else torch.float32
    )


# Derivatives --------------------------------------------------------------------------------------

DERIVATIVES = [
    problem
    for problem in PROBLEMS
    if problem.name
    in ("ridge with one regulariser", "biased least squares", "non-symmetric map", "scalar loss")
]


def _methods(problem: Problem) -> dict[str, Any]:
    table = {
        "gmres": hf.GMRES(rtol=1e-15),
        "bicgstab": hf.BiCGStab(rtol=1e-15),
        "anderson": hf.AndersonFixedPoint(200, rtol=1e-14, step_size=problem.step_size),
        "fallback": hf.Fallback(hf.CG(maxiter=1), hf.Dense()),
        "gmres, jacobi": hf.GMRES(rtol=1e-15, preconditioner=hf.JacobiPreconditioner(2)),
    }
    if problem.symmetric:
        table["cg, jacobi"] = hf.CG(rtol=1e-15, preconditioner=hf.JacobiPreconditioner(2))
        table["cg, nystrom"] = hf.CG(rtol=1e-15, preconditioner=hf.NystromPreconditioner())
        table["cg, checked"] = hf.CG(rtol=1e-15, check_symmetry=True)
        table["nystrom"] = hf.Nystrom(rho=1e-7)
        table["damped"] = hf.Damped(hf.CG(rtol=1e-15), damping=1e-12)
    return table


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        pytest.param(p, m, id=f"{p.name}-{m}", marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, p in enumerate(DERIVATIVES)
        for j, m in enumerate(_methods(p))
    ],
)
def test_first_and_second_derivatives(problem: Problem, name: str) -> None:
    solve = hf.implicit_diff(
        problem.inner_solver, **problem.keywords, method=_methods(problem)[name]
    )
    hparams, args = problem.tasks()[0]
    unravel = unraveller(hparams)

    def value(flat: Tensor) -> Tensor:
        h = unravel(flat)
        return problem.outer_loss(solve(h, *args), h, *args)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "nystrom" else {"rtol": 1e-9, "atol": 1e-9}
    flat = ravel(hparams)
    torch.testing.assert_close(grad(value)(flat), problem.reference("gradient"), **tolerance)
    torch.testing.assert_close(hessian(value)(flat), problem.reference("hessian"), **tolerance)
    torch.testing.assert_close(
        jacrev(jacrev(value))(flat), problem.reference("hessian"), **tolerance
    )


def test_damping_is_part_of_the_function_that_is_differentiated() -> None:
    """The derivatives of w* and of u are solves with ``A + damping I``."""
    damping, H, target = 0.5, SPD[:4, :4], randn(4)
    fn = hf.hypergrad(
        lambda h: torch.linalg.solve(H + torch.diag(h), target),
        lambda w, h: w.sum(),
        inner_loss=lambda w, h: 0.5 * w @ (H + torch.diag(h)) @ w - w @ target,
        method=hf.Damped(hf.CG(rtol=1e-15), damping),
    )
    h = linspace(1, 2, 4)
    A = H + torch.diag(h)
    inverse = torch.linalg.inv(A + damping * torch.eye(4, dtype=A.dtype))
    w, u = torch.linalg.solve(A, target), inverse.sum(1)
    torch.testing.assert_close(fn(h), -w * u)
    expected = inverse * (w[None] * u[:, None] + w[:, None] * u[None])
    torch.testing.assert_close(jacrev(fn)(h), expected)


def test_short_names() -> None:
    problem = DERIVATIVES[1]
    hparams, args = problem.tasks()[0]
    for name in ("gmres", "bicgstab"):
        fn = hf.hypergrad(problem.inner_solver, problem.outer_loss, **problem.keywords, method=name)
        torch.testing.assert_close(ravel(fn(hparams, *args)), problem.reference("gradient"))
    fn = hf.hypergrad(
        problem.inner_solver, problem.outer_loss, **problem.keywords, method="nystrom"
    )
    torch.testing.assert_close(
        ravel(fn(hparams, *args)), problem.reference("gradient"), rtol=0.1, atol=0.1
    )


# Result codes -------------------------------------------------------------------------------------

E1 = torch.eye(N, dtype=torch.float64)[0]
INCONSISTENT = torch.diag(torch.cat([torch.zeros(1).double(), torch.ones(N - 1).double()]))
# the residual of the first step is orthogonal to E1, and is not zero
RHO_BREAKS = torch.eye(N, dtype=torch.float64)
RHO_BREAKS[:3, :3] = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
# well-conditioned with the right preconditioner, so that each cycle reduces the residual, down to
# where the rounding errors of an ill-conditioned operator rule
ROUGH, ROUGH_INVERSE = symmetric(logspace(-6, 0)), symmetric(logspace(6, 0))
ROUNDING = (torch.eye(N, dtype=torch.float64) + 0.1 * orthogonal(seed=6)) @ ROUGH
NAN = SPD.index_fill(0, torch.tensor([0]), torch.nan)

CODES: dict[str, tuple[Any, Tensor, Tensor, str]] = {
    "gmres, too few steps": (hf.GMRES(3), SPD, randn(N), "max_steps"),
    "gmres, exactly K steps": (hf.GMRES(3, rtol=0), SPD, randn(N), "success"),
    "gmres, zero operator": (hf.GMRES(), 0 * SPD, randn(N), "breakdown"),
    "gmres, no solution": (hf.GMRES(), INCONSISTENT, randn(N), "breakdown"),
    "gmres, shift": (hf.GMRES(restart=N - 1), ROTATION, E1, "stagnation"),
    "gmres, shift, fixed": (hf.GMRES(40, restart=N - 1, rtol=0), ROTATION, E1, "success"),
    "gmres, shift, in full": (hf.GMRES(restart=N), ROTATION, E1, "success"),
    "gmres, nan": (hf.GMRES(), NAN, randn(N), "nonfinite"),
    "gmres, down to rounding": (
        hf.GMRES(restart=3, rtol=1e-15, preconditioner=lambda v: ROUGH_INVERSE @ v),
        ROUNDING,
        randn(N),
        "success",
    ),
    "bicgstab, too few steps": (hf.BiCGStab(2), SPD, randn(N), "max_steps"),
    "bicgstab, alpha": (hf.BiCGStab(), ROTATION, E1, "breakdown"),
    "bicgstab, rho": (hf.BiCGStab(), RHO_BREAKS, E1, "breakdown"),
    "bicgstab, omega": (hf.BiCGStab(), SKEW, E1, "breakdown"),
    "bicgstab, zero operator": (hf.BiCGStab(), 0 * SPD, randn(N), "breakdown"),
    "bicgstab, nan": (hf.BiCGStab(), NAN, randn(N), "nonfinite"),
    "cg, preconditioner not positive": (
        hf.CG(preconditioner=lambda v: -v),
        SPD,
        randn(N),
        "breakdown",
    ),
    "cg, preconditioner not symmetric": (
        hf.CG(preconditioner=lambda v: v + v.roll(1, 0)),
        SPD,
        randn(N),
        "breakdown",
    ),
    "cg, asymmetry": (hf.CG(check_symmetry=True), NONSYMMETRIC, randn(N), "breakdown"),
    "cg, slight asymmetry": (
        hf.CG(check_symmetry=True),
        SPD + 1e-8 * SKEW,
        randn(N),
        "breakdown",
    ),
    "nystrom, asymmetry": (hf.Nystrom(6), NONSYMMETRIC, randn(N), "breakdown"),
    "nystrom, nan": (hf.Nystrom(6), NAN, randn(N), "nonfinite"),
    "nystrom preconditioner, indefinite": (
        hf.GMRES(preconditioner=hf.NystromPreconditioner(N)),
        INDEFINITE,
        randn(N),
        "success",
    ),
    "nystrom preconditioner, nan": (
        hf.CG(preconditioner=hf.NystromPreconditioner(4)),
        NAN,
        randn(N),
        "nonfinite",
    ),
    "anderson, too few steps": (hf.AndersonFixedPoint(5), SPD / 20, randn(N), "max_steps"),
    "anderson, no contraction": (
        hf.AndersonFixedPoint(6, memory=1, step_size=10.0),
        SPD,
        randn(N),
        "divergence",
    ),
    "anderson, zero operator": (hf.AndersonFixedPoint(9), 0 * SPD, randn(N), "max_steps"),
    "anderson, nan": (hf.AndersonFixedPoint(), NAN, randn(N), "nonfinite"),
    "damped, still indefinite": (hf.Damped(hf.CG(), 1.0), INDEFINITE, randn(N), "breakdown"),
    "damped, enough": (hf.Damped(hf.CG(), 4.0), INDEFINITE, randn(N), "success"),
    "fallback, both fail": (hf.Fallback(hf.CG(), hf.CG()), INDEFINITE, randn(N), "breakdown"),
    "blockwise, not blocks": (
        hf.Blockwise(hf.FixedPoint(3, rtol=0, step_size=0.01), "batch", check_blocks=True),
        SPD,
        randn(N),
        "breakdown",
    ),
    "blockwise, blocks": (
        hf.Blockwise(hf.CG(), "batch", check_blocks=True),
        torch.diag(INVERSE),
        randn(N),
        "success",
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_result_codes(name: str) -> None:
    solver, A, b, expected = CODES[name]
    assert code(run(solver, A, b)[1]).name == expected
    _, stats = vmap(lambda A, b: run(solver, A, b))(torch.stack([A, A]), torch.stack([b, b]))
    assert [hf.RESULTS(int(result)).name for result in stats.result] == [expected] * 2


@pytest.mark.parametrize(
    ("solver", "A", "num_steps"),
    [
        (hf.BiCGStab(), ROTATION, 0),
        (hf.BiCGStab(), RHO_BREAKS, 1),
        (hf.BiCGStab(), SKEW, 0),
        (hf.GMRES(restart=N - 1), ROTATION, N - 1),
        (hf.GMRES(restart=3), ROTATION, 3),
    ],
)
def test_what_cannot_go_on_stops(solver: Any, A: Tensor, num_steps: int) -> None:
    x, stats = run(solver, A, E1)
    assert stats.num_steps == num_steps
    assert torch.isfinite(x).all()
    torch.testing.assert_close(stats.residual_norm, (E1 - A @ x).norm())


def test_only_rounding_excuses_gmres_from_going_on() -> None:
    exact = torch.linalg.solve(ROTATION, E1)
    _, stats = run(hf.GMRES(restart=3), ROTATION, E1, exact + 1e-6 * E1)
    assert code(stats) is hf.RESULTS.stagnation

    generator = _generator()

    def noisy(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        noise = torch.randn(N, N, generator=generator, dtype=torch.float64)
        return ((SPD + 0.3 * noise) @ v[0],)

    _, stats = hf.GMRES(200, restart=6).solve(LinearOperator(noisy, noisy), (randn(N),))
    assert code(stats) is hf.RESULTS.stagnation


def test_gmres_reports_no_residual_below_rounding() -> None:
    b = randn(N)
    x, stats = run(hf.GMRES(restart=N), ILL, b)
    assert (b - ILL @ x).norm() / 100 <= stats.residual_norm <= 1e-6 * b.norm()
    # nor one that is far above it, whatever the scale of the preconditioner
    for scale in (1e-9, 1e9):
        x, stats = run(hf.GMRES(restart=N, preconditioner=lambda v, s=scale: s * v), SPD, b)
        assert 1e-3 <= stats.residual_norm / (b - SPD @ x).norm() <= 1e3


# the first half of the first step is possible, the second is not: A s is orthogonal to s
OMEGA_BREAKS = torch.eye(N, dtype=torch.float64)
OMEGA_BREAKS[:3, :3] = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("solver", "A", "b"),
    [
        (hf.BiCGStab(), RHO_BREAKS, E1),
        (hf.BiCGStab(), OMEGA_BREAKS, E1),
        (hf.GMRES(restart=N), INCONSISTENT, randn(N)),
    ],
    ids=["rho", "omega", "gmres"],
)
def test_zeros_that_are_rounding_errors_are_no_numbers(solver: Any, A: Tensor, b: Tensor) -> None:
    """In other coordinates what is zero is noise, and a quotient by it looks like a number."""
    expected, _ = run(solver, A, b)
    for Q in (torch.eye(N, dtype=torch.float64), orthogonal(seed=9), orthogonal(seed=10)):
        x, stats = run(solver, Q @ A @ Q.T, Q @ b)
        assert code(stats) in (hf.RESULTS.breakdown, hf.RESULTS.stagnation)
        # where A is singular, what it maps to zero depends on the rounding, and stays small
        torch.testing.assert_close(A @ (Q.T @ x), A @ expected)
        assert x.norm() < 2 * b.norm()


@pytest.mark.parametrize(
    ("method", "A", "message"),
    [
        (
            hf.GMRES(restart=3),
            ROTATION,
            r"residual stopped shrinking .*raise restart or rtol, add a",
        ),
        (hf.CG(check_symmetry=True), NONSYMMETRIC, r"broke down.*CG needs a symmetric positive"),
        (hf.BiCGStab(), ROTATION, r"broke down.*BiCGStab may break down all the same"),
    ],
    ids=["stagnation", "asymmetry", "breakdown"],
)
def test_messages_reach_the_user(method: Any, A: Tensor, message: str) -> None:
    keywords = {"optimality": lambda w, h: A @ w - h * E1, "method": method}
    fn = hf.hypergrad(lambda h: torch.linalg.solve(A, h * E1), lambda w, h: w[0], **keywords)
    with pytest.raises(hf.HypergradError, match=message):
        fn(torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(hf.HypergradError, match=r"for 2 of 2 tasks \(index 0, 1\)"):
        vmap(fn)(torch.ones(2, dtype=torch.float64))


# Preconditioners ----------------------------------------------------------------------------------

SCALED = torch.diag(logspace(0, 3)) @ SPD @ torch.diag(logspace(0, 3))
FEW_LARGE = symmetric(torch.cat([1e4 * linspace(1, 9, 4), linspace(1, 2, 60)]))


@pytest.mark.parametrize(
    ("preconditioner", "A", "gain"),
    [
        pytest.param(hf.JacobiPreconditioner(), SCALED, 1.5, id="jacobi"),
        pytest.param(hf.NystromPreconditioner(10), FEW_LARGE, 2.0, id="nystrom"),
        pytest.param(hf.NystromPreconditioner(10, 1.0), FEW_LARGE, 2.0, id="nystrom, damping"),
    ],
)
def test_preconditioners_save_steps(preconditioner: Any, A: Tensor, gain: float) -> None:
    b = randn(len(A))
    for make in (hf.CG, hf.BiCGStab):
        plain = run(make(rtol=1e-8), A, b)[1].num_steps
        x, stats = run(make(rtol=1e-8, preconditioner=preconditioner), A, b)
        assert code(stats) is hf.RESULTS.success
        assert (b - A @ x).norm() <= 2e-8 * b.norm()
        assert gain * stats.num_steps <= plain


def prepared(preconditioner: Any, A: Tensor) -> Tensor:
    """The matrix of a preconditioner."""
    operator = LinearOperator.from_matrix(A)
    apply = preconditioner.prepare(operator, (A[0],))
    return torch.stack([apply((e,))[0] for e in torch.eye(len(A), dtype=A.dtype)], dim=1)


def test_jacobi_estimates_the_diagonal() -> None:
    d = logspace(-8, 3)
    M = prepared(hf.JacobiPreconditioner(num_probes=1), torch.diag(d))
    torch.testing.assert_close(M, torch.diag(1 / d))
    estimate = 1 / prepared(hf.JacobiPreconditioner(num_probes=4000), SPD).diagonal()
    # five standard errors of the mean
    error = ((SPD**2).sum(1) - DIAGONAL**2).div(4000).sqrt()
    assert ((estimate - DIAGONAL).abs() <= 5 * error).all()
    # nothing on the diagonal: what is left is noise, which is bounded from below
    exchange = torch.eye(N, dtype=torch.float64).flip(0)
    noisy = prepared(hf.JacobiPreconditioner(num_probes=16), exchange).diagonal()
    assert ((noisy > 0) & (noisy <= 4)).all()
    first, second = (prepared(hf.JacobiPreconditioner(2, seed=s), SPD) for s in (0, 1))
    assert not torch.equal(first, second)


def test_a_row_of_zeros_is_left_alone() -> None:
    M = prepared(hf.JacobiPreconditioner(), torch.diag(torch.tensor([0.0, 2.0])))
    torch.testing.assert_close(M, torch.diag(torch.tensor([1.0, 0.5])))


@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_nystrom_preconditioner_is_its_formula(damping: float) -> None:
    low_rank = symmetric(torch.cat([linspace(3, 5, 4), torch.zeros(N - 4).double()]))
    eye = torch.eye(N, dtype=torch.float64)
    # the rank of the sketch is that of A - damping I, which it then finds exactly
    M = prepared(hf.NystromPreconditioner(4, damping=damping), low_rank + damping * eye)
    projector = torch.linalg.pinv(low_rank) @ low_rank
    inverse = torch.linalg.pinv(low_rank + damping * projector)
    expected = (3 + damping) * inverse + eye - projector
    torch.testing.assert_close(M, expected, rtol=1e-6, atol=1e-6)
    # of full rank, the inverse up to a factor
    M = prepared(hf.NystromPreconditioner(N), SPD)
    torch.testing.assert_close(M @ SPD, eye, rtol=1e-8, atol=1e-8)


def test_nystrom_preconditioner_beyond_the_rank_stays_finite_and_positive() -> None:
    low_rank = symmetric(torch.cat([linspace(3, 5, 4), torch.zeros(N - 4).double()]))
    for A, smallest in ((low_rank, 3 / 5), (0 * low_rank, 1.0), (low_rank.float(), 3 / 5)):
        M = prepared(hf.NystromPreconditioner(8), A)
        torch.testing.assert_close(M, M.mT)
        eigenvalues = torch.linalg.eigvalsh(M)
        torch.testing.assert_close(float(eigenvalues.min()), smallest, rtol=1e-5, atol=0)
        torch.testing.assert_close(float(eigenvalues.max()), 1.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        prepared(hf.NystromPreconditioner(N), INDEFINITE), torch.eye(N, dtype=torch.float64)
    )


def _tree_problem(preconditioner: Any) -> Any:
    def inner_loss(params: Any, h: Tensor) -> Tensor:
        return (params["a"] ** 2).sum() * h + 50 * ((params["b"] - h) ** 2).sum()

    return hf.hypergrad(
        lambda h: {"a": torch.zeros(3), "b": h.detach().expand(2).clone()},
        lambda params, h: params["a"].sum() + params["b"].sum(),
        inner_loss=inner_loss,
        method=hf.CG(preconditioner=preconditioner),
    )


def test_a_users_preconditioner_takes_trees_like_params() -> None:
    def divide(tree: Any) -> Any:
        assert set(tree) == {"a", "b"}
        return {"a": tree["a"] / 2, "b": tree["b"] / 100}

    fn = _tree_problem(divide)
    h = torch.ones(3)
    torch.testing.assert_close(fn(h[0]), torch.tensor(2.0))
    torch.testing.assert_close(vmap(fn)(h), torch.full((3,), 2.0))
    h = torch.tensor(1.0, requires_grad=True)
    assert fn(h).requires_grad


def test_a_preconditioner_from_inside_a_transform_is_refused() -> None:
    def tilted(h: Tensor) -> Tensor:
        return _tree_problem(lambda tree: {k: v / (2 + h) for k, v in tree.items()})(h)

    h = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(vmap(tilted)(h), torch.full((2,), 2.0))
    with pytest.raises(ValueError, match=r"the preconditioner uses a tensor that was made inside"):
        vmap(grad(tilted))(h)


def test_a_preconditioner_leaves_no_graph() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, _ = run(hf.CG(preconditioner=lambda v: v * scale), SPD, randn(N))
    assert not x.requires_grad


WRONG_PRECONDITIONERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "structure": (
        lambda tree: [tree["a"], tree["b"]],
        r"the output of the preconditioner has another structure than params: got .*\[\*, \*\].*"
        r"expected .*'a': \*, 'b': \*",
    ),
    "shape": (
        lambda tree: {"a": tree["a"].sum(), "b": tree["b"]},
        r"the output of the preconditioner: the leaf for params\['a'\] has shape \(\), expected",
    ),
    "dtype": (
        lambda tree: {"a": tree["a"], "b": tree["b"].double()},
        r"the leaf for params\['b'\] has dtype torch.float64, expected torch.float32",
    ),
}


@pytest.mark.parametrize("name", WRONG_PRECONDITIONERS)
def test_wrong_output_of_a_preconditioner(name: str) -> None:
    preconditioner, message = WRONG_PRECONDITIONERS[name]
    with pytest.raises(ValueError, match=message):
        _tree_problem(preconditioner)(torch.tensor(1.0))


# Nystrom ------------------------------------------------------------------------------------------


def _sample(solver: hf.Nystrom, A: Tensor) -> list[int]:
    """The coordinates whose columns a solver asks for."""
    seen = []

    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(v[0])
        return (A @ v[0],)

    solver.solve(LinearOperator(product, product), (torch.ones(len(A), dtype=A.dtype),))
    return [int(v.argmax()) for v in seen[: solver.rank]]


@pytest.mark.parametrize("A", [SPD, INDEFINITE], ids=["spd", "indefinite"])
def test_nystrom_is_its_formula(A: Tensor) -> None:
    solver, b = hf.Nystrom(rank=5, rho=0.1), randn(N)
    S = _sample(solver, A)
    assert len(set(S)) == 5
    C = A[:, S]
    approximation = C @ torch.linalg.inv(C[S]) @ C.T
    eye = torch.eye(N, dtype=torch.float64)
    x, stats = run(solver, A, b)
    torch.testing.assert_close(x, torch.linalg.solve(approximation + 0.1 * eye, b))
    torch.testing.assert_close(stats.residual_norm, (b - A @ x).norm())
    assert stats.num_steps == 5
    # an identity that is known to be there is not approximated
    x, _ = run(solver, A, b, shift=2.0)
    torch.testing.assert_close(x, torch.linalg.solve(approximation + 2.1 * eye, b))
    x, _ = run(solver, A, b, shift=8.0, scale=-1.0)
    torch.testing.assert_close(x, torch.linalg.solve(8.1 * eye - approximation, b))
    # a starting iterate is corrected, by the multiple with the smallest residual
    x0 = torch.linalg.solve(A, b) + 1e-3 * randn(N, seed=9)
    x, stats = run(solver, A, b, x0)
    r = b - A @ x0
    step = torch.linalg.solve(approximation + 0.1 * eye, r)
    image = A @ step
    torch.testing.assert_close(x, x0 + (r @ image) / (image @ image) * step)
    assert stats.residual_norm <= r.norm()
    # unless it is worse than zeros
    torch.testing.assert_close(
        run(solver, A, b, 1e3 * x0)[1].residual_norm,
        (b - A @ (run(solver, A, b, torch.zeros_like(b))[0])).norm(),
    )


def test_nystrom_of_low_rank_and_of_full_rank() -> None:
    X, b = randn(4, N), randn(N)
    eye = torch.eye(N, dtype=torch.float64)
    for rank in (4, 7, N):
        x, _ = run(hf.Nystrom(rank, rho=0.5), X.T @ X, b)
        torch.testing.assert_close(x, torch.linalg.solve(X.T @ X + 0.5 * eye, b))
    x, _ = run(hf.Nystrom(N, rho=1e-6), SPD, b)
    torch.testing.assert_close(x, torch.linalg.solve(SPD + 1e-6 * eye, b))


def test_nystrom_samples_by_its_seed() -> None:
    first, again, other = (_sample(hf.Nystrom(5, seed=seed), SPD) for seed in (0, 0, 1))
    assert first == again != other


# Wrappers -----------------------------------------------------------------------------------------


def test_damped_solves_the_damped_system() -> None:
    b = randn(N)
    eye = torch.eye(N, dtype=torch.float64)
    for A, settings in ((SPD, {}), (SPD, {"shift": 1.0, "scale": -0.01})):
        matrix = settings.get("shift", 0.0) * eye + settings.get("scale", 1.0) * A
        x, stats = run(hf.Damped(hf.GMRES(), 0.7), A, b, **settings)
        torch.testing.assert_close(x, torch.linalg.solve(matrix + 0.7 * eye, b))
        assert stats.residual_norm < 1e-10


@dataclasses.dataclass(frozen=True)
class Spy(linear_solvers.AbstractLinearSolver):
    """Passes on to a solver, and remembers the right-hand sides."""

    solver: linear_solvers.AbstractLinearSolver
    seen: list[Tensor] = dataclasses.field(default_factory=list, compare=False)

    def solve(self, operator: Any, b: Any, x0: Any = None) -> Any:
        self.seen.append(b[0])
        return self.solver.solve(operator, b, x0)


def test_fallback_runs_where_the_first_did_not_succeed() -> None:
    spy = Spy(hf.GMRES(restart=N))
    solver = hf.Fallback(hf.CG(maxiter=N + 3), spy)
    b = randn(3, N)
    definite = torch.stack([SPD, TASKS[0], TASKS[1]])
    vmap(lambda A, b: run(solver, A, b))(definite, b)
    assert not spy.seen

    mixed = torch.stack([SPD, INDEFINITE, NONSYMMETRIC])
    x, stats = vmap(lambda A, b: run(solver, A, b))(mixed, b)
    assert len(spy.seen) == 1
    torch.testing.assert_close(x, torch.linalg.solve(mixed, b))
    assert torch.equal(x[0], vmap(lambda A, b: run(hf.CG(N + 3), A, b)[0])(mixed, b)[0])
    assert stats.result.tolist() == [0, 0, 0]
    first = vmap(lambda A, b: run(hf.CG(N + 3), A, b)[1].num_steps)(mixed, b)
    then = torch.tensor(
        [int(run(spy.solver, A, c)[1].num_steps) for A, c in zip(mixed, b, strict=True)]
    )
    assert stats.num_steps.tolist() == (first + then * torch.tensor([0, 1, 1])).tolist()


def test_tasks_that_are_solved_cost_the_second_solver_nothing() -> None:
    two_eigenvalues = symmetric(torch.cat([-linspace(1, 1, 6), linspace(2, 2, 6)]))
    matrices, count = torch.stack([SPD, two_eigenvalues]), []

    def solve(A: Tensor, b: Tensor) -> Any:
        operator = LinearOperator(lambda v: count.append(1) or (A @ v[0],), lambda v: v)
        return hf.Fallback(hf.CG(N + 3, rtol=1e-8), hf.GMRES(restart=N)).solve(operator, (b,))

    _, stats = vmap(solve)(matrices, randn(2, N))
    first = run(hf.CG(N + 3, rtol=1e-8), SPD, randn(2, N)[0])[1].num_steps
    assert stats.num_steps[0] == first
    assert len(count) == first + 2 + 2 + 2  # with the checks of what ends


def test_fallback_runs_after_the_step_limit_from_the_same_start() -> None:
    solver, b = hf.Fallback(hf.CG(2), hf.GMRES(3, rtol=0)), randn(N)
    # Krylov methods take no notice of a start that is worse than zeros
    near = torch.linalg.solve(SPD, b) + 1e-3 * randn(N, seed=6)
    for start in (None, randn(N, seed=6), near):
        torch.testing.assert_close(
            run(solver, SPD, b, start)[0], run(hf.GMRES(3, rtol=0), SPD, b, start)[0]
        )
    assert run(solver, SPD, b)[1].num_steps == 5
    assert run(hf.Fallback(hf.CG(2, rtol=0), hf.GMRES()), SPD, b)[1].num_steps == 2


BLOCKS = [SPD[:3, :3], SPD[3:8, 3:8] + 30 * torch.eye(5, dtype=torch.float64), SPD[8:9, 8:9]]


def _children() -> tuple[Counted, tuple[Tensor, ...], list[Tensor]]:
    """Three blocks of 3, 5 and 1 entries in the children of a list; the second has two leaves."""

    class Joint(Counted):
        def _product(self, matrix: Tensor, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.count += 1
            second = BLOCKS[1] @ torch.cat([v[1].reshape(-1), v[2]])
            return (BLOCKS[0] @ v[0], second[:4].reshape(2, 2), second[4:], BLOCKS[2][0, 0] * v[3])

    spec = trees.flatten([0, (1, 2), {"x": 3}])[1]
    flat = [randn(3), randn(5, seed=1), randn(1, seed=2)]
    b = (flat[0], flat[1][:4].reshape(2, 2), flat[1][4:], flat[2].reshape(()))
    return Joint(SPD, spec=spec), b, flat


@pytest.mark.parametrize(
    "solver",
    [hf.CG(), hf.GMRES(), hf.Dense(), hf.CG(preconditioner=hf.JacobiPreconditioner(1))],
    ids=str,
)
def test_blocks_of_different_sizes(solver: Any) -> None:
    counted, b, flat = _children()
    x, stats = hf.Blockwise(solver).solve(counted.operator, b)
    expected = [torch.linalg.solve(A, c) for A, c in zip(BLOCKS, flat, strict=True)]
    torch.testing.assert_close(x[0], expected[0])
    torch.testing.assert_close(torch.cat([x[1].reshape(-1), x[2]]), expected[1])
    torch.testing.assert_close(x[3], expected[2].reshape(()))
    assert [leaf.shape for leaf in x] == [leaf.shape for leaf in b]
    assert code(stats) is hf.RESULTS.success
    # one product serves all blocks: as many as the hardest one needs
    alone = [int(run(solver, A, c)[1].num_steps) for A, c in zip(BLOCKS, flat, strict=True)]
    assert stats.num_steps == max(alone)
    assert counted.count == max(alone) + 1 + (
        solver.preconditioner is not None if isinstance(solver, hf.CG) else 0
    )
    residual = counted.operator.residual(x, b)
    norm = torch.stack([leaf.norm() for leaf in residual]).norm()
    torch.testing.assert_close(stats.residual_norm, norm, rtol=1, atol=1e-12)
    # and from a warm start
    y, _ = hf.Blockwise(solver).solve(counted.operator, b, tuple(torch.ones_like(c) for c in b))
    torch.testing.assert_close(y, x)


def _batched_operator() -> LinearOperator:
    def product(v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        w = torch.cat([v[0].flatten(1), v[1][:, None]], dim=1)
        w = torch.einsum("tij,tj->ti", TASKS[:, :7, :7], w)
        return w[:, :6].reshape(-1, 2, 3), w[:, 6]

    return LinearOperator(product, product, symmetric=True)


def test_a_dimension_of_tasks_in_the_leaves() -> None:
    operator = _batched_operator()
    b = (randn(4, 2, 3), randn(4, seed=1))
    solver = hf.CG(rtol=1e-12)
    x, stats = hf.Blockwise(solver, "batch").solve(operator, b)
    alone = [
        run(
            solver,
            TASKS[t, :7, :7],
            torch.cat([b[0][t].reshape(-1), b[1][t, None]]),
            symmetric=True,
        )
        for t in range(4)
    ]
    expected = torch.stack([x for x, _ in alone])
    torch.testing.assert_close(torch.cat([x[0].flatten(1), x[1][:, None]], 1), expected)
    assert stats.num_steps == max(int(s.num_steps) for _, s in alone)
    assert stats.num_steps < solver.solve(operator, b)[1].num_steps


def test_one_block_that_fails_tells_on_all() -> None:
    diagonal = torch.diag(torch.tensor([3.0, -1.0, 2.0]))
    x, stats = run(hf.Blockwise(hf.CG(), "batch"), diagonal, torch.ones(3), symmetric=True)
    assert code(stats) is hf.RESULTS.breakdown
    torch.testing.assert_close(x[[0, 2]], torch.tensor([1 / 3, 1 / 2]))


def test_blocks_have_products_with_the_transpose() -> None:
    matrices = torch.stack([NONSYMMETRIC, ROTATION + NONSYMMETRIC])
    operator = LinearOperator(
        lambda v: (torch.einsum("tij,tj->ti", matrices, v[0]),),
        lambda v: (torch.einsum("tji,tj->ti", matrices, v[0]),),
    )
    b = randn(2, N)
    (x,), stats = hf.Blockwise(hf.NormalCG(), "batch").solve(operator, (b,))
    assert code(stats) is hf.RESULTS.success
    torch.testing.assert_close(x, torch.linalg.solve(matrices, b))


def test_step_sizes_of_the_blocks() -> None:
    counted, b, flat = _children()
    step_sizes = (0.05, 0.02, 0.1)
    for K in (3, 400):
        solver = hf.Blockwise(hf.FixedPoint(K, rtol=0), step_sizes=step_sizes)
        x, stats = solver.solve(counted.operator, b)
        rs = 0.0
        for i, index in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
            own = hf.FixedPoint(K, rtol=0, step_size=step_sizes[i])
            expected, own_stats = run(own, BLOCKS[i], flat[i])
            got = torch.cat([leaf.reshape(-1) for leaf in x[index]])
            torch.testing.assert_close(got, expected)
            rs += own_stats.residual_norm**2
        torch.testing.assert_close(stats.residual_norm, rs**0.5, rtol=1e-6, atol=1e-13)


def test_blockwise_in_a_hypergradient_with_tasks_in_one_tree() -> None:
    """Ridge regressions with a regulariser each, as one inner problem; under vmap and twice."""
    X, y = randn(3, 6, 4), randn(3, 6, seed=1)

    def inner_loss(params: Any, h: Tensor, y: Tensor) -> Tensor:
        return sum(
            ((X[t] @ w - y[t]) ** 2).sum() + h[t].exp() * (w**2).sum() for t, w in enumerate(params)
        )

    def solution(h: Tensor, y: Tensor) -> list[Tensor]:
        eye = torch.eye(4, dtype=X.dtype)
        return [
            torch.linalg.solve(X[t].T @ X[t] + h[t].exp() * eye, X[t].T @ y[t]) for t in range(3)
        ]

    def outer(params: Any, h: Tensor, y: Tensor) -> Tensor:
        return sum((w**3).sum() for w in params)

    h = linspace(-2, 2, 3)
    fn = hf.hypergrad(
        solution,
        outer,
        inner_loss=inner_loss,
        method=hf.Blockwise(hf.CG(rtol=1e-14), check_blocks=True),
    )
    exact = grad(lambda h, y: outer(solution(h, y), h, y))
    torch.testing.assert_close(fn(h, y), exact(h, y))
    torch.testing.assert_close(jacrev(fn)(h, y), jacrev(exact)(h, y))
    ys = torch.stack([y, 2 * y])
    torch.testing.assert_close(vmap(fn, (None, 0))(h, ys), torch.stack([exact(h, y) for y in ys]))


def test_preconditioners_of_blocks_take_trees_of_blocks() -> None:
    """With a dimension of tasks, trees like those of a task; else a tuple of one vector."""
    seen: list[Any] = []

    def precondition(v: Any) -> Any:
        seen.append(v)
        return optree.tree_map(lambda leaf: 0.5 * leaf, v)

    def inner_loss(w: Any, h: Tensor) -> Tensor:
        return (w["a"] ** 2).sum() + (w["b"] ** 2).sum() - (h[:, None] * w["a"] + w["b"]).sum()

    def solution(h: Tensor) -> Any:
        return {"a": h[:, None].expand(3, 2) / 2, "b": torch.full((3, 2), 0.5).to(h)}

    for blocks, shapes in (("batch", {"a": (2,), "b": (2,)}), ("leaves", ((6,),))):
        solver = hf.Blockwise(hf.CG(preconditioner=precondition), blocks)
        fn = hf.hypergrad(
            solution, lambda w, h: (w["a"] ** 2).sum(), inner_loss=inner_loss, method=solver
        )
        torch.testing.assert_close(fn(linspace(1, 2, 3)), linspace(1, 2, 3))
        assert optree.tree_map(lambda leaf: tuple(leaf.shape), seen[-1]) == shapes


# Random vectors -----------------------------------------------------------------------------------


def test_random_vectors() -> None:
    like = (torch.zeros(()), torch.zeros(300, 300, dtype=torch.bfloat16))
    signs = [random_signs(like, seed)[1].double().reshape(-1) for seed in range(4)]
    uniform = random_uniform((torch.zeros(90000, dtype=torch.float64),), 0)[0]
    for i, s in enumerate(signs):
        assert s.abs().eq(1).all()
        assert abs(float(s.mean())) < 5 / 300
        assert abs(float((s[1:] * s[:-1]).mean())) < 5 / 300
        for t in signs[:i]:
            for shift in range(4):
                assert abs(float((s[shift:] * t[: len(t) - shift]).mean())) < 5 / 300
                assert abs(float((t[shift:] * s[: len(s) - shift]).mean())) < 5 / 300
    assert -1 <= uniform.min() < uniform.max() < 1
    assert abs(float(uniform.mean())) < 5 / 300
    torch.testing.assert_close(uniform.var(), torch.tensor(1 / 3).double(), rtol=0.02, atol=0)


# Objects and errors -------------------------------------------------------------------------------

OBJECTS = [
    hf.GMRES(3, restart=2, rtol=0.1, atol=0.2, preconditioner=hf.JacobiPreconditioner(2, 3)),
    hf.BiCGStab(3, preconditioner=torch.neg),
    hf.CG(3, preconditioner=hf.NystromPreconditioner(3, 0.1, 1), check_symmetry=True),
    hf.Nystrom(3, 0.1, 1),
    hf.AndersonFixedPoint(3, step_size=0.1, memory=2),
    hf.Damped(hf.CG(), 0.1),
    hf.Fallback(hf.CG(), hf.Fallback(hf.BiCGStab(), hf.GMRES())),
    hf.Blockwise(hf.CG(), "leaves", (0.1, 0.2), True),
]


@pytest.mark.parametrize("solver", OBJECTS, ids=lambda s: type(s).__name__)
def test_objects_are_values(solver: Any) -> None:
    for twin in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert twin == solver
        assert hash(twin) == hash(solver)
        assert repr(twin) == repr(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.maxiter = 3


FIELDS = {
    hf.CG: "maxiter rtol atol preconditioner check_symmetry negative_curvature",
    hf.NormalCG: "maxiter rtol atol preconditioner",
    hf.BiCGStab: "maxiter rtol atol preconditioner",
    hf.PipelinedCG: "maxiter rtol atol preconditioner replace",
    hf.GMRES: "maxiter restart rtol atol preconditioner",
    hf.FixedPoint: "maxiter rtol atol step_size preconditioner",
    hf.Neumann: "maxiter rtol atol step_size preconditioner",
    hf.AndersonFixedPoint: "maxiter rtol atol step_size preconditioner memory",
    hf.Auto: "num_steps maxiter rtol atol",
    hf.OneStep: "step_size",
}
BAD_BOUNDS: list[tuple[str, type[Exception], list[Any], str]] = [
    ("maxiter", TypeError, [2.0, True, None], "an integer >= 0"),
    ("maxiter", ValueError, [-1], "an integer >= 0"),
    ("rtol", TypeError, ["1e-3", True], "a finite number >= 0"),
    ("rtol", ValueError, [-1e-3, torch.nan, torch.inf], "a finite number >= 0"),
    ("atol", TypeError, ["a", None], "a finite number >= 0"),
    ("atol", ValueError, [-1, torch.inf], "a finite number >= 0"),
    ("step_size", TypeError, [True, None], "a finite number > 0"),
    ("step_size", ValueError, [0, -0.5, torch.inf, torch.nan], "a finite number > 0"),
]


@pytest.mark.parametrize("solver", FIELDS, ids=lambda cls: cls.__name__)
def test_the_bounds_on_an_iteration(solver: Any) -> None:
    """The order in which they are passed, and the check of each."""
    names = FIELDS[solver].split()
    assert [field.name for field in dataclasses.fields(solver)] == names
    for name, error, values, expected in BAD_BOUNDS:
        for value in values if name in names else []:
            message = f"{solver.__name__}: {name} is {value!r}; expected {expected}"
            with pytest.raises(error, match=f"^{re.escape(message)}$"):
                solver(**{name: value})


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "gmres restart": (lambda: hf.GMRES(restart=0), ValueError, r"GMRES: restart is 0; expected an"),
    "gmres restart too large": (
        lambda: run(hf.GMRES(restart=50), SPD, randn(N)),
        ValueError,
        rf"GMRES: restart is 50, but params have {N} entries in all; expected restart <= {N}",
    ),
    "nystrom rank": (lambda: hf.Nystrom(0), ValueError, r"Nystrom: rank is 0; expected an integer"),
    "nystrom rho": (lambda: hf.Nystrom(3, 0.0), ValueError, r"Nystrom: rho is 0.0; expected a fin"),
    "nystrom seed": (lambda: hf.Nystrom(seed=-1), ValueError, r"Nystrom: seed is -1; expected an"),
    "nystrom rank too large": (
        lambda: run(hf.Nystrom(13), SPD, randn(N)),
        ValueError,
        rf"Nystrom: rank is 13, but params have {N} entries in all; expected rank <= {N}",
    ),
    "preconditioner rank": (
        lambda: hf.NystromPreconditioner(True),
        TypeError,
        r"NystromPreconditioner: rank is True; expected an integer >= 1",
    ),
    "preconditioner rank too large": (
        lambda: run(hf.CG(preconditioner=hf.NystromPreconditioner(13)), SPD, randn(N)),
        ValueError,
        rf"NystromPreconditioner: rank is 13, but params have {N} entries",
    ),
    "preconditioner damping": (
        lambda: hf.NystromPreconditioner(damping=-0.1),
        ValueError,
        r"NystromPreconditioner: damping is -0.1; expected a finite number >= 0",
    ),
    "jacobi probes": (
        lambda: hf.JacobiPreconditioner(0),
        ValueError,
        r"JacobiPreconditioner: num_probes is 0; expected an integer >= 1",
    ),
    "jacobi seed": (
        lambda: hf.JacobiPreconditioner(seed=0.5),
        TypeError,
        r"JacobiPreconditioner: seed is 0.5; expected an integer >= 0",
    ),
    "preconditioner is a class": (
        lambda: hf.CG(preconditioner=hf.JacobiPreconditioner),
        TypeError,
        r"CG: preconditioner is the class JacobiPreconditioner.*hf.JacobiPreconditioner\(\)",
    ),
    "preconditioner is a matrix": (
        lambda: hf.GMRES(preconditioner=3.0),
        TypeError,
        r"GMRES: preconditioner is 3.0; expected a linear function of trees like params",
    ),
    "preconditioner of bicgstab": (
        lambda: hf.BiCGStab(preconditioner="jacobi"),
        TypeError,
        r"BiCGStab: preconditioner is 'jacobi'; expected a linear function",
    ),
    "zero damping": (
        lambda: hf.Damped(hf.CG(), 0.0),
        ValueError,
        r"Damped: damping is 0.0; expected a finite number > 0",
    ),
    "negative damping": (lambda: hf.Damped(hf.CG(), -1), ValueError, r"damping is -1; expected"),
    "infinite damping": (lambda: hf.Damped(hf.CG(), float("inf")), ValueError, r"damping is inf;"),
    "damped name": (
        lambda: hf.Damped("cg", 0.1),
        TypeError,
        r"Damped: solver is 'cg'; expected a linear solver such as hf.CG\(maxiter=20\)",
    ),
    "fallback class": (
        lambda: hf.Fallback(hf.CG, hf.GMRES()),
        TypeError,
        r"Fallback: first is the class CG; expected an object. Write hf.CG\(\)",
    ),
    "fallback then": (lambda: hf.Fallback(hf.CG(), None), TypeError, r"Fallback: then is None;"),
    "anderson memory": (
        lambda: hf.AndersonFixedPoint(memory=0),
        ValueError,
        r"AndersonFixedPoint: memory is 0; expected an integer >= 1",
    ),
    "blockwise blocks": (
        lambda: hf.Blockwise(hf.CG(), "rows"),
        ValueError,
        r"Blockwise: blocks is 'rows'; expected one of 'children', 'leaves', 'batch'",
    ),
    "blockwise step sizes": (
        lambda: hf.Blockwise(hf.CG(), step_sizes=[0.1]),
        TypeError,
        r"Blockwise: step_sizes is \[0.1\]; expected a tuple of numbers > 0",
    ),
    "blockwise infinite step size": (
        lambda: hf.Blockwise(hf.CG(), step_sizes=(0.1, float("inf"))),
        ValueError,
        r"Blockwise: step_sizes\[1\] is inf; expected a finite number > 0",
    ),
    "blockwise number of step sizes": (
        lambda: run(hf.Blockwise(hf.CG(), "batch", (0.1, 0.2)), SPD, randn(N)),
        ValueError,
        rf"step_sizes has 2 numbers, but params have {N} blocks \(blocks='batch'\)",
    ),
    "blockwise single tensor": (
        lambda: run(hf.Blockwise(hf.CG()), SPD, randn(N)),
        ValueError,
        r"blocks is 'children', but params is a single tensor; expected a tree.*blocks='batch'",
    ),
    "blockwise scalar": (
        lambda: hf.Blockwise(hf.CG(), "batch").solve(_children()[0].operator, _children()[1]),
        ValueError,
        r"params\[0\] has shape \(3,\) and params\[1\]\[0\] has shape \(2, 2\); expected the same",
    ),
    "blockwise 0-d": (
        lambda: hf.Blockwise(hf.CG(), "batch").solve(
            LinearOperator(lambda v: v, lambda v: v), (torch.tensor(1.0),)
        ),
        ValueError,
        r"blocks is 'batch', but params\[0\] is a scalar \(0-d\); expected a first dimension",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    make, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        make()
