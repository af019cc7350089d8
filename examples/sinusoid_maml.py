"""MAML on sinusoids: the same numbers as by hand, and the time and memory that they take.

A task is a sine of random amplitude and phase, seen at ten points; the network 1-40-40-1 takes one
step of gradient descent on these, and the meta-parameters that it starts from minimise the error at
ten other points. `torch.func.vmap` maps one task to a batch of them. The baseline is what one
would write without the library: batched matrix products for this network, and autograd twice.

    python examples/sinusoid_maml.py
    python examples/sinusoid_maml.py --compile 1

examples/meta_learning_kin.py has the kin of MAML on the same tasks.

Reference: Finn, Abbeel and Levine, Model-agnostic meta-learning, 2017, arXiv 1703.03400.
"""

from __future__ import annotations

import common
import torch
from meta_learning_kin import APPLY, START, draw

import hyperfunc as hf

RATE = 0.01


def loss(w, meta, task):
    return ((APPLY(w, task["x"]) - task["y"]) ** 2).mean()


def query_loss(w, meta, task):
    return ((APPLY(w, task["x_query"]) - task["y_query"]) ** 2).mean()


adapt = hf.minimize(loss, hf.optim.sgd(RATE), 1, init=lambda meta, task: meta)


def by_library(**options):
    one = hf.hypergrad(adapt, query_loss, method="reverse_unroll", **options)
    every = torch.func.vmap(one, in_dims=(None, 0))
    return lambda meta, tasks: {name: g.mean(0) for name, g in every(meta, tasks).items()}


def by_hand(meta, tasks):
    meta = {name: leaf.detach().requires_grad_() for name, leaf in meta.items()}
    w = {name: leaf.expand(len(tasks["x"]), *leaf.shape) for name, leaf in meta.items()}

    def errors(w, x, y):
        for i in (0, 2, 4):
            x = torch.baddbmm(w[f"{i}.bias"].unsqueeze(1), x, w[f"{i}.weight"].mT)
            x = x if i == 4 else torch.relu(x)
        return ((x - y) ** 2).mean((1, 2))

    total = errors(w, tasks["x"], tasks["y"]).sum()
    grads = torch.autograd.grad(total, w.values(), create_graph=True)
    w = {name: leaf - RATE * grad for (name, leaf), grad in zip(w.items(), grads, strict=True)}
    mean = errors(w, tasks["x_query"], tasks["y_query"]).mean()
    return dict(zip(meta, torch.autograd.grad(mean, meta.values()), strict=True))


def main(argv: list[str] | None = None) -> dict:
    args = common.options(
        argv,
        __doc__,
        "sinusoid_maml",
        iterations=(1000, "outer iterations"),
        tasks=(25, "tasks in an outer step"),
        compile=(0, "whether to compile, too, which takes a minute: 0 or 1"),
    )
    ways = {"by hand": by_hand, "hyperfunc": by_library()}
    if args.compile:
        ways["hyperfunc, compiled"] = by_library(compile=True)
    test, history, rows = draw(600, torch.Generator().manual_seed(1)), {}, {}
    for name, hypergradient in {"not learned": None, **ways}.items():
        meta, generator = START, torch.Generator().manual_seed(0)
        optimizer, seconds, held = hf.optim.adam(1e-3), 0.0, None
        state = optimizer.init(meta)
        if hypergradient:
            hypergradient(meta, draw(args.tasks, torch.Generator()))  # the first call compiles
        for _ in range(args.iterations if hypergradient else 0):
            tasks = draw(args.tasks, generator)
            grads, passed = common.timed(hypergradient, meta, tasks)
            seconds += passed
            meta, state = optimizer.update(grads, state, meta)
        if name in ("by hand", "hyperfunc"):  # of compiled code torch does not tell
            with common.Meter((0, 0)) as meter:
                hypergradient(meta, tasks)
            held = meter.peak / 2**20
        adapted = torch.func.vmap(adapt, in_dims=(None, 0))(meta, test)
        errors = torch.func.vmap(query_loss, in_dims=(0, None, 0))(adapted, None, test)
        history[name] = errors.sort().values.tolist()
        rows[name] = errors.mean().item(), 1e3 * seconds / args.iterations or None, held
    columns = {"error on 600 tasks": ".3f", "ms an iteration": ".2f", "memory (MiB)": ".2f"}
    common.table("", columns, rows)
    figure, (axis,) = common.panels(1, (7, 3.8))
    common.curves(axis, history, title="errors of the test tasks", xlabel="task", yscale="log")
    common.save(args, figure, rows=rows)
    return rows


if __name__ == "__main__":
    common.run(main)
