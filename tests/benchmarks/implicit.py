"""Implicit differentiation at a solution, of one problem or of many tasks: P1, P2, P3, P5."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfunc as hf
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
Task = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """An inner loss with its outer loss, and how the hypergradient is to be taken.

    The inner loss is ``data_loss(w, h, *task)``, plus ``weight/2 ||w - h||^2`` if there is a
    weight. From ``initial``, by default ``h``, there are ``steps`` steps of gradient descent; with
    none of them it is the solution. The adjoint takes ``products`` products, by CG or by the
    Neumann series with step size ``lr``.
    """

    data_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    hparams: Vector
    tasks: Task
    steps: int
    lr: float
    products: int
    method: str = "cg"
    weight: float = 0.0
    initial: Vector | None = None
    jax_losses: Callable[[], tuple[Any, Any]] | None = None
    batched_losses: tuple[Any, Any] | None = None
    exact_floor: Callable[[Work], Callable[[], None]] | None = None

    @property
    def num_tasks(self) -> int:
        return len(self.tasks[0])

    def task(self, index: int) -> Task:
        return tuple(leaf[index] for leaf in self.tasks)

    def loss(self, w: Vector, h: Vector, *task: Tensor) -> Tensor:
        """The inner loss with its regulariser, written out."""
        value = self.data_loss(w, h, *task)
        if self.weight:
            value = value + 0.5 * self.weight * sum(
                ((a - b) ** 2).sum() for a, b in zip(w, h, strict=True)
            )
        return value

    def start(self) -> Vector:
        return self.hparams if self.initial is None else self.initial


def p1() -> Problem:
    return _problem("P1", "logistic regression, 500 x 20, CG 20", logistic("cg", 20))


def p2() -> Problem:
    return _problem("P2", "logistic regression, 500 x 20, Neumann 50", logistic("neumann", 50))


def p3a() -> Problem:
    return _problem("P3a", "iMAML, 16 tasks, MLP 784-256-64-5", fewshot_mlp(16))


def p3b() -> Problem:
    return _problem("P3b", "iMAML, 4 tasks, 4 x 64 convolutions", fewshot_conv(4))


def p6() -> Problem:
    title = "logistic regression, d = 20, 100 steps, CG 10"
    return _problem("P6-cg", title, tiny_logistic())


def p5(num_tasks: int) -> Problem:
    title = f"iMAML, {num_tasks} tasks, MLP 784-256-64-5"
    return _problem(f"P5-{num_tasks}", title, fewshot_mlp(num_tasks))


def _problem(key: str, title: str, work: Work) -> Problem:
    def entry(name: str, group: str, build: Callable[[Work], Callable[[], Any]]) -> Entry:
        return Entry(name, group, lambda: build(work))

    entries = [
        entry("products and gradients, task by task", FLOOR, floor),
        entry("by hand, updates in place", RAW, by_hand),
        entry("by hand, torch.func.vjp", RAW, functional_by_hand),
        entry("hyperfunc", OURS, hyperfunc_loop),
        entry("hyperfunc, compiled", OURS, functools.partial(hyperfunc_loop, compile=True)),
        entry("HyperTorch's algorithm, by hand", PEER, hypertorch_style),
        entry("TorchOpt", PEER, torchopt),
        entry("JAXopt, jit", PEER, functools.partial(jaxopt, over="scan")),
        entry("Betty", PEER, betty),
    ]
    if work.exact_floor is not None:
        entries.insert(0, entry("products in closed form", FLOOR, work.exact_floor))
    if work.batched_losses is not None:
        entries.insert(0, entry("products and gradients, batched", FLOOR, batched_floor))
    if work.num_tasks > 1:
        at = [e.name for e in entries].index("hyperfunc") + 1
        entries[at:at] = [
            entry("hyperfunc, task_map", OURS, hyperfunc_task_map),
            entry("hyperfunc, vmap", OURS, hyperfunc_vmap),
            entry("hyperfunc, threads over tasks", OURS, hyperfunc_threads),
        ]
        if work.batched_losses is not None:  # convolutions with many weights take minutes
            chunks = entry("hyperfunc, chunks of 16, compiled", OURS, hyperfunc_compiled)
            entries.insert(at + 3, chunks)
        entries[-2:-1] = [
            entry(f"JAXopt, jit, {over} over tasks", PEER, functools.partial(jaxopt, over=over))
            for over in ("scan", "vmap")
            if over == "scan" or work.batched_losses
        ]
    # among many tasks there are some with an ill-conditioned Hessian
    tolerance = 1e-3 if work.num_tasks <= 16 else 3e-2
    return Problem(key, title, entries, lambda: by_hand(in_double(work))(), tolerance)


def logistic(method: str, products: int) -> Work:
    """2000 + 2000 examples of 500 features in 20 classes, with exp(h) the L2 of a feature."""
    generator = torch.Generator().manual_seed(0)
    features, classes, n = 500, 20, 2000
    planted = torch.randn(features, classes, generator=generator)
    x = torch.randn(2 * n, features, generator=generator)
    noise = 5 * torch.randn(2 * n, classes, generator=generator)
    y = (x @ planted + noise).argmax(1)
    h = torch.full((features,), math.log(0.02))

    def data_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return F.cross_entropy(x @ w[0], y) + 0.5 * (h[0].exp() @ (w[0] ** 2)).sum()

    def outer_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, xv: Tensor, yv: Tensor) -> Tensor:
        return F.cross_entropy(xv @ w[0], yv)

    def jax_losses() -> tuple[Any, Any]:
        import jax.numpy as jnp

        def data_loss(w: Any, h: Any, x: Any, y: Any, xv: Any, yv: Any) -> Any:
            return _jax_cross_entropy(x @ w[0], y) + 0.5 * (jnp.exp(h[0]) @ (w[0] ** 2)).sum()

        def outer_loss(w: Any, h: Any, x: Any, y: Any, xv: Any, yv: Any) -> Any:
            return _jax_cross_entropy(xv @ w[0], yv)

        return data_loss, outer_loss

    w = [torch.zeros(features, classes)]
    for _ in range(300):
        w = [w[0].requires_grad_()]
        (grad,) = torch.autograd.grad(data_loss(w, [h], x[:n], y[:n]), w)
        w = [(w[0] - grad).detach()]
    tasks = tuple(leaf[None] for leaf in (x[:n], y[:n], x[n:], y[n:]))
    return Work(
        data_loss,
        outer_loss,
        [h],
        tasks,
        steps=0,
        lr=1.0,
        products=products,
        method=method,
        initial=w,
        jax_losses=jax_losses,
        exact_floor=_exact_logistic_floor,
    )


def tiny_logistic() -> Work:
    """100 + 100 examples of 20 features in two classes, so small that only overhead counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    y = (
        x @ torch.randn(20, generator=generator) + torch.randn(200, generator=generator) > 0
    ).float()

    def data_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x @ w[0], y)
        return loss + 0.5 * (h[0].exp() * w[0] ** 2).sum()

    def outer_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, xv: Tensor, yv: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(xv @ w[0], yv)

    def jax_losses() -> tuple[Any, Any]:
        import jax.numpy as jnp

        def entropy(logits: Any, y: Any) -> Any:
            return (jnp.logaddexp(0.0, logits) - y * logits).mean()

        def data_loss(w: Any, h: Any, x: Any, y: Any, xv: Any, yv: Any) -> Any:
            return entropy(x @ w[0], y) + 0.5 * (jnp.exp(h[0]) * w[0] ** 2).sum()

        def outer_loss(w: Any, h: Any, x: Any, y: Any, xv: Any, yv: Any) -> Any:
            return entropy(xv @ w[0], yv)

        return data_loss, outer_loss

    return Work(
        data_loss,
        outer_loss,
        [torch.full((20,), math.log(0.05))],
        tuple(leaf[None] for leaf in (x[:100], y[:100], x[100:], y[100:])),
        steps=100,
        lr=0.5,
        products=10,
        initial=[torch.zeros(20)],
        jax_losses=jax_losses,
    )


