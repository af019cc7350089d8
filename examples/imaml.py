"""Meta-learning with implicit gradients (iMAML), on letters of scripts never seen in training.

The network adapts to a task by minimising the loss on its few labelled drawings, tethered to the
meta-parameters m (the outer variables):

    w*(m) = argmin_w  cross_entropy(w; support set) + reg / 2 ||w - m||^2

The meta-parameters minimise the loss of w*(m) on further drawings, on average over tasks. With H
the Hessian of the inner loss at w*, the implicit gradient of that is reg H^-1 dE/dw*: no step of
the adaptation is differentiated, and none is stored.

    python examples/imaml.py
    python examples/imaml.py --data omniglot --root DIR --ways 20
    torchrun --standalone --nproc-per-node 2 examples/imaml.py  # the tasks shared by two processes

Reference: Rajeswaran, Finn, Kakade and Levine, Meta-learning with implicit gradients, 2019,
arXiv 1909.04630.
"""

from __future__ import annotations

import argparse
from typing import Any

import fewshot
import torch
import torch.nn.functional as F
from fewshot import Tasks
from torch import Tensor

import hyperfunc as hf

Params = dict[str, Tensor]


def main(argv: list[str] | None = None) -> None:
    args, data = fewshot.prepare(parser(), argv)
    net = fewshot.ConvNet(args.ways, torch.Generator().manual_seed(args.seed))
    apply, meta = hf.functional(net.to(args.device))

    # A task is what vmap leaves of a batch of tasks: tensors without the task dimension.
    def support_loss(params: Params, meta: Params, task: Tasks) -> Tensor:
        distance = sum(((params[name] - meta[name]) ** 2).sum() for name in meta)
        loss = F.cross_entropy(apply(params, task.support_x), task.support_y)
        return loss + 0.5 * args.reg * distance

    def query_loss(params: Params, meta: Params, task: Tasks) -> tuple[Tensor, Tensor]:
        logits = apply(params, task.query_x)
        return F.cross_entropy(logits, task.query_y), logits

    @hf.hypergrad_and_solution(
        outer_loss=query_loss,
        inner_loss=support_loss,
        method=linear_solver(args),
        has_aux=True,
        throw=False,
    )
    def adapt(meta: Params, task: Tasks) -> Params:
        params = meta
        for _ in range(args.inner_steps):
            grads = torch.func.grad(support_loss)(params, meta, task)
            params = {name: params[name] - args.inner_lr * grads[name] for name in params}
        return params

    # One call for all tasks: hypergradients, query losses and logits come with a first dimension
    # for the task. Under torchrun, the tasks are those of this process.
    def adapt_all(meta: Params, tasks: Tasks) -> tuple[Params, tuple[Tensor, Tensor, Tensor]]:
        grads, solution = torch.func.vmap(adapt, in_dims=(None, 0))(meta, tasks)
        # The inner loss of a task need not be convex; where CG met negative curvature, leave out.
        solved = solution.stats.result == hf.RESULTS.success
        kept = {name: torch.where(rows(solved, grad), grad, 0.0) for name, grad in grads.items()}
        return kept, (solution.value, solution.aux, solved)

    def predict(meta: Params, tasks: Tasks) -> Tensor:
        solver = adapt.__wrapped__  # adapt without its differentiation rule
        params = torch.func.vmap(solver, in_dims=(None, 0))(meta, tasks)
        return torch.func.vmap(apply)(params, tasks.query_x).argmax(-1)

    optimizer = torch.optim.Adam(meta.values(), lr=args.meta_lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.iterations)
    run = fewshot.Run(args, data, meta, predict, optimizer=optimizer, schedule=schedule)
    # Sums the hypergradients over the processes, and gathers the rest: one process sends nothing.
    hypergradient = hf.distributed.task_parallel(adapt_all, reduce="sum")
    for tasks in run.training():
        grads, (loss, logits, solved) = hypergradient(meta, hf.distributed.local_tasks(tasks))
        if solved.any():
            hf.assign_grads(meta, {name: grad / solved.sum() for name, grad in grads.items()})
            optimizer.step()
            schedule.step()
        hits = (logits.argmax(-1) == tasks.query_y).float()
        run.record(loss=loss.mean(), accuracy=hits.mean(), solved=solved.float().mean())
    run.report(f"iMAML ({args.method})", "iMAML")


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of tasks in a shape that broadcasts against a tensor for each of them."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def parser() -> argparse.ArgumentParser:
    parser = fewshot.argument_parser("Meta-learn an initialisation with iMAML", "out/imaml")
    add = parser.add_argument
    add("--method", choices=tuple(SOLVERS), default="cg", help="linear solver for the adjoint")
    add("--solver-steps", type=fewshot.positive(int), default=3, help="its steps")
    add("--reg", type=fewshot.positive(float), default=1.0, help="pull towards the meta-parameters")
    return parser


SOLVERS = {
    "cg": hf.CG,
    "neumann": hf.Neumann,
    "fixed_point": hf.FixedPoint,
    "normal_cg": hf.NormalCG,
}


def linear_solver(args: argparse.Namespace) -> Any:
    """A method of exactly so many steps, so that no tolerance is looked up between them."""
    settings: dict[str, Any] = {"maxiter": args.solver_steps, "rtol": 0.0, "atol": 0.0}
    if args.method in ("neumann", "fixed_point"):
        settings["step_size"] = args.inner_lr  # these two descend like the inner solver
    return SOLVERS[args.method](**settings)


if __name__ == "__main__":
    main()
