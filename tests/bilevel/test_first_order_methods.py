"""First-order bilevel loops: steps by hand, closed-form biases, first derivatives only."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State
from hyperfunc.optim import from_torch
from tests.bilevel.test_bilevel import (
    Quadratic,
    assert_close,
    inner_loss,
    outer_loss,
    quadratic,
    random_state,
    start,
    vectors,
)
from tests.cells import slow_but
from tests.problems import CubeOnce, ravel, stack

LOOPS = ["f2sa", "bome", "pbgd", "meha", "sama", "darts"]
C, ETA, GAMMA, T = 7.0, 0.5, 0.8, 3
OWN: dict[str, dict[str, Any]] = {
    "f2sa": {"penalty": C, "num_inner_steps": T, "adjoint_lr": 0.3},
    "bome": {"barrier": ETA, "num_inner_steps": T, "adjoint_lr": 0.3},
    "pbgd": {"penalty": C, "num_inner_steps": T, "adjoint_lr": 0.3},
    "meha": {"penalty": C, "proximal": GAMMA, "adjoint_lr": 0.3},
    "sama": {},
    "darts": {"unroll_lr": 0.3},
}


def make(name: str, losses: Any = (inner_loss, outer_loss), **keywords: Any) -> Loop:
    settings = {"outer_lr": 0.1} | OWN[name] | keywords
    if "inner_optimizer" not in settings:
        settings = {"inner_lr": 0.4} | settings
    return getattr(hf.bilevel, name)(*losses, **settings)


# Single steps by hand ----------------------------------------------------------------------------


Slopes = tuple[Callable[[Tensor, Tensor], Tensor], ...]


def of_quadratic() -> Slopes:
    """The gradients of both losses by params and hparams, and the cross term."""
    (A, B, c), (t, s) = quadratic().inner(2), quadratic().outer(1)
    return (
        lambda w, h: A @ w - B @ h - c,
        lambda w, h: -B.T @ w,
        lambda w, h: w - t,
        lambda w, h: 0.5 * (h - s),
        lambda w, h: -B.T,
    )


def of_cubic() -> Slopes:
    """The same by exact derivatives of losses all of whose slopes depend on where they are."""
    inner, outer = cubed(lambda x: x**3)

    def g(w: Tensor, h: Tensor) -> Tensor:
        return inner(w, h, *quadratic().inner(2))

    def F(w: Tensor, h: Tensor) -> Tensor:
        return outer(w, h, *quadratic().outer(1))

    return grad(g), grad(g, 1), grad(F), grad(F, 1), jacrev(grad(g, 1))


def by_hand(name: str, slopes: Slopes, w: Tensor, u: Tensor, h: Tensor) -> Any:
    """Params, second params or adjoint, and hparams after a step."""
    g_w, g_h, F_w, F_h, cross = slopes

    def descend(w: Tensor, lr: float) -> Tensor:
        for _ in range(T):
            w = w - lr * g_w(w, h)
        return w

    if name == "f2sa":
        y, z = u, descend(w, 0.4)
        for _ in range(T):
            y = y - 0.3 * (g_w(y, h) + F_w(y, h) / C)
        return z, y, h - 0.1 * (F_h(y, h) + C * (g_h(y, h) - g_h(z, h)))
    if name == "pbgd":
        z = descend(w, 0.3)
        d_h = F_h(w, h) + C * (g_h(w, h) - g_h(z, h))
        return w - 0.4 * (g_w(w, h) + F_w(w, h) / C), z, h - 0.1 * d_h
    if name == "bome":
        z = descend(w, 0.3)
        q = torch.cat([g_w(w, h), g_h(w, h) - g_h(z, h)])
        F = torch.cat([F_w(w, h), F_h(w, h)])
        d = F + max(ETA - F @ q / (q @ q), 0) * q
        return w - 0.4 * d[:4], z, h - 0.1 * d[4:]
    if name == "meha":
        z = u - 0.3 * (g_w(u, h) + (u - w) / GAMMA)
        h = h - 0.1 * (F_h(w, h) / C + g_h(w, h) - g_h(z, h))
        return w - 0.4 * (F_w(w, h) / C + g_w(w, h) - (w - z) / GAMMA), z, h
    if name == "darts":
        ahead = w - 0.3 * g_w(w, h)
        v = 0.3 * F_w(ahead, h)
        h = h - 0.1 * (F_h(ahead, h) - cross(w, h) @ v)
        return w - 0.4 * g_w(w, h), v, h
    assert name == "sama"
    w = w - 0.4 * g_w(w, h)
    v = 0.4 * F_w(w, h)
    return w, v, h - 0.1 * (F_h(w, h) - cross(w, h) @ v)


@pytest.mark.parametrize("name", LOOPS)
def test_a_step(name: str) -> None:
    """By hand on the quadratic, and where it matters at which point a gradient is taken."""
    keywords = {"inner_optimizer": hf.optim.sgd(0.4)} if name == "sama" else {}
    losses = cubed(lambda x: x**3)
    for slopes, loop, tol in (
        (of_quadratic(), make(name, **keywords), 1e-10),
        (of_cubic(), make(name, losses, **keywords), 1e-7),
    ):
        state = random_state(loop)
        new = loop.update(state, quadratic().inner(2), quadratic().outer(1))
        assert_close(vectors(new), by_hand(name, slopes, *vectors(state)), tol)
        assert_close(new.step, torch.tensor(1), 0)


def test_the_multiplier_of_bome_is_zero_where_the_barrier_is_kept() -> None:
    """Where the outer gradient alone lowers the gap fast enough, it is followed as it is."""
    problem = quadratic()
    (A, B, c), (_, s) = problem.inner(2), problem.outer(1)
    w, h = torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    t = w - 10 * (A @ w - B @ h - c)
    loop = make("bome", (lambda w, h, A, B, c: inner_loss(w, h, A, B, c), outer_loss))
    new = loop.update(loop.init(w, h), (A, B, c), (t, s))
    assert_close((new.params, new.hparams), (w - 0.4 * (w - t), h - 0.05 * (h - s)))


def test_a_step_of_sama_with_adam() -> None:
    """The scaling of the adjoint is the derivative of Adam's step in the gradient."""
    problem, (beta1, beta2, eps) = quadratic(), (0.8, 0.95, 1e-3)
    adam = hf.optim.adam(0.4, betas=(beta1, beta2), eps=eps)
    loop = make("sama", inner_optimizer=adam)
    first = loop.update(loop.init(*start()), problem.inner(1), problem.outer(3))
    w, _, h = vectors(first)
    m, v = (ravel(first.optimizers["inner"].slots[key]) for key in ("exp_avg", "exp_avg_sq"))
    (A, B, c), (t, s) = problem.inner(2), problem.outer(1)
    g = A @ w - B @ h - c
    b1, b2 = 1 - beta1**2, 1 - beta2**2
    m, root = (beta1 * m + (1 - beta1) * g) / b1, ((beta2 * v + (1 - beta2) * g**2) / b2).sqrt()
    w = w - 0.4 * m / (root + eps)
    scale = (1 - beta1) / b1 / (root + eps)
    scale = scale - m * (1 - beta2) * g / b2 / (root * (root + eps) ** 2)
    u = 0.4 * scale * (w - t)
    new = loop.update(first, problem.inner(2), problem.outer(1))
    assert_close(vectors(new), (w, u, h - 0.1 * (0.5 * (h - s) + B.T @ u)), 1e-9)
    assert new.optimizers["inner"].step == new.step == 2


