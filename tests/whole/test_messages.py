"""No message and no repr prints the entries of a tensor."""

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hyperfunc as hf
from hyperfunc._engine.shown import show

SECRET: Any = torch.tensor([1234.5, 1234.5])
HELD: Any = [SECRET, {"a": SECRET}]


def loss(w: Any, h: Any) -> Any:
    return (w * h).sum()


def project(w: Any, h: Any, lr: Any) -> Any:
    return w


CALLS: list[Callable[[], Any]] = [
    *(
        functools.partial(call, value)
        for value in (SECRET, HELD, SECRET.numpy())
        for call in (
            lambda v: hf.CG(maxiter=v),
            lambda v: hf.CG(rtol=v),
            lambda v: hf.CG(preconditioner=v),
            lambda v: hf.CG(negative_curvature=v),
            lambda v: hf.Reverse(checkpoint=v),
            lambda v: hf.Nystrom(rank=v),
            lambda v: hf.Blockwise(hf.CG(), blocks=v),
            lambda v: hf.StochasticAID(optimizer=v),
            lambda v: hf.StochasticAID(start=v),
            lambda v: hf.ErrorBound(contraction=v),
            lambda v: hf.hypergrad(v, loss),
            lambda v: hf.hypergrad(loss, v),
            lambda v: hf.hypergrad(loss, loss, inner_loss=v),
            lambda v: hf.hypergrad(loss, loss, method=v),
            lambda v: hf.hypergrad(loss, loss, inner_loss=loss, compile=v),
            lambda v: hf.minimize(v, hf.optim.sgd(), 3, init=loss),
            lambda v: hf.minimize(loss, v, 3, init=loss),
            lambda v: hf.minimize(loss, hf.optim.sgd(), v, init=loss),
            lambda v: hf.minimize(loss, hf.optim.sgd(), 3, init=v),
            lambda v: hf.minimize(loss, hf.optim.sgd(), 3, init=loss, inputs={"a": v}),
            lambda v: hf.optim.adam(betas=v),
            lambda v: hf.optim.adam(lr={"a": str(v)[:2], "b": None, "c": object()}),
            lambda v: hf.optim.clip_grad_norm(v, 1.0),
            lambda v: hf.optim.clip_grad_norm(hf.optim.sgd(), v),
            lambda v: hf.optim.sgd(nesterov=True, dampening=v),
            lambda v: hf.optim.sgd().update(SECRET, v, SECRET),
            lambda v: hf.optim.schedule(v),
            lambda v: hf.optim.piecewise([0.1, v], [v]),
            lambda v: hf.proximal(loss, weight=[v]),
            lambda v: hf.proximal_gradient_map(loss, v, 0.1),
            lambda v: hf.EquilibriumLayer(v),
            lambda v: hf.EquilibriumLayer(torch.nn.Linear(2, 2), throw=v),
            lambda v: hf.fixed_point_solvers.Picard(batch_dim=v),
            lambda v: hf.functional(v),
            lambda v: hf.functional(torch.nn.Linear(2, 2), buffers=v),
            lambda v: hf.task_map(loss, in_dims=v)(SECRET, SECRET),
            lambda v: hf.task_map(loss, randomness=v),
            lambda v: hf.checkpoint(v),
            lambda v: hf.from_numpy(v),
            lambda v: hf.diagnose(SECRET, SECRET, inner_loss=v),
            lambda v: hf.bilevel.soba(loss, loss, inner_lr=[v], outer_lr=0.1),
            lambda v: hf.bilevel.soba(loss, v, inner_lr=0.1, outer_lr=0.1),
        )
    ),
    lambda: hf.hypergrad(lambda h: {}, loss, inner_loss=loss)(SECRET),
    lambda: hf.hypergrad(lambda h: (h, str), loss, inner_loss=loss)(SECRET),
    lambda: hf.hypergrad(lambda h: h, lambda w, h: w, inner_loss=loss)(SECRET),
    lambda: hf.hypergrad(
        hf.minimize(loss, hf.optim.adam(SECRET), 1, init=loss), loss, method="reverse"
    )(SECRET, SECRET, x=SECRET),
    lambda: hf.hypergrad(loss, loss, inner_loss=loss)(HELD, iter(HELD)),
]


