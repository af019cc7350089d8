"""Coefficients that depend on the step, against torch's schedulers and loops by hand."""

import functools
import math

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.optim import lr_scheduler as torch_schedules

import hyperfunc as hf
from hyperfunc import optim
from tests.optim.test_optim import (
    CASES,
    F64,
    assert_close,
    coefficient_cases,
    difference,
    with_coefficient,
)

STEPS = 25

# One row a schedule: ours for a base value, and what torch makes of an optimiser with that as lr.
SCHEDULES = {
    "constant": (
        lambda lr: optim.constant(lr, 0.4, 7),
        lambda opt: torch_schedules.ConstantLR(opt, 0.4, 7),
    ),
    "linear": (
        lambda lr: optim.linear(lr, 0.2, 0.7, 9),
        lambda opt: torch_schedules.LinearLR(opt, 0.2, 0.7, 9),
    ),
    "linear by default": (optim.linear, torch_schedules.LinearLR),
    "constant by default": (optim.constant, torch_schedules.ConstantLR),
    "warmup": (
        lambda lr: optim.warmup(lr, 6),
        lambda opt: torch_schedules.LinearLR(opt, total_iters=6),
    ),
    "cosine": (
        lambda lr: optim.cosine(lr, 10, 0.01),
        lambda opt: torch_schedules.CosineAnnealingLR(opt, 10, 0.01),
    ),
    "exponential": (
        lambda lr: optim.exponential(lr, 0.8),
        lambda opt: torch_schedules.ExponentialLR(opt, 0.8),
    ),
    "stairs": (
        lambda lr: optim.exponential(lr, 0.5, every=4),
        lambda opt: torch_schedules.StepLR(opt, 4, 0.5),
    ),
    "polynomial": (
        lambda lr: optim.polynomial(lr, 12, 1.5),
        lambda opt: torch_schedules.PolynomialLR(opt, 12, 1.5),
    ),
    "piecewise": (
        lambda lr: optim.piecewise([lr, 0.5 * lr, 0.25 * lr], [3, 9]),
        lambda opt: torch_schedules.MultiStepLR(opt, [3, 9], 0.5),
    ),
    "one after the other": (
        lambda lr: optim.piecewise(
            [optim.linear(lr, 0.1, 1.0, 5), optim.cosine(lr, 12), optim.exponential(lr, 0.9)],
            [5, 16],
        ),
        lambda opt: torch_schedules.SequentialLR(
            opt,
            [
                torch_schedules.LinearLR(opt, 0.1, 1.0, 5),
                torch_schedules.CosineAnnealingLR(opt, 12),
                torch_schedules.ExponentialLR(opt, 0.9),
            ],
            [5, 16],
        ),
    ),
    "chained": (
        lambda lr: optim.warmup(optim.exponential(lr, 0.9), 6),
        lambda opt: torch_schedules.ChainedScheduler(
            [
                torch_schedules.LinearLR(opt, total_iters=6),
                torch_schedules.ExponentialLR(opt, 0.9),
            ]
        ),
    ),
    "own": (
        lambda lr: optim.schedule(lambda h, step: lr / (1 + step.double())),
        lambda opt: torch_schedules.LambdaLR(opt, lambda step: 1 / (1 + step)),
    ),
    "per_step": (
        lambda lr: optim.per_step(lr / (1 + torch.arange(STEPS, dtype=F64))),
        lambda opt: torch_schedules.LambdaLR(opt, lambda step: 1 / (1 + step)),
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning", "ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULES)
def test_values_are_those_of_torch(name):
    ours, theirs = SCHEDULES[name]
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.3)
    scheduler = theirs(optimizer)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = torch.tensor(expected, dtype=F64)
    schedule = ours(torch.tensor(0.3, dtype=F64))
    got = torch.stack([schedule(None, torch.tensor(t)) for t in range(STEPS)])
    assert_close(got, expected, 1e-13)
    assert_close(vmap(functools.partial(schedule, None))(torch.arange(STEPS)), expected, 1e-13)
    # as a number, which is not rounded to the default dtype
    if name not in ("per_step", "own"):
        assert_close(torch.as_tensor(ours(0.3)(None, torch.tensor(4)), dtype=F64), expected[4])


