"""Pytree vector algebra: trees are flattened here, and vectors are tuples of leaves elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from hyperfunc._engine.shown import show
from hyperfunc._torch import batching, containers, derivative_rules, sharding, tensordicts, tracking
from hyperfunc._types import Leaves, TensorTree

TreeSpec = optree.PyTreeSpec

NAMESPACE = "hyperfunc"
"""The optree namespace in which classes are registered as nodes of trees."""


def flatten(tree: Any, none_is_leaf: bool = False) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of a tree; ``None`` is an empty node, unless it is to be a leaf."""
    tensordicts.register(NAMESPACE)
    while True:
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=none_is_leaf, namespace=NAMESPACE)
        if not containers.register_holders(leaves, NAMESPACE):
            return list(leaves), spec


def unflatten(spec: TreeSpec, leaves: Sequence[Any]) -> Any:
    """The inverse of `flatten`."""
    return optree.tree_unflatten(spec, leaves)


def paths(spec: TreeSpec, root: str) -> list[str]:
    """The Python expression of each leaf, as ``params['fc1']['weight']`` with root ``params``."""
    return [accessor.codify(root) for accessor in spec.accessors()]


def refuse_holders(leaves: Sequence[Any], spec: TreeSpec, root: str) -> None:
    """Raise if a leaf is an object that holds a tensor with a derivative or a batch dimension."""
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) and containers.holds_attached(leaf):
            containers.refuse_holder(leaf, paths(spec, root)[index])


def named_tensors(hparams: Any, args: Any) -> dict[str, Tensor]:
    """The tensors of a call by the expressions that the user knows them by."""
    named: dict[str, Any] = {}
    for root, tree in (("hparams", hparams), ("args", args)):
        leaves, spec = flatten(tree)
        named.update(zip(paths(spec, root), leaves, strict=True))
    return {path: leaf for path, leaf in named.items() if isinstance(leaf, Tensor)}


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a tree is without its tensors: its structure, and all its other leaves.

    Equal for trees that differ in their tensors alone, and hashable if these leaves are.
    """

    spec: TreeSpec
    constants: tuple[Any, ...]

    def paths(self, root: str) -> list[str]:
        """The Python expression of each tensor, as those of `paths`."""
        expressions = paths(self.spec, root)
        leaves = zip(expressions, self.constants, strict=True)
        return [path for path, constant in leaves if constant is None]

    def fill(self, tensors: Iterable[Tensor]) -> Any:
        """The tree with these tensors in it, the inverse of `partition`."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is None else leaf for leaf in self.constants]
        return unflatten(self.spec, leaves)


def partition(tree: Any) -> tuple[Leaves, Frame]:
    """The tensors of a tree, in flattening order, and the `Frame` that they are put back into."""
    leaves, spec = flatten(tree)
    # no leaf of a tree is None
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)), Frame(spec, constants)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of a tree."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]


def tree_map(fn: Callable[..., Any], tree: TensorTree, *rest: TensorTree) -> TensorTree:
    """Apply ``fn`` leaf by leaf to trees of one structure."""
    flatten(tree)  # which makes nodes of the classes in it
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """The structure of params: floating-point tensors, and integers and bools that go along."""

    full: TreeSpec
    spec: TreeSpec
    """Without the latter: an empty tuple is in their place, which vmap takes for nothing."""
    floating: tuple[bool, ...]

    @staticmethod
    def of(full: TreeSpec, leaves: Sequence[Tensor]) -> StateSpec:
        """The structure of a flattened tree."""
        with derivative_rules.inactive():  # as in `flatten_floating`
            floating = tuple(leaf.is_floating_point() for leaf in leaves)
        if all(floating):
            return StateSpec(full, full, floating)
        kept = (leaf if flag else () for leaf, flag in zip(leaves, floating, strict=True))
        return StateSpec(full, flatten(unflatten(full, list(kept)))[1], floating)

    @functools.cached_property
    def num_floating(self) -> int:
        return sum(self.floating)

    @functools.cached_property
    def num_others(self) -> int:
        return len(self.floating) - self.num_floating

    def split(self, leaves: Sequence[Any]) -> tuple[Leaves, Leaves]:
        """The floating-point leaves, and the others."""
        pairs = list(zip(leaves, self.floating, strict=True))
        floating = tuple(leaf for leaf, flag in pairs if flag)
        return floating, tuple(leaf for leaf, flag in pairs if not flag)

    def merge(self, w: Iterable[Any], others: Iterable[Any]) -> Leaves:
        """The inverse of `split`."""
        w, others = iter(w), iter(others)
        return tuple(next(w) if flag else next(others) for flag in self.floating)

    def fill(self, w: Iterable[Any], others: Iterable[Any]) -> TensorTree:
        """The tree with these leaves."""
        return unflatten(self.full, self.merge(w, others) if self.num_others else tuple(w))


