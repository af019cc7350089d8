"""What is changed in a traced graph before a backend compiles it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.sub.Tensor)

# Multiplications from which on a call of oneDNN, of some 12 microseconds, is paid for.
_LARGE = 10**6

# Columns of a matrix up to which, and entries of the other from which on, MKL is faster turned.
_NARROW, _LONG = 40, 10**5


def prepare(graph: GraphModule, backend: str) -> None:
    """Change a graph, in place, to what the backend compiles better."""
    _spell_out_scaled_sums(graph)
    if backend == "inductor":
        if prefers_onednn():
            use_onednn(graph)
        elif prefers_turned():
            turn_products(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def use_onednn(graph: GraphModule) -> None:
    """Have oneDNN compute large float32 products of matrices on the CPU, and batches of them."""
    for node in list(graph.graph.nodes):
        bias: Node | None = None
        if node.target in (_aten.mm.default, _aten.bmm.default):
            a, b = node.args
        elif node.target is _aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
        else:
            continue
        left, right = a.meta.get("val"), b.meta.get("val")
        if not (_is_plain(left) and _is_plain(right)):
            continue
        if left.shape[-2] * left.shape[-1] * right.shape[-1] < _LARGE:
            continue
        if node.target is _aten.bmm.default:
            _replace(node, torch.ops.hyperfunc.bmm.default, (a, b))
            continue
        if bias is not None and not (
            _is_plain(bias.meta.get("val")) and bias.meta["val"].shape == right.shape[1:]
        ):
            continue
        operands = (a, b, bias, bias is None and _is_better_turned(left, right))
        _replace(node, torch.ops.hyperfunc.mm.default, operands)


def turn_products(graph: GraphModule) -> None:
    """Have float32 ``x^T y`` computed as ``(y^T x)^T`` on the CPU, for large x and narrow y.

    The gradients of linear models are such products. Results go by rows, as they did. In float64
    the gain is small, and now and then a loss.
    """
    for node in list(graph.graph.nodes):
        if node.target is not _aten.mm.default:
            continue
        a, b = node.args
        left, right = a.meta.get("val"), b.meta.get("val")
        if not (_is_plain(left) and _is_plain(right)):
            continue
        if not (left.t().is_contiguous() and right.is_contiguous()):
            continue
        (rows, inner), columns = left.shape, right.shape[1]
        if not (2 <= columns <= _NARROW and min(rows, inner) >= 8 * columns):
            continue
        if rows * inner < _LONG:
            continue
        with graph.graph.inserting_before(node):
            turned = [graph.graph.call_function(_aten.t.default, (x,)) for x in (b, a)]
            product = graph.graph.call_function(_aten.mm.default, tuple(turned))
            back = graph.graph.call_function(_aten.t.default, (product,))
            by_rows: dict[str, Any] = {"memory_format": torch.contiguous_format}
            result = graph.graph.call_function(_aten.clone.default, (back,), by_rows)
        result.meta = dict(node.meta)
        value = node.meta["val"].t().contiguous()
        made = (*turned, product, back)
        for each, like in zip(made, (right.t(), left.t(), value, value.t()), strict=True):
            each.meta["val"] = like  # by which `compile_in_pieces` tells tensors
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)


@functools.cache
def prefers_onednn() -> bool:
    """Whether torch's own products, by MKL, are slow here.

    MKL uses AVX-512 on processors of Intel alone, and is half as fast as oneDNN on others that
    have it.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() not in ("", "GenuineIntel")
    )


@functools.cache
def prefers_turned() -> bool:
    """Whether MKL multiplies here, with AVX-512: elsewhere turned products were not measured."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "GenuineIntel"
    )


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype == torch.float32
        and value.device.type == "cpu"
    )


def _is_better_turned(a: Tensor, b: Tensor) -> bool:
    """Whether ``(b^T a^T)^T`` is faster than ``a b``.

    oneDNN takes its second matrix in any order, and copies the first unless it goes by rows.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    flipped = 0 if b.stride(0) == 1 and b.stride(1) == inner else inner * columns
    return not a.is_contiguous() and rows * columns + flipped < rows * inner


def _replace(node: Node, target: Any, operands: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        product = node.graph.call_function(target, operands)
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _spell_out_scaled_sums(graph: GraphModule) -> None:
    """Write ``add(x, y, alpha)`` as ``x + alpha y``.

    Inductor fuses a sum with a product of matrices, and forgets the factor (seen in torch 2.13).
    """
    for node in list(graph.graph.nodes):
        alpha = node.kwargs.get("alpha", 1)
        if node.target not in _SUMS or alpha == 1:
            continue
        x, y = node.args
        with graph.graph.inserting_before(node):
            scaled = graph.graph.call_function(_aten.mul.Tensor, (y, alpha))
        scaled.meta = dict(y.meta) if isinstance(y, Node) else {}
        node.args, node.kwargs = (x, scaled), {}


# The operators hyperfunc::mm, a b (+ bias), and hyperfunc::bmm, a b for each of a batch, by oneDNN;
# results are contiguous.

_library = torch.library.Library("hyperfunc", "DEF")
for _signature in (
    "mm(Tensor a, Tensor b, Tensor? bias=None, bool turned=False) -> Tensor",
    "bmm(Tensor a, Tensor b) -> Tensor",
):
    _library.define(
        _signature, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    )


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None, turned: bool = False) -> Tensor:
    if turned:
        return _linear(b.t(), a, bias, "none", [], "").t().contiguous()
    return _linear(a, b.t(), bias, "none", [], "")


def _mm_shape(a: Tensor, b: Tensor, bias: Tensor | None = None, turned: bool = False) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    # each product is copied while it is in the cache: to stack them all at the end is slower
    result = _bmm_shape(a, b)
    for place, left, right in zip(result.unbind(), a.unbind(), b.unbind(), strict=True):
        place.copy_(_linear(left, right.t(), None, "none", [], ""))
    return result


def _bmm_shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _linear(*operands: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(*operands)  # type: ignore[no-any-return]


_library.impl("mm", _mm, "CPU")
_library.impl("bmm", _bmm, "CPU")
torch.library.register_fake("hyperfunc::mm", _mm_shape, lib=_library)
torch.library.register_fake("hyperfunc::bmm", _bmm_shape, lib=_library)
