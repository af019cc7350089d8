"""Traced graphs as they are handed to a backend: the same numbers by other operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hyperfunc._compile import graph_passes
from hyperfunc._compile.compiler import Backend

F32, F64 = torch.float32, torch.float64
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def matrix(rows: int, columns: int, by_rows: bool = True, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    if by_rows:
        return torch.randn(rows, columns, generator=generator).to(dtype)
    return torch.randn(columns, rows, generator=generator).to(dtype).t()


def changed(fn: Any, *operands: Tensor) -> tuple[torch.fx.GraphModule, int]:
    """The graph of a function after the change, and how many products it hands to oneDNN."""
    graph = make_fx(fn)(*operands)
    graph_passes.use_onednn(graph)
    graph.recompile()
    targets = [node.target for node in graph.graph.nodes]
    ours = (torch.ops.hyperfunc.mm.default, torch.ops.hyperfunc.bmm.default)
    return graph, sum(target in ours for target in targets)


@needs_onednn
@pytest.mark.parametrize(
    "shape", [(100, 110, 120), (400, 200, 15), (15, 400, 200), (1000, 1, 1000)]
)
def test_large_products_of_any_layout(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    for by_rows in ((True, True), (True, False), (False, True), (False, False)):
        a, b = matrix(rows, inner, by_rows[0]), matrix(inner, columns, by_rows[1])
        bias = matrix(1, columns)[0]
        for fn, operands in (
            (lambda a, b: (a @ b).sin(), (a, b)),
            (lambda a, b, bias: torch.addmm(bias, a, b), (a, b, bias)),
            (lambda a, b: a[:, :inner] @ b[:inner], (torch.cat([a, a], 1), torch.cat([b, b]))),
            (lambda a, b: torch.bmm(a.expand(3, -1, -1), b), (a, torch.stack([b, 2 * b, b]))),
            (
                lambda a, b: torch.bmm(a.mT, b.mT).sin(),
                (torch.stack([a.T] * 2), b.T.expand(2, -1, -1)),
            ),
        ):
            graph, count = changed(fn, *operands)
            assert count == 1
            got = graph(*operands)
            expected = fn(*(leaf.double() for leaf in operands))
            torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
            assert got.is_contiguous()
            compiled = torch.compile(graph.forward, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*operands), got, rtol=0, atol=0)
            torch.compiler.reset()


@pytest.mark.parametrize(
    ("fn", "operands"),
    [
        (torch.mm, (matrix(30, 30), matrix(30, 30))),
        (torch.mm, (matrix(200, 200, dtype=F64), matrix(200, 200, dtype=F64))),
        (torch.mm, (matrix(200, 200, dtype=torch.bfloat16),) * 2),
        (torch.addmm, (matrix(200, 200), matrix(200, 200), matrix(200, 200))),
        (lambda c, a: torch.addmm(c, a, a, beta=2), (matrix(1, 200)[0], matrix(200, 200))),
        (torch.bmm, (torch.ones(20, 30, 30), torch.ones(20, 30, 30))),
    ],
    ids=["small", "float64", "bfloat16", "no bias", "scaled", "small, batched"],
)
def test_other_products_stay(fn: Any, operands: tuple[Tensor, ...]) -> None:
    graph, count = changed(fn, *operands)
    assert count == 0
    torch.testing.assert_close(graph(*operands), fn(*operands), rtol=0, atol=0)


def turned(fn: Any, *operands: Tensor) -> tuple[torch.fx.GraphModule, int]:
    """The graph of a function after the change, and how many products it computes turned."""
    graph = make_fx(fn)(*operands)
    graph_passes.turn_products(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
    return graph, sum(
        product.args[1].target is torch.ops.aten.t.default
        and all(user.target is torch.ops.aten.t.default for user in product.users)
        for product in products
    )


@pytest.mark.parametrize("shape", [(400, 300, 20), (700, 200, 2), (320, 320, 40)])
def test_narrow_products_are_turned(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    x, y = matrix(inner, rows), matrix(inner, columns)
    for fn, operands in (
        (torch.mm, (x.t(), y)),
        (lambda x, y: x.t() @ y, (x, y)),
        (lambda x, y: 2 * (x.t() @ y.sin()).cos(), (x, y)),
    ):
        graph, count = turned(fn, *operands)
        assert count == 1
        got, expected = graph(*operands), fn(*operands)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.stride() == expected.stride()


@pytest.mark.parametrize(
    "operands",
    [
        (matrix(400, 300), matrix(300, 20)),
        (matrix(400, 300, False), matrix(300, 20, False)),
        (matrix(400, 300, False), matrix(300, 1)),
        (matrix(400, 400, False), matrix(400, 41)),
        (matrix(150, 1000, False), matrix(1000, 20)),
        (matrix(1000, 150, False), matrix(150, 20)),
        (matrix(300, 300, False), matrix(300, 20)),
        (matrix(301, 400, False)[:300], matrix(400, 20)),
        (matrix(400, 300, False, F64), matrix(300, 20, dtype=F64)),
    ],
    ids=[
        "by rows",
        "both by columns",
        "vector",
        "wide",
        "flat",
        "short",
        "small",
        "part",
        "float64",
    ],
)
def test_other_products_are_not_turned(operands: tuple[Tensor, Tensor]) -> None:
    graph, count = turned(torch.mm, *operands)
    assert count == 0
    torch.testing.assert_close(graph(*operands), torch.mm(*operands), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_turned_products_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_passes, "prefers_onednn", lambda: False)
    monkeypatch.setattr(graph_passes, "prefers_turned", lambda: True)

    def fn(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        gradient = x.t() @ (x @ w).tanh()
        return gradient, -gradient, w - gradient, x.t() @ (x @ gradient).tanh()

    operands = (matrix(400, 20), matrix(300, 400))
    graph = make_fx(fn)(*operands)
    graph_passes.prepare(graph, "inductor")
    results = Backend()(graph, operands)(*operands)
    for got, expected in zip(results, fn(*operands), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        assert got.stride() == expected.stride()


@pytest.mark.parametrize(
    ("vendor", "capability", "onednn", "turned"),
    [
        ("AuthenticAMD", "AVX512", True, False),
        ("GenuineIntel", "AVX512", False, True),
        ("GenuineIntel", "AVX2", False, False),
        ("AuthenticAMD", "AVX2", False, False),
        ("", "AVX512", False, False),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, onednn: bool, turned: bool
) -> None:
    monkeypatch.setattr(graph_passes, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert graph_passes.prefers_onednn.__wrapped__() is onednn
    assert graph_passes.prefers_turned.__wrapped__() is turned


@needs_onednn
def test_only_the_default_backend_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_passes, "prefers_onednn", lambda: True)
    counts = []
    for backend in ("inductor", "eager"):
        graph = make_fx(torch.mm)(matrix(200, 200), matrix(200, 200))
        graph_passes.prepare(graph, backend)
        targets = [node.target for node in graph.graph.nodes]
        counts.append(targets.count(torch.ops.hyperfunc.mm.default))
    assert counts == [1, 0]


def test_only_the_default_backend_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_passes, "prefers_onednn", lambda: False)
    counts = []
    for backend, prefers in (("inductor", True), ("inductor", False), ("eager", True)):
        monkeypatch.setattr(graph_passes, "prefers_turned", lambda prefers=prefers: prefers)
        graph = make_fx(torch.mm)(matrix(400, 300, by_rows=False), matrix(300, 20))
        graph_passes.prepare(graph, backend)
        targets = [node.target for node in graph.graph.nodes]
        counts.append(targets.count(torch.ops.aten.t.default))
    assert counts == [3, 0, 0]


def test_the_layouts_of_what_is_turned_are_known() -> None:
    """`compile_in_pieces` looks at them."""
    operands = matrix(500, 400), matrix(500, 4)
    graph = make_fx(lambda x, y: x.T @ y)(*operands)
    graph_passes.turn_products(graph)

    class Checking(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function":
                known = n.meta["val"]
                assert (known.shape, known.stride()) == (result.shape, result.stride())
                seen.append(n.target)
            return result

    seen: list[Any] = []
    Checking(graph).run(*operands)
    assert seen.count(torch.ops.aten.t.default) == 3
