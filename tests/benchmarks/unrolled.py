"""Differentiation through the steps of an inner loop: P4 and half of P6."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfunc as hf
from tests.benchmarks import implicit
from tests.benchmarks.harness import (
    FLOOR,
    OURS,
    PEER,
    RAW,
    Entry,
    NotRun,
    Problem,
    array,
    in_double,
)

Vector = list[Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Momentum steps on ``loss(w, h, x, y)`` with rate ``exp(h[0])``; a loss of the result."""

    loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    hparams: Vector
    initial: Vector
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    steps: int
    momentum: float
    jax_losses: Callable[[], tuple[Any, Any]]


def p4() -> Problem:
    return problem_of("P4", "MLP 784-128-10, 100 momentum steps, unrolled", mlp(100))


def mlp(steps: int) -> Work:
    """MLP 784-128-10, 512 examples, for the rate and an L2 weight a layer."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(512, 784, generator=generator) for _ in range(2)]
    labels = [torch.randint(10, (512,), generator=generator) for _ in range(2)]

    def net(w: Vector, x: Tensor) -> Tensor:
        return torch.addmm(w[3], torch.addmm(w[1], x, w[0]).relu(), w[2])

    def loss(w: Vector, h: Vector, x: Tensor, y: Tensor) -> Tensor:
        l2 = h[1].exp()
        penalty = l2[0] * (w[0] ** 2).sum() + l2[1] * (w[2] ** 2).sum()
        return F.cross_entropy(net(w, x), y) + penalty

    def outer_loss(w: Vector, h: Vector, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(w, x), y)

    def jax_losses() -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        def outer_loss(w: Any, h: Any, x: Any, y: Any) -> Any:
            logits = jax.nn.relu(x @ w[0] + w[1]) @ w[2] + w[3]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
            return -picked.mean()

        def loss(w: Any, h: Any, x: Any, y: Any) -> Any:
            l2 = jnp.exp(h[1])
            penalty = l2[0] * (w[0] ** 2).sum() + l2[1] * (w[2] ** 2).sum()
            return outer_loss(w, h, x, y) + penalty

        return loss, outer_loss

    return Work(
        loss,
        outer_loss,
        [torch.tensor(-3.0), torch.full((2,), -6.0)],
        [
            torch.randn(784, 128, generator=generator) / 28,
            torch.zeros(128),
            torch.randn(128, 10, generator=generator) / 11,
            torch.zeros(10),
        ],
        (data[0], labels[0]),
        (data[1], labels[1]),
        steps=steps,
        momentum=0.9,
        jax_losses=jax_losses,
    )


def p6() -> Problem:
    title = "logistic regression, d = 20, 100 steps, unrolled"
    return problem_of("P6-reverse", title, tiny_logistic())


def tiny_logistic() -> Work:
    """The tiny problem of `implicit.tiny_logistic`, for the rate and an L2 weight a feature."""
    tiny = implicit.tiny_logistic()
    x, y, xv, yv = tiny.task(0)

    def shift(h: Any) -> Any:
        return h[1:]

    def jax_losses() -> tuple[Any, Any]:
        assert tiny.jax_losses is not None
        loss, outer_loss = tiny.jax_losses()
        return (
            lambda w, h, x, y: loss(w, shift(h), x, y, x, y),
            lambda w, h, x, y: outer_loss(w, shift(h), x, y, x, y),
        )

    return Work(
        lambda w, h, x, y: tiny.data_loss(w, shift(h), x, y),
        lambda w, h, x, y: tiny.outer_loss(w, shift(h), x, y, x, y),
        [torch.tensor(math.log(0.05)), *tiny.hparams],
        list(tiny.start()),
        (x, y),
        (xv, yv),
        steps=100,
        momentum=0.9,
        jax_losses=jax_losses,
    )


def problem_of(key: str, title: str, work: Work) -> Problem:
    def entry(name: str, group: str, build: Callable[[Work], Callable[[], Any]]) -> Entry:
        return Entry(name, group, lambda: build(work))

    def ours(name: str, method: Any, compile: bool = False) -> Entry:
        return entry(f"hyperfunc, {name}", OURS, lambda work: hyperfunc(work, method, compile))

    entries = [
        entry("gradients and products", FLOOR, floor),
        entry("by hand, create_graph", RAW, by_hand),
        entry("by hand, nested torch.func.grad", RAW, nested_by_hand),
        ours("ReverseUnroll", hf.ReverseUnroll()),
        ours("Reverse", hf.Reverse()),
        ours("ReverseUnroll, compiled", hf.ReverseUnroll(), compile=True),
        ours("Reverse, compiled", hf.Reverse(), compile=True),
        entry("higher", PEER, higher),
        entry("TorchOpt", PEER, torchopt),
        entry("JAX, grad of lax.scan, jit", PEER, jax_scan),
    ]
    return Problem(key, title, entries, lambda: by_hand(in_double(work))())


def floor(work: Work) -> Callable[[], None]:
    """The gradient at each step and its transposed product, and nothing else."""

    def run() -> None:
        w = [leaf.detach().clone().requires_grad_() for leaf in work.initial]
        h = [leaf.detach().clone().requires_grad_() for leaf in work.hparams]
        for _ in range(work.steps):
            grads = torch.autograd.grad(work.loss(w, h, *work.train), w, create_graph=True)
            vectors = [leaf.detach() for leaf in grads]
            torch.autograd.grad(grads, [*w, *h], vectors, allow_unused=True)

    return run


def by_hand(work: Work) -> Callable[[], Vector]:
    def run() -> Vector:
        h = [leaf.detach().clone().requires_grad_() for leaf in work.hparams]
        w = [leaf.detach().clone().requires_grad_() for leaf in work.initial]
        buffer = [torch.zeros_like(leaf) for leaf in w]
        lr = h[0].exp()
        for _ in range(work.steps):
            grads = torch.autograd.grad(work.loss(w, h, *work.train), w, create_graph=True)
            buffer = [
                torch.add(g, b, alpha=work.momentum) for g, b in zip(grads, buffer, strict=True)
            ]
            w = [torch.addcmul(leaf, lr, b, value=-1) for leaf, b in zip(w, buffer, strict=True)]
        return list(torch.autograd.grad(work.outer_loss(w, h, *work.val), h))

    return run


def nested_by_hand(work: Work) -> Callable[[], Vector]:
    def objective(h: Vector) -> Tensor:
        w = work.initial
        buffer = [torch.zeros_like(leaf) for leaf in w]
        for _ in range(work.steps):
            grads = torch.func.grad(work.loss)(w, h, *work.train)
            buffer = [work.momentum * b + g for b, g in zip(buffer, grads, strict=True)]
            w = [leaf - h[0].exp() * b for leaf, b in zip(w, buffer, strict=True)]
        return work.outer_loss(w, h, *work.val)

    return lambda: torch.func.grad(objective)(work.hparams)


def hyperfunc(work: Work, method: Any, compile: Any) -> Callable[[], Vector]:
    def loss(w: Vector, h: Vector, x: Tensor, y: Tensor, *val: Tensor) -> Tensor:
        return work.loss(w, h, x, y)

    def outer_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, *val: Tensor) -> Tensor:
        return work.outer_loss(w, h, *val)

    optimizer = hf.optim.sgd(lambda h: h[0].exp(), momentum=work.momentum)
    solver = hf.minimize(loss, optimizer, work.steps, init=lambda h, *args: work.initial)
    transformed = hf.hypergrad(solver, outer_loss, method=method, compile=compile)
    return lambda: transformed(work.hparams, *work.train, *work.val)


class _Module(torch.nn.Module):
    """The inner variables as a module, which is what `higher` and TorchOpt take."""

    def __init__(self, leaves: Vector) -> None:
        super().__init__()
        self.leaves = torch.nn.ParameterList(
            [torch.nn.Parameter(leaf.detach().clone()) for leaf in leaves]
        )

    def forward(self, fn: Any, *args: Any) -> Tensor:
        result: Tensor = fn(list(self.leaves), *args)
        return result


def higher(work: Work) -> Callable[[], Vector]:
    import higher

    class Module(_Module):
        def __init__(self, leaves: Vector) -> None:  # higher knows no ParameterList
            torch.nn.Module.__init__(self)
            for index, leaf in enumerate(leaves):
                self.register_parameter(f"leaf{index}", torch.nn.Parameter(leaf.detach().clone()))

        def forward(self, fn: Any, *args: Any) -> Tensor:
            leaves = [getattr(self, f"leaf{index}") for index in range(len(work.initial))]
            result: Tensor = fn(leaves, *args)
            return result

    module = Module(work.initial)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=work.momentum)

    def run() -> Vector:
        h = [leaf.detach().clone().requires_grad_() for leaf in work.hparams]
        override = {"lr": [h[0].exp()]}
        with higher.innerloop_ctx(module, optimizer, override=override) as (model, loop):
            for _ in range(work.steps):
                loop.step(model(work.loss, h, *work.train))
            return list(torch.autograd.grad(model(work.outer_loss, h, *work.val), h))

    return run


def torchopt(work: Work) -> Callable[[], Vector]:
    import torchopt

    def run() -> Vector:
        h = [leaf.detach().clone().requires_grad_() for leaf in work.hparams]
        w = tuple(leaf.detach().clone().requires_grad_() for leaf in work.initial)
        # the rate multiplies after the transformation, since TorchOpt's is a number
        chain = torchopt.chain(torchopt.transform.trace(work.momentum))
        state = chain.init(w)
        for _ in range(work.steps):
            loss = work.loss(list(w), h, *work.train)
            grads = torch.autograd.grad(loss, w, create_graph=True)
            updates, state = chain.update(grads, state, inplace=False)
            rate = -h[0].exp()
            w = torchopt.apply_updates(w, tuple(rate * u for u in updates), inplace=False)
        return list(torch.autograd.grad(work.outer_loss(list(w), h, *work.val), h))

    if not hasattr(torchopt.transform, "trace"):
        raise NotRun("this version of TorchOpt has no transform.trace")
    return run


def jax_scan(work: Work) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    loss, outer_loss = work.jax_losses()

    def objective(h: Any, w: Any, x: Any, y: Any, xv: Any, yv: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            w, buffer = state
            grads = jax.grad(loss)(w, h, x, y)
            buffer = jax.tree.map(lambda b, g: work.momentum * b + g, buffer, grads)
            return (jax.tree.map(lambda a, b: a - jnp.exp(h[0]) * b, w, buffer), buffer), None

        start = (w, jax.tree.map(jnp.zeros_like, w))
        (w, _), _ = jax.lax.scan(step, start, None, length=work.steps)
        return outer_loss(w, h, xv, yv)

    compiled = jax.jit(jax.grad(objective))
    arrays = [jnp.asarray(array(leaf)) for leaf in (*work.train, *work.val)]
    h = [jnp.asarray(array(leaf)) for leaf in work.hparams]
    w = [jnp.asarray(array(leaf)) for leaf in work.initial]
    return lambda: jax.block_until_ready(compiled(h, w, *arrays))
