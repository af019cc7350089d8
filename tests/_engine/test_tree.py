"""Params and hparams as trees of every kind, layout and dtype."""

import collections
import itertools
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import hyperfunc as hf
from hyperfunc._engine import trees
from hyperfunc._engine.trees import flatten, tree_map, unflatten
from hyperfunc._torch import batching

# torch compiles its rules for forward mode by a deprecated function when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

F64 = torch.float64


class Pair(NamedTuple):
    first: Any
    second: Any


class Node:
    """A class of the user's own, with a part that is no tensor."""

    def __init__(self, weight: Any, name: str) -> None:
        self.weight, self.name = weight, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.name == other.name

    __hash__ = None  # type: ignore[assignment]


optree.register_pytree_node(
    Node,
    lambda node: ((node.weight,), node.name, ("weight",)),
    lambda name, children: Node(children[0], name),
    path_entry_type=optree.GetAttrEntry,
    namespace="hyperfunc",
)


def randn(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


TREES: dict[str, Any] = {
    "a tensor": randn(3),
    "a number": randn(),
    "a dict": {"b": randn(2), "a": {"d": randn(), "c": randn(1, 2)}},
    "a list": [randn(2), [randn(), randn(1, 2)]],
    "a tuple": (randn(2),),
    "a namedtuple": Pair(randn(2), {"x": randn()}),
    "a registered class": {"node": Node([randn(2), randn()], "name")},
    "an ordered dict": collections.OrderedDict([("z", randn(2)), ("a", randn())]),
    "a deque": collections.deque([randn(2), randn(1)]),
    "integer keys": {1: randn(2), 0: randn(1)},
    "empty subtrees": {"a": randn(2), "dict": {}, "list": [], "tuple": (), "none": None},
    "an empty tensor": {"a": randn(2), "empty": torch.zeros(0, 3, dtype=F64)},
    "transposed": {"a": randn(3, 4).T, "b": randn(2, 3, 2).permute(2, 0, 1)},
    "strided": [randn(4, 6)[:, ::3], randn(6)[1::2]],
    "expanded": randn(1, 3).expand(2, 3),
    "channels last": randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "float32": {"a": randn(3, dtype=torch.float32), "b": randn(dtype=torch.float32)},
    "bfloat16": randn(4, dtype=torch.bfloat16),
    "float16": [randn(4, dtype=torch.float16), randn(dtype=torch.float16)],
    "float32 and float64": {"a": randn(2, dtype=torch.float32), "b": randn(), "c": randn(2)},
    "bfloat16 and float32": [randn(2, dtype=torch.bfloat16), randn(3, dtype=torch.float32)],
}


def total(tree: Any) -> Tensor:
    return sum((leaf.double().sum() for leaf in flatten(tree)[0]), torch.zeros((), dtype=F64))


def product(a: Any, b: Any) -> Tensor:
    return total(tree_map(lambda x, y: x.double() * y.double(), a, b))


# With N entries in all: A = 2 I + 1 1^T / 10, and so A^{-1} c = (c - sum(c) / (20 + N)) / 2.
def inner_loss(w: Any, h: Any) -> Tensor:
    return product(w, w) - product(w, h) + total(w) ** 2 / 20


def solution(h: Any) -> Any:
    mean = total(h) / (20 + sum(leaf.numel() for leaf in flatten(h)[0]))
    return tree_map(lambda leaf: ((leaf.double() - mean) / 2).to(leaf.dtype), h)


def outer_loss(w: Any, h: Any) -> Tensor:
    return total(tree_map(lambda leaf: leaf.double().sin(), w)) + product(h, h) / 2


def hypergradient(h: Any) -> Any:
    cosines = tree_map(lambda leaf: leaf.double().cos(), solution(tree_map(Tensor.double, h)))
    return tree_map(lambda leaf, u: leaf.double() + u, h, solution(cosines))


def gradient_step(w: Any, h: Any) -> Any:
    leaves, spec = flatten(w)
    steps = grad(lambda leaves: inner_loss(unflatten(spec, leaves), h))(leaves)
    return unflatten(spec, [leaf - 0.3 * g for leaf, g in zip(leaves, steps, strict=True)])


def assert_like(actual: Any, h: Any, expected: Any) -> None:
    """Of the structure, shapes and dtypes of h, with the values that are expected."""
    (leaves, spec), (like, like_spec) = flatten(actual), flatten(h)
    assert spec == like_spec
    assert type(actual) is type(h)
    if isinstance(h, dict):
        assert list(actual) == list(h)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
        (leaf.shape, leaf.dtype) for leaf in like
    ]
    tolerance = max(3 * trees.epsilon(tuple(like)) ** 0.75, 1e-11)
    for leaf, value in zip(leaves, flatten(expected)[0], strict=True):
        torch.testing.assert_close(leaf.double(), value, rtol=tolerance, atol=tolerance)


