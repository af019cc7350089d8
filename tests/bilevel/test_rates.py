"""The loops at the rates that their papers state, on quadratics with closed forms.

Without noise an update is an affine map, written down here without the library: its fixed point is
where a loop rests, its spectral radius the rate. With noise, a table of slopes.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State, power_decay, power_growth
from tests.bilevel.test_bilevel import (
    DIM,
    HDIM,
    M,
    N,
    inner_loss,
    outer_loss,
    quadratic,
    start,
)
from tests.problems import ravel, stack

pytestmark = pytest.mark.slow

RHO, GAMMA, T, Q, C, PROXIMAL = 0.6, 0.1, 2, 3, 5.0, 0.8
(A, B, B0), (TARGET, SHIFT) = quadratic().full()
EYE = torch.eye(DIM, dtype=torch.float64)
W_BEST, _, H_BEST = quadratic().optimum()
Hand = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


# Without noise -----------------------------------------------------------------------------------


def g_w(w: Tensor, h: Tensor) -> Tensor:
    return A @ w - B @ h - B0


def d_u(w: Tensor, u: Tensor) -> Tensor:
    return A @ u - (w - TARGET)


def d_h(u: Tensor, h: Tensor) -> Tensor:
    return 0.5 * (h - SHIFT) + B.T @ u


def series(w: Tensor, q: int = Q) -> Tensor:
    """The adjoint by a truncated Neumann series."""
    term = total = w - TARGET
    for _ in range(q):
        term = term - RHO * A @ term
        total = total + term
    return RHO * total


def descended(w: Tensor, h: Tensor, steps: int = T, lr: float = RHO) -> Tensor:
    for _ in range(steps):
        w = w - lr * g_w(w, h)
    return w


def soba(z: Any) -> Any:
    w, u, h = z
    return w - RHO * g_w(w, h), u - RHO * d_u(w, u), h - GAMMA * d_h(u, h)


def ma_soba(z: Any) -> Any:
    w, u, h, d = z
    d = 0.3 * d_h(u, h) + 0.7 * d
    return w - RHO * g_w(w, h), u - RHO * d_u(w, u), h - GAMMA * d, d


def fsla(z: Any) -> Any:
    w, u, h = z
    w = w - RHO * g_w(w, h)
    u = u - RHO * d_u(w, u)
    return w, u, h - GAMMA * d_h(u, h)


def amigo(z: Any) -> Any:
    w, u, h = z
    w = descended(w, h)
    for _ in range(Q):
        u = u - RHO * d_u(w, u)
    return w, u, h - GAMMA * d_h(u, h)


def stocbio(z: Any, q: int = Q) -> Any:
    w, h = z
    w = descended(w, h)
    return w, h - GAMMA * d_h(series(w, q), h)


def mrbo(z: Any, q: int = Q) -> Any:
    w, h = z
    return w - RHO * g_w(w, h), h - GAMMA * d_h(series(w, q), h)


def vrbo(z: Any, q: int = Q) -> Any:
    """Within a period: the directions are those where they were corrected last."""
    w, past, h = z
    h = h - GAMMA * d_h(series(past, q), h)
    past = descended(w, h, T - 1)
    return descended(past, h, 1), past, h


def f2sa(z: Any, c: float = C) -> Any:
    w, y, h = z
    w = descended(w, h)
    for _ in range(T):
        y = y - RHO * (g_w(y, h) + (y - TARGET) / c)
    return w, y, h - GAMMA * (0.5 * (h - SHIFT) - c * B.T @ (y - w))


def pbgd(z: Any, c: float = C, steps: int = T) -> Any:
    w, h = z
    apart = w - descended(w, h, steps)
    new = w - RHO * (g_w(w, h) + (w - TARGET) / c)
    return new, h - GAMMA * (0.5 * (h - SHIFT) - c * B.T @ apart)


def meha(z: Any, c: float = C) -> Any:
    w, y, h = z
    y = y - RHO * (g_w(y, h) + (y - w) / PROXIMAL)
    h = h - GAMMA * (0.5 * (h - SHIFT) / c - B.T @ (w - y))
    return w - 0.5 * RHO * ((w - TARGET) / c + g_w(w, h) - (w - y) / PROXIMAL), y, h


def sama(z: Any) -> Any:
    w, h = z
    w = w - RHO * g_w(w, h)
    return w, h - GAMMA * d_h(RHO * (w - TARGET), h)


def darts(z: Any) -> Any:
    w, h = z
    h = h - GAMMA * d_h(RHO * (w - RHO * g_w(w, h) - TARGET), h)
    return w - RHO * g_w(w, h), h


WIDE = {
    "fsla": 3,
    "amigo": T + Q + 1,
    "stocbio": T + Q + 1,
    "bsa": T + Q + 1,
    "ttsa": Q + 2,
    "mrbo": Q + 2,
    "sustain": Q + 2,
    "vrbo": (T + 1) * (Q + 2),
    "pzobo": T,
}
BOTH = {"num_inner_steps": T, "num_adjoint_steps": Q}
# The map of an update, its variables, the settings, and whether the loop rests at the optimum.
# With constant steps all converge linearly, as the papers of SABA, SRBA, AmIGO and FSLA have it for
# problems like this. A fixed number of terms leaves StocBiO, MRBO and VRBO a bias, a fixed penalty
# F2SA, PBGD and MEHA; SAMA takes the Hessian for the identity, and DARTS one step for the solution.
LINEAR: dict[str, tuple[Hand, str, dict[str, Any], bool]] = {
    "soba": (soba, "wuh", {}, True),
    "saba": (soba, "wuh", {"num_inner_batches": 1, "num_outer_batches": 1}, True),
    "srba": (soba, "wuh", {"period": 5}, True),
    "ma_soba": (ma_soba, "wuhd", {"outer_weight": 0.3}, True),
    "fsla": (fsla, "wuh", {"outer_weight": 0.3}, True),
    "amigo": (amigo, "wuh", BOTH, True),
    "stocbio": (stocbio, "wh", BOTH, False),
    "mrbo": (mrbo, "wh", {"num_adjoint_steps": Q}, False),
    "vrbo": (vrbo, "wuh", BOTH | {"period": 10**6}, False),
    "f2sa": (f2sa, "wuh", {"penalty": C, "num_inner_steps": T}, False),
    "pbgd": (pbgd, "wh", {"penalty": C, "num_inner_steps": T}, False),
    "meha": (
        meha,
        "wuh",
        {"penalty": C, "proximal": PROXIMAL, "inner_lr": RHO / 2, "adjoint_lr": RHO},
        False,
    ),
    "sama": (sama, "wh", {"inner_optimizer": hf.optim.sgd(RHO)}, False),
    "darts": (darts, "wh", {"unroll_lr": RHO}, False),
}


def make(name: str, **settings: Any) -> Loop:
    rates = {"inner_lr": RHO, "outer_lr": GAMMA}
    if "inner_optimizer" in settings:
        del rates["inner_lr"]
    return getattr(hf.bilevel, name)(inner_loss, outer_loss, **(rates | settings))


def rest_and_rate(hand: Hand, variables: str, **keywords: Any) -> tuple[Tensor, float]:
    """Params and hparams at the fixed point of an affine map, and its spectral radius."""
    sizes = [DIM if variable in "wu" else HDIM for variable in variables]

    def flat(z: Tensor) -> Tensor:
        return torch.cat(hand(z.split(sizes), **keywords))

    zero = torch.zeros(sum(sizes), dtype=torch.float64)
    matrix = jacfwd(flat)(zero)
    z = torch.linalg.solve(torch.eye(len(zero), dtype=zero.dtype) - matrix, flat(zero))
    parts = dict(zip(variables, z.split(sizes), strict=True))
    rate = torch.linalg.eigvals(matrix).abs().max().item()
    return torch.cat([parts["w"], parts["h"]]), rate


def slope(x: list[float], y: list[float]) -> float:
    """Of the line through points."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    a = a - a.mean()
    return (a @ b / (a @ a)).item()


