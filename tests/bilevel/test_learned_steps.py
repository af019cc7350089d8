"""Coefficients of steps that are functions of hparams: learned, or told that they are not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import hyperfunc as hf
from tests.bilevel.loops import LOOPS, settings_of
from tests.cells import slow_but
from tests.problems import stack

X, Y = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]], dtype=torch.float64)
START = {"w": torch.tensor([0.5, 1.0, -1.5], dtype=torch.float64)}
HPARAMS = {key: torch.tensor(x).double() for key, x in (("reg", 0.7), ("lr", 0.2), ("wd", 0.3))}
Fn = Callable[[Any], Any]


def inner_loss(params: Any, hparams: Any, x: Tensor) -> Tensor:
    w = params["w"]
    return ((w - x) ** 4).sum() / 4 + hparams["reg"] * (w**2).sum() / 2


def outer_loss(params: Any, hparams: Any, y: Tensor) -> Tensor:
    return ((params["w"] - y) ** 2).sum() / 2 + 0.1 * hparams["reg"] ** 2


def lr(hparams: Any) -> Tensor:
    return hparams["lr"]


SCHEDULE = hf.optim.schedule(lambda hparams, step: lr(hparams) / (1 + step))
SGD = hf.optim.sgd(lr, weight_decay=lambda hparams: hparams["wd"])
CLIPPED = hf.optim.clip_grad_norm(hf.optim.sgd(0.2), lr)
ADAM = hf.optim.adam(lr, eps=lambda hparams: hparams["wd"])
GROUPED = hf.optim.grouped({"w": hf.optim.sgd(lr)})
OWN = hf.optim.Optimizer(
    lambda params: (),
    lambda grads, state, params, hparams: (
        {"w": params["w"] - hparams["lr"] * grads["w"].sign()},
        state,
    ),
)


def make(name: str, **steps: Any) -> hf.bilevel.Loop:
    settings = settings_of(name)
    stems = {each.removesuffix("_lr").removesuffix("_optimizer") for each in steps}
    for key in [key for key in settings if key in steps or key.rpartition("_")[0] in stems]:
        del settings[key]
    return getattr(hf.bilevel, name)(inner_loss, outer_loss, **settings, **steps)


def direction(loop: hf.bilevel.Loop, width: int | None = None) -> Any:
    """That of hparams; mapped over two tasks as well."""
    x = X if width is None else X.expand(width, 3)
    state = loop.init(START, HPARAMS)
    both = vmap(lambda state: loop.update(state, (x,), (Y,)))(stack([state] * 2)).hparams
    new = loop.update(state, (x,), (Y,)).hparams
    torch.testing.assert_close(both, stack([new] * 2), rtol=1e-7, atol=1e-9)
    return {key: (HPARAMS[key] - value) / 0.1 for key, value in new.items()}


def unrolled(step: Callable[[Any, Any], Any]) -> Any:
    """The derivative of the outer loss after a step from a gradient that is held fixed, or not."""
    return grad(lambda hparams: outer_loss(step(START, hparams), hparams, Y))(HPARAMS)


@pytest.mark.parametrize("optimizer", [SGD, CLIPPED, ADAM, GROUPED, OWN])
def test_sama_learns_all_that_the_inner_step_depends_on(optimizer: hf.optim.Optimizer) -> None:
    g = grad(inner_loss)(START, HPARAMS, X)
    found = direction(make("sama", inner_optimizer=optimizer))
    expected = unrolled(lambda w, h: optimizer.update(g, optimizer.init(w), w, h)[0])
    for key in ("lr", "wd"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-12)
    assert expected["lr"].abs() > 1e-4


def test_sama_with_a_schedule_is_adam_with_it() -> None:
    adam = make("sama", inner_optimizer=hf.optim.adam(SCHEDULE))
    found, expected = direction(make("sama", inner_lr=SCHEDULE)), direction(adam)
    torch.testing.assert_close(found, expected)
    assert found["lr"].abs() > 1e-2


def test_darts_learns_the_rate_of_the_unrolled_step() -> None:
    """All of its direction is the derivative of the unrolled step."""

    def step(params: Any, hparams: Any) -> Any:
        return {"w": params["w"] - lr(hparams) * grad(inner_loss)(params, hparams, X)["w"]}

    expected = unrolled(step)
    for steps in ({"unroll_lr": SCHEDULE}, {"inner_lr": SCHEDULE, "unroll_lr": None}):
        found = direction(make("darts", **steps))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert expected["lr"].abs() > 0.1


def test_pzobo_learns_all_that_the_inner_steps_depend_on() -> None:
    """Up to the noise of what it draws."""

    def step(params: Any, hparams: Any) -> Any:
        g = grad(inner_loss)(params, hparams, X)
        return SGD.update(g, SGD.init(params), params, hparams)[0]

    expected = unrolled(step)
    found = direction(make("pzobo", inner_optimizer=SGD, num_directions=300, smoothing=1e-4), 1)
    for key, value in expected.items():
        assert (found[key] - value).abs() < 0.3 * max(map(abs, expected.values())), key


UNSEEN = [name for name in LOOPS if name not in ("truncated", "sama", "pzobo")]


@pytest.mark.parametrize("name", slow_but("soba", "darts", of=UNSEEN))
def test_steps_that_the_direction_does_not_see_are_told_of(name: str) -> None:
    """Once for each, by name; not where the hparams are detached, nor of constants."""
    given: list[dict[str, Any]] = [
        {"inner_optimizer": hf.optim.sgd(lr)},
        {"inner_optimizer": CLIPPED},
        {"inner_optimizer": OWN},
    ]
    given += [{"inner_lr": SCHEDULE}]
    if LOOPS[name][2] in ("steps", "params", "restarted"):
        given += [{"adjoint_optimizer": hf.optim.sgd(lr)}]
    if LOOPS[name][2] != "none":
        given += [{"adjoint_lr": SCHEDULE}]
    given += [{key: SCHEDULE} for key in ("outer_weight", "inner_weight") if key in LOOPS[name][0]]
    if name in ("f2sa", "pbgd", "meha"):
        given += [{"penalty": SCHEDULE}]
    for steps in given:
        [key] = steps
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(name, **steps).init(START, HPARAMS)
        [warning] = caught
        assert str(warning.message).startswith(f"{name}: {key} depends on hparams['lr'], but the ")
        assert warning.filename == __file__
    make(name, inner_optimizer=hf.optim.sgd(lambda h: lr(h).detach())).init(START, HPARAMS)