def flatten_state(tree: TensorTree, root: str) -> tuple[Leaves, Leaves, StateSpec]:
    """The floating-point leaves of params, of which there is one at least, and the others."""
    leaves, full = flatten_floating(tree, root, others=True)
    state = StateSpec.of(full, leaves)
    return *state.split(leaves), state


def flatten_floating(
    tree: TensorTree, root: str, *, others: bool = False
) -> tuple[Leaves, TreeSpec]:
    """Flatten a tree that must hold at least one floating-point tensor and, save others, no else.

    These others are tensors of integers and bools.
    """
    leaves, spec = flatten(tree)
    with derivative_rules.inactive():  # they look at each attribute that is read
        if leaves and all(map(_is_dense_floating, leaves)):
            return tuple(leaves), spec
    if others and any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        rest = [leaf for leaf in leaves if not _is_integral(leaf)]
    else:
        rest = leaves
    if not leaves:
        advice = ""
        if tree == {}:
            advice = (
                ". hf.functional(module) gives {} where all parameters of the module are frozen: "
                "call module.requires_grad_() first, or write include_frozen=True"
            )
        expected = "expected at least one floating-point tensor"
        raise ValueError(f"{root} is an empty tree ({show(tree)}); {expected}{advice}")
    for leaf in rest:
        if _is_dense_floating(leaf):
            continue
        path = paths(spec, root)[next(i for i, each in enumerate(leaves) if each is leaf)]
        if not isinstance(leaf, Tensor):
            problem = f"is {_value_and_type(leaf)}; expected a floating-point tensor"
            advice = _advice(leaf)
        elif leaf.is_complex():
            expected = "hypergradients are defined here for real tensors"
            problem = f"has complex dtype {leaf.dtype}; {expected}"
            advice = "Use torch.view_as_real and torch.view_as_complex inside your functions"
        elif not leaf.is_floating_point():
            problem = f"has dtype {leaf.dtype}; expected a floating-point tensor"
            advice = "Convert it (.float() or .double()) or pass it through *args"
        else:
            layout = tracking.innermost(leaf).layout
            problem = f"has layout {layout}; expected a dense (strided) tensor"
            advice = "Call .to_dense(), or pass sparse data through *args"
        raise TypeError(f"{path} {problem}. {advice}")
    return tuple(leaves), spec


