"""Optimisers in the place of step sizes, for each variable of every loop."""

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
from tests.bilevel.loops import LOOPS, PLACES, RATES, make_loop, variables
from tests.bilevel.test_bilevel import (
    Quadratic,
    assert_close,
    draw,
    inner_loss,
    outer_loss,
    quadratic,
    random_state,
    start,
    vectors,
)
from tests.cells import slow_but
from tests.problems import stack

WIDTH = 8


def make(name: str, losses: Any = (inner_loss, outer_loss), **optimizers: Any) -> Loop:
    return make_loop(name, losses, **optimizers)


def inputs(name: str, problem: Quadratic, i: Tensor, j: Tensor) -> Any:
    width = LOOPS[name][1]
    pair = problem.inner(i[0] if width is None else i[:width]), problem.outer(j)
    return (*pair, i[0], j) if name == "saba" else pair


def some_state(name: str, loop: Loop) -> State:
    """Anywhere, but with optimisers that begin."""
    return random_state(make(name))._replace(optimizers=loop.init(*start()).optimizers)


def adam() -> hf.optim.Optimizer:
    """With a schedule of both, and a clip that bites."""
    rate = hf.optim.schedule(lambda hparams, step: 0.1 / (1 + step.double()))
    limit = hf.optim.schedule(lambda hparams, step: 0.5 + step.double())
    return hf.optim.clip_grad_norm(hf.optim.adam(rate, betas=(0.8, 0.9)), limit)


class AdamByHand:
    """The same steps, on vectors."""

    def __init__(self) -> None:
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        g = g * min(1.0, (0.5 + self.t) / (g.norm().item() + 1e-6))
        self.m, self.v = 0.8 * self.m + 0.2 * g, 0.9 * self.v + 0.1 * g**2
        self.t += 1
        m, v = self.m / (1 - 0.8**self.t), self.v / (1 - 0.9**self.t)
        return x - 0.1 / self.t * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("name", slow_but("soba", of=LOOPS))
