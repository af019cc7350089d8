"""Custom operations that say of themselves that their gradient has no derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hyperfunc._torch.unsupported import Unmappable

_MARKED = once_differentiable(lambda ctx: None).__code__


def refuse_once_differentiable(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise if a gradient of outputs by inputs has no derivative, by an operation marked so.

    Such a gradient is a constant for torch, which raises only where a derivative of what is behind
    the operation is asked for: all others are silently wrong.
    """
    refuse(marked_operation(outputs, inputs))


def refuse(operation: Any | None) -> None:
    """Raise if there is an operation that `marked_operation` has found."""
    if operation is not None:
        raise Unmappable(
            f"{operation.__qualname__}.backward, of a torch.autograd.Function, is marked "
            f"@once_differentiable: its gradient has no derivative, and one is needed here. Write "
            f"the backward by operations of torch without that mark; or, where hparams are what "
            f"the inner solver starts from, take first derivatives only: method='first_order'"
        )


def marked_operation(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any | None:
    """A custom operation marked @once_differentiable between inputs and outputs, or None."""
    for node in _between(outputs, inputs):
        operation = _written(node._forward_cls)
        if getattr(operation.backward, "__code__", None) is _MARKED:
            return operation
    return None


def _written(operation: Any) -> Any:
    """The class that the user wrote, of which ``torch.func`` makes others for its levels."""
    backward = operation.backward
    names = getattr(getattr(backward, "__code__", None), "co_freevars", ())
    if "autograd_function" not in names:
        return operation
    return _written(backward.__closure__[names.index("autograd_function")].cell_contents)


def _between(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Any]:
    """The custom nodes of a graph from which some of the inputs can be reached."""
    stop = {leaf.grad_fn for leaf in inputs} - {None}
    stack: list[Any] = [out.grad_fn for out in outputs]
    seen: set[Any] = {None, *stack}
    custom = []
    while stack:
        node = stack.pop()
        if isinstance(node, BackwardCFunction):
            custom.append(node)
        if node in stop:
            continue
        for parent, _ in getattr(node, "next_functions", ()):
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    if not custom:
        return
    ends = {id(leaf) for leaf in inputs}
    for node in custom:
        below: list[Any] = [node]
        reached: set[Any] = {node}
        while below:
            current = below.pop()
            if current in stop or id(getattr(current, "variable", None)) in ends:
                yield node
                break
            fresh = {parent for parent, _ in current.next_functions} - reached - {None}
            reached |= fresh
            below.extend(fresh)
