"""What functions use without taking it as an argument, decided by what the graph reaches."""

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import hyperfunc as hf
from tests.cells import each_cell, slow_but

C = torch.tensor(2.0, dtype=torch.float64)
H = torch.tensor(3.0, dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)

Get = Callable[[], Any]


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Property:
    def __init__(self, value: Tensor) -> None:
        self._kept = value

    @property
    def value(self) -> Tensor:
        return self._kept


# Ways to hold a tensor, most of them where no look at a closure finds it.
HOLDERS: dict[str, Callable[[Tensor], Get]] = {
    "variable": lambda c: lambda: c,
    "deque": lambda c: (lambda held: lambda: held[0])(collections.deque([c])),
    "set": lambda c: (lambda held: lambda: next(iter(held)))({c}),
    "slots": lambda c: (lambda held: lambda: held.value)(Slots(c)),
    "property": lambda c: (lambda held: lambda: held.value)(Property(c)),
    "getattr": lambda c: (lambda held: lambda: getattr(held, "_ke" + "pt"))(Property(c)),
}
# Uses that carry no derivative. All of them, and those that do, compute with the number 2.
CONSTANT_USES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda c: c.detach(),
    "detached clone": lambda c: c.detach().clone(),
    "item": lambda c: c.item(),
    "shape": lambda c: c.dim() + len(c.shape) + 2.0,
}


def at(place: str, get: Get) -> tuple[Any, dict[str, Any], Any]:
    """An inner solver, its condition and an outer loss, one of which uses what ``get`` gives."""
    zero, one = lambda: 0 * H, lambda: 1.0
    used = {name: get if name == place else one for name in ("step", "init", "outer loss")}
    if place == "solver":
        return (
            lambda h: 1.5 * h * get(),
            {"optimality": lambda w, h: w - 3 * h},
            lambda w, h: w**2,
        )
    return (
        hf.iterate(
            lambda w, h: 0.5 * w + h * used["step"](), 60, init=lambda h: zero() + used["init"]()
        ),
        {},
        lambda w, h: used["outer loss"]() * w**2,
    )


# The hypergradient at 3: of 9 h^2; of (2 h c)^2 with c = 2; of (2 h)^2; and of that twice.
RIGHT = {"solver": 54.0, "step": 96.0, "init": 24.0, "outer loss": 48.0}
NAMES = {
    ("solver", True): "the inner solver",
    ("step", True): "the inner solver",
    ("init", True): "the inner solver",
    ("step", False): "the inner solver's step",
    ("init", False): "the inner solver's init",
    ("outer loss", True): "outer_loss",
    ("outer loss", False): "outer_loss",
}
CELLS = [
    (place, method)
    for place in RIGHT
    for method in ("reverse_unroll", "reverse", "forward", "cg")
    if place != "solver" or method in ("reverse_unroll", "cg")
]


@pytest.mark.parametrize(("place", "method"), slow_but(*CELLS[::2], of=CELLS))
def test_what_is_used_counts_and_not_what_is_held(place: str, method: str) -> None:
    def hypergradient(c: Tensor, holder: str, use: Callable[[Tensor], Any]) -> Tensor:
        get = HOLDERS[holder](c)
        solver, condition, outer_loss = at(place, lambda: use(get()))
        fn = hf.hypergrad(solver, outer_loss, method=method, **condition)
        return fn(H)  # type: ignore[no-any-return]

    name = NAMES[place, method in ("reverse_unroll", "cg")]
    with each_cell() as cell:
        for holder in HOLDERS:
            for attached in (C.clone().requires_grad_(), 1.0 * C.clone().requires_grad_()):
                with cell("refused", holder), pytest.raises(ValueError, match=f"^{name} closes"):
                    hypergradient(attached, holder, lambda c: c)
        for use, function in CONSTANT_USES.items():
            for holder in ("variable", "deque"):
                with cell(use, holder):
                    value = hypergradient(C.clone().requires_grad_(), holder, function)
                    assert value.item() == pytest.approx(RIGHT[place], rel=1e-12)
                    value = hypergradient(1.0 * C.clone().requires_grad_(), holder, function)
                    assert value.item() == pytest.approx(RIGHT[place], rel=1e-12)
                with cell(use, holder, "inside grad"):
                    values = []

                    def inside(c: Tensor, holder: str = holder, fn: Any = function) -> Tensor:
                        values.append(hypergradient(c, holder, fn))  # noqa: B023
                        return c * values[-1]  # noqa: B023

                    assert grad(inside)(C).item() == pytest.approx(RIGHT[place], rel=1e-12)
        with cell("shape", "inside vmap"):
            value = vmap(lambda c: hypergradient(c, "variable", CONSTANT_USES["shape"]))(
                C.expand(2)
            )
            torch.testing.assert_close(value, torch.full_like(value, RIGHT[place]))


