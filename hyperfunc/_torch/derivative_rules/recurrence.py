"""Recurrent cells and layers, step by step in time.

Torch's cells write in place, which fails under ``vmap`` where the state they start from is not
mapped; its layers have no rule for ``vmap``, and on a GPU no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfunc._torch.derivative_rules._mode import in_place_of

State = tuple[Tensor, ...]
Weights = Sequence[Any]  # weight_ih, weight_hh, bias_ih, bias_hh and, for a projection, weight_hr


@in_place_of(torch.rnn_tanh_cell)
def rnn_tanh_cell(input: Tensor, hx: Tensor, *weights: Any, **named: Any) -> Tensor:
    return _cell(_tanh, input, (hx,), weights, named)[0]


@in_place_of(torch.rnn_relu_cell)
def rnn_relu_cell(input: Tensor, hx: Tensor, *weights: Any, **named: Any) -> Tensor:
    return _cell(_relu, input, (hx,), weights, named)[0]


@in_place_of(torch.gru_cell)
def gru_cell(input: Tensor, hx: Tensor, *weights: Any, **named: Any) -> Tensor:
    return _cell(_gru, input, (hx,), weights, named)[0]


@in_place_of(torch.lstm_cell)
def lstm_cell(input: Tensor, hx: State, *weights: Any, **named: Any) -> State:
    return _cell(_lstm, input, tuple(hx), weights, named)


@in_place_of(torch.rnn_tanh)
def rnn_tanh(*args: Any) -> Any:
    return _layers(_tanh, *args)


@in_place_of(torch.rnn_relu)
def rnn_relu(*args: Any) -> Any:
    return _layers(_relu, *args)


@in_place_of(torch.gru)
def gru(*args: Any) -> Any:
    return _layers(_gru, *args)


@in_place_of(torch.lstm)
def lstm(*args: Any) -> Any:
    return _layers(_lstm, *args)


def _tanh(x: Tensor, state: State, weights: Weights) -> State:
    return ((x + F.linear(state[0], weights[1], weights[3])).tanh(),)


def _relu(x: Tensor, state: State, weights: Weights) -> State:
    return ((x + F.linear(state[0], weights[1], weights[3])).relu(),)


def _gru(x: Tensor, state: State, weights: Weights) -> State:
    (h,) = state
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = F.linear(h, weights[1], weights[3]).chunk(3, -1)
    update = (x_update + h_update).sigmoid()
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return (new + update * (h - new),)


def _lstm(x: Tensor, state: State, weights: Weights) -> State:
    h, c = state
    gates = x + F.linear(h, weights[1], weights[3])
    enter, keep, new, leave = gates.chunk(4, -1)
    c = keep.sigmoid() * c + enter.sigmoid() * new.tanh()
    h = leave.sigmoid() * c.tanh()
    return (h if len(weights) < 5 else F.linear(h, weights[4])), c


def _cell(
    step: Callable[..., State], input: Tensor, state: State, weights: Weights, named: Any
) -> State:
    w_ih, w_hh, b_ih, b_hh = (*weights, *named.values(), None, None)[:4]
    return step(F.linear(input, w_ih, b_ih), state, (w_ih, w_hh, b_ih, b_hh))


def _layers(step: Callable[..., State], *args: Any) -> Any:
    """Several layers, one or both ways, over a padded batch or over packed sequences."""
    batch_sizes = None
    if isinstance(args[3], bool):
        input, hx, params, has_biases, num_layers, dropout, train, both_ways, batch_first = args
        x = input.transpose(0, 1) if batch_first else input
    else:
        x, batch_sizes, hx, params, has_biases, num_layers, dropout, train, both_ways = args
        batch_sizes, batch_first = batch_sizes.tolist(), False
    starts = hx if isinstance(hx, tuple | list) else (hx,)
    ways = 2 if both_ways else 1
    size = len(params) // (num_layers * ways)
    ends = []
    for layer in range(num_layers):
        outputs = []
        for way in range(ways):
            place = layer * ways + way
            weights = list(params[place * size : (place + 1) * size])
            if not has_biases:
                weights[2:2] = [None, None]
            start = tuple(part[place] for part in starts)
            output, end = _run(step, x, start, weights, batch_sizes, backwards=way == 1)
            outputs.append(output)
            ends.append(end)
        x = torch.cat(outputs, -1) if ways == 2 else outputs[0]
        if dropout and train and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(part) for part in zip(*ends, strict=True)))


def _run(
    step: Callable[..., State],
    x: Tensor,
    state: State,
    weights: Weights,
    batch_sizes: list[int] | None,
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """One layer, one way: its outputs in order of time, and where its state ends."""
    x = F.linear(x, weights[0], weights[2])
    if batch_sizes is not None:
        return _run_packed(step, x, state, weights, batch_sizes, backwards=backwards)
    outputs = []
    rows = x.unbind(0)
    for row in reversed(rows) if backwards else rows:
        state = step(row, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _run_packed(
    step: Callable[..., State],
    x: Tensor,
    state: State,
    weights: Weights,
    batch_sizes: list[int],
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    outputs = []
    rows = x.split(batch_sizes)
    for row in reversed(rows) if backwards else rows:
        size = len(row)  # the sequences that are this long, which come first
        moved = step(row, tuple(part[:size] for part in state), weights)
        outputs.append(moved[0])
        state = tuple(torch.cat([new, part[size:]]) for new, part in zip(moved, state, strict=True))
    return torch.cat(outputs[::-1] if backwards else outputs), state


@in_place_of(torch._VF._pack_padded_sequence)
def pack_padded_sequence(
    input: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor]:
    rows = input.unbind(1 if batch_first else 0)
    sizes = [sum(length > step for length in lengths.tolist()) for step in range(len(rows))]
    data = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True) if size])
    return data, torch.tensor([size for size in sizes if size])


@in_place_of(torch._VF._pad_packed_sequence)
def pad_packed_sequence(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    sizes = batch_sizes.tolist()
    rows = [
        torch.cat([row, row.new_full((sizes[0] - len(row), *row.shape[1:]), padding_value)])
        for row in data.split(sizes)
    ]
    rows += [torch.full_like(rows[0], padding_value)] * (total_length - len(rows))
    lengths = [sum(size > place for size in sizes) for place in range(sizes[0])]
    return torch.stack(rows, 1 if batch_first else 0), torch.tensor(lengths)
