"""What changes between calls of compiled code is seen, wherever a function reads it from."""

import argparse
import array
import collections
import dataclasses
import enum
import fractions
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hyperfunc as hf
from hyperfunc._compile.compiler import Backend

F64 = torch.float64


class Plain:
    shared: Any = 1.0

    def __init__(self, rate: Any = 1.0) -> None:
        self.rate = rate

    @property
    def twice(self) -> Any:
        return 2 * self.rate

    @classmethod
    def from_class(cls) -> Any:
        return cls.shared

    def __getitem__(self, key: str) -> Any:
        return self.rate

    def __rmul__(self, other: Any) -> Any:
        return other * self.rate

    def method(self) -> Any:
        return self.rate


class Derived(Plain):
    def method(self) -> Any:
        return super().method() + 0.0


class Slots:
    __slots__ = ("rate",)

    def __init__(self, rate: Any) -> None:
        self.rate = rate


@dataclasses.dataclass
class Data:
    rate: float


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    rate: float
    more: Any = None


class Named(NamedTuple):
    rate: float


class Mode(enum.Enum):
    ONE = 1
    THREE = 3


class Delegating:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.drop = nn.Dropout(0.5)
        self.table = [1.0]

    def forward(self, w: Tensor) -> Tensor:
        if self.drop.training:
            return 5 * w
        return w * self.scale * self.table[0]


COUNT = 1.0
module = types.ModuleType("settings")
module.RATE = 1.0  # type: ignore[attr-defined]
module.nested = types.ModuleType("settings.nested")  # type: ignore[attr-defined]
module.nested.RATE = 1.0  # type: ignore[attr-defined]


def helper(config: Any) -> Any:
    return config.deep.rate


def set_global() -> Iterator[Any]:
    global COUNT
    yield lambda: COUNT
    COUNT = 3.0
    yield None
    COUNT = 1.0


def through(box: Any, read: Callable[[Any], Any], change: Callable[[Any], Any]) -> Iterator[Any]:
    yield lambda: read(box)
    change(box)
    yield None