def test_inside_a_transform_a_derivative_arrives_or_is_refused() -> None:
    """The derivative by c of a hypergradient: of 8 c^2 h, 8 c h, or 4.5 c^2 h if unrolled."""
    arriving = {"step": 96.0, "outer loss": 24.0, "init": 0.0, "solver": 54.0}
    with each_cell() as cell:
        for place, method in CELLS:
            right = 0.0 if (place, method) == ("solver", "cg") else arriving[place]
            arrives = place == "outer loss" or method == "reverse_unroll"
            for holder in HOLDERS:
                with cell(place, method, holder):

                    def fn(c: Tensor, place: str = place, m: Any = method, w: str = holder) -> Any:
                        solver, condition, outer_loss = at(place, HOLDERS[w](c))
                        return hf.hypergrad(solver, outer_loss, method=m, **condition)(H)

                    try:
                        value = grad(fn)(C)
                    except ValueError as error:
                        if arrives or "closes over a tensor" not in str(error):
                            raise
                    else:
                        assert value.item() == pytest.approx(right, rel=1e-9, abs=1e-9)


def test_solvers_may_make_variables_of_their_own() -> None:
    """The inner loop that people write: a leaf variable, gradients of it, steps."""

    def solver(h: Tensor) -> Tensor:
        w = torch.zeros_like(h.detach(), requires_grad=True)
        for _ in range(5):
            (slope,) = torch.autograd.grad(((w - h) ** 2).sum(), w, create_graph=True)
            w = w - 0.1 * slope
        return w

    def with_a_module(h: Tensor) -> Tensor:
        layer = nn.Linear(1, 1, bias=False, dtype=h.dtype)
        nn.init.ones_(layer.weight)
        return layer(h[:, None])[:, 0]

    h = torch.tensor([1.0, -2.0], dtype=torch.float64)
    shrunk = 1 - 0.8**5
    value = hf.hypergrad(solver, lambda w, h: (w**2).sum(), method="reverse_unroll")(h)
    torch.testing.assert_close(value, 2 * shrunk**2 * h)
    value = hf.hypergrad(with_a_module, lambda w, h: (w**2).sum(), method="reverse_unroll")(h)
    torch.testing.assert_close(value, 2 * h)
    condition = lambda w, h: w - shrunk * h  # noqa: E731
    value = hf.hypergrad(solver, lambda w, h: (w**2).sum(), optimality=condition, method="cg")(h)
    torch.testing.assert_close(value, 2 * shrunk**2 * h)
    # but a variable that somebody else holds, or what was computed before, may want its gradient
    held = torch.ones(2, dtype=torch.float64, requires_grad=True)
    product = (2 * torch.ones(2, dtype=torch.float64).requires_grad_()).exp()
    for c in (held, product):
        fn = hf.hypergrad(lambda h, c=c: h * c, lambda w, h: w.sum(), method="reverse_unroll")
        with pytest.raises(ValueError, match=r"^the inner solver closes over a tensor"):
            fn(h)


def test_everyday_warm_starts_are_allowed() -> None:
    start = nn.Parameter(torch.ones(2, dtype=torch.float64))
    graph = 2 * start
    state = {"data": torch.tensor([2.0, 3.0], dtype=torch.float64), "old": graph}
    history = [graph]

    def solver(h: Tensor) -> Tensor:
        w = start.detach().clone().requires_grad_()
        for _ in range(200):
            loss = ((w - state["data"]) ** 2).sum() + h * (w**2).sum()
            (slope,) = torch.autograd.grad(loss, w)
            w = (w - 0.1 * slope).detach().requires_grad_()
        history.append(w)
        return w

    h = torch.tensor(0.5, dtype=torch.float64)
    loss = lambda w, h: ((w - state["data"]) ** 2).sum() + h * (w**2).sum()  # noqa: E731
    value = hf.hypergrad(solver, lambda w, h: w.sum(), inner_loss=loss, method="cg")(h)
    torch.testing.assert_close(value, -state["data"].sum() / (1 + h) ** 2)


def test_checkpointed_functions_may_use_constants() -> None:
    c = C.clone().requires_grad_()
    for use in CONSTANT_USES.values():
        fn = hf.checkpoint(lambda h, use=use: h**2 * use(c))
        h = H.clone().requires_grad_()
        fn(h).backward()
        assert h.grad is not None
        assert h.grad.item() == 12.0

        def of_constant(c: Tensor, use: Any = use) -> Tensor:
            return grad(hf.checkpoint(lambda x: x**2 * use(c)))(H)  # type: ignore[no-any-return]

        assert grad(of_constant)(C) == 0


# What cuts hparams off: solver, method and condition, and a word of the error.
def by_torch_optim(h: Tensor) -> Tensor:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        ((w - h) ** 2).sum().backward()
        optimizer.step()
    return w


