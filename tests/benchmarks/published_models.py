"""Time and memory of hypergradients of published models, beside the same work in plain torch.

    python -m tests.benchmarks.published_models

The models of ``tests/published_models.py``, with random weights in float32 and the attention that
they have by default, are adapted to four tasks: three steps of gradient descent, pulled to the
start, whose hypergradient is taken with respect to the start and the strength of the pull; ``cg``
takes five steps, and ``soba`` is one update. "By hand" is a loop over the tasks with
``torch.autograd`` and ``create_graph=True``, with the attention "eager", as that by default has no
second derivative. Each hypergradient is compared with that one. Each number comes from a process of
its own, on one thread: the processor time after a warm-up, the better of two, and the peak of
resident memory above what the process held before.

Needs the extra ``models``. Takes about a quarter of an hour; a Markdown table is written to the
output folder row by row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from tests import published_models as models
from tests.benchmarks.memory import resident_sizes
from tests.problems import stack
from tests.published_models import Adaptation, Tree, gradient

TASKS, STEPS, PULL, RATE, CG_STEPS = 4, 3, 3000.0, 1 / 6000, 5
METHODS: dict[str, Any] = {
    "reverse_unroll": "reverse_unroll",
    "reverse": "reverse",
    "cg": hf.CG(maxiter=CG_STEPS, rtol=0),
}
ROUTES: dict[str, Callable[..., Any]] = {
    "one by one": lambda fn, dims: hf.task_map(fn, dims, chunk_size=1),
    "vmap": vmap,
}
HAND = "by hand"
HEADER = (
    "| model | method | one by one: time | memory | vmap: time | memory | error |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
)


def main() -> None:
    """Measure every model by every method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/published-models"))
    parser.add_argument("--only", default="", help="a part of a model's name")
    options = parser.parse_args()
    models.transformers()  # once: the processes that follow are forks of this one
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [*HEADER]
    print(*HEADER, sep="\n", flush=True)
    for model in models.MODELS:
        if options.only not in model.name or model.change is not models.unchanged:
            continue
        hand = {by_hand: measured(model.name, by_hand, HAND) for by_hand in BY_HAND.values()}
        for method, by_hand in BY_HAND.items():
            rows = [measured(model.name, method, route) for route in ROUTES]
            lines.append(line(model.name, method, hand[by_hand], *rows))
            print(lines[-1], flush=True)
            (options.out / "table.md").write_text("\n".join(lines) + "\n")


def line(name: str, method: str, hand: Any, *rows: Any) -> str:
    """A row of the table: times and memory in multiples of those by hand."""
    cells = [f"{row[k] / hand[k]:.2f}" for row in rows for k in ("seconds", "megabytes")]
    error = max((row["result"] - hand["result"]).norm() / hand["result"].norm() for row in rows)
    return f"| {name} | {method} | {' | '.join(cells)} | {error:.0e} |"


def measured(*cell: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, cell)


def measure(name: str, method: Any, route: str) -> dict[str, Any]:
    """The seconds, megabytes and result of a cell, in this process."""
    model = next(model for model in models.MODELS if model.name == name)
    config = {"attn_implementation": "eager"} if route == HAND else {}
    net = models.module(model, models.SMALL, torch.float32, **config)
    tasks = models.tasks(model, models.SMALL, TASKS, torch.float32)
    apply, start = hf.functional(net)
    hparams = {"start": start, "log_pull": torch.tensor(PULL).log()}
    if route == HAND:
        problem = models.by_torch(net)
        compute = lambda: [method(problem, hparams, task) for task in tasks]  # noqa: E731
    else:
        problem = Adaptation(lambda params, batch: apply(params, **batch).loss)
        fn = ROUTES[route](by_hyperfunc(problem, method, hparams), (None, 0))
        compute = lambda: fn(hparams, stack(tasks))  # noqa: E731
    idle = resident_sizes()["VmRSS"]
    result = compute()
    seconds = []
    for _ in range(2):
        begin = time.process_time()
        compute()
        seconds.append(time.process_time() - begin)
    peak = resident_sizes()["VmHWM"] - idle
    if route == HAND:
        result = stack(result)
    flat = torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(result)]).double()
    return {"seconds": min(seconds), "megabytes": peak, "result": flat}


