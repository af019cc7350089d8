"""Iterative methods: every one has the derivatives of the unrolled steps, in bounded memory."""

import functools
import gc
import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf
from hyperfunc.inner_solvers import gradient_descent_map, iterate, minimize
from hyperfunc.iterative import ForwardMode, Reverse, ReverseUnroll, _storage, checkpoint
from tests.cells import slow_but

METHODS = [
    Reverse(),
    Reverse(3),
    Reverse(100),
    Reverse("sqrt"),
    Reverse("binomial"),
    Reverse("binomial", slots=1),
    Reverse("binomial", slots=2),
    ForwardMode(),
    ForwardMode(chunk_size=2),
]
all_methods = pytest.mark.parametrize("method", METHODS, ids=repr)
# One of each kind, where what is tested does not depend on the schedule.
KINDS = [Reverse(), Reverse("binomial", slots=2), ForwardMode(chunk_size=2)]
kinds = pytest.mark.parametrize("method", KINDS, ids=repr)


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss(w: Any, h: Any, X: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    residual = torch.tanh(X @ w["w"] + w["b"]) - y
    return scale * (residual**2).mean() + (h["l2"].exp() * w["w"] ** 2).sum()


def init(h: Any, *args: Any) -> Any:
    return {"w": 1.0 * h["w0"], "b": torch.zeros(())}


def outer_loss(w: Any, h: Any, *args: Any) -> Tensor:
    return (w["w"] ** 3).sum() + w["b"].sin() + h["l2"].sum() * w["w"].sum()


def by_iterate(num_steps: int) -> Any:
    return iterate(gradient_descent_map(loss, lambda h: h["lr"]), num_steps, init=init)


def by_minimize(num_steps: int) -> Any:
    optimizer = hf.optim.adam(lambda h: h["lr"], betas=(0.8, 0.9), eps=0.1)
    return minimize(loss, optimizer, num_steps, init=init)


SOLVERS = pytest.mark.parametrize("make", [by_iterate, by_minimize])


_GENERATOR = torch.Generator().manual_seed(5)
_HPARAMS = {
    "l2": torch.randn(3, generator=_GENERATOR, dtype=torch.float64) - 2,
    "lr": torch.tensor(0.3, dtype=torch.float64),
    "w0": torch.randn(3, generator=_GENERATOR, dtype=torch.float64),
}
_X = torch.randn(4, 8, 3, generator=_GENERATOR, dtype=torch.float64)
_Y = torch.randn(4, 8, generator=_GENERATOR, dtype=torch.float64)


def hparams() -> Any:
    return {key: leaf.detach() for key, leaf in _HPARAMS.items()}


def data(tasks: int = 0) -> tuple[Tensor, Tensor]:
    return (_X[:tasks], _Y[:tasks]) if tasks else (_X[0], _Y[0])


def objective(method: Any, solver: Any) -> Callable[..., Tensor]:
    solve = method.solution_map(solver)
    return lambda h, *args: outer_loss(solve(h, *args), h, *args)


def assert_same(
    run: Callable[[Any], Any], methods: list[Any] = METHODS, tol: float = 1e-11
) -> None:
    """What is run with each of the methods gives what it gives by unrolling."""
    expected = run(ReverseUnroll())
    for method in methods:
        torch.testing.assert_close(
            run(method),
            expected,
            rtol=tol,
            atol=tol,
            msg=lambda text: f"{method!r}: {text}",  # noqa: B023
        )


def by_autograd(f: Callable[..., Tensor], orders: int = 1) -> Any:
    tracked = {key: value.clone().requires_grad_() for key, value in hparams().items()}
    X, y = data()
    inputs = [*tracked.values(), X.requires_grad_()]
    result = f(tracked, X, y)
    for _ in range(orders):
        grads = torch.autograd.grad(
            result, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        result = sum((g * g.detach().cos()).sum() for g in grads)
    return [g.detach() for g in grads]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "value": lambda f: f(hparams(), *data()),
    "autograd": by_autograd,
    "double autograd": functools.partial(by_autograd, orders=2),
    "grad": lambda f: grad(f, argnums=(0, 1))(hparams(), *data()),
    "jvp": lambda f: jvp(lambda h, X: f(h, X, data()[1]), (hparams(), data()[0]), _tangents()),
    "dual numbers": lambda f: _by_dual_numbers(f),
    "hessian": lambda f: hessian(f)(hparams(), *data()),
    "reverse over reverse": lambda f: jacrev(jacrev(f))(hparams(), *data()),
    "reverse over forward": lambda f: jacrev(jacfwd(f))(hparams(), *data()),
    "forward over forward": lambda f: jacfwd(jacfwd(f))(hparams(), *data()),
    "vmap of grad": lambda f: vmap(grad(f), (None, 0, 0))(hparams(), *data(4)),
    "vmap of grad, other dims": lambda f: vmap(grad(f), (None, 1, 1))(
        hparams(), *(leaf.movedim(0, 1) for leaf in data(4))
    ),
    "chunked vmap": lambda f: vmap(grad(f), (None, 0, 0), chunk_size=3)(hparams(), *data(4)),
    "grad of vmap": lambda f: grad(lambda h: vmap(f, (None, 0, 0))(h, *data(4)).sum())(hparams()),
    "grad of vmap in the data": lambda f: grad(
        lambda X: vmap(f, (None, 0, 0))(hparams(), X, data(4)[1]).sum()
    )(data(4)[0]),
    "jacrev of vmap": lambda f: jacrev(lambda h: vmap(f, (None, 0, 0))(h, *data(4)))(hparams()),
    "jacfwd of vmap": lambda f: jacfwd(lambda h: vmap(f, (None, 0, 0))(h, *data(4)))(hparams()),
    "nested vmap": lambda f: vmap(vmap(grad(f), (None, 0, None)), (None, None, 0))(
        hparams(), data(4)[0], data(2)[1]
    ),
    "vmap of grad of vmap": lambda f: vmap(
        lambda y: grad(lambda h: vmap(f, (None, 0, None))(h, data(4)[0], y).sum())(hparams())
    )(data(2)[1]),
    "vmap of hessian": lambda f: vmap(hessian(f), (None, 0, 0))(hparams(), *data(2)),
}
# The others take seconds.
HEAVY = {
    "forward over forward",
    "reverse over forward",
    "chunked vmap",
    "vmap of hessian",
    "hessian",
}
LIGHT = set(OPERATIONS) - HEAVY
FIRST_ORDER = ["value", "autograd", "grad", "jvp", "vmap of grad", "grad of vmap"]


def _tangents() -> Any:
    return {key: leaf.cos() for key, leaf in hparams().items()}, data()[0].sin()


def _by_dual_numbers(f: Callable[..., Tensor]) -> Tensor:
    h, X = _tangents()
    with fwad.dual_level():
        duals = {key: fwad.make_dual(leaf, h[key]) for key, leaf in hparams().items()}
        result = f(duals, fwad.make_dual(data()[0], X), data()[1])
        return fwad.unpack_dual(result).tangent


@pytest.mark.parametrize("operation", FIRST_ORDER)
def test_all_methods_agree(operation: str) -> None:
    assert_same(lambda method: OPERATIONS[operation](objective(method, by_iterate(7))))


@pytest.mark.parametrize("operation", slow_but(*LIGHT, of=OPERATIONS))
def test_every_kind_composes(operation: str) -> None:
    assert_same(lambda method: OPERATIONS[operation](objective(method, by_minimize(4))), KINDS)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("operation", ["autograd", "double autograd", "jvp", "vmap of grad"])
def test_few_steps(operation: str, num_steps: int) -> None:
    assert_same(lambda method: OPERATIONS[operation](objective(method, by_minimize(num_steps))))


@SOLVERS
def test_finite_differences(make: Any) -> None:
    f = objective(ReverseUnroll(), make(5))
    gradients = {
        method: grad(objective(method, make(5)))(hparams(), *data())
        for method in [ReverseUnroll(), *METHODS]
    }
    for key, leaf in hparams().items():
        for index in range(leaf.numel()):
            step = torch.zeros_like(leaf)
            step.view(-1)[index] = 1e-3

            def value(times: float) -> Tensor:
                h = {**hparams(), key: leaf + times * step}  # noqa: B023
                return f(h, *data())

            # Sixth order: the error of the formula is far below 1e-8.
            difference = (
                45 * (value(1) - value(-1)) - 9 * (value(2) - value(-2)) + value(3) - value(-3)
            ) / 0.06
            for method, gradient in gradients.items():
                assert abs(difference - gradient[key].view(-1)[index]) < 1e-8, method


def truncated(solver_steps: int, last: int) -> Any:
    """The formula of truncated reverse mode, by unrolling from a constant."""
    before = by_iterate(solver_steps - last)

    def f(h: Any, *args: Any) -> Tensor:
        with torch.no_grad():
            state = torch.utils._pytree.tree_map(Tensor.detach, before(h, *args))
        phi = gradient_descent_map(loss, lambda h: h["lr"])
        return outer_loss(iterate(phi, last, init=lambda *_: state)(h, *args), h, *args)

    return f


@pytest.mark.parametrize("last", [1, 3, 6])
@pytest.mark.parametrize(
    "operation",
    slow_but("grad", "vmap of grad", of=["grad", "autograd", "hessian", "vmap of grad"]),
)
def test_truncation(last: int, operation: str) -> None:
    def run(method: Any) -> Any:
        unrolled = method == ReverseUnroll()
        f = truncated(7, last) if unrolled else objective(method, by_iterate(7))
        return OPERATIONS[operation](f)

    methods = [Reverse(checkpoint_, last=last) for checkpoint_ in (1, 2, "sqrt", "binomial")]
    assert_same(run, methods, tol=1e-12)


def test_truncation_beyond_the_first_step_is_no_truncation() -> None:
    methods = [Reverse(last=7), Reverse(last=8)]
    assert_same(lambda method: by_autograd(objective(method, by_iterate(7))), methods)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10])
