"""The loops whose directions are averaged, corrected or drawn: steps by hand, optima, purity."""

import io
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State
from hyperfunc.bilevel._random import normal, uniform
from tests.bilevel.test_bilevel import (
    HDIM,
    Q,
    Quadratic,
    T,
    assert_close,
    average,
    distance,
    draw,
    inner_loss,
    outer_loss,
    quadratic,
    random_state,
    start,
    vectors,
)
from tests.cells import slow_but
from tests.problems import ravel, stack

A_W, A_H = 0.3, 0.2  # the weights of what is new
P = 4  # the period
J, MU, SEED = 3, 0.01, 5

# For each loop: its settings, and the size of the leading dimension of the inner batches.
LOOPS: dict[str, tuple[dict[str, Any], int | None]] = {
    "ma_soba": ({"outer_weight": A_H}, None),
    "srba": ({"period": P}, None),
    "fsla": ({"outer_weight": A_H}, 3),
    "ttsa": ({"num_adjoint_steps": Q, "seed": SEED}, Q + 2),
    "bsa": ({"num_inner_steps": T, "num_adjoint_steps": Q, "seed": SEED}, T + Q + 1),
    "sustain": (
        {"num_adjoint_steps": Q, "inner_weight": A_W, "outer_weight": A_H, "seed": SEED},
        Q + 2,
    ),
    "mrbo": ({"num_adjoint_steps": Q, "inner_weight": A_W, "outer_weight": A_H}, Q + 2),
    "vrbo": (
        {"num_inner_steps": T, "num_adjoint_steps": Q, "period": P},
        (T + 1) * (Q + 2),
    ),
    "pzobo": ({"num_inner_steps": T, "num_directions": J, "smoothing": MU, "seed": SEED}, T),
}


def make(name: str, **keywords: Any) -> Loop:
    settings = {"inner_lr": 0.4, "outer_lr": 0.1} | LOOPS[name][0] | keywords
    return getattr(hf.bilevel, name)(inner_loss, outer_loss, **settings)


def batches(name: str, problem: Quadratic, i: Tensor, j: Any) -> Any:
    width = LOOPS[name][1]
    return problem.inner(i[0] if width is None else i[:width]), problem.outer(j)


WIDTH = (T + 1) * (Q + 2)


# Single steps by hand ----------------------------------------------------------------------------


def gradient(inner: Any, w: Tensor, h: Tensor) -> Tensor:
    A, B, c = inner
    return A @ w - B @ h - c