@pytest.mark.parametrize("name", LINEAR)
def test_without_noise_the_rate_is_that_of_the_affine_map(name: str) -> None:
    hand, variables, settings, exact = LINEAR[name]
    rest, rate = rest_and_rate(hand, variables)
    bias = (rest - torch.cat([W_BEST, H_BEST])).norm()
    assert bias < 1e-10 if exact else bias > 1e-3
    loop, (inner, outer) = make(name, **settings), quadratic().full()
    if name in WIDE:
        inner = tuple(leaf.expand(WIDE[name], *leaf.shape) for leaf in inner)
    indices = (0, 0) if name == "saba" else ()
    state, steps, logs = loop.init(*start()), [], []
    for step in range(int(math.log(1e-12) / math.log(rate))):
        state = loop.update(state, inner, outer, *indices)
        error = (torch.cat([ravel(state.params), ravel(state.hparams)]) - rest).norm().item()
        if 1e-10 < error < 1e-3:
            steps.append(float(step))
            logs.append(math.log(error))
    assert len(steps) > 20
    assert slope(steps, logs) == pytest.approx(math.log(rate), rel=0.1)


def test_a_truncated_series_leaves_a_bias_that_falls_geometrically() -> None:
    """Lemma 3 of StocBiO: like ``(1 - lr mu) ** Q``, with ``mu`` the least curvature."""
    counts = list(range(10, 30))
    for hand, variables in ((stocbio, "wh"), (mrbo, "wh"), (vrbo, "wuh")):
        best = torch.cat([W_BEST, H_BEST])
        biases = [(rest_and_rate(hand, variables, q=q)[0] - best).norm().log() for q in counts]
        expected = math.log(1 - RHO * torch.linalg.eigvalsh(A)[0].item())
        assert slope(list(map(float, counts)), biases) == pytest.approx(expected, rel=0.02)


