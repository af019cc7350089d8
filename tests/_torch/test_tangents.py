"""Derivatives in forward mode have the dtype of what they are derivatives of, at every order."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf
from hyperfunc._torch.tangents import in_own_dtype
from tests.cells import slow_but

F32 = torch.float32


def quartic(h: Tensor) -> Tensor:
    return in_own_dtype(2.0 * h * h) ** 2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_all_orders_are_right(order: int) -> None:
    h, expected = torch.tensor(0.5), {1: 16 * 0.5**3, 2: 48 * 0.5**2, 3: 96 * 0.5}[order]
    for outermost in (jacfwd, jacrev):
        fn = quartic
        for _ in range(order - 1):
            fn = jacfwd(fn)
        value = outermost(fn)(h)
        assert value.dtype == F32
        assert float(value) == pytest.approx(expected, rel=1e-6)
        assert torch.equal(vmap(outermost(fn))(h.expand(3)), value.expand(3))


X, Y = torch.randn(12, 3, generator=torch.manual_seed(0)), torch.linspace(-1, 1, 12)
H = {"reg": torch.tensor(-1.0), "lr": torch.tensor(0.05)}


def loss(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + (2.0 * h["reg"] + 1.0).exp() * (w**2).sum() * 0.1


def outer(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return (w**2).sum() + 0.5 * h["reg"] ** 2


def steps(optimizer: Any, loss: Any = loss) -> Any:
    return hf.minimize(loss, optimizer, 4, init=lambda h: torch.zeros(3, dtype=h["lr"].dtype))


SOLVERS = {
    "adam": lambda: steps(hf.optim.adam(lr=lambda h: 2.0 * h["lr"])),
    "adam, betas": lambda: steps(
        hf.optim.adam(lr=lambda h: 2.0 * h["lr"], betas=(lambda h: 0.9 + 0.01 * h["reg"], 0.99))
    ),
    "rmsprop": lambda: steps(hf.optim.rmsprop(lr=lambda h: 2.0 * h["lr"])),
    "sgd, momentum": lambda: steps(
        hf.optim.sgd(lr=lambda h: 2.0 * h["lr"], momentum=lambda h: 0.5 * h["lr"].exp())
    ),
    "heavy ball": lambda: steps(
        hf.optim.heavy_ball(lr=lambda h: 2.0 * h["lr"], momentum=lambda h: 0.1 * h["lr"])
    ),
    "proximal": lambda: steps(
        hf.optim.sgd(lr=0.1),
        hf.proximal(loss, lambda h: 2.0 * h["lr"], center=lambda h: torch.zeros(3) * h["reg"]),
    ),
    "map": lambda: hf.iterate(
        hf.gradient_descent_map(loss, lambda h: 2.0 * h["lr"]), 4, init=lambda h: torch.zeros(3)
    ),
}


@pytest.mark.parametrize("name", slow_but(next(iter(SOLVERS)), of=SOLVERS))
def test_float32_stays_float32(name: str) -> None:
    for method in ("reverse_unroll", "reverse", "forward"):
        fn = hf.hypergrad(SOLVERS[name](), outer, method=method)
        reference = jacrev(fn)(H)
        found = {"jacfwd": jacfwd(fn)(H), "vmap": vmap(jacfwd(fn))(_stacked(H))}
        _, found["jvp"] = jvp(fn, (H,), (H,))
        for route, tree in found.items():
            for leaf in torch.utils._pytree.tree_leaves(tree):
                assert leaf.dtype == F32, (method, route)
        torch.testing.assert_close(found["jacfwd"], reference, rtol=1e-3, atol=1e-4)


def test_implicit_methods_too() -> None:
    solve = hf.minimize(loss, hf.optim.sgd(lr=0.1), 300, init=lambda h: torch.zeros(3))
    fn = hf.hypergrad_and_value(solve, outer)
    (grads, value), (d_grads, d_value) = jvp(fn, (H,), (H,))
    assert {leaf.dtype for leaf in (*grads.values(), *d_grads.values(), value, d_value)} == {F32}
    expected = sum(float((H[k] * grads[k]).sum()) for k in H)
    assert float(d_value) == pytest.approx(expected, rel=1e-4)
    second = jacrev(hf.hypergrad(solve, outer))(H)["reg"]["reg"]
    forward = jacfwd(hf.hypergrad(solve, outer))(H)["reg"]["reg"]
    assert forward.dtype == F32
    assert float(forward) == pytest.approx(float(second), rel=1e-3)
    assert grad(lambda h: hf.implicit_diff(solve)(h)[0])(H)["reg"].dtype == F32


def _stacked(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.expand(2) for name, leaf in tree.items()}
