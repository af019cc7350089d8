"""The one seam where the autodiff engine is chosen: linearisations and gradients.

With no ``torch.func`` transform active, derivatives come from a retained ``torch.autograd`` graph,
which is the faster engine; under a transform, from ``torch.func``, which is the one that composes.
Both give the same numbers, and neither leaves a trace on the tensors that were passed in.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperfunc._torch import derivative_rules, internals, sharding, tangents, tracking
from hyperfunc._torch.differentiable_once import (
    marked_operation,
    refuse,
    refuse_once_differentiable,
)
from hyperfunc._types import Leaves

LeavesFunction = Callable[..., Leaves]

_AuxFunction = Callable[..., tuple[Leaves, Leaves]]

_Groups = tuple[tuple[int, ...], ...]


class Linearization:
    """A function of flat tensors at a point, with products by its Jacobian and its transpose.

    ``fn(*primals) -> leaves`` is evaluated once, and that evaluation serves any number of products.
    ``groups`` are the index sets of the primals that products may be taken with respect to; each
    must name differentiable tensors only. With ``has_aux`` the function returns
    ``(outputs, aux)``, two tuples of tensors, the second of which is only passed on. ``optional``
    names a group that the function may well not use: if so, its products are zeros that take no
    second evaluation under transforms either.

    Attributes:
        outputs: the value of the function.
        aux: its second value.
        captures_gradient: whether the value depends on tensors that require grad and were not
            passed in. Found for certain without transforms, and under transforms when nothing that
            was passed in is tracked.
    """

    outputs: Leaves
    aux: Leaves = ()
    captures_gradient: bool = False

    def __init__(
        self,
        fn: Callable[..., Any],
        primals: Sequence[Any],
        groups: Sequence[Sequence[int]],
        *,
        has_aux: bool = False,
        tracked: bool | None = None,
        optional: int | None = None,
    ) -> None:
        self._tracked = tracking.is_tracked(primals) if tracked is None else tracked
        self._unused: dict[int, Leaves] = {}
        pair = fn if has_aux else lambda *leaves: (fn(*leaves), ())
        if optional is not None and groups[optional] and tracking.transforms_active():
            pair = self._probing(pair, optional, groups[optional])
        self._engine = _make_engine(
            pair, tuple(primals), tuple(tuple(group) for group in groups), self._tracked
        )
        self.outputs = self._engine.outputs
        self.aux = self._engine.aux
        self.captures_gradient = self._engine.captures_gradient
        self._pushes: dict[int, Callable[[Leaves], Leaves]] = {}
        self._trace = internals.trace()

    def pull(self, cotangents: Leaves, group: int = 0) -> Leaves:
        """The product with the transposed Jacobian, for the primals of a group."""
        return _pull(self._engine, self._unused, group, cotangents)

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        """`pull`, with None for the primals that the function is known not to use."""
        if group in self._unused:
            return (None,) * len(self._unused[group])
        return self._engine.pull_used(cotangents, group)

    def push(self, tangents: Leaves, group: int = 0) -> Leaves:
        """The product with the Jacobian, as the transpose of the transposed product."""
        push = self._pushes.get(group)
        if push is None:
            zeros = tuple(torch.zeros_like(out) for out in self.outputs)
            # not through self, which would keep itself alive by what it holds
            pull = functools.partial(_pull, self._engine, self._unused, group)
            # tracked like the point: the zeros are not, but the product depends on the point too
            transpose = Linearization(
                lambda *u: pull(u),
                zeros,
                (tuple(range(len(zeros))),),
                tracked=self._tracked,
            )
            push = transpose.pull
            if internals.trace() is self._trace:  # what is made inside a loop is of use there alone
                self._pushes[group] = push
        return push(tangents)

    def _probing(self, fn: _AuxFunction, group: int, indices: Sequence[int]) -> _AuxFunction:
        """The function, which finds out in its first call whether it uses the primals of a group.

        Without transforms there is no need to: a graph that does not reach them costs nothing.
        """
        probed, unused = torch.compiler.is_compiling(), self._unused

        def probing(*primals: Any) -> tuple[Leaves, Leaves]:
            nonlocal probed
            if probed:
                return fn(*primals)
            probed = True

            def restricted(*selected: Tensor) -> tuple[Leaves, Leaves]:
                outputs, aux = fn(*_replace(primals, indices, selected))
                if not any(out.requires_grad for out in outputs):
                    unused[group] = tuple(primals[index] for index in indices)
                return tuple(outputs), tuple(aux)

            selected = (primals[index] for index in indices)
            outputs, _, aux = torch.func.vjp(  # type: ignore[misc]
                restricted, *selected, has_aux=True
            )
            return outputs, aux

        return probing


def _pull(engine: _Engine, unused: dict[int, Leaves], group: int, cotangents: Leaves) -> Leaves:
    if group in unused:
        return tuple(torch.zeros_like(leaf) for leaf in unused[group])
    return engine.pull(cotangents, group)


def gradient(
    fn: Callable[..., Tensor],
    primals: Leaves,
    *,
    create_graph: bool | None = None,
    values: list[Tensor] | None = None,
) -> Leaves:
    """Gradient of a scalar function of flat tensors; a list ``values`` gets the value too.

    The result is differentiable whenever the primals are tracked (or ``create_graph`` says so).
    """
    grads = gradient_used(fn, primals, create_graph=create_graph, values=values)
    return zeros_for_none(grads, primals)


def gradient_used(
    fn: Callable[..., Tensor],
    primals: Leaves,
    *,
    create_graph: bool | None = None,
    used: list[bool] | None = None,
    values: list[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """`gradient`, with None for the primals that the value is known not to be computed from.

    Under transforms these are found where a list ``used`` is given, once for all calls with it.
    """
    tracked = tracking.is_tracked(primals) if create_graph is None else create_graph
    if tracking.transforms_active():

        def value_of(leaves: Leaves) -> Tensor:
            value = fn(*leaves)
            if used == []:
                used[:] = tracking.reached(value, leaves)
            if looks:
                refuse_once_differentiable((value,), leaves)
            return value

        again = tracked or tracking.is_tracked(primals)
        looks = again and not derivative_rules.known_to_be_right()
        if torch.compiler.is_compiling():
            used, looks = None, False
        transformed = torch.func.grad_and_value(value_of)
        order = derivative_rules.derivatives(again)
        (grads, found), _ = derivative_rules.evaluate(transformed, (tuple(primals),), order)
        if values is not None:
            values.append(found)
        grads = tangents.all_in_own_dtype(grads)
        return tuple(
            grad if is_used else None
            for grad, is_used in zip(grads, used or [True] * len(grads), strict=True)
        )
    order = derivative_rules.derivatives(tracked)
    rules = derivative_rules.active(order=order) if tracked else derivative_rules.counting(order)
    with torch.enable_grad(), rules:
        inputs = [
            _enter(leaf.clone() if leaf.is_inference() else leaf, tracked) for leaf in primals
        ]
        value = fn(*inputs)
        if values is not None:
            values.append(value)
        if not value.requires_grad:
            return (None,) * len(primals)
        if tracked and not derivative_rules.known_to_be_right():
            refuse_once_differentiable((value,), inputs)
        grads = derivative_rules.differentiate(
            value, inputs, create_graph=tracked, allow_unused=True
        )
    return sharding.align(grads, primals)


def uses(fn: Callable[..., Leaves], primals: Leaves, indices: Iterable[int]) -> bool:
    """Whether a function computes its value from some of these primals, by differentiable code."""
    found = False
    chosen = list(indices)

    def restricted(*selected: Tensor) -> Leaves:
        nonlocal found
        outputs = fn(*_replace(tracking.detach(primals), chosen, selected))
        found = any(out.requires_grad for out in outputs)
        return outputs

    derivative_rules.evaluate(
        functools.partial(torch.func.vjp, restricted), [primals[i].detach() for i in chosen], 1
    )
    return found


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """What ``Function.backward`` saved; it may run after its transform, as by ``torch.func.vjp``.

    A tensor of a level that has ended is not what it seems: it says that it requires grad, while
    what is computed from it has no graph.
    """
    return tuple(map(internals.unwrap_if_over, ctx.saved_tensors))


@contextlib.contextmanager
def nested_forward_mode(tensors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Make the body of ``Function.jvp`` differentiable in forward mode, and give it its tensors.

    torch runs ``Function.jvp`` with forward-mode differentiation switched off, so that an enclosing
    ``jvp`` would get a zero tangent. Switched on again, the tensors must not carry the tangents
    that the body is about to propagate: what is yielded is their primal parts.
    """
    if not _forward_mode_is_nested():
        yield tuple(tensors)
        return
    with internals.forward_mode_enabled(True):
        yield tuple(_primal(t) if tracking.is_differentiable(t) else t for t in tensors)