def test_the_bias_of_a_penalty_falls_like_its_inverse() -> None:
    """As F2SA, PBGD and MEHA have it; PBGD with inner steps like the logarithm of the penalty."""
    best = torch.cat([W_BEST, H_BEST])
    for hand, variables in ((f2sa, "wuh"), (pbgd, "wh"), (meha, "wuh")):
        penalties = [1e2, 1e3, 1e4]
        more: dict[str, Any] = {"steps": 60} if hand is pbgd else {}
        rests = [rest_and_rate(hand, variables, c=c, **more)[0] for c in penalties]
        biases = [(rest - best).norm().log().item() for rest in rests]
        assert slope([math.log(c) for c in penalties], biases) == pytest.approx(-1, abs=0.05)


# With noise --------------------------------------------------------------------------------------

LANES, OFFSET = 32, 10**6


def many(name: str, num_steps: int, full: int = 0, **settings: Any) -> list[State]:
    """The states of runs side by side, with batches of their own, or all data every so often."""
    problem, generator = quadratic(), torch.Generator().manual_seed(0)
    loop, width = make(name, **settings), WIDE.get(name)
    states = stack([loop.init(*start())] * LANES)
    # what is drawn by a loop depends on its step: lanes far apart draw apart
    states = states._replace(step=OFFSET * torch.arange(LANES))
    update, found = vmap(loop.update), []
    for step in range(num_steps):
        i = torch.randint(N, (LANES, *([width] if width else [])), generator=generator)
        j = torch.randint(M, (LANES,), generator=generator)
        inner, outer = problem.inner(i), problem.outer(j)
        if full and step % full == 0:
            inner, outer = (
                tuple(leaf.expand(*index.shape, *leaf.shape) for leaf in leaves)
                for leaves, index in zip(problem.full(), (i, j), strict=True)
            )
        states = update(states, inner, outer, *((i, j) if name == "saba" else ()))
        found.append(states)
    return found


def lanes(tree: Any) -> Tensor:
    """The leaves of params or hparams as vectors, one a lane."""
    leaves = [*tree["a"], tree["b"]] if isinstance(tree, dict) else tree
    return torch.cat([leaf.reshape(LANES, -1) for leaf in leaves], 1)


def far(state: State, rest: Tensor) -> Tensor:
    """The mean square distance of params and hparams."""
    both = torch.cat([lanes(state.params), lanes(state.hparams)], 1)
    return (both - rest).square().sum(1).mean()