METHODS = ["cg", "normal_cg", "dense", "fixed_point"]
# Of the product, each tree by two methods and two trees by all; the rest is slow.
KEPT = ("cg", "inner_loss"), ("fixed_point", "fixed_point")


@pytest.mark.parametrize(
    ("kind", "method", "name"),
    [
        pytest.param(
            *(kind, method, name),
            marks=()
            if (method, kind) in KEPT or name in ("a dict", "bfloat16 and float32")
            else pytest.mark.slow,
        )
        for kind, method, name in itertools.product(("inner_loss", "fixed_point"), METHODS, TREES)
    ],
)
def test_trees(name: str, method: str, kind: str) -> None:
    h = TREES[name]
    leaves, spec = flatten(h)
    condition = {kind: {"inner_loss": inner_loss, "fixed_point": gradient_step}[kind]}
    if method == "fixed_point" and kind == "inner_loss":
        method = hf.FixedPoint(step_size=0.3)
    keywords: Any = condition | {"method": method}
    fn = hf.hypergrad_and_solution(solution, outer_loss, **keywords)
    grads, found = fn(h)
    expected = hypergradient(h)
    assert_like(grads, h, expected)
    assert_like(found.params, h, solution(tree_map(Tensor.double, h)))
    assert flatten(found.adjoint)[1] == spec
    again, _ = fn(h, adjoint_init=found.adjoint)
    assert_like(again, h, expected)

    batched = vmap(lambda *t: tuple(flatten(fn(unflatten(spec, t))[0])[0]))(
        *[torch.stack([leaf, leaf]) for leaf in leaves]
    )
    assert_like(unflatten(spec, [leaf[1] for leaf in batched]), h, expected)

    implicit = hf.implicit_diff(solution, **keywords)

    def value(*leaves: Tensor) -> Tensor:
        tree = unflatten(spec, leaves)
        return outer_loss(implicit(tree), tree)

    by_grad = grad(value, tuple(range(len(leaves))))(*leaves)
    assert_like(unflatten(spec, by_grad), h, expected)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    value(*inputs).backward()
    assert_like(unflatten(spec, [leaf.grad for leaf in inputs]), h, expected)


def test_layouts_are_kept() -> None:
    for name in ("transposed", "channels last"):
        h = TREES[name]
        grads, found = hf.hypergrad_and_solution(solution, outer_loss, inner_loss=inner_loss)(h)
        for tree in (grads, found.params, found.adjoint):
            strides = [leaf.stride() for leaf in flatten(tree)[0]]
            assert strides == [leaf.stride() for leaf in flatten(h)[0]]


def test_torch_func_on_dicts() -> None:
    """Jacobians of dicts, by torch's own trees, whose keys are in another order than here."""
    h = {"b": randn(2), "a": randn()}
    fn = hf.hypergrad(solution, outer_loss, inner_loss=inner_loss, method="dense")
    value = hf.implicit_diff(solution, inner_loss=inner_loss, method="dense")
    expected = hessian(lambda h: outer_loss(solution(h), h))(h)
    for actual in (
        jacrev(fn)(h),
        jacfwd(fn)(h),
        hessian(lambda h: outer_loss(value(h), h))(h),
        jacrev(jacfwd(lambda h: outer_loss(value(h), h)))(h),
    ):
        for row in h:
            for column in h:
                torch.testing.assert_close(actual[row][column], expected[row][column])