@pytest.mark.filterwarnings("ignore")
def test_no_message_prints_entries() -> None:
    raised = 0
    for call in CALLS:
        try:
            call()
        except Exception as error:
            message = str(error)
            raised += 1
            assert "1234" not in message, message
    assert raised > 0.9 * len(CALLS), raised


def test_no_repr_prints_entries() -> None:
    partial = functools.partial(loss, SECRET)
    steps = {"init": loss, "inputs": torch.stack([SECRET])}
    mapped = lambda w, h, batch: loss(w, h)  # noqa: E731
    for made in (
        hf.optim.clip_grad_norm(hf.optim.sgd(SECRET), SECRET[0]),
        hf.optim.per_step(SECRET),
        hf.optim.from_torch(torch.optim.NAdam, lr=SECRET[0]),
        hf.prox.l1(SECRET),
        hf.proximal(loss, SECRET[0], center=SECRET),
        hf.gradient_descent_map(loss, SECRET),
        hf.ErrorBound(contraction=SECRET[0] / 1e4),
        hf.minimize(mapped, hf.optim.adam(SECRET), 1, **steps),
        hf.hypergrad(hf.iterate(mapped, 1, **steps), loss, method="reverse"),
        hf.bilevel.soba(loss, loss, inner_lr=SECRET[0], outer_lr=0.1),
    ):
        assert "1234" not in repr(made), repr(made)
    assert show((SECRET,)) == "(<tensor of shape (2,) and dtype torch.float32>,)"
    assert show({"a": np.ones(3)}) == "{'a': <array of shape (3,) and dtype float64>}"
    assert show(partial) == "partial(...)"
    assert show(list(range(10_000))).endswith("...]")
    assert show("text") == "'text'"


SPACES = (hf, hf.optim, hf.prox, hf.bilevel, hf.distributed, hf.fixed_point_solvers)
PUBLIC = {
    f"{space.__name__}.{name}": value
    for space in SPACES
    for name, value in vars(space).items()
    if callable(value) and not name.startswith("_")
}
GIVEN: dict[str, Any] = {
    **{"params": SECRET, "hparams": SECRET, "tree": {"a": SECRET}, "module": torch.nn.ReLU()},
    **{"num_steps": 2, "size": 4, "batch_size": 2, "data": [SECRET], "lr": 0.1, "settings": {}},
    **{"optimizer": hf.optim.sgd(), "name": "name", "value": 0},
}
FOLDERS = {"hyperfunc.distributed.save_state", "hyperfunc.distributed.load_state"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_a_tensor_in_the_place_of_any_argument(name: str) -> None:
    function = PUBLIC[name]
    if isinstance(function, type) and issubclass(function, BaseException | tuple | hf.prox.Prox):
        return  # made by functions that check
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in named:
        if name in FOLDERS and parameter.name != "folder":
            continue  # it would be written
        if function is hf.RESULTS and parameter.name != "value":
            continue  # that makes another enum
        for value in (SECRET, SECRET[0], HELD, {"a": SECRET}, (1 * SECRET).int()):
            needed = [p.name for p in named if p.default is p.empty]
            keywords = {key: GIVEN.get(key, loss) for key in needed} | {parameter.name: value}
            positional = [keywords.pop(p.name) for p in named if p.kind == p.POSITIONAL_ONLY]
            try:
                function(*positional, **keywords)
            except Exception as error:
                message, made_by = str(error), traceback.extract_tb(error.__traceback__)[-1]
                told = parameter.name, show(value), message, made_by
                assert "1234" not in message, told
                raised = isinstance(error, TypeError | ValueError | RuntimeError)
                assert raised, told
                assert "hyperfunc" in made_by.filename or made_by.filename == __file__, told
