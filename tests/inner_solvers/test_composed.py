"""Gauss-Newton products of composed losses against matrices made by torch.func."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf

F64 = torch.float64
N, M = 6, 5
MU = 0.1


def model(w: Any, h: Any, x: Tensor) -> Any:
    hidden = torch.tanh(x[:, None] * w["in"] + h["shift"])
    return {"y": hidden @ w["out"], "first": hidden[:, 0]}


def loss(outputs: Any, h: Any, x: Tensor) -> Tensor:
    error = outputs["y"] - h["scale"] * x.sin()
    return h["weight"].exp() * error.cosh().sum() + (outputs["first"] ** 4).sum()


def outer_loss(w: Any, h: Any, x: Tensor) -> Tensor:
    return (w["in"] ** 2).sum() + (w["out"] ** 3).sum() + h["shift"].sum()


def center(h: Any) -> Any:
    return {"in": torch.zeros_like(h["shift"]), "out": h["shift"]}


def problem() -> tuple[Any, Any]:
    w = {key: torch.randn(N, dtype=F64) for key in ("in", "out")}
    h = {key: torch.rand((), dtype=F64) for key in ("scale", "weight")}
    return w, {"shift": torch.randn(N, dtype=F64), **h}


X = torch.linspace(-2, 2, M, dtype=F64)
INNER_LOSS = hf.proximal(hf.composed(model, loss), MU, center)
INNER_WITHOUT_DATA = hf.proximal(
    hf.composed(lambda w, h: model(w, h, X), lambda out, h: loss(out, h, X)), MU, center
)


def unflat(v: Tensor) -> Any:
    return {"in": v[:N], "out": v[N:]}


def by_matrices(w: Any, h: Any) -> tuple[Tensor, Any]:
    """The true Hessian, and the hypergradient with Gauss-Newton's matrix in its place."""

    def outputs(v: Tensor, h: Any) -> Tensor:
        out = model(unflat(v), h, X)
        return torch.cat([out["y"], out["first"]])

    def total(out: Tensor, h: Any) -> Tensor:
        return loss({"y": out[:M], "first": out[M:]}, h, X)

    v = torch.cat([w["in"], w["out"]])
    J = jacrev(outputs)(v, h)
    G = J.mT @ hessian(total)(outputs(v, h), h) @ J + MU * torch.eye(2 * N, dtype=F64)
    value = lambda v, h: INNER_LOSS(unflat(v), h, X)  # noqa: E731
    cross = jacrev(grad(value), argnums=1)(v, h)
    u = torch.linalg.solve(G, grad(lambda v: outer_loss(unflat(v), h, X))(v))
    direct = grad(outer_loss, argnums=1)(w, h, X)
    through = {key: (u @ cross[key].reshape(2 * N, -1)).reshape_as(h[key]) for key in h}
    return hessian(value)(v, h), {key: direct[key] - through[key] for key in h}