def second_moment(scale: float) -> float:
    """The mean square distance of `soba` in the long run, from its first two moments."""
    problem, size = quadratic(), 2 * DIM + HDIM
    maps = []
    for i in range(N):
        for j in range(M):
            (Ai, Bi, ci), (t, s) = problem.inner(i), problem.outer(j)
            block, offset = torch.eye(size, dtype=torch.float64), torch.zeros(size).double()
            w, u, h = slice(0, DIM), slice(DIM, 2 * DIM), slice(2 * DIM, size)
            rho, gamma = scale * RHO, scale * GAMMA
            block[w, w] -= rho * Ai
            block[w, h] += rho * Bi
            block[u, u] -= rho * Ai
            block[u, w] += rho * EYE
            block[h, h] -= gamma * 0.5 * torch.eye(HDIM, dtype=torch.float64)
            block[h, u] -= gamma * Bi.T
            offset[w], offset[u], offset[h] = rho * ci, -rho * t, gamma * 0.5 * s
            maps.append((block, offset))
    blocks, offsets = (torch.stack(each) for each in zip(*maps, strict=True))
    optimum = torch.cat(quadratic().optimum())
    noise = offsets + blocks @ optimum - optimum  # the step at the optimum
    one = torch.eye(size, dtype=torch.float64)
    mean = torch.linalg.solve(one - blocks.mean(0), noise.mean(0))
    cross = (blocks @ mean)[:, :, None] * noise[:, None, :]
    known = (cross + cross.mT + noise[:, :, None] * noise[:, None, :]).mean(0)
    squares = torch.stack([torch.kron(block, block) for block in blocks]).mean(0)
    eye = torch.eye(size * size, dtype=torch.float64)
    moment = torch.linalg.solve(eye - squares, known.flatten()).reshape(size, size)
    variances = moment.diagonal()
    return (variances[:DIM].sum() + variances[2 * DIM :].sum()).item()


