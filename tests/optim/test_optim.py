"""The optimisers against torch.optim, finite differences, loops over tasks, and closed forms."""

import copy
import functools
import itertools
import math
from collections import namedtuple

import optree
import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import hyperfunc as hf
from hyperfunc import optim
from tests.cells import slow_but

F64 = torch.float64

# One row an optimiser: how it is called, the torch class it must agree with, the values that each
# option takes in the parity test (all combinations), and the coefficients to differentiate in.
CASES = {
    "sgd": {
        "make": optim.sgd,
        "torch": torch.optim.SGD,
        "options": {
            "momentum": [0.0, 0.9],
            "dampening": [0.0, 0.3],
            "weight_decay": [0.0, 0.1],
            "nesterov": [False, True],
            "maximize": [False, True],
        },
        "valid": lambda o: not o["nesterov"] or (o["momentum"] and not o["dampening"]),
        "coefficients": {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1},
    },
    "adam": {
        "make": optim.adam,
        "torch": torch.optim.Adam,
        "options": {
            "betas": [(0.9, 0.999), (0.0, 0.5)],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.1],
            "amsgrad": [False, True],
            "maximize": [False, True],
        },
        "coefficients": {
            "lr": 0.1,
            "betas": (0.8, 0.9),
            "eps": 0.05,
            "weight_decay": 0.1,
        },
    },
    "adamw": {
        "make": optim.adamw,
        "torch": torch.optim.AdamW,
        "options": {
            "betas": [(0.9, 0.999), (0.0, 0.5)],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.1],
            "amsgrad": [False, True],
            "maximize": [False, True],
        },
        "coefficients": {
            "lr": 0.1,
            "betas": (0.8, 0.9),
            "eps": 0.05,
            "weight_decay": 0.1,
        },
    },
    "rmsprop": {
        "make": optim.rmsprop,
        "torch": torch.optim.RMSprop,
        "options": {
            "alpha": [0.99, 0.5],
            "eps": [1e-8, 1e-2],
            "weight_decay": [0.0, 0.1],
            "momentum": [0.0, 0.9],
            "centered": [False, True],
            "maximize": [False, True],
        },
        "coefficients": {
            "lr": 0.05,
            "alpha": 0.9,
            "eps": 0.1,
            "weight_decay": 0.1,
            "momentum": 0.5,
        },
    },
    "adagrad": {
        "make": optim.adagrad,
        "torch": torch.optim.Adagrad,
        "options": {
            "lr_decay": [0.0, 0.1],
            "weight_decay": [0.0, 0.1],
            "initial_accumulator_value": [0.0, 0.2],
            "eps": [1e-10, 1e-2],
            "maximize": [False, True],
        },
        "coefficients": {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.1},
    },
    "heavy_ball": {
        "make": optim.heavy_ball,
        "torch": None,
        "options": {},
        "coefficients": {"lr": 0.1, "momentum": 0.7},
    },
}
VARIANTS = {
    "sgd": [{}, {"nesterov": True, "dampening": 0.0}],
    "adam": [{}, {"amsgrad": True}],
    "rmsprop": [{}, {"centered": True}],
}
# Optimisers with all their coefficients as numbers, for the tests that are common to all.
COMMON = {
    "sgd": optim.sgd(0.1),
    "momentum": optim.sgd(0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True, maximize=True),
    "heavy_ball": optim.heavy_ball(0.1, 0.8),
    "adam": optim.adam(0.1, eps=0.1, weight_decay=0.1),
    "amsgrad": optim.adam(0.1, (0.5, 0.6), eps=0.1, amsgrad=True),
    "adamw": optim.adamw(0.1, eps=0.1),
    "rmsprop": optim.rmsprop(0.1, eps=0.1, momentum=0.5, centered=True),
    "adagrad": optim.adagrad(0.1, lr_decay=0.1, eps=0.1),
    "clip_grad_norm": optim.clip_grad_norm(optim.adam(0.1, eps=0.1), 1.0),
    "clip_grad_value": optim.clip_grad_value(optim.sgd(0.1, momentum=0.9), 0.5),
    "nadam": optim.from_torch(torch.optim.NAdam, lr=0.1, eps=0.1),
    "radam": optim.from_torch(torch.optim.RAdam, lr=0.1, betas=(0.5, 0.9), eps=0.1),
}
NATIVE = [name for name in COMMON if name not in ("nadam", "radam")]


def make_params(dtype=F64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return {
        "layer": {
            "weight": torch.randn(3, 2, generator=generator, dtype=F64).to(device, dtype),
            "bias": torch.randn(3, generator=generator, dtype=F64).to(device, dtype),
        },
        "none": (),
        "scale": torch.tensor(0.7, dtype=dtype, device=device),
    }


def gradient(params):
    """The gradient of a smooth loss with one minimum, leaf by leaf."""
    return optree.tree_map(lambda w: 1.5 * w + 0.3 * torch.cos(2 * w) - 0.4, params)


def run(optimizer, params, num_steps, hparams=None):
    state = optimizer.init(params)
    for _ in range(num_steps):
        params, state = optimizer.update(gradient(params), state, params, hparams)
    return params


def run_torch(optimizer_class, params, num_steps, **options):
    leaves, spec = optree.tree_flatten(params)
    leaves = [leaf.clone() for leaf in leaves]
    optimizer = optimizer_class(leaves, **options)
    for _ in range(num_steps):
        for leaf in leaves:
            leaf.grad = gradient(leaf)
        optimizer.step()
    return optree.tree_unflatten(spec, leaves)


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def loss(params):
    return (flat(params) ** 2).sum()


def products(options, valid=lambda o: True):
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if valid(chosen):
            yield chosen


def difference(fn, x, h=1e-5):
    """The derivative of fn at x in the direction of increasing x, to fourth order."""
    return (8 * (fn(x + h) - fn(x - h)) - (fn(x + 2 * h) - fn(x - 2 * h))) / (12 * h)


def assert_close(got, expected, tol=1e-12):
    torch.testing.assert_close(got, expected, rtol=tol, atol=tol)


# Values


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["torch"]])
def test_parity_with_torch_in_every_combination_of_options(name, device):
    case = CASES[name]
    params = make_params(device=device)
    combinations = list(products(case["options"], case.get("valid", lambda o: True)))
    assert len(combinations) >= 18
    for options in combinations:
        expected = flat(run_torch(case["torch"], params, 50, lr=0.02, **options))
        got = flat(run(case["make"](0.02, **options), params, 50))
        assert (got - expected).abs().max() <= 1e-12, options
        assert (got - flat(params)).abs().max() > 1e-3, options


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["torch"]])
def test_defaults_and_names_of_options_are_those_of_torch(name):
    case = CASES[name]
    params = make_params()
    assert_close(run(case["make"](), params, 5), run_torch(case["torch"], params, 5))
    for option in case["options"]:
        case["make"](**{option: case["options"][option][0]})