def test_numbers_of_schedules_have_derivatives():
    numbers = torch.tensor([0.3, 0.6, 0.4, 1.2, 0.7], dtype=F64)
    schedules = [
        lambda h: optim.constant(lambda h: h[0], lambda h: h[1], 4),
        lambda h: optim.linear(lambda h: h[0], lambda h: h[1], lambda h: h[2], 4),
        lambda h: optim.cosine(lambda h: h[0], 7, lambda h: h[1]),
        lambda h: optim.exponential(lambda h: h[0], lambda h: h[1]),
        lambda h: optim.polynomial(lambda h: h[0], 7, lambda h: h[3]),
        lambda h: optim.piecewise([lambda h: h[0], optim.exponential(0.5, lambda h: h[4])], [2]),
        lambda h: optim.per_step(lambda h: h),
    ]
    for make in schedules:
        for step in (0, 3, 9):

            def value(numbers, schedule=make(None), step=torch.tensor(step)):
                return schedule(numbers, step)

            def moved(x, i, value=value):
                return value(numbers + x * torch.eye(5, dtype=F64)[i])

            got = jacrev(value)(numbers)
            for i in range(5):
                expected = difference(functools.partial(moved, i=i), 0 * numbers[0])
                assert_close(got[i], torch.as_tensor(expected), 1e-9)


def test_any_coefficient_of_any_optimiser_may_be_a_schedule():
    w0 = torch.tensor([0.7, -0.4], dtype=F64)

    def loss(w, h):
        return (0.75 * w**2 + 0.15 * torch.sin(2 * w) - 0.4 * w).sum()

    def outer(w, h):
        return (w**2).sum()

    factors = torch.tensor([1.0, 0.9, 1.1, 0.8], dtype=F64)
    for parameters in coefficient_cases():
        name, fixed, key, index = parameters.values
        value = CASES[name]["coefficients"][key]
        h = {"c": torch.tensor(value if index is None else value[index], dtype=F64)}
        scheduled = with_coefficient(
            name, fixed, key, index, optim.schedule(lambda h, step: h["c"] * factors[step])
        )
        by_hand = with_coefficient(name, fixed, key, index, lambda c: c)

        def train(h, optimizer=by_hand):
            w, state = w0, optimizer.init(w0)
            for factor in factors:
                w, state = optimizer.update(grad(loss)(w, h), state, w, h["c"] * factor)
            return w

        def update(h, optimizer=scheduled):
            w, state = w0, optimizer.init(w0)
            for _ in factors:
                w, state = optimizer.update(grad(loss)(w, h), state, w, h)
            return w

        solver = hf.minimize(loss, scheduled, len(factors), init=lambda h: w0)
        expected = grad(lambda h, train=train: outer(train(h), h))(h)
        assert abs(expected["c"]) > 1e-5
        assert_close(update(h), train(h))
        assert_close(hf.hypergrad(solver, outer, method="reverse")(h), expected, 1e-11)


def problem(optimizer, compile=False):
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(*shape, generator=generator, dtype=F64) for shape in [(12, 3), (12,)])

    def loss(w, h, *inputs):
        return ((X @ w - y) ** 2).mean()

    def outer(w, h):
        return ((w - 1) ** 2).sum()

    solver = hf.minimize(
        loss, optimizer, 6, init=lambda h: torch.zeros(3, dtype=F64), compile=compile
    )
    return solver, outer


def rates(h):
    return h["base"] * h["decay"] ** torch.arange(6)