def floor(name: str, scale: float, full: int, rest: Tensor, **settings: Any) -> float:
    """The mean square distance from the rest in the last half of a run."""
    inner = 1.0 if full else scale
    rates = {"inner_lr": inner * RHO, "outer_lr": scale * GAMMA, "adjoint_lr": inner * RHO}
    if name == "pzobo":  # it has no adjoint
        del rates["adjoint_lr"]
    states = many(name, int(100 / scale), full, **(rates | settings))
    return torch.stack([far(state, rest) for state in states[len(states) // 2 :: 5]]).mean().item()


BEST = torch.cat([W_BEST, H_BEST])


def rest_of_pzobo() -> Tensor:
    """Where the mean of the directions is zero: the response is that of T inner steps."""
    G = torch.linalg.solve(A, B)
    response = G - torch.linalg.matrix_power(EYE - RHO * A, T) @ G
    offset = torch.linalg.solve(A, B0)
    eye = torch.eye(HDIM, dtype=torch.float64)
    right = 0.5 * SHIFT + response.T @ (TARGET - offset)
    h = torch.linalg.solve(0.5 * eye + response.T @ G, right)
    return torch.cat([G @ h + offset, h])


# The loops whose noise does not vanish at a solution: with constant steps the mean square distance
# ends in proportion to them. Where the noise is that of draws, all batches hold everything.
FLOORS: dict[str, tuple[int, Tensor, dict[str, Any]]] = {
    "soba": (0, BEST, {}),
    "ma_soba": (0, BEST, {"outer_weight": 0.3}),
    "fsla": (0, BEST, {"outer_weight": 0.3}),
    "amigo": (0, BEST, BOTH),
    "stocbio": (0, rest_and_rate(stocbio, "wh")[0], BOTH | {"adjoint_lr": RHO}),
    "mrbo": (
        0,
        rest_and_rate(mrbo, "wh")[0],
        {
            "num_adjoint_steps": Q,
            "adjoint_lr": RHO,
            "inner_weight": 0.9,
            "outer_weight": 0.6,
        },
    ),
    "bsa": (1, rest_and_rate(mrbo, "wh")[0], BOTH),
    "ttsa": (1, rest_and_rate(mrbo, "wh")[0], {"num_adjoint_steps": Q}),
    "sustain": (1, rest_and_rate(mrbo, "wh")[0], {"num_adjoint_steps": Q, "outer_weight": 0.6}),
    "pzobo": (1, rest_of_pzobo(), {"num_inner_steps": T, "num_directions": 2}),
    "f2sa": (0, rest_and_rate(f2sa, "wuh")[0], {"penalty": C, "num_inner_steps": T}),
}


@pytest.mark.parametrize("name", FLOORS)
def test_constant_steps_end_at_a_floor_in_proportion_to_them(name: str) -> None:
    full, rest, settings = FLOORS[name]
    scales = (1.0, 0.25)
    floors = [floor(name, scale, full, rest, **settings) for scale in scales]
    order = math.log(floors[0] / floors[1]) / math.log(4)
    assert order == pytest.approx(1, abs=0.35)
    if name == "soba":
        assert floors == pytest.approx([second_moment(scale) for scale in scales], rel=0.3)


def test_with_reduced_variance_there_is_no_floor() -> None:
    """SABA and SRBA: linear with constant steps, at a rate of the order of gradient descent."""
    for name, settings, full in (
        ("saba", {"num_inner_batches": N, "num_outer_batches": M}, 0),
        ("srba", {"period": 8}, 8),
        ("vrbo", BOTH | {"period": 8}, 8),
    ):
        rest, rate = rest_and_rate(vrbo, "wuh") if name == "vrbo" else rest_and_rate(soba, "wuh")
        if name == "saba":
            settings = settings | {"inner_lr": 0.3 * RHO, "outer_lr": 0.3 * GAMMA}
        states = many(name, 400, full, **settings)
        logs = [far(state, rest).log().item() / 2 for state in states[::20]]
        per_step = slope([20.0 * k for k in range(len(logs))], logs)
        assert per_step < 0.15 * math.log(rate), (name, per_step, math.log(rate))
        assert logs[-1] < math.log(1e-3), (name, logs)


# With decreasing steps ---------------------------------------------------------------------------


def decay(initial: float, exponent: float) -> Callable[[Tensor], Any]:
    """A power of the step within a lane."""
    power = power_decay(initial, exponent)
    return lambda step: power(step % OFFSET)


def slope_squared(state: State) -> float:
    """The mean square of the gradient of the value function, in closed form."""
    h = lanes(state.hparams)
    w = torch.linalg.solve(A, (h @ B.T + B0).T).T
    u = torch.linalg.solve(A, (w - TARGET).T).T
    return (0.5 * (h - SHIFT) + u @ B).square().sum(1).mean().item()


# What the papers promise for the mean square of the gradient (TTSA: of the distance, for a strongly
# convex value function) after k updates, with their step sizes: k to the power of at most this.
DECREASING: dict[str, tuple[int, dict[str, Any], float]] = {
    "soba": (0, {"inner_lr": decay(0.6, 0.4), "outer_lr": decay(0.3, 0.6)}, -2 / 5),
    "ttsa": (
        0,
        {"inner_lr": decay(0.9, 2 / 3), "outer_lr": decay(1.0, 1.0), "num_adjoint_steps": Q},
        -2 / 3,
    ),
    "sustain": (
        0,
        {
            "inner_lr": decay(0.6, 1 / 3),
            "outer_lr": decay(0.3, 1 / 3),
            "inner_weight": decay(1, 2 / 3),
            "outer_weight": decay(1, 2 / 3),
            "num_adjoint_steps": Q,
        },
        -2 / 3,
    ),
    "f2sa": (1, {"outer_lr": GAMMA, "penalty": power_growth(1.0, 1 / 3)}, -2 / 3),
    "meha": (
        1,
        {"inner_lr": 0.3, "adjoint_lr": 0.6, "outer_lr": 0.5, "penalty": power_growth(1.0, 0.25)},
        -1 / 2,
    ),
    "bome": (
        1,
        {"inner_lr": power_decay(0.6, 0.5), "outer_lr": power_decay(0.6, 0.5), "adjoint_lr": RHO},
        -1 / 2,
    ),
}


@pytest.mark.parametrize("name", DECREASING)
def test_decreasing_steps_reach_the_rate_of_the_paper(name: str) -> None:
    full, settings, order = DECREASING[name]
    if full:  # without noise all lanes are alike, but for their steps
        settings = {
            key: (lambda step, fn=value: fn(step % OFFSET)) if callable(value) else value
            for key, value in settings.items()
        }
    if "num_adjoint_steps" in settings:  # no bias that would end the descent
        settings = settings | {"num_adjoint_steps": Q, "adjoint_lr": 1.0}
    states = many(name, 400, full, **settings)
    steps = [25, 50, 100, 200, 400]
    values = [math.log(slope_squared(states[step - 1])) for step in steps]
    assert slope([math.log(step) for step in steps], values) < order + 0.1, values
