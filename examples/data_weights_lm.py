"""A weight for each document of a language model: which of 2000 texts help the ones that count?

Half of the documents are docstrings, half source code of the same packages, and 200 more docstrings
are what the model should be good at. The outer variables are a logit for each document, whose
sigmoid weighs its loss; the inner problem is to train a small causal transformer on characters; the
outer loss is that of the 200. Four methods learn the logits along one run of Adam, on minibatches
at both levels: three loops of `hyperfunc.bilevel`, of which `f2sa` and `sama` take first
derivatives alone, and exact hypergradients through windows of five steps. Then a network is trained
anew on documents drawn by what was learned, beside one on all and one on the good half alone.

    python examples/data_weights_lm.py
"""

from __future__ import annotations

import time
from typing import Any

import common
import torch
import torch.nn.functional as F
from datasets import docstrings_and_code
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State

LENGTH, WIDTH, LAYERS, BATCH, WINDOW = 80, 64, 2, 16, 5


class Network(nn.Module):
    """A causal transformer on characters, with the attention that torch's layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.layers(self.embedding(tokens), mask=mask, is_causal=True))


torch.manual_seed(0)
apply, start = hf.functional(Network())


def losses(w: dict, documents: Tensor) -> Tensor:
    logits = apply(w, documents[:, :-1])
    return F.cross_entropy(logits.mT, documents[:, 1:], reduction="none").mean(1)


def outer_loss(w: dict, logits: Tensor, documents: Tensor) -> Tensor:
    return losses(w, documents).mean()


def inner_loss(w: dict, logits: Tensor, documents: Tensor, index: Tensor) -> Tensor:
    weights = logits[index].sigmoid()
    return (weights * losses(w, documents)).sum() / weights.sum()


def windows(size: int, inner: hf.optim.Optimizer, outer: hf.optim.Optimizer | None = None) -> Loop:
    """Some steps on the network, and then one on the logits, exact for these; or none."""

    def init(w: dict, logits: Tensor) -> State:
        return State(0, w, (), logits, (inner.init(w), outer.init(logits) if outer else ()))

    def update(state: State, batch: tuple, outer_batch: tuple) -> State:
        solver = hf.minimize(
            *(lambda w, h, *args: inner_loss(w, h, *args[-1]), inner, size),
            init=lambda h, w, memory: w,
            init_state=lambda h, w, memory: memory,
            inputs=tuple(rows.unflatten(0, (size, -1)) for rows in batch),
            has_aux=True,
        )
        (start, outer_state), logits = state.memory, state.hparams
        if outer is None:
            w, aux = solver(logits, state.params, start)
            return state._replace(params=w, memory=(aux.state, ()))
        of_outer = lambda w, h, *args: outer_loss(w, h, *outer_batch)  # noqa: E731
        fn = hf.hypergrad_and_solution(solver, of_outer, method=hf.Reverse())
        grads, solution = fn(logits, state.params, start)
        logits, outer_state = outer.update(grads, outer_state, logits)
        memory = solution.solver_aux.state, outer_state
        return state._replace(params=solution.params, hparams=logits, memory=memory)

    return Loop(init, update)


def follow(name: str, loop: Loop, steps: int, data: list, draw: Tensor, size: int = 1) -> Any:
    """Updates of some steps on documents drawn: the end, AUCs, CPU seconds a step, and bytes."""
    generator = torch.Generator().manual_seed(0)
    state, seconds, history = loop.init(start, torch.zeros(len(draw))), [], []
    for _ in tqdm(range(steps // size), desc=name, unit="update"):
        index = torch.multinomial(draw, size * BATCH, True, generator=generator)
        i = torch.randint(len(data[1]), (BATCH,), generator=generator)
        batches = (data[0][index], index), (data[1][i],)
        begin = time.process_time()
        state = loop.update(state, *batches)
        seconds.append((time.process_time() - begin) / size)
        history.append(roc_auc_score(data[3], state.hparams))
    with common.Meter((0, 0)) as meter:
        loop.update(state, *batches)
    return state, history, sorted(seconds)[len(seconds) // 2], meter.peak


def main(argv: list[str] | None = None) -> dict:
    args = common.options(argv, __doc__, "data_weights_lm", steps=(200, "of training"))
    data = docstrings_and_code(LENGTH + 1, 1000, 200, 400)
    # not adamw, whose decay is not in the inner loss that f2sa and soba take their directions of
    inner = hf.optim.adam(hf.optim.warmup(0.003, num_steps=20))
    outer = hf.optim.adam(0.1)
    both = {"inner_optimizer": inner, "outer_optimizer": outer}
    loops = {
        "sama": hf.bilevel.sama(inner_loss, outer_loss, **both),
        "f2sa": hf.bilevel.f2sa(inner_loss, outer_loss, **both, adjoint_optimizer=inner),
        "soba": hf.bilevel.soba(inner_loss, outer_loss, **both, adjoint_lr=0.01),
        "Reverse": windows(WINDOW, inner, outer),
    }
    good = torch.arange(len(data[0])) < len(data[0]) // 2
    ones, data = torch.ones(len(good)), [*data, good]
    draws = {"all documents": ones, "the good half alone": good.float()}
    learned, rows = {}, {}
    for name, loop in loops.items():
        size = WINDOW if name == "Reverse" else 1
        learned[name] = follow(name, loop, args.steps, data, ones, size)
        draws[name] = learned[name][0].hparams.sigmoid()
    for title, draw in draws.items():
        state, *cost = follow(f"trained on {title}", windows(1, inner), args.steps, data, draw)
        with torch.no_grad():
            found = [outer_loss(state.params, draw, part).item() for part in data[1:3]]
        history, seconds, size = learned[title][1:] if title in learned else ([None], *cost[1:])
        rows[title] = [*found, history[-1], 1e3 * seconds, size / 2**20]
    columns = dict.fromkeys(("validation", "test", "AUC"), ".3f")
    common.table("documents by", columns | {"ms a step": ".0f", "MiB": ".0f"}, rows)
    figure, (axis,) = common.panels(1, (6, 4))
    for name, (_, history, *_) in learned.items():
        x = torch.arange(1, len(history) + 1) * args.steps // len(history)
        common.curves(axis, {name: history}, x=x, xlabel="step", title="AUC of the weights")
    common.save(args, figure, rows=rows)
    return rows


if __name__ == "__main__":
    common.run(main)