METHODS = {
    "cg": hf.CG(rtol=1e-13),
    "dense": hf.Dense(),
    "gmres": hf.GMRES(rtol=1e-13),
    "normal_cg": hf.NormalCG(rtol=1e-14),
    "auto": "auto",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_hypergradients_are_those_by_matrices(method: Any) -> None:
    tasks = [problem() for _ in range(3)]
    w, h = ({key: torch.stack([t[i][key] for t in tasks]) for key in tasks[0][i]} for i in (0, 1))

    def hypergrad(w: Any, h: Any) -> Any:
        solver = lambda h, w, x: {key: leaf.clone() for key, leaf in w.items()}  # noqa: E731
        fn = hf.hypergrad(
            solver, lambda w, h, _, x: outer_loss(w, h, x), inner_loss=inner_loss, method=method
        )
        return fn(h, w, X)

    inner_loss = hf.proximal(
        hf.composed(lambda w, h, _, x: model(w, h, x), lambda o, h, _, x: loss(o, h, x)), MU, center
    )
    expected = [by_matrices(*task) for task in tasks]
    assert any((torch.linalg.eigvalsh(H) < -0.1).any() for H, _ in expected)
    batched = vmap(hypergrad)(w, h)
    tolerance = 1e-4 if method == "auto" else 1e-8
    for index, (task, (_, grads)) in enumerate(zip(tasks, expected, strict=True)):
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(hypergrad(*task), grads, **close)
        torch.testing.assert_close({k: g[index] for k, g in batched.items()}, grads, **close)


def test_a_diagnosis_is_that_of_the_matrix_that_is_solved_with() -> None:
    w, h = problem()
    identity = torch.eye(2 * N, dtype=F64)
    keywords = {"inner_loss": INNER_WITHOUT_DATA, "num_steps": 2 * N}
    facts = hf.diagnose(w, h, **keywords)

    def adjoint(unit: Tensor) -> Tensor:
        fn = hf.hypergrad_and_solution(
            lambda h: {key: leaf.clone() for key, leaf in w.items()},
            lambda w, h: w["in"] @ unit[:N] + w["out"] @ unit[N:],
            inner_loss=INNER_WITHOUT_DATA,
            method="dense",
        )
        u = fn(h)[1].adjoint
        return torch.cat([u["in"], u["out"]])

    inverse = torch.stack([adjoint(unit) for unit in identity])
    values = 1 / torch.linalg.eigvalsh(inverse).flip(0)
    assert (torch.linalg.eigvalsh(by_matrices(w, h)[0]) < 0).any()
    torch.testing.assert_close(facts.eig_min.value, values[0])
    torch.testing.assert_close(facts.eig_max.value, values[-1])
    assert isinstance(facts.method, (hf.CG, hf.Dense))
    residual = grad(lambda w: INNER_LOSS(w, h, X))(w)
    size = torch.cat([residual["in"], residual["out"]]).norm()
    torch.testing.assert_close(facts.residual.value, size)


def test_derivatives_of_every_kind_where_the_data_are_fitted() -> None:
    """There the matrix is the Hessian, for all hparams, so second derivatives are exact too."""
    A = torch.eye(3, dtype=F64) + 0.3 * torch.randn(3, 3, dtype=F64)

    def outputs(w: Tensor, h: Tensor) -> Tensor:
        return A @ (w + w**3) * (1 + h[0] ** 2)

    def squares(y: Tensor, h: Tensor) -> Tensor:
        return ((y - h) ** 2).sum()

    def solver(h: Tensor) -> Tensor:
        with torch.no_grad():
            right = torch.linalg.solve(A, h / (1 + h[0] ** 2))
            w = torch.zeros_like(right)
            for _ in range(60):
                w = w - (w + w**3 - right) / (1 + 3 * w**2)
        return w

    h = torch.randn(3, dtype=F64)
    gauss_newton, exact = (
        hf.implicit_diff(solver, inner_loss=inner_loss, method=hf.CG(rtol=1e-14))
        for inner_loss in (
            hf.composed(outputs, squares),
            lambda w, h: squares(outputs(w, h), h),
        )
    )
    orders = (jacrev, jacfwd, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacrev(f)))
    for transform in orders:
        torch.testing.assert_close(
            transform(gauss_newton)(h), transform(exact)(h), rtol=1e-8, atol=1e-8
        )
    leaf = h.clone().requires_grad_()
    (first,) = torch.autograd.grad(gauss_newton(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    expected = grad(lambda h: grad(lambda h: exact(h).sum())(h).square().sum())(h)
    torch.testing.assert_close(second, expected, rtol=1e-8, atol=1e-8)


def test_a_captured_tensor_of_the_model_is_told() -> None:
    lam = torch.ones(2, dtype=F64, requires_grad=True)
    inner_loss = hf.composed(lambda w, h: w * lam, lambda y, h: ((y - h) ** 2).sum())
    fn = hf.hypergrad(lambda h: h.clone(), lambda w, h: w.sum(), inner_loss=inner_loss)
    with pytest.raises(ValueError, match="inner_loss"):
        fn(torch.ones(2, dtype=F64))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="composed: model"):
        hf.composed(1.0, loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="composed: loss"):
        hf.composed(model, None)  # type: ignore[arg-type]
    bad = hf.composed(lambda w, h: w, lambda y, h: y)
    with pytest.raises(ValueError, match="inner_loss"):
        hf.hypergrad(lambda h: h.clone(), lambda w, h: w.sum(), inner_loss=bad)(torch.ones(2))


def test_params_may_hold_integers() -> None:
    A = torch.eye(3, dtype=F64) + 0.3 * torch.randn(3, 3, dtype=F64)
    model = lambda params, h: A @ params["w"] * params["scale"]  # noqa: E731
    loss = hf.composed(model, lambda outputs, h: ((outputs - h) ** 2).sum())
    h = torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def solver(h: Tensor) -> dict[str, Tensor]:
        return {"scale": torch.tensor(2), "w": torch.linalg.solve(2 * A, h)}

    value = hf.hypergrad(solver, lambda params, h: params["w"].sum(), inner_loss=loss)(h)
    torch.testing.assert_close(value, torch.linalg.solve(2 * A.T, torch.ones(3, dtype=F64)))