def test_params_that_the_inner_loss_does_not_use_stay_under_weight_decay() -> None:
    """As under the optimiser itself; an optimiser whose derivative torch lacks is refused."""

    def inner(w: Any, h: Tensor) -> Tensor:
        return ((w["used"] - h) ** 2).sum()

    def outer(w: Any, h: Tensor) -> Tensor:
        return (w["used"] * w["free"]).sum()

    decayed = hf.optim.adamw(0.4, weight_decay=0.5)
    ones = torch.ones(2, dtype=torch.float64)
    params = {"free": ones, "used": 3 * ones}
    for optimizer in (decayed, hf.optim.clip_grad_norm(decayed, 1.0)):
        loop = make("sama", (inner, outer), inner_optimizer=optimizer)
        state = loop.init(params, ones)
        for _ in range(3):
            state = loop.update(state, (), ())
        assert_close(state.params["free"], ones, 0)
        assert (state.params["used"] < 2.5).all()
        assert_close(state.adjoint["free"], 0 * ones, 0)
        assert (state.adjoint["used"] != 0).all()
    loop = make("sama", (inner, outer), inner_optimizer=from_torch(torch.optim.ASGD, lr=0.4))
    with pytest.raises(RuntimeError, match="ASGD"):
        loop.update(loop.init(params, ones), (), ())


