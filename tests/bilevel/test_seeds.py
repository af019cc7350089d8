"""What the loops that draw do with their seeds."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State
from hyperfunc.bilevel._random import uniform
from tests.bilevel.test_bilevel import Q, T, inner_loss, outer_loss, quadratic, start
from tests.problems import ravel, stack

DRAWING: dict[str, dict[str, Any]] = {
    "bsa": {"num_inner_steps": T, "num_adjoint_steps": Q},
    "ttsa": {"num_adjoint_steps": Q},
    "sustain": {"num_adjoint_steps": Q},
    "pzobo": {"num_inner_steps": T},
}
# what the mean of a drawn direction is that of
MEANS = {"bsa": "stocbio", "ttsa": "stocbio", "sustain": "mrbo"}
WIDTHS = {"bsa": T + Q + 1, "ttsa": Q + 2, "sustain": Q + 2, "pzobo": T}
SEEDS = (0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40)


def make(name: str, seed: int, **settings: Any) -> Loop:
    settings = {"inner_lr": 0.4, "outer_lr": 0.1, **DRAWING[name], **settings}
    return getattr(hf.bilevel, name)(inner_loss, outer_loss, seed=seed, **settings)


def inputs(name: str) -> tuple[Any, Any]:
    """Batches that hold everything, so that draws are all that is random."""
    inner, outer = quadratic().full()
    return tuple(leaf.expand(WIDTHS[name], *leaf.shape) for leaf in inner), outer


def run(loop: Loop, name: str, num_steps: int, state: State | None = None) -> State:
    state = loop.init(*start()) if state is None else state
    for _ in range(num_steps):
        state = loop.update(state, *inputs(name))
    return state


def reached(state: State) -> Tensor:
    return ravel(state.hparams)


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_determines_what_is_drawn(name: str) -> None:
    """Every two seeds differ, also those that are alike in their last 32 bits."""
    ends = [reached(run(make(name, seed), name, 8)) for seed in SEEDS]
    again = reached(run(make(name, SEEDS[3]), name, 8))
    assert again.equal(ends[3])
    apart = torch.cdist(torch.stack(ends), torch.stack(ends)) + torch.eye(len(SEEDS))
    assert apart.min() > 1e-3


@pytest.mark.parametrize("name", DRAWING)
def test_a_run_that_is_resumed_draws_what_it_would_have_drawn(name: str) -> None:
    whole = run(make(name, 3), name, 6)
    buffer = io.BytesIO()
    torch.save(run(make(name, 3), name, 4), buffer)
    buffer.seek(0)
    rest = run(make(name, 3), name, 2, torch.load(buffer, weights_only=True))
    assert reached(rest).equal(reached(whole))
    other = run(make(name, 4), name, 2, run(make(name, 3), name, 4))
    assert not reached(other).allclose(reached(whole))


@pytest.mark.parametrize("name", DRAWING)
def test_tasks_draw_the_same_at_the_same_step(name: str) -> None:
    """As documented; those at other steps draw other numbers."""
    loop = make(name, 3)
    states = stack([loop.init(*start())] * 3)
    together = states
    for _ in range(4):
        together = vmap(loop.update, (0, None, None))(together, *inputs(name))
    ends = torch.cat([leaf.flatten(1) for leaf in together.hparams], 1)
    torch.testing.assert_close(ends, reached(run(loop, name, 4)).expand(3, -1))
    apart = states._replace(step=1000 * torch.arange(3))
    for _ in range(4):
        apart = vmap(loop.update, (0, None, None))(apart, *inputs(name))
    ends = torch.cat([leaf.flatten(1) for leaf in apart.hparams], 1)
    assert (torch.cdist(ends, ends) + torch.eye(3)).min() > 1e-4


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5])
@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_has_the_right_mean(name: str, seed: int) -> None:
    """Of the steps from one state at 600 steps, in standard errors."""
    weights: dict[str, Any] = {"inner_weight": 1.0, "outer_weight": 1.0}
    more = weights if name == "sustain" else {}
    loop, state = make(name, seed, **more), run(make(name, 1, **more), name, 2)
    count = 600
    states = stack([state] * count)._replace(step=1 + torch.arange(count))
    new = vmap(loop.update, (0, None, None))(states, *inputs(name))
    ends = torch.cat([leaf.flatten(1) for leaf in new.hparams], 1)
    if name == "pzobo":
        h = reached(state).requires_grad_()
        (A, B, c), (t, s) = quadratic().full()
        w = ravel(state.params)
        for _ in range(T):
            w = w - 0.4 * (A @ w - B @ h - c)
        loss = 0.5 * ((w - t) ** 2).sum() + 0.25 * ((h - s) ** 2).sum()
        expected = (h - 0.1 * torch.autograd.grad(loss, h)[0]).detach()
    else:
        settings = {"inner_lr": 0.4, "outer_lr": 0.1, "num_adjoint_steps": Q, **more}
        if name != "sustain":
            settings["num_inner_steps"] = DRAWING[name].get("num_inner_steps", 1)
        whole = getattr(hf.bilevel, MEANS[name])(inner_loss, outer_loss, **settings)
        fresh = whole.init(state.params, state.hparams)
        expected = reached(whole.update(fresh, *inputs(name)))
    errors = (ends.mean(0) - expected).abs() / (ends.std(0) / count**0.5)
    assert errors.max() < 4, errors


def test_seeds_and_steps_draw_independently() -> None:
    """Numbers of neighbouring seeds at one step, and of one seed at neighbouring steps."""
    for pairs in (
        [(seed, 5) for seed in range(2000)],
        [(5, step) for step in range(2000)],
        [(k, k) for k in range(2000)],
        [(k << 32, 0) for k in range(2000)],
    ):
        drawn = torch.stack([uniform(seed, torch.tensor(step), 2) for seed, step in pairs])
        centred = (drawn - 0.5) * 12**0.5
        bound = 4 / len(pairs) ** 0.5
        assert centred.mean(0).abs().max() < bound
        assert (centred[:, 0] * centred[:, 1]).mean().abs() < bound
        assert (centred[1:] * centred[:-1]).mean(0).abs().max() < bound