def _forward_mode_is_nested() -> bool:
    if torch.compiler.is_compiling():
        return False
    stack = internals.active_transforms() or ()
    return sum(transform.key() == internals.JVP for transform in stack) > 1


def _primal(value: Tensor) -> Tensor:
    """The tensor without the tangent of the innermost jvp level, below any vmap levels."""
    transform = internals.innermost_transform()
    if transform.key() != internals.VMAP:
        primal: Tensor = torch.autograd.forward_ad.unpack_dual(value, level=0).primal
        return primal
    level = transform.level()
    if internals.level_of(value) != level:
        with internals.outside_innermost():
            return _primal(value)
    with internals.outside_innermost():
        inner = _primal(internals.unwrapped(value))
    return internals.with_batch_dim(inner, internals.batch_dim(value), level)


class _Engine(Protocol):
    """A way to take the products of a `Linearization`."""

    outputs: Leaves
    aux: Leaves
    captures_gradient: bool

    def pull(self, cotangents: Leaves, group: int) -> Leaves: ...

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]: ...


class _GraphEngine:
    """Products from one recorded autograd graph, for use outside all transforms."""

    def __init__(
        self, fn: _AuxFunction, primals: tuple[Any, ...], groups: _Groups, tracked: bool
    ) -> None:
        chosen = {index for group in groups for index in group}
        primals = tracking.out_of_inference(primals)
        since = tracking.now()
        with torch.enable_grad():
            inputs = [
                _enter(leaf, tracked) if index in chosen else leaf
                for index, leaf in enumerate(primals)
            ]
            (outputs, aux), record = derivative_rules.evaluate(
                fn, inputs, math.inf if tracked else 1
            )
        self._uses_rows = record.uses_rows
        self.captures_gradient = tracking.reaches_foreign_leaf(outputs, inputs, since)
        self.outputs = tuple(outputs) if tracked else tracking.detach(outputs)
        self.aux = tuple(aux) if tracked else tracking.detach(aux)
        self._tracked = tracked
        self._looked: set[int] = set()
        self._inputs = [[inputs[index] for index in group] for group in groups]
        self._live = [index for index, out in enumerate(outputs) if out.requires_grad]
        self._live_outputs = [outputs[index] for index in self._live]

    def pull(self, cotangents: Leaves, group: int) -> Leaves:
        return zeros_for_none(self.pull_used(cotangents, group), self._inputs[group])

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        inputs = self._inputs[group]
        if not self._live or not inputs:
            return (None,) * len(inputs)
        selected = [cotangents[index] for index in self._live]
        create_graph = torch.is_grad_enabled() and (
            self._tracked or any(cotangent.requires_grad for cotangent in selected)
        )
        if create_graph and group not in self._looked:
            self._looked.add(group)
            refuse_once_differentiable(self._live_outputs, inputs)
        # what is computed again on the way (by torch.utils.checkpoint) is so by the same rules
        with derivative_rules.active() if self._uses_rows else contextlib.nullcontext():
            grads = derivative_rules.differentiate(
                self._live_outputs,
                inputs,
                selected,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        return sharding.align(grads, inputs)


class _FunctionalEngine:
    """Products from ``torch.func.vjp``, for use under transforms that track derivatives."""

    def __init__(
        self, fn: _AuxFunction, primals: tuple[Any, ...], groups: _Groups, tracked: bool
    ) -> None:
        self._fn = fn
        self._primals = primals
        self._groups = groups
        self._tracked = tracked
        self._vjps: dict[int, Callable[[Leaves], Leaves]] = {}
        self._used: dict[int, bool] = {}
        self._marked: dict[int, Any] = {}
        self.outputs, self.aux = self._record(0)
        self.captures_gradient = not tracked and any(map(tracking.requires_grad, self.outputs))

    def pull(self, cotangents: Leaves, group: int) -> Leaves:
        if not self._groups[group]:
            return ()
        if group not in self._vjps:
            self._record(group)
        again = torch.is_grad_enabled() and (self._tracked or tracking.is_tracked(cotangents))
        if again:
            refuse(self._marked.get(group))
        with torch.set_grad_enabled(again):
            return tuple(self._vjps[group](tuple(cotangents)))

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        grads = self.pull(cotangents, group)
        return grads if self._used.get(group, True) else (None,) * len(grads)

    def _record(self, group: int) -> tuple[Leaves, Leaves]:
        indices = self._groups[group]

        def restricted(*selected: Tensor) -> tuple[Leaves, Leaves]:
            outputs, aux = self._fn(*_replace(self._primals, indices, selected))
            self._used[group] = any(map(tracking.requires_grad, outputs))
            if not torch.compiler.is_compiling():
                self._marked[group] = marked_operation(outputs, selected)
            return tuple(outputs), tuple(aux)

        selected = (self._primals[index] for index in indices)
        (outputs, self._vjps[group], aux), _ = derivative_rules.evaluate(
            functools.partial(torch.func.vjp, restricted, has_aux=True),
            tuple(selected),
            math.inf,  # products may be taken in one more vmap, for which torch has rules missing
        )
        return outputs, aux


def _make_engine(
    fn: _AuxFunction, primals: tuple[Any, ...], groups: _Groups, tracked: bool
) -> _Engine:
    if not tracking.transforms_active():
        return _GraphEngine(fn, primals, groups, tracked)
    return _FunctionalEngine(fn, primals, groups, tracked)


def _replace(items: Sequence[Any], indices: Sequence[int], new: Sequence[Any]) -> list[Any]:
    replaced = list(items)
    for index, item in zip(indices, new, strict=True):
        replaced[index] = item
    return replaced


def _enter(leaf: Tensor, tracked: bool) -> Tensor:
    # A view, not the tensor itself: a primal may depend on another one, and products are partial.
    if tracked and leaf.requires_grad:
        return leaf.view_as(leaf)
    own = leaf.detach().requires_grad_()
    setattr(own, tracking.OWN_LEAF, True)
    return own


def zeros_for_none(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> Leaves:
    """A gradient with zeros where it has None."""
    return tuple(
        [
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, like, strict=True)
        ]
    )
