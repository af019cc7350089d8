"""A call leaves nothing changed and nothing behind: arguments, modules, random numbers, memory."""

import gc
import hashlib
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import PROBLEMS, Flat, Problem
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc.transforms._methods import METHODS
from tests.cells import each_cell, slow_but, thinned

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CALLS: dict[str, Callable[[Flat], Any]] = {
    "hypergrad": lambda f: f.hypergrad(f.v, *f.a),
    "vmap": lambda f: vmap(f.hypergrad)(f.V, *f.A),
    "jacrev": lambda f: jacrev(f.hypergrad)(f.v, *f.a),
    "jacfwd": lambda f: jacfwd(f.hypergrad)(f.v, *f.a),
    "hessian": lambda f: hessian(f.value)(f.v, *f.a),
    "vmap of grad": lambda f: vmap(grad(f.value))(f.V, *f.A),
    "autograd": lambda f: torch.autograd.grad(f.value(f.v, *f.a), f.v),
    "double autograd": lambda f: torch.autograd.grad(
        torch.autograd.grad(f.value(f.v, *f.a), f.v, create_graph=True)[0].sum(), f.v
    ),
}


def digest(tensors: list[Tensor]) -> str:
    """Of values, layouts, versions and gradients."""
    parts = []
    for t in tensors:
        parts.append(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        parts.append(repr((t.shape, t.stride(), t.dtype, t._version, t.requires_grad)).encode())
        parts.append(repr((t.grad is None, t.is_leaf and t.grad_fn is None)).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def surroundings() -> tuple[Any, ...]:
    """What of torch's global state a computation could change."""
    return (
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        torch.get_default_dtype(),
        torch.empty(()).device,  # torch.get_default_device fails in torch 2.4 once it was set
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.autograd.forward_ad._current_level,
        torch._C._functorch.maybe_get_level(torch.zeros(())),
        torch._C._functorch.peek_interpreter_stack(),
    )


@pytest.mark.parametrize(("call", "problem"), thinned(CALLS, PROBLEMS[::3]))
def test_calls_change_nothing_and_repeat_themselves(call: str, problem: Problem) -> None:
    for method in ("normal_cg", problem.methods(torch.float64)["fixed_point"]):
        f = Flat(problem, method)
        f.v = f.v.clone().requires_grad_("autograd" in call)
        inputs = [f.v, f.V, *f.a, *f.A]
        before = digest(inputs), surroundings()
        first, second = CALLS[call](f), CALLS[call](f)
        assert (digest(inputs), surroundings()) == before
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


# Of a quadratic inner loss, with bad data, and with functions that fail half-way.
GOOD = torch.tensor([[1.0, 0.2], [0.2, 0.9]], dtype=torch.float64)
MATRICES = {
    "good": GOOD,
    "NaN": GOOD * torch.nan,
    "singular": torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)),
    "indefinite": torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)),
    "non-contraction": 5 * GOOD,
}


def quadratic(name: str, raises: bool = False) -> Any:
    """A hypergradient by a method, whose outer loss may fail."""

    def outer_loss(w: Tensor, h: Tensor, A: Tensor) -> Tensor:
        if raises:
            raise KeyError("in the outer loss")
        return (w**2).sum()

    return hf.hypergrad(
        hf.iterate(
            lambda w, h, A: w - 0.5 * (A @ w - h), 10, init=lambda h, A: torch.zeros_like(h)
        ),
        outer_loss,
        inner_loss=lambda w, h, A: 0.5 * w @ (A @ w) - h @ w,
        method={
            "fixed_point": hf.FixedPoint(100),
            "neumann": hf.Neumann(100),
            "first_order": hf.FirstOrder(init=lambda h, A: h),
        }.get(name, name),
    )


