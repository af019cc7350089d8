"""Iterative methods on compiled steps: the derivatives of plain steps, from blocks of them."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import hyperfunc as hf
from hyperfunc._compile.compiler import Backend, Compiler
from hyperfunc.iterative._partition import forward_and_backward
from tests.iterative.test_iterative import (
    OPERATIONS,
    by_iterate,
    data,
    hparams,
    init,
    loss,
    objective,
    outer_loss,
    stopping,
)

BACKEND = "eager"

KINDS = [
    hf.ReverseUnroll(),
    hf.Reverse(),
    hf.Reverse("binomial", slots=2),
    hf.ForwardMode(chunk_size=2),
]
SCHEDULES = [hf.Reverse(3), hf.Reverse(100), hf.Reverse("sqrt"), hf.Reverse("binomial")]
kinds = pytest.mark.parametrize("method", KINDS, ids=repr)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # what runs is the trace, without the time of compiling
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kind of compiled function was called."""
    counted: Counter[str] = Counter()
    call = Compiler.call

    def counting(self: Compiler, fn: Any, key: Any, *args: Any) -> Any:
        counted[key[0]] += 1
        return call(self, fn, key, *args)

    monkeypatch.setattr(Compiler, "call", counting)
    return counted


def compiled(solver: Any, backend: str = BACKEND) -> Any:
    return dataclasses.replace(solver, compiler=Compiler(Backend(backend), "step", (solver.step,)))


def slow(*cell: Any) -> Any:
    return pytest.param(*cell, marks=pytest.mark.slow)


def close(got: Any, expected: Any, what: Any = "") -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize(
    "operation",
    ["autograd", slow("hessian"), slow("vmap of grad"), "jvp"],
)
def test_derivatives(operation: str, calls: Counter[str]) -> None:
    operate, plain = OPERATIONS[operation], by_iterate(2)
    expected = operate(objective(hf.ReverseUnroll(), plain))
    assert not calls
    solver = compiled(plain)
    for method in KINDS:  # what they have in common is compiled once
        close(operate(objective(method, solver)), expected, method)
        assert calls, method
        calls.clear()


@pytest.mark.parametrize("operation", ["grad of vmap", slow("jacrev of vmap"), slow("nested vmap")])
def test_tasks(operation: str) -> None:
    operate, plain = OPERATIONS[operation], by_iterate(2)
    expected, solver = operate(objective(hf.ReverseUnroll(), plain)), compiled(plain)
    for method in KINDS[:2]:
        close(operate(objective(method, solver)), expected, method)


BACK = {hf.ReverseUnroll(): "recorded", hf.ForwardMode(): "push"}


@pytest.mark.parametrize(
    ("method", "num_steps", "there", "back"),
    [
        (hf.ReverseUnroll(), 12, 3, 3),
        (hf.ReverseUnroll(), 0, 0, 0),
        slow(hf.Reverse(), 12, 3, 3),
        (hf.Reverse(), 5, 5, 5),
        slow(hf.Reverse(100), 12, 4, 3),
        slow(hf.Reverse("sqrt"), 12, 4, 3),
        slow(hf.Reverse("binomial", slots=1), 12, 4, 3),
        (hf.Reverse(last=8), 12, 2, 2),
        slow(hf.ForwardMode(), 12, 3, 3),
    ],
    ids=repr,
)
def test_blocks(method: Any, num_steps: int, there: int, back: int, calls: Counter[str]) -> None:
    solver = by_minimize_sgd(num_steps)
    fn = hf.hypergrad_and_solution(solver, outer_loss, method=method, compile=BACKEND)
    plain = hf.hypergrad_and_solution(solver, outer_loss, method=method)
    for _ in range(2):
        calls.clear()
        got = fn(hparams(), *data())
        kind = BACK.get(method, "pull")
        assert (calls["run"] + calls["record"], calls[kind]) == (there, back)
        assert sum(calls.values()) == there + back
        close(got, plain(hparams(), *data()))
    assert solver.compiler is None


def by_minimize_sgd(num_steps: int, **options: Any) -> Any:
    optimizer = hf.optim.sgd(lambda h: h["lr"], momentum=0.5)
    return hf.minimize(loss, optimizer, num_steps, init=init, **options)