def test_hparams_of_another_structure_and_dtype_than_params() -> None:
    h = [torch.tensor(0.5, dtype=torch.float32), randn(2)]

    def residual(w: Any, h: Any) -> Any:
        return {"w": w["w"] - h[0] * h[1]}

    grads = hf.hypergrad(
        lambda h: {"w": h[0] * h[1]}, lambda w, h: (w["w"] ** 2).sum(), optimality=residual
    )(h)
    assert [g.dtype for g in grads] == [torch.float32, F64]
    torch.testing.assert_close(grads[0].double(), 2 * 0.5 * (h[1] ** 2).sum())
    torch.testing.assert_close(grads[1], 2 * 0.25 * h[1])


# Forward mode over numbers ------------------------------------------------------------------------


def test_inner_products_are_on_the_device_of_the_first_leaf(device: torch.device) -> None:
    leaves = (torch.ones(3), 2 * torch.ones(2, 2, device=device))
    for order in (leaves, leaves[::-1]):
        product = trees.dot(order, order)
        assert (product.item(), product.device) == (19.0, order[0].device)


def test_leaves_after_one_that_is_the_same_are_checked_too() -> None:
    like, spec = trees.flatten([torch.ones(2), torch.ones(3)])
    with pytest.raises(
        ValueError, match=r"the leaf for params\[1\] has shape \(2,\), expected \(3,\)"
    ):
        trees.check_like([like[0], like[0]], spec, tuple(like), spec, "the output", "params")


def test_tangents_keep_their_dtype() -> None:
    """A number times a 0-d float32 tensor has a float64 tangent in torch, which must not spread."""

    def loss(w: Any, h: Any) -> Tensor:
        penalty = 0.5 * h["reg"] * ((w["b"] - 0.2 * h["b"]) ** 2 + (w["w"] ** 2).sum())
        return 0.5 * ((w["w"] - h["x"]) ** 2).sum() + 0.5 * w["w"].sum() * w["b"] + penalty

    def solve(h: Any) -> Any:
        n = h["x"].numel()
        A = torch.block_diag((1 + h["reg"]) * torch.eye(n), h["reg"].reshape(1, 1))
        A[n, :n] = A[:n, n] = 0.5
        u = torch.linalg.solve(A, torch.cat([h["x"], (0.2 * h["reg"] * h["b"]).reshape(1)]))
        return {"w": u[:n], "b": u[n]}

    def outer(w: Any, h: Any) -> Tensor:
        return (torch.stack([w["w"], w["w"]]) @ w["w"]).sum() + 0.3 * w["b"] ** 2

    h = {"reg": torch.tensor(2.0), "b": torch.tensor(0.7), "x": torch.tensor([0.3, -0.4])}
    expected = jacrev(jacrev(lambda h: outer(solve(h), h)))(h)
    for method in ("cg", "normal_cg", "dense", hf.FixedPoint(step_size=0.4)):
        fn = hf.implicit_diff(solve, inner_loss=loss, method=method)
        for compose in (lambda f: jacfwd(jacfwd(f)), hessian, lambda f: jacrev(jacfwd(f))):
            actual = compose(lambda h, fn=fn: outer(fn(h), h))(h)
            for row in h:
                for column in h:
                    torch.testing.assert_close(
                        actual[row][column].float(),
                        expected[row][column],
                        rtol=2e-4,
                        atol=2e-4,
                    )


# The vector algebra -------------------------------------------------------------------------------


def test_inner_products() -> None:
    ones = torch.ones(3000, dtype=torch.bfloat16)
    assert trees.dot((ones,), (ones,)).item() == 3000  # in bfloat16 the sum stops at 256
    assert trees.dot((ones,), (ones,)).dtype == torch.float32
    assert trees.norm((ones, randn(2))).dtype == F64
    a, b = randn(3, 4), randn(4, 3).T
    assert trees.dot((a,), (b,)).item() == pytest.approx((a * b).sum().item(), rel=1e-14)
    image = randn(2, 3, 2, 2)
    last = image.to(memory_format=torch.channels_last)
    assert trees.dot((last,), (image,)).item() == pytest.approx((image**2).sum().item(), rel=1e-14)