# Closed forms ------------------------------------------------------------------------------------


def rest(name: str, problem: Quadratic) -> tuple[Tensor, Tensor]:
    """Params and hparams at which a loop rests: a solution up to the bias of the method."""
    (A, B, c), (t, s) = problem.full()
    eye = torch.eye(4, dtype=torch.float64)

    def slopes(both: Tensor) -> Tensor:
        w, h = both[:4], both[4:]
        F_w, F_h, g_w = w - t, 0.5 * (h - s), A @ w - B @ h - c
        z = torch.linalg.solve(A, B @ h + c)
        if name == "pbgd":  # which ends its own inner loop after T steps
            z = w
            for _ in range(T):
                z = z - 0.9 * (A @ z - B @ h - c)
        if name in ("f2sa", "pbgd"):
            return torch.cat([F_w / C + g_w, F_h / C - B.T @ (w - z)])
        if name == "meha":
            z = torch.linalg.solve(A + eye / GAMMA, B @ h + c + w / GAMMA)
            return torch.cat([F_w / C + g_w - (w - z) / GAMMA, F_h / C - B.T @ (w - z)])
        return torch.cat([g_w, F_h + 0.3 * B.T @ F_w])

    zero = torch.zeros(7, dtype=torch.float64)
    both = -torch.linalg.solve(jacrev(slopes)(zero), slopes(zero))
    return both[:4], both[4:]


def run(loop: Loop, problem: Quadratic, num_steps: int) -> State:
    inner, outer = problem.full()
    state = loop.init(*start())
    for _ in range(num_steps):
        state = loop.update(state, inner, outer)
    return state


# Updates, and settings with which they are few.
EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "f2sa": (80, {"inner_lr": 0.9, "adjoint_lr": 0.8, "outer_lr": 0.2, "num_inner_steps": 1}),
    "pbgd": (300, {"inner_lr": 0.9, "adjoint_lr": 0.9, "outer_lr": 0.06}),
    "meha": (150, {"inner_lr": 0.9, "adjoint_lr": 0.5, "outer_lr": 0.7}),
    "sama": (100, {"inner_optimizer": hf.optim.sgd(0.3), "outer_lr": 0.3}),
    "darts": (100, {"inner_lr": 0.9, "outer_lr": 0.3}),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_loop_rests_at_the_optimum_of_what_it_minimises(name: str) -> None:
    problem, (num_steps, keywords) = quadratic(), EXACT[name]
    state = run(make(name, **keywords), problem, num_steps)
    w, h = rest(name, problem)
    found = ravel(state.adjoint) if name == "f2sa" else ravel(state.params)
    assert_close((found, ravel(state.hparams)), (w, h), 1e-8)
    assert (h - problem.optimum()[2]).norm() > 1e-2  # the bias is there to be seen