def few_shot_tasks(num_tasks: int, shape: tuple[int, ...]) -> Task:
    """5-way tasks with 5 labelled examples and 15 queries a class."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.rand(num_tasks, 5, *shape, generator=generator)
    parts = []
    for shots in (5, 15):
        y = torch.arange(5).repeat(shots)
        noise = torch.randn(num_tasks, len(y), *shape, generator=generator)
        parts += [0.3 * centers[:, y] + 0.15 * noise, y.expand(num_tasks, -1).contiguous()]
    return tuple(parts)


def fewshot_mlp(num_tasks: int, sizes: tuple[int, ...] = (784, 256, 64, 5)) -> Work:
    generator = torch.Generator().manual_seed(1)
    meta = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        meta += [torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5]
        meta += [torch.zeros(fan_out)]

    def net(w: Vector, x: Tensor) -> Tensor:
        for layer in range(0, len(w) - 2, 2):
            x = F.linear(x, w[layer], w[layer + 1]).relu()
        return F.linear(x, w[-2], w[-1])

    def batched_net(w: Vector, x: Tensor) -> Tensor:
        for layer in range(0, len(w) - 2, 2):
            x = torch.baddbmm(w[layer + 1][:, None], x, w[layer].mT).relu()
        return torch.baddbmm(w[-1][:, None], x, w[-2].mT)

    def jax_net(w: Any, x: Any) -> Any:
        import jax

        for layer in range(0, len(w) - 2, 2):
            x = jax.nn.relu(x @ w[layer].T + w[layer + 1])
        return x @ w[-2].T + w[-1]

    tasks = few_shot_tasks(num_tasks, (784,))
    return few_shot(net, jax_net, meta, tasks, batched_net)


def fewshot_conv(num_tasks: int, width: int = 64) -> Work:
    generator = torch.Generator().manual_seed(1)
    meta = []
    for channels in (1, width, width, width):
        scale = (1 / (9 * channels)) ** 0.5
        kernel = torch.randn(width, channels, 3, 3, generator=generator)
        meta += [kernel * scale, torch.zeros(width)]
    meta += [torch.randn(5, width, generator=generator) / width**0.5, torch.zeros(5)]

    # Smooth: rounding that turns a kink of relu or max_pool changes a gradient by a hundredth, and
    # the steps after it amplify that, so that no two implementations agree in float32.
    def net(w: Vector, x: Tensor) -> Tensor:
        for layer in range(4):
            x = F.conv2d(x, w[2 * layer], w[2 * layer + 1], padding=1).tanh()
            x = F.avg_pool2d(x, 2)
        return F.linear(x.flatten(1), w[8], w[9])

    def jax_net(w: Any, x: Any) -> Any:
        import jax

        for layer in range(4):
            x = jax.lax.conv_general_dilated(x, w[2 * layer], (1, 1), "SAME")
            x = jax.numpy.tanh(x + w[2 * layer + 1][:, None, None])
            half = (x.shape[-1] // 2) * 2
            x = x[..., :half, :half]
            x = x.reshape(*x.shape[:2], half // 2, 2, half // 2, 2).mean((3, 5))
        return x.reshape(x.shape[0], -1) @ w[8].T + w[9]

    return few_shot(net, jax_net, meta, few_shot_tasks(num_tasks, (1, 28, 28)), None)


def few_shot(
    net: Callable[..., Tensor], jax_net: Any, meta: Vector, tasks: Task, batched_net: Any
) -> Work:
    """Implicit MAML: 16 gradient steps with the biased regulariser 2, then CG with 5."""

    def data_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return F.cross_entropy(net(w, x), y)

    def outer_loss(w: Vector, h: Vector, x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return F.cross_entropy(net(w, xq), yq)

    def jax_losses() -> tuple[Any, Any]:
        def data_loss(w: Any, h: Any, x: Any, y: Any, xq: Any, yq: Any) -> Any:
            return _jax_cross_entropy(jax_net(w, x), y)

        def outer_loss(w: Any, h: Any, x: Any, y: Any, xq: Any, yq: Any) -> Any:
            return _jax_cross_entropy(jax_net(w, xq), yq)

        return data_loss, outer_loss

    def total(w: Vector, x: Tensor, y: Tensor) -> Tensor:
        logits = batched_net(w, x).flatten(0, 1)
        return F.cross_entropy(logits, y.flatten(), reduction="sum") / y.shape[1]

    batched = None
    if batched_net is not None:
        batched = (lambda w, x, y, xq, yq: total(w, x, y), lambda w, x, y, xq, yq: total(w, xq, yq))
    return Work(
        data_loss,
        outer_loss,
        meta,
        tasks,
        steps=16,
        lr=0.1,
        products=5,
        weight=2.0,
        jax_losses=jax_losses,
        batched_losses=batched,
    )


# The floor, and torch by hand.


def floor(work: Work) -> Callable[[], None]:
    def run() -> None:
        for index in range(work.num_tasks):
            task = work.task(index)
            w = _variables(work.start())
            for _ in range(work.steps):
                torch.autograd.grad(work.data_loss(w, work.hparams, *task), w)
            v = torch.autograd.grad(work.outer_loss(w, work.hparams, *task), w)
            loss = work.data_loss(w, work.hparams, *task)
            grads = torch.autograd.grad(loss, w, create_graph=True)
            for _ in range(work.products):
                torch.autograd.grad(grads, w, v, retain_graph=True)

    return run


def _exact_logistic_floor(work: Work) -> Callable[[], None]:
    """The products ``X^T (p * (X v - sum(p * X v)))`` of softmax regression, laid out by class."""
    x, _, xv, yv = work.task(0)
    (w,), (h,) = work.start(), work.hparams

    def run() -> None:
        p = torch.softmax(w.T @ x.T, 0)
        v = (torch.softmax(w.T @ xv.T, 0) - F.one_hot(yv, w.shape[1]).T) @ xv
        for _ in range(work.products):
            weighted = p * (v @ x.T)
            weighted.sub_(p * weighted.sum(0, keepdim=True)) @ x
        h.exp() * w.T * v

    return run


def batched_floor(work: Work) -> Callable[[], None]:
    loss, outer_loss = work.batched_losses or map(_of_all_tasks, (work.data_loss, work.outer_loss))

    def run() -> None:
        expanded = [leaf.expand(work.num_tasks, *leaf.shape).clone() for leaf in work.start()]
        w = _variables(expanded)
        for _ in range(work.steps):
            torch.autograd.grad(loss(w, *work.tasks), w)
        v = torch.autograd.grad(outer_loss(w, *work.tasks), w)
        grads = torch.autograd.grad(loss(w, *work.tasks), w, create_graph=True)
        for _ in range(work.products):
            torch.autograd.grad(grads, w, v, retain_graph=True)

    return run


def _of_all_tasks(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: torch.func.vmap(lambda w, *task: loss(w, [], *task))(*operands).sum()


def by_hand(work: Work) -> Callable[[], Vector]:
    """A loop over tasks, a retained graph, updates in place, and the regulariser in closed form."""
    mu, lr, h = work.weight, work.lr, work.hparams

    def one(task: Task) -> Vector:
        w = _variables(work.start())
        for _ in range(work.steps):
            grads = torch.autograd.grad(work.data_loss(w, h, *task), w)
            with torch.no_grad():
                for leaf, grad, center in zip(w, grads, h, strict=True):
                    leaf.mul_(1 - lr * mu).add_(center, alpha=lr * mu).sub_(grad, alpha=lr)
        theta = _variables(h)
        outer = work.outer_loss(w, theta, *task)
        b, dh = _grad(outer, w), _grad(outer, theta)
        grads = torch.autograd.grad(work.data_loss(w, theta, *task), w, create_graph=True)

        def product(v: Vector) -> Vector:
            result = torch.autograd.grad(grads, w, v, retain_graph=True)
            return [x.add(y, alpha=mu) for x, y in zip(result, v, strict=True)] if mu else result

        u = _cg(product, b, work.products) if work.method == "cg" else _neumann(product, b, work)
        if mu:
            return [d.add_(x, alpha=mu) for d, x in zip(dh, u, strict=True)]
        cross = torch.autograd.grad(grads, theta, u)
        return [d.sub_(c) for d, c in zip(dh, cross, strict=True)]

    return lambda: _stack([one(work.task(i)) for i in range(work.num_tasks)])


def functional_by_hand(work: Work) -> Callable[[], Vector]:
    """The straightforward program in torch.func, under vmap over tasks."""

    def one(h: Vector, *task: Tensor) -> Vector:
        w = work.start()
        for _ in range(work.steps):
            grads = torch.func.grad(work.loss)(w, h, *task)
            w = [leaf - work.lr * grad for leaf, grad in zip(w, grads, strict=True)]
        b, dh = torch.func.grad(work.outer_loss, (0, 1))(w, h, *task)
        _, pull = torch.func.vjp(lambda w, h: torch.func.grad(work.loss)(w, h, *task), w, h)

        def product(v: Vector) -> Vector:
            return list(pull(v)[0])

        u = list(b) if work.method == "cg" else [work.lr * leaf for leaf in b]
        if work.method == "neumann":
            for _ in range(work.products):
                Au = product(u)
                u = [x - work.lr * y + work.lr * z for x, y, z in zip(u, Au, b, strict=True)]
        else:
            x, r, p = [torch.zeros_like(leaf) for leaf in b], list(b), list(b)
            rs = _dot(r, r)
            for _ in range(work.products):
                Ap = product(p)
                alpha = rs / _dot(p, Ap)
                x = [a + alpha * c for a, c in zip(x, p, strict=True)]
                r = [a - alpha * c for a, c in zip(r, Ap, strict=True)]
                rs, previous = _dot(r, r), rs
                p = [a + rs / previous * c for a, c in zip(r, p, strict=True)]
            u = x
        return [d - c for d, c in zip(dh, pull(u)[1], strict=True)]

    if work.num_tasks == 1:
        return lambda: [leaf[None] for leaf in one(work.hparams, *work.task(0))]
    dims = (None, *[0] * len(work.tasks))
    return lambda: torch.func.vmap(one, dims)(work.hparams, *work.tasks)


# This library.


def _adapt(work: Work, compile: Any = False) -> Any:
    method: Any = hf.CG(maxiter=work.products, rtol=0, atol=0)
    if work.method == "neumann":
        method = hf.Neumann(maxiter=work.products, rtol=0, atol=0, step_size=work.lr)
    inner_loss: Any = work.data_loss
    if work.weight:
        inner_loss = hf.proximal(work.data_loss, work.weight)
    start = _Start(work.initial)
    solver: Any = start
    if work.steps:
        sgd = hf.optim.sgd(work.lr)
        solver = hf.minimize(inner_loss, sgd, work.steps, init=start, compile=compile)
    return hf.hypergrad(
        solver, work.outer_loss, inner_loss=inner_loss, method=method, compile=compile
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    initial: Vector | None

    def __call__(self, h: Vector, *task: Tensor) -> Vector:
        return h if self.initial is None else self.initial


def hyperfunc_loop(work: Work, compile: Any = False) -> Callable[[], Vector]:
    adapt = _adapt(work, compile)
    return lambda: _stack([adapt(work.hparams, *work.task(i)) for i in range(work.num_tasks)])


def hyperfunc_task_map(work: Work) -> Callable[[], Vector]:
    adapt = hf.task_map(_adapt(work), (None, *[0] * len(work.tasks)))
    return lambda: adapt(work.hparams, *work.tasks)


def hyperfunc_threads(work: Work) -> Callable[[], Vector]:
    """As many tasks at a time as there are intra-op threads, each in a thread with one of these.

    What `hf.task_map` would have to beat for threads to be worth offering.
    """
    count = torch.get_num_threads()
    if count == 1:
        raise NotRun("one thread")
    adapt = _adapt(work)

    def run() -> Vector:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            tasks = map(work.task, range(work.num_tasks))
            results = list(pool.map(lambda task: adapt(work.hparams, *task), tasks))
        torch.set_num_threads(count)  # for threads to come; this one's number has not changed
        return _stack(results)

    return run


def hyperfunc_vmap(work: Work, compile: Any = False) -> Callable[[], Vector]:
    adapt = torch.func.vmap(_adapt(work, compile), (None, *[0] * len(work.tasks)))
    return lambda: adapt(work.hparams, *work.tasks)


# Peers.


def hyperfunc_compiled(work: Work) -> Callable[[], Vector]:
    dims = (None, *[0] * len(work.tasks))
    adapt = hf.task_map(_adapt(work, compile=True), dims, chunk_size=16)
    return lambda: adapt(work.hparams, *work.tasks)


def hypertorch_style(work: Work) -> Callable[[], Vector]:
    """The algorithm of HyperTorch: a map by autograd, products on its graph, lists of tensors."""

    def fp_map(w: Vector, h: Vector, task: Task, create_graph: bool) -> Vector:
        loss = work.loss(w, h, *task)
        grads = torch.autograd.grad(loss, w, create_graph=create_graph)
        return [leaf - work.lr * grad for leaf, grad in zip(w, grads, strict=True)]

    def one(task: Task) -> Vector:
        h = _variables(work.hparams)
        w = [leaf.clone() for leaf in work.start()]
        for _ in range(work.steps):
            w = [leaf.detach() for leaf in fp_map(_variables(w), h, task, False)]
        w = _variables(w)
        outer = work.outer_loss(w, h, *task)
        b, dh = _grad(outer, w), _grad(outer, h)
        mapped = fp_map(w, h, task, True)

        def jacobian(v: Vector) -> Vector:
            return list(torch.autograd.grad(mapped, w, v, retain_graph=True))

        if work.method == "neumann":
            v = [leaf.clone() for leaf in b]
            total = [leaf.clone() for leaf in b]
            for _ in range(work.products):
                v = jacobian(v)
                total = [a + c for a, c in zip(total, v, strict=True)]
            u = total
        else:

            def product(v: Vector) -> Vector:
                return [a - c for a, c in zip(v, jacobian(v), strict=True)]

            u = _concatenating_cg(product, b, work.products)
        cross = torch.autograd.grad(mapped, h, u)
        return [d + c for d, c in zip(dh, cross, strict=True)]

    return lambda: _stack([one(work.task(i)) for i in range(work.num_tasks)])


def torchopt(work: Work) -> Callable[[], Vector]:
    import torchopt

    solve = torchopt.linear_solve.solve_cg(maxiter=work.products, rtol=0.0, atol=0.0)
    if work.method == "neumann":
        solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=work.products, alpha=work.lr)
    sgd = torchopt.sgd(lr=work.lr)

    def optimality(w: Any, h: Any, task: Any) -> Any:
        return torch.func.grad(lambda w: work.loss(list(w), list(h), *task))(w)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
    def solver(w: Any, h: Any, task: Any) -> Any:
        if work.steps == 0:
            return w
        w = tuple(_variables(w))
        state = sgd.init(w)
        for _ in range(work.steps):
            w = tuple(leaf.requires_grad_() for leaf in w)
            with torch.enable_grad():
                loss = work.loss(list(w), list(h), *task)
            grads = torch.autograd.grad(loss, w)
            w = tuple(leaf.detach() for leaf in w)
            updates, state = sgd.update(grads, state, inplace=False)
            w = torchopt.apply_updates(w, updates, inplace=False)
        return tuple(leaf.detach() for leaf in w)

    def one(task: Task) -> Vector:
        h = tuple(_variables(work.hparams))
        w = solver(tuple(work.start()), h, task)
        outer = work.outer_loss(list(w), list(h), *task)
        return list(torch.autograd.grad(outer, h))

    return lambda: _stack([one(work.task(i)) for i in range(work.num_tasks)])


def jaxopt(work: Work, over: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    from jaxopt import implicit_diff, linear_solve

    assert work.jax_losses is not None
    data_loss, outer_loss = work.jax_losses()

    def loss(w: Any, h: Any, *task: Any) -> Any:
        value = data_loss(w, h, *task)
        if work.weight:
            value += (
                0.5 * work.weight * sum(((a - b) ** 2).sum() for a, b in zip(w, h, strict=True))
            )
        return value

    def neumann(matvec: Any, b: Any, **_: Any) -> Any:
        def body(_: Any, u: Any) -> Any:
            return jax.tree.map(lambda x, y, z: x - work.lr * (y - z), u, matvec(u), b)

        start = jax.tree.map(lambda leaf: work.lr * leaf, b)
        return jax.lax.fori_loop(0, work.products, body, start)

    solve: Any = neumann
    if work.method == "cg":
        solve = functools.partial(linear_solve.solve_cg, maxiter=work.products, tol=0.0)

    @implicit_diff.custom_root(jax.grad(loss), solve=solve)
    def solver(w: Any, h: Any, *task: Any) -> Any:
        def body(_: Any, w: Any) -> Any:
            grads = jax.grad(loss)(w, h, *task)
            return jax.tree.map(lambda leaf, grad: leaf - work.lr * grad, w, grads)

        return jax.lax.fori_loop(0, work.steps, body, w) if work.steps else w

    def one(h: Any, w: Any, *task: Any) -> Any:
        return jax.grad(lambda h: outer_loss(solver(w, h, *task), h, *task))(h)

    dims = (None, None, *[0] * len(work.tasks))
    if over == "vmap":
        compiled = jax.jit(jax.vmap(one, dims))
    else:
        compiled = jax.jit(lambda h, w, *tasks: jax.lax.map(lambda task: one(h, w, *task), tasks))
    h = [jnp.asarray(array(leaf)) for leaf in work.hparams]
    w = [jnp.asarray(array(leaf)) for leaf in work.start()]
    tasks = [jnp.asarray(array(leaf)) for leaf in work.tasks]
    return lambda: jax.block_until_ready(compiled(h, w, *tasks))


def betty(work: Work) -> Callable[[], Any]:
    raise NotRun("its metadata (torch>=1.6.*) is refused by current pip")


def _variables(leaves: Any) -> Vector:
    return [leaf.detach().clone().requires_grad_() for leaf in leaves]


def _grad(value: Tensor, inputs: Vector) -> Vector:
    grads = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def _dot(a: Vector, b: Vector) -> Tensor:
    terms = [(x.reshape(-1) * y.reshape(-1)).sum() for x, y in zip(a, b, strict=True)]
    return sum(terms[1:], terms[0])


def _cg(product: Callable[[Vector], Vector], b: Vector, steps: int) -> Vector:
    def dot(a: Vector, b: Vector) -> Tensor:
        terms = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
        return sum(terms[1:], terms[0])

    x, r, p = [torch.zeros_like(leaf) for leaf in b], _copy(b), _copy(b)
    rs = dot(r, r)
    for _ in range(steps):
        Ap = product(p)
        alpha = (rs / dot(p, Ap)).item()
        torch._foreach_add_(x, p, alpha=alpha)
        torch._foreach_add_(r, Ap, alpha=-alpha)
        rs, previous = dot(r, r), rs
        torch._foreach_mul_(p, (rs / previous).item())
        torch._foreach_add_(p, r)
    return x


def _neumann(product: Callable[[Vector], Vector], b: Vector, work: Work) -> Vector:
    b = [work.lr * leaf for leaf in b]
    u = _copy(b)
    for _ in range(work.products):
        Au = product(u)
        torch._foreach_add_(u, Au, alpha=-work.lr)
        torch._foreach_add_(u, b)
    return u


def _concatenating_cg(product: Callable[[Vector], Vector], b: Vector, steps: int) -> Vector:
    def flat(v: Vector) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in v])

    x, r, p = [torch.zeros_like(leaf) for leaf in b], _copy(b), _copy(b)
    for _ in range(steps):
        Ap = product(p)
        rs = (flat(r) ** 2).sum()
        alpha = rs / (flat(p) * flat(Ap)).sum()
        x = [a + alpha * c for a, c in zip(x, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, Ap, strict=True)]
        beta = (flat(r) ** 2).sum() / rs
        p = [a + beta * c for a, c in zip(r, p, strict=True)]
    return x


def _copy(leaves: Vector) -> Vector:
    return [leaf.clone() for leaf in leaves]


def _stack(results: list[Any]) -> Vector:
    return [torch.stack(column) for column in zip(*results, strict=True)]


def _jax_cross_entropy(logits: Any, y: Any) -> Any:
    import jax

    return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()