H = {"base": torch.tensor([0.1, 0.2], dtype=F64), "decay": torch.tensor([0.7, 0.9], dtype=F64)}
RATE = optim.schedule(lambda h, step: rates(h)[step])
OPTIMIZERS = {
    "adam": optim.adam(RATE),
    "clipped": optim.clip_grad_norm(
        optim.clip_grad_value(optim.sgd(RATE), optim.cosine(1.0, 10)), optim.linear(0.5)
    ),
    "of torch": optim.from_torch(torch.optim.NAdam, lr=RATE),
}


def test_schedules_by_the_name_of_a_parameter():
    params = {"a": torch.ones(2, dtype=F64), "b": torch.ones((), dtype=F64)}
    falling = optim.linear(lambda rate: rate, 1.0, 0.5, num_steps=2)
    named = optim.by_name(lambda name: falling if name == "a" else 0.2)

    def train(optimizer, rate):
        w, state = params, optimizer.init(params)
        for _ in range(3):
            w, state = optimizer.update(w, state, w, rate)
        return w["a"].sum() + w["b"]

    rate = torch.tensor(0.1, dtype=F64)
    for make in (optim.sgd, optim.adam, lambda c: optim.clip_grad_value(optim.sgd(1.0), c)):
        dictionary, function = make({"a": falling, "b": 0.2}), make(named)
        assert train(function, rate) == train(dictionary, rate)
        expected = torch.func.grad(lambda rate: train(dictionary, rate))(rate)  # noqa: B023
        assert torch.func.grad(lambda rate: train(function, rate))(rate) == expected != 0  # noqa: B023
    wrong = optim.by_name(lambda name: optim.by_name(lambda name: 0.1))
    for make, error, text in (
        (lambda: optim.sgd(wrong), TypeError, r"lr: what stands for params\['a'\] is ByName"),
        (lambda: optim.sgd(optim.by_name(lambda name: (0.1, 0.2))), TypeError, r"lr: what stands"),
        (
            lambda: optim.sgd(optim.by_name(lambda name: "x")),
            TypeError,
            "lr for a parameter is 'x'",
        ),
        (
            lambda: optim.sgd(optim.by_name(lambda name: -1)),
            ValueError,
            "parameter is -1; expected",
        ),
        (
            lambda: optim.sgd(lambda rate: falling),
            TypeError,
            r"lr\(hparams\) is a schedule; .* Give",
        ),
        (lambda: optim.sgd(optim.linear(named)), TypeError, "linear: value holds ByName.*by_name"),
        (lambda: optim.sgd(optim.per_step(named)), TypeError, "per_step: values holds ByName"),
        (lambda: optim.from_torch(torch.optim.NAdam, lr=named), TypeError, "lr is a function of n"),
        (lambda: hf.gradient_descent_map(max, named), TypeError, "lr is a function of names"),
    ):
        with pytest.raises(error, match=text):
            train(make(), rate)