@pytest.mark.parametrize("alpha", [2.5, -1.0, torch.tensor(2.5), torch.tensor(2.5, dtype=F64)])
def test_linear_combinations(alpha: Any) -> None:
    x = (randn(2, dtype=torch.float32), randn(), randn(2, 3).T, randn(2, dtype=torch.bfloat16))
    y = tuple(leaf + 1 for leaf in x)
    for actual, expected in [
        (trees.axpy(alpha, x, y), [v + alpha * u for u, v in zip(x, y, strict=True)]),
        (trees.scale(alpha, x), [alpha * u for u in x]),
        (trees.add(x, y), [u + v for u, v in zip(x, y, strict=True)]),
        (trees.sub(x, y), [u - v for u, v in zip(x, y, strict=True)]),
        (trees.neg(x), [-u for u in x]),
        (trees.zeros_like(x), [0 * u for u in x]),
        (trees.where(torch.tensor(True), x, y), x),
        (trees.where(torch.tensor(False), x, y), y),
    ]:
        for leaf, value, like in zip(actual, expected, x, strict=True):
            assert (leaf.dtype, leaf.shape) == (like.dtype, like.shape)
            rtol = 4 * torch.finfo(like.dtype).eps
            torch.testing.assert_close(leaf.double(), value.double(), rtol=rtol, atol=rtol)


def test_finiteness() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not trees.all_finite((randn(2), torch.tensor([1.0, bad])))
    assert trees.all_finite((randn(2), torch.zeros(0)))


def test_paths_are_expressions() -> None:
    tree = {"fc1": {"weight": 1, "bias": [2, Pair(3, 4)]}, 5: Node(6, "name")}
    leaves, spec = flatten(tree)
    for path, leaf in zip(trees.paths(spec, "tree"), leaves, strict=True):
        assert eval(path, {"tree": tree}) == leaf
    assert trees.paths(flatten(1)[1], "params") == ["params"]


@pytest.mark.parametrize("size", [0, 3, 40_000])  # the last in three pieces
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0)])
def test_inner_products_under_vmap_are_those_of_the_tasks(
    size: int, in_dims: tuple[int | None, ...]
) -> None:
    x, y = randn(2, 3, size), randn(2, 3, size)

    def rows(value: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, ...]:
        return (value[0, 0],) * 3 if dim is None else tuple(value[0])

    def entry(value: torch.Tensor, dim: int | None) -> torch.Tensor:
        return value[0, 0] if dim is None else torch.stack(rows(value, dim), dim)

    dot = torch.func.vmap(lambda a, b: trees.dot((a,), (b,)), in_dims)
    expected = torch.stack(
        [
            torch.dot(a, b)
            for a, b in zip(
                *(rows(v, d) for v, d in zip((x, y), in_dims, strict=True)), strict=True
            )
        ]
    )
    torch.testing.assert_close(
        dot(*(entry(v, d) for v, d in zip((x, y), in_dims, strict=True))), expected
    )
    direct = torch.func.vmap(batching.dot, in_dims)
    torch.testing.assert_close(
        direct(*(entry(v, d) for v, d in zip((x, y), in_dims, strict=True))), expected
    )
    nested = torch.func.vmap(torch.func.vmap(lambda a, b: trees.dot((a,), (b,)), (0, 0)), (0, None))
    torch.testing.assert_close(nested(x, y[0]), (x * y[0]).sum(-1))
    one = lambda a, b: trees.dot((a,), (b,))  # noqa: E731
    grad = torch.func.vmap(torch.func.grad(one))(x[0], y[0])
    torch.testing.assert_close(grad, y[0])
    total = torch.func.grad(lambda a: torch.func.vmap(one)(a, y[0]).sum())
    torch.testing.assert_close(total(x[0]), y[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finiteness_is_told_entry_by_entry(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    finite = torch.tensor([[largest, largest, -1.0], [-largest, -largest, 0.0]], dtype=dtype)
    assert trees.all_finite((finite, torch.zeros((), dtype=dtype)))
    for value in (torch.inf, -torch.inf, torch.nan):
        broken = finite.clone()
        broken[1, 2] = value
        assert not trees.all_finite((torch.ones(2), broken))
        flags = torch.func.vmap(lambda row: trees.all_finite((row,)))(broken)
        assert flags.tolist() == [True, False]
