"""The loops on minibatches of quadratics: where they stall, and how fast they fall."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

import hyperfunc as hf
from hyperfunc.bilevel import State, power_decay, power_growth
from tests.bilevel.test_bilevel import DIM, HDIM, M, N, quadratic, start
from tests.bilevel.test_rates import (
    B0,
    BOTH,
    EYE,
    GAMMA,
    H_BEST,
    PROXIMAL,
    RHO,
    SHIFT,
    TARGET,
    W_BEST,
    WIDE,
    A,
    B,
    C,
    Q,
    T,
    f2sa,
    make,
    meha,
    mrbo,
    pbgd,
    rest_and_rate,
    sama,
    slope,
    soba,
    stocbio,
    vrbo,
)
from tests.problems import stack

pytestmark = pytest.mark.slow

# With noise --------------------------------------------------------------------------------------

LANES, OFFSET = 32, 10**6


def many(
    name: str, num_steps: int, full: int = 0, whole: str = "both", **settings: Any
) -> list[State]:
    """The states of runs side by side, with batches of their own, or all data every so often.

    `whole` says which of the batches hold all data then, "inner" ones or "both".
    """
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
            everything = [
                tuple(leaf.expand(*index.shape, *leaf.shape) for leaf in leaves)
                for leaves, index in zip(problem.full(), (i, j), strict=True)
            ]
            inner, outer = everything[0], everything[1] if whole == "both" else outer
        states = update(states, inner, outer, *((i, j) if name == "saba" else ()))
        found.append(states)
    return found


def lanes(tree: Any) -> Tensor:
    """The leaves of params or hparams as vectors, one a lane."""
    leaves = [*tree["a"], tree["b"]] if isinstance(tree, dict) else tree
    return torch.cat([leaf.reshape(LANES, -1) for leaf in leaves], 1)


def both(state: State) -> Tensor:
    return torch.cat([lanes(state.params), lanes(state.hparams)], 1)


def far(state: State, rest: Tensor) -> Tensor:
    """The mean square distance of params and hparams."""
    return (both(state) - rest).square().sum(1).mean()


Batch = tuple[Tensor, ...]
Z = tuple[Tensor, ...]


def soba_on(z: Z, inner: Batch, outer: Batch, scale: float) -> Z:
    (w, u, h), (Ai, Bi, ci), (t, s) = z, inner, outer
    d_w, d_u, d_h = Ai @ w - Bi @ h - ci, Ai @ u - (w - t), 0.5 * (h - s) + Bi.T @ u
    return w - scale * RHO * d_w, u - scale * RHO * d_u, h - scale * GAMMA * d_h


def pbgd_on(z: Z, inner: Batch, outer: Batch, scale: float) -> Z:
    (w, h), (Ai, Bi, ci), (t, s) = z, inner, outer
    y = w
    for _ in range(T):
        y = y - RHO * (Ai @ y - Bi @ h - ci)
    d_w, d_h = Ai @ w - Bi @ h - ci + (w - t) / C, 0.5 * (h - s) - C * Bi.T @ (w - y)
    return w - scale * RHO * d_w, h - scale * GAMMA * d_h


def meha_on(z: Z, inner: Batch, outer: Batch, scale: float) -> Z:
    (w, y, h), (Ai, Bi, ci), (t, s) = z, inner, outer
    y = y - scale * RHO * (Ai @ y - Bi @ h - ci + (y - w) / PROXIMAL)
    h = h - scale * GAMMA * (0.5 * (h - s) - C * Bi.T @ (w - y))  # whose direction is over C
    d_w = (w - t) / C + Ai @ w - Bi @ h - ci - (w - y) / PROXIMAL
    return w - scale * 0.5 * RHO * d_w, y, h


def sama_on(z: Z, inner: Batch, outer: Batch, scale: float) -> Z:
    (w, h), (Ai, Bi, ci), (t, s) = z, inner, outer
    w = w - scale * RHO * (Ai @ w - Bi @ h - ci)
    return w, h - scale * GAMMA * (0.5 * (h - s) + scale * RHO * Bi.T @ (w - t))


def darts_on(z: Z, inner: Batch, outer: Batch, scale: float) -> Z:
    (w, h), (Ai, Bi, ci), (t, s) = z, inner, outer
    ahead = w - RHO * (Ai @ w - Bi @ h - ci)
    h = h - scale * GAMMA * (0.5 * (h - s) + RHO * Bi.T @ (ahead - t))
    return w - scale * RHO * (Ai @ w - Bi @ h - ci), h


# The update on one batch of each loss, its variables, and the settings that do not scale
ON_BATCHES: dict[str, tuple[Callable[..., Z], str, dict[str, Any]]] = {
    "soba": (soba_on, "wuh", {}),
    "pbgd": (pbgd_on, "wh", {"penalty": C, "num_inner_steps": T, "adjoint_lr": RHO}),
    "meha": (meha_on, "wuh", {"penalty": C, "proximal": PROXIMAL}),
    "sama": (sama_on, "wh", {}),
    "darts": (darts_on, "wh", {"unroll_lr": RHO}),
}


def moments(hand: Callable[..., Z], variables: str, scale: float) -> tuple[Tensor, float]:
    """Of params and hparams in the long run: the mean, and the mean square distance from it.

    As the batches do not depend on the point, the first two moments of an affine update are closed.
    """
    sizes = [DIM if variable in "wu" else HDIM for variable in variables]
    size = sum(sizes)

    def flat(z: Tensor, inner: Batch, outer: Batch) -> Tensor:
        return torch.cat(hand(z.split(sizes), inner, outer, scale))

    i, j = torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N)
    pairs, zero = (quadratic().inner(i), quadratic().outer(j)), torch.zeros(size).double()
    offsets = vmap(flat, (None, 0, 0))(zero, *pairs)
    blocks = vmap(jacfwd(flat), (None, 0, 0))(zero, *pairs)
    rest = torch.linalg.solve(torch.eye(size).double() - blocks.mean(0), offsets.mean(0))
    noise = offsets + blocks @ rest - rest  # the step from there, whose mean is zero
    squares = torch.stack([torch.kron(block, block) for block in blocks]).mean(0)
    known = (noise[:, :, None] * noise[:, None, :]).mean(0).flatten()
    moment = torch.linalg.solve(torch.eye(size * size).double() - squares, known)
    variances = moment.reshape(size, size).diagonal()
    ends = torch.tensor([True] * DIM + [False] * (size - DIM - HDIM) + [True] * HDIM)
    return rest[ends], variances[ends].sum().item()


def settled(name: str, scale: float, full: int, **settings: Any) -> list[State]:
    """Some states of the last half of a run."""
    inner = 1.0 if full else scale
    rates: dict[str, Any] = {
        "inner_lr": inner * RHO,
        "outer_lr": scale * GAMMA,
        "adjoint_lr": inner * RHO,
    }
    if name in ("pzobo", "sama", "darts"):  # they have no adjoint
        del rates["adjoint_lr"]
    if name == "meha":
        rates |= {"inner_lr": rates["inner_lr"] / 2, "outer_lr": C * rates["outer_lr"]}
    if name == "sama":
        rates["inner_optimizer"] = hf.optim.sgd(rates.pop("inner_lr"))
    states = many(name, int(100 / scale), full, **(rates | settings))
    return states[len(states) // 2 :: 5]


def floor(states: list[State], rest: Tensor) -> float:
    """The mean square distance from the rest."""
    return torch.stack([far(state, rest) for state in states]).mean().item()


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
    floors = [floor(settled(name, scale, full, **settings), rest) for scale in scales]
    order = math.log(floors[0] / floors[1]) / math.log(4)
    assert order == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("name", ON_BATCHES)
def test_the_floor_is_that_of_the_first_two_moments(name: str) -> None:
    hand, variables, settings = ON_BATCHES[name]
    for scale in (1.0, 0.25):
        rest, expected = moments(hand, variables, scale)
        states = settled(name, scale, 0, **settings)
        assert floor(states, rest) == pytest.approx(expected, rel=0.3)
        runs = torch.stack([both(state) for state in states]).mean(0)  # independent of each other
        errors = (runs.mean(0) - rest).abs() / (runs.std(0) / LANES**0.5)
        assert errors.max() < 4, errors
    small = [moments(hand, variables, scale)[1] for scale in (0.04, 0.01)]
    assert math.log(small[0] / small[1]) / math.log(4) == pytest.approx(1, abs=0.1)


def test_inner_steps_on_one_batch_leave_pbgd_and_bome_a_bias() -> None:
    """Their second params minimise the loss of the batch: no penalty and no step size mends that.

    On whole batches there is none but that of the penalty, and `bome` has none.
    """
    hand, variables, _ = ON_BATCHES["pbgd"]
    bias = [(moments(hand, variables, scale)[0] - BEST).norm().item() for scale in (1.0, 0.01)]
    assert bias == pytest.approx([bias[0]] * 2, rel=1e-6)
    on_all = (rest_and_rate(pbgd, "wh")[0] - BEST).norm()
    assert bias[0] > 2 * on_all
    found: dict[int, float] = {}
    for full in (0, 1):
        states = many("bome", 200, full, "inner", **DECREASING["bome"].settings)
        found[full] = slope_squared(states[-1])
    assert found[0] > 3 * found[1], found


def test_the_bias_of_meha_on_minibatches_is_in_proportion_to_the_steps() -> None:
    on_all = rest_and_rate(meha, "wuh")[0]
    bias = [(moments(meha_on, "wuh", scale)[0] - on_all).norm() for scale in (0.02, 0.01)]
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.05)


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


def growth(initial: float, exponent: float) -> Callable[[Tensor], Any]:
    power = power_growth(initial, exponent)
    return lambda step: power(step % OFFSET)


class Row(NamedTuple):
    """Settings, which batches are drawn, and the most that the error after k updates falls by.

    The error is the mean square of the gradient of the value function, or of the distance from a
    point where the loop rests beside the optimum; it is k to the power of ``order`` at most.
    """

    settings: dict[str, Any]
    noise: str
    order: float
    rest: Callable[[], Tensor] | None = None


HALF = {"inner_lr": decay(0.6, 0.5), "outer_lr": decay(0.3, 0.5)}
# The rates are those of the papers, with their step sizes. Those of PBGD, MEHA and BOME are for
# losses without noise, and SAMA and DARTS have none: for their rests (BOME: the optimum, with noise
# in the outer loss), the rate of stochastic approximation, that of the step sizes.
DECREASING: dict[str, Row] = {
    "soba": Row({"inner_lr": decay(0.6, 0.4), "outer_lr": decay(0.3, 0.6)}, "both", -2 / 5),
    "ma_soba": Row(
        HALF | {"outer_lr": decay(0.15, 0.5), "outer_weight": decay(1, 0.5)}, "both", -1 / 2
    ),
    "fsla": Row(HALF | {"outer_weight": decay(1, 0.5)}, "both", -1 / 2),
    "ttsa": Row(
        {"inner_lr": decay(0.9, 2 / 3), "outer_lr": decay(1.0, 1.0), "num_adjoint_steps": Q},
        "both",
        -2 / 3,
    ),
    "sustain": Row(
        {
            "inner_lr": decay(0.6, 1 / 3),
            "outer_lr": decay(0.3, 1 / 3),
            "inner_weight": decay(1, 2 / 3),
            "outer_weight": decay(1, 2 / 3),
            "num_adjoint_steps": Q,
        },
        "both",
        -2 / 3,
    ),
    "pzobo": Row(
        {"inner_lr": RHO, "outer_lr": decay(0.3, 0.5), "num_inner_steps": T},
        "outer",
        -1 / 2,
        rest_of_pzobo,
    ),
    "f2sa": Row({"outer_lr": GAMMA, "penalty": growth(1.0, 1 / 3)}, "none", -2 / 3),
    "f2sa with noise": Row(
        {
            "inner_lr": decay(0.6, 4 / 7),
            "outer_lr": decay(0.6, 5 / 7),
            "penalty": growth(1.0, 1 / 7),
        },
        "both",
        -2 / 7,
    ),
    "meha": Row(
        {"inner_lr": 0.3, "adjoint_lr": 0.6, "outer_lr": 0.5, "penalty": growth(1.0, 0.25)},
        "none",
        -1 / 2,
    ),
    "meha with noise": Row(
        {
            "inner_lr": decay(0.3, 0.5),
            "adjoint_lr": decay(0.6, 0.5),
            "outer_lr": decay(0.5, 0.5),
            "penalty": C,
            "proximal": PROXIMAL,
        },
        "both",
        -1 / 2,
        lambda: rest_and_rate(meha, "wuh")[0],
    ),
    "bome": Row(
        {"inner_lr": decay(0.6, 0.5), "outer_lr": decay(0.6, 0.5), "adjoint_lr": RHO},
        "none",
        -1 / 2,
    ),
    "bome with noise": Row(
        {"inner_lr": decay(0.6, 0.5), "outer_lr": decay(0.6, 0.5), "adjoint_lr": RHO},
        "outer",
        -1 / 2,
    ),
    "pbgd with noise": Row(
        {
            "inner_lr": decay(0.6, 0.5),
            "outer_lr": decay(0.15, 0.5),
            "adjoint_lr": RHO,
            "penalty": C,
            "num_inner_steps": T,
        },
        "both",
        -1 / 2,
        lambda: moments(pbgd_on, "wh", 1.0)[0],
    ),
    "sama with noise": Row(
        {"inner_optimizer": hf.optim.sgd(RHO), "outer_lr": decay(0.3, 0.5)},
        "outer",
        -1 / 2,
        lambda: rest_and_rate(sama, "wh")[0],
    ),
    "darts with noise": Row(
        HALF | {"unroll_lr": RHO}, "both", -1 / 2, lambda: moments(darts_on, "wh", 1e-6)[0]
    ),
}


@pytest.mark.parametrize("case", DECREASING)
def test_decreasing_steps_reach_the_rate_of_the_paper(case: str) -> None:
    settings, noise, order, rest = DECREASING[case]
    if "num_adjoint_steps" in settings:  # no bias that would end the descent
        settings = settings | {"adjoint_lr": 1.0}
    whole = "inner" if noise == "outer" else "both"
    states = many(case.split()[0], 400, noise != "both", whole, **settings)
    steps = [25, 50, 100, 200, 400]
    found = [states[step - 1] for step in steps]
    point = rest() if rest else None
    errors = [slope_squared(state) if point is None else far(state, point) for state in found]
    logs = [math.log(error) for error in errors]
    assert slope([math.log(step) for step in steps], logs) < order + 0.1, logs


def test_bsa_takes_as_many_calls_as_the_square_of_its_updates() -> None:
    """With ``k`` inner steps in update ``k``, and all step sizes like ``1 / k``.

    For a strongly convex value function the mean square distance falls like ``1 / k``, as the
    paper has it: like the calls to the power of -1/2.
    """
    settings: dict[str, Any] = {"inner_lr": decay(0.9, 1.0), "outer_lr": decay(1.0, 1.0)}
    settings |= {"num_adjoint_steps": Q, "adjoint_lr": 1.0}
    logs, calls, states, generator = [], [], None, torch.Generator().manual_seed(0)
    for count in (1, 2, 4, 8, 16, 32):  # inner steps, and updates with so many
        loop = make("bsa", num_inner_steps=count, **settings)
        if states is None:
            states = stack([loop.init(*start())] * LANES)
            states = states._replace(step=OFFSET * torch.arange(LANES))
        for _ in range(count):
            i = torch.randint(N, (LANES, count + Q + 1), generator=generator)
            j = torch.randint(M, (LANES,), generator=generator)
            states = vmap(loop.update)(states, quadratic().inner(i), quadratic().outer(j))
        calls.append((calls[-1] if calls else 0.0) + count * (count + Q + 2))
        logs.append(far(states, BEST).log().item())
    assert slope([math.log(each) for each in calls[2:]], logs[2:]) < -0.4, logs
