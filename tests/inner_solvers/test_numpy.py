"""Inner solvers of NumPy arrays: SciPy and scikit-learn, dtypes, tasks, folds, purity."""

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import Ridge
from torch.func import grad, jacrev, vmap

import hyperfunc as hf

F64 = torch.float64
generator = torch.Generator().manual_seed(0)
X = torch.randn(23, 3, generator=generator, dtype=F64)
Y = torch.randn(23, generator=generator, dtype=F64)


def ridge_loss(w, h, X, y, weights):
    return (weights * (X @ w["w"] - y) ** 2).sum() / 2 + h["log_reg"].exp() * (
        w["w"] ** 2
    ).sum() / 2


def outer_loss(w, h, X, y, weights):
    return ((1 - weights) * (X @ w["w"] - y) ** 2).sum() / (1 - weights).sum()


@hf.from_numpy
def ridge(h, X, y, weights):
    model = Ridge(alpha=np.exp(h["log_reg"]), fit_intercept=False, solver="cholesky", tol=1e-12)
    return {"w": model.fit(X, y, weights).coef_}


@hf.from_numpy
def lbfgs(h, X, y, weights):
    def fun(w):
        r = X @ w - y
        reg = np.exp(h["log_reg"])
        return weights @ r**2 / 2 + reg * w @ w / 2, X.T @ (weights * r) + reg * w

    found = scipy.optimize.minimize(fun, np.zeros(3), jac=True, tol=1e-12)
    return {"w": found.x}, {"steps": found.nit, "value": found.fun, "message": found.message}


def closed_form(h, X, y, weights):
    A = X.T @ (weights[:, None] * X) + h["log_reg"].exp() * torch.eye(3, dtype=X.dtype)
    return {"w": torch.linalg.solve(A, X.T @ (weights * y))}


def folds():
    """Four folds of unequal size as weights of the samples."""
    held_out = torch.arange(23) % 4
    return (held_out != torch.arange(4)[:, None]).to(F64)


def test_solvers_of_scipy_and_scikit_learn_over_folds_of_unequal_size():
    h = {"log_reg": torch.tensor(0.3, dtype=F64)}
    weights = folds()
    assert len(set(weights.sum(1).tolist())) > 1
    exact = hf.hypergrad(closed_form, outer_loss, method="reverse_unroll")
    expected = vmap(exact, in_dims=(None, None, None, 0))(h, X, Y, weights)
    for solver, has_aux in ((ridge, False), (lbfgs, True)):
        fn = hf.hypergrad_and_solution(
            solver, outer_loss, inner_loss=ridge_loss, solver_has_aux=has_aux
        )
        # a list of tasks, of which each holds its own samples alone
        for fold in range(4):
            mine = weights[fold] > 0
            params = solver(h, X[mine], Y[mine], weights[fold][mine])
            params = params[0] if has_aux else params
            exact_params = closed_form(h, X, Y, weights[fold])
            torch.testing.assert_close(params, exact_params, rtol=1e-6, atol=1e-6)

        def run(*args, fn=fn, has_aux=has_aux):
            grads, solution = fn(*args)  # whose text no vmap returns
            return grads, solution.solver_aux["steps"] if has_aux else torch.tensor(0)

        mapped = hf.task_map if has_aux else vmap
        grads, steps = mapped(run, in_dims=(None, None, None, 0))(h, X, Y, weights)
        torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
        if has_aux:
            alone = [lbfgs(h, X, Y, fold)[1]["steps"] for fold in weights]
            assert steps.dtype == torch.int64
            assert steps.tolist() == [int(step) for step in alone]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_numbers_come_back_in_the_dtype_of_hparams(dtype):
    seen = []

    @hf.from_numpy
    def solver(h, data, flag):
        seen.append((h["a"].dtype, data.dtype, flag))
        w = (h["a"] * data).astype(np.float64)[::-1]
        return {"w": w, "count": np.int64(3), "more": (np.float64(w.sum()), 2.5, np.True_)}

    h = {"a": torch.tensor(2.0, dtype=dtype)}
    result = solver(h, torch.arange(3), "text")
    numpy_dtype = np.float64 if dtype == torch.float64 else np.float32
    assert seen == [(numpy_dtype, np.int64, "text")]
    assert result["w"].dtype == result["more"][0].dtype == result["more"][1].dtype == dtype
    assert result["w"].tolist() == [4.0, 2.0, 0.0]
    assert result["count"].dtype == torch.int64
    assert result["more"][2].dtype == torch.bool


def test_it_is_pure_and_differentiable():
    @hf.implicit_diff(optimality=lambda w, a, b: w**2 - a * b)
    @hf.from_numpy
    def root(a, b):
        a *= b  # writes to its own copy
        return np.sqrt(a)

    a, b = torch.tensor([4.0, 9.0], dtype=F64), torch.tensor(2.0, dtype=F64)
    torch.testing.assert_close(root(a, b), (a * b).sqrt())
    assert a.tolist() == [4.0, 9.0]
    torch.testing.assert_close(jacrev(root)(a, b), torch.diag((b / a).sqrt() / 2))
    hessians = vmap(grad(grad(root)), in_dims=(0, None))(a, b)
    torch.testing.assert_close(hessians, -b.sqrt() / 4 * a**-1.5)
    assert repr(hf.from_numpy(np.sqrt)) == "from_numpy(sqrt)"


def test_errors():
    with pytest.raises(TypeError, match="from_numpy: solver is 3 of type int; expected a function"):
        hf.from_numpy(3)
    with pytest.raises(TypeError, match=r"the solver returned an array of dtype object; expected"):
        hf.from_numpy(lambda h: np.array([None, 1.0]))(torch.ones(2))
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo; expected dense ones"):
        hf.from_numpy(lambda h, x: h)(torch.ones(2), torch.ones(2).to_sparse())
    fn = hf.hypergrad(ridge, outer_loss, method="reverse_unroll")
    with pytest.raises(ValueError, match=r"no derivative reaches hparams: .* NumPy"):
        fn({"log_reg": torch.zeros((), dtype=F64)}, X, Y, folds()[0])
