"""Weight decay of an optimiser where the stated loss does not have it: told of, never silent."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import hyperfunc as hf
from hyperfunc import optim
from tests.bilevel.loops import LOOPS, make_loop, variables
from tests.bilevel.test_bilevel import inner_loss, outer_loss, start
from tests.cells import slow_but

F64 = torch.float64
DECAY = torch.tensor(0.5, dtype=F64)
H = torch.tensor(0.5, dtype=F64).log()
ZEROS = {"w": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
CURVATURE = torch.tensor([1.0, 2.0], dtype=F64)

# Optimisers of a decay: a number, a tensor, or a function of hparams.
KINDS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda d: optim.sgd(0.1, weight_decay=d),
    "adam": lambda d: optim.adam(0.1, weight_decay=d),
    "adamw": lambda d: optim.adamw(0.1, weight_decay=d),
    "rmsprop": lambda d: optim.rmsprop(0.1, weight_decay=d),
    "adagrad": lambda d: optim.adagrad(0.1, weight_decay=d),
    "native": lambda d: optim.from_torch(torch.optim.AdamW, lr=0.1, weight_decay=d),
    "torch": lambda d: optim.from_torch(torch.optim.NAdam, lr=0.1, weight_decay=d),
    "groups": lambda d: optim.from_torch(
        torch.optim.SGD, groups=[{"params": "w", "weight_decay": d}, {"params": ""}], lr=0.1
    ),
    "grouped": lambda d: optim.grouped({"b": optim.sgd(0.1), "": optim.adamw(0.1, weight_decay=d)}),
    "clipped": lambda d: optim.clip_grad_norm(optim.sgd(0.1, weight_decay=d), 9.0),
    "by_name": lambda d: optim.sgd(
        0.1, weight_decay=optim.by_name(lambda name: d if name == "w" else 0.0)
    ),
    "by_module": lambda d: optim.sgd(0.1, weight_decay={"w": d, "": 0.0}),
    "tree": lambda d: optim.sgd(
        0.1, weight_decay=lambda h: {"w": d(h) if callable(d) else d, "b": 0.0}
    ),
    "schedule": lambda d: optim.sgd(0.1, weight_decay=optim.cosine(d, 50)),
}


def loss(params: Any, h: Tensor) -> Tensor:
    return (CURVATURE * (params["w"] - 1) ** 2).sum() / 2 + (params["b"] - 1) ** 2 + 0 * h


def moved(params: Any, h: Tensor) -> Tensor:
    return loss(params, h) - h * params["b"]


def outer(params: Any, h: Tensor) -> Tensor:
    return (params["w"] ** 2).sum() + params["b"]


def solver(optimizer: Any, inner: Any = moved, num_steps: int = 2, **keywords: Any) -> Any:
    return hf.minimize(inner, optimizer, num_steps, init=lambda h: ZEROS, **keywords)


@pytest.mark.parametrize("kind", slow_but("adamw", "grouped", "by_name", of=KINDS))
def test_implicit_methods_tell_of_weight_decay(kind: str) -> None:
    make, stated = KINDS[kind], lambda params, h: moved(params, h)
    for constant in (0.5, DECAY):
        with pytest.warns(UserWarning, match=r"has a weight decay.*hf.proximal"):
            hf.hypergrad(solver(make(constant)), outer)(H)
    with pytest.raises(ValueError, match=r"weight decay .* function of hparams.*hf.proximal"):
        hf.hypergrad(solver(make(lambda h: h.exp())), outer)(H)
    if kind != "schedule":
        hf.hypergrad(solver(make(0.0)), outer)(H)  # warnings are errors here
    with pytest.warns(UserWarning, match="unless inner_loss= holds that decay"):
        hf.hypergrad(solver(make(lambda h: h.exp())), outer, inner_loss=stated)(H)


def test_where_it_is_told_and_where_all_is_right() -> None:
    decayed = solver(optim.sgd(0.1, weight_decay=lambda h: h.exp()))
    h = H.clone().requires_grad_()
    for call in (
        lambda: vmap(hf.hypergrad(decayed, outer))(torch.stack([H, H])),
        lambda: grad(lambda h: outer(hf.implicit_diff(decayed)(h), h))(H),
        lambda: hf.implicit_diff(decayed)(h),
        lambda: hf.hypergrad(decayed, outer, method="auto")(H),
        lambda: hf.hypergrad(decayed, outer, inner_loss=moved, method="one_step")(H),
    ):
        with pytest.raises(ValueError, match="weight decay"):
            call()
    hf.hypergrad(decayed, outer, optimality=grad(loss), throw=False)(H)
    hf.hypergrad(solver(optim.adamw(0.1, weight_decay=lambda h: 0.0)), outer)(H)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            hf.hypergrad(solver(optim.adamw(0.1)), outer)(H)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_what_the_error_says_to_type() -> None:
    """The decay in the loss, and the steps of the optimiser that has it: one closed form."""
    decay = lambda h: h.exp()  # noqa: E731
    in_loss = solver(optim.sgd(0.4), hf.proximal(loss, weight=decay, center=ZEROS), 60)
    in_steps = solver(optim.sgd(0.4, weight_decay=decay), loss, 60)
    c, d = CURVATURE, H.exp()
    expected = d * (-2 * c**2 / (c + d) ** 3).sum() - d * 2 / (2 + d) ** 2
    for found in (hf.hypergrad(in_loss, outer), hf.hypergrad(in_steps, outer, method="reverse")):
        torch.testing.assert_close(found(H), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", slow_but("soba", "stocbio", "f2sa", "sama", of=LOOPS))
def test_loops_tell_of_weight_decay(name: str) -> None:
    params, hparams = start()
    losses = inner_loss, outer_loss
    follows_steps = name in ("truncated", "sama", "pzobo")  # and learns their decay
    for key in set(variables(name)) - ({"outer", "inner"} if follows_steps else {"outer"}):
        of_hparams = optim.adamw(0.1, weight_decay=lambda h: h[1].sum())
        with pytest.raises(ValueError, match=f"{name}: the weight decay of {key}_optimizer"):
            make_loop(name, losses, **{key: of_hparams}).init(params, hparams)
        decayed = make_loop(name, losses, **{key: optim.adamw(0.1)})
        if LOOPS[name][2] == "none":  # its steps are followed themselves
            decayed.init(params, hparams)
            continue
        with pytest.warns(UserWarning, match=f"{name}: the weight decay of {key}_optimizer"):
            decayed.init(params, hparams)
        make_loop(name, losses, **{key: optim.adam(0.1)}).init(params, hparams)


def test_the_adjoint_of_stochastic_aid() -> None:
    for optimizer in (optim.adamw(0.1), lambda tensors: torch.optim.AdamW(tensors, lr=0.1)):
        method = hf.StochasticAID(2, optimizer)
        with pytest.warns(UserWarning, match="StochasticAID: .* shifts the adjoint"):
            hf.hypergrad(solver(optim.sgd(0.1)), outer, method=method)(H)
