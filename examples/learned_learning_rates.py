"""Learning rates learned by hypergradients, on scikit-learn's digits.

A small network is trained for T full-batch steps of gradient descent with momentum. The outer
variables are the settings of these steps, and the outer loss is the validation loss after them:

    v_{t+1} = mu_t v_t + grad l(w_t),    w_{t+1} = w_t - eta_{t,layer} v_{t+1}

Two parametrisations, each with the method that fits it:

- a rate for each step and layer, and a momentum for each step (5 T numbers): reverse mode, by
  `Reverse`, which replays the steps, so that one step's graph is held at a time;
- a rate for each layer and one momentum (5 numbers): forward mode, by `ForwardMode`, whose memory
  does not depend on T.

Both are compared with the best constant rate and momentum on a grid, chosen on the same
validation set, on test rows that neither has seen.

    python examples/learned_learning_rates.py

Reference: Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based
hyperparameter optimization, 2017, arXiv 1703.01785.
"""

from __future__ import annotations

import itertools

import common
import torch
import torch.nn.functional as F
from datasets import stratified_digits
from tqdm import tqdm

import hyperfunc as hf

RATES, MOMENTA = [0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2], [0.0, 0.5, 0.8, 0.9, 0.95]


def main(argv: list[str] | None = None) -> None:
    args = common.options(
        argv,
        __doc__,
        "learned_learning_rates",
        steps=(50, "T, the steps of training"),
        iterations=(150, "outer iterations"),
        outer_lr=(0.05, "of Adam on the outer variables"),
        seed=(0, "of the split and the network"),
    )
    torch.manual_seed(args.seed)
    train, val, test = stratified_digits(500, 500, seed=args.seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    apply, start = hf.functional(net)
    layers = list(start)  # the weights and biases of both layers

    def loss(w, hparams, x, y, *_):
        return F.cross_entropy(apply(w, x), y)

    def val_loss(state, hparams, *_):
        return loss(state["w"], hparams, *val)

    def step(state, hparams, x, y, t):
        """One step; `t` is the number of the step, or 0 where all steps share their settings."""
        rate, momentum = hparams["log_rate"][t].exp(), hparams["momentum"][t].sigmoid()
        grads, _ = gradient(state["w"], hparams, x, y)
        v = {k: momentum * state["v"][k] + grads[k] for k in layers}
        return {
            "w": {k: state["w"][k] - r * v[k] for k, r in zip(layers, rate, strict=True)},
            "v": v,
        }

    gradient = torch.func.grad_and_value(loss)

    def solver(numbers):
        rest = {"w": start, "v": {k: torch.zeros_like(p) for k, p in start.items()}}
        return hf.iterate(step, args.steps, init=lambda hparams, x, y: rest, inputs=numbers)

    def settings(rate, momentum, steps):
        logit = torch.tensor(momentum).clamp(0.02, 0.98).logit()
        return {
            "log_rate": torch.full((steps, len(layers)), rate).log(),
            "momentum": logit.repeat(steps),
        }

    def scores(hparams, numbers):
        w = solver(numbers)(hparams, *train)["w"]
        hits = (apply(w, test[0]).argmax(1) == test[1]).float().mean()
        return loss(w, None, *val).item(), loss(w, None, *test).item(), hits.item()

    shared, by_step = torch.zeros(args.steps, dtype=torch.int64), torch.arange(args.steps)
    grid = {pair: scores(settings(*pair, 1), shared) for pair in itertools.product(RATES, MOMENTA)}
    best = min(grid, key=lambda pair: grid[pair][0])
    rows = {f"best constant on a grid of {len(grid)}": grid[best]}

    def learn(title, hparams, numbers, method):
        hypergradient = hf.hypergrad_and_value(solver(numbers), val_loss, method=method)
        optimizer = torch.optim.Adam(hparams.values(), lr=args.outer_lr)
        curve = []
        for _ in (bar := tqdm(range(args.iterations), desc=title, unit="it")):
            grads, value = hypergradient(hparams, *train)
            hf.assign_grads(hparams, grads)
            optimizer.step()
            curve.append(value.item())
            bar.set_postfix(val_loss=curve[-1])
        rows[title] = scores(hparams, numbers)
        return hparams, curve

    constant = settings(*best, 1)
    one_each = learn("a rate for each layer (ForwardMode)", constant, shared, hf.ForwardMode())
    schedule = settings(*best, args.steps)
    all_steps = learn("a rate for each step and layer (Reverse)", schedule, by_step, hf.Reverse())

    columns = {"validation loss": ".4f", "test loss": ".4f", "test accuracy": ".1%"}
    common.table(f"after {args.steps} steps", columns, rows)
    print(f"(best constant: rate {best[0]}, momentum {best[1]})")
    figure = picture(layers, best, one_each, all_steps, rows)
    common.save(args, figure, rows=rows, best_constant=best)


def picture(layers, best, one_each, all_steps, rows):
    figure, (rates, momentum, curves) = common.panels(3, (13, 3.8))
    names = [f"{'first' if k[0] == '0' else 'second'} layer, {k[2:]}" for k in layers]
    for index, rate in enumerate(one_each[0]["log_rate"][0].exp()):
        rates.axhline(rate, color=f"C{index}", ls=":")
    rates.axhline(best[0], color="black", ls="--", label="best constant")
    learned = dict(zip(names, all_steps[0]["log_rate"].exp().T, strict=True))
    title = "learned rates (dotted: one for all steps)"
    common.curves(rates, learned, title=title, xlabel="step", yscale="log")
    momentum.axhline(one_each[0]["momentum"][0].sigmoid(), color="C0", ls=":", label="one")
    momentum.axhline(best[1], color="black", ls="--", label="best constant")
    learned = {"each step": all_steps[0]["momentum"].sigmoid()}
    common.curves(momentum, learned, title="learned momentum", xlabel="step", ylim=(0, 1))
    curves.axhline(next(iter(rows.values()))[0], color="black", ls="--", label="best constant")
    losses = dict(zip(list(rows)[1:], (one_each[1], all_steps[1]), strict=True))
    title = "validation loss after the steps"
    common.curves(curves, losses, title=title, xlabel="outer iteration", yscale="log")
    return figure


if __name__ == "__main__":
    common.run(main)