def test_tensor_coefficients_give_the_values_of_numbers():
    params = make_params()
    for name, case in CASES.items():
        as_numbers = case["make"](**case["coefficients"])
        as_tensors = case["make"](
            **optree.tree_map(lambda x: torch.tensor(x, dtype=F64), case["coefficients"])
        )
        assert_close(flat(run(as_tensors, params, 20)), flat(run(as_numbers, params, 20))), name


def test_heavy_ball_starts_at_rest_and_keeps_the_previous_iterate():
    lr, beta, num_steps = 0.1, 0.7, 30
    current = previous = torch.tensor([1.0, -2.0], dtype=F64)
    for _ in range(num_steps):
        current, previous = (
            current - lr * gradient(current) + beta * (current - previous),
            current,
        )
    w0 = torch.tensor([1.0, -2.0], dtype=F64)
    assert_close(run(optim.heavy_ball(lr, beta), w0, num_steps), current)
    assert_close(run(optim.sgd(lr, momentum=beta), w0, num_steps), current)


def test_a_rate_that_changes_weighs_heavy_ball_and_momentum_differently():
    def two_steps(optimizer):
        w = torch.tensor(1.0, dtype=F64)
        state = optimizer.init(w)
        for lr in (0.1, 0.0):
            w, state = optimizer.update(torch.ones((), dtype=F64), state, w, lr)
        return w

    assert_close(two_steps(optim.heavy_ball(lambda lr: lr, 0.5)), torch.tensor(0.85, dtype=F64))
    assert_close(two_steps(optim.sgd(lambda lr: lr, 0.5)), torch.tensor(0.9, dtype=F64))


# Derivatives


def coefficient_cases():
    """Each coefficient of each optimiser; every other one is slow."""
    marks = itertools.cycle([(), pytest.mark.slow])
    for name, case in CASES.items():
        for fixed in VARIANTS.get(name, [{}]):
            for key, value in case["coefficients"].items():
                if key in fixed:
                    continue
                for index in range(len(value)) if isinstance(value, tuple) else [None]:
                    label = f"{name}-{key}{'' if index is None else index}-{'-'.join(fixed)}"
                    yield pytest.param(name, fixed, key, index, id=label, marks=next(marks))


def with_coefficient(name, fixed, key, index, coefficient):
    options = {**CASES[name]["coefficients"], **fixed}
    if index is None:
        options[key] = coefficient
    else:
        pair = list(options[key])
        pair[index] = coefficient
        options[key] = tuple(pair)
    return CASES[name]["make"](**options)


@pytest.mark.parametrize(("name", "fixed", "key", "index"), list(coefficient_cases()))
def test_derivatives_in_each_coefficient(name, fixed, key, index, device):
    params = make_params(device=device)
    value = CASES[name]["coefficients"][key]
    at = torch.tensor(value if index is None else value[index], dtype=F64, device=device)
    optimizer = with_coefficient(name, fixed, key, index, lambda hparams: hparams["c"])

    def objective(c):
        return loss(run(optimizer, params, 4, {"c": c}))

    expected = difference(objective, at)
    assert abs(expected) > 1e-4
    reverse = grad(objective)(at)
    forward = jvp(objective, (at,), (torch.ones_like(at),))[1]
    leaf = at.clone().requires_grad_()
    direct = with_coefficient(name, fixed, key, index, leaf)
    loss(run(direct, params, 4)).backward()
    for got in (reverse, forward, leaf.grad):
        assert_close(got, expected, 2e-9)
    assert_close(forward, reverse)

    second = difference(grad(objective), at)
    for got in (
        grad(grad(objective))(at),
        jacfwd(jacfwd(objective))(at),
        jacfwd(grad(objective))(at),
    ):
        assert_close(got, second, 2e-8)


@pytest.mark.parametrize("name", COMMON)
def test_derivatives_in_gradients_state_and_params(name, device):
    optimizer = COMMON[name]
    params = make_params(device=device)
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update(gradient(params), state, params)
    leaves, spec = optree.tree_flatten((gradient(params), state, params))
    names = [entry.codify("") for entry in optree.tree_accessors((gradient(params), state, params))]
    # Counters stay: for derivatives they are constants.
    counters = (".step", "['step']", "['mu_product']")
    moving = [i for i, name in enumerate(names) if not name.endswith(counters)]
    generator = torch.Generator().manual_seed(2)
    # Factors near one keep what is positive so.
    directions = [
        torch.randn(leaves[i].shape, generator=generator, dtype=F64).to(device) * leaves[i]
        for i in moving
    ]

    def step(t):
        moved = list(leaves)
        for i, direction in zip(moving, directions, strict=True):
            moved[i] = leaves[i] + t * direction
        new = optimizer.update(*optree.tree_unflatten(spec, moved))
        return flat(optree.tree_map(lambda x: torch.sin(x.to(device, F64)), new)).sum()

    at = torch.zeros((), dtype=F64, device=device)
    expected = difference(step, at)
    assert_close(grad(step)(at), expected, 1e-8)
    assert_close(jvp(step, (at,), (torch.ones_like(at),))[1], expected, 1e-8)
    second = difference(grad(step), at)
    assert_close(grad(grad(step))(at), second, 1e-8)
    assert_close(jacfwd(grad(step))(at), second, 1e-8)


@pytest.mark.parametrize("name", slow_but(*(set(COMMON) - {"nadam", "radam"}), of=COMMON))
def test_zero_gradients_have_finite_and_right_derivatives(name):
    optimizer = COMMON[name]
    w = torch.zeros(3, dtype=F64)

    def steps(grads):
        params, state = w, optimizer.init(w)
        for factor in (1.0, 0.5, 0.3, 0.2, 0.7, 0.6, 0.9):
            params, state = optimizer.update(factor * grads, state, params)
        return params

    zero = torch.zeros(3, dtype=F64)
    h = 1e-7
    expected = torch.stack(
        [(steps(h * e) - steps(-h * e)) / (2 * h) for e in torch.eye(3, dtype=F64)], 1
    )
    assert expected.abs().max() > 0.05
    assert_close(jacrev(steps)(zero), expected, 1e-5)
    assert_close(jacfwd(steps)(zero), expected, 1e-5)
    # The steps are odd functions, so their second derivative at zero is zero where it exists.
    for second in (jacrev(jacrev(steps)), jacfwd(jacrev(steps))):
        assert_close(second(zero), torch.zeros(3, 3, 3, dtype=F64))


