"""MAML and its kin on sinusoids: each of them is a few lines of the same ingredients.

A task is a sine of random amplitude and phase, seen at ten points; the outer loss is the error at
ten others, after a few steps from the meta-parameters. What is learned, and how it is
differentiated, tells the members of the family apart:

    MAML        the start, through the steps                          method="reverse_unroll"
    FOMAML      the start, with the inner gradients as constants      method="first_order"
    ANIL        the start, of which the last layer alone adapts       other params than hparams
    Meta-SGD    the start and a rate for each parameter               lr=lambda h: exp(h["rates"])
    MAML++      the start and a rate for each step and layer; the     the loss as part of the state
                loss after each step counts
    Reptile     the start, towards the adapted parameters             no outer loss
    iMAML       the start, to which the solution is pulled back       hf.proximal, method=hf.CG(...)

    python examples/meta_learning_kin.py

References: Finn, Abbeel and Levine, arXiv 1703.03400 (MAML, FOMAML); Raghu et al., arXiv 1909.09157
(ANIL); Li et al., arXiv 1707.09835 (Meta-SGD); Antoniou, Edwards and Storkey, arXiv 1810.09502
(MAML++); Nichol, Achiam and Schulman, arXiv 1803.02999 (Reptile); Rajeswaran et al., arXiv
1909.04630 (iMAML).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from tqdm import tqdm

import hyperfunc as hf

torch.manual_seed(0)  # of the weights
NET = torch.nn.Sequential(
    *(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU()),
    torch.nn.Linear(40, 1),
)
APPLY, START = hf.functional(NET)
HEAD = ("4.weight", "4.bias")

# What a member is: its hparams, (hparams, task) -> (hypergradient, value), and the adapted weights.
Member = tuple[Any, Callable[..., Any], Callable[..., Any]]


def loss(w, h, task):
    """The error at the points that the task shows."""
    return ((APPLY(w, task["x"]) - task["y"]) ** 2).mean()


def query_loss(w, h, task):
    """The error at the others."""
    return ((APPLY(w, task["x_query"]) - task["y_query"]) ** 2).mean()


def maml(rate, steps, method="reverse_unroll") -> Member:
    adapt = hf.minimize(loss, hf.optim.sgd(rate), steps, init=lambda h, task: h)
    return START, hf.hypergrad_and_value(adapt, query_loss, method=method), adapt


def fomaml(rate, steps) -> Member:
    return maml(rate, steps, "first_order")


def anil(rate, steps) -> Member:
    head = hf.minimize(
        lambda w, h, task: loss(h | w, h, task),
        hf.optim.sgd(rate),
        steps,
        init=lambda h, task: {name: h[name] for name in HEAD},
    )
    outer_loss = lambda w, h, task: query_loss(h | w, h, task)  # noqa: E731
    fn = hf.hypergrad_and_value(head, outer_loss, method="reverse_unroll")
    return START, fn, lambda h, task: h | head(h, task)


def meta_sgd(rate, steps) -> Member:
    rates = {name: torch.full_like(leaf, math.log(rate)) for name, leaf in START.items()}
    h = {"start": START, "rates": rates}
    optimizer = hf.optim.sgd(lr=lambda h: {name: r.exp() for name, r in h["rates"].items()})
    adapt = hf.minimize(loss, optimizer, steps, init=lambda h, task: h["start"])
    return h, hf.hypergrad_and_value(adapt, query_loss, method="reverse_unroll"), adapt


def maml_plus_plus(rate, steps) -> Member:
    rates = {name: torch.full((steps,), math.log(rate)) for name in START}
    h = {"start": START, "rates": rates}

    def step(state, h, task, t):
        grads = torch.func.grad(loss)(state["w"], h, task)
        rates = {name: rate[t].exp() for name, rate in h["rates"].items()}
        w = {name: leaf - rates[name] * grads[name] for name, leaf in state["w"].items()}
        return {"w": w, "loss": state["loss"] + query_loss(w, h, task) / steps}

    begin = lambda h, task: {"w": h["start"], "loss": torch.zeros(())}  # noqa: E731
    adapt = hf.iterate(step, steps, init=begin, inputs=torch.arange(steps))
    outer_loss = lambda state, h, task: state["loss"]  # noqa: E731
    fn = hf.hypergrad_and_value(adapt, outer_loss, method="reverse_unroll")
    return h, fn, lambda h, task: adapt(h, task)["w"]


def reptile(rate, steps) -> Member:
    adapt = hf.minimize(loss, hf.optim.sgd(rate), steps, init=lambda h, task: h)

    def towards(h, task):
        w = adapt(h, task)
        return {name: h[name] - leaf for name, leaf in w.items()}, query_loss(w, h, task)

    return START, towards, adapt


def imaml(rate, steps) -> Member:
    pulled = hf.proximal(loss, weight=1.0)
    adapt = hf.minimize(pulled, hf.optim.sgd(rate), 3 * steps, init=lambda h, task: h)
    method = hf.CG(maxiter=5, rtol=0, negative_curvature="stop")
    return START, hf.hypergrad_and_value(adapt, query_loss, method=method), adapt


MEMBERS = {
    "MAML": maml,
    "FOMAML": fomaml,
    "ANIL": anil,
    "Meta-SGD": meta_sgd,
    "MAML++": maml_plus_plus,
    "Reptile": reptile,
    "iMAML": imaml,
}


def draw(num_tasks: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    x, x_query = (10 * uniform(num_tasks, 10, 1) - 5 for _ in range(2))
    size, phase = 0.1 + 4.9 * uniform(num_tasks, 1, 1), torch.pi * uniform(num_tasks, 1, 1)
    sine = lambda x: size * torch.sin(x - phase)  # noqa: E731
    return {"x": x, "y": sine(x), "x_query": x_query, "y_query": sine(x_query)}


def main(argv: list[str] | None = None) -> None:
    args = common.options(
        argv,
        __doc__,
        "meta_learning_kin",
        steps=(5, "inner steps; iMAML takes three times as many"),
        inner_lr=(0.01, "the rate of the inner steps, or where it starts"),
        iterations=(500, "outer iterations"),
        meta_lr=(0.001, "of Adam on the outer variables"),
        tasks=(25, "tasks in an outer step"),
        seed=(0, "of the tasks"),
    )
    rows: dict[str, list[float]] = {}
    history: dict[str, list[float]] = {}
    test = draw(600, torch.Generator().manual_seed(args.seed + 1))
    for name, make in MEMBERS.items():
        generator = torch.Generator().manual_seed(args.seed)
        h, fn, adapt = make(args.inner_lr, args.steps)
        h = torch.utils._pytree.tree_map(torch.clone, h)
        mean = hf.task_map(fn, in_dims=(None, 0), reduce="mean")
        leaves = torch.utils._pytree.tree_leaves(h)
        optimizer = torch.optim.Adam(leaves, lr=args.meta_lr)
        begin = time.perf_counter()
        values = []
        for _ in tqdm(range(args.iterations), desc=name, leave=False):
            grads, value = mean(h, draw(args.tasks, generator))
            hf.assign_grads(h, grads)
            torch.nn.utils.clip_grad_norm_(leaves, max_norm=10.0)
            optimizer.step()
            values.append(value.item())
        history[name] = values
        seconds = (time.perf_counter() - begin) / args.iterations
        adapted = hf.task_map(adapt, in_dims=(None, 0))(h, test)
        errors = torch.func.vmap(query_loss, in_dims=(0, None, 0))(adapted, None, test)
        interval = 1.96 * errors.std().item() / len(errors) ** 0.5
        rows[name] = [errors.mean().item(), interval, 1e3 * seconds]
    columns = {"error on 600 tasks": ".3f", "±": ".3f", "ms an iteration": ".1f"}
    common.table("", columns, rows)
    w = min(25, args.iterations)
    figure, (axis,) = common.panels(1, (7, 3.8))
    smooth = {name: torch.tensor(line).unfold(0, w, 1).mean(1) for name, line in history.items()}
    common.curves(axis, smooth, title="outer loss", xlabel="outer step", yscale="log")
    common.save(args, figure, rows=rows)


if __name__ == "__main__":
    common.run(main)