def test_optimizers_of_every_loop(name: str) -> None:
    """Plain steps; Adam by hand on what a plain step tells of the direction; resumed; mapped."""
    keys, problem, plan = variables(name), quadratic(), draw(3, width=WIDTH)
    plain, all_adam = make(name), make(name, **{key: adam() for key in keys})

    sgd = make(name, **{key: hf.optim.sgd(RATES[key]) for key in keys})
    ends = []
    for loop in (plain, sgd):
        state = some_state(name, loop)
        for i, j in plan:
            state = loop.update(state, *inputs(name, problem, i, j))
        ends.append(state._replace(optimizers={}))
    assert_close(ends[1], ends[0], 1e-15)

    for key in keys:
        loop, by_hand = make(name, **{key: adam()}), AdamByHand()
        restarted = key == "adjoint" and LOOPS[name][2] == "restarted"
        state, at = some_state(name, loop), PLACES["inner" if restarted else key]
        for i, j in plan:
            before, batches = vectors(state)[at], inputs(name, problem, i, j)
            without = make(name).init(*start()).optimizers
            told = vectors(plain.update(state._replace(optimizers=without), *batches))
            direction = (before - told[PLACES[key]]) / RATES[key]
            state = loop.update(state, *batches)
            by_hand = AdamByHand() if restarted else by_hand
            assert_close(vectors(state)[PLACES[key]], by_hand(before, direction), 1e-11)
        kept = {"inner"} if name == "sama" else set()
        assert set(state.optimizers) == kept | (set() if restarted else {key})

    tasks = [quadratic(seed) for seed in range(2)]
    alone = [all_adam.init(*start())] * 2
    together = vmap(all_adam.init)(*stack([start()] * 2))
    for step, (i, j) in enumerate(plan):
        rows = [inputs(name, task, i, j) for task in tasks]
        alone = [all_adam.update(*pair[:1], *pair[1]) for pair in zip(alone, rows, strict=True)]
        together = vmap(all_adam.update)(together, *stack(rows))
        by_differences = name in ("sama", "darts")
        assert_close(together, stack(alone), 1e-9 if by_differences else 1e-12)
        if step == 0:
            buffer = io.BytesIO()
            torch.save(alone[0], buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for i, j in plan[1:]:
        loaded = all_adam.update(loaded, *inputs(name, tasks[0], i, j))
    assert isinstance(loaded, State)
    assert_close(loaded, alone[0], 0)


@pytest.mark.filterwarnings("ignore:.*weight decay")
@pytest.mark.parametrize("name", slow_but("soba", of=LOOPS))
def test_params_that_no_loss_uses_stay_as_they_are(name: str) -> None:
    """Under weight decay, with exact products and differences, alone and mapped."""
    decayed = hf.optim.adamw(0.1, weight_decay=0.5)

    def inner(params: Any, *rest: Any) -> Tensor:
        return inner_loss(params["used"], *rest)

    def outer(params: Any, *rest: Any) -> Tensor:
        return outer_loss(params["used"], *rest)

    w, h = start()
    params = {"used": w, "free": torch.ones(2, dtype=torch.float64)}
    loop = make(name, (inner, outer), **{key: decayed for key in variables(name)})
    state, mapped = loop.init(params, h), vmap(loop.init)(*stack([(params, h)] * 2))
    for i, j in draw(2, width=WIDTH):
        batches = inputs(name, quadratic(), i, j)
        state = loop.update(state, *batches)
        mapped = vmap(loop.update)(mapped, *stack([batches] * 2))
    assert_close(state.params["free"], params["free"], 0)
    assert not torch.equal(state.params["used"]["a"][0], w["a"][0])
    assert_close(mapped, stack([state] * 2))


def test_optimizers_by_name_and_of_ones_own() -> None:
    """Coefficients and optimisers by leaf; coefficients that see hparams; a result of no shape."""
    problem, (i, j) = quadratic(), draw(1)[0]
    batches = problem.inner(i[0]), problem.outer(j)
    state = some_state("soba", make("soba"))
    (w, _, h), plain = vectors(state), make("soba").update(state, *batches)
    d = (w - vectors(plain)[0]) / 0.4
    for optimizer in (
        hf.optim.sgd({"a": 0.2, "b": lambda hparams: hparams[0].detach().sum()}),
        hf.optim.grouped(
            {"a": hf.optim.sgd(0.2), "b": hf.optim.sgd(lambda hparams: hparams[0].detach().sum())}
        ),
    ):
        loop = make("soba", inner=optimizer)
        new = loop.update(state._replace(optimizers=loop.init(*start()).optimizers), *batches)
        assert_close(vectors(new)[0], w - torch.cat([d[:3] * 0.2, d[3:] * h[0]]))
    loop = make("soba", inner=hf.optim.Optimizer(lambda params: (), lambda *a: (start()[1], ())))
    with pytest.raises(ValueError, match="soba: the result of inner_optimizer has another structu"):
        loop.update(loop.init(*start()), *batches)


losses = (inner_loss, outer_loss)
sgd = hf.optim.sgd(0.1)
MISUSE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "both": (
        lambda: hf.bilevel.soba(*losses, inner_lr=0.1, inner_optimizer=sgd, outer_lr=0.1),
        TypeError,
        r"soba: got inner_lr and inner_optimizer; expected one of them",
    ),
    "neither": (
        lambda: hf.bilevel.bsa(*losses, inner_lr=0.1),
        TypeError,
        r"bsa: no step for the hparams was given; expected outer_lr=, a step size, or "
        r"outer_optimizer=hf\.optim\.adam",
    ),
    "none for the adjoint": (
        lambda: hf.bilevel.soba(*losses, inner_optimizer=sgd, outer_lr=0.1),
        TypeError,
        r"soba: no step for the adjoint was given; expected adjoint_lr=, .*_optimizer=.*eig_max",
    ),
    "none for the second params of meha": (
        lambda: hf.bilevel.meha(*losses, inner_lr=0.1, outer_lr=0.1),
        TypeError,
        r"meha: no step for the adjoint, here second params, was given",
    ),
    "none for the unrolled step": (
        lambda: hf.bilevel.darts(*losses, inner_optimizer=sgd, outer_lr=0.1),
        TypeError,
        r"darts: got inner_optimizer without unroll_lr; expected the step size",
    ),
    "an optimizer as a step size": (
        lambda: hf.bilevel.soba(*losses, inner_lr=sgd, outer_lr=0.1),  # type: ignore[arg-type]
        TypeError,
        r"soba: inner_lr is .*; expected a number .*\. An optimizer goes to inner_optimizer",
    ),
    "an optimizer of torch": (
        lambda: hf.bilevel.soba(*losses, inner_lr=0.1, outer_optimizer=torch.optim.Adam),  # type: ignore[arg-type]
        TypeError,
        r"soba: outer_optimizer: got the class torch\.optim\.Adam; expected an hf\.optim",
    ),
    "an unknown keyword": (
        lambda: hf.bilevel.soba(*losses, inner_lr=0.1, outer_rate=0.1),  # type: ignore[call-arg]
        TypeError,
        r"soba\(\) got an unexpected keyword argument 'outer_rate'",
    ),
    "state of the same loop without": (
        lambda: make("soba", inner=sgd).update(make("soba").init(*start()), *quadratic().full()),
        ValueError,
        r"soba: state\.optimizers has those of \[\]; expected those of \['inner'\]\. Make",
    ),
    **{
        f"an optimizer in the series of {name}": (
            lambda name=name: make(name, adjoint=sgd),
            TypeError,
            rf"{name}: got adjoint_optimizer, but its adjoint is a Neumann series",
        )
        for name, (_, _, adjoint) in LOOPS.items()
        if adjoint == "series"
    },
    **{
        f"a step on the adjoint of {name}": (
            lambda name=name: make(name, adjoint=sgd),
            TypeError,
            rf"{name}: got a step for the adjoint, but takes none",
        )
        for name, (_, _, adjoint) in LOOPS.items()
        if adjoint == "none"
    },
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()


def test_states_are_trees() -> None:
    """The states of optimisers are where they are said to be, in one tree with all else."""
    loop = make("soba", inner=adam(), adjoint=hf.optim.sgd(0.1, momentum=0.9))
    state = loop.init(*start())
    assert sorted(state.optimizers) == ["adjoint", "inner"]
    leaves = optree.tree_leaves(state, namespace="hyperfunc")
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert len({leaf.data_ptr() for leaf in leaves if leaf.numel()}) == len(leaves)
