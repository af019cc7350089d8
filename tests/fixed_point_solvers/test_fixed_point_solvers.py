"""Fixed-point solvers: solutions, iterates, stops, samples, codes, derivatives, and errors."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc._torch import batching
from hyperfunc.fixed_point_solvers import Anderson, Broyden, Newton, Picard

N, BATCH = 8, 5
SOLVERS: dict[str, Any] = {
    "picard": Picard(),
    "picard, averaged": Picard(step_size=0.7),
    "anderson": Anderson(),
    "anderson, mixed": Anderson(memory=3, step_size=0.8, ridge=1e-8),
    "broyden": Broyden(),
    "broyden, short": Broyden(memory=4),
    "newton": Newton(),
    "newton, normal cg": Newton(linear_solver=hf.NormalCG()),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_norm(matrix: Tensor, norm: float) -> Tensor:
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


W = with_norm(randn(N, N), 0.9)
X = randn(BATCH, N, seed=1) * torch.logspace(-2, 1, BATCH, dtype=torch.float64)[:, None]
ROTATION = 0.9 * torch.roll(torch.eye(N, dtype=torch.float64), 1, 0)
EXPANDING = -torch.diag(torch.linspace(0.1, 3, N, dtype=torch.float64))


def cell(z: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ h.T + x)


def affine(z: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return z @ h.T + x


def batched(solver: Any, **changes: Any) -> Any:
    return dataclasses.replace(solver, batch_dim=0, **changes)


def exact(solver: Any, steps: int, **changes: Any) -> Any:
    return dataclasses.replace(solver, maxiter=steps, rtol=0.0, atol=0.0, **changes)


class Recorder:
    """A map that keeps the points at which it was evaluated."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.points: list[Tensor] = []

    def __call__(self, z: Tensor, *rest: Any) -> Any:
        self.points.append(z.detach().clone())
        return self.fn(z, *rest)


# Solutions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("matrix", ["contraction", "rotation", "expanding"])
def test_affine_maps_against_a_dense_solve(name: str, matrix: str) -> None:
    A = {"contraction": W, "rotation": ROTATION, "expanding": EXPANDING}[matrix]
    if matrix == "expanding" and "picard" in name:
        with pytest.raises(hf.HypergradError, match="the residual grew"):
            SOLVERS[name](affine, torch.zeros_like(X), A, X)
        return
    solver = batched(SOLVERS[name], rtol=1e-13)
    z, stats = solver(affine, torch.zeros_like(X), A, X)
    expected = torch.linalg.solve(torch.eye(N, dtype=A.dtype) - A, X.T).T
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
    assert stats.result.tolist() == [0] * BATCH


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_the_solution_meets_the_tolerance_that_was_asked_for(
    name: str, batch_dim: int | None
) -> None:
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-5, batch_dim=batch_dim)
    z, stats = solver(cell, torch.zeros_like(X), W, X)
    value = cell(z, W, X)
    dims = None if batch_dim is None else 1
    residual = torch.linalg.vector_norm(value - z, dim=dims)
    torch.testing.assert_close(stats.residual_norm, residual, rtol=1e-6, atol=0)
    assert (residual <= 1e-5 * torch.linalg.vector_norm(value, dim=dims)).all()
    assert stats.num_steps.shape == residual.shape
    if "picard" in name:  # and it is the first of its iterates that does
        w = torch.zeros_like(X) if batch_dim is None else torch.zeros_like(X[-1])
        x = X if batch_dim is None else X[-1]
        for _ in range(int(stats.num_steps.reshape(-1)[-1])):
            assert (cell(w, W, x) - w).norm() > 1e-5 * cell(w, W, x).norm()
            w = w + solver.step_size * (cell(w, W, x) - w)
        torch.testing.assert_close(w, z if batch_dim is None else z[-1], rtol=1e-12, atol=1e-14)


def test_the_absolute_tolerance_counts_where_it_is_larger() -> None:
    _, stats = batched(Picard(), rtol=0.0, atol=1e-3)(cell, torch.zeros_like(X), W, X)
    assert (stats.residual_norm <= 1e-3).all()
    assert (stats.residual_norm > 1e-5).any()


