"""What follows a computation: which transforms are active, and which tensors carry derivatives."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._torch import internals
from hyperfunc._torch.internals import DIFFERENTIATING, active_transforms, innermost_transform

# Marks the leaf variables made here, such as that of a gradient inside a function being recorded.
OWN_LEAF = "_hyperfunc_own_leaf"

# What reads a tensor without a derivative: its values, or its layout alone.
_VALUES = {
    *("detach", "data", "item", "tolist", "numpy", "__repr__"),
    *("__float__", "__int__", "__bool__", "__index__"),
}
_LAYOUT = {
    *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "__hash__"),
    *("dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous"),
}
# Marks the buffers that a module is called with: whether derivatives may flow in or out of them.
STATE = "_hyperfunc_state"


def transforms_active() -> bool:
    """Whether a recorded graph would not do: in any transform, torch.compile and inference mode."""
    return (
        torch.compiler.is_compiling()
        or innermost_transform() is not None
        or internals.forward_mode_active()
        or torch.is_inference_mode_enabled()
    )


def is_tracked(tensors: Sequence[Any]) -> bool:
    """Whether a derivative of what is computed from these tensors may be asked for later."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(map(requires_grad, tensors))
    stack = active_transforms()
    if stack and any(transform.key() in DIFFERENTIATING for transform in stack):
        return True
    if internals.forward_mode_active():
        return True
    if not torch.is_grad_enabled():
        return False
    if stack:
        return any(map(requires_grad, tensors))
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def variables_of_others(tensors: Sequence[Any]) -> list[Tensor]:
    """Those that require grad, but for the variables of a gradient that is taken here."""
    if not torch.is_grad_enabled():
        return []
    return [
        t for t in tensors if isinstance(t, Tensor) and t.requires_grad and not hasattr(t, OWN_LEAF)
    ]


def is_differentiable(value: Any) -> bool:
    """Whether a value is a tensor that a derivative can be taken with respect to."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def detach(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The same values, cut from every graph and transform; what is not a tensor stays as it is."""
    return tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def out_of_inference(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The same leaves, with copies of tensors from inference mode, which autograd refuses."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tuple(leaves)
    return tuple(
        leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
        for leaf in leaves
    )


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each tensor was written to in place, where torch counts it."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(
        0 if leaf.is_inference() else internals.version(leaf) for leaf in map(innermost, tensors)
    )


def innermost(tensor: Tensor) -> Tensor:
    """The tensor below all levels of transforms."""
    while internals.is_wrapped(tensor):
        tensor = internals.unwrapped(tensor)
    return tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is not sparse, of which torch 2.4 does not tell inside a transform."""
    below = tensor if torch.compiler.is_compiling() else innermost(tensor)
    return below.layout is torch.strided


def loses_gradients() -> bool:
    """Whether an enclosing transform makes zeros of gradients, as torch 2.4 in inference mode."""
    return (
        torch.is_inference_mode_enabled()
        and any(transform.key() == internals.GRAD for transform in active_transforms() or ())
        and not _records_in_inference_mode()
    )


def is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform that is not active here."""
    level = internals.level_of(tensor)
    if level is None or level < 0:
        return False
    stack = active_transforms() or ()
    if level > len(stack):
        return True
    return bool(internals.is_batched(tensor) != (stack[level - 1].key() == internals.VMAP))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor has other values for each task of some vmap."""
    while internals.is_wrapped(tensor):
        if internals.is_batched(tensor):
            return True
        tensor = internals.unwrapped(tensor)
    return False


def carries_no_derivative(func: Any, tensor: Tensor) -> bool:
    """Whether a function of torch's reads a tensor's layout alone, or values that are no task's."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of an attribute
        name = getattr(func.__self__, "__name__", "")
    if name in _LAYOUT:
        return True
    values = name in _VALUES or name.endswith("_like") or name.startswith("new_")
    return values and not is_mapped(tensor)