def test_the_root_of_a_nan_stays_nan():
    for optimizer in (optim.adam(0.1), optim.rmsprop(0.1), optim.adagrad(0.1)):
        w = torch.zeros(2, dtype=F64)
        bad = torch.tensor([math.nan, 1.0], dtype=F64)
        for tracked in (False, True):
            good = torch.ones(2, dtype=F64, requires_grad=tracked)
            _, state = optimizer.update(bad, optimizer.init(w), w)
            new, _ = optimizer.update(good, state, w)
            assert new.isnan().tolist() == [True, False]


def test_centred_variances_that_round_below_zero_are_zero():
    w, g = torch.zeros((), dtype=F64), torch.tensor(0.1, dtype=F64)
    optimizer = optim.rmsprop(0.1, alpha=0.5, eps=0.5, centered=True)
    state = optimizer.init(w)
    for _ in range(100):
        w, state = optimizer.update(g, state, w)
        assert w.isfinite()


def test_centred_rmsprop_stays_finite_with_constant_gradients_in_float32():
    w, g = torch.zeros(500), torch.linspace(1e-3, 3, 500)
    optimizer = optim.rmsprop(1e-3, centered=True)
    state = optimizer.init(w)
    for _ in range(2000):
        new, state = optimizer.update(g, state, w)
        assert new.isfinite().all()


@pytest.mark.parametrize("value", [1e-12, 1e-18, 1e-30])
def test_tiny_gradients_in_float32_have_finite_derivatives(value):
    w = torch.zeros(())
    for optimizer in (optim.adam(0.1), optim.rmsprop(0.1), optim.adagrad(0.1)):
        state = optimizer.init(w)

        def step(g, optimizer=optimizer, state=state):
            return optimizer.update(g, state, w)[0]

        g = torch.tensor(value)
        assert grad(step)(g).isfinite()
        assert grad(grad(step))(g).isfinite()


# Coefficients as trees


def test_coefficients_may_be_given_by_layer_leaf_or_entry():
    params = make_params()
    grads = gradient(params)
    rates = {
        "layer": torch.tensor(0.1, dtype=F64),
        "none": (),
        "scale": 0.3,
    }
    for name in ("sgd", "adam", "adamw", "rmsprop", "adagrad"):
        make = CASES[name]["make"]

        def stepped(lr, make=make):
            optimizer = make(lr)
            return optimizer.update(grads, optimizer.init(params), params, params)[0]

        by_layer = stepped(rates)
        assert_close(by_layer["layer"], stepped(0.1)["layer"])
        assert_close(by_layer["scale"], stepped(0.3)["scale"])
        assert_close(stepped(lambda hparams: rates), by_layer)
        by_leaf = optree.tree_map(lambda w: torch.full_like(w, 0.1), params)
        assert_close(stepped(by_leaf), stepped(0.1))
        by_leaf["layer"]["weight"][1, 1] = 0.3
        got = stepped(by_leaf)["layer"]["weight"]
        assert_close(got[1, 1], stepped(0.3)["layer"]["weight"][1, 1])
        assert_close(got[0], stepped(0.1)["layer"]["weight"][0])


def test_rates_by_entry_have_derivatives_by_entry():
    params = make_params()
    rates = optree.tree_map(lambda w: torch.full_like(w, 0.1), params)
    for make in (optim.sgd, optim.adam, optim.adagrad):
        optimizer = make(lambda hparams: hparams)

        def step(rates, optimizer=optimizer):
            return optimizer.update(gradient(params), optimizer.init(params), params, rates)[0]

        # The parameters are linear in the rate.
        got = grad(lambda r: flat(step(r)).sum())(rates)
        expected = optree.tree_map(lambda new, w: (new - w) / 0.1, step(rates), params)
        assert_close(flat(got), flat(expected))


def test_a_schedule_is_one_rate_a_step():
    params = make_params()
    rates = torch.linspace(0.1, 0.2, 5, dtype=F64)

    def train(rates):
        optimizer = optim.adam(lambda rate: rate)
        w, state = params, optimizer.init(params)
        for rate in rates:
            w, state = optimizer.update(gradient(w), state, w, rate)
        return loss(w)

    expected = torch.stack(
        [
            difference(
                lambda x, i=i: train(rates + (x - rates[i]) * (torch.arange(5) == i)), rates[i]
            )
            for i in range(5)
        ]
    )
    assert_close(grad(train)(rates), expected, 1e-8)


# Batches


@pytest.mark.parametrize("name", COMMON)
def test_vmap_is_a_loop(name, device):
    optimizer = COMMON[name]
    params = make_params(device=device)
    state = optimizer.init(params)
    batch = optree.tree_map(lambda w: torch.stack([w, 2 * w, -w]), gradient(params))

    def steps(grads, state):
        w, s = optimizer.update(grads, state, params)
        return optimizer.update(gradient(w), s, w)

    # State and params are not batched, the gradients are; then the results are batched throughout.
    new, new_state = vmap(steps, in_dims=(0, None))(batch, state)
    again, last = vmap(optimizer.update)(gradient(new), new_state, new)
    for task in range(3):
        w, s = steps(optree.tree_map(lambda x, t=task: x[t], batch), state)
        assert_close(flat(optree.tree_map(lambda x, t=task: x[t], new)), flat(w))
        w, s = optimizer.update(gradient(w), s, w)
        assert_close(flat(optree.tree_map(lambda x, t=task: x[t], again)), flat(w))
        for got, expected in zip(optree.tree_leaves(last), optree.tree_leaves(s), strict=True):
            assert_close(got[task] if got.dim() > expected.dim() else got, expected)


@pytest.mark.parametrize("name", NATIVE)
def test_tasks_may_be_at_different_steps(name, device):
    optimizer = COMMON[name]
    w = torch.tensor([0.5, -1.0], dtype=F64, device=device)
    tasks = [(w, optimizer.init(w))]
    for _ in range(2):
        w, state = tasks[-1]
        tasks.append(optimizer.update(gradient(w), state, w))
    batch = optree.tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    got = vmap(lambda w, s: optimizer.update(gradient(w), s, w)[0])(*batch)
    expected = [optimizer.update(gradient(w), s, w)[0] for w, s in tasks]
    assert_close(got, torch.stack(expected))


