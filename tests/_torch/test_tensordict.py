"""TensorDicts as params, hparams and arguments: what dicts give, as TensorDicts."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictParams
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc._engine import trees

F64 = torch.float64
TASKS = 4
Cls = Callable[[dict[str, Any]], Any]


def inner_loss(w: Any, h: Any, data: Any) -> Tensor:
    error = data["x"] @ w["slope"] + w["more"]["offset"] - data["y"]
    weighted = (h["slope"].exp() * w["slope"] ** 2).sum()
    return (error**2).sum() + weighted + h["more"]["offset"].exp() * w["more"]["offset"] ** 2


def outer_loss(w: Any, h: Any, data: Any) -> Tensor:
    return ((data["x"] @ w["slope"] + w["more"]["offset"] - 1) ** 2).sum() + h["more"]["offset"]


def solver_of(cls: Cls) -> Callable[..., Any]:
    """The minimum in closed form, as a tree made by `cls`."""

    def solve(h: Any, data: Any) -> Any:
        x = torch.cat([data["x"], torch.ones_like(data["x"][:, :1])], dim=1)
        reg = torch.cat([h["slope"], h["more"]["offset"][None]]).exp()
        w = torch.linalg.inv(x.T @ x + torch.diag(reg)) @ (x.T @ data["y"])
        return cls({"slope": w[:3], "more": {"offset": w[3]}})

    return solve


def descent_of(cls: Cls) -> Callable[..., Any]:
    def init(h: Any, data: Any) -> Any:
        return cls({"slope": h["slope"] * 0, "more": {"offset": h["more"]["offset"] * 0}})

    return hf.minimize(inner_loss, hf.optim.adam(lr=0.1), 8, init=init)


def sample(batch: tuple[int, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyperparameters and data."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn((*batch, *shape), dtype=F64, generator=generator)

    return {"slope": randn(3), "more": {"offset": randn()}}, {"x": randn(6, 3), "y": randn(6)}


def assert_equal(actual: Any, expected: dict[str, Any], batch: tuple[int, ...] = ()) -> None:
    """The same numbers, in TensorDicts at every level."""
    assert type(actual) is TensorDict
    assert actual.batch_size == batch
    assert set(actual.keys()) == set(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(actual[key], value, batch)
        else:
            torch.testing.assert_close(actual[key], value, rtol=1e-12, atol=1e-12)


METHODS: dict[str, tuple[Any, Callable[[Cls], Any]]] = {
    **{name: (name, solver_of) for name in ("cg", "normal_cg", "gmres", "bicgstab", "dense")},
    **{name: (name, solver_of) for name in ("nystrom", "one_step", "auto", "reverse_unroll")},
    "fixed_point": (hf.FixedPoint(500, step_size=0.02), solver_of),
    "neumann": (hf.Neumann(500, step_size=0.02), solver_of),
    "anderson": (hf.AndersonFixedPoint(), solver_of),
    "blockwise": (hf.Blockwise(hf.CG(maxiter=2, rtol=0)), solver_of),
    "jacobi": (hf.CG(preconditioner=hf.JacobiPreconditioner()), solver_of),
    "reverse": ("reverse", descent_of),
    "forward": ("forward", descent_of),
    "binomial": (hf.Reverse("binomial", slots=2), descent_of),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    method, make = METHODS[name]
    h, data = sample()
    results: list[Any] = []
    for cls in (dict, TensorDict):
        torch.manual_seed(0)  # for the methods that draw test vectors
        fn = hf.hypergrad_and_solution(make(cls), outer_loss, inner_loss=inner_loss, method=method)
        results.append(fn(cls(h), cls(data)))
    (expected, reference), (actual, solution) = results
    assert_equal(actual, expected)
    assert_equal(solution.params, reference.params)
    if solution.adjoint != ():
        assert_equal(solution.adjoint, reference.adjoint)


@pytest.mark.parametrize("method", ["cg", "gmres", "reverse_unroll"])
def test_vmap(method: str) -> None:
    """A batch of TensorDicts in, a TensorDict of the batch out; nested, and in chunks, too."""
    h, data = sample((TASKS, 2))
    hs, datas = (TensorDict(tree, batch_size=(TASKS, 2)) for tree in (h, data))
    fns = {
        cls: hf.hypergrad(solver_of(cls), outer_loss, inner_loss=inner_loss, method=method)
        for cls in (dict, TensorDict)
    }
    expected = vmap(vmap(fns[dict]))(h, data)
    assert_equal(vmap(vmap(fns[TensorDict]))(hs, datas), expected, (TASKS, 2))
    assert_equal(vmap(vmap(fns[TensorDict]), chunk_size=3)(hs, datas), expected, (TASKS, 2))
    column = trees.tree_map(lambda leaf: leaf[:, 0], expected)
    for size in (1, 3, None):
        mapped = hf.task_map(fns[TensorDict], chunk_size=size)
        assert_equal(mapped(hs[:, 0], datas[:, 0]), column, (TASKS,))
    shared = vmap(fns[TensorDict], in_dims=(None, 0))(hs[0, 0], datas[:, 0])
    assert_equal(shared[:1], trees.tree_map(lambda leaf: leaf[:1, 0], expected), (1,))


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd])
def test_differentiable_solver(transform: Callable[..., Any]) -> None:
    h, data = sample()
    results: list[Any] = []
    for cls in (dict, TensorDict):
        minimum = hf.implicit_diff(solver_of(cls), inner_loss=inner_loss)
        value = lambda h, d, minimum=minimum: outer_loss(minimum(h, d), h, d)  # noqa: E731
        results += [transform(value)(cls(h), cls(data)), hessian(value)(cls(h), cls(data))]
        leaves = trees.tree_map(lambda t: t.clone().requires_grad_(), h)
        value(cls(leaves), cls(data)).backward()
        results.append(trees.tree_map(lambda t: t.grad, leaves))
    expected, curvature, backward = results[:3]
    assert_equal(results[3], expected)
    assert_equal(results[4]["slope"], curvature["slope"])
    torch.testing.assert_close(results[5], backward, rtol=1e-12, atol=1e-12)


def test_compiled() -> None:
    h, data = sample()
    fn = hf.hypergrad(
        solver_of(TensorDict),
        outer_loss,
        inner_loss=inner_loss,
        method=hf.CG(maxiter=4, rtol=0),
        compile="eager",
    )
    plain = hf.hypergrad(solver_of(dict), outer_loss, inner_loss=inner_loss)
    assert_equal(fn(TensorDict(h), TensorDict(data)), plain(h, data))


def test_what_comes_back() -> None:
    """Batch, names of dimensions and device are those of hparams; nothing passed is changed."""
    h = TensorDict({"w": torch.ones(3, 2), "more": {"b": torch.ones(3)}}, [3], "cpu", ["row"])
    before = h.clone()
    grads, solution = hf.hypergrad_and_solution(
        lambda h: h * 2,
        lambda w, h: (w["w"] ** 2).sum() + w["more"]["b"].sum(),
        optimality=lambda w, h: TensorDict({k: w[k] - 2 * h[k] for k in ("w", "more")}, [3]),
        method="gmres",
    )(h)
    for tree in (grads, solution.params, solution.adjoint):
        assert (tree.batch_size, tree.names, tree.device) == (h.batch_size, h.names, h.device)
    assert_equal(grads, {"w": torch.full((3, 2), 8.0), "more": {"b": torch.full((3,), 2.0)}}, (3,))
    assert (h == before).all()
    assert not h.is_locked


TREES: dict[str, tuple[Any, Any]] = {
    "order of keys": ({"a": torch.zeros(2), "b": torch.ones(2)}, None),
    "nested": ({"a": {"b": torch.zeros(2), "c": {"d": torch.ones(())}}}, None),
    "empty": ({"a": {}, "b": torch.zeros(2)}, None),
    "text": ({"a": torch.zeros(2), "b": "text"}, None),
    "parameters": ({"a": torch.zeros(2)}, TensorDictParams),
}


@pytest.mark.parametrize("name", TREES)
def test_round_trip(name: str) -> None:
    entries, wrapper = TREES[name]
    tree = TensorDict(entries)
    leaves, spec = trees.flatten({"tree": wrapper(tree) if wrapper else tree})
    again = trees.unflatten(spec, leaves)["tree"]
    assert type(again) is TensorDict
    again_leaves, again_spec = trees.flatten({"tree": again})
    trees.check_like(again_leaves, again_spec, tuple(leaves), spec, "again", "tree")
    assert str(again.to_dict()) == str(dict(sorted(tree.to_dict().items())))


def test_the_order_of_keys_is_no_structure() -> None:
    h = TensorDict({"b": torch.ones(2), "a": torch.zeros(3)})
    fn = hf.hypergrad(
        lambda h: TensorDict({"b": h["b"] * 2, "a": h["a"] + 1}),
        lambda w, h: (w["b"] ** 2).sum() + w["a"].sum(),
        optimality=lambda w, h: TensorDict({"a": w["a"] - h["a"] - 1, "b": w["b"] - 2 * h["b"]}),
        method="gmres",
    )
    assert_equal(fn(h), {"a": torch.ones(3), "b": torch.full((2,), 8.0)})


BATCHES = {
    "a row": (lambda t: t[0], (4,)),
    "rows": (lambda t: t[:2], (2, 4)),
    "stacked": (lambda t: torch.stack([t] * 5), (5, 3, 4)),
    "numbers": (lambda t: t.sum(), ()),
    "columns": (lambda t: t[:, :1], (3, 1)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_follows_the_leaves(name: str) -> None:
    change, expected = BATCHES[name]
    tree = TensorDict({"a": torch.ones(3, 4, 2), "n": {"b": torch.ones(3, 4)}}, [3, 4])
    mapped = trees.tree_map(change, tree)
    assert mapped.batch_size == expected
    assert mapped["n"].batch_size == expected


def test_leaves_that_are_no_tensors_give_a_dict() -> None:
    tree = TensorDict({"a": torch.ones(3), "n": {"b": torch.ones(3)}})
    assert trees.tree_map(lambda leaf: leaf.shape[0], tree) == {"a": 3, "n": {"b": 3}}


def test_assign_grads() -> None:
    h, data = sample()
    fn = hf.hypergrad(solver_of(TensorDict), outer_loss, inner_loss=inner_loss)
    expected = fn(TensorDict(h), TensorDict(data))
    tree = TensorDict(h).clone().apply(lambda t: t.requires_grad_())
    for target in (tree, TensorDictParams(TensorDict(h).clone())):
        grads = fn(target.detach(), TensorDict(data))
        hf.assign_grads({"h": target}, {"h": grads})
        hf.assign_grads(target, grads)
        actual = TensorDict(target).apply(lambda t: t.grad)
        assert_equal(actual, expected.to_dict())


def test_optimisers_and_loops() -> None:
    """What carries trees from step to step: hf.optim, a fixed-point solver, a bilevel loop."""
    h, data = sample()
    solver = hf.fixed_point_solvers.Anderson()
    fixed_point = hf.gradient_descent_map(inner_loss, lr=0.02)
    results: list[Any] = []
    for cls in (dict, TensorDict):
        start = cls({"slope": torch.zeros(3, dtype=F64), "more": {"offset": h["more"]["offset"]}})
        z, _ = solver(fixed_point, start, cls(h), cls(data))
        loop = hf.bilevel.soba(inner_loss, outer_loss, inner_lr=0.01, outer_lr=0.01)
        state = loop.init(start, cls(h))
        for _ in range(3):
            state = loop.update(state, (cls(data),), (cls(data),))
        results.append((z, state.params, state.hparams))
    for expected, actual in zip(*results, strict=True):
        assert_equal(actual, expected)


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (
        lambda: TensorDict({"a": {"n": torch.arange(2)}}),
        TypeError,
        r"hparams\['a'\]\['n'\] has dtype torch.int64; expected a floating-point tensor",
    ),
    "text": (
        lambda: TensorDict({"a": torch.ones(2), "s": "text"}),
        TypeError,
        r"(?s)hparams\['s'\] is NonTensorData.*or pass it through \*args",
    ),
    "a lazy stack": (
        lambda: LazyStackedTensorDict(*[TensorDict({"a": torch.ones(2)})] * 2),
        TypeError,
        r"(?s)hparams is LazyStackedTensorDict.*Call \.to_tensordict\(\) on it",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str) -> None:
    make, error, message = CALLS[name]
    fn = hf.hypergrad(lambda h: h, lambda w, h: w["a"].sum(), optimality=lambda w, h: w - h)
    with pytest.raises(error, match=message):
        fn(make())


def test_captured() -> None:
    """A TensorDict that a function closes over is looked through."""
    held = TensorDict({"a": {"b": torch.ones(2, requires_grad=True)}})
    fn = hf.hypergrad(
        lambda h: h, lambda w, h: w.sum(), inner_loss=lambda w, h: (held["a", "b"] * w - h).sum()
    )
    with pytest.raises(ValueError, match="inner_loss closes over a tensor that requires grad"):
        fn(torch.ones(2))


def test_imported_afterwards() -> None:
    """The package does not import tensordict, and knows it however late it is imported."""
    code = """
import sys, torch, hyperfunc as hf
fn = hf.hypergrad(lambda h: h, lambda w, h: w["a"].sum() + h["a"].sum(), optimality=lambda w, h: w)
fn({"a": torch.ones(2)})
assert "tensordict" not in sys.modules
from tensordict import TensorDict
assert type(fn(TensorDict({"a": torch.ones(2)}))) is TensorDict
"""
    subprocess.run([sys.executable, "-c", code], check=True)