def test_truncated_reverse_at_a_fixed_point_is_a_neumann_sum(num_steps: int) -> None:
    A = 0.3 * torch.randn(4, 4)
    b = torch.randn(4)

    def phi(w: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(A @ w) + h * b

    h = torch.tensor(0.7)
    solver = iterate(phi, 400, init=lambda h: torch.zeros(4))
    w = solver(h)
    J = jacrev(phi)(w, h)
    g = 2 * w
    u, term = torch.zeros(4), g
    for _ in range(num_steps):
        u, term = u + term, J.T @ term
    method = Reverse(last=num_steps)
    value = grad(lambda h: (method.solution_map(solver)(h) ** 2).sum())(h)
    torch.testing.assert_close(value, u @ jacrev(phi, argnums=1)(w, h), rtol=1e-12, atol=1e-12)
    implicit = hf.hypergrad(
        lambda h: w,
        lambda w, h: (w**2).sum(),
        fixed_point=phi,
        method=hf.FixedPoint(maxiter=num_steps, rtol=0.0, atol=0.0),
    )(h)
    torch.testing.assert_close(value, implicit, rtol=1e-12, atol=1e-12)
    if num_steps == 1:
        one_step = hf.hypergrad(solver, lambda w, h: (w**2).sum(), method=hf.OneStep())(h)
        torch.testing.assert_close(value, one_step, rtol=1e-12, atol=1e-12)


# --- schedules


def count_steps(method: Any, num_steps: int) -> tuple[int, int, int]:
    """Steps taken forwards and backwards, and the most iterates that were kept at a time."""
    calls = [0]

    def step(w: Tensor, h: Tensor) -> Tensor:
        calls[0] += 1
        return w * h

    h = torch.tensor(0.5, requires_grad=True)
    result = method.solution_map(iterate(step, num_steps, init=lambda h: torch.ones(())))(h)
    forward = calls[0]
    most = [len(result.grad_fn.operation.memo[0].marks)]
    store = _storage.Trace.store

    def counted(self: Any, state: Any) -> Any:
        most[0] = max(most[0], len(self.marks) + 1)
        return store(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_storage.Trace, "store", counted)
        result.backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad, torch.tensor(num_steps * 0.5 ** (num_steps - 1)))
    return forward, calls[0] - forward, most[0]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 21, 35, 36, 37, 100])
