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

import argparse
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hyperfunc as hf

RATES, MOMENTA = [0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2], [0.0, 0.5, 0.8, 0.9, 0.95]


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(1)  # the matrices are small
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train, val, test = digits(args.seed)
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

    print(f"\n{'after ' + str(args.steps) + ' steps':44s}validation loss  test loss  test accuracy")
    for title, (validation, held_out, accuracy) in rows.items():
        print(f"{title:44s}{validation:15.4f}{held_out:11.4f}{accuracy:15.1%}")
    print(f"(best constant: rate {best[0]}, momentum {best[1]})")
    numbers = {"rows": rows, "best_constant": best, "settings": vars(args) | {"out": None}}
    (args.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
    picture(args.out / "picture.png", layers, best, one_each, all_steps, rows)


def digits(seed):
    """Rows of scikit-learn's digits for training, validation and test: 500, 500 and 797."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    rest, test = train_test_split(range(len(y)), train_size=1000, stratify=y, random_state=seed)
    train, val = train_test_split(rest, train_size=500, stratify=y[rest], random_state=seed)
    return [(x[rows], y[rows]) for rows in (train, val, test)]


def picture(path, layers, best, one_each, all_steps, rows):
    figure, (rates, momentum, curves) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    names = [f"{'first' if k[0] == '0' else 'second'} layer, {k[2:]}" for k in layers]
    for index, name in enumerate(names):
        (line,) = rates.plot(all_steps[0]["log_rate"][:, index].exp(), label=name)
        rates.axhline(one_each[0]["log_rate"][0, index].exp(), color=line.get_color(), ls=":")
    rates.axhline(best[0], color="black", ls="--", label="best constant")
    rates.set(title="learned rates (dotted: one for all steps)", xlabel="step", yscale="log")
    rates.legend(fontsize=8)
    momentum.plot(all_steps[0]["momentum"].sigmoid(), label="each step")
    momentum.axhline(one_each[0]["momentum"][0].sigmoid(), color="C0", ls=":", label="one")
    momentum.axhline(best[1], color="black", ls="--", label="best constant")
    momentum.set(title="learned momentum", xlabel="step", ylim=(0, 1))
    momentum.legend(fontsize=8)
    for (title, _), (_, curve) in zip(list(rows.items())[1:], (one_each, all_steps), strict=True):
        curves.plot(curve, label=title)
    curves.axhline(next(iter(rows.values()))[0], color="black", ls="--", label="best constant")
    curves.set(title="validation loss after the steps", xlabel="outer iteration", yscale="log")
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parser():
    parser = argparse.ArgumentParser(
        description="Learn learning rates and momentum by hypergradients",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=50, help="T, the steps of training")
    add("--iterations", type=int, default=150, help="outer iterations")
    add("--outer-lr", type=float, default=0.05, help="of Adam on the outer variables")
    add("--seed", type=int, default=0, help="of the split and the network")
    add("--out", type=Path, default=Path("out/learned_learning_rates"), help="folder for results")
    return parser


if __name__ == "__main__":
    main()