def test_classes_of_torch_may_be_at_different_steps(device):
    test_tasks_may_be_at_different_steps("nadam", device)
    test_tasks_may_be_at_different_steps("radam", device)


@pytest.mark.parametrize("name", [*CASES, "nadam"])
def test_vmap_over_coefficients_and_derivatives(name, device):
    params = make_params(device=device)
    make = (
        CASES[name]["make"]
        if name in CASES
        else lambda lr: optim.from_torch(torch.optim.NAdam, lr=lr)
    )
    others = {"heavy_ball": {"momentum": 0.5}}.get(name, {})
    optimizer = make(lr=lambda lr: lr, **others)
    rates = torch.tensor([0.1, 0.2, 0.05], dtype=F64, device=device)

    def objective(lr):
        return loss(run(optimizer, params, 3, lr))

    for transformed in (objective, grad(objective), jacfwd(objective), grad(grad(objective))):
        assert_close(vmap(transformed)(rates), torch.stack([transformed(lr) for lr in rates]))
    assert_close(
        grad(lambda rates: vmap(objective)(rates).sum())(rates), vmap(grad(objective))(rates)
    )
    nested = vmap(vmap(objective))(torch.stack([rates, 2 * rates]))
    assert_close(nested[1], vmap(objective)(2 * rates))


# Trees, layouts, dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NATIVE)
def test_half_precision_is_float32_rounded_once(name, dtype, device):
    optimizer = COMMON[name]
    params = make_params(dtype, device)
    single = optree.tree_map(lambda w: w.float(), params)
    grads, single_grads = gradient(params), optree.tree_map(lambda g: g.float(), gradient(params))
    new, state = optimizer.update(grads, optimizer.init(params), params)
    expected, _ = optimizer.update(single_grads, optimizer.init(single), single)
    for got, want in zip(optree.tree_leaves(new), optree.tree_leaves(expected), strict=True):
        assert got.dtype == dtype
        tol = 0.0 if "clip" not in name else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want.to(dtype), rtol=tol, atol=tol)
    assert {x.dtype for x in optree.tree_leaves(state.slots)} <= {dtype}
    derivative = grad(lambda g: optimizer.update(g, optimizer.init(params), params)[0]["scale"])
    assert derivative(grads)["scale"].dtype == dtype


def test_half_precision_keeps_coefficients_that_half_precision_cannot_hold():
    # 0.999 is 1 in bfloat16: rounding it would leave the second average at zero.
    w, g = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 0.5, dtype=torch.bfloat16)
    for beta2 in (0.999, torch.tensor(0.999)):
        optimizer = optim.adam(0.1, (0.9, beta2))
        new, _ = optimizer.update(g, optimizer.init(w), w)
        torch.testing.assert_close(new, torch.full_like(w, 0.9))


def test_leaves_keep_their_own_dtype():
    params = {
        "a": torch.ones(2, dtype=F64),
        "b": torch.ones(2),
        "c": torch.ones((), dtype=torch.half),
    }
    lr = torch.tensor(0.1, requires_grad=True)
    for name, case in CASES.items():
        options = {"momentum": 0.5} if name == "heavy_ball" else {}
        optimizer = case["make"](lr=lr, **options)
        new, state = optimizer.update(params, optimizer.init(params), params)
        new, state = optimizer.update(new, state, new)
        for key, leaf in params.items():
            assert new[key].dtype == leaf.dtype
            assert all(slot[key].dtype == leaf.dtype for slot in state.slots.values())
        sum(leaf.double().sum() for leaf in new.values()).backward()
        assert lr.grad.isfinite()
        lr.grad = None


@optree.register_pytree_node_class(namespace=optree.registry.__GLOBAL_NAMESPACE)
class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten(self):
        return (self.first, self.second), None, None

    @classmethod
    def tree_unflatten(cls, metadata, children):
        return cls(*children)


Layer = namedtuple("Layer", ["weight", "bias"])


@pytest.mark.parametrize("name", COMMON)
def test_any_tree(name):
    optimizer = COMMON[name]
    a, b = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor(3.0, dtype=F64)
    expected = flat(run(optimizer, [a, b], 3))
    for tree in (Layer(a, b), Pair(a, b), [(a, None), {"x": {}, "y": [b]}]):
        got = run(optimizer, tree, 3)
        assert type(got) is type(tree)
        assert_close(flat(got), expected)
    if "clip" not in name:
        assert_close(run(optimizer, b, 3), expected[-1])


@pytest.mark.parametrize("name", COMMON)
def test_any_layout(name):
    optimizer = COMMON[name]
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(2, 3, 4, 5, generator=generator, dtype=F64)
    expected = run(optimizer, w, 3)
    for layout in (
        w.to(memory_format=torch.channels_last),
        w.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([w, w], -1)[..., 0],
    ):
        assert_close(run(optimizer, layout, 3), expected)


@pytest.mark.parametrize("name", COMMON)
def test_nothing_is_mutated(name):
    optimizer = COMMON[name]
    params = make_params()
    state = optimizer.init(params)
    for _ in range(2):
        arguments = (gradient(params), state, params)
        leaves = optree.tree_leaves(arguments)
        before = copy.deepcopy(leaves)
        versions = [leaf._version for leaf in leaves]
        one, two = optimizer.update(*arguments), optimizer.update(*arguments)
        for leaf, kept, version in zip(leaves, before, versions, strict=True):
            assert leaf._version == version
            assert leaf.grad is None
            assert torch.equal(leaf, kept)
        for x, y in zip(optree.tree_leaves(one), optree.tree_leaves(two), strict=True):
            assert torch.equal(x, y)
        params, state = one


@pytest.mark.parametrize("name", COMMON)
def test_parameters_that_require_grad_keep_their_graph(name):
    w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(run(COMMON[name], w, 2).sum(), w)
    expected = grad(lambda w: run(COMMON[name], w, 2).sum())(w.detach())
    assert got.abs().max() > 0.1
    assert_close(got, expected)