def check_like(
    leaves: Sequence[Any], spec: TreeSpec, like: Leaves, like_spec: TreeSpec, what: str, root: str
) -> None:
    """Raise unless a flattened tree has the structure, shapes, dtypes and devices of another."""
    if spec != like_spec and _plain(spec, leaves) != _plain(like_spec, like):
        advice = f"got {spec}, expected {like_spec}"
        raise ValueError(f"{what} has another structure than {root}: {advice}")
    for index, (leaf, ref) in enumerate(zip(leaves, like, strict=True)):
        if leaf is ref:
            continue
        if not isinstance(leaf, Tensor):
            problem = f"is {_value_and_type(leaf)}, expected a tensor"
        elif leaf.shape != ref.shape:
            problem = f"has shape {tuple(leaf.shape)}, expected {tuple(ref.shape)}"
        elif leaf.dtype != ref.dtype:
            problem = f"has dtype {leaf.dtype}, expected {ref.dtype}: write .to({ref.dtype})"
        elif leaf.device != ref.device:
            problem = f"is on {leaf.device}, expected {ref.device}: write .to('{ref.device}')"
        else:
            continue
        raise ValueError(f"{what}: the leaf for {paths(like_spec, root)[index]} {problem}")


def paths_to_like(tree: TensorTree, like: Leaves, like_spec: TreeSpec, root: str) -> Iterator[str]:
    """Where in nested dicts, lists and tuples there are trees of a structure and its shapes."""
    leaves, spec = flatten(tree)
    if spec == like_spec and all(
        isinstance(leaf, Tensor) and leaf.shape == ref.shape
        for leaf, ref in zip(leaves, like, strict=True)
    ):
        yield root
    elif isinstance(tree, dict | list | tuple):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from paths_to_like(part, like, like_spec, f"{root}[{key!r}]")


def accumulation_dtype(leaves: Leaves) -> torch.dtype:
    """The dtype of inner products: the widest of the leaves, and float32 at least."""
    dtype = torch.float32
    for leaf in leaves:
        if leaf.dtype is not dtype:
            dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def epsilon(leaves: Leaves) -> float:
    """The machine epsilon of the coarsest leaf."""
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves)


def dot(a: Leaves, b: Leaves) -> Tensor:
    """Euclidean inner product over all leaves, accumulated in `accumulation_dtype`."""
    return dots((a, b))[0]


def dots(*pairs: tuple[Leaves, Leaves]) -> tuple[Tensor, ...]:
    """Inner products of several pairs of vectors, with one reduction over ranks for all."""
    layout = sharding.layout_of(pairs[0][0])
    if layout is None:
        return tuple([_dot(a, b) for a, b in pairs])
    return layout.sum(_local_dots(layout, pairs)).unbind()


def read_dots(*pairs: tuple[Leaves, Leaves]) -> tuple[float, ...]:
    """`dots` as numbers, for vectors that `can_read` holds for."""
    return tuple([_dot(a, b).item() for a, b in pairs])


def start_dots(*pairs: tuple[Leaves, Leaves]) -> Callable[[], tuple[Tensor, ...]]:
    """`dots`, with the reduction over ranks under way until the returned function is called."""
    layout = sharding.layout_of(pairs[0][0])
    if layout is None:
        values = dots(*pairs)
        return lambda: values
    wait = layout.start_sum(_local_dots(layout, pairs))
    return lambda: wait().unbind()


def norm(a: Leaves) -> Tensor:
    """Euclidean norm over all leaves."""
    return dot(a, a).sqrt()


def may_overwrite(*vectors: Leaves) -> bool:
    """Whether vectors that the caller alone holds may be written to: none has a derivative."""
    return batching.may_overwrite([leaf for vector in vectors for leaf in vector])


def can_read(*vectors: Leaves) -> bool:
    """Whether scalars computed from vectors that the caller alone holds may be numbers."""
    return batching.can_read([leaf for vector in vectors for leaf in vector])


def reusable(x: Leaves, *others: Leaves) -> Leaves | None:
    """``x``, a vector that the caller alone holds, if it `may_overwrite` it; else None."""
    return x if may_overwrite(x, *others) else None