def term(inner: Any, outer: Any, w: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """The three directions at a point."""
    (A, B, _), (t, s) = inner, outer
    return gradient(inner, w, h), A @ u - (w - t), 0.5 * (h - s) + B.T @ u


def series(inner: Any, b: Tensor, lr: float, drawn: int | None) -> Tensor:
    """The Neumann series with the matrices of some batches, or a drawn term of it."""
    terms = [b]
    for A in inner[0]:
        terms.append(terms[-1] - lr * A @ terms[-1])
    return lr * (sum(terms) if drawn is None else len(terms) * terms[drawn])


def by_series(
    inner: Any, outer: Any, w: Tensor, h: Tensor, drawn: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The directions of params and hparams, and the adjoint, for a group of batches."""
    first, middle, last = ([leaf[k] for leaf in inner] for k in (0, slice(1, -1), -1))
    u = series(middle, w - outer[0], 0.3, drawn)
    return gradient(first, w, h), term(last, outer, w, u, h)[2], u


def number_drawn(step: int) -> int:
    return int(uniform(SEED, torch.tensor(step), 1).item() * (Q + 1))


def remembered(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parts = (state.memory["directions"], state.memory["before"])
    return tuple({key: ravel(tree) for key, tree in part.items()} for part in parts)


def expected(name: str, state: State, problem: Quadratic, i: Tensor, j: int) -> Any:
    """The variables and the directions after a step, in closed form."""
    w, u, h = vectors(state)
    step = int(state.step)
    inner, outer = batches(name, problem, i, j)
    row = lambda k: [leaf[k] for leaf in inner]  # noqa: E731
    if name in ("bsa", "ttsa"):
        steps = T if name == "bsa" else 1
        for k in range(steps):
            w = w - 0.4 * gradient(row(k), w, h)
        u = series(row(slice(steps, steps + Q)), w - outer[0], 0.3, number_drawn(step))
        return (w, u, h - 0.1 * term(row(-1), outer, w, u, h)[2]), {}
    if name == "pzobo":
        v = normal(SEED, state.step, J * HDIM).reshape(J, HDIM)

        def descended(h: Tensor) -> Tensor:
            found = w
            for k in range(T):
                found = found - 0.4 * gradient(row(k), found, h)
            return found

        end = descended(h)
        slopes = torch.stack([(descended(h + MU * x) - end) @ (end - outer[0]) / MU for x in v])
        return (end, u, h - 0.1 * (0.5 * (h - outer[1]) + slopes @ v / J)), {}
    d, old = remembered(state)
    first = step == 0
    if name == "ma_soba":
        new = term(inner, outer, w, u, h)
        a = 1 if first else A_H
        d_h = a * new[2] + (1 - a) * d["hparams"]
        return (w - 0.4 * new[0], u - 0.3 * new[1], h - 0.1 * d_h), {"hparams": d_h}
    if name == "srba":
        new = term(inner, outer, w, u, h)
        before = term(inner, outer, *(old[key] for key in ("params", "adjoint", "hparams")))
        if step % P:
            last = (d["params"], d["adjoint"], d["hparams"])
            new = tuple(x + y - z for x, y, z in zip(last, new, before, strict=True))
        found = (w - 0.4 * new[0], u - 0.3 * new[1], h - 0.1 * new[2])
        return found, dict(zip(("params", "adjoint", "hparams"), new, strict=True))
    if name == "fsla":
        w_new = w - 0.4 * gradient(row(0), w, h)
        u_new = u - 0.3 * term(row(1), outer, w_new, u, h)[1]
        d_h = term(row(2), outer, w_new, u_new, h)[2]
        if not first:
            back = term(row(2), outer, w, u, old["hparams"])[2]
            d_h = d_h + (1 - A_H) * (d["hparams"] - back)
        return (w_new, u_new, h - 0.1 * d_h), {"hparams": d_h}
    if name in ("mrbo", "sustain"):
        drawn = number_drawn(step) if name == "sustain" else None
        d_w, d_h, u = by_series(inner, outer, w, h, drawn)
        if not first:
            back_w, back_h, _ = by_series(inner, outer, old["params"], old["hparams"], drawn)
            d_w = d_w + (1 - A_W) * (d["params"] - back_w)
            d_h = d_h + (1 - A_H) * (d["hparams"] - back_h)
        return (w - 0.4 * d_w, u, h - 0.1 * d_h), {"params": d_w, "hparams": d_h}
    assert name == "vrbo"
    d_w, d_h = d["params"], d["hparams"]
    if step % P == 0:
        d_w, d_h, u = by_series(row(slice(0, Q + 2)), outer, w, h)
    taken_at = old["params"] if step % P else w
    before, now = (taken_at, h), (w, h - 0.1 * d_h)
    for k in range(1, T + 1):
        group = row(slice(k * (Q + 2), (k + 1) * (Q + 2)))
        new_w, new_h, u = by_series(group, outer, *now)
        back_w, back_h, _ = by_series(group, outer, *before)
        d_w, d_h = d_w + new_w - back_w, d_h + new_h - back_h
        before, now = now, (now[0] - 0.4 * d_w, now[1])
    return (now[0], u, now[1]), {"params": d_w, "hparams": d_h, "taken at": before[0]}


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_by_hand(name: str) -> None:
    """From any memory: a first step, one within a period, and one that begins a period."""
    keywords = {} if name == "pzobo" else {"adjoint_lr": 0.3}
    problem, loop = quadratic(), make(name, **keywords)
    for step in (0, 3, 2 * P):
        state = random_state(loop)._replace(step=torch.tensor(step))
        [(i, j)] = draw(1, seed=step, width=WIDTH)
        new = loop.update(state, *batches(name, problem, i, j))
        variables, directions = expected(name, state, problem, i, int(j))
        assert_close(vectors(new), variables, 1e-10)
        assert_close(new.step, torch.tensor(step + 1), 0)
        if name in ("bsa", "ttsa", "pzobo"):
            assert new.memory == ()
            continue
        found, before = remembered(new)
        past = {key: ravel(getattr(state, key)) for key in before}
        if name == "vrbo":
            past = {"params": directions.pop("taken at")}
        assert_close(found, directions, 1e-10)
        assert_close(before, past, 1e-10)


# What is drawn -----------------------------------------------------------------------------------


def test_numbers_are_drawn_from_their_distribution() -> None:
    many = uniform(0, torch.tensor(3), 20000)
    steps = torch.stack([uniform(7, torch.tensor(k), 1)[0] for k in range(500)])
    seeds = torch.stack([uniform(k, torch.tensor(7), 1)[0] for k in range(500)])
    for sample in (many, steps, seeds):
        n = len(sample)
        below = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        shares = (sample[:, None] < below).double().mean(0)
        assert (shares - below).abs().max() < 2.2 / n**0.5
        centred = sample - 0.5
        for lag in (1, 2, 3):
            assert (12 * centred[lag:] * centred[:-lag]).mean().abs() < 4 / n**0.5
    z = normal(1, torch.tensor(0), 20000)
    assert abs(z.mean()) < 0.03
    assert abs(z.var() - 1) < 0.05
    assert abs((z**4).mean() - 3) < 0.25


def test_a_random_term_has_the_mean_of_the_series() -> None:
    problem, stocbio = quadratic(), {"num_inner_steps": T, "num_adjoint_steps": Q}
    keywords = {"inner_lr": 0.4, "outer_lr": 0.1, "adjoint_lr": 0.3}
    whole = hf.bilevel.stocbio(inner_loss, outer_loss, **keywords, **stocbio)
    loop = make("bsa", adjoint_lr=0.3)
    state = random_state(loop)
    [(i, j)] = draw(1)
    inputs = batches("bsa", problem, i, j)
    of_number = {}
    for step in range(60):
        found = loop.update(state._replace(step=torch.tensor(step)), *inputs)
        of_number.setdefault(number_drawn(step), torch.cat(vectors(found)))
    assert len(of_number) == Q + 1
    mean = torch.stack([*of_number.values()]).mean(0)
    assert_close(mean, torch.cat(vectors(whole.update(state, *inputs))))


def test_the_directions_of_pzobo_have_the_right_mean() -> None:
    """Beside the gradient through the inner steps, by autograd."""
    problem, num_draws = quadratic(), 1500
    loop = make("pzobo", outer_lr=1.0)
    state = random_state(loop)
    [(i, j)] = draw(1)
    w, _, h = vectors(state)
    h = h.requires_grad_()
    moved = w
    for k in range(T):
        moved = moved - 0.4 * gradient(problem.inner(i[k]), moved, h)
    (exact,) = torch.autograd.grad(outer_loss(moved, h, *problem.outer(j)), h)
    states = stack([state] * num_draws)._replace(step=torch.arange(num_draws))
    inner, outer = batches("pzobo", problem, i, j)
    new = vmap(lambda state: loop.update(state, inner, outer))(states)
    ends = torch.cat([leaf.flatten(1) for leaf in new.hparams], 1)
    found = (h - ends.mean(0)).detach()
    error = ends.std(0).norm() / num_draws**0.5
    assert (found - exact).norm() < 2 * error < 0.2 * exact.norm()


# Optima ------------------------------------------------------------------------------------------

# For a run without noise: settings, updates, and the distance that is reached. A random term and
# random directions leave noise of their own: their steps decrease.
decay = hf.bilevel.power_decay
EXACT: dict[str, tuple[dict[str, Any], int, float]] = {
    "ma_soba": ({"inner_lr": 0.9, "outer_weight": 0.6}, 300, 1e-8),
    "srba": ({"inner_lr": 0.9}, 250, 1e-8),
    "fsla": ({"inner_lr": 0.9, "outer_lr": 0.3}, 150, 1e-8),
    "mrbo": ({"inner_lr": 0.9, "outer_lr": 0.3, "num_adjoint_steps": 20}, 120, 1e-8),
    "vrbo": ({"inner_lr": 0.9, "outer_lr": 0.3, "num_adjoint_steps": 20}, 60, 1e-8),
    "ttsa": ({"inner_lr": 0.9, "outer_lr": decay(0.5, 0.9)}, 600, 0.1),
    "bsa": ({"inner_lr": 0.9, "outer_lr": decay(0.5, 0.9)}, 400, 0.1),
    "sustain": (
        {"inner_lr": 0.9, "outer_lr": decay(0.3, 0.5), "outer_weight": decay(1.0, 0.8)},
        400,
        0.1,
    ),
    "pzobo": ({"inner_lr": 0.9, "outer_lr": decay(0.3, 0.8), "num_inner_steps": 6}, 250, 0.1),
}


@pytest.mark.parametrize("name", slow_but("ma_soba", "fsla", of=LOOPS))
def test_without_noise_every_loop_finds_the_optimum(name: str) -> None:
    keywords, num_updates, tol = EXACT[name]
    settings, width = LOOPS[name]
    settings = settings | keywords
    (A, B, c), outer = quadratic().full()
    q, t = settings.get("num_adjoint_steps", 0), settings.get("num_inner_steps", 1)
    if width is not None:
        formula = {"fsla": 3, "vrbo": (t + 1) * (q + 2), "pzobo": t}
        width = formula.get(name, t + q + 1)
        A, B, c = (leaf.expand(width, *leaf.shape) for leaf in (A, B, c))
    loop = make(name, **keywords)
    state = loop.init(*start())
    for _ in range(num_updates):
        state = loop.update(state, (A, B, c), outer)
    w, _, h = quadratic().optimum()
    error = torch.cat([ravel(state.params) - w, ravel(state.hparams) - h]).norm()
    assert error < tol
    if tol < 1e-6:  # the adjoint too
        assert distance(state) < tol


def noisy(loop: Loop, wide: int | None, num_steps: int, full_every: int | None = None) -> float:
    """The mean distance of params and hparams from the optimum in the last third of a run."""
    problem = quadratic()
    w, _, h = problem.optimum()
    state, far = loop.init(*start()), []
    for step, (i, j) in enumerate(draw(num_steps, width=WIDTH)):
        inner = problem.inner(i[0] if wide is None else i[:wide])
        outer = problem.outer(j)
        if full_every and step % full_every == 0:
            inner, outer = problem.full()
            if wide is not None:
                inner = tuple(leaf.expand(wide, *leaf.shape) for leaf in inner)
        state = loop.update(state, inner, outer)
        if step >= 2 * num_steps // 3:
            error = torch.cat([ravel(state.params) - w, ravel(state.hparams) - h])
            far.append(error.norm().item())
    return sum(far) / len(far)


@pytest.mark.slow
def test_noise_is_reduced() -> None:
    """Beside their plain counterparts, with the same constant steps and batches."""
    rates = {"inner_lr": 0.3, "outer_lr": 0.1}
    soba = noisy(hf.bilevel.soba(inner_loss, outer_loss, **rates), None, 450)
    srba = noisy(make("srba", **rates), None, 450, full_every=P)
    assert srba < 1e-5 * soba
    two = {"num_inner_steps": 1, "num_adjoint_steps": Q}
    stocbio = noisy(hf.bilevel.stocbio(inner_loss, outer_loss, **two, **rates), Q + 2, 240)
    mrbo = noisy(make("mrbo", **rates), Q + 2, 240)
    ttsa = noisy(make("ttsa", **rates), Q + 2, 240)
    sustain = noisy(make("sustain", **rates), Q + 2, 240)
    assert mrbo < 0.85 * stocbio
    assert sustain < 0.8 * ttsa


def test_an_average_is_nearer_the_hypergradient_than_a_sample() -> None:
    (A, B, c), (t, s) = quadratic().full()
    problem, loop = quadratic(), make("ma_soba", outer_weight=0.1, outer_lr=0.01)
    state = loop.init(*start())
    far: dict[str, list[float]] = {"average": [], "sample": []}
    for i, j in draw(150):
        w, u, h = vectors(state)
        inputs = batches("ma_soba", problem, i, j)
        state = loop.update(state, *inputs)
        solution = torch.linalg.solve(A, B @ h + c)
        exact = 0.5 * (h - s) + B.T @ torch.linalg.solve(A, solution - t)
        far["average"].append((ravel(state.memory["directions"]["hparams"]) - exact).norm())
        far["sample"].append((term(*inputs, w, u, h)[2] - exact).norm())
    average_error, sample_error = (torch.stack(errors[50:]).mean() for errors in far.values())
    assert average_error < 0.6 * sample_error


# A pure transform --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_updates_are_pure_and_mapped_over_tasks(name: str) -> None:
    """Tasks alone and together, twice, from a file; nothing written to; no graph kept."""
    loop = make(name, inner_lr=decay(0.3, 0.5))
    params, hparams = optree.tree_map(lambda leaf: leaf.requires_grad_(), start())
    state = loop.init(params, hparams)
    tasks = [quadratic(seed) for seed in range(2)]
    plans = [draw(3, seed, WIDTH) for seed in range(2)]
    states, alone = vmap(loop.init)(*stack([start()] * 2)), [state, state]
    for step in range(3):
        inputs = [batches(name, task, *plan[step]) for task, plan in zip(tasks, plans, strict=True)]
        copied = optree.tree_map(torch.clone, (alone, inputs))
        new = [loop.update(*pair[:1], *pair[1]) for pair in zip(alone, inputs, strict=True)]
        again = [loop.update(*pair[:1], *pair[1]) for pair in zip(alone, inputs, strict=True)]
        assert_close(again, new, 0)
        assert_close((alone, inputs), copied, 0)
        alone, states = new, vmap(loop.update)(states, *stack(inputs))
        assert_close(states, stack(alone))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves((state, alone)))
    buffer = io.BytesIO()
    torch.save(alone[0], buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert_close(loop.update(loaded, *inputs[0]), loop.update(alone[0], *inputs[0]), 0)


# Evaluations of the inner and of the outer loss in one update.
ORACLES = {
    "ma_soba": (1, 1),
    "srba": (2, 2),
    "fsla": (4, 2),
    "ttsa": (Q + 2, 1),
    "bsa": (T + Q + 1, 1),
    "sustain": (2 * (Q + 2), 2),
    "mrbo": (2 * (Q + 2), 2),
    "vrbo": ((2 * T + 1) * (Q + 2), 2 * T + 1),
    "pzobo": (T * (J + 1), 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_oracle_calls_of_an_update(name: str) -> None:
    calls = {"inner": 0, "outer": 0}

    def counted(key: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[key] += 1
            return loss(*args)

        return call

    loop = getattr(hf.bilevel, name)(
        counted("inner", inner_loss),
        counted("outer", outer_loss),
        inner_lr=0.1,
        outer_lr=0.1,
        **LOOPS[name][0],
    )
    [(i, j)] = draw(1, width=WIDTH)
    loop.update(loop.init(*start()), *batches(name, quadratic(), i, j))
    assert tuple(calls.values()) == ORACLES[name]


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch.compile of 2.4 cannot trace optree")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ma_soba", "srba", "sustain", "pzobo"])
def test_an_update_compiles_into_one_graph(name: str) -> None:
    loop = make(name, inner_lr=decay(0.3, 0.5))
    state = loop.init(*start())
    compiled = torch.compile(loop.update, fullgraph=True, backend="eager")
    for i, j in draw(2, width=WIDTH):
        inputs = batches(name, quadratic(), i, j)
        expected = loop.update(state, *inputs)
        assert_close(compiled(state, *inputs), expected)
        state = expected


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "pzobo"])
def test_products_by_differences_are_those_of_the_graph(name: str) -> None:
    ends = []
    for products in ("reverse", "finite_difference"):
        loop = make(name, products=products)
        state = loop.init(*start())
        for i, j in draw(3, width=WIDTH):
            state = loop.update(state, *batches(name, quadratic(), i, j))
        ends.append(vectors(state))
    assert_close(ends[1], ends[0], 1e-7)
    assert not torch.equal(torch.cat(ends[0]), torch.cat(ends[1]))


@pytest.mark.parametrize("name", LOOPS)
def test_dtypes_are_kept(name: str) -> None:
    loop = make(name, inner_lr=decay(0.3, 0.5))
    ends = []
    for dtype in (torch.float64, torch.float32):
        cast = lambda leaf, dtype=dtype: leaf.to(dtype) if leaf.is_floating_point() else leaf  # noqa: E731
        state = loop.init(*optree.tree_map(cast, start()))
        for i, j in draw(3, width=WIDTH):
            inputs = optree.tree_map(cast, batches(name, quadratic(), i, j))
            state = loop.update(state, *inputs)
        leaves = optree.tree_leaves((state.params, state.adjoint, state.hparams, state.memory))
        assert all(leaf.dtype == dtype for leaf in leaves)
        ends.append(torch.cat(vectors(state)).double())
    # the differences of pzobo are by a hundredth
    assert_close(ends[1], ends[0], 1e-3 if name == "pzobo" else 1e-5)


# Bad input ---------------------------------------------------------------------------------------

rates = {"inner_lr": 0.1, "outer_lr": 0.1}
losses = (inner_loss, outer_loss)
soba = hf.bilevel.soba(*losses, **rates)
full = average(quadratic()).full()
MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "weight above one": (
        lambda: make("sustain", inner_weight=1.5),
        ValueError,
        r"sustain: inner_weight is 1\.5; expected a number in \[0, 1\]",
    ),
    "weight that is none": (
        lambda: make("ma_soba", outer_weight=None),
        TypeError,
        r"ma_soba: outer_weight is None of type NoneType; expected a number",
    ),
    "no period": (
        lambda: make("srba", period=0),
        ValueError,
        r"srba: period is 0; expected an integer >= 1",
    ),
    "period that is a float": (
        lambda: make("vrbo", period=2.0),
        TypeError,
        r"vrbo: period is 2\.0; expected an integer >= 1",
    ),
    "seed that is none": (
        lambda: make("bsa", seed=None),
        TypeError,
        r"bsa: seed is None; expected an integer >= 0",
    ),
    "no smoothing": (
        lambda: make("pzobo", smoothing=0.0),
        ValueError,
        r"pzobo: smoothing is 0\.0; expected a finite number > 0",
    ),
    "smoothing below the precision": (
        lambda: hf.bilevel.pzobo(*losses, **rates).update(
            optree.tree_map(
                lambda leaf: leaf.bfloat16() if leaf.is_floating_point() else leaf,
                make("pzobo").init(*start()),
            ),
            quadratic().inner(torch.zeros(10).long()),
            full[1],
        ),
        ValueError,
        r"pzobo: smoothing is 0\.01; expected at least 0\.078, ten times the .*=0\.2",
    ),
    "state of another loop": (
        lambda: make("srba").update(soba.init(*start()), *full),
        TypeError,
        r"srba: state\.memory is not that of srba; make the state with the init of srba itself",
    ),
    "state of another kind of memory": (
        lambda: make("mrbo").update(
            make("srba").init(*start()), *batches("mrbo", quadratic(), torch.zeros(6).long(), 0)
        ),
        TypeError,
        r"mrbo: state\.memory is not that of mrbo",
    ),
    "too few batches": (
        lambda: make("vrbo").update(
            make("vrbo").init(*start()), quadratic().inner(torch.arange(3)), full[1]
        ),
        ValueError,
        r"vrbo: inner_batches\[0\] has shape \(3, 4, 4\); expected a leading dimension of size "
        r"\(num_inner_steps \+ 1\) \* \(num_adjoint_steps \+ 2\) = 24",
    ),
    "outer batch that is no tuple": (
        lambda: make("fsla").update(make("fsla").init(*start()), full[0], list(full[1])),
        TypeError,
        r"fsla: outer_batch is of type list",
    ),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()