# Clipping


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e3])
def test_clipping_is_that_of_torch(limit, device):
    params = make_params(device=device)
    grads = gradient(params)
    leaves = optree.tree_leaves(params)
    for clip, torch_clip in (
        (optim.clip_grad_norm, torch.nn.utils.clip_grad_norm_),
        (optim.clip_grad_value, torch.nn.utils.clip_grad_value_),
    ):
        for leaf, g in zip(leaves, optree.tree_leaves(grads), strict=True):
            leaf.grad = g.clone()
        torch_clip(leaves, limit)
        expected = flat([leaf - 0.5 * leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
        for value in (limit, torch.tensor(limit, dtype=F64)):
            optimizer = clip(optim.sgd(0.5), value)
            new, _ = optimizer.update(grads, optimizer.init(params), params)
            assert_close(flat(new), expected)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
def test_derivatives_in_the_limit(clip):
    params = make_params()
    optimizer = clip(optim.sgd(0.1, momentum=0.9), lambda hparams: hparams)

    def objective(limit):
        return loss(run(optimizer, params, 3, limit))

    at = torch.tensor(0.7, dtype=F64)
    expected = difference(objective, at)
    assert abs(expected) > 0.1
    assert_close(grad(objective)(at), expected, 1e-8)
    assert_close(jvp(objective, (at,), (torch.ones_like(at),))[1], expected, 1e-8)
    assert_close(grad(grad(objective))(at), difference(grad(objective), at), 1e-8)
    values = torch.tensor([0.5, 0.7], dtype=F64)
    assert_close(vmap(grad(objective))(values)[1], expected, 1e-8)


def test_clipping_by_value_leaf_by_leaf_and_composed():
    params = make_params()
    limits = {"layer": 0.1, "none": (), "scale": torch.tensor(0.2, dtype=F64)}
    optimizer = optim.clip_grad_value(optim.clip_grad_norm(optim.sgd(1.0), 1e6), limits)
    huge = optree.tree_map(lambda w: torch.full_like(w, -5.0), params)
    new, _ = optimizer.update(huge, optimizer.init(params), params)
    assert_close(new["layer"]["bias"] - params["layer"]["bias"], torch.full((3,), 0.1, dtype=F64))
    assert_close(new["scale"] - params["scale"], torch.tensor(0.2, dtype=F64))


# Classes of torch.optim

TORCH_CLASSES = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value is not torch.optim.Optimizer
}
UNSUPPORTED = {"LBFGS", "SparseAdam"}
# Options at which every class moves, is smooth, and is far from its limits.
TORCH_OPTIONS = {
    "ASGD": {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 1.0, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.1},
    "Adagrad": CASES["adagrad"]["coefficients"],
    "Adam": CASES["adam"]["coefficients"],
    "AdamW": CASES["adamw"]["coefficients"],
    "Adamax": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.05, "weight_decay": 0.1},
    "Muon": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8},
    "NAdam": {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 0.05,
        "weight_decay": 0.1,
        "momentum_decay": 0.01,
    },
    "RAdam": {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.05, "weight_decay": 0.1},
    "RMSprop": CASES["rmsprop"]["coefficients"],
    "Rprop": {"lr": 0.01, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
    "SGD": CASES["sgd"]["coefficients"],
}
# The derivatives that are right; what is in neither table must be refused.
RIGHT_STEPS = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"} | {
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
}
RIGHT_COEFFICIENTS = {"NAdam": {"lr"}, "RAdam": {"lr"}} | {
    name: set(TORCH_OPTIONS[name]) for name in ("Adagrad", "Adam", "AdamW", "RMSprop", "SGD")
}


def torch_params(name, device="cpu"):
    params = make_params(device=device)
    return params["layer"]["weight"] if name == "Muon" else params


@pytest.mark.parametrize("name", sorted(set(TORCH_CLASSES) - UNSUPPORTED))
def test_from_torch_takes_the_steps_of_the_class(name, device):
    params = torch_params(name, device)
    for options in ({}, TORCH_OPTIONS.get(name, {})):
        optimizer = optim.from_torch(TORCH_CLASSES[name], **options)
        expected = run_torch(TORCH_CLASSES[name], params, 50, **options)
        assert_close(flat(run(optimizer, params, 50)), flat(expected))
    state = optimizer.init(params)
    _, after = optimizer.update(gradient(params), state, params)
    assert optree.tree_structure(after) == optree.tree_structure(state)
    for new, old in zip(optree.tree_leaves(after), optree.tree_leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


SOME = ("Adagrad", "AdamW", "Rprop", "SGD")  # right, or refused


@pytest.mark.parametrize("name", slow_but(*SOME, of=sorted(set(TORCH_CLASSES) - UNSUPPORTED)))
def test_from_torch_derivatives_of_steps_are_right_or_refused(name):
    params = torch_params(name)
    optimizer = optim.from_torch(TORCH_CLASSES[name], **TORCH_OPTIONS.get(name, {}))
    num_steps = 7 if name == "RAdam" else 3

    def objective(scale):
        return loss(run(optimizer, optree.tree_map(lambda w: scale * w, params), num_steps))

    at = torch.tensor(1.0, dtype=F64)
    check_or_refuse(objective, at, name in RIGHT_STEPS, "cannot be differentiated")


@pytest.mark.parametrize("name", slow_but(*SOME, of=sorted(set(TORCH_CLASSES) - UNSUPPORTED)))
def test_from_torch_derivatives_in_coefficients_are_right_or_refused(name):
    params = torch_params(name)
    # RAdam has a first phase, and what becomes of the others shows sooner.
    num_steps = 7 if name == "RAdam" else 3
    for option, value in TORCH_OPTIONS.get(name, {"lr": 0.1}).items():
        for index in range(len(value)) if isinstance(value, tuple) else [None]:

            def objective(c, option=option, value=value, index=index):
                options = dict(TORCH_OPTIONS.get(name, {}))
                options[option] = (
                    pick_c if index is None else (*value[:index], pick_c, *value[index + 1 :])
                )
                optimizer = optim.from_torch(TORCH_CLASSES[name], **options)
                return loss(run(optimizer, params, num_steps, {"c": c}))

            at = torch.tensor(value if index is None else value[index], dtype=F64)
            right = option in RIGHT_COEFFICIENTS.get(name, ())
            options = TORCH_OPTIONS.get(name, {})
            expected = run_torch(TORCH_CLASSES[name], params, num_steps, **options)
            assert_close(objective(at), loss(expected))
            check_or_refuse(objective, at, right, "cannot be|is wrong or missing in torch")


def pick_c(hparams):
    return hparams["c"]


def check_or_refuse(objective, at, right, message):
    one = torch.ones_like(at)
    derivatives = [
        lambda: grad(objective)(at),
        lambda: jvp(objective, (at,), (one,))[1],
        lambda: vmap(grad(objective))(torch.stack([at, at]))[1],
        lambda: vmap(jacfwd(objective))(torch.stack([at, at]))[1],
        lambda: torch.autograd.functional.jacobian(objective, at),
    ]
    if not right:
        for derivative in derivatives:
            with pytest.raises(RuntimeError, match=message):
                derivative()
        return
    expected = difference(objective, at, 1e-6)
    assert abs(expected) > 1e-4
    for derivative in derivatives:
        assert_close(derivative(), expected, 1e-7)
    second = difference(grad(objective), at, 1e-6)
    for derivative in (grad(grad(objective)), jacfwd(grad(objective)), jacfwd(jacfwd(objective))):
        assert_close(derivative(at), second, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TORCH_CLASSES) - UNSUPPORTED))