def axpy(alpha: Tensor | float, x: Leaves, y: Leaves, out: Leaves | None = None) -> Leaves:
    """``y + alpha x``, each leaf in its own dtype and on its own device.

    ``out`` is x or y if that is to be overwritten, where alpha allows it too; see `reusable`.
    """
    if out is not None and not (isinstance(alpha, Tensor) and tracking.is_tracked((alpha,))):
        batching.write_sum(alpha, x, y, out)
        return out
    if isinstance(alpha, Tensor):
        return tuple(torch.addcmul(v, _scalar_like(alpha, u), u) for u, v in zip(x, y, strict=True))
    return tuple(torch.add(v, u, alpha=alpha) for u, v in zip(x, y, strict=True))


def scale(alpha: Tensor | float, x: Leaves) -> Leaves:
    """``alpha x``."""
    if isinstance(alpha, Tensor):
        return tuple(_scalar_like(alpha, u) * u for u in x)
    # a number times a 0-d tensor gets a float64 tangent in torch's forward mode, a tensor does not
    return tuple(u * (alpha if u.ndim else u.new_full((), alpha)) for u in x)


def add(x: Leaves, y: Leaves) -> Leaves:
    """``x + y``."""
    return tuple(u + v for u, v in zip(x, y, strict=True))


def sub(x: Leaves, y: Leaves) -> Leaves:
    """``x - y``."""
    return tuple(u - v for u, v in zip(x, y, strict=True))


def neg(x: Leaves) -> Leaves:
    """``-x``."""
    return tuple(-u for u in x)


def where(mask: Tensor, x: Leaves, y: Leaves) -> Leaves:
    """``x`` where the 0-d mask holds, else ``y``."""
    return tuple(torch.where(mask.to(u.device), u, v) for u, v in zip(x, y, strict=True))


def zeros_like(x: Leaves) -> Leaves:
    """Zeros of the same shapes."""
    return tuple(torch.zeros_like(u) for u in x)


def sum_is_finite(x: Leaves) -> Tensor:
    """A 0-d bool tensor that shows `all_finite` in one pass where it holds; a sum may overflow."""
    if sharding.layout_of(x) is not None:
        return all_finite(x)
    total = _total(x)
    return torch.eq(total - total, 0)  # NaN where it is not finite


def sum_is_finite_and_nonzero(x: Leaves) -> Tensor:
    """A 0-d bool tensor that shows in one pass that some entry is not zero and all are finite."""
    total = _total(x) if sharding.layout_of(x) is None else dot(x, x)
    return torch.ne(total, 0) & torch.eq(total - total, 0)


def all_finite(x: Leaves) -> Tensor:
    """A 0-d bool tensor: whether every entry of every leaf is finite."""
    layout = sharding.layout_of(x)
    if layout is not None:
        return torch.eq(layout.sum((~all_finite(layout.local(x))).to(torch.int32)), 0)
    # u - u is zero, or NaN where u is not finite: many times faster than isfinite of every entry
    flags = [torch.isfinite((u - u).sum()).to(x[0].device) for u in x]
    return functools.reduce(torch.logical_and, flags)


def ravel(x: Leaves, dtype: torch.dtype) -> Tensor:
    """All entries as one vector, refused where no rank holds all of them."""
    for index, leaf in enumerate(x):
        if sharding.is_sharded(leaf):
            raise ValueError(
                f"leaf {index} of the params is a DTensor with placements "
                f"{leaf.placements}, but this method needs all entries as one vector. "  # type: ignore[attr-defined]
                f"Use CG, PipelinedCG, NormalCG, GMRES, BiCGStab, FixedPoint, Neumann or "
                f"StochasticAID, or hparams that every rank holds: "
                f"hparams.redistribute(placements=[Replicate()])"
            )
    return ravel_local(x, dtype)


def ravel_local(x: Leaves, dtype: torch.dtype) -> Tensor:
    """The entries that this rank holds as one vector: all, but for DTensors."""
    layout = sharding.layout_of(x)
    parts = x if layout is None else layout.local(x)
    return torch.cat([part.to(device=x[0].device, dtype=dtype).reshape(-1) for part in parts])


