"""Windows of inner steps, differentiated exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import hyperfunc as hf
from tests.bilevel.test_learned_steps import (
    ADAM,
    CLIPPED,
    GROUPED,
    HPARAMS,
    OWN,
    SCHEDULE,
    SGD,
    START,
    inner_loss,
    lr,
    outer_loss,
)
from tests.problems import stack

T = 3
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": hf.optim.sgd(lr, momentum=lambda hparams: hparams["wd"]),
    "adam": ADAM,
    "adamw": hf.optim.adamw(lr, weight_decay=lambda hparams: hparams["wd"]),
    "scheduled": hf.optim.adam(SCHEDULE),
    "clipped": CLIPPED,
    "grouped": GROUPED,
    "one's own": OWN,
}


def batches(seed: int) -> tuple[tuple[Tensor], tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T + 1, 3, dtype=torch.float64, generator=generator)
    return (x[:T],), (x[T],)


@pytest.mark.parametrize("products", ["reverse", "finite_difference"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_window_is_the_derivative_of_its_steps(name: str, products: Any) -> None:
    """By torch alone, from where the optimiser has been for a while; and for many tasks."""
    optimizer = OPTIMIZERS[name]
    loop = hf.bilevel.truncated(
        inner_loss,
        outer_loss,
        num_inner_steps=T,
        inner_optimizer=optimizer,
        outer_lr=0.1,
        products=products,
    )
    w, memory, h = START, optimizer.init(START), HPARAMS
    state = loop.init(w, h)
    for seed in range(3):
        (x,), (y,) = batches(seed)

        def end(h: Any, w: Any = w, memory: Any = memory, x: Tensor = x) -> Any:
            for row in x:
                w, memory = optimizer.update(grad(inner_loss)(w, h, row), memory, w, h)
            return w, memory

        direction = grad(lambda h, end=end, y=y: outer_loss(end(h)[0], h, y))(h)
        tasks = stack([state, state]), *stack([batches(seed), batches(9)])
        mapped = vmap(loop.update)(*tasks)
        state = loop.update(state, (x,), (y,))
        (w, memory), h = end(h), {key: h[key] - 0.1 * d for key, d in direction.items()}
        tol = 1e-11 if products == "reverse" else 1e-6
        for got, expected in ((state.params, w), (state.hparams, h)):
            torch.testing.assert_close(got, expected, rtol=tol, atol=tol)
        first = torch.utils._pytree.tree_map(lambda leaf: leaf[0], mapped.hparams)
        torch.testing.assert_close(first, state.hparams, rtol=tol, atol=tol)
        assert direction["lr"].abs() > 1e-4


def test_windows_of_plain_steps_are_those_of_minimize() -> None:
    """Of the whole run, if the window is as long; a schedule counts the updates."""
    loop = hf.bilevel.truncated(
        inner_loss, outer_loss, num_inner_steps=T, inner_lr=SCHEDULE, outer_lr=1.0
    )
    inner_batches, outer_batch = batches(0)
    state = loop.update(loop.init(START, HPARAMS), inner_batches, outer_batch)

    def inner(w: Any, h: Any, y: Tensor, x: Tensor) -> Tensor:
        return inner_loss(w, h, x)

    solver = hf.minimize(
        inner, hf.optim.sgd(lr), T, init=lambda h, y: START, inputs=inner_batches[0]
    )
    found = hf.hypergrad(solver, outer_loss, method="reverse")(HPARAMS, *outer_batch)
    expected = {key: HPARAMS[key] - found[key] for key in HPARAMS}
    torch.testing.assert_close(state.hparams, expected, rtol=1e-12, atol=1e-12)
    assert found["lr"].abs() > 1e-2


def test_bad_batches_of_windows() -> None:
    loop = hf.bilevel.truncated(
        inner_loss, outer_loss, num_inner_steps=T, inner_lr=0.1, outer_lr=0.1
    )
    (x,), outer_batch = batches(0)
    text = "leading dimension of size num_inner_steps = 3"
    with pytest.raises(ValueError, match=text):
        loop.update(loop.init(START, HPARAMS), (x[:2],), outer_batch)
    with pytest.raises(ValueError, match="num_inner_steps is 0; expected an integer >= 1"):
        hf.bilevel.truncated(inner_loss, outer_loss, num_inner_steps=0, inner_lr=0.1, outer_lr=0.1)