def test_a_start_at_the_solution_takes_no_steps_and_one_nearby_takes_fewer() -> None:
    z, cold = Anderson()(cell, torch.zeros_like(X), W, X)
    same, stats = Anderson(rtol=1e-11)(cell, z, W, X)
    assert stats.num_steps == 0
    assert torch.equal(same, z)
    _, warm = Anderson()(cell, z, W * 1.001, X)
    assert warm.num_steps < cold.num_steps


# Iterates against other implementations -----------------------------------------------------------


def anderson_iterates(
    steps: int, memory: int, eta: float, ridge: float, f: Callable[[Any], Any], z: Any
) -> Any:
    points, residuals = [z], [f(z) - z]
    for _ in range(steps):
        count = min(memory, len(points) - 1)
        new = points[-1] + eta * residuals[-1]
        if count:
            dz = np.diff(np.stack(points[-count - 1 :]), axis=0)
            df = np.diff(np.stack(residuals[-count - 1 :]), axis=0)
            penalty = np.sqrt(ridge) * np.diag(np.linalg.norm(df, axis=1))
            system = np.concatenate([df.T, penalty])
            rhs = np.concatenate([residuals[-1], np.zeros(count)])
            gamma = np.linalg.lstsq(system, rhs, rcond=None)[0]
            new = new - gamma @ (dz + eta * df)
        points.append(new)
        residuals.append(f(new) - new)
    return points[-1]


def broyden_iterates(steps: int, memory: int, f: Callable[[Any], Any], z: Any) -> Any:
    H, g, pairs = -np.eye(len(z)), f(z) - z, 0
    for _ in range(steps):
        new = z - H @ g
        new_g = f(new) - new
        s, y = new - z, new_g - g
        if pairs == memory:
            H, pairs = -np.eye(len(z)), 0
        H, pairs = H + np.outer(s - H @ y, s @ H) / (s @ H @ y), pairs + 1
        z, g = new, new_g
    return z


def newton_iterates(steps: int, f: Callable[[Any], Any], z: Any) -> Any:
    for _ in range(steps):
        J = np.stack([(f(z + 1e-6 * e) - f(z - 1e-6 * e)) / 2e-6 for e in np.eye(len(z))], 1)
        z = z + np.linalg.solve(np.eye(len(z)) - J, f(z) - z)
    return z


ITERATES: dict[str, tuple[Any, Callable[..., Any], float]] = {
    "picard": (Picard(), lambda K, f, z: anderson_iterates(K, 0, 1.0, 0.0, f, z), 1e-13),
    "averaged": (
        Picard(step_size=0.3),
        lambda K, f, z: anderson_iterates(K, 0, 0.3, 0.0, f, z),
        1e-13,
    ),
    "anderson": (Anderson(), lambda K, f, z: anderson_iterates(K, 5, 1.0, 0.0, f, z), 1e-8),
    "mixed, with a ridge": (
        Anderson(memory=2, step_size=0.5, ridge=0.1),
        lambda K, f, z: anderson_iterates(K, 2, 0.5, 0.1, f, z),
        1e-10,
    ),
    "broyden": (Broyden(), lambda K, f, z: broyden_iterates(K, 20, f, z), 1e-10),
    "broyden, short": (Broyden(memory=2), lambda K, f, z: broyden_iterates(K, 2, f, z), 1e-10),
    "newton": (Newton(), newton_iterates, 1e-8),
}


