"""Products as differences of gradients: the numbers of exact ones, from first derivatives alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map

import hyperfunc as hf
from tests.cells import each_cell, thinned
from tests.problems import CubeOnce

F64 = torch.float64
BY_DIFFERENCES: dict[str, Any] = {"products": "finite_difference"}

generator = torch.Generator().manual_seed(0)
X, y = (torch.randn(12, n, dtype=F64, generator=generator) for n in (4, 1))
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).to(F64)
apply, START = hf.functional(NET)
H = {"weight": torch.zeros(12, dtype=F64), "decay": torch.tensor(-2.0, dtype=F64)}


def errors(w: Any) -> Tensor:
    return (apply(w, X) - y).squeeze(1) ** 2


def inner_loss(w: Any, h: Any, *args: Any) -> Tensor:
    decay = h["decay"].exp() * sum((v**2).sum() for v in tree_leaves(w))
    return (h["weight"].exp() * errors(w)).mean() + decay


def outer_loss(w: Any, h: Any, *args: Any) -> Tensor:
    return errors(w).mean()


def close(got: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Of all leaves together, beside their size."""
    got, expected = (torch.cat([t.reshape(-1) for t in tree_leaves(v)]) for v in (got, expected))
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 1e-4


def start(*args: Any) -> Any:
    return START


def stack(tree: Any) -> Any:
    return tree_map(lambda leaf: torch.stack([leaf, 1.1 * leaf]), tree)


SOLVERS = {
    "adam": (hf.minimize(inner_loss, hf.optim.adam(0.05), 15, init=start), H),
    "map": (hf.iterate(hf.gradient_descent_map(inner_loss, 0.1), 15, init=start), H),
    "proximal": (
        hf.minimize(
            hf.proximal(lambda w, h: errors(w).mean(), 0.5),
            hf.optim.sgd(0.1),
            15,
            init=lambda h: h,
        ),
        dict(START),
    ),
}
GMRES = hf.GMRES(maxiter=4, rtol=0, atol=0)
METHODS = ["reverse_unroll", hf.Reverse("sqrt"), GMRES, hf.StochasticAID(5, hf.optim.sgd(0.01))]


@pytest.mark.parametrize(("name", "some"), thinned(SOLVERS, [0, 1]))
def test_hypergradients_are_those_of_exact_products(name: str, some: int) -> None:
    solver, h = SOLVERS[name]
    with each_cell() as cell:
        for method in METHODS[some::2]:
            options: dict[str, Any] = {"method": method, "throw": False}
            exact = hf.hypergrad(solver, outer_loss, **options)
            fn = hf.hypergrad(solver, outer_loss, **options, **BY_DIFFERENCES)
            expected = exact(h)
            with cell(method, "alone"):
                close(fn(h), expected)
            with cell(method, "vmap"):
                close(vmap(fn)(stack(h)), vmap(exact)(stack(h)))
            solve = hf.implicit_diff(solver, **options, **BY_DIFFERENCES)
            with cell(method, "grad"):
                close(grad(lambda h, f=solve: outer_loss(f(h), h))(h), expected)
            with cell(method, "backward"):
                tracked = tree_map(lambda leaf: leaf.clone().requires_grad_(), h)
                outer_loss(solve(tracked), tracked).backward()
                close(tree_map(lambda leaf: leaf.grad, tracked), expected)


def test_derivatives_of_hypergradients() -> None:
    solver, h = SOLVERS["adam"]

    def slope(**options: Any) -> Callable[[Tensor], Any]:
        fn = hf.hypergrad(solver, outer_loss, method=GMRES, throw=False, **options)
        return jacrev(lambda decay: fn({**h, "decay": decay})["weight"])

    close(slope(**BY_DIFFERENCES)(h["decay"]), slope()(h["decay"]), 1e-4)


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "cg"])
def test_code_without_a_second_derivative(method: str) -> None:
    def fn(cube: Callable[[Tensor], Tensor], **options: Any) -> Any:
        solver = hf.minimize(
            lambda w, h: h * cube(w).sum() / 3 + ((w - 1) ** 2).sum(),
            hf.optim.adam(0.05),
            30,
            init=lambda h: torch.full((3,), 0.5, dtype=F64),
        )
        return hf.hypergrad(solver, lambda w, h: cube(w).sum(), method=method, **options)

    h = torch.tensor(0.3, dtype=F64)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        fn(CubeOnce.apply)(h)
    close(fn(CubeOnce.apply, **BY_DIFFERENCES)(h), fn(lambda x: x**3)(h), 1e-8)


def test_what_the_loss_does_not_use_keeps_its_value_and_integers_go_along() -> None:
    start = {
        "used": torch.ones(2, dtype=F64),
        "unused": torch.ones(2, dtype=F64),
        "count": torch.tensor(3),
    }
    solver = hf.minimize(
        lambda w, h: ((w["used"] ** 2) * h * w["count"]).sum(),
        hf.optim.adamw(0.1, weight_decay=0.5),
        4,
        init=lambda h: start,
        trace=True,
    )
    outer = lambda w, h: (w["used"] ** 3).sum() + (w["unused"] * h).sum()  # noqa: E731
    h = torch.tensor(0.7, dtype=F64)
    fns = [
        hf.hypergrad_and_solution(solver, outer, method="reverse", **options)
        for options in ({}, BY_DIFFERENCES)
    ]
    (exact, _), (got, solution) = fns[0](h), fns[1](h)
    close(got, exact, 1e-8)
    assert torch.equal(solution.params["unused"], start["unused"])
    losses = vmap(lambda h: fns[1](h)[1].solver_aux.losses)(torch.stack([h, h]))
    torch.testing.assert_close(losses[1], solution.solver_aux.losses)
    torch.testing.assert_close(losses[0, 0], torch.tensor(4.2, dtype=F64))