@pytest.mark.parametrize("method", ["reverse_unroll", "reverse", "forward", "first_order"])
def test_from_torch_by_every_method_is_right_or_refused(name, method):
    start = torch_params(name)
    start = start if isinstance(start, torch.Tensor) else start["layer"]["weight"]
    num_steps = 7 if name == "RAdam" else 3
    for option, value in TORCH_OPTIONS.get(name, {}).items() if name != "Muon" else [(None, 0)]:
        if isinstance(value, tuple):
            continue
        pick = {} if option is None else {option: pick_c}
        optimizer = optim.from_torch(TORCH_CLASSES[name], **{**TORCH_OPTIONS.get(name, {}), **pick})
        solver = hf.minimize(
            lambda w, h: ((w - h["t"]) ** 4).sum() / 4, optimizer, num_steps, init=lambda h: h["w"]
        )
        outer = lambda w, h: (w**3).sum()  # noqa: E731
        h = {"w": start, "t": 0.1 * start.cos(), "c": torch.tensor(value, dtype=F64)}
        fn = hf.hypergrad(solver, outer, method=method)
        batch = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), h)
        right = name in RIGHT_STEPS and (
            option is None or option in RIGHT_COEFFICIENTS.get(name, ())
        )
        for derivative, at in ((fn, h), (vmap(fn), batch)):
            if not right and (method != "first_order" or option is not None):
                with pytest.raises(RuntimeError, match=r"cannot be|is wrong or missing in torch"):
                    derivative(at)
                continue
            got = derivative(at)
            if method != "first_order":
                expected = grad(lambda h: outer(solver(h), h))(h)  # noqa: B023
                stacked = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), expected)
                like = expected if got["c"].ndim == 0 else stacked
                assert_close(flat(got), flat(like), 1e-9)


def test_from_torch_ignores_only_options_that_change_nothing():
    params = make_params()
    for name in ("SGD", "Adam", "NAdam"):
        expected = run_torch(TORCH_CLASSES[name], params, 3, maximize=True)
        got = run(optim.from_torch(TORCH_CLASSES[name], maximize=True, foreach=True), params, 3)
        assert_close(flat(got), flat(expected))


class Signed(torch.optim.Optimizer):
    """A step written for this test: w - lr sign(g) sqrt(|g|), differentiable if asked to be."""

    def __init__(self, params, lr=0.1, differentiable=False):
        super().__init__(params, {"lr": lr, "differentiable": differentiable})

    def step(self):
        for group in self.param_groups:
            with torch.set_grad_enabled(group["differentiable"]):
                for w in group["params"]:
                    self.state[w].setdefault("last", torch.zeros_like(w))
                    self.state[w]["last"].copy_(w.grad)
                    w.grad.neg_()  # as careless as a class may be
                    w.add_(group["lr"] * w.grad.sign() * w.grad.abs().sqrt())


def test_from_torch_trusts_a_foreign_class_only_when_told_to():
    params = torch.tensor([1.0, 2.0, 0.0], dtype=F64)

    def start(optimizer, g):
        return optimizer.update(g, optimizer.init(params), params)[0].sum()

    g = torch.tensor([0.25, 1.0, 4.0], dtype=F64)
    wary, told = optim.from_torch(Signed), optim.from_torch(Signed, differentiable=True, lr=0.2)
    assert_close(start(wary, g), torch.tensor(3.0 - 0.1 * 3.5, dtype=F64))
    assert g.tolist() == [0.25, 1.0, 4.0]
    with pytest.raises(RuntimeError, match=r"Signed cannot be differentiated.*differentiable=True"):
        grad(lambda g: start(wary, g))(g)
    assert_close(grad(lambda g: start(told, g))(g), -0.1 / g.sqrt())
    assert_close(
        grad(lambda g: start(told, g))(torch.zeros(3, dtype=F64)), torch.zeros(3, dtype=F64)
    )
    rated = optim.from_torch(Signed, differentiable=True, lr=torch.tensor(0.1, requires_grad=True))
    with pytest.raises(RuntimeError, match="with respect to lr is wrong or missing"):
        start(rated, g).backward()


class RenamedAdam(torch.optim.Adam):
    """A class that is not in torch.optim, with the step of one that is."""


def test_from_torch_differentiates_steps_of_subclasses():
    params = make_params()
    options = {"lr": 0.1, "eps": 0.1, "amsgrad": True}
    foreign = optim.from_torch(RenamedAdam, differentiable=True, **options)

    def objective(scale, optimizer):
        return loss(run(optimizer, optree.tree_map(lambda w: scale * w, params), 3))

    at = torch.tensor(1.0, dtype=F64)
    native = optim.adam(**options)
    for transform in (lambda f: f, grad, jacfwd, lambda f: grad(grad(f))):
        got = transform(lambda scale: objective(scale, foreign))(at)
        # torch counts the steps, and corrects for them, in float32 here.
        assert_close(got, transform(lambda scale: objective(scale, native))(at), 1e-5)


# Errors


