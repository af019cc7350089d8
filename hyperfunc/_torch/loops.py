"""Loops that stay loops in a trace, by ``while_loop`` of torch, with what they close over.

A step is traced once, at the level of torch's operators, whatever transforms and derivatives it
takes inside. What it uses from outside, such as the graph of a linearisation, becomes an operand.
Under ``vmap`` the loop is that of the whole batch, and goes on while any task does.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from hyperfunc._torch import batching, internals, tracking
from hyperfunc._types import Leaves

_LOCAL = threading.local()

# The first torch whose inductor compiles loops within loops by its C++ wrapper.
OLDEST = (2, 13)


@functools.lru_cache(maxsize=1)
def supported() -> bool:
    """Whether this torch can compile loops."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= OLDEST


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """A context in which loops stay loops in what is traced."""
    before = getattr(_LOCAL, "kept", False), getattr(_LOCAL, "made", [])
    _LOCAL.kept, _LOCAL.made = True, []
    try:
        yield
    finally:
        _LOCAL.kept, _LOCAL.made = before


def are_kept(tensors: Sequence[Any] = ()) -> bool:
    """Whether a loop from these tensors is to stay one: no derivative is taken through it."""
    if not (getattr(_LOCAL, "kept", False) and internals.is_traced()):
        return False
    transforms = internals.active_transforms() or ()
    return not (
        any(transform.key() != internals.VMAP for transform in transforms)
        or internals.forward_mode_active()
        or tracking.is_tracked(tensors)
    )


def untraced(fn: Callable[[], Tensor]) -> Tensor:
    """A tensor as a constant of what is traced."""
    with disable_proxy_modes_tracing():
        return fn()


def while_loop(
    go_on: Callable[[Leaves], Tensor] | None,
    step: Callable[[Tensor, Leaves], Leaves],
    state: Leaves,
    most: int | Tensor | None = None,
) -> tuple[Leaves, Tensor]:
    """Take steps ``(number, state) -> state`` while ``go_on(state)`` holds, ``most`` at most.

    Where `are_kept` holds alone. Returns the last state and the number of steps.
    """
    levels = batching.levels_of_vmaps()

    def lift(leaves: Leaves) -> Leaves:
        return tuple(batching.lift(leaf, levels) for leaf in leaves)

    def lower(leaves: Leaves) -> Leaves:
        return tuple(batching.lower(leaf, levels) for leaf in leaves)

    def goes_on(count: Tensor, *leaves: Tensor) -> Tensor:
        flag: Any = True if most is None else count < most
        if go_on is not None:
            flag = go_on(lift(leaves)) & flag
        (physical,) = lower((flag,))
        return physical.any() if physical.ndim else physical

    orders: list[tuple[int, ...]] = [tuple(range(leaf.ndim)) for leaf in lower(state)]

    def body(count: Tensor, *leaves: Tensor) -> Leaves:
        new = lower(step(count, lift(leaves)))
        found[:] = map(_order, new)
        return (count + 1, *(_laid_out(*pair) for pair in zip(new, leaves, strict=True)))

    device = state[0].device if state else torch.device("cpu")
    if isinstance(most, int) and most < 1:
        return state, torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):  # in the layout that the step gives, which so need not copy what it gives
        found: list[tuple[int, ...]] = []
        first = (_copy(leaf, order) for leaf, order in zip(lower(state), orders, strict=True))
        start = (torch.zeros((), dtype=torch.int64, device=device), *first)
        graphs, captured = _closed((goes_on, body), start)
        if found == orders:
            break
        orders = found
    with internals.outside_all(), torch.no_grad():  # with a gradient it stacks all states
        count, *end = _operator()(*graphs, start, captured)
    return lift(tuple(end)), count


def sink_views(graph: GraphModule) -> None:
    """Take views of the operands of loops inside of them, as no two operands may share memory."""
    if has_loops(graph):
        _merge_constants(graph)
    for node in list(graph.graph.nodes):
        if node.target is not _operator():
            continue
        *names, carried, captured = node.args
        plans = [_base_and_views(operand) for operand in captured]
        bases = tuple(dict.fromkeys(base for base, _ in plans))
        for name in names:
            _take_inside(getattr(graph, name.target), len(carried), plans, bases)
        node.args = (*names, carried, bases)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    for _, part in graph.named_children():
        if isinstance(part, GraphModule):
            sink_views(part)


def _merge_constants(graph: GraphModule) -> None:
    """Read each constant once, and a copy of one that shares memory with another."""
    read: dict[int, Node] = {}
    memory: set[int] = set()
    for node, tensor in _constants(graph):
        if id(tensor) in read:
            node.replace_all_uses_with(read[id(tensor)])
            graph.graph.erase_node(node)
            continue
        read[id(tensor)] = node
        place = tensor.untyped_storage().data_ptr()
        if place in memory:
            with graph.graph.inserting_after(node):
                copy = graph.graph.call_function(torch.ops.aten.clone.default, (node,))
            node.replace_all_uses_with(copy)
            copy.args = (node,)
            read[id(tensor)] = copy
        memory.add(place)


def has_loops(graph: GraphModule) -> bool:
    """Whether a trace holds a loop."""
    return any(node.target is _operator() for node in graph.graph.nodes) if supported() else False


