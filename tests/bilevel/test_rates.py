"""The loops at the rates that their papers state, on quadratics with closed forms.

Without noise an update is an affine map, written down here without the library: its fixed point is
where a loop rests, its spectral radius the rate.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd

import hyperfunc as hf
from hyperfunc.bilevel import Loop
from tests.bilevel.test_bilevel import (
    DIM,
    HDIM,
    inner_loss,
    outer_loss,
    quadratic,
    start,
)
from tests.problems import ravel

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


def truncated(z: Any, q: int = T) -> Any:
    """Its steps give the terms of the series, and the hparams their sum."""
    w, h = z
    w = descended(w, h, q)
    return w, h - GAMMA * d_h(series(w, q - 1), h)


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
    "truncated": T,
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
    "truncated": (truncated, "wh", {"num_inner_steps": T}, False),
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
    """Like ``(1 - lr mu) ** Q``, with ``mu`` the least curvature.

    Lemma 3 of StocBiO; and as Shaban et al. have it for the steps of `truncated`.
    """
    counts = list(range(10, 30))
    for hand, variables in ((stocbio, "wh"), (mrbo, "wh"), (vrbo, "wuh"), (truncated, "wh")):
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
