"""Many tasks of a small network, one inner step each: P8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from tests.benchmarks.harness import FLOOR, OURS, Entry, Problem

TASKS, POINTS, UNITS, RATE = 25, 10, 40, 0.01


def p8() -> Problem:
    """The mean hypergradient of MAML for 25 sinusoids and a network 1-40-40-1."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Linear(1, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, UNITS)),
        *(torch.nn.ReLU(), torch.nn.Linear(UNITS, 1)),
    )
    data = [torch.randn(TASKS, POINTS, 1) for _ in range(4)]

    def reference() -> list[Tensor]:
        start = [leaf.detach().double() for leaf in net.parameters()]
        return by_hand(start, [part.double() for part in data])()

    start = [leaf.detach() for leaf in net.parameters()]
    entries = [
        Entry("by hand, baddbmm", FLOOR, lambda: by_hand(start, data)),
        *(
            Entry(f"hyperfunc, {name}", OURS, lambda run=run: run(*hf.functional(net), data))
            for name, run in RUNS.items()
        ),
    ]
    return Problem("P8", f"{TASKS} tasks of a network 1-{UNITS}-{UNITS}-1", entries, reference)


def by_hand(start: list[Tensor], data: list[Tensor]) -> Callable[[], list[Tensor]]:
    x, y, x_query, y_query = data

    def error(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for weight, bias in zip(w[:-2:2], w[1:-2:2], strict=True):
            x = torch.relu(torch.baddbmm(bias.unsqueeze(1), x, weight.mT))
        x = torch.baddbmm(w[-1].unsqueeze(1), x, w[-2].mT)
        return ((x - y) ** 2).mean((1, 2))

    def run() -> list[Tensor]:
        meta = [leaf.detach().requires_grad_() for leaf in start]
        w = [leaf.expand(TASKS, *leaf.shape) for leaf in meta]
        grads = torch.autograd.grad(error(w, x, y).sum(), w, create_graph=True)
        w = [leaf - RATE * grad for leaf, grad in zip(w, grads, strict=True)]
        return list(torch.autograd.grad(error(w, x_query, y_query).mean(), meta))

    return run


def losses(apply: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def inner(w: Any, meta: Any, x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return ((apply(w, x) - y) ** 2).mean()

    def outer(w: Any, meta: Any, x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
        return ((apply(w, x_query) - y_query) ** 2).mean()

    return inner, outer


def by_vmap(apply: Any, meta: Any, data: list[Tensor], **settings: Any) -> Callable[[], Any]:
    fn, dims = _transformed(apply, **settings), (None, 0, 0, 0, 0)
    return lambda: [leaf.mean(0) for leaf in vmap(fn, dims)(meta, *data).values()]


def by_task_map(apply: Any, meta: Any, data: list[Tensor]) -> Callable[[], Any]:
    mean = hf.task_map(_transformed(apply), (None, 0, 0, 0, 0), reduce="mean")
    return lambda: list(mean(meta, *data).values())


def by_backward(apply: Any, meta: Any, data: list[Tensor]) -> Callable[[], Any]:
    inner, outer = losses(apply)
    solver = hf.minimize(inner, hf.optim.sgd(RATE), 1, init=lambda meta, *_: meta)
    rule = hf.implicit_diff(solver, method="reverse_unroll")

    def run() -> list[Tensor]:
        h = {name: leaf.detach().requires_grad_() for name, leaf in meta.items()}
        value = vmap(lambda *task: outer(rule(h, *task), h, *task))(*data).mean()
        return list(torch.autograd.grad(value, list(h.values())))

    return run


def by_compiling(apply: Any, meta: Any, data: list[Tensor]) -> Callable[[], Any]:
    return by_vmap(apply, meta, data, compile=True)


def _transformed(apply: Any, **settings: Any) -> Any:
    inner, outer = losses(apply)
    solver = hf.minimize(inner, hf.optim.sgd(RATE), 1, init=lambda meta, *_: meta)
    return hf.hypergrad(solver, outer, method="reverse_unroll", **settings)


RUNS: dict[str, Callable[..., Callable[[], Any]]] = {
    "vmap": by_vmap,
    "task_map, reduced": by_task_map,
    "implicit_diff and backward": by_backward,
    "vmap, compiled": by_compiling,
}