def by_hyperfunc(problem: Adaptation, method: str, hparams: Tree) -> Callable[..., Tree]:
    """A function of hparams and a task."""
    if method == "soba":
        rates = {"inner_lr": RATE, "outer_lr": 1.0}
        loop = hf.bilevel.soba(problem.inner, problem.outer, **rates)
        state = loop.init(hparams["start"], hparams)._replace(adjoint=hparams["start"])

        def update(hparams: Tree, task: Tree) -> Tree:
            new = loop.update(state, (task,), (task,))
            return [new.params, new.adjoint, new.hparams]

        return update
    sgd = hf.optim.sgd(lr=RATE)
    solver = hf.minimize(problem.inner, sgd, STEPS, init=lambda hparams, task: hparams["start"])
    return hf.hypergrad(solver, problem.outer, method=METHODS[method])


def unrolled(problem: Adaptation, hparams: Tree, task: Tree) -> Tree:
    leaves, spec = optree.tree_flatten(hparams)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    hparams = optree.tree_unflatten(spec, leaves)
    params = hparams["start"]
    for _ in range(STEPS):
        grads = gradient(lambda w: problem.inner(w, hparams, task), params, create_graph=True)
        params = optree.tree_map(lambda w, g: w - RATE * g, params, grads)
    value = problem.outer(params, hparams, task)
    return optree.tree_unflatten(spec, list(torch.autograd.grad(value, leaves)))


def linearized(problem: Adaptation, params: Tree, hparams: Tree, task: Tree) -> Any:
    """The inner gradient, and its transposed products with respect to params and hparams."""
    params, hparams = (
        optree.tree_map(lambda leaf: leaf.detach().requires_grad_(), tree)
        for tree in (params, hparams)
    )
    grads = gradient(lambda w: problem.inner(w, hparams, task), params, create_graph=True)

    def product(u: Tree, wanted: Tree) -> Tree:
        leaves, spec = optree.tree_flatten(wanted)
        outputs, vectors = optree.tree_leaves(grads), optree.tree_leaves(u)
        products = torch.autograd.grad(outputs, leaves, vectors, retain_graph=True)
        return optree.tree_unflatten(spec, list(products))

    detached = optree.tree_map(Tensor.detach, grads)
    return detached, lambda u: product(u, params), lambda u: product(u, hparams)


def implicit(problem: Adaptation, hparams: Tree, task: Tree) -> Tree:
    params = hparams["start"]
    for _ in range(STEPS):
        grads = gradient(lambda w: problem.inner(w, hparams, task), params)
        params = optree.tree_map(lambda w, g: w - RATE * g, params, grads)
    r = gradient(lambda w: problem.outer(w, hparams, task), params)
    _, hessian, cross = linearized(problem, params, hparams, task)
    u, p = optree.tree_map(torch.zeros_like, r), r
    for _ in range(CG_STEPS):
        Ap = hessian(p)
        rr = dot(r, r)
        alpha = rr / dot(p, Ap)
        u, r = added(u, p, alpha), added(r, Ap, -alpha)
        p = added(r, p, dot(r, r) / rr)
    return optree.tree_map(torch.neg, cross(u))


def soba(problem: Adaptation, hparams: Tree, task: Tree) -> Tree:
    params = adjoint = hparams["start"]
    grads, hessian, cross = linearized(problem, params, hparams, task)
    outer = gradient(lambda w: problem.outer(w, hparams, task), params)
    residual = added(hessian(adjoint), outer, -1.0)
    new = added(hparams, cross(adjoint), 1.0)
    return [added(params, grads, -RATE), added(adjoint, residual, -RATE), new]


def added(x: Tree, y: Tree, factor: Any) -> Tree:
    return optree.tree_map(lambda a, b: a + factor * b, x, y)


def dot(x: Tree, y: Tree) -> Any:
    return sum((a * b).sum() for a, b in zip(*map(optree.tree_leaves, (x, y)), strict=True))


BY_HAND: dict[str, Callable[[Adaptation, Tree, Tree], Tree]] = {
    "reverse_unroll": unrolled,
    "reverse": unrolled,
    "cg": implicit,
    "soba": soba,
}


if __name__ == "__main__":
    main()