def test_binomial_takes_the_fewest_steps(slots: int, num_steps: int) -> None:
    # Griewank and Walther: r T - C(s + r, s + 1) steps without a graph, the T - 1 of the forward
    # sweep among them, where r is the smallest number with C(s + r, s) >= T.
    r = next(r for r in range(num_steps + 1) if math.comb(slots + r, slots) >= num_steps)
    optimum = r * num_steps - math.comb(slots + r, slots + 1)
    forward, backward, most = count_steps(Reverse("binomial", slots=slots), num_steps)
    assert forward == num_steps
    assert backward == optimum - (num_steps - 1) + num_steps
    assert most <= slots + 1  # The last iterate, where the way back begins, is in hand.


def test_the_closed_formula_is_the_optimum() -> None:
    @functools.cache
    def fewest(length: int, slots: int) -> int:
        if length == 1:
            return 0
        if slots == 1:
            return length * (length - 1) // 2
        return min(m + fewest(length - m, slots - 1) + fewest(m, slots) for m in range(1, length))

    for slots in (1, 2, 3, 4):
        for length in range(1, 60):
            r = next(r for r in range(length + 1) if math.comb(slots + r, slots) >= length)
            assert r * length - math.comb(slots + r, slots + 1) == fewest(length, slots)


@pytest.mark.parametrize(
    ("method", "num_steps", "backward", "most"),
    [
        (Reverse(), 50, 50, 50),
        (Reverse(10), 50, 94, 14),
        (Reverse(7), 50, 92, 14),
        (Reverse(50), 50, 98, 50),
        (Reverse("sqrt"), 50, None, 5),
        (Reverse("sqrt"), 1000, None, 23),
        (Reverse("binomial"), 1000, None, 10),
    ],
)
def test_schedules_keep_what_they_say(
    method: Any, num_steps: int, backward: int | None, most: int
) -> None:
    result = count_steps(method, num_steps)
    assert result[0] == num_steps
    assert backward is None or result[1] == backward
    assert result[2] <= most + 1  # and the one in hand
    if method == Reverse("sqrt"):
        assert result[1] <= 3 * num_steps
        assert result[2] >= math.sqrt(num_steps / 2)


def test_early_stopping_fits_a_schedule_made_for_more_steps() -> None:
    def step(w: Tensor, h: Tensor) -> Tensor:
        return torch.cos(h * w)

    solver = iterate(step, 500, init=lambda h: torch.zeros(()), rtol=1e-3)
    h = torch.tensor(0.8)
    expected = grad(solver)(h)
    for method in METHODS:
        torch.testing.assert_close(grad(method.solution_map(solver))(h), expected)


# --- memory


def graph_size(result: Tensor) -> int:
    seen, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return len(seen)


@all_methods
def test_the_graph_does_not_grow(method: Any) -> None:
    sizes = [
        graph_size(
            objective(method, by_minimize(num_steps))(
                {key: leaf.requires_grad_() for key, leaf in hparams().items()}, *data()
            )
        )
        for num_steps in (2, 20)
    ]
    assert sizes[0] == sizes[1]


def stopping() -> Any:
    phi = gradient_descent_map(loss, lambda h: h["lr"])
    return iterate(phi, 6, init=init, rtol=0.2)