growth, decay = hf.bilevel.power_growth, hf.bilevel.power_decay
RATES: dict[str, dict[str, Any]] = {
    "f2sa": {"penalty": growth(2.0, 1.0), "adjoint_lr": 0.9, "num_inner_steps": 1},
    "pbgd": {"penalty": growth(2.0, 0.5), "outer_lr": decay(0.2, 0.5), "num_inner_steps": 10},
    "meha": {"penalty": growth(2.0, 0.5), "outer_lr": 0.4},
    "bome": {"inner_lr": decay(0.5, 0.5), "outer_lr": decay(0.5, 0.5), "adjoint_lr": 0.9},
}


@pytest.mark.parametrize("name", slow_but("f2sa", "bome", of=RATES))
def test_growing_penalties_lead_to_the_solution(name: str) -> None:
    """The error falls as the penalty grows, or with the step sizes of `bome`."""
    problem = quadratic()
    w, _, h = problem.optimum()
    loop = make(name, **{"inner_lr": 0.9, **RATES[name]})
    errors = []
    for num_steps in (0, 50, 200):
        state = run(loop, problem, num_steps)
        errors.append(torch.cat([ravel(state.params) - w, ravel(state.hparams) - h]).norm())
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < (0.3 if name == "f2sa" else 0.6) * errors[1]


@pytest.mark.slow
def test_meha_leaves_a_point_of_negative_curvature() -> None:
    """A double well, from beside its top, to the slope at which the minimum is where it should."""
    loop = hf.bilevel.meha(
        lambda w, h: (w**2 - 1) ** 2 / 4 - h * w,
        lambda w, h: (w - 1.3) ** 2 / 2,
        **{"inner_lr": 0.2, "adjoint_lr": 0.3, "outer_lr": 0.6, "penalty": 2.0, "proximal": 0.5},
    )
    zero = torch.zeros((), dtype=torch.float64)
    state = loop.init(zero + 0.05, zero)
    for _ in range(600):
        state = loop.update(state, (), ())
    assert_close((state.params, state.hparams), (zero + 1.3, zero + 1.3**3 - 1.3), 1e-3)


# What is asked of the losses, and what is done to them -------------------------------------------