def test_limits_of_clipping_by_name_and_of_grouped_optimisers():
    w = {"a.w": torch.ones(2, dtype=F64), "b.w": torch.ones(2, dtype=F64)}
    falling = optim.schedule(lambda h, step: 0.3 / (1 + step.double()))
    by_name = optim.clip_grad_value(optim.sgd(1.0), {"a": falling, "b": 0.2})
    grouped = optim.grouped({"a": optim.sgd(1.0), "b": optim.sgd(1.0)})
    moved = [(by_name, 0.45, 0.4), (optim.clip_grad_value(grouped, falling), 0.45, 0.45)]
    for optimizer, a, b in moved:
        solver = hf.minimize(
            lambda w, h: w["a.w"].sum() + w["b.w"].sum(), optimizer, 2, init=lambda h: w
        )
        got = solver(torch.zeros((), dtype=F64))
        assert_close(got, {"a.w": w["a.w"] - a, "b.w": w["b.w"] - b})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_replays_schedules(name):
    solver, outer = problem(OPTIMIZERS[name])
    h = {key: value[0] for key, value in H.items()}

    def objective(x, key):
        return outer(solver({**h, key: x}), None)

    expected = {key: difference(functools.partial(objective, key=key), h[key]) for key in h}
    # torch's own steps have no batch of tangents
    methods = ["reverse_unroll", hf.Reverse("sqrt")] + ["forward"] * (name != "of torch")
    for method in methods:
        fn = hf.hypergrad(solver, outer, method=method)
        assert_close(fn(h), expected, 1e-8)
        tasks = [fn({key: value[i] for key, value in H.items()}) for i in range(2)]
        stacked = {key: torch.stack([task[key] for task in tasks]) for key in h}
        assert_close(vmap(fn)(H), stacked, 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("method", ["reverse_unroll", "reverse"])
@pytest.mark.parametrize("name", ["adam", "clipped"])
def test_schedules_compile(name, method):
    fn, compiled = (
        hf.hypergrad(*problem(OPTIMIZERS[name], compile), method=method)
        for compile in (False, True)
    )
    h = {key: value[0] for key, value in H.items()}
    assert_close(compiled(h), fn(h), 1e-12)
    assert_close(vmap(compiled)(H), vmap(fn)(H), 1e-12)


def test_tasks_may_be_at_different_steps_and_go_on_where_they_stopped():
    optimizer = optim.sgd(optim.schedule(lambda h, step: h[step]), momentum=0.5)
    h, w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64), torch.tensor(1.0, dtype=F64)
    states, here = [optimizer.init(w)], [w]
    for _ in range(4):
        new, state = optimizer.update(here[-1], states[-1], here[-1], h)
        here.append(new)
        states.append(state)
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    batch = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *states[:4])
    got, after = vmap(optimizer.update, in_dims=(0, 0, 0, None))(
        torch.stack(here[:4]), batch, torch.stack(here[:4]), h
    )
    assert_close(got, torch.stack(here[1:]))
    assert after.step.tolist() == [1, 2, 3, 4]


def test_rates_step_by_step_and_layer_by_layer():
    optimizer = optim.sgd(optim.per_step(lambda rates: rates))
    table = {"a": torch.tensor([0.5, 0.2], dtype=F64), "b": torch.tensor([[0.1], [0.3]], dtype=F64)}
    w0 = {"a": {"w": torch.ones(2, dtype=F64)}, "b": torch.ones(1, dtype=F64)}

    def train(table):
        w, state = w0, optimizer.init(w0)
        for _ in range(3):  # the last row stays
            w, state = optimizer.update(w, state, w, table)
        return {"a": w["a"]["w"], "b": w["b"]}

    a, b = table["a"], table["b"][:, 0]
    assert_close(train(table)["a"], ((1 - a[0]) * (1 - a[1]) ** 2).expand(2))
    slopes = grad(lambda t: train(t)["b"].sum())(table)["b"][:, 0]
    expected = [-((1 - b[1]) ** 2), -2 * (1 - b[0]) * (1 - b[1])]
    assert_close(slopes, torch.stack(expected))


def test_bilevel_loops_and_stochastic_solves_take_schedules():
    def inner(w, h, x):
        return ((w - h * x) ** 2).sum() / 2

    def outer(w, h, y):
        return ((w - y) ** 2).sum() / 2

    batch, w, h = (torch.tensor(2.0, dtype=F64),), torch.zeros(2, dtype=F64), torch.ones(())
    options = [
        {"inner_lr": lambda t: 0.5 / (1 + t), "outer_lr": 0.1},
        {
            "inner_lr": optim.schedule(lambda h, t: 0.5 / (1 + t)),
            "outer_lr": optim.piecewise([lambda h: 0.1 * torch.ones_like(h), 0.1], [2]),
        },
    ]
    states = []
    for each in options:
        loop = hf.bilevel.soba(inner, outer, **each)
        state = loop.init(w, h)
        for _ in range(5):
            state = loop.update(state, batch, batch)
        states.append(state)
    assert_close(states[0].params, states[1].params)
    assert_close(states[0].hparams, states[1].hparams.to(states[0].hparams.dtype))

    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    b = torch.tensor([1.0, -1.0], dtype=F64)
    x = torch.zeros(2, dtype=F64)
    for t in range(7):
        x = x - 0.4 * (1 + math.cos(math.pi * t / 10)) / 2 * (A @ x - b)
    method = hf.StochasticAID(num_steps=7, optimizer=optim.sgd(optim.cosine(0.4, 10)))
    fn = hf.hypergrad_and_solution(
        lambda h: torch.linalg.solve(A, h),
        lambda w, h: b @ w,
        inner_loss=lambda w, h: w @ A @ w / 2 - h @ w,
        method=method,
    )
    assert_close(fn(torch.ones(2, dtype=F64))[1].adjoint, x)