def variable(one: Any, three: Any, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """A variable that is bound to something else."""
    value = one
    yield lambda: read(value)
    value = three
    yield None


def rate(box: Any) -> Any:
    return box.rate


def first(box: Any) -> Any:
    return box[0]


def total(box: Any) -> Any:
    return sum(box)


def set_rate(box: Any) -> None:
    box.rate = 3.0


def set_first(box: Any) -> None:
    box[0] = 3.0


def swap_members(box: Any) -> None:
    box.remove(1.0)
    box.add(3.0)


def deep(box: Any) -> None:
    box.deep.rate = 3.0


def large() -> Any:
    zeros = [0.0] * 2000
    return [*zeros, 1.0], [*zeros, 3.0]


def key_a(box: Any) -> Any:
    return box["a"]


def set_a(box: Any) -> None:
    box["a"] = 3.0


def alias() -> Iterator[Any]:
    low, high = Plain(1.0), Plain(3.0)
    value = low
    yield lambda: value.rate + 0 * low.rate * high.rate
    value = high
    yield None


def set_module() -> Iterator[Any]:
    yield lambda: module.RATE + module.nested.RATE - 1
    module.nested.RATE = 3.0
    yield None
    module.nested.RATE = 1.0


def set_class() -> Iterator[Any]:
    yield lambda: Plain.shared
    Plain.shared = 3.0
    yield None
    Plain.shared = 1.0


def weak() -> Iterator[Any]:
    plain = Plain()
    reference = weakref.ref(plain)
    yield lambda: reference().rate  # type: ignore[union-attr]
    plain.rate = 3.0
    yield None


def layer(change: Callable[[Layer], Any]) -> Iterator[Any]:
    net = Layer().eval()
    yield lambda: net(torch.ones((), dtype=F64))
    change(net)
    yield None


def keywords() -> Iterator[Any]:
    fn = functools.partial(lambda *, scale: scale, scale=1.0)
    yield lambda: fn()
    fn.keywords["scale"] = 3.0
    yield None


def bound(box: Any) -> Iterator[Any]:
    yield box.method
    box.rate = 3.0
    yield None


def mark(fn: Any) -> Any:
    fn.rate = 1.0
    return fn


CASES: dict[str, Callable[[], Iterator[Any]]] = {
    "global": set_global,
    "list": lambda: through([1.0], first, set_first),
    "nested list": lambda: through([[1.0]], lambda b: b[0][0], lambda b: set_first(b[0])),
    "dict": lambda: through({"a": 1.0}, key_a, set_a),
    "deque": lambda: through(collections.deque([1.0]), first, set_first),
    "set": lambda: through({1.0}, total, swap_members),
    "frozenset": lambda: variable(frozenset({1.0}), frozenset({3.0}), total),
    "UserDict": lambda: through(collections.UserDict(a=1.0), key_a, set_a),
    "UserList": lambda: through(collections.UserList([1.0]), first, set_first),
    "ChainMap": lambda: through(collections.ChainMap({}, {"a": 1.0}), key_a, set_a),
    "mapping proxy": lambda: through({"a": 1.0}, lambda b: types.MappingProxyType(b)["a"], set_a),
    "dict values": lambda: variable({"a": 1.0}.values(), {"a": 3.0}.values(), total),
    "array.array": lambda: through(array.array("d", [1.0]), first, set_first),
    "a larger list, another": lambda: variable(*large(), total),
    "keys": lambda: variable({"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 1.0}, key_a),
    "keys swapped": lambda: variable({"a": 1.0, "b": 3.0}, {"b": 1.0, "a": 3.0}, key_a),
    "where None is": lambda: variable([1.0, None], [None, 1.0], lambda b: 1.0 if b[0] else 3.0),
    "structure": lambda: variable(
        [[1], [2, 3]], [[1, 2], [3]], lambda b: 1.0 if len(b[0]) == 1 else 3.0
    ),
    "object": lambda: through(Plain(), rate, set_rate),
    "SimpleNamespace": lambda: through(types.SimpleNamespace(rate=1.0), rate, set_rate),
    "Namespace": lambda: through(argparse.Namespace(rate=1.0), rate, set_rate),
    "dataclass": lambda: through(Data(1.0), rate, set_rate),
    "__slots__": lambda: through(Slots(1.0), rate, set_rate),
    "frozen dataclass with slots": lambda: variable(FrozenSlots(1.0), FrozenSlots(3.0), rate),
    "object in slots": lambda: through(
        FrozenSlots(1.0, Slots(1.0)), lambda b: b.more.rate, lambda b: set_rate(b.more)
    ),
    "named tuple": lambda: variable(Named(1.0), Named(3.0), rate),
    "property": lambda: through(Plain(), lambda b: b.twice / 2, set_rate),
    "getattr": lambda: through(Plain(), lambda b: getattr(b, "rate"), set_rate),  # noqa: B009
    "__getitem__": lambda: through(Plain(), lambda b: b["key"], set_rate),
    "__rmul__": lambda: through(Plain(), lambda b: 1.0 * b, set_rate),
    "__getattr__": lambda: through(
        Delegating(Plain()), lambda b: b.rate, lambda b: set_rate(b._inner)
    ),
    "super()": lambda: bound(Derived()),
    "method": lambda: bound(Plain()),
    "class attribute": set_class,
    "class attribute of an object": lambda: through(
        Plain(), lambda b: b.shared, lambda b: setattr(b, "shared", 3.0)
    ),
    "class method": lambda: through(
        type("Own", (Plain,), {"shared": 1.0}),
        lambda b: b.from_class(),
        lambda b: setattr(b, "shared", 3.0),
    ),
    "passed to a function that reads it": lambda: through(
        types.SimpleNamespace(deep=Plain()), helper, deep
    ),
    "partial of an object": lambda: through(
        functools.partial(helper, types.SimpleNamespace(deep=Plain())),
        lambda b: b(),
        lambda b: deep(b.args[0]),
    ),
    "keywords of a partial": keywords,
    "attribute of a function": lambda: through(mark(lambda: None), rate, set_rate),
    "module": set_module,
    "weakref": weak,
    "numpy 0-d array": lambda: through(np.array(1.0), float, lambda b: b.fill(3.0)),
    "numpy array": lambda: through(np.array([1.0]), lambda b: float(b[0]), set_first),
    "numpy number": lambda: variable(np.float32(1.0), np.float32(3.0), float),
    "complex": lambda: variable(1 + 0j, 3 + 0j, lambda c: c.real),
    "fraction": lambda: variable(fractions.Fraction(1), fractions.Fraction(3), float),
    "enum": lambda: variable(Mode.ONE, Mode.THREE, lambda m: 3.0 if m is Mode.THREE else 1.0),
    "bytes": lambda: variable(b"1", b"3", float),
    "range": lambda: variable(range(1), range(3), len),
    "dtype": lambda: variable(F64, torch.int64, lambda d: 1.0 if d == F64 else 3.0),
    "torch function": lambda: variable(
        torch.tanh, torch.exp, lambda f: 3.0 if f is torch.exp else 1.0
    ),
    "function": lambda: variable(lambda: 1.0, lambda: 3.0, lambda f: f()),
    "class": lambda: variable(int, str, lambda c: 1.0 if c is int else 3.0),
    "aliases": alias,
    "mode of a part of a module": lambda: layer(lambda net: net.drop.train()),
    "number of a module": lambda: layer(lambda net: setattr(net, "scale", 3.0)),
    "what forward reads": lambda: layer(lambda net: set_first(net.table)),
}


@pytest.fixture(autouse=True)
def compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is the trace, and that holds what was read."""
    monkeypatch.setattr(Backend, "__call__", lambda self, graph, operands: graph.forward)


@pytest.mark.parametrize("name", CASES)
def test_a_changed_number_gives_the_new_result(name: str) -> None:
    case = CASES[name]()
    read = next(case)

    def step(w: Tensor, h: Tensor) -> Tensor:
        return w * read() + h

    solvers = [hf.iterate(step, 1, init=lambda h: h, compile=c) for c in ("eager", False)]
    h = torch.tensor(2.0, dtype=F64)
    try:
        before = [float(solver(h)) for solver in solvers]
        assert before[0] == before[1]
        count = len(solvers[0].compiler.entries)
        assert float(solvers[0](h)) == before[0]
        assert len(solvers[0].compiler.entries) == count == 1
        next(case)
        after = [float(solver(h)) for solver in solvers]
        assert after[1] != before[1]
        assert after[0] == after[1]
    finally:
        for _ in case:
            pass


def test_variables_of_the_linear_solver() -> None:
    scale = 1.0
    calls = [
        hf.hypergrad(
            lambda h: h,
            lambda w, h: (w**3).sum(),
            inner_loss=lambda w, h: (w**4).sum() - h @ w,
            method=hf.CG(maxiter=1, rtol=0, preconditioner=lambda v: v * (scale + v.abs())),
            compile=compile,
        )
        for compile in ("eager", False)
    ]
    h = torch.tensor([1.0, 2.0], dtype=F64)
    before = [call(h) for call in calls]
    scale = 3.0
    after = [call(h) for call in calls]
    assert not torch.equal(*before[1:], *after[1:])
    torch.testing.assert_close(before[0], before[1])
    torch.testing.assert_close(after[0], after[1])


def test_what_is_not_looked_through() -> None:
    """What the docstring of `hypergrad` tells, to be changed together."""
    counter = itertools.count(1)
    net = nn.Linear(1, 1, bias=False)
    values = [0.0] * 2000

    def step(w: Tensor, h: Tensor) -> Tensor:
        return h * next(counter) + net.weight.detach().sum() + values[-1]

    solver = hf.iterate(step, 1, init=lambda h: h, compile="eager")
    h = torch.tensor(2.0)
    before = solver(h)
    values[-1] = 5.0
    net.weight = nn.Parameter(net.weight + 1)
    assert torch.equal(solver(h), before)
