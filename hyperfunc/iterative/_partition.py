"""A traced function and its transposed product as two functions, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from hyperfunc._types import Leaves

_aten = torch.ops.aten
# Views, which are made again rather than kept: what they look at is kept.
_VIEWS = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.squeeze.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}


def forward_and_backward(
    fn: Callable[..., Leaves], operands: Leaves, num_primals: int, num_outputs: int
) -> tuple[Callable[..., Leaves], Callable[..., Leaves]]:
    """Split ``fn(*operands) = (*outputs, *products)``: outputs and what to keep, then products."""
    with disable_proxy_modes_tracing():
        graph = make_fx(fn)(*operands)
    graph.graph.eliminate_dead_code()  # which would have values kept, some on no device
    placeholders = graph.graph.find_nodes(op="placeholder")
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    (outputs,) = graph.graph.output_node().args
    results = tuple(cast("Sequence[Node]", outputs))
    late: set[Node] = set(placeholders[num_primals:])
    for node in nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    again: set[Node] = set()
    kept: dict[Node, None] = {}
    wanted = [parent for node in nodes if node in late for parent in node.all_input_nodes]
    wanted += results[num_outputs:]
    while wanted:
        node = wanted.pop()
        if node in late or node in again or node.op == "placeholder":
            continue
        if node.op == "get_attr" or node.target in _VIEWS:
            again.add(node)
            wanted.extend(node.all_input_nodes)
        else:
            kept[node] = None
    early = [node for node in nodes if node not in late]
    rest = [node for node in nodes if node in again or node in late]
    first = _subgraph(graph, placeholders[:num_primals], early, (*results[:num_outputs], *kept))
    second = _subgraph(graph, (*kept, *placeholders), rest, results[num_outputs:])
    return first, second


def _subgraph(
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
