"""A training loop that tunes itself: dropout, augmentation, minibatches, early stopping.

A network is trained on a few digits by Adam, in windows of ten steps. After each window, the
hypergradient of the validation loss through its steps moves the hyperparameters, all on a log
scale: the learning rate, how far the noise of the augmentation goes, and a weight decay for each
layer. Weights and the state of Adam go on from window to window. Training stops when the
validation loss no longer falls, and the weights that were best count. The baseline is the same
loop with the hyperparameters left alone: with a rate that is too small, from which the tuning
starts too, and with one chosen by hand.

    python examples/training_loop.py

Minibatches are indices into tensors that lie still; each step draws its dropout mask and noise as
always, and `hf.Reverse` replays them. The test digits are seen by neither training nor tuning.
"""

from __future__ import annotations

import time

import common
import torch
import torch.nn.functional as F
from datasets import Rows, digits
from torch import Tensor, nn

import hyperfunc as hf

START = {"lr": 1e-4, "noise": 0.1, "decay.0": 1e-4, "decay.2": 1e-4, "decay.5": 1e-4}


def train(args, parts: list[Rows], tune: bool, **changed: float) -> dict:
    data, validation, test = parts
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.3)
    net = nn.Sequential(*layers, nn.Linear(128, 10))
    (noisy, params), (apply, _) = hf.functional(net.train()), hf.functional(net.eval())

    def inner_loss(params: dict, h: dict, *args: Tensor) -> Tensor:
        index = args[-1]  # of this step's minibatch
        x, y = data.x[index], data.y[index]
        logits = noisy(params, x + h["noise"].exp() * torch.randn_like(x))
        decay = sum(h[f"decay.{n}"].exp() * (params[f"{n}.weight"] ** 2).sum() for n in "025")
        return F.cross_entropy(logits, y) + decay

    def outer_loss(params: dict, h: dict, *args: Tensor) -> Tensor:
        return F.cross_entropy(apply(params, validation.x), validation.y)

    def scores(params: dict, rows: Rows) -> tuple[float, float]:
        logits = apply(params, rows.x)
        hits = (logits.argmax(1) == rows.y).float().mean().item()
        return F.cross_entropy(logits, rows.y).item(), hits

    rate = hf.optim.warmup(lambda h: h["lr"].exp(), num_steps=20)
    inner, outer = hf.optim.adam(rate), hf.optim.adam(args.outer_lr)
    h = {name: torch.tensor(value).log() for name, value in {**START, **changed}.items()}
    state, outer_state, begin = inner.init(params), outer.init(h), time.process_time()
    best, waited, history = (float("inf"), params), 0, []
    while waited < args.patience and len(history) < args.windows:
        solver = hf.minimize(
            *(inner_loss, inner, args.steps),
            **{"init": lambda h, w, state: w, "init_state": lambda h, w, state: state},
            **{"inputs": hf.batch_indices(len(data.y), 32, args.steps), "has_aux": True},
        )
        fn = hf.hypergrad_and_solution(solver, outer_loss, method=hf.Reverse())
        grads, solution = fn(h, params, state)
        params, state = solution.params, solution.solver_aux.state
        if tune:
            h, outer_state = outer.update(grads, outer_state, h)
        loss = solution.value.item()
        waited = 0 if loss < best[0] else waited + 1
        best = min(best, (loss, params), key=lambda pair: pair[0])
        history.append({"validation": loss, **{key: x.exp().item() for key, x in h.items()}})
    seconds = time.process_time() - begin
    found = [scores(best[1], part) for part in (validation, test)]
    row = [*(accuracy for _, accuracy in found), seconds]
    return {"history": history, "scores": found, "row": row}


def main(argv: list[str] | None = None) -> dict:
    args = common.options(
        argv,
        __doc__,
        "training_loop",
        **{"steps": (10, "inner steps a window"), "windows": (100, "windows, at most")},
        patience=(30, "windows without a better validation loss"),
        outer_lr=(0.1, "of Adam on the log hyperparameters"),
    )
    parts = digits(200, 400, 1197, seed=0)
    rows = {
        "as they start": train(args, parts, tune=False),
        "as they start, but for lr = 0.001": train(args, parts, tune=False, lr=1e-3),
        "tuned along the way": train(args, parts, tune=True),
    }
    columns = {"validation": ".1%", "test": ".1%", "seconds": ".1f"}
    common.table("accuracy", columns, {title: run["row"] for title, run in rows.items()})
    history = rows["tuned along the way"]["history"]
    print("found:", {name: f"{history[-1][name]:.2g}" for name in START})
    figure, (losses, numbers) = common.panels(2, (12, 4.2))
    curves = {title: [e["validation"] for e in row["history"]] for title, row in rows.items()}
    common.curves(losses, curves, title="validation loss", xlabel="window", yscale="log")
    curves = {name: [e[name] for e in history] for name in START}
    common.curves(numbers, curves, title="when tuned", xlabel="window", yscale="log")
    common.save(args, figure, rows=rows)
    return rows


if __name__ == "__main__":
    common.run(main)