@pytest.mark.parametrize(
    "f",
    [
        *(
            pytest.param(
                objective(method, by_minimize(2)),
                id=repr(method),
                marks=() if method == KINDS[0] else pytest.mark.slow,
            )
            for method in [ReverseUnroll(), *KINDS]
        ),
        pytest.param(objective(KINDS[1], stopping()), id="stopping", marks=pytest.mark.slow),
        pytest.param(lambda *args: layered(checkpoint)(*args), id="checkpoint"),
    ],
)
def test_nothing_is_left_behind(f: Any) -> None:
    uses = [
        lambda: torch.autograd.grad(f(tracked, *data()), list(tracked.values())),
        lambda: grad(f)(hparams(), *data()),
        lambda: vmap(grad(f), (None, 0, 0))(hparams(), *data(2)),
        lambda: jvp(f, (hparams(), *data()), (*_tangents(), data()[1])),
    ]
    tracked = {key: leaf.requires_grad_() for key, leaf in hparams().items()}

    def count() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = [o for o in objects if isinstance(o, Tensor)]
        # what other tests left behind may wrap another tensor, or be sparse, without a storage
        plain = [
            t for t in tensors if not is_functorch_wrapped_tensor(t) and t.layout is torch.strided
        ]
        return len(objects), len(tensors), sum(t.untyped_storage().nbytes() for t in plain)

    for number in range(12):
        uses[number % len(uses)]()
    counts = [count()]
    for _ in range(3):
        for number in range(40):
            uses[number % len(uses)]()
        counts.append(count())
    assert counts[-1][1:] == counts[0][1:]
    # what is kept by each call is so in every round, while a cache of torch's fills once
    assert min(after[0] - before[0] for before, after in itertools.pairwise(counts)) < 20


def test_a_second_backward_runs_the_steps_again() -> None:
    tracked = {key: value.requires_grad_() for key, value in hparams().items()}
    result = objective(Reverse("sqrt"), by_iterate(9))(tracked, *data())
    first = torch.autograd.grad(result, list(tracked.values()), retain_graph=True)
    second = torch.autograd.grad(result, list(tracked.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- replay


def noisy_loss(w: Tensor, h: Any, x: Tensor) -> Tensor:
    noise = torch.randn(()) * w.sum()
    return (F.dropout(x @ w) ** 2).sum() * h["a"] + noise * h["b"] + h["a"] * (w**4).sum()


def noisy_solver() -> Any:
    batches = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))
    return minimize(
        noisy_loss,
        hf.optim.sgd(lambda h: h["lr"], momentum=0.5),
        5,
        init=lambda h: h["w0"] + 0.1 * torch.randn(3),
        inputs=batches,
    )


_NOISY_HPARAMS = {
    "a": torch.tensor([0.1, 0.05, 0.08], dtype=torch.float64),
    "b": torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64),
    "lr": torch.tensor([0.1, 0.05, 0.02], dtype=torch.float64),
    "w0": torch.randn(3, 3, generator=_GENERATOR, dtype=torch.float64),
}


def noisy_hparams(tasks: int = 0) -> Any:
    return {key: leaf[:tasks] if tasks else leaf[0] for key, leaf in _NOISY_HPARAMS.items()}


def by_backward(f: Callable[..., Tensor]) -> Any:
    h = {key: leaf.clone().requires_grad_() for key, leaf in noisy_hparams().items()}
    return torch.autograd.grad(f(h), list(h.values()))


NOISY: dict[str, Callable[..., Any]] = {
    "autograd": by_backward,
    "grad": lambda f: grad(f)(noisy_hparams()),
    "jvp": lambda f: jvp(f, (noisy_hparams(),), (noisy_hparams(),)),
    "hessian": lambda f: jacrev(grad(f))(noisy_hparams()),
    "vmap, different": lambda f: vmap(grad(f), randomness="different")(noisy_hparams(3)),
    "vmap, same": lambda f: vmap(grad(f), randomness="same")(noisy_hparams(3)),
    "grad of vmap, different": lambda f: grad(lambda h: vmap(f, randomness="different")(h).sum())(
        noisy_hparams(3)
    ),
    "one point, different": lambda f: vmap(
        lambda _: grad(f)(noisy_hparams()), randomness="different"
    )(torch.arange(3)),
    "one point, same": lambda f: vmap(lambda _: grad(f)(noisy_hparams()), randomness="same")(
        torch.arange(3)
    ),
}


# One of each kind for every operation, and all schedules for two; with the slow tests for all.
REPLAYS = pytest.mark.parametrize(
    ("operation", "methods"),
    [
        *(pytest.param(operation, KINDS, id=operation) for operation in NOISY),
        *(
            pytest.param(
                operation,
                [method for method in METHODS if method not in KINDS],
                id=f"{operation}, other schedules",
                marks=() if operation in ("autograd", "vmap, different") else pytest.mark.slow,
            )
            for operation in NOISY
        ),
    ],
)


@REPLAYS
def test_replay_is_exact(methods: list[Any], operation: str, device: torch.device) -> None:
    solver = noisy_solver()

    def run(method: Any) -> tuple[Any, Tensor]:
        torch.manual_seed(3)
        solve = method.solution_map(solver)
        result = NOISY[operation](lambda h: (solve(h) ** 3).sum())
        return result, torch.rand(4)

    assert_same(run, methods, tol=1e-10)