class Plain(torch.optim.Optimizer):
    """A class that counts in Python, and cannot be differentiated."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for w in self.param_groups[0]["params"]:
            self.state[w]["count"] = 1


W = {"fc1": torch.zeros(3), "fc2": torch.zeros(2)}


def update(optimizer, grads=W, state=None, params=W, hparams=None):
    return optimizer.update(
        grads, optimizer.init(params) if state is None else state, params, hparams
    )


ERRORS = [
    (lambda: optim.sgd(-0.1), ValueError, r"sgd: lr is -0.1; expected a number of at least 0"),
    (lambda: optim.sgd(math.nan), ValueError, r"sgd: lr is nan"),
    (lambda: optim.sgd(0.1, momentum=-1), ValueError, r"sgd: momentum is -1"),
    (lambda: optim.sgd(0.1, nesterov=True), ValueError, r"nesterov=True needs momentum.*Write sgd"),
    (
        lambda: optim.sgd(0.1, 0.9, 0.1, nesterov=True),
        ValueError,
        r"needs momentum and no dampening; got momentum=0.9, dampening=0.1",
    ),
    (
        lambda: optim.heavy_ball(0.1, 1.0),
        ValueError,
        r"heavy_ball: momentum is 1.0; .* in \[0, 1\)",
    ),
    (lambda: optim.adam(0.1, (0.9, 1.0)), ValueError, r"adam: betas\[1\] is 1.0; .* in \[0, 1\)"),
    (lambda: optim.adamw(0.1, (-0.1, 0.9)), ValueError, r"adamw: betas\[0\] is -0.1"),
    (lambda: optim.adam(0.1, 0.9), TypeError, r"adam: betas is 0.9; expected a pair"),
    (lambda: optim.adam(0.1, eps=-1.0), ValueError, r"adam: eps is -1.0"),
    (lambda: optim.rmsprop(0.1, alpha=1.1), ValueError, r"rmsprop: alpha is 1.1; .* in \[0, 1\]"),
    (lambda: optim.adagrad(0.1, lr_decay=-1.0), ValueError, r"adagrad: lr_decay is -1.0"),
    (
        lambda: optim.adagrad(0.1, initial_accumulator_value=-1.0),
        ValueError,
        r"initial_accumulator_value is -1.0",
    ),
    (
        lambda: optim.adagrad(0.1, initial_accumulator_value=lambda hparams: 1.0),
        TypeError,
        r"init\(params\), which sees no hparams. .*state._replace",
    ),
    (lambda: optim.sgd("0.1"), TypeError, r"sgd: lr is '0.1' of type str; expected a number, a"),
    (lambda: optim.sgd(None), TypeError, r"sgd: lr is None"),
    (lambda: optim.sgd(True), TypeError, r"sgd: lr is True of type bool"),
    (lambda: optim.sgd({"fc1": "a"}), TypeError, r"sgd: lr\['fc1'\] is 'a' of type str"),
    (lambda: optim.sgd({"fc1": -1.0}), ValueError, r"sgd: lr\['fc1'\] is -1.0"),
    (lambda: optim.sgd(torch.tensor(1)), TypeError, r"sgd: lr is a tensor of dtype torch.int64"),
    (
        lambda: update(optim.sgd(lambda hparams: "a"), hparams={}),
        TypeError,
        r"sgd: lr\(hparams\) is 'a' of type str",
    ),
    (
        lambda: update(optim.sgd(lambda hparams: -2.0), hparams={}),
        ValueError,
        r"sgd: lr\(hparams\) is -2.0",
    ),
    (
        lambda: update(optim.sgd(lambda hparams: 0.1)),
        TypeError,
        r"lr is a function of hparams, but update got hparams=None. Write optimizer.update",
    ),
    (
        lambda: update(optim.sgd({"fc1": 0.1})),
        ValueError,
        r"sgd: lr: no name fits the parameter 'fc2.*'; got \['fc1'\]. Add the name of a module",
    ),
    (
        lambda: update(optim.sgd(torch.ones(3))),
        ValueError,
        r"lr: a value of shape \(3,\) stands for params\['fc2'\], of shape \(2,\)",
    ),
    (
        lambda: update(optim.sgd({"fc1": torch.ones(1, 3), "fc2": 0.1})),
        ValueError,
        r"\(1, 3\) stands for params\['fc1'\]",
    ),
    (
        lambda: update(optim.sgd(0.1), grads={"fc1": torch.zeros(3)}),
        ValueError,
        r"sgd: grads has another structure than params",
    ),
    (
        lambda: update(optim.adam(0.1), grads={"fc1": torch.zeros(3), "fc2": torch.zeros(4)}),
        ValueError,
        r"adam: grads: the leaf for params\['fc2'\] has shape \(4,\), expected \(2,\)",
    ),
    (
        lambda: update(optim.adam(0.1), grads={"fc1": torch.zeros(3), "fc3": None}),
        ValueError,
        r"adam: grads has another structure",
    ),
    (
        lambda: update(optim.adam(0.1), state=optim.sgd(0.1, 0.9).init(W)),
        TypeError,
        r"adam: state has slots \['momentum_buffer'\]; expected .*'exp_avg'.*optimizer.init",
    ),
    (lambda: update(optim.adam(0.1), state=()), TypeError, r"adam: state has \(\) of type tuple"),
    (
        lambda: update(optim.adam(0.1), state=optim.adam(0.1).init({"fc1": torch.zeros(3)})),
        ValueError,
        r"state.slots\['exp_avg'\] has another structure than params",
    ),
    (lambda: optim.sgd(0.1).init({}), ValueError, r"params is an empty tree"),
    (
        lambda: optim.adam(0.1).init({"a": torch.zeros(2, dtype=torch.int64)}),
        TypeError,
        r"params\['a'\] has dtype torch.int64",
    ),
    (
        lambda: optim.from_torch(Plain).init(W),
        TypeError,
        r"Plain keeps 'count' in its state as 1 of type int; expected tensors only",
    ),
    (
        lambda: optim.clip_grad_norm(torch.optim.Adam, 1.0),
        TypeError,
        r"clip_grad_norm: got the class torch.optim.Adam; .* Write hf.optim.from_torch\(torch",
    ),
    (
        lambda: optim.clip_grad_value(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1.0),
        TypeError,
        r"clip_grad_value: got an instance of torch.optim.SGD; .* Write hf.optim.from_torch",
    ),
    (
        lambda: optim.clip_grad_norm(optim.sgd, 1.0),
        TypeError,
        r"got the function hf.optim.sgd; .* Call it: hf.optim.sgd\(lr=...\)",
    ),
    (lambda: optim.clip_grad_norm(3, 1.0), TypeError, r"got 3 of type int; .*hf.optim.Optimizer\("),
    (lambda: optim.clip_grad_norm(optim.sgd(), -1.0), ValueError, r"max_norm is -1.0"),
    (
        lambda: optim.clip_grad_norm(optim.sgd(), {"fc1": 1.0, "fc2": 2.0}),
        TypeError,
        r"max_norm is .*one value for all leaves.*clip_grad_value",
    ),
    (
        lambda: update(optim.clip_grad_norm(optim.sgd(), lambda h: torch.ones(2)), hparams=W),
        TypeError,
        r"max_norm is <tensor.*one value for all leaves",
    ),
    (lambda: optim.clip_grad_value(optim.sgd(), -1.0), ValueError, r"clip_value is -1.0"),
    (
        lambda: update(optim.clip_grad_value(optim.sgd(), 1.0), grads=torch.zeros(3)),
        ValueError,
        r"clip_grad_value: grads has another structure",
    ),
    (
        lambda: optim.from_torch(torch.optim.NAdam([torch.zeros(1)])),
        TypeError,
        r"got an instance of torch.optim.NAdam; .*Write hf.optim.from_torch\(torch.optim.NAdam",
    ),
    (lambda: optim.from_torch("Adam"), TypeError, r"got 'Adam' of type str; expected a subclass"),
    (
        lambda: optim.from_torch(torch.optim.LBFGS),
        ValueError,
        r"LBFGS evaluates the loss.*method='cg'",
    ),
    (lambda: optim.from_torch(torch.optim.SparseAdam), ValueError, r"SparseAdam works on sparse"),
    (lambda: optim.from_torch(torch.optim.SGD, rate=1.0), TypeError, r"rate"),
    (lambda: optim.from_torch(torch.optim.NAdam, rate=1.0), TypeError, r"rate"),
    (lambda: optim.from_torch(torch.optim.NAdam, lr=-1.0), ValueError, r"-1.0"),
    (
        lambda: optim.from_torch(Plain, differentiable=True),
        TypeError,
        r"differentiable=True, but .*Plain has no option of that name",
    ),
    (
        lambda: update(optim.from_torch(torch.optim.NAdam, lr=lambda h: 0.1)),
        TypeError,
        r"torch.optim.NAdam: lr is a function of hparams, but update got hparams=None",
    ),
    (
        lambda: update(optim.from_torch(torch.optim.NAdam, lr=lambda h: h), hparams=torch.ones(2)),
        TypeError,
        r"lr is <tensor.*one value for all leaves",
    ),
    (
        lambda: update(optim.from_torch(torch.optim.NAdam), state=optim.adam().init(W)),
        TypeError,
        r"not one of from_torch\(torch.optim.NAdam\)",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors_say_what_was_got_and_what_to_type(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_a_check_passes_an_optimizer_through():
    optimizer = optim.sgd(0.1)
    assert optim.check_optimizer(optimizer, "minimize") is optimizer
    assert hf.optim is optim


def test_an_optimiser_prints_as_the_call_that_makes_it():
    inner = optim.sgd(lr=0.1, momentum=0.9)
    call = (
        "sgd(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)"
    )
    assert repr(inner) == call
    clipped = optim.clip_grad_norm(inner, max_norm=1.0)
    assert repr(clipped) == f"clip_grad_norm(optimizer={call}, max_norm=1.0)"
    clipped = optim.clip_grad_value(inner, clip_value=0.5)
    assert repr(clipped) == f"clip_grad_value(optimizer={call}, clip_value=0.5)"
    foreign = optim.from_torch(torch.optim.NAdam, lr=0.1)
    assert repr(foreign) == "from_torch(torch.optim.NAdam, lr=0.1)"
    for optimizer in COMMON.values():
        assert eval(repr(optimizer), {**vars(optim), "torch": torch}) == optimizer
    assert repr(optim.Optimizer(init=len, update=abs)) == (
        "Optimizer(init=<built-in function len>, update=<built-in function abs>)"
    )


SKIPPING = {
    # our rule, torch's class and options, and whether bias is corrected by the number of steps
    "momentum": (optim.sgd, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, False),
    "adam": (optim.adam, torch.optim.Adam, {"weight_decay": 0.1}, True),
    "adamw": (optim.adamw, torch.optim.AdamW, {"weight_decay": 0.1}, True),
    "rmsprop": (optim.rmsprop, torch.optim.RMSprop, {"momentum": 0.5, "weight_decay": 0.1}, False),
    "adagrad": (optim.adagrad, torch.optim.Adagrad, {"weight_decay": 0.1}, False),
    **{
        name: (functools.partial(optim.from_torch, each), each, options, False)
        for name, each, options in [
            ("NAdam", torch.optim.NAdam, {"weight_decay": 0.1}),
            ("Rprop", torch.optim.Rprop, {}),
            ("Adamax", torch.optim.Adamax, {"weight_decay": 0.1}),
        ]
    },
}


@pytest.mark.parametrize("limit", [None, "norm", "value"])
@pytest.mark.parametrize("name", SKIPPING)
def test_a_gradient_of_none_leaves_a_parameter_alone(name, limit):
    make, torch_class, options, corrects = SKIPPING[name]
    optimizer = make(lr=0.1, **options)
    if limit:
        clip = optim.clip_grad_norm if limit == "norm" else optim.clip_grad_value
        optimizer = clip(optimizer, 0.5)
    params = {"always": torch.randn(3, dtype=F64), "empty": None, "never": torch.ones(2, dtype=F64)}
    params["at times"] = torch.randn(2, dtype=F64)
    variables = {
        key: leaf.clone().requires_grad_() for key, leaf in params.items() if key != "empty"
    }
    theirs = torch_class(variables.values(), lr=0.1, **options)
    state = optimizer.init(params)
    before = state
    for step in range(6):
        grads = {"always": torch.randn(3, dtype=F64), "empty": None, "never": None}
        # where bias is corrected, one step number counts for all leaves here
        seen = not corrects and step in (1, 2, 4)
        grads["at times"] = torch.randn(2, dtype=F64) if seen else None
        for key, variable in variables.items():
            variable.grad = None if grads[key] is None else grads[key].clone()
        if limit == "norm":
            torch.nn.utils.clip_grad_norm_(list(variables.values()), 0.5)
        elif limit == "value":
            torch.nn.utils.clip_grad_value_(list(variables.values()), 0.5)
        theirs.step()
        params, state = optimizer.update(grads, state, params)
        for key, variable in variables.items():
            torch.testing.assert_close(params[key], variable.detach(), rtol=1e-12, atol=1e-13)
    assert torch.equal(params["never"], torch.ones(2, dtype=F64))
    none = dict.fromkeys(params)
    assert optree.tree_all(
        optree.tree_map(torch.equal, optimizer.update(none, state, params)[0], params)
    )
    assert optree.tree_structure(before) == optree.tree_structure(state)