@pytest.mark.parametrize("name", ITERATES)
@pytest.mark.parametrize("K", [0, 1, 2, 5])
def test_exactly_as_many_steps_and_the_iterates_of_the_formula(name: str, K: int) -> None:
    solver, reference, tolerance = ITERATES[name]
    x, h = X[3], with_norm(W, 1.5)
    z, stats = exact(solver, K)(cell, torch.ones(N, dtype=torch.float64), h, x)
    h_np, x_np = h.numpy(), x.numpy()
    expected = reference(K, lambda z: np.tanh(h_np @ z + x_np), np.ones(N))
    np.testing.assert_allclose(z.numpy(), expected, rtol=tolerance, atol=tolerance)
    assert (int(stats.num_steps), int(stats.result)) == (K, 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_and_synchronisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    monkeypatch.setattr(batching, "count_true", lambda flag: syncs.append(flag) or int(flag))
    solver, f = batched(SOLVERS[name]), Recorder(cell)
    if "newton" in name:  # whose linear solver has settings of its own
        solver = dataclasses.replace(solver, linear_solver=hf.CG(2, rtol=0.0))
    exact(solver, 7, throw=False)(f, torch.zeros_like(X), W, X)
    assert (len(f.points), len(syncs)) == (7, 0)
    f.points.clear()
    _, stats = dataclasses.replace(solver, rtol=1e-3)(f, torch.zeros_like(X), W, X)
    assert len(f.points) == int(stats.num_steps.max()) + 1
    assert len(syncs) == len(f.points) + 1  # one each, and the check for failures


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
def test_exact_steps_wait_for_no_values(solver: Any) -> None:
    x = X.to("meta")
    z, stats = exact(batched(solver), 7, throw=False)(cell, torch.zeros_like(x), W.to("meta"), x)
    assert z.is_meta
    assert stats.result.shape == (BATCH,)


def test_a_jump_of_the_residual_restarts_from_the_best_iterate() -> None:
    for solver in (Anderson(memory=3), Broyden(memory=3)):
        f: Any = None

        def jump(z: Tensor) -> Tensor:
            return affine(z, ROTATION, X) + (100.0 if len(f.points) == 6 else 0.0)  # noqa: B023

        f = Recorder(lambda z, h: jump(z))
        _, stats = solver(f, torch.zeros_like(X), None)
        values = [affine(point, ROTATION, X) for point in f.points]
        norms = [float((v - p).norm()) for v, p in zip(values[:5], f.points, strict=False)]
        best = int(np.argmin(norms))
        torch.testing.assert_close(f.points[6], values[best], rtol=1e-13, atol=1e-13)
        assert int(stats.result) == 0


# Samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_and_tasks_are_solved_as_alone(name: str) -> None:
    solver, zero = SOLVERS[name], torch.zeros(N, dtype=torch.float64)
    alone = [solver(cell, zero, W, x) for x in X]
    zs = torch.stack([z for z, _ in alone])
    steps = [int(stats.num_steps) for _, stats in alone]
    assert len(set(steps)) >= 3

    def run(x: Tensor) -> Any:
        return solver(cell, zero, W, x)

    nested = vmap(vmap(run))(X[:4].reshape(2, 2, N))
    transposed = dataclasses.replace(solver, batch_dim=1)(
        lambda z, h, x: cell(z.T, h, x.T).T, torch.zeros_like(X).T, W, X.T
    )
    for z, stats in (
        vmap(run)(X),
        (nested[0].reshape(4, N), hf.SolveStats(*(s.reshape(4) for s in nested[1]))),
        (transposed[0].T, transposed[1]),
        *([] if "newton" in name else [batched(solver)(cell, torch.zeros_like(X), W, X)]),
    ):
        torch.testing.assert_close(z, zs[: len(z)], rtol=1e-9, atol=1e-11)
        assert stats.result.tolist() == [0] * len(z)
        assert np.abs(np.subtract(stats.num_steps.tolist(), steps[: len(z)])).max() <= 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_finished_sample_is_frozen_bit_by_bit(name: str) -> None:
    f = Recorder(cell)
    z, stats = batched(SOLVERS[name])(f, torch.zeros_like(X), W, X)
    assert len(stats.num_steps.unique()) >= 3
    for i, steps in enumerate(stats.num_steps.tolist()):
        for point in f.points[steps:]:
            assert torch.equal(point[i], z[i])


def test_blockwise_newton_solves_each_sample_by_itself() -> None:
    solver = batched(Newton(linear_solver=hf.Blockwise(hf.GMRES(), blocks="batch")))
    z, stats = solver(cell, torch.zeros_like(X), W, X)
    for i in range(BATCH):
        alone, own = Newton()(cell, torch.zeros_like(X[i]), W, X[i])
        torch.testing.assert_close(z[i], alone, rtol=1e-10, atol=1e-12)
        assert stats.num_steps[i] == own.num_steps


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_zero_and_one(name: str, size: int) -> None:
    x = X[:size]
    for solver in (batched(SOLVERS[name]), SOLVERS[name], exact(batched(SOLVERS[name]), 3)):
        z, stats = solver(cell, torch.zeros_like(x), W, x)
        assert z.shape == x.shape
        assert (
            stats.result.shape
            == stats.num_steps.shape
            == (() if solver.batch_dim is None else (size,))
        )
        assert not stats.result.any()


# Trees and dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_trees_of_any_shape_and_dtype(name: str, batch_dim: int | None) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    init = [torch.zeros((4, k)[: 1 + k % 2]).to(dtype) for k, dtype in enumerate(dtypes)]
    if batch_dim is None:
        init[0] = torch.zeros((), dtype=torch.float64)
    init[3] = init[3].T.contiguous().T

    def f(z: list[Tensor], h: Tensor) -> list[Tensor]:
        mean = sum(leaf.double().sum() for leaf in z) / 1000
        return [(0.4 * leaf.double() + mean + h).to(leaf.dtype) for leaf in z]

    solver = dataclasses.replace(SOLVERS[name], batch_dim=batch_dim)
    z, stats = solver(f, init, torch.ones((), dtype=torch.float64))
    for leaf, start in zip(z, init, strict=True):
        assert (leaf.dtype, leaf.shape) == (start.dtype, start.shape)
    for leaf, value in zip(z, f(z, torch.ones((), dtype=torch.float64)), strict=True):
        torch.testing.assert_close(leaf, value, rtol=0.03, atol=0.03)
    assert stats.residual_norm.dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "newton"])