def restless_solver() -> Any:
    """Noise and masks that fade, so that each task stops by itself."""

    def step(state: Any, h: Any, row: Tensor) -> Any:
        noise = F.dropout(torch.ones(3)) * torch.randn(3) * torch.exp(-row)
        velocity = 0.4 * state["v"] + h["a"] * (state["w"] - h["w0"].sin()) + 0.01 * noise * h["b"]
        return {"w": state["w"] - 40 * h["lr"] * velocity, "v": velocity}

    def start(h: Any) -> Any:
        return {"w": 0.1 * torch.randn(3) * h["b"], "v": torch.zeros(3)}

    return iterate(step, 40, init=start, inputs=torch.arange(40.0), rtol=1e-2)


@REPLAYS
def test_replay_is_exact_where_tasks_stop_early(methods: list[Any], operation: str) -> None:
    solver = restless_solver()

    def run(method: Any) -> tuple[Any, Tensor]:
        torch.manual_seed(4)
        solve = method.solution_map(solver)
        return NOISY[operation](lambda h: (solve(h)["w"] ** 3).sum()), torch.rand(4)

    assert_same(run, methods, tol=1e-10)


def test_tasks_with_noise_stop_apart() -> None:
    """What the test above stands on."""
    solver = restless_solver()
    torch.manual_seed(4)
    h = {key: leaf.requires_grad_() for key, leaf in noisy_hparams(3).items()}
    result = vmap(Reverse().solution_map(solver), randomness="different")(h)
    trace = result["w"].grad_fn.operation.memo[0]
    assert trace.lengths.unique().numel() == 3
    assert trace.num_steps < 40


def test_replay_of_a_generator_that_was_passed(device: torch.device) -> None:
    def step(w: Tensor, h: Tensor, generator: torch.Generator) -> Tensor:
        return torch.tanh(h * w) + torch.rand(3, generator=generator, device=device)

    solver = iterate(step, 6, init=lambda h, generator: torch.zeros(3, device=device))

    def run(method: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(1)
        solve = method.solution_map(solver)
        h = torch.tensor(0.7, device=device)
        derivative = jacrev(grad(lambda h: (solve(h, generator) ** 2).sum()))(h)
        return derivative, torch.rand(3, generator=generator, device=device)

    assert_same(run, tol=1e-12)


def test_replay_leaves_a_stream_that_has_moved_on() -> None:
    def run(method: Any) -> Any:
        torch.manual_seed(3)
        h = {key: leaf.clone().requires_grad_() for key, leaf in noisy_hparams().items()}
        result = (method.solution_map(noisy_solver())(h) ** 3).sum()
        between = torch.rand(2)
        grads = torch.autograd.grad(result, list(h.values()), retain_graph=True)
        again = torch.autograd.grad(result, list(h.values()))
        return grads, again, between, torch.rand(2)

    assert_same(run, tol=1e-10)


def test_buffers_of_modules_are_not_advanced() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())
    apply, weights = hf.functional(module)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def inner_loss(w: Any, h: Any, X: Tensor, y: Tensor) -> Tensor:
        return h["lr"] * ((apply(w, X).sum(1) - y) ** 2).mean()

    solver = minimize(inner_loss, hf.optim.sgd(0.3), 3, init=lambda *_: weights)

    def run(method: Any) -> Any:
        solve = method.solution_map(solver)
        return grad(lambda h: (apply(solve(h, *data()), data()[0]) ** 3).sum())(hparams())

    assert_same(run, KINDS)
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


def test_inputs_have_gradients_too() -> None:
    batches = torch.randn(5, 4, 3)

    def f(method: Any, batches: Tensor) -> Tensor:
        solver = minimize(
            lambda w, h, x: ((x @ w - 1) ** 2).sum() + h * (w**2).sum(),
            hf.optim.sgd(0.05),
            5,
            init=lambda h: torch.zeros(3),
            inputs=batches,
        )
        return (method.solution_map(solver)(torch.tensor(0.1)) ** 3).sum()

    for operate in (
        lambda m: grad(functools.partial(f, m))(batches),
        lambda m: jvp(functools.partial(f, m), (batches,), (batches.sin(),)),
        lambda m: vmap(grad(functools.partial(f, m)))(torch.stack([batches, batches.cos()])),
        lambda m: jacrev(grad(functools.partial(f, m)))(batches),
    ):
        expected = operate(ReverseUnroll())
        for method in [Reverse(), Reverse("binomial", slots=2), ForwardMode(chunk_size=7)]:
            torch.testing.assert_close(operate(method), expected)
    # truncated, the last steps alone count, from a constant
    w, h = torch.zeros(3), torch.tensor(0.1)
    start = w
    for x in batches[:3]:
        start = start - 0.05 * (2 * x.T @ (x @ start - 1) + 2 * h * start)

    def end(last: Tensor) -> Tensor:
        w = start
        for x in last:
            w = w - 0.05 * (2 * x.T @ (x @ w - 1) + 2 * h * w)
        return (w**3).sum()

    for every in (1, 2, "binomial"):
        truncated = grad(functools.partial(f, Reverse(every, last=2)))(batches)
        assert (truncated[:3] == 0).all()
        torch.testing.assert_close(truncated[3:], grad(end)(batches[3:]))