def has_level(value: Any, level: int | None = None) -> bool:
    """Whether a tensor belongs to this level of the transforms, or to any level."""
    if not isinstance(value, Tensor):
        return False
    own: int = internals.level_of(value)
    return own > 0 if level is None else own == level


def escaped(error: RuntimeError) -> bool:
    """Whether a tensor of a transform was used below its level, as in ``Function.forward``."""
    text = str(error)
    return "functorch" in text and (
        "INTERNAL ASSERT FAILED" in text or "escaped from inside a function being vmapped" in text
    )


def is_attached(value: Any) -> bool:
    """Whether a tensor carries a derivative at any level: autograd's own or a transform's."""
    if not isinstance(value, Tensor):
        return False
    transform: Any = innermost_transform()
    if transform is None:
        tangents = internals.forward_mode_active()
        return value.requires_grad or (tangents and _has_tangent(value))
    if transform.key() != internals.VMAP and (value.requires_grad or _has_tangent(value)):
        return True
    with internals.outside_innermost():
        if internals.level_of(value) == transform.level():
            value = internals.unwrapped(value)
        return is_attached(value)


@functools.lru_cache(maxsize=1)
def _records_in_inference_mode() -> bool:
    with internals.outside_all(), torch.inference_mode():
        return bool(torch.func.grad(torch.sin)(torch.zeros((), device="cpu")) == 1)


def _has_tangent(value: Tensor) -> bool:
    if not is_differentiable(value):
        return False
    return torch.autograd.forward_ad.unpack_dual(value, level=0).tangent is not None


def now() -> int:
    """A moment: nodes of a graph that are recorded from here on are younger."""
    return 0 if torch.compiler.is_compiling() else internals.next_sequence_number()


def reaches_foreign_leaf(
    outputs: Sequence[Tensor], inputs: Sequence[Any], since: int | None = None
) -> bool:
    """Whether a graph ends in a leaf variable that is no input; see `foreign_leaves`."""
    if torch.compiler.is_compiling():
        return False
    return any(True for _ in foreign_leaves(outputs, inputs, since))


def foreign_leaves(
    outputs: Sequence[Tensor], inputs: Sequence[Any], since: int | None = None
) -> Iterator[Tensor]:
    """The leaf variables that the graph of the outputs ends in and that are not inputs.

    Those that were made ``since`` a moment, by the code whose graph this is, are left out: nothing
    but the graph holds them, and all of the graph is younger.
    """
    tracked = [leaf for leaf in inputs if requires_grad(leaf)]
    known = {id(leaf) for leaf in tracked}
    stop = {leaf.grad_fn for leaf in tracked}
    stack: list[Any] = list({out.grad_fn for out in outputs} - stop - {None})
    seen = {None, *stop, *stack}
    while stack:
        node = stack.pop()
        parents = node.next_functions
        for parent, _ in parents:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
        if not parents:  # only the end of a graph holds a variable, and asking others takes long
            leaf = getattr(node, "variable", None)
            if leaf is None or id(leaf) in known or hasattr(leaf, OWN_LEAF):
                continue
            if since is not None and sys.getrefcount(leaf) <= internals.references_if_unheld():
                nodes = seen - stop - {None}
                if all(internals.sequence_number(node) >= since for node in nodes):
                    continue
            yield leaf


def reached(output: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
    """Which of these leaf variables, of one level of transforms, the graph of a value ends in."""
    stack = [output.grad_fn]
    seen: set[Any] = {None, *stack}
    ends = {id(output)} if output.grad_fn is None else set()
    while stack:
        node = stack.pop()
        ends.add(id(getattr(node, "variable", None)))
        for parent, _ in getattr(node, "next_functions", ()):
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return [id(leaf) in ends for leaf in inputs]


def requires_grad(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    # a batched tensor does not tell that the tensor it wraps requires grad
    while internals.is_batched(value) and not value.requires_grad:
        value = internals.unwrapped(value)
    return bool(value.requires_grad)
