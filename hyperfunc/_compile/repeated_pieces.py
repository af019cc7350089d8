"""Traced functions with a loop in them, compiled a few steps at a time and not all as one.

A trace holds every step of a loop. It is cut where it repeats itself, equal pieces compiled once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from hyperfunc._types import Leaves

CompiledFunction = Callable[..., Sequence[Tensor]]
Compile = Callable[[GraphModule, Leaves], CompiledFunction]

# Operations from which on a graph is cut, and that a piece of it has about. Compiling takes some 20
# ms for each; but pieces cannot write over what they take, which may cost a tenth for long vectors.
_LARGE = 1200
_PIECE = 128

# The share of the operations that may be left to compile, for pieces to be worth their calls.
_WORTH = 0.6

_aten = torch.ops.aten
_VIEWS: dict[Any, Any] = {
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.t_.default: _aten.t.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
}


def compile_in_pieces(graph: GraphModule, operands: Leaves, compile: Compile) -> CompiledFunction:
    """A graph compiled for operands like these, in pieces where it is large and repeats itself."""
    if len(graph.graph.nodes) < _LARGE:
        return compile(graph, operands)
    for node in graph.graph.nodes:  # what formulas of torch do in place of views
        node.target = _VIEWS.get(node.target, node.target)
    if not _is_functional(graph):
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(*operands)
    merge_equal(graph)
    graph.recompile()
    pieces = _cut(graph)
    return _in_sequence(graph, pieces, operands, compile) if pieces else compile(graph, operands)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Successive nodes of a graph, what they take from those before, and what they do, as a key."""

    nodes: Sequence[Node]
    inputs: tuple[Node, ...]
    key: Hashable

    @staticmethod
    def make(nodes: Sequence[Node]) -> Piece:
        inside = set(nodes)
        parents = (parent for node in nodes for parent in node.all_input_nodes)
        inputs = tuple(dict.fromkeys(parent for parent in parents if parent not in inside))
        names = {node: f"input{i}" for i, node in enumerate(inputs)}
        names |= {node: f"node{i}" for i, node in enumerate(nodes)}
        key = tuple((node.target, _spell((node.args, node.kwargs), names)) for node in nodes)
        return Piece(nodes, inputs, key)


def subgraph(
    source: GraphModule, inputs: Iterable[Node], nodes: Iterable[Node], outputs: Iterable[Node]
) -> GraphModule:
    """Some nodes of a graph as a function of others, with a tuple of values."""
    graph = Graph()
    copies = {node: graph.placeholder(f"input{i}") for i, node in enumerate(inputs)}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    graph.eliminate_dead_code()
    return GraphModule(source, graph)