# --- through the transform


@SOLVERS
def test_hypergrad(make: Any) -> None:
    def compute(method: Any) -> Any:
        fn = hf.hypergrad_and_value(make(6), outer_loss, method=method)
        return fn(hparams(), *data()), vmap(fn, (None, 0, 0))(hparams(), *data(3))

    assert_same(compute)


@kinds
def test_any_layout(method: Any) -> None:
    def step(w: Any, h: Any) -> Any:
        image, (scalar, half) = w["image"], w["rest"]
        new = torch.tanh(h["t"] * image + scalar)
        return {"image": new, "rest": (scalar.sin() + new.mean(), half * h["s"].float())}

    start = {
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "rest": (torch.tensor(0.3), torch.ones(2, 2, dtype=torch.float32).T),
    }
    solver = iterate(step, 5, init=lambda h: start)
    h = {"t": torch.randn(3, 2).T[:, :, None, None], "s": torch.tensor(0.5)}

    def f(method: Any, h: Any) -> Tensor:
        w = method.solution_map(solver)(h)
        return (w["image"] ** 2).sum() + w["rest"][0] + w["rest"][1].double().sum()

    for operate in (grad, jacrev):
        expected = operate(functools.partial(f, ReverseUnroll()))(h)
        torch.testing.assert_close(operate(functools.partial(f, method))(h), expected)


@kinds
def test_unused_variables_have_zero_gradients(method: Any) -> None:
    solver = iterate(lambda w, h: 0.5 * w, 3, init=lambda h: h["used"])
    h = {"used": torch.ones(2), "unused": torch.ones(3), "empty": torch.ones(0)}
    gradient = grad(lambda h: method.solution_map(solver)(h).sum())(h)
    assert torch.equal(gradient["used"], torch.full((2,), 0.125))
    assert torch.equal(gradient["unused"], torch.zeros(3))
    assert gradient["empty"].shape == (0,)


# --- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Reverse(0), ValueError, "checkpoint is 0; expected 'sqrt', 'binomial' or an"),
        (lambda: Reverse("log"), ValueError, "checkpoint is 'log'"),
        (lambda: Reverse(True), TypeError, "checkpoint is True"),
        (lambda: Reverse(last=0), ValueError, "last is 0; expected None or an integer >= 1"),
        (lambda: Reverse("binomial", slots=0), ValueError, "slots is 0"),
        (lambda: Reverse(slots=3), ValueError, "Write Reverse(checkpoint='binomial', slots=3)"),
        (lambda: ForwardMode(chunk_size=0), ValueError, "chunk_size is 0"),
        (lambda: Reverse().solution_map(init), TypeError, "Make the solver with hf.iterate"),
        (lambda: ForwardMode().solution_map(init), TypeError, "or use hf.ReverseUnroll()"),
        (
            lambda: Reverse(last=2).solution_map(iterate(loss, 5, init=init, rtol=0.1)),
            ValueError,
            "last=2 needs a fixed number of steps",
        ),
        (lambda: checkpoint(3), TypeError, "fn is 3 of type int"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


CAPTURES: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "autograd": lambda f: f(torch.tensor(0.5, requires_grad=True)).backward(),
    "grad": lambda f: grad(f)(torch.tensor(0.5)),
    "jvp": lambda f: jvp(f, (torch.tensor(0.5),), (torch.tensor(1.0),)),
    "vmap of grad": lambda f: vmap(grad(f))(torch.ones(3)),
    "grad of vmap": lambda f: grad(lambda h: vmap(f)(h).sum())(torch.ones(3)),
}


@kinds
@pytest.mark.parametrize("operation", CAPTURES)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_that_closes_over_hparams_is_refused(
    method: Any, operation: str, depth: int
) -> None:
    def f(h: Tensor) -> Tensor:
        module = torch.nn.Module()  # Where no look at the closure reaches.
        module.captured = h
        direct = (lambda w, given: 0.5 * w + h.sin() * given) if depth == 0 else None
        hidden = lambda w, given: 0.5 * w + module.captured.sin() * given  # noqa: E731
        solver = iterate(direct or hidden, 3, init=lambda h: torch.zeros(()))
        return method.solution_map(solver)(h.cos() if depth else h)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="closes over a tensor that requires grad or belongs to"):
        CAPTURES[operation](f)


def test_a_step_that_closes_over_task_data_is_refused() -> None:
    def f(h: Tensor, x: Tensor) -> Tensor:
        solver = iterate(lambda w, h: 0.5 * w + h * x, 3, init=lambda h: torch.zeros(()))
        return Reverse().solution_map(solver)(h)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=re.escape("Pass that tensor in hparams or *args")):
        vmap(grad(f), (None, 0))(torch.tensor(0.5), torch.ones(3))


# --- checkpoint


def block(x: Tensor, w: Tensor, bias: Any = None) -> Tensor:
    return torch.tanh(x @ w) if bias is None else torch.tanh(x @ w) + bias["b"]