@pytest.mark.parametrize(
    ("method", "mapped"),
    [
        slow(hf.ReverseUnroll(), False),
        slow(hf.ReverseUnroll(), True),
        (hf.Reverse(), False),
        slow(hf.Reverse("binomial", slots=2), False),
        slow(hf.Reverse("sqrt"), False),
        slow(hf.Reverse(last=4), False),
        slow(hf.ForwardMode(chunk_size=2), False),
        slow(hf.ForwardMode(chunk_size=2), True),
    ],
    ids=repr,
)
def test_minibatches(method: Any, mapped: bool) -> None:
    batches, results = torch.randn(8, 4, 3), []

    def f(compile: Any, batches: Tensor) -> Tensor:
        solver = hf.minimize(
            lambda w, h, x: ((x @ w - 1) ** 2).sum() + h * (w**2).sum(),
            hf.optim.heavy_ball(0.05, 0.5),
            8,
            init=lambda h: torch.zeros(3),
            inputs=batches,
            compile=compile,
        )
        return (method.solution_map(solver)(torch.tensor(0.1)) ** 3).sum()

    tasks = torch.stack([batches, batches.cos()])
    for compile in (BACKEND, False):
        derivative = grad(functools.partial(f, compile))
        results.append(vmap(derivative)(tasks) if mapped else derivative(batches))
    close(*results)


@pytest.mark.slow
def test_few_steps_are_compiled_with_all_else(calls: Counter[str]) -> None:
    h, (x, y) = {**hparams(), "unused": torch.ones(2)}, data()
    factor, tasks = [torch.tensor(2.0)], (torch.stack([x, x.sin()]), torch.stack([y, y.cos()]))

    def outer(w: Any, h: Any, x: Tensor, y: Tensor) -> Any:
        return factor[0] * outer_loss(w, h), {"params": w}

    for method, optimizer, options in (
        (hf.ReverseUnroll(), hf.optim.adam(lambda h: h["lr"]), {"inputs": torch.arange(1.0, 4.0)}),
        (hf.Reverse("sqrt"), hf.optim.sgd(lambda h: h["lr"], 0.5), {"trace": True}),
    ):
        solver = hf.minimize(
            lambda w, h, *args: loss(w, h, *args), optimizer, 3, init=init, **options
        )
        plain, fast = (
            hf.hypergrad_and_solution(solver, outer, method=method, has_aux=True, compile=compile)
            for compile in (False, BACKEND)
        )
        one, two = (None, 0, 0), (None, None, 0)
        for factor[0] in (torch.tensor(2.0), torch.tensor(3.0)):
            close(fast(h, x, y), plain(h, x, y))
        close(vmap(fast, one)(h, *tasks), vmap(plain, one)(h, *tasks))
        close(*(vmap(vmap(fn, two), (None, 0, None))(h, *tasks) for fn in (fast, plain)))
        assert sum(calls.values()) == 4
        # what is not sound is computed again, which says why
        broken = tasks[0], tasks[1] / torch.tensor([1.0, 0.0])[:, None]
        with pytest.raises(hf.HypergradError, match="for 1 of 2 tasks"):
            vmap(fast, one)(h, *broken)
        quiet = hf.hypergrad(solver, outer_loss, method=method, compile=BACKEND, throw=False)
        finite = [leaf.isfinite().all(-1) for leaf in vmap(quiet, one)(h, *broken).values()]
        assert [flags.tolist() for flags in finite[:1]] == [[True, False]]
        calls.clear()
        close(*(grad(lambda h, fn=fn: fn(h, x, y)[1].value)(h) for fn in (fast, plain)))
        assert not calls
    held = torch.ones((), requires_grad=True)
    for wrong, message in (
        (lambda w, h, *_: held * outer_loss(w, h), "outer_loss closes over"),
        (lambda w, h, *_: outer_loss(w, h).detach(), "no derivative reaches hparams"),
        (lambda w, h, *_: outer_loss(w, h) * torch.rand(()), "it draws random numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.hypergrad(solver, wrong, method=method, compile=BACKEND)(h, x, y)


@pytest.mark.parametrize("method", [hf.ReverseUnroll(), hf.CG(1, rtol=0)], ids=repr)
def test_one_call_of_compiled_code(method: Any, calls: Counter[str]) -> None:
    held = torch.ones((), requires_grad=True)
    rate = hf.optim.sgd(lambda h: h)
    solver = hf.minimize(lambda w, h, x: (h * w - x) ** 2, rate, 1, init=lambda h, x: x)
    fn = hf.hypergrad(solver, lambda w, h, x: w**3, method=method, compile=BACKEND)
    h, tasks = torch.tensor(0.1), torch.tensor([1.0, 2.0])
    expected = vmap(grad(lambda h, x: (x - h * 2 * h * (h * x - x)) ** 3), (None, 0))(h, tasks)
    if isinstance(method, hf.ReverseUnroll):
        close(vmap(fn, (None, 0))(h, tasks), expected)
        assert len(calls) == 1
    lost = hf.hypergrad(solver, lambda w, *_: held * w, method=method, compile=BACKEND)
    with pytest.raises(ValueError, match="outer_loss closes over"):
        lost(h, tasks[0])
    with torch.no_grad():
        lost(h, tasks[0])


def test_what_was_not_foreseen_is_computed_again(calls: Counter[str]) -> None:
    solve = hf.ReverseUnroll().solution_map(compiled(by_iterate(4)))
    expected = by_iterate(4)
    h, (x, y) = hparams(), data()
    start = x.clone().requires_grad_()

    def total(solver: Any) -> Tensor:
        return outer_loss(solver(h, start, y), h)

    value = total(solve)
    # twice: what was kept is used up by the first
    for _ in range(2):
        (got,) = torch.autograd.grad(value, start, retain_graph=True)
        close(got, torch.autograd.grad(total(expected), start)[0])
    assert calls == {"record": 2, "recorded": 2}


def test_tolerances_and_second_derivatives_run_uncompiled(calls: Counter[str]) -> None:
    for method in KINDS:
        solver = stopping()
        close(
            OPERATIONS["grad"](objective(method, compiled(solver))),
            OPERATIONS["grad"](objective(method, solver)),
        )
    assert not calls
    tracked = compiled(by_iterate(4))
    grad(lambda h: outer_loss(tracked(h, *data()), h))(hparams())
    assert not calls


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (
            lambda h: h["w0"],
            r"hypergrad: with Reverse\(.*compile compiles the inner solver's steps, but <function "
            r".*does not tell them. Make the solver with hf.iterate or hf.minimize, or leave",
        ),
        (
            stopping(),
            r"needs a fixed number of steps, but the inner solver stops early. Drop rtol and atol",
        ),
    ],
)
def test_errors(solver: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.hypergrad(solver, outer_loss, method="reverse", compile=True)


@kinds
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda w, h: w if w.sum() > 0 else w + h, r"step cannot be compiled.*an if or \.item"),
        (lambda w, h: w + h * torch.rand(()), r"cannot be compiled, as it draws random numbers"),
    ],
)
def test_steps_that_cannot_be_compiled(method: Any, step: Any, message: str) -> None:
    solver = hf.iterate(step, 4, init=lambda h: h, compile=BACKEND)
    with pytest.raises(ValueError, match=message):
        hf.hypergrad(solver, lambda w, h: w.sum(), method=method)(torch.ones(2))