LOOPS = {
    "soba": (hf.bilevel.soba, {}, 1),
    "saba": (hf.bilevel.saba, {"num_inner_batches": 1, "num_outer_batches": 1}, 1),
    "stocbio": (hf.bilevel.stocbio, {"num_inner_steps": 2, "num_adjoint_steps": 3}, 6),
    "amigo": (hf.bilevel.amigo, {"num_inner_steps": 2, "num_adjoint_steps": 3}, 6),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    make, settings, batches = LOOPS[name]

    def run(**options: Any) -> Any:
        rates = {"inner_lr": 0.1, "outer_lr": 0.1}
        loop = make(inner_loss, outer_loss, **rates, **settings, **options)
        state = loop.init(START, H)
        indices = (torch.tensor(0), torch.tensor(0)) if name == "saba" else ()
        batch = (torch.zeros(batches),)
        for _ in range(3):
            state = loop.update(state, batch, (torch.zeros(1),), *indices)
        return state

    got, expected = run(**BY_DIFFERENCES), run()
    close(got.adjoint, expected.adjoint)
    close(got.hparams, expected.hparams)


def test_diagnose_and_check() -> None:
    solver, h = SOLVERS["proximal"]
    w = solver(h)
    loss = solver.condition[1]
    facts, expected = (
        hf.diagnose(w, h, inner_loss=loss, **options) for options in (BY_DIFFERENCES, {})
    )
    close(facts.eig_min.value, expected.eig_min.value)
    close(facts.eig_max.value, expected.eig_max.value)


def test_a_product_that_is_far_off_warns() -> None:
    scale = torch.tensor(1e-6, dtype=F64)
    solver = hf.minimize(
        lambda w, h: (torch.cos(w / scale) * scale**2).sum() + h * (w**2).sum(),
        hf.optim.sgd(0.1),
        2,
        init=lambda h: torch.full((2,), 0.3, dtype=F64),
    )
    fn = hf.hypergrad(solver, lambda w, h: (w**2).sum(), method="reverse", **BY_DIFFERENCES)
    h = torch.tensor(0.3, dtype=F64)
    with pytest.warns(RuntimeWarning, match="products='finite_difference': a product is off by"):
        fn(h)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.hypergrad(SOLVERS["adam"][0], outer_loss, method="reverse", **BY_DIFFERENCES)(H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The points of the difference are summed in float32 and rounded to the dtype of params."""
    scales = torch.linspace(0.5, 2.0, 8).to(dtype)

    def solver_of(dtype: torch.dtype) -> Any:
        return hf.minimize(
            lambda w, h: ((w - h) ** 2 * scales.to(dtype)).sum() / 2,
            hf.optim.sgd(0.4),
            5,
            init=lambda h: torch.zeros(8, dtype=dtype),
        )

    outer = lambda w, h: (w**2).sum()  # noqa: E731
    exact = hf.hypergrad(solver_of(F64), outer, method="reverse")(torch.ones(8, dtype=F64))
    fn = hf.hypergrad(solver_of(dtype), outer, method="reverse", **BY_DIFFERENCES)
    got = fn(torch.ones(8, dtype=dtype))
    assert got.dtype is dtype
    close(got.to(F64), exact, 1e-3 if dtype is torch.float32 else 0.1)


def test_errors() -> None:
    solver, _ = SOLVERS["adam"]
    with pytest.raises(ValueError, match="products is 'both'; expected 'reverse' or 'finite_diff"):
        hf.hypergrad(solver, outer_loss, products="both")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"no use for ForwardMode.*Take method='reverse'"):
        hf.hypergrad(solver, outer_loss, method="forward", **BY_DIFFERENCES)
    for opaque in (start, hf.iterate(lambda w, h: w, 3, init=start)):
        with pytest.raises(
            ValueError, match=r"is for solvers made by hf.minimize, or by hf.iterat"
        ):
            hf.implicit_diff(opaque, method="reverse", **BY_DIFFERENCES)
    with pytest.raises(ValueError, match="products is None"):
        hf.bilevel.soba(inner_loss, outer_loss, inner_lr=1.0, outer_lr=1.0, products=None)  # type: ignore[arg-type]
    variable = torch.ones((), dtype=F64, requires_grad=True)
    captured = hf.implicit_diff(
        start, inner_loss=lambda w, h: variable * inner_loss(w, h), **BY_DIFFERENCES
    )
    with pytest.raises(ValueError, match="inner_loss closes over"):
        captured(H)


def test_hparams_that_nothing_uses_are_told() -> None:
    """As with exact products: zeros that no derivative reaches are no answer."""
    fn = hf.hypergrad(
        start,
        lambda w, h: errors(w).mean(),
        inner_loss=lambda w, h: errors(w).mean(),
        method=GMRES,
        **BY_DIFFERENCES,
    )
    with pytest.raises(ValueError, match="no derivative reaches hparams"):
        fn(H)
    solve = hf.implicit_diff(
        start, inner_loss=lambda w, h: errors(w).mean(), method=GMRES, throw=False, **BY_DIFFERENCES
    )
    tracked = tree_map(lambda leaf: leaf.clone().requires_grad_(), H)
    with pytest.warns(UserWarning, match="no derivative reaches hparams"):
        errors(solve(tracked)).mean().backward()