def _cut(graph: GraphModule) -> list[Piece]:
    """The pieces of a graph, or none where they are not worth it."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    starts = _starts(nodes)
    bounds = itertools.pairwise([0, *starts, len(nodes)])
    pieces = [Piece.make(nodes[low:high]) for low, high in bounds]
    lengths = {piece.key: len(piece.nodes) for piece in pieces}
    takes_tensors = all(_is_tensor(node) for piece in pieces for node in piece.inputs)
    if sum(lengths.values()) > _WORTH * len(nodes) or not takes_tensors:
        return []
    return pieces


def _in_sequence(
    graph: GraphModule, pieces: Sequence[Piece], operands: Leaves, compile: Compile
) -> CompiledFunction:
    """Compiled pieces one after the other, as a function of the operands of all."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    attributes = graph.graph.find_nodes(op="get_attr")
    constants = {node: getattr(graph, str(node.target)) for node in attributes}
    results = results_of(graph)
    crossing = _with_bases({*results, *(node for piece in pieces for node in piece.inputs)})
    outputs: dict[Hashable, set[int]] = {piece.key: set() for piece in pieces}
    for piece in pieces:
        for place, node in enumerate(piece.nodes):
            if node in crossing and not _aliases(node):
                outputs[piece.key].add(place)
    calls: list[_Call] = []
    values: dict[Node, Any] = dict(zip(placeholders, operands, strict=True)) | constants
    compiled: dict[Hashable, CompiledFunction] = {}
    for piece in pieces:
        inputs = tuple(values[node] for node in piece.inputs)
        key = (piece.key, *((leaf.shape, leaf.stride(), leaf.dtype) for leaf in inputs))
        given = tuple(piece.nodes[place] for place in sorted(outputs[piece.key]))
        if not given:
            compiled[key] = lambda *_: ()
        elif key not in compiled:
            compiled[key] = compile(subgraph(graph, piece.inputs, piece.nodes, given), inputs)
        views = tuple(node for node in piece.nodes if node in crossing and _aliases(node))
        call = _Call(compiled[key], piece.inputs, given, views)
        call.run(values)
        calls.append(call)
    needed = {*results, *constants}
    for i, call in reversed(list(enumerate(calls))):
        seen = {*call.inputs, *call.outputs, *call.views, *_parents(call.views)}
        calls[i] = dataclasses.replace(call, done=tuple(seen - needed))
        needed |= seen

    def run(*operands: Tensor) -> Leaves:
        values: dict[Node, Any] = dict(zip(placeholders, operands, strict=True)) | constants
        for call in calls:
            call.run(values)
        return tuple(values[node] for node in results)

    return run


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A compiled piece: values it takes and gives, views of them, and what nobody needs after."""

    compiled: CompiledFunction
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    views: tuple[Node, ...]
    done: tuple[Node, ...] = ()

    def run(self, values: dict[Node, Any]) -> None:
        results = self.compiled(*[values[node] for node in self.inputs])
        values.update(zip(self.outputs, results, strict=True))
        for node in self.views:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for node in self.done:
            del values[node]


def merge_equal(graph: GraphModule) -> None:
    """Compute once, in place, what a graph computes again and again; no two results become one."""
    apart = _with_bases(results_of(graph))
    seen: dict[Hashable, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node in apart:
            continue
        key = (node.target, _spell((node.args, node.kwargs), {}))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def _starts(nodes: Sequence[Node]) -> list[int]:
    """Where to cut a list of nodes: before each few steps of the loop that most of it is in."""
    start, period, length = _longest_loop(nodes)
    if not period:
        return []
    place = {node: i for i, node in enumerate(nodes)}
    costs = [0.0] * (len(nodes) + 1)
    for node in nodes[start:]:
        if not _aliases(node):
            last = max((place.get(reader, len(nodes)) for reader in _readers(node)), default=0)
            for i in range(place[node] + 1, last + 1):
                costs[i] += _bytes(node)
    first = min(range(start + period, start + 2 * period), key=costs.__getitem__) - period
    if costs[first + period] == math.inf:
        return []
    size = period * max(1, round(_PIECE / period))
    return list(range(first, start + length + 1, size))


def _longest_loop(nodes: Sequence[Node]) -> tuple[int, int, int]:
    """Start, period and length of the longest part of a list that repeats itself, or zeros."""
    kinds: dict[Hashable, int] = {}
    codes = torch.tensor([kinds.setdefault(_kind(node), len(kinds)) for node in nodes])
    best = (0, 0, 0)
    for period in range(2, len(nodes) // 3 + 1):
        unlike = (codes[period:] != codes[:-period]).nonzero().flatten()
        ends = torch.tensor([-1, *unlike.tolist(), len(nodes) - period])
        run, index = ends.diff().max(0)
        length = int(run) - 1 + period
        if length >= 3 * period and length - period > best[2] - best[1]:
            best = (int(ends[index]) + 1, period, length)
    return best


def _kind(node: Node) -> Hashable:
    value = node.meta.get("val")
    layout = (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else None
    return node.target, _spell((node.args, node.kwargs), None), layout


class _Name(str):
    __slots__ = ()
    __repr__ = str.__str__


def _spell(arguments: Any, names: dict[Node, str] | None) -> str:
    """Arguments in words, with nodes by these names, or by their own, or, for None, by none."""

    def name(node: Node) -> Any:
        return _Name("node" if names is None else names.get(node, node.name))

    return repr(map_arg(arguments, name))


def _is_functional(graph: GraphModule) -> bool:
    """Whether nothing is written to, and every operation is one of torch's."""
    return all(
        node.target is operator.getitem
        or (isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable)
        for node in graph.graph.nodes
        if node.op not in ("placeholder", "get_attr", "output")
    )


def _aliases(node: Node) -> bool:
    """Whether a node gives other views of the memory that it takes."""
    if node.target is operator.getitem:
        return _aliases(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def results_of(graph: GraphModule) -> tuple[Node, ...]:
    (results,) = graph.graph.output_node().args
    return tuple(cast("Sequence[Node]", results))


def _readers(node: Node) -> set[Node]:
    """The nodes that use a value, itself or a view of it."""
    readers: set[Node] = set()
    for user in node.users:
        readers |= _readers(user) if _aliases(user) else {user}
    return readers


def _parents(nodes: Iterable[Node]) -> set[Node]:
    return {parent for node in nodes for parent in node.all_input_nodes}


def _with_bases(nodes: Iterable[Node]) -> set[Node]:
    """Nodes, and what those of them that are views look at."""
    found: set[Node] = set()
    wanted = set(nodes)
    while wanted:
        found |= wanted
        wanted = _parents(filter(_aliases, wanted)) - found
    return found


def _is_tensor(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), Tensor)


def _bytes(node: Node) -> float:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else math.inf