def test_half_precision_with_norms_in_float32(name: str, dtype: torch.dtype) -> None:
    # in half precision the sum of 40000 squares of 3 would stop at 1024 or be infinite
    init, x = torch.full((40000,), 6.0, dtype=dtype), torch.full((40000,), 3.0, dtype=dtype)
    f = lambda z, h: 0.5 * z.tanh() * h + x  # noqa: E731
    _, stats = exact(SOLVERS[name], 1)(f, init, 0.0)
    assert stats.residual_norm.dtype is torch.float32
    assert float(stats.residual_norm) == pytest.approx(600)
    z, stats = SOLVERS[name](f, init, 1.0)
    assert z.dtype is dtype
    assert int(stats.result) == 0
    assert float(z[0]) == pytest.approx(3.4976, rel=2 * torch.finfo(dtype).eps)


# Codes --------------------------------------------------------------------------------------------


def mixed(z: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """Three samples: one with a solution, one that diverges, one that becomes NaN."""
    return torch.stack([0.5 * z[0], 3.0 * z[1] + 1, torch.sqrt(z[2] - 1)]) + x


@pytest.mark.parametrize("solver", [s(20, rtol=1e-4) for s in (Picard, Anderson, Broyden, Newton)])
def test_codes_of_samples_and_what_the_error_says(solver: Any) -> None:
    x = torch.ones(3, 4, dtype=torch.float64)
    _, stats = batched(solver, throw=False)(mixed, torch.zeros_like(x), None, x)
    assert stats.result.tolist() == [0, 4 if isinstance(solver, Picard) else 0, 3]
    failed = 2 if isinstance(solver, Picard) else 1
    with pytest.raises(hf.HypergradError, match=f"failed for {failed} of 3 samples .*: non-finite"):
        batched(solver)(mixed, torch.zeros_like(x), None, x)
    nan = X.clone()
    nan[1, 2] = torch.nan
    run = vmap(lambda x: solver(cell, torch.zeros_like(x), W, x))
    with pytest.raises(
        hf.HypergradError, match=r"failed for 1 of 5 samples \(index 1\): non-finite values"
    ):
        run(nan)
    pairs = vmap(lambda x: batched(solver)(cell, torch.zeros_like(x), W, x))
    with pytest.raises(
        hf.HypergradError, match=r"for 1 of 10 samples \(index \(1, 1\)\).*Pass throw=False"
    ):
        pairs(torch.stack([X, nan]))
    with pytest.raises(hf.HypergradError, match=r"failed: non-finite"):
        solver(cell, torch.zeros_like(X), W, nan)


def test_codes_of_other_ends() -> None:
    zero = torch.zeros_like(X)
    assert int(Picard(3)(cell, zero, W, X)[1].result) == hf.RESULTS.max_steps
    with pytest.raises(hf.HypergradError, match=r"the residual grew .* Take another solver"):
        Picard(20)(affine, zero, EXPANDING, X)
    with pytest.raises(hf.HypergradError, match=r"non-finite"):
        exact(Picard(), 2000)(affine, zero, EXPANDING, X)
    # stopped before the numbers overflow
    _, stats = Picard(throw=False)(affine, zero, EXPANDING, X)
    assert int(stats.result) == hf.RESULTS.divergence
    assert int(stats.num_steps) < 40


@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "newton"])
def test_the_best_iterate_comes_back_when_the_tolerance_is_not_reached(name: str) -> None:
    h, f = with_norm(W, 6.0), Recorder(cell)
    solver = batched(SOLVERS[name], maxiter=6, throw=False)
    z, stats = solver(f, torch.zeros_like(X), h, X)
    norms = torch.stack([torch.linalg.vector_norm(cell(p, h, X) - p, dim=1) for p in f.points])
    unfinished = stats.result != 0
    assert unfinished.any()
    least = norms.min(0)
    torch.testing.assert_close(stats.residual_norm, least.values, rtol=1e-12, atol=0)
    for i in torch.nonzero(unfinished)[:, 0].tolist():
        assert torch.equal(z[i], f.points[int(least.indices[i])][i])
    assert (least.indices[unfinished] < 6).any()  # not simply the last