def cubed(cube: Callable[[Tensor], Tensor]) -> Any:
    """Losses with a cube in each, of params and of hparams."""

    def inner(w: Any, h: Any, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        return inner_loss(w, h, A, B, c) + 0.01 * cube(ravel(w) * ravel(h).sum()).sum()

    def outer(w: Any, h: Any, t: Tensor, s: Tensor) -> Tensor:
        return outer_loss(w, h, t, s) + 0.01 * cube(ravel(w) * ravel(h).sum()).sum()

    return inner, outer


@pytest.mark.parametrize("name", LOOPS)
def test_first_derivatives_suffice(name: str) -> None:
    """With losses that have no second ones, alone and over tasks: the numbers of those that do."""
    tasks = [quadratic(seed) for seed in range(2)]
    once, often = make(name, cubed(CubeOnce.apply)), make(name, cubed(lambda x: x**3))
    batches = [(task.inner(0), task.outer(1)) for task in tasks]
    results = []
    for loop in (often, once):
        states = [loop.init(*start()) for _ in tasks]
        for _ in range(2):
            states = [
                loop.update(state, *batch) for state, batch in zip(states, batches, strict=True)
            ]
        results.append(stack(states))
    states = vmap(once.init)(*stack([start()] * 2))
    for _ in range(2):
        states = vmap(once.update)(states, *stack(batches))
    assert_close(results[1], results[0], 1e-9)
    assert_close(states, results[0], 1e-9)
    soba = hf.bilevel.soba(*cubed(CubeOnce.apply), inner_lr=0.1, outer_lr=0.1)
    with pytest.raises(RuntimeError, match="once"):
        soba.update(soba.init(*start()), *batches[0])


ORACLES = {
    "f2sa": (2 * T + 2, T + 1),
    "bome": (T + 2, 1),
    "pbgd": (T + 2, 1),
    "meha": (4, 2),
    "sama": (3, 1),
    "darts": (4, 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_an_update_is_pure_and_calls_the_losses_as_often_as_it_says(name: str) -> None:
    calls: list[Any] = []

    def counted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: calls.append(loss) or loss(*args)

    loop = make(name, (counted(inner_loss), counted(outer_loss)))
    params, hparams = optree.tree_map(lambda leaf: leaf.requires_grad_(), start())
    state = loop.init(params, hparams)
    leaves = optree.tree_leaves(state, namespace="hyperfunc")
    assert len({leaf.data_ptr() for leaf in leaves}) == len(leaves)
    before = optree.tree_map(torch.clone, state)
    inputs = quadratic().inner(1), quadratic().outer(2)
    new = loop.update(state, *inputs)
    assert (calls.count(inner_loss), calls.count(outer_loss)) == ORACLES[name]
    assert_close(loop.update(state, *inputs), new, 0)
    assert_close(state, before, 0)
    assert all(leaf.grad is None for leaf in optree.tree_leaves((params, hparams)))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((state, new)))


@pytest.mark.parametrize("name", LOOPS)
def test_dtypes_are_kept(name: str) -> None:
    rate = hf.optim.linear(0.3, 0.5, 10)
    loop = make(name, inner_lr=rate, outer_lr=torch.tensor(0.1))
    inputs = quadratic().inner(1), quadratic().outer(2)
    for dtype in (torch.float32, torch.bfloat16):
        state, batch = optree.tree_map(lambda leaf: leaf.to(dtype), (start(), inputs))  # noqa: B023
        exact, low = loop.init(*start()), loop.init(*state)
        for _ in range(2):
            exact, low = loop.update(exact, *inputs), loop.update(low, *batch)
        for a, b in zip(vectors(low), vectors(exact), strict=True):
            assert a.dtype == dtype
            tol = 200 * torch.finfo(dtype).eps
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol)


# Bad input ---------------------------------------------------------------------------------------

batch = quadratic().full()
MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no penalty": (
        lambda: make("pbgd", penalty=0.0),
        ValueError,
        r"pbgd: penalty is 0\.0; expected a finite number > 0",
    ),
    "penalty of no kind": (
        lambda: make("f2sa", penalty="10"),
        TypeError,
        r"f2sa: penalty is '10' of type str; expected a number or a function of the step",
    ),
    "penalty that falls to zero": (
        lambda: (loop := make("meha", penalty=lambda step: 0.0)).update(
            loop.init(*start()), *batch
        ),
        ValueError,
        r"meha: penalty\(step\) is 0\.0; expected a finite number > 0",
    ),
    "no barrier": (
        lambda: make("bome", barrier=0),
        ValueError,
        r"bome: barrier is 0; expected a finite number > 0",
    ),
    "no steps": (
        lambda: make("bome", num_inner_steps=0),
        ValueError,
        r"bome: num_inner_steps is 0; expected an integer >= 1",
    ),
    "half a step": (
        lambda: make("f2sa", num_inner_steps=0.5),
        TypeError,
        r"f2sa: num_inner_steps is 0\.5; expected an integer >= 1",
    ),
    "negative proximal weight": (
        lambda: make("meha", proximal=-1.0),
        ValueError,
        r"meha: proximal is -1\.0; expected a finite number > 0",
    ),
    "negative rate": (
        lambda: make("darts", unroll_lr=-1.0),
        ValueError,
        r"darts: unroll_lr is -1\.0; expected a finite number >= 0",
    ),
    "growth that shrinks": (
        lambda: hf.bilevel.power_growth(1.0, -0.5),
        ValueError,
        r"power_growth: exponent is -0\.5; expected a finite number >= 0",
    ),
    **{
        f"batch of {name} that is no tuple": (
            lambda name=name: make(name).update(make(name).init(*start()), batch[0], batch[1][0]),
            TypeError,
            rf"{name}: outer_batch is of type Tensor; expected the tuple of arguments",
        )
        for name in LOOPS
    },
    "state of another loop": (
        lambda: make("sama").update(make("pbgd").init(*start()), *batch),
        ValueError,
        r"sama: state\.optimizers has those of \[\]; expected those of \['inner'\]\. Make",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()