def may_be_empty(graph: GraphModule) -> bool:
    """Whether a trace holds a loop that may take no step, which a comparison of its counter tells.

    Code of inductor's C++ wrapper takes what comes out of such a loop for memory of its own, and
    writes over what went into it (torch 2.13); its Python wrapper makes a copy.
    """
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if node.target is _operator():
                condition = getattr(part, node.args[0].target)
                if len(condition.graph.find_nodes(op="output")[0].all_input_nodes) != 1:
                    return True
                if sum(each.op == "call_function" for each in condition.graph.nodes) > 1:
                    return True
    return False


def is_view(node: Node) -> bool:
    """Whether a node gives other views of the memory that it takes."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def cacheable() -> dict[str, str]:
    """What torch calls a loop in the list of what its cache on disk may hold."""
    loop = _operator()
    return {f"{loop.__module__}.{loop.__name__}": "1"}


@functools.lru_cache(maxsize=1)
def _operator() -> Any:
    from torch._higher_order_ops.while_loop import while_loop_op  # slow to import

    return while_loop_op


def _order(leaf: Tensor) -> tuple[int, ...]:
    """The dimensions by falling stride, if together they are one piece of memory."""
    order = tuple(sorted(range(leaf.ndim), key=leaf.stride, reverse=True))
    return order if leaf.permute(order).is_contiguous() else tuple(range(leaf.ndim))


def _copy(leaf: Tensor, order: Sequence[int]) -> Tensor:
    if list(order) == sorted(order):
        return leaf.clone(memory_format=torch.contiguous_format)
    copy = leaf.permute(*order).clone(memory_format=torch.contiguous_format)
    return copy.permute([order.index(i) for i in range(leaf.ndim)])


def _laid_out(leaf: Tensor, like: Tensor) -> Tensor:
    if leaf.shape != like.shape or leaf.dtype != like.dtype:
        raise AssertionError(
            f"a step turned {like.dtype}{[*like.shape]} into {leaf.dtype}{[*leaf.shape]}"
        )
    return leaf if leaf.stride() == like.stride() else _copy(leaf, _order(like))


def _closed(fns: Sequence[Callable[..., Any]], example: Leaves) -> tuple[list[GraphModule], Leaves]:
    """Traced functions, with the tensors that they use besides as further operands of all."""
    with disable_proxy_modes_tracing():
        graphs = [make_fx(_noted(fn))(*example) for fn in fns]
    captured: dict[int, tuple[int, Tensor]] = {}
    for graph in graphs:
        for _, tensor in _constants(graph):
            if any(_is_own(tensor, *part) for part in _LOCAL.made):
                raise AssertionError("a tensor that was made inside a loop is used outside of it")
            captured.setdefault(id(tensor), (len(captured), tensor))
    for graph in graphs:
        inputs = _add_inputs(graph, len(captured))
        for node, tensor in _constants(graph):
            node.replace_all_uses_with(inputs[captured[id(tensor)][0]])
            graph.graph.erase_node(node)
        _give_own_memory(graph)
        graph.recompile()
    return graphs, tuple(tensor for _, tensor in captured.values())


def _noted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a loop, which leaves a note of the tensors that it made and that outlive it."""

    def part(*args: Tensor) -> Any:
        result = fn(*args)
        _LOCAL.made.append((internals.trace().tracer.tensor_tracker, args))
        return result

    return part


def _is_own(tensor: Tensor, tracker: Any, args: Leaves) -> bool:
    """Whether a part of a loop made a tensor, which parts of one loop do not make of its state."""
    return tensor in tracker and all(tensor is not leaf for leaf in args)


def _constants(graph: GraphModule) -> list[tuple[Node, Tensor]]:
    nodes = graph.graph.find_nodes(op="get_attr")
    pairs = [(node, getattr(graph, str(node.target))) for node in nodes]
    return [(node, value) for node, value in pairs if isinstance(value, Tensor)]


def _add_inputs(graph: GraphModule, count: int) -> list[Node]:
    last = graph.graph.find_nodes(op="placeholder")[-1]
    nodes = []
    for index in range(count):
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"captured_{len(graph.graph.nodes)}_{index}")
        nodes.append(last)
    return nodes


def _give_own_memory(graph: GraphModule) -> None:
    """Copy results that are operands, or views of them, or of one another."""
    (node,) = graph.graph.find_nodes(op="output")
    results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
    seen: set[Node] = set()
    own = []
    for result in results:
        base = result
        while is_view(base):
            base = base.args[0]
        if base in seen or base.op != "call_function":
            with graph.graph.inserting_before(node):
                result = graph.graph.call_function(torch.ops.aten.clone.default, (result,))
            base = result
        seen.add(base)
        own.append(result)
    node.args = (tuple(own) if isinstance(node.args[0], tuple | list) else own[0],)


def _base_and_views(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """What a node looks at, and the views that lead there and are of one tensor each."""
    views: list[Node] = []
    while is_view(node) and not _writes(node) and node.all_input_nodes == [node.args[0]]:
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, tuple(reversed(views))


def _take_inside(
    graph: GraphModule,
    num_carried: int,
    plans: Sequence[tuple[Node, tuple[Node, ...]]],
    bases: Sequence[Node],
) -> None:
    """Let a part of a loop take bases, and make its views of them itself."""
    old = graph.graph.find_nodes(op="placeholder")[num_carried:]
    inputs = dict(zip(bases, _add_inputs(graph, len(bases)), strict=True))
    point = list(inputs.values())[-1] if inputs else None
    for node, (base, views) in zip(old, plans, strict=True):
        value = inputs[base]
        for view in views if node.users else ():
            with graph.graph.inserting_after(point):
                target: Any = view.target
                value = graph.graph.call_function(target, (value, *view.args[1:]), view.kwargs)
            point = value
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)
    graph.recompile()