@pytest.mark.parametrize("name", METHODS)
def test_no_method_changes_anything_when_it_fails(name: str) -> None:
    with each_cell() as cell:
        for data in MATRICES:
            with cell(data):
                check_that_nothing_changes(name, data, raises=False)
        with cell("the outer loss raises"):
            check_that_nothing_changes(name, "good", raises=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_changes_anything_when_a_loss_raises_on_bad_data(name: str) -> None:
    with each_cell() as cell:
        for data in MATRICES:
            with cell(data):
                check_that_nothing_changes(name, data, raises=True)


def check_that_nothing_changes(name: str, data: str, raises: bool) -> None:
    fn, A = quadratic(name, raises), MATRICES[data].clone()
    h = torch.tensor([1.0, 2.0], dtype=torch.float64)
    tracked = h.clone().requires_grad_()
    tracked.grad = torch.ones_like(h)
    H, As = torch.stack([h, h]), torch.stack([GOOD, A])
    inputs, marked = [h, A, tracked, tracked.grad, H, As], tracked.grad
    before = digest(inputs), surroundings()
    outcomes = []
    for call in (
        lambda: fn(h, A),
        lambda: vmap(fn)(H, As),
        lambda: jacrev(fn)(h, A),
        lambda: torch.autograd.grad(fn(tracked, A).sum(), tracked),
    ):
        try:
            call()
            outcomes.append("returned")
        # a warning that is an error, or the second derivative that LeastSquares has not
        except (hf.HypergradError, hf.ConvergenceWarning, KeyError, RuntimeError) as error:
            outcomes.append(type(error).__name__)
        assert (digest(inputs), surroundings()) == before
        assert tracked.grad is marked
    if raises or data == "NaN":
        assert "returned" not in outcomes
    elif data == "good":
        refused = {"RuntimeError"} if name == "least_squares" else set()
        assert {"returned"} <= set(outcomes) <= {"returned"} | refused


@pytest.mark.parametrize(
    "method", slow_but("normal_cg", of=["cg", "normal_cg", hf.FixedPoint(step_size=0.15)]), ids=str
)
def test_modules_in_the_functions_stay_as_they_are(method: Any) -> None:
    """Parameters, their gradients, and the running statistics of BatchNorm."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)).double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    apply, params = hf.functional(model)
    X, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)

    def inner_loss(w: Any, h: Any, X: Tensor, y: Tensor) -> Tensor:
        distance = sum(((w[k] - h[k]) ** 2).sum() for k in w)
        return ((apply(w, X) - y) ** 2).mean() + 2 * distance

    def solver(h: Any, *args: Tensor) -> Any:
        w = h
        for _ in range(100):
            g = grad(inner_loss)(w, h, *args)
            w = {k: w[k] - 0.15 * g[k] for k in w}
        return w

    fn = hf.hypergrad(
        solver,
        lambda w, h, X, y: ((apply(w, X) - y) ** 2).mean(),
        inner_loss=inner_loss,
        method=method,
    )
    tensors = [*model.parameters(), *model.buffers(), *params.values(), X, y]
    grads = [p.grad for p in model.parameters()]
    before = digest([*tensors, *grads]), model.training, surroundings()
    first = fn(params, X, y)
    batched = vmap(fn, (None, 0, 0))(params, torch.stack([X, X]), torch.stack([y, y]))
    again = fn(params, X, y)
    assert (digest([*tensors, *grads]), model.training, surroundings()) == before
    assert all(a is b for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True))
    for k in first:
        assert torch.equal(first[k], again[k])
        torch.testing.assert_close(batched[k][1], first[k], rtol=1e-9, atol=1e-11)


def test_a_random_solver_takes_its_numbers_from_the_users_stream() -> None:
    """Once a call: the methods draw none of their own, and restore none."""

    def solver(h: Tensor) -> Tensor:
        return h + 0 * torch.rand(2)

    fn = hf.hypergrad(solver, lambda w, h: (w**2).sum(), optimality=lambda w, h: w - h)
    torch.manual_seed(0)
    fn(torch.ones(2))
    after_call = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(2)
    assert torch.equal(after_call, torch.rand(3))


# Memory -------------------------------------------------------------------------------------------


def test_results_share_no_memory_with_arguments() -> None:
    """Not even where the solver returns its arguments, as a start that is a solution."""
    h = {"a": torch.ones(2), "b": torch.ones(3)}
    keywords: Any = {"optimality": lambda w, h: {k: w[k] - h[k] for k in w}}
    implicit = hf.implicit_diff(lambda h: h, **keywords)
    fn = hf.hypergrad_and_solution(lambda h: h, lambda w, h: w["a"].sum(), **keywords)
    grads, solution = fn(h, adjoint_init=h)
    for tree in (implicit(h), grads, solution.params, solution.adjoint):
        for k in tree:
            tree[k].fill_(7.0)
    assert all((t == 1).all() for t in h.values())


def test_results_do_not_hold_the_problem() -> None:
    """Without derivatives to come, arguments and graphs are freed with the call."""

    def task() -> tuple[Any, list[weakref.ref[Tensor]]]:
        h, X = torch.ones(2), torch.ones(2)
        fn = hf.hypergrad_and_solution(
            lambda h, X: h * X, lambda w, h, X: (w**2).sum(), optimality=lambda w, h, X: w - h * X
        )
        return fn(h, X), [weakref.ref(h), weakref.ref(X)]

    results, references = task()
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    del results


def count_tensors() -> int:
    # by the type, since isinstance looks at attributes, which warn for some objects of torch
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def failing(f: Flat) -> None:
    fn = hf.hypergrad(  # by CG, with an operator that is not symmetric
        lambda h: h.clone(),
        lambda w, h: w.sum(),
        optimality=lambda w, h: w.cumsum(0) - w.roll(1) - h,
    )
    for call in (fn, lambda h: vmap(fn)(torch.stack([h, h])), jacrev(fn)):
        with pytest.raises(hf.HypergradError):
            call(f.V[0])


LEAKS: dict[str, Callable[[Flat], Any]] = {
    **CALLS,
    "graphs thrown away": lambda f: f.value(f.v.clone().requires_grad_(), *f.a),
    "failures": failing,
}


@pytest.mark.parametrize(
    "call",
    slow_but("vmap of grad", "autograd", "jacrev", "graphs thrown away", "failures", of=LEAKS),
)
def test_repeated_calls_do_not_gather_memory(call: str) -> None:
    f = Flat(PROBLEMS[0], "cg")
    f.v = f.v.clone().requires_grad_("autograd" in call)
    for _ in range(3):
        LEAKS[call](f)
    gc.collect()
    before = count_tensors()
    for _ in range(10):
        LEAKS[call](f)
    gc.collect()
    assert count_tensors() <= before


def test_calls_leave_no_cycles_that_hold_tensors() -> None:
    """Memory comes back at once, and not when the garbage collector next looks."""
    f = Flat(PROBLEMS[3], "cg")
    f.hypergrad(f.v, *f.a)
    gc.collect()
    gc.disable()
    try:
        before = count_tensors()
        for _ in range(5):
            f.hypergrad(f.v, *f.a)
        assert count_tensors() <= before
    finally:
        gc.enable()


def count_nodes() -> int:
    """Nodes of autograd graphs that Python knows of: those of the library's functions."""
    return sum(type(o).__name__.endswith("Backward") for o in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(call: Callable[[], Any], calls: int) -> tuple[int, int, int]:
    """Of the blocks that Python has allocated, the tensors and the graph nodes, over some calls."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        return sys.getallocatedblocks(), count_tensors(), count_nodes()

    for _ in range(calls):  # until caches are full
        call()
    before = held()
    for _ in range(calls):
        call()
    return tuple(b - a for a, b in zip(before, held(), strict=True))


def every_way(name: str) -> Callable[[], None]:
    """One call of each kind, of those that record graphs and of those that fail."""
    fn, A = quadratic(name), GOOD
    h = torch.tensor([1.0, 2.0], dtype=torch.float64)
    tracked = h.clone().requires_grad_()

    def call() -> None:
        fn(h, A)
        vmap(fn, (0, None))(torch.stack([h, h]), A)
        jacrev(fn)(h, A)
        torch.autograd.grad(fn(tracked, A).sum(), tracked)
        try:
            fn(tracked, MATRICES["NaN"])
        except hf.HypergradError:
            return
        raise AssertionError("NaN went unnoticed")

    return call


@pytest.mark.parametrize("name", slow_but("cg", of=["cg", "reverse"]))
def test_nothing_grows(name: str) -> None:
    blocks, tensors, nodes = growth(every_way(name), calls=20)
    assert max(tensors, nodes) <= 0  # what other tests left may go away meanwhile
    assert blocks < 20 * 20  # caches still fill; tensors are what would hold memory


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_nothing_grows_in_a_thousand_calls(name: str) -> None:
    """What C++ holds is seen in the memory of the process alone."""
    call = every_way(name)
    windows = [growth(call, calls=100) for _ in range(2)]
    assert all(max(tensors, nodes) <= 0 for _, tensors, nodes in windows)
    assert min(blocks for blocks, *_ in windows) < 100  # caches fill once, a leak goes on
    before = resident_bytes()
    for _ in range(1000):
        call()
    gc.collect()
    assert resident_bytes() - before < 2**21


# One of each kind in which threads could meet: a solver and a loop; the others are slow.
IN_THREADS = ("cg", "reverse")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_THREADS else pytest.mark.slow) for name in METHODS],
)
def test_eight_threads_get_the_numbers_of_one(name: str) -> None:
    """Each with its own transforms, grad mode and data, of one and the same function."""
    fn = quadratic(name)
    tasks = [torch.tensor([1.0, 0.1 * i], dtype=torch.float64) for i in range(8)]

    def work(h: Tensor) -> list[Tensor]:
        tracked = h.clone().requires_grad_()
        with torch.no_grad():
            quiet = fn(tracked, GOOD)
        return [
            quiet,
            fn(h, GOOD),
            vmap(fn, (0, None))(torch.stack([h, 2 * h]), GOOD),
            jacrev(fn)(h, GOOD),
            *torch.autograd.grad(fn(tracked, GOOD).sum(), tracked),
        ]

    expected = [work(h) for h in tasks]
    with ThreadPoolExecutor(8) as pool:
        for got, alone in zip(pool.map(work, tasks), expected, strict=True):
            for a, b in zip(got, alone, strict=True):
                assert torch.equal(a, b)
