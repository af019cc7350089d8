"""A traced function and its transposed product as two functions, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
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
    """Two functions that are ``fn(*operands) = (*outputs, *products)`` one after the other.

    The first takes the primals, and returns the outputs, which depend on nothing else, and the
    values that the second needs of them. That takes these, the primals and the other operands, and
    returns the products.
    """
    with disable_proxy_modes_tracing():
        graph = make_fx(fn)(*operands)
    nodes = list(graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    (results,) = nodes[-1].args
    late: set[Node] = set(placeholders[num_primals:])
    for node in nodes[:-1]:
        if any(parent in late for parent in node.all_input_nodes):
            late.add(node)
    again: set[Node] = set()
    kept: dict[Node, None] = {}
    wanted = [parent for node in nodes[:-1] if node in late for parent in node.all_input_nodes]
    wanted += [node for node in results[num_outputs:] if isinstance(node, Node)]
    while wanted:
        node = wanted.pop()
        if node in late or node in again or node.op == "placeholder":
            continue
        if node.op == "get_attr" or node.target in _VIEWS:
            again.add(node)
            wanted.extend(node.all_input_nodes)
        else:
            kept[node] = None
    early = [node for node in nodes[:-1] if node not in late and node.op != "placeholder"]
    first = _build(graph, placeholders[:num_primals], early, (*results[:num_outputs], *kept))
    rest = [node for node in nodes[:-1] if node in again or node in late]
    rest = [node for node in rest if node.op != "placeholder"]
    second = _build(graph, (*kept, *placeholders), rest, results[num_outputs:])
    return first, second


def _build(
    source: GraphModule, inputs: Iterable[Node], nodes: Iterable[Node], outputs: Iterable[Node]
) -> Callable[..., Leaves]:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"operand_{index}")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda parent: copies[parent])
    graph.output(tuple(copies[node] for node in outputs))
    graph.eliminate_dead_code()
    module = GraphModule(source, graph)

    def run(*tensors: Tensor) -> Leaves:
        return tuple(module(*tensors))

    return run
