"""A weight for each document of a language model: which of 2000 texts help the ones that count?

Half of the documents are docstrings, half source code of the same packages, and 200 more docstrings
are what the model should be good at. The outer variables are a logit for each document, whose
sigmoid weighs its loss; the inner problem is to train a small causal transformer on characters; the
outer loss is that of the 200. Four methods learn the logits along one run of Adam, on minibatches
at both levels: loops of `hyperfunc.bilevel`, of which `sama` and `f2sa` take first derivatives
alone, and `truncated` is exact through windows of five steps. Then a network is trained anew on
documents drawn by what was learned, beside one on all and one on the good half alone.

    python examples/data_weights_lm.py
"""

from __future__ import annotations

from functools import partial

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


def plain(state: State, batch: tuple, outer_batch: tuple) -> State:
    """A step of training alone."""
    place = {"init": lambda *_: state.params, "init_state": lambda *_: state.optimizers["inner"]}
    w, aux = hf.minimize(inner_loss, INNER, 1, **place, has_aux=True)(state.hparams, *batch)
    return state._replace(params=w, optimizers=state.optimizers | {"inner": aux.state})


# not adamw, whose decay is not in the inner loss that f2sa and soba take their directions of
INNER, OUTER = hf.optim.adam(hf.optim.warmup(0.003, num_steps=20)), hf.optim.adam(0.1)
BOTH = {"inner_optimizer": INNER, "outer_optimizer": OUTER}
LOOPS = {
    "sama": hf.bilevel.sama(inner_loss, outer_loss, **BOTH),
    "f2sa": hf.bilevel.f2sa(inner_loss, outer_loss, **BOTH, adjoint_optimizer=INNER),
    "soba": hf.bilevel.soba(inner_loss, outer_loss, **BOTH, adjoint_lr=0.01),
    "truncated": hf.bilevel.truncated(inner_loss, outer_loss, **BOTH, num_inner_steps=WINDOW),
}


def follow(name: str, loop: Loop, steps: int, data: list, good: Tensor, draw: Tensor) -> tuple:
    """Steps on documents drawn: the end, the AUC after each, and milliseconds and MiB of one."""
    generator = torch.Generator().manual_seed(0)
    state, seconds, history = loop.init(start, torch.zeros(len(draw))), torch.zeros(steps), []
    size, shape = (WINDOW, (WINDOW, BATCH)) if name == "truncated" else (1, (BATCH,))
    for step in tqdm(range(0, steps, size), desc=name, unit="update"):
        index = torch.multinomial(draw, size * BATCH, True, generator=generator).view(shape)
        i = torch.randint(len(data[1]), (BATCH,), generator=generator)
        update = partial(loop.update, state, (data[0][index], index), (data[1][i],))
        state, seconds[step : step + size] = common.timed(update)
        history += [roc_auc_score(good, state.hparams)] * size
    with common.Meter((0, 0)) as meter:
        update()
    return state, history, (1e3 * seconds.median().item() / size, meter.peak / 2**20)


def main(argv: list[str] | None = None) -> dict:
    args = common.options(argv, __doc__, "data_weights_lm", steps=(200, "of training"))
    data = docstrings_and_code(LENGTH + 1, 1000, 200, 400)
    good = torch.arange(len(data[0])) < len(data[0]) // 2
    draws = {"all documents": torch.ones(len(good)), "the good half alone": good.float()}
    given, curves, costs, rows = (args.steps, data, good), {}, {}, {}
    for name, loop in LOOPS.items():
        state, curves[name], costs[name] = follow(name, loop, *given, draws["all documents"])
        draws[name] = state.hparams.sigmoid()
    training = LOOPS["sama"]._replace(update=plain)
    for name, draw in draws.items():
        state, _, cost = follow(f"trained on {name}", training, *given, draw)
        found = [outer_loss(state.params, draw, part).item() for part in data[1:]]
        rows[name] = [*found, curves.get(name, [None])[-1], *costs.get(name, cost)]
    columns = dict.fromkeys(("validation", "test", "AUC"), ".3f")
    common.table("documents by", columns | {"ms a step": ".0f", "MiB": ".0f"}, rows)
    figure, (axis,) = common.panels(1, (6, 4))
    common.curves(axis, curves, xlabel="step", title="AUC of the weights")
    common.save(args, figure, rows=rows)
    return rows


if __name__ == "__main__":
    common.run(main)