def test_the_iterate_that_met_the_tolerance_comes_back() -> None:
    """Also where an earlier one has a smaller residual, as the tolerance is relative."""

    def f(z: Tensor, h: None) -> Tensor:  # residuals 0.5, 98.5 and 1 at 1, 1.5 and 100
        return torch.where(z < 1.2, z + 0.5, torch.where(z < 50, 100.0, z + 1))

    init = torch.tensor([[1.0], [100.0]], dtype=torch.float64)
    for start in (init[:1, 0], init):
        solver = Picard(rtol=0.02, batch_dim=None if start.ndim == 1 else 0)
        z, stats = solver(f, start, None)
        assert (z == 100).all()
        assert (stats.residual_norm == 1).all()
        assert (stats.result == int(hf.RESULTS.success)).all()
        assert stats.num_steps.reshape(-1).tolist() == [2, 0][: len(start)]


@pytest.mark.parametrize("make", [Anderson, Broyden])
@pytest.mark.parametrize(
    ("norms", "restarted"),
    [
        # later than memory steps after the start or the last restart
        ([1, 0.9, 0.5, 9, 0.8], []),
        ([1, 0.9, 0.5, 0.8, 9, 0.8], [4]),
        ([1, 0.9, 0.5, 0.8, 9, 8, 8, 8, 8, 8, 0.8], [4, 9]),
        # above 10 times the smallest
        ([1, 0.9, 0.5, 0.8, 0.7, 4.9, 0.8], []),
        ([1, 0.9, 0.5, 0.8, 0.7, 5.1, 0.8], [5]),
    ],
)
def test_when_a_memory_is_forgotten(make: Any, norms: list[float], restarted: list[int]) -> None:
    """For residuals of given norms: a plain step from the best iterate instead of another one."""
    directions = with_norm(randn(len(norms), N), 1.0)
    residuals = [r / r.norm() * norm for r, norm in zip(directions, norms, strict=True)]
    f: Any = Recorder(lambda z, h: z + residuals[len(f.points) - 1])
    z, _ = exact(make(memory=3), len(norms))(f, torch.zeros(N, dtype=torch.float64), None)
    plain = f.points[2] + residuals[2]
    steps = [k for k, z in enumerate((*f.points[1:], z)) if k > 2 and torch.allclose(z, plain)]
    assert steps == restarted