ZEROS = torch.zeros(2, dtype=torch.float64)
CUT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "torch.optim": (by_torch_optim, {"method": "reverse_unroll"}, "returned in params a tensor"),
    "torch.optim, detached": (
        lambda h: by_torch_optim(h).detach(),
        {"method": "reverse_unroll"},
        "no derivative reaches hparams: neither the result of the inner solver",
    ),
    "no step": (
        hf.minimize(
            lambda w, h: (w - h).square().sum(), hf.optim.sgd(0.1), 0, init=lambda h: ZEROS
        ),
        {"method": "reverse_unroll"},
        "no derivative reaches hparams: .* init returns a constant.* a loop that takes no step",
    ),
    **{
        f"a detached loss, {method}": (
            hf.minimize(
                lambda w, h: (w - h.detach()).square().sum(),
                hf.optim.sgd(0.1),
                10,
                init=lambda h: ZEROS,
            ),
            {"method": method},
            "no derivative reaches hparams",
        )
        for method in ("reverse_unroll", "reverse", "forward", "cg")
    },
    **{
        f"the start alone, {method}": (
            hf.minimize(
                lambda w, h: (w - 1).square().sum(), hf.optim.sgd(0.1), 5, init=lambda h: 1.0 * h
            ),
            {"method": method},
            "no derivative reaches hparams: inner_loss computes nothing from them",
        )
        for method in ("cg", "one_step", "dense")
    },
}


@pytest.mark.parametrize("case", CUT)
def test_structural_zeros_are_told(case: str) -> None:
    solver, keywords, message = CUT[case]
    h = torch.ones(2, dtype=torch.float64)

    def fn(**further: Any) -> Any:
        return hf.hypergrad(solver, lambda w, h: (w**2).sum(), **keywords, **further)

    with pytest.raises(ValueError, match=message):
        fn()(h)
    if case != "torch.optim":
        assert not fn(throw=False)(h).any()
        direct = hf.hypergrad(solver, lambda w, h: (w**2).sum() + h.sum(), **keywords)
        assert direct(h).eq(1).all()
    if "optim" not in case:
        with pytest.raises(ValueError, match=message):
            vmap(fn())(h.expand(3, 2))


@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "forward", "cg"])
def test_zeros_that_are_right_are_returned(method: str) -> None:
    """At a stationary point the hypergradient is zero, for all tasks or for one."""
    solver = hf.minimize(
        lambda w, h: (w - h).square().sum(), hf.optim.sgd(0.25), 40, init=torch.zeros_like
    )
    fn = hf.hypergrad(solver, lambda w, h: (w**2).sum(), method=method)
    assert not fn(ZEROS).any()
    rows = torch.stack([ZEROS, ZEROS + 1])
    torch.testing.assert_close(vmap(fn)(rows), 2 * rows)
    torch.testing.assert_close(grad(lambda h: fn(h).sum())(ZEROS), 2 + ZEROS)
    cancelling = torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(fn(cancelling), 2 * cancelling)


def test_a_solution_that_hparams_do_not_reach_warns() -> None:
    solver = hf.implicit_diff(lambda h: h / h, inner_loss=lambda w, h: ((w - 1) ** 2).sum())
    h = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="no derivative reaches hparams: inner_loss computes"):
        solver(h).sum().backward()
    with pytest.warns(UserWarning, match="no derivative reaches hparams: inner_loss computes"):
        grad(lambda h: solver(h).sum())(h.detach())
    failing = hf.implicit_diff(lambda h: h / h, inner_loss=lambda w, h: -((w - 1) ** 2).sum())
    for call in (
        lambda: failing(h).sum().backward(),
        lambda: vmap(grad(lambda h: failing(h).sum()))(h.detach().expand(3, 2)),
    ):
        with pytest.raises(ValueError, match="no derivative reaches hparams: inner_loss computes"):
            call()
    used = hf.implicit_diff(lambda h: h / h, inner_loss=lambda w, h: -((w - h) ** 2).sum())
    with pytest.raises(hf.HypergradError, match="broke down"):
        used(h).sum().backward()


def test_forward_mode_says_so_too() -> None:
    h = torch.tensor([0.5, -0.3], dtype=torch.float64)
    unused = lambda w, h: ((w - 1) ** 2).sum()  # noqa: E731
    used = lambda w, h: ((w - h) ** 2).sum()  # noqa: E731
    for products in ("reverse", "finite_difference"):
        for inner_loss in (unused, used, hf.proximal(unused, 1.0)):
            fn = hf.implicit_diff(lambda h: 1.0 * h, inner_loss=inner_loss, products=products)
            for tangent in (h, 0 * h):
                warns = pytest.warns(UserWarning, match="no derivative reaches hparams: inner_loss")
                with warns if inner_loss is unused else contextlib.nullcontext():
                    torch.func.jvp(fn, (h,), (tangent,))
