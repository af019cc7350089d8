"""Hypergradients of published models against central differences, in float64.

What is compared is the slope of the outer value in one direction of hparams, for each task: by the
library along each route, and by differences of a loop that is written in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from tests import published_models as models
from tests.cells import each_cell
from tests.problems import stack
from tests.published_models import Adaptation, Tree, gradient

pytestmark = [
    pytest.mark.slow,
    # torch maps histc, which counts tokens, by a loop, and says so
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # in peft
]

D = torch.float64
TASKS = 2
ROUTES: dict[str, Callable[..., Any]] = {
    "one by one": lambda fn, dims: hf.task_map(fn, dims, chunk_size=1),
    "vmap": vmap,
    "task_map": lambda fn, dims: hf.task_map(fn, dims, chunk_size=2),
}


@pytest.fixture(scope="module", autouse=True)
def _needs_the_extra() -> None:
    reason = "needs the extra 'models': pip install -e '.[models]', as `make test-all` does"
    pytest.importorskip("transformers", reason=reason)
    pytest.importorskip("peft", reason=reason)


class Setting:
    """A model with its tasks, start and pull, a direction of hparams, and the loop in torch."""

    def __init__(self, model: models.Model, pull: float) -> None:
        net = models.module(model, models.TINY, D)
        self.by_torch = models.by_torch(models.module(model, models.TINY, D))
        model.change(net.net)
        apply, start = hf.functional(net)
        self.problem = Adaptation(lambda params, batch: apply(params, **batch).loss)
        self.tasks = models.tasks(model, models.TINY, TASKS, D)
        self.hparams = {"start": start, "log_pull": torch.tensor(math.log(pull), dtype=D)}
        self.direction = draw(self.hparams, 3)

    def fit(self, hparams: Tree, task: Tree, steps: int, lr: float) -> Tree:
        params = hparams["start"]
        for _ in range(steps):
            grads = gradient(lambda w: self.by_torch.inner(w, hparams, task), params)
            params = optree.tree_map(lambda w, g: (w - lr * g).detach(), params, grads)
            if dot(grads, grads) < 1e-24:
                break
        return params

    def slopes(self, steps: int, lr: float) -> Tensor:
        """The slope of the outer value of each task, by differences."""

        def value(hparams: Tree, task: Tree) -> Tensor:
            return self.by_torch.outer(self.fit(hparams, task, steps, lr), hparams, task)

        return torch.stack(
            [
                difference(lambda h, task=task: value(h, task), self.hparams, self.direction)
                for task in self.tasks
            ]
        )


def draw(like: Tree, seed: int) -> Tree:
    """A direction of length one in each entry or so."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: torch.randn(t.shape, generator=generator, dtype=D), like)


def difference(fn: Callable[[Tree], Tensor], at: Tree, direction: Tree) -> Tensor:
    """The central one, to the fourth order."""
    value = lambda s: fn(optree.tree_map(lambda t, v: t + s * v, at, direction)).detach()  # noqa: E731
    near, far = ((value(s) - value(-s)) / (2 * s) for s in (1e-5, 2e-5))
    return (4 * near - far) / 3


def dot(x: Tree, y: Tree) -> Tensor:
    """The inner product, for each task if x has a dimension of tasks in front."""
    pairs = zip(optree.tree_leaves(x), optree.tree_leaves(y), strict=True)
    return sum((a * b).reshape(*a.shape[: a.ndim - b.ndim], -1).sum(-1) for a, b in pairs)


@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_hypergradients(model: models.Model) -> None:
    setting = Setting(model, pull=300.0)
    problem, tasks = setting.problem, stack(setting.tasks)
    start = lambda hparams, task: hparams["start"]  # noqa: E731
    with each_cell() as cell:
        for methods, steps, lr, tolerance in (
            (["reverse_unroll", "reverse"], 3, 1 / 600, {}),
            ([hf.CG(rtol=1e-12)], 200, 1 / 300, {"rtol": 1e-14}),
        ):
            expected = setting.slopes(steps, lr)
            sgd = hf.optim.sgd(lr=lr)
            solver = hf.minimize(problem.inner, sgd, steps, init=start, **tolerance)
            for method in methods:
                fn = hf.hypergrad(solver, problem.outer, method=method)
                for route, along in ROUTES.items():
                    with cell(model, method, route):
                        grads = along(fn, (None, 0))(setting.hparams, tasks)
                        actual = dot(grads, setting.direction)
                        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name)