def network(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = layer(layer(x, w), w, bias={"b": b})
        return (layer(x, w.T) ** 2).sum()

    return f


def deep(x: Tensor, w: Tensor, bias: Any = None) -> Tensor:
    inner = checkpoint(block)
    return inner(inner(x, w, bias), w)


POINT = (
    torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3),
    torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(3, 3),
    torch.linspace(0, 1, 3, dtype=torch.float64),
)


@pytest.mark.parametrize("fn", [block, deep])
@pytest.mark.parametrize(
    "operate",
    [
        lambda f: f(*POINT),
        lambda f: grad(f, argnums=(0, 1, 2))(*POINT),
        lambda f: hessian(f, argnums=(1, 2))(*POINT),
        lambda f: jacrev(jacrev(jacrev(f, 2), 2), 2)(*POINT),
        lambda f: jacfwd(jacfwd(f, 2), 2)(*POINT),
        lambda f: vmap(grad(f), (None, 0, None))(POINT[0], torch.stack([POINT[1]] * 2), POINT[2]),
        lambda f: grad(lambda x: vmap(f, (0, None, None))(x, *POINT[1:]).sum())(POINT[0][:, None]),
        lambda f: torch.autograd.functional.hessian(lambda w: f(POINT[0], w, POINT[2]), POINT[1]),
    ],
)
def test_checkpoint(fn: Any, operate: Any) -> None:
    plain = (lambda x, w, bias=None: block(block(x, w, bias), w)) if fn is deep else fn
    torch.testing.assert_close(operate(network(checkpoint(fn))), operate(network(plain)))


def layered(layer: Callable[..., Any]) -> Callable[..., Tensor]:
    """A loss of three layers, of which each goes through ``layer``."""

    def f(h: Any, X: Tensor, y: Tensor) -> Tensor:
        hidden = layer(lambda w, l2, X: torch.tanh(X @ w) * l2.exp().sum())(h["w0"], h["l2"], X)
        errors = layer(lambda z, lr, y: lr * (z - y) ** 2)(hidden, h["lr"], y)
        return errors.mean() + layer(lambda w: (w**3).sum())(h["w0"])  # type: ignore[no-any-return]

    return f


def test_steps_with_operations_of_their_own() -> None:
    """A checkpoint, a solution or a class of torch inside a step, also with several vectors."""
    root = hf.implicit_diff(
        lambda h: (h * h + 1).sqrt(), optimality=lambda w, h: w * w - h * h - 1, method="dense"
    )

    def plain(w: Tensor, h: Tensor) -> Tensor:
        return ((w - h) ** 2 * h.exp()).sum() + 0.1 * (w**4).sum()

    def nested(w: Tensor, h: Tensor) -> Tensor:
        return plain(w, h) + root(w * h).sum()  # type: ignore[no-any-return]

    def unnested(w: Tensor, h: Tensor) -> Tensor:
        return plain(w, h) + ((w * h) ** 2 + 1).sqrt().sum()

    sgd, nadam = hf.optim.sgd(0.05), hf.optim.from_torch(torch.optim.NAdam, lr=0.05)
    h = torch.tensor([0.5, -0.3])
    for given, optimizer, same in (
        (hf.checkpoint(plain), sgd, plain),
        (nested, sgd, unnested),
        (plain, nadam, plain),
    ):
        solver = minimize(given, optimizer, 2, init=lambda h: 0.5 * h)
        expected = jacrev(minimize(same, optimizer, 2, init=lambda h: 0.5 * h))(h)
        for method in (Reverse(), ForwardMode()):
            fn = hf.hypergrad(solver, lambda w, h: (w**3).sum(), method=method)
            torch.testing.assert_close(fn(h), (3 * solver(h) ** 2) @ expected)
            solution = method.solution_map(solver)
            torch.testing.assert_close(jacrev(solution)(h), expected)
            pull, rows = torch.func.vjp(solution, h)[1], torch.arange(12.0).reshape(2, 3, 2)
            torch.testing.assert_close(vmap(vmap(pull))(rows)[0], rows @ expected)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_checkpoint_composes(operation: str) -> None:
    def twice(fn: Callable[..., Any]) -> Any:
        return checkpoint(lambda *args: checkpoint(fn)(*args))

    expected = OPERATIONS[operation](layered(lambda fn: fn))
    for layer in (checkpoint, twice):
        result = OPERATIONS[operation](layered(layer))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_checkpoint_keeps_the_arguments_alone_and_runs_twice() -> None:
    calls = []

    @checkpoint
    def fn(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin().cos().sin()

    x = torch.ones(3, requires_grad=True)
    y = fn(x)
    assert graph_size(y) == 2
    y.sum().backward()
    assert len(calls) == 2
    fn(x.detach())
    assert len(calls) == 3


def test_checkpoint_passes_on_any_tree() -> None:
    @checkpoint
    def fn(tree: Any, *, label: str) -> Any:
        x, n = tree
        return {"y": x * n, "same": x, "index": torch.arange(3), "label": label, "none": None}

    x = torch.ones(2, requires_grad=True)
    out = fn((x, 3), label="a")
    assert out["label"] == "a"
    assert out["none"] is None
    assert torch.equal(out["index"], torch.arange(3))
    (out["y"].sum() + 2 * out["same"].sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), 5.0))
    assert checkpoint(lambda n: n + 1)(3) == 4


