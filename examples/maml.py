"""Model-agnostic meta-learning (MAML), on letters of scripts never seen in training.

The network adapts to a task by a few gradient steps on its labelled drawings, from the
meta-parameters m (the outer variables):

    w_0 = m,    w_{t+1} = w_t - lr * grad cross_entropy(w_t; support set)

The meta-parameters minimise the loss of w_T(m) on further drawings, on average over tasks. Here
the steps themselves are differentiated (iterative differentiation); examples/imaml.py solves the
same tasks with the implicit gradient. With --first-order the gradients in the steps count as
constants, which saves the second derivatives.

    python examples/maml.py
    python examples/maml.py --first-order
    python examples/maml.py --data omniglot --root DIR --ways 20

Reference: Finn, Abbeel and Levine, Model-agnostic meta-learning, 2017, arXiv 1703.03400.
"""

from __future__ import annotations

import argparse

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

    def support_loss(params: Params, meta: Params, task: Tasks) -> Tensor:
        return F.cross_entropy(apply(params, task.support_x), task.support_y)

    def query_loss(params: Params, meta: Params, task: Tasks) -> tuple[Tensor, Tensor]:
        logits = apply(params, task.query_x)
        return F.cross_entropy(logits, task.query_y), logits

    adapt = hf.minimize(
        support_loss, hf.optim.sgd(args.inner_lr), args.inner_steps, init=lambda meta, task: meta
    )
    method = "first_order" if args.first_order else "reverse" if args.replay else "reverse_unroll"
    hypergradient = hf.hypergrad_and_value(adapt, query_loss, method=method, has_aux=True)

    def predict(meta: Params, tasks: Tasks) -> Tensor:
        params = torch.func.vmap(adapt, in_dims=(None, 0))(meta, tasks)
        return torch.func.vmap(apply)(params, tasks.query_x).argmax(-1)

    optimizer = torch.optim.Adam(meta.values(), lr=args.meta_lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.iterations)
    run = fewshot.Run(args, data, meta, predict, optimizer=optimizer, schedule=schedule)
    for tasks in run.training():
        grads, (loss, logits) = torch.func.vmap(hypergradient, in_dims=(None, 0))(meta, tasks)
        hf.assign_grads(meta, {name: grad.mean(0) for name, grad in grads.items()})
        optimizer.step()
        schedule.step()
        hits = (logits.argmax(-1) == tasks.query_y).float()
        run.record(loss=loss.mean(), accuracy=hits.mean())
    name = "first-order MAML" if args.first_order else "MAML"
    run.report(name, name)


def parser() -> argparse.ArgumentParser:
    parser = fewshot.argument_parser("Meta-learn an initialisation with MAML", "out/maml")
    add = parser.add_argument
    add("--first-order", action="store_true", help="gradients in the inner steps are constants")
    add("--replay", action="store_true", help="compute the steps again instead of keeping graphs")
    return parser


if __name__ == "__main__":
    main()