@kinds
def test_closing_over_hparams_is_refused(method: Any) -> None:
    def objective(h: Tensor) -> Tensor:
        hidden = {"h": h}
        solver = hf.iterate(
            lambda w, h: 0.5 * w + hidden["h"], 2, init=lambda h: h, compile=BACKEND
        )
        return method.solution_map(solver)(2 * h).sum()

    with pytest.raises(ValueError, match="closes over"):
        grad(objective)(torch.ones(2))


def test_memory_layouts_do_not_multiply_what_is_compiled() -> None:
    solver = hf.iterate(
        lambda w, h, x: (w.T @ x).T * h, 12, init=lambda h, x: torch.ones(3, 2), compile=BACKEND
    )
    for method in KINDS:
        fn = hf.hypergrad(solver, lambda w, h, x: (w.T @ w).sum(), method=method)
        fn(torch.tensor(0.5), torch.eye(3))
    kinds = Counter(signature[0][0][0] for signature in solver.compiler.entries)
    # the start has another layout than the other iterates
    assert kinds == {kind: 2 for kind in ("run", "pull", "record", "recorded", "push")}


def test_a_cut_keeps_views_no_values_twice_and_nothing_unused() -> None:
    def fn(x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        value = (x @ y).sin()
        return value.cos(), (value.T @ v) * value.T.exp(), x.cos() * 1, v * 2

    tensors = tuple(torch.randn(3, 3) for _ in range(3))
    first, second = forward_and_backward(fn, tensors, 2, 1)
    output, *kept = first(*tensors[:2])
    close((output, *second(*kept, *tensors)), fn(*tensors))
    assert len(kept) == 3  # value, its transposed exp, and what depends on no cotangent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_default_dtype(torch.float64)
    solver = by_minimize_sgd(2)
    arguments, tasks = (hparams(), *data()), (hparams(), *data(2))
    for method, batched in ((hf.Reverse(), False), (hf.ReverseUnroll(), True)):
        fn = hf.hypergrad(solver, outer_loss, method=method, compile=True)
        plain = hf.hypergrad(solver, outer_loss, method=method)
        if batched:
            close(vmap(fn, (None, 0, 0))(*tasks), vmap(plain, (None, 0, 0))(*tasks))
        else:
            close(fn(*arguments), plain(*arguments))
    torch.compiler.reset()