def unravel(vector: Tensor, like: Leaves) -> Leaves:
    """The inverse of `ravel`, and of `ravel_local`."""
    layout = sharding.layout_of(like)
    refs = like if layout is None else layout.local(like)
    parts = torch.split(vector, [ref.numel() for ref in refs])
    pairs = zip(parts, refs, strict=True)
    x = tuple(part.reshape(ref.shape).to(device=ref.device, dtype=ref.dtype) for part, ref in pairs)
    return x if layout is None else layout.wrap(x, like)


def _total(x: Leaves) -> Tensor:
    total = x[0].sum()
    for leaf in x[1:]:
        total = total + leaf.sum().to(total.device)
    return total


def _is_dense_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and tracking.is_dense(leaf)


def _is_integral(leaf: Any) -> bool:
    """Whether a leaf is a tensor of integers or bools."""
    if not isinstance(leaf, Tensor):
        return False
    return not (leaf.is_floating_point() or leaf.is_complex()) and tracking.is_dense(leaf)


def _plain(spec: TreeSpec, leaves: Sequence[Any]) -> TreeSpec:
    """The structure with a TensorDict in place of a TensorDictParams."""
    return flatten(unflatten(spec, leaves))[1]


def _dot(a: Leaves, b: Leaves) -> Tensor:
    dtype, device = accumulation_dtype(a), a[0].device
    total: Tensor | None = None
    for x, y in zip(a, b, strict=True):
        if x.dtype is not dtype or y.dtype is not dtype:
            x, y = x.to(dtype), y.to(dtype)
        if sharding.is_dtensor(x):  # that autograd follows: uneven shards cannot be flattened
            term = (x * y).sum()
        else:
            term = batching.dot(x, y) if x.ndim == 1 else batching.dot(x.reshape(-1), y.reshape(-1))
        if term.device != device:
            term = term.to(device)
        total = term if total is None else total + term
    assert total is not None
    return total


def _local_dots(layout: sharding.Layout, pairs: Sequence[tuple[Leaves, Leaves]]) -> Tensor:
    """The inner products of what this rank holds of each vector, to be added up over the ranks."""
    counted, dtype = layout.counted(), accumulation_dtype(pairs[0][0])
    if not any(counted):
        return torch.zeros(len(pairs), dtype=dtype, device=pairs[0][0][0].device)

    def local(v: Leaves) -> Leaves:
        return tuple(part for part, count in zip(layout.local(v), counted, strict=True) if count)

    return torch.stack([_dot(local(a), local(b)).to(dtype) for a, b in pairs])


def _scalar_like(alpha: Tensor, leaf: Tensor) -> Tensor:
    same = alpha.dtype == leaf.dtype and alpha.device == leaf.device
    return alpha if same else alpha.to(device=leaf.device, dtype=leaf.dtype)


def _advice(leaf: Any) -> str:
    if isinstance(leaf, torch.nn.Module):
        return "Pass its parameters: apply, params = hf.functional(module)"
    if tensordicts.is_tensordict(leaf):
        return "Call .to_tensordict() on it, or pass it through *args"
    if type(leaf).__module__ == "numpy":
        return (
            "Write torch.as_tensor(...) around it, or decorate an inner solver that computes in "
            "NumPy with @hf.from_numpy"
        )
    if hasattr(leaf, "__dict__"):
        if "coef_" in vars(leaf):  # a fitted estimator
            return "Return its coef_ and intercept_, and decorate the solver with @hf.from_numpy"
        register = f"optree.register_pytree_node(..., namespace={NAMESPACE!r})"
        return f"If it holds tensors, register its class by {register}"
    if isinstance(leaf, Iterator):
        return "For the parameters of a module, write apply, params = hf.functional(module)"
    return "Write torch.tensor(...) around a number"


def _value_and_type(leaf: Any) -> str:
    return f"{show(leaf)} of type {type(leaf).__name__}"