def test_checkpoint_of_complex_tensors() -> None:
    def fn(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return z * torch.complex(x.sin(), x), (z.conj() * z).real + z.imag.exp()

    def f(fn: Any, x: Tensor, z: Tensor) -> Tensor:
        z, y = fn(fn(z, x)[0], x)
        return (y * x).sum() + z.abs().sum() + z.imag.sum()

    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex128)

    def by_autograd(f: Any) -> Any:
        leaves = x.clone().requires_grad_(), z.clone().requires_grad_()
        return torch.autograd.grad(f(*leaves), leaves)

    for operate in (
        by_autograd,
        lambda f: grad(f, argnums=(0, 1))(x, z),
        lambda f: hessian(lambda x: f(x, torch.complex(x, x.cos())))(x),
        lambda f: jvp(f, (x, z), (x.sin(), z.sin())),
        lambda f: vmap(grad(f, argnums=(0, 1)))(torch.stack([x, x]), torch.stack([z, z.sin()])),
    ):
        expected, result = (operate(functools.partial(f, g)) for g in (fn, checkpoint(fn)))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [ReverseUnroll(), *KINDS], ids=repr)
def test_complex_arguments(method: Any) -> None:
    def step(w: Tensor, h: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(h * w + (z * z).imag)

    solve = method.solution_map(iterate(step, 4, init=lambda h, z: z.abs()))
    h, z = torch.tensor(0.6), torch.randn(3, dtype=torch.complex128)
    x, y = z.real.clone(), z.imag.clone()

    def f(h: Tensor, z: Tensor) -> Tensor:
        return (solve(h, z) ** 2).sum()  # type: ignore[no-any-return]

    by_parts = grad(lambda h, x, y: f(h, torch.complex(x, y)), (0, 1, 2))
    if isinstance(method, ForwardMode):
        assert grad(f)(h, z).isfinite()
        for refused in (lambda: by_parts(h, x, y), lambda: grad(f, argnums=1)(h, z)):
            with pytest.raises(
                TypeError, match="ForwardMode has no derivatives with respect to complex"
            ):
                refused()
        return
    of_h, of_x, of_y = by_parts(h, x, y)
    torch.testing.assert_close(grad(f, argnums=(0, 1))(h, z), (of_h, torch.complex(of_x, of_y)))
    step_size = 1e-6 * torch.eye(3)
    for e, slope in zip(step_size, of_y, strict=True):
        difference = f(h, torch.complex(x, y + e)) - f(h, torch.complex(x, y - e))
        torch.testing.assert_close(difference / 2e-6, slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("randomness", [None, "same", "different"])
def test_checkpoint_draws_the_same_random_numbers(
    randomness: str | None, device: torch.device
) -> None:
    def fn(x: Tensor, generator: torch.Generator) -> Tensor:
        if randomness is None:
            x = x * torch.rand(x.shape, generator=generator, device=device)
        return F.dropout(x.sin()) * torch.randn_like(x)

    def run(fn: Any) -> Any:
        torch.manual_seed(0)
        generator = torch.Generator(device).manual_seed(1)

        def f(x: Tensor) -> Tensor:
            return fn(fn(x, generator), generator).sum()

        x = torch.linspace(1, 2, 12, device=device).reshape(3, 4)
        derivative = grad(f) if randomness is None else vmap(grad(f), randomness=randomness)
        return derivative(x), torch.rand(3), torch.rand(3, generator=generator, device=device)

    torch.testing.assert_close(run(checkpoint(fn)), run(fn))


@pytest.mark.parametrize("operation", NOISY)
def test_checkpoint_draws_the_same_random_numbers_at_every_order(operation: str) -> None:
    def noise(x: Tensor, h: Any) -> Tensor:
        return (F.dropout(h["w0"] * h["a"]) * torch.randn(3)).sin() * x + h["b"]

    def run(layer: Callable[..., Any]) -> Any:
        torch.manual_seed(2)
        f = lambda h: (layer(noise)(layer(noise)(h["lr"], h), h) ** 3).sum()  # noqa: E731
        return NOISY[operation](f), torch.rand(4)

    torch.testing.assert_close(run(checkpoint), run(lambda fn: fn), rtol=1e-12, atol=1e-12)


def test_checkpoint_restores_autocast(device: torch.device) -> None:
    dtypes = []

    @checkpoint
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        dtypes.append(y.dtype)
        return y.float()

    x, w = torch.ones(2, 2, device=device).float(), torch.ones(2, 2, device=device).float()
    w.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = fn(x, w)
    y.sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_checkpoint_refuses_what_it_would_lose() -> None:
    weight = torch.ones(3, requires_grad=True)
    hidden = torch.nn.Module()
    hidden.weight = torch.nn.Parameter(weight.detach())
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"the checkpointed function .* closes over a tensor"):
        checkpoint(lambda x: x * weight)(x).sum().backward()
    with pytest.raises(ValueError, match="closes over a tensor"):
        checkpoint(lambda x: x * hidden.weight)(x).sum().backward()

    def f(h: Tensor) -> Tensor:
        module = torch.nn.Module()
        module.captured = h
        return checkpoint(lambda x: x * module.captured)(h.sin()).sum()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="closes over a tensor"):
        grad(f)(torch.ones(3))