def test_soba(model: models.Model) -> None:
    setting = Setting(model, pull=1.0)
    problem, plain, h = setting.problem, setting.by_torch, setting.hparams
    params, adjoint, v = draw(h["start"], 4), draw(h["start"], 5), draw(h["start"], 6)
    params = optree.tree_map(lambda w, d: w + 0.1 * d, h["start"], params)

    def directions(task: Tree) -> tuple[Tensor, Tensor]:
        inner = lambda w, h: gradient(lambda w: plain.inner(w, h, task), w)  # noqa: E731
        outer = gradient(lambda w: plain.outer(w, h, task), params)
        product = difference(lambda w: dot(inner(w, h), v), params, adjoint)
        cross = difference(lambda h: dot(inner(params, h), adjoint), h, setting.direction)
        return product - dot(outer, v), -cross  # the outer loss has no hparams

    expected = [torch.stack(each) for each in zip(*map(directions, setting.tasks), strict=True)]
    loop = hf.bilevel.soba(problem.inner, problem.outer, inner_lr=1.0, outer_lr=1.0)
    state = loop.init(params, h)._replace(adjoint=adjoint)
    with each_cell() as cell:
        for route, along in ROUTES.items():
            with cell(model, route):
                tasks = stack(setting.tasks)
                new = along(lambda task: loop.update(state, (task,), (task,)), 0)(tasks)
                minus = lambda x, y: x - y  # noqa: E731
                moved = optree.tree_map(minus, state.adjoint, new.adjoint)
                stepped = optree.tree_map(minus, state.hparams, new.hparams)
                torch.testing.assert_close(dot(moved, v), expected[0], rtol=1e-6, atol=1e-9)
                actual = dot(stepped, setting.direction)
                torch.testing.assert_close(actual, expected[1], rtol=1e-6, atol=1e-9)


def test_experts_by_default() -> None:
    """In float32: torch has no grouped products in float64."""
    (model,) = (m for m in models.MODELS if m.name == "Mixtral")
    results = {}
    for dtype in (torch.float32, D):
        apply, start = hf.functional(models.module(model, models.TINY, dtype))
        problem = Adaptation(lambda params, batch, apply=apply: apply(params, **batch).loss)
        hparams = {"start": start, "log_pull": torch.tensor(300.0, dtype=dtype).log()}
        tasks = stack(models.tasks(model, models.TINY, TASKS, dtype))
        sgd = hf.optim.sgd(lr=1 / 300)
        solver = hf.minimize(problem.inner, sgd, 4, init=lambda h, task: h["start"])
        for method in ("reverse_unroll", "reverse", hf.CG(maxiter=3, rtol=0)):
            fn = hf.hypergrad(solver, problem.outer, method=method)
            for route, along in ROUTES.items():
                grads = along(fn, (None, 0))(hparams, tasks)
                results[dtype, str(method), route] = dot(grads, draw(hparams, 3))
    for (_, *cell), actual in results.items():
        expected = results[D, cell[0], "one by one"]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_padding_in_some_tasks_only() -> None:
    """The default attention asks whether there is any, which tasks then answer differently."""
    (model,) = (m for m in models.MODELS if m.name == "BERT, padding mask")
    tasks = models.tasks(model, models.TINY, TASKS, D)
    tasks[0]["fit"]["attention_mask"] = torch.ones_like(tasks[0]["fit"]["attention_mask"])

    def hypergradients(tasks: list[Tree], along: Callable[..., Any]) -> Tree:
        apply, start = hf.functional(models.module(model, models.TINY, D))
        problem = Adaptation(lambda params, batch: apply(params, **batch).loss)
        hparams = {"start": start, "log_pull": torch.tensor(5.0, dtype=D)}
        sgd = hf.optim.sgd(lr=1e-3)
        solver = hf.minimize(problem.inner, sgd, 3, init=lambda h, task: h["start"])
        fn = hf.hypergrad(solver, problem.outer, method="reverse")
        return along(fn, (None, 0))(hparams, stack(tasks))

    with pytest.raises(RuntimeError, match=r"branches on the value.*chunk_size=1"):
        hypergradients(tasks, vmap)
    expected = hypergradients(tasks, ROUTES["one by one"])
    for task in tasks:  # a mask for each head, query and key is used as it is
        for batch in task.values():
            batch["attention_mask"] = batch["attention_mask"][:, None, None, :].bool()
    optree.tree_map(torch.testing.assert_close, hypergradients(tasks, vmap), expected)


def test_whole_outputs_as_aux() -> None:
    (model,) = (m for m in models.MODELS if m.name == "Llama")
    (task,) = models.tasks(model, models.TINY, 1, D)

    def aux(**config: Any) -> Any:
        apply, start = hf.functional(models.module(model, models.TINY, D, **config))
        problem = Adaptation(lambda params, batch: apply(params, **batch).loss)

        def outer(params: Tree, hparams: Tree, task: Tree) -> Any:
            output = apply(params, **task["judge"])
            return output.loss, output

        sgd = hf.optim.sgd(lr=1e-3)
        solver = hf.minimize(problem.inner, sgd, 2, init=lambda h, task: h["start"])
        fn = hf.hypergrad_and_value(solver, outer, method="reverse", has_aux=True)
        hparams = {"start": start, "log_pull": torch.tensor(5.0, dtype=D)}
        return vmap(fn, (None, 0))(hparams, stack([task]))[1][1]

    with pytest.raises(TypeError, match=r"DynamicCache, which holds .* use_cache=False"):
        aux()
    output = aux(use_cache=False)
    assert output.logits.shape == (1, models.TINY.batch, models.TINY.length, models.TINY.vocabulary)
    assert not output.logits.requires_grad