W = torch.ones(2)
ERRORS = [
    (
        lambda: optim.sgd(lambda h, step: h),
        TypeError,
        r"lr is .* two arg.* lr=hf.optim.schedu",
    ),
    (lambda: optim.schedule(0.1), TypeError, r"schedule: fn is 0.1 .*\(hparams, step\) -> value"),
    (lambda: optim.cosine(-0.1, 10), ValueError, "cosine: value is -0.1; expected a number of at"),
    (lambda: optim.cosine(0.1, 0), ValueError, "cosine: num_steps is 0; expected an integer >= 1"),
    (lambda: optim.piecewise([0.1], [3]), ValueError, "got 1 values and boundaries"),
    (lambda: optim.piecewise([0.1, 0.2, 0.3], [3, 3]), ValueError, "expected increasing steps"),
    (lambda: optim.per_step(0.1)(None, torch.tensor(0)), ValueError, "leading dimension of steps"),
    (
        lambda: optim.exponential(0.1, torch.ones(2))(None, torch.tensor(0)),
        TypeError,
        "exponential: gamma is .*one value for all leaves",
    ),
    (
        lambda: optim.cosine(lambda h: h, 5)(None, torch.tensor(0)),
        TypeError,
        "cosine: value is a function of hparams, but update got hparams=None",
    ),
    (
        lambda: hf.gradient_descent_map(lambda w, h: w.sum(), optim.cosine(0.1, 5)),
        TypeError,
        "gradient_descent_map: lr is a schedule, but no steps are counted here",
    ),
    (
        lambda: hf.proximal(lambda w, h: w.sum(), optim.cosine(0.1, 5)),
        TypeError,
        "proximal: weight is a schedule",
    ),
    (
        lambda: hf.prox.l1(optim.cosine(0.1, 5))(W, W, 0.1),
        TypeError,
        "l1: weight is a schedule",
    ),
    (
        lambda: optim.clip_grad_norm(
            optim.Optimizer(lambda w: (), lambda g, s, w, h=None: (w, s)), optim.linear(1.0)
        ).update(W, (), W),
        TypeError,
        "clip_grad_norm: max_norm is a schedule, which needs the step, .* of type tuple",
    ),
    (
        lambda: optim.heavy_ball(0.1, beta=0.9),
        TypeError,
        r"heavy_ball: beta is called momentum, as in sgd. Write heavy_ball\(lr=0.1, momentum=0.9\)",
    ),
    (lambda: optim.heavy_ball(0.1), TypeError, "heavy_ball: got no momentum"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors_say_what_was_got_and_what_to_type(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_a_schedule_prints_as_the_call_that_makes_it():
    for made in (
        optim.constant(0.1),
        optim.warmup(optim.cosine(0.1, 7, end=0.01), 3),
        optim.exponential(0.1, 0.5, every=2),
        optim.polynomial(0.1, 3),
        optim.piecewise([0.1, optim.linear(0.2)], [4]),
    ):
        assert eval(repr(optim.sgd(made)), vars(optim)) == optim.sgd(made)
