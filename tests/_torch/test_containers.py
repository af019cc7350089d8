"""Objects that hold tensors are nodes of trees, or are refused; no tensor in them is lost."""

import collections
import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import hyperfunc as hf
from hyperfunc._engine import trees


@dataclasses.dataclass
class Batch:
    x: Tensor
    name: str = "batch"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    name: str = "frozen"

    def __post_init__(self) -> None:
        assert self.name


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Tensor


class Dictionary(dict):  # type: ignore[type-arg]
    extra = 3


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]
    """As the outputs of transformers: an entry is an attribute too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Encoding(collections.UserDict):  # type: ignore[type-arg]
    """As the batches of tokenizers."""

    def __init__(self, data: Any, kind: str = "words") -> None:
        super().__init__(data)
        self.kind = kind


class Rows(list):  # type: ignore[type-arg]
    pass


def ordered(x: Tensor) -> Ordered:
    result = Ordered()
    result["x"] = x
    return result


WRAPPERS: dict[str, tuple[Any, Any]] = {
    "dataclass": (Batch, lambda b: b.x),
    "frozen dataclass": (Frozen, lambda b: b.x),
    "dataclass with slots": (Slotted, lambda b: b.x),
    "nested": (lambda x: Frozen({"inner": [Batch(x)]}), lambda b: b.x["inner"][0].x),
    "subclass of dict": (lambda x: Dictionary(x=x), lambda b: b["x"]),
    "attribute of an entry": (ordered, lambda b: b.x + 0 * b["x"]),
    "UserDict": (lambda x: Encoding({"x": x}), lambda b: b["x"]),
    "subclass of list": (lambda x: Rows([x]), lambda b: b[0]),
}
METHODS = ["solver itself", "reverse_unroll", "reverse", "forward", "cg"]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_derivatives_reach_the_tensors_of_an_argument(kind: str) -> None:
    wrap, get = WRAPPERS[kind]

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return ((get(batch) @ w - 1) ** 2).mean() + h * (w**2).sum()

    solver = hf.minimize(loss, hf.optim.sgd(lr=0.4), 40, init=lambda h, b: torch.zeros(3).double())
    x, h = torch.randn(10, 3).double(), torch.tensor(0.5).double()

    def closed(x: Tensor) -> Tensor:
        A = x.T @ x / len(x) + h * torch.eye(3).double()
        return (torch.linalg.solve(A, x.sum(0) / len(x)) ** 2).sum()

    expected = grad(closed)(x)
    for method in METHODS:
        solve = solver if method == METHODS[0] else hf.implicit_diff(solver, method=method)
        leaf = x.clone().requires_grad_()
        (solve(h, wrap(leaf)) ** 2).sum().backward()
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-9, msg=method)
        batched = vmap(grad(lambda x, solve=solve: (solve(h, wrap(x)) ** 2).sum()))(
            x.expand(2, -1, -1)
        )
        torch.testing.assert_close(batched[1], expected, rtol=1e-6, atol=1e-9, msg=method)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_aux_holds_no_graph_and_leaves_its_vmap(kind: str) -> None:
    wrap, get = WRAPPERS[kind]
    x = torch.randn(10, 3)

    def outer(w: Tensor, h: Tensor) -> Any:
        return ((x @ w) ** 2).mean(), wrap(h * (x @ w))

    solver = hf.minimize(
        lambda w, h: ((x @ w - 1) ** 2).mean() + h * (w**2).sum(),
        hf.optim.sgd(lr=0.1),
        20,
        init=lambda h: torch.zeros(3),
    )
    for method in ("reverse_unroll", "cg"):
        fn = hf.hypergrad_and_value(solver, outer, method=method, has_aux=True)
        _, (_, aux) = fn(torch.tensor(0.5))
        assert type(aux) is type(wrap(x))
        assert not get(aux).requires_grad
        _, (_, mapped) = hf.task_map(fn)(torch.tensor([0.5, 1.5]))
        torch.testing.assert_close(get(mapped)[0], get(aux))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_is_taken_apart_is_put_together(kind: str) -> None:
    wrap, get = WRAPPERS[kind]
    value = wrap(torch.ones(2))
    leaves, spec = trees.flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert len(tensors) == 1
    again = trees.unflatten(
        spec, [leaf + 1 if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    )
    assert type(again) is type(value)
    assert torch.equal(get(again), torch.full((2,), 2.0))
    assert torch.equal(get(value), torch.ones(2))
    assert trees.flatten(again)[1] == spec
    for name in ("name", "kind", "extra"):
        assert getattr(again, name, None) == getattr(value, name, None)
    assert len(trees.paths(spec, "b")) == len(leaves)
    assert eval(trees.paths(spec, "b")[0], {"b": value}) is leaves[0]


class Holder:
    def __init__(self, x: Tensor) -> None:
        self.deep = {"x": [x]}


REFUSED = {
    "object": (Holder, r"\(hparams, \*args\)\[1\]\.deep\['x'\]\[0\]"),
    "namespace": (lambda x: types.SimpleNamespace(x=x), r"types\.SimpleNamespace.*\.x"),
    "set": (lambda x: {x}, r"builtins\.set"),
    "distribution": (lambda x: torch.distributions.Normal(x, 1.0), r"Normal.*\.loc"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_objects_of_other_kinds_are_refused_by_name(kind: str) -> None:
    wrap, message = REFUSED[kind]
    fn = hf.hypergrad(
        lambda h, b: h, lambda w, h, b: w.sum(), inner_loss=lambda w, h, b: ((w - h) ** 2).sum()
    )
    solver = hf.minimize(
        lambda w, h, b: ((w - h) ** 2).sum(), hf.optim.sgd(lr=0.1), 2, init=lambda h, b: h
    )
    attached = torch.ones(2).requires_grad_()
    with pytest.raises(TypeError, match=message):
        fn(torch.ones(2), wrap(attached))
    with pytest.raises(TypeError, match="holds the tensor"):
        vmap(lambda x: fn(torch.ones(2), wrap(x)))(torch.ones(3, 2))
    with pytest.raises(TypeError, match="holds the tensor"):
        solver(torch.ones(2), wrap(attached))
    fn(torch.ones(2), wrap(torch.ones(2)))  # a constant
    with pytest.raises(TypeError, match=r"aux.* holds the tensor"):
        hf.hypergrad_and_value(
            lambda h: h,
            lambda w, h: (w.sum(), wrap(w)),
            inner_loss=lambda w, h: ((w - h) ** 2).sum(),
            has_aux=True,
        )(torch.ones(2))


def test_a_tensor_beside_the_fields_is_refused() -> None:
    batch = Batch(torch.ones(2))
    batch.more = torch.ones(3)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="holds a tensor in its attribute 'more'"):
        trees.flatten(batch)