def test_broyden_leaves_out_updates_by_rounding_errors() -> None:
    """With a skew-symmetric Jacobian the first denominator is zero, but for rounding."""
    M, h = randn(N, N, seed=2), randn(N, seed=3)
    skew = 0.5 * (M - M.T)
    z, _ = exact(Broyden(), 2)(lambda z, h: z + z @ skew.T + h, torch.zeros_like(h), h)
    torch.testing.assert_close(z, h + h @ skew.T + h, rtol=1e-9, atol=1e-9)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_inner_solvers_carry_their_condition_and_compose(name: str) -> None:
    A, h = with_norm(randn(4, 4), 0.8), randn(4, seed=2)

    def f(z: Tensor, h: Tensor, A: Tensor) -> Tensor:
        return A @ z + h * h

    solver = dataclasses.replace(SOLVERS[name], rtol=1e-14)
    solve = solver.inner_solver(f, init=lambda h, A: torch.zeros_like(h))
    inverse = torch.linalg.inv(torch.eye(4, dtype=A.dtype) - A)
    fn = hf.implicit_diff(solve, method=hf.GMRES(rtol=1e-14))
    J = inverse @ torch.diag(2 * h)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(fn(h, A), inverse @ (h * h))
    close(jacrev(fn)(h, A), J)
    close(jacfwd(fn)(h, A), J)
    close(grad(lambda h: fn(h, A).sum())(h), J.sum(0))
    close(hessian(lambda h: fn(h, A).sum())(h), torch.diag(2 * inverse.sum(0)))
    H = torch.stack([h, 2 * h, -h])
    close(vmap(jacrev(fn), (0, None))(H, A), torch.stack([inverse @ torch.diag(2 * v) for v in H]))
    leaf = h.clone().requires_grad_()
    fn(leaf, A).sum().backward()
    close(leaf.grad, J.sum(0))
    hypergrad = hf.hypergrad(solve, lambda z, h, A: z.sum(), method="gmres")
    close(vmap(hypergrad, (0, None))(H, A), torch.stack([2 * v * inverse.sum(0) for v in H]))


@pytest.mark.parametrize("name", [name for name in SOLVERS if "newton" not in name])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_differentiating_through_the_steps(name: str, batch_dim: int | None) -> None:
    solver = dataclasses.replace(SOLVERS[name], rtol=1e-13, batch_dim=batch_dim)
    solve = solver.inner_solver(cell, init=lambda h, x: torch.zeros_like(x))
    outer = lambda z, h, x: z.sin().sum()  # noqa: E731
    exact = hf.hypergrad(solve, outer, method=hf.GMRES(rtol=1e-14))(W, X)
    unrolled = hf.hypergrad(solve, outer, method="reverse_unroll")(W, X)
    torch.testing.assert_close(unrolled, exact, rtol=1e-8, atol=1e-8)


def test_newton_refuses_to_be_differentiated_and_runs_without_a_record() -> None:
    solve = lambda h: Newton()(cell, torch.zeros_like(X), h, X)[0].sum()  # noqa: E731
    leaf = W.clone().requires_grad_()
    for call in (lambda: solve(leaf), lambda: grad(solve)(W), lambda: jacfwd(solve)(W)):
        with pytest.raises(ValueError, match=r"Newton: its steps .* Use hf\.implicit_diff"):
            call()
    with pytest.raises(ValueError, match="fixed_point closes over a tensor that requires grad"):
        Newton()(lambda z, h: cell(z, leaf, X), torch.zeros_like(X), None)
    with torch.no_grad():
        assert torch.equal(solve(leaf), solve(W))


def test_calls_are_pure() -> None:
    init = torch.zeros_like(X)
    for solver in SOLVERS.values():
        first = solver(cell, init, W, X)[0]
        assert torch.equal(first, solver(cell, init, W, X)[0])
        assert not init.any()
        assert not first.requires_grad


# Values and errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_objects_are_values(name: str) -> None:
    solver = SOLVERS[name]
    for twin in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert twin == solver
        assert hash(twin) == hash(solver)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.maxiter = 3


