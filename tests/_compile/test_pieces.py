"""Traced loops cut into pieces: the numbers of the whole, from less code."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import hyperfunc as hf
from hyperfunc._compile import repeated_pieces
from hyperfunc._compile.compiler import Backend

F64 = torch.float64
TABLE = torch.linspace(0, 1, 6, dtype=F64)


class Interpreter:
    """Stands in for a backend: runs a graph as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, graph: GraphModule, operands: Sequence[Tensor]) -> Any:
        self.lengths.append(len(graph.graph.nodes))
        assert len(operands) == len(graph.graph.find_nodes(op="placeholder"))
        return graph.forward


def loop(
    step: Callable[..., tuple[Tensor, ...]], num_steps: int, x: Tensor, v: Tensor, a: Tensor
) -> tuple[Tensor, ...]:
    for _ in range(num_steps):
        x, v = step(x, v, a)
    return x, v


def momentum(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    gradient = a @ torch.tanh(a.mT @ x) + TABLE
    gradient = gradient / (1 + gradient.norm()) + 0.1 * x.sin() * torch.exp(a).sum(0)
    v = 0.9 * v - 0.1 * gradient
    return x + v, v


def lists(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """A step with operations that return several tensors, and views of what lies outside."""
    top, _ = torch.max(a * x, dim=1)
    low, high = x.split(3)
    new = torch.cat([high.cos(), low.sin()]) + 0.1 * top + a.mT[0] + v.view(2, 3).mT.reshape(-1)
    return new.tanh(), 0.5 * v + new[None].expand(2, -1).sum(0)


def in_place(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    rows = a.clone()
    rows[1:3] += x
    rows.mul_(0.5).t_()
    new = (rows.unsqueeze(0).squeeze_(0) @ x).tanh() + 0.1 * v.sin() + rows.diagonal().cos() / 3
    return new, v.add(new, alpha=0.5) - 0.1 * new.exp()


STEPS = {"momentum": momentum, "lists": lists, "in_place": in_place}


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 6, dtype=F64, generator=generator)
    return x, v, torch.randn(6, 6, dtype=F64, generator=generator)


def compile_loop(
    fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Interpreter]:
    monkeypatch.setattr(repeated_pieces, "_LARGE", 40)
    monkeypatch.setattr(repeated_pieces, "_PIECE", 10)
    graph = make_fx(fn)(*operands())
    backend = Interpreter()
    return repeated_pieces.compile_in_pieces(graph, operands(), backend), backend


@pytest.mark.parametrize("name", STEPS)
def test_a_loop_takes_as_much_code_for_any_number_of_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    for num_steps in (12, 24):
        fn = functools.partial(loop, STEPS[name], num_steps)
        compiled, backend = compile_loop(fn, monkeypatch)
        for got, expected in zip(compiled(*operands()), fn(*operands()), strict=True):
            torch.testing.assert_close(got, expected)
        other = tuple(2 * leaf for leaf in operands())
        torch.testing.assert_close(tuple(compiled(*other)), fn(*other))
        lengths.append(sum(backend.lengths))
    assert 1 < len(backend.lengths) <= 4
    assert abs(lengths[0] - lengths[1]) < 40


def test_results_may_be_views_operands_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        first, _ = momentum(x, v, a)
        y, u = loop(momentum, 10, first, v, a)
        return (
            y,
            a,
            u.view(2, 3).mT,
            first[1:],
            y[None],
            a.mT,
            TABLE.clone() + 0 * u,
            first.view(3, 2),
        )

    compiled, backend = compile_loop(fn, monkeypatch)
    assert len(backend.lengths) > 1
    got, inputs = compiled(*operands()), operands()
    for result, expected in zip(got, fn(*inputs), strict=True):
        torch.testing.assert_close(result, expected)
    assert compiled(*inputs)[1] is inputs[2]


def test_nothing_is_kept_longer_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, v: Tensor, a: Tensor) -> Any:
        return loop(momentum, 20, x, v, a)[0][None]

    compiled, _ = compile_loop(lambda *leaves: (fn(*leaves),), monkeypatch)
    sizes = []
    run = repeated_pieces._Call.run

    def counted(call: Any, values: dict[Any, Any]) -> None:
        run(call, values)
        sizes.append(sum(node.op != "get_attr" for node in values))

    monkeypatch.setattr(repeated_pieces._Call, "run", counted)
    compiled(*operands())
    assert len(sizes) > 2
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] == 1  # the result


def test_where_nothing_repeats_all_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [torch.sin, torch.cos, torch.tanh, torch.exp, torch.sigmoid, torch.erf]

    def fn(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        for index in torch.randint(len(functions), (60,), generator=generator).tolist():
            x = functions[index](x)
        return (x + v,)

    compiled, backend = compile_loop(fn, monkeypatch)
    assert len(backend.lengths) == 1
    torch.testing.assert_close(tuple(compiled(*operands())), fn(*operands()))


def test_steps_that_differ_in_what_they_take_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fn(x: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        for index in range(30):
            y, u = (a @ x).tanh(), v.cos()
            x, v = y * u + (y if index == 17 else u), v + y.exp()
        return x, v

    compiled, backend = compile_loop(fn, monkeypatch)
    assert 1 < len(backend.lengths) <= 5
    torch.testing.assert_close(tuple(compiled(*operands())), fn(*operands()))


def test_equal_values_are_computed_once_and_results_stay_apart() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return x.exp() + 1, x.exp() * 2, x.sin(), x.sin(), (2 * x).view(2, 3), (2 * x).view(2, 3)

    x = operands()[0]
    graph = make_fx(fn)(x)
    repeated_pieces.merge_equal(graph)
    graph.recompile()
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.exp.default) == 1
    results = graph(x)
    torch.testing.assert_close(tuple(results), fn(x))
    assert len({leaf.untyped_storage().data_ptr() for leaf in results}) == len(results)


@pytest.mark.parametrize(
    ("method", "batched"),
    [
        pytest.param(hf.CG(maxiter=8, rtol=0), False, marks=pytest.mark.slow),
        (hf.CG(maxiter=8, rtol=0), True),
        (hf.Neumann(12, 0, step_size=0.1), False),
    ],
)
def test_adjoints(method: Any, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_pieces, "_LARGE", 100)
    monkeypatch.setattr(repeated_pieces, "_PIECE", 30)
    backend = Interpreter()
    monkeypatch.setattr(Backend, "_compile_directly", lambda self, *args: backend(*args))

    def inner_loss(w: Any, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.log_softmax(x @ w["w"] + w["b"], dim=-1)
        return (
            -logits[torch.arange(8), y].mean() + (h.exp() @ w["w"] ** 2).sum() + (w["b"] ** 2).sum()
        )

    def outer_loss(w: Any, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ w["w"]).logsumexp(1).sum() + w["b"].sum()

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, dtype=F64, generator=generator)
    x = torch.randn(3, 8, 3, dtype=F64, generator=generator)
    y = torch.randint(4, (3, 8), generator=generator)
    args = (torch.zeros(3, dtype=F64), x, y) if batched else (torch.zeros(3, dtype=F64), x[0], y[0])

    def gradient(compile: bool) -> Any:
        fn = hf.hypergrad(
            lambda h, x, y: {"w": weights + h[:, None], "b": weights[0]},
            outer_loss,
            inner_loss=inner_loss,
            method=method,
            compile=compile,
            throw=False,
        )
        return (torch.func.vmap(fn, (None, 0, 0)) if batched else fn)(*args)

    torch.testing.assert_close(gradient(True), gradient(False))
    assert 1 < len(backend.lengths) <= 4
