"""What holds of every tree, size, dtype and method, on examples drawn at random."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import ravel, stack, unraveller
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf

F64 = torch.float64
Pair = collections.namedtuple("Pair", "first second")

# Trees --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf yet to be made: its shape, its layout in memory, and a dtype for mixed trees."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype

    def lay_out(self, value: Tensor) -> Tensor:
        """The same values in this layout."""
        if self.layout == "transposed" and value.ndim > 1:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "strided" and value.ndim > 0:
            return value.repeat_interleave(2, dim=-1)[..., ::2]
        if self.layout == "channels_last" and value.ndim == 4:
            return value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return value

    def sample(self, generator: torch.Generator) -> Tensor:
        if self.layout == "expanded":  # one number in memory
            return torch.rand((), generator=generator, dtype=F64).expand(self.shape) - 0.5
        return self.lay_out(torch.rand(self.shape, generator=generator, dtype=F64) - 0.5)


LEAVES = st.builds(
    Leaf,
    shape=st.sampled_from([(), (), (1,), (3,), (2, 2), (0,), (1, 2, 1, 2)]),
    layout=st.sampled_from(["plain", "transposed", "strided", "channels_last", "expanded"]),
    dtype=st.sampled_from([torch.float32, F64]),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abcxyz"), children, max_size=3),
        st.builds(Pair, children, st.one_of(children, st.none())),
    ),
    max_leaves=4,
).filter(lambda tree: any(0 not in leaf.shape for leaf in optree.tree_leaves(tree)))

METHODS = st.sampled_from(
    [
        hf.CG(),
        hf.NormalCG(),
        hf.GMRES(),
        hf.BiCGStab(),
        hf.Dense(),
        hf.FixedPoint(step_size=0.4),
        hf.CG(preconditioner=hf.JacobiPreconditioner(num_probes=3)),
        hf.ReverseUnroll(),
    ]
)

# The inner problem: 1/2 <w, A w> + 1/2 exp(reg) ||w||^2 - <center, w> -----------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """Of the shape of a tree, with the layouts of its leaves in hparams and params."""

    tree: Any

    def task(self, seed: int) -> tuple[Any, Tensor]:
        """Hparams and the matrix, with eigenvalues of ``A + exp(reg) I`` between 1 and 4."""
        generator = torch.Generator().manual_seed(seed)
        center = optree.tree_map(lambda leaf: leaf.sample(generator), self.tree)
        n = ravel(center).numel()
        B = torch.randn(n, n, generator=generator, dtype=F64)
        A = B @ B.mT / (1 + torch.linalg.matrix_norm(B, 2) ** 2) + 0.5 * torch.eye(n, dtype=F64)
        return {"reg": torch.rand((), generator=generator, dtype=F64), "center": center}, A

    def solve(self, h: Any, A: Tensor) -> Any:
        c = ravel(h["center"])
        system = A.to(c.dtype) + h["reg"].exp() * torch.eye(len(c), dtype=c.dtype)
        w = unraveller(h["center"])(torch.linalg.solve(system, c))
        return optree.tree_map(
            lambda leaf, x, like: leaf.lay_out(x.to(like.dtype)), self.tree, w, h["center"]
        )

    def inner_loss(self, w: Any, h: Any, A: Tensor) -> Tensor:
        v = ravel(w)
        quadratic = v @ (A.to(v.dtype) @ v) + h["reg"].exp() * (v**2).sum()
        return 0.5 * quadratic - ravel(h["center"]) @ v

    def hypergrad(self, method: Any, outer_loss: Callable[..., Tensor]) -> Any:
        return hf.hypergrad(self.solve, outer_loss, inner_loss=self.inner_loss, method=method)


def wave(w: Any, h: Any, A: Tensor) -> Tensor:
    return ravel(w).sin().sum() + h["reg"] * ravel(h["center"]).square().sum()


def square(w: Any, h: Any, A: Tensor) -> Tensor:
    return (ravel(w) * ravel(h["center"])).sum() + ravel(w).square().sum()


def check_close(got: Any, expected: Any, rtol: float = 1e-7, atol: float = 1e-9) -> None:
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_stride=False)


# Properties ---------------------------------------------------------------------------------------


def draw(data: st.DataObject) -> tuple[Problem, Any, int]:
    problem = Problem(data.draw(TREES, label="tree"))
    return problem, data.draw(METHODS, label="method"), data.draw(st.integers(0, 999), label="seed")


def closed_form(data: st.DataObject) -> None:
    """The hypergradient is the gradient of the formula."""
    problem, method, seed = draw(data)
    h, A = problem.task(seed)
    expected = torch.func.grad(
        lambda v: wave(problem.solve(unraveller(h)(v), A), unraveller(h)(v), A)
    )(ravel(h))
    got = problem.hypergrad(method, wave)(h, A)
    check_close(got, unraveller(h)(expected))


def linear_in_the_outer_loss(data: st.DataObject) -> None:
    problem, method, seed = draw(data)
    a, b = (data.draw(st.sampled_from([0.0, 1.0, -2.5, 1e3])) for _ in range(2))
    task = problem.task(seed)
    both = problem.hypergrad(method, lambda *args: a * wave(*args) + b * square(*args))(*task)
    waves, squares = (problem.hypergrad(method, loss)(*task) for loss in (wave, square))
    combined = optree.tree_map(lambda x, y: a * x + b * y, waves, squares)
    check_close(both, combined, atol=1e-9 * (1 + abs(a) + abs(b)))


def relabelled(data: st.DataObject, to_new: Callable[[Any], Any]) -> None:
    """A tree of another form with the same entries has the same hypergradient, in that form."""
    problem, method, seed = draw(data)
    h, A = problem.task(seed)
    like = h["center"]

    def to_old(new: Any) -> Any:
        leaves, spec = optree.tree_flatten(like)
        if isinstance(new, Tensor):
            return unraveller(like)(new)
        parts = [x.reshape(leaf.shape) for x, leaf in zip(new["z"][::-1], leaves, strict=True)]
        return optree.tree_unflatten(spec, parts)

    def old(h: Any) -> Any:
        return {"reg": h["reg"], "center": to_old(h["center"])}

    fn = hf.hypergrad(
        lambda h, A: to_new(problem.solve(old(h), A)),
        lambda w, h, A: wave(to_old(w), old(h), A),
        inner_loss=lambda w, h, A: problem.inner_loss(to_old(w), old(h), A),
        method=method,
    )
    got = fn({"reg": h["reg"], "center": to_new(like)}, A)
    check_close(old(got), problem.hypergrad(method, wave)(h, A))


def renamed_permuted_and_reshaped(data: st.DataObject) -> None:
    relabelled(data, lambda t: {"z": [x.reshape(-1) for x in optree.tree_leaves(t)][::-1]})


def flattened(data: st.DataObject) -> None:
    relabelled(data, ravel)


def chain_rule(data: st.DataObject) -> None:
    """Hparams that are a function of others: the product with its transposed Jacobian."""
    problem, method, seed = draw(data)
    h, A = problem.task(seed)

    def g(z: Any) -> Any:
        scale = 1 + 0.3 * z["reg"].sin()
        return optree.tree_map(lambda leaf: scale * leaf.tanh(), z)

    fn = hf.hypergrad(
        lambda z, A: problem.solve(g(z), A),
        lambda w, z, A: wave(w, g(z), A),
        inner_loss=lambda w, z, A: problem.inner_loss(w, g(z), A),
        method=method,
    )
    inner = ravel(problem.hypergrad(method, wave)(g(h), A))
    _, pull = torch.func.vjp(lambda v: ravel(g(unraveller(h)(v))), ravel(h))
    check_close(fn(h, A), unraveller(h)(pull(inner)[0]))


def batched(data: st.DataObject, chunk_size: int | None) -> None:
    problem, method, seed = draw(data)
    tasks = [problem.task(seed + i) for i in range(3)]
    fn, unravel = problem.hypergrad(method, wave), unraveller(tasks[0][0])
    # as vectors, since torch's vmap takes no None and does not know all trees
    hs, As = stack([ravel(h) for h, _ in tasks]), stack([A for _, A in tasks])
    together = vmap(lambda v, A: ravel(fn(unravel(v), A)), chunk_size=chunk_size)(hs, As)
    check_close(together, stack([ravel(fn(*task)) for task in tasks]))


def vmap_is_a_loop(data: st.DataObject) -> None:
    batched(data, None)


def chunks_are_the_whole(data: st.DataObject) -> None:
    batched(data, data.draw(st.sampled_from([1, 2])))


def near_float64(data: st.DataObject) -> None:
    """In float32, and with a dtype for each leaf."""
    problem, method, seed = draw(data)
    h, A = problem.task(seed)
    mixed = data.draw(st.booleans(), label="mixed")
    center = optree.tree_map(
        lambda leaf, x: x.to(leaf.dtype if mixed else torch.float32), problem.tree, h["center"]
    )
    low = {"reg": h["reg"].float(), "center": center}
    got = problem.hypergrad(method, wave)(low, A if mixed else A.float())
    expected = problem.hypergrad(method, wave)(h, A)
    expected = optree.tree_map(lambda x, like: x.to(like.dtype), expected, low)
    check_close(got, expected, rtol=2e-4, atol=2e-5)


PROPERTIES = [
    closed_form,
    linear_in_the_outer_loss,
    renamed_permuted_and_reshaped,
    flattened,
    chain_rule,
    vmap_is_a_loop,
    chunks_are_the_whole,
    near_float64,
]
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.parametrize("holds", PROPERTIES)
@settings(max_examples=128 // len(PROPERTIES), derandomize=True, **COMMON)
@given(data=st.data())
def test_property(holds: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    holds(data)


@pytest.mark.slow
@pytest.mark.parametrize("holds", PROPERTIES)
@settings(max_examples=2000 // len(PROPERTIES), print_blob=True, **COMMON)
@given(data=st.data())
def test_property_on_many_examples(
    holds: Callable[[st.DataObject], None], data: st.DataObject
) -> None:
    holds(data)