def same(z: Any, h: Any) -> Any:
    return z


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "maxiter": (lambda: Picard(-1), ValueError, "Picard: maxiter is -1; expected an integer >= 0"),
    "rtol": (lambda: Broyden(rtol=-1.0), ValueError, "Broyden: rtol is -1.0; expected a finite"),
    "step size": (lambda: Anderson(step_size=0), ValueError, "Anderson: step_size is 0; expected"),
    "memory": (lambda: Anderson(memory=0), ValueError, "Anderson: memory is 0; expected"),
    "ridge": (lambda: Anderson(ridge=-1.0), ValueError, "Anderson: ridge is -1.0; expected"),
    "batch_dim": (lambda: Picard(batch_dim=True), TypeError, "batch_dim is True; expected an int"),
    "linear solver": (
        lambda: Newton(linear_solver=hf.CG),
        TypeError,
        r"Newton: linear_solver is the class CG; expected an object. Write hf.CG\(\)",
    ),
    "no tensor": (
        lambda: Picard()(same, {"a": 1.0}, None),
        TypeError,
        r"init\['a'\] is 1.0 of type float; expected a floating-point tensor",
    ),
    "structure": (
        lambda: Picard()(lambda z, h: [z], torch.zeros(2), None),
        ValueError,
        "the output of fixed_point has another structure than params",
    ),
    "shape": (
        lambda: Picard()(lambda z, h: {"a": z["a"][:1]}, {"a": torch.zeros(2)}, None),
        ValueError,
        r"the leaf for params\['a'\] has shape \(1,\), expected \(2,\)",
    ),
    "no dimension": (
        lambda: Picard(batch_dim=0)(same, [torch.zeros(2), torch.zeros(())], None),
        ValueError,
        r"init\[1\] has shape \(\), without dimension 0; .* Write batch_dim=None",
    ),
    "unequal dimension": (
        lambda: Picard(batch_dim=0)(same, [torch.zeros(2), torch.zeros(3, 2)], None),
        ValueError,
        r"init\[0\] has shape \(2,\) and init\[1\] has shape \(3, 2\); expected the same size",
    ),
    "init": (
        lambda: Picard().inner_solver(same, init=torch.zeros(2)),  # type: ignore[arg-type]
        TypeError,
        "init is <tensor.* of type Tensor; expected a function",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("solver", [Anderson(8, rtol=0, memory=2), Broyden(8, rtol=0, memory=2)])
def test_a_full_memory_has_the_gradient_of_each_task(solver: Any) -> None:
    def total(solve: Any, W: Tensor) -> Tensor:
        return (solve(torch.arange(12.0).double().sin().reshape(3, 4), W) ** 2).sum()

    def solve(x: Tensor, W: Tensor) -> Tensor:
        return solver(lambda z, W: torch.tanh(W @ z + x), torch.zeros(4).double(), W)[0]

    W = (torch.arange(16.0).double().cos() / 3).reshape(4, 4).requires_grad_()
    mapped = torch.autograd.grad(total(torch.func.vmap(solve, (0, None)), W), W)
    one_by_one = torch.autograd.grad(
        total(lambda X, W: torch.stack([solve(x, W) for x in X]), W), W
    )
    torch.testing.assert_close(mapped, one_by_one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()], ids=repr)
def test_integers_in_the_state_are_constants(solver: Any) -> None:
    def f(z: Any, h: Tensor) -> Any:
        moved = torch.where(z["mask"], torch.cos(h * z["z"]), 0.3 * z["z"])
        return {"z": moved, "mask": z["mask"], "count": z["count"] + 1}

    init = {"z": torch.ones(2).double(), "mask": torch.tensor([True, False])}
    init["count"] = torch.tensor(2)
    solve = solver.inner_solver(f, init=lambda h: init)
    h = torch.tensor(0.7).double()
    z = solve(h)
    assert (z["mask"].tolist(), z["count"].item()) == ([True, False], 2)
    alone, _ = solver(lambda z, h: torch.cos(h * z), torch.ones(()).double(), h)
    torch.testing.assert_close(z["z"], torch.stack([alone, 0 * alone]), rtol=1e-9, atol=1e-9)
    slope = vmap(grad(lambda h: hf.implicit_diff(solve, method="gmres")(h)["z"].sum()))(h[None])
    sine = torch.sin(h * alone)
    torch.testing.assert_close(slope[0], -sine * alone / (1 + h * sine), rtol=1e-6, atol=1e-6)
