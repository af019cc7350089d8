"""The one seam where the autodiff engine is chosen.

With no ``torch.func`` transform active, derivatives come from a retained ``torch.autograd`` graph,
which is the faster engine; under a transform, from ``torch.func``, which is the one that composes.
Both give the same numbers, and neither leaves a trace on the tensors that were passed in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
    temporarily_pop_interpreter_stack,
)

from hyperfunc import _levels, _sharding
from hyperfunc._types import Leaves

LeavesFunction = Callable[..., Leaves]
_AuxFunction = Callable[..., tuple[Leaves, Leaves]]
_Groups = tuple[tuple[int, ...], ...]


_OLD_VMAP = (
    "is_grads_batched=True in torch.autograd.grad, and vectorize=True in torch.autograd.functional "
    "map by an older vmap, in which no value of a tensor can be looked at. Use torch.func.jacrev, "
    "jacfwd, hessian or vmap instead"
)

# Marks the leaf variables made here, such as that of a gradient inside a function being recorded.
_OWN = "_hyperfunc_own_leaf"

# Entries from which on an inner product costs more than the call that takes it.
_LONG = 4096


def transforms_active() -> bool:
    """Whether code runs inside a ``torch.func`` transform, or is being traced by torch.compile.

    Forward mode without ``torch.func`` counts too, for a recorded graph would lose its tangents,
    and inference mode, in which no graph is recorded.
    """
    return (
        torch.compiler.is_compiling()
        or _functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_inference_mode_enabled()
    )


def is_tracked(tensors: Sequence[Any]) -> bool:
    """Whether a derivative of what is computed from these tensors may be asked for later."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(map(_requires_grad, tensors))
    stack = _functorch.get_interpreter_stack()
    if stack and any(
        interpreter.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
        for interpreter in stack
    ):
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if stack:
        return any(map(_requires_grad, tensors))
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def may_overwrite(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing follows what these tensors hold: no derivative, trace, or transform but vmap.

    Under vmap each must have every batch dimension, so that the result of any of them fits.
    """
    levels = _levels.vmap_levels()
    if (not levels and transforms_active()) or _levels.is_traced():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return False
        if levels and (_requires_grad(tensor) or not _levels.is_batched(tensor, levels)):
            return False
    return True


def can_read(tensors: Sequence[Tensor]) -> bool:
    """Whether the values of tensors that `may_overwrite` holds for can be read without waiting.

    Numbers then do for scalars what 0-d tensors do, at a fraction of the overhead. Not where
    something records what is computed, which is to hold for other values, and elsewhere, too.
    """
    return (
        not transforms_active()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and all(tensor.device.type == "cpu" for tensor in tensors)
        and may_overwrite(tensors)
    )


def write_sum(alpha: Tensor | float, x: Leaves, y: Leaves, out: Leaves) -> None:
    """Write ``y + alpha x`` over x or y, which `may_overwrite` has to allow for both."""
    levels = _levels.vmap_levels()
    if out is y and not levels and not isinstance(alpha, Tensor):
        torch._foreach_add_(y, x, alpha=alpha)  # less than half the time where leaves are small
        return
    for u, v, place in zip(x, y, out, strict=True):
        factor: Any = alpha
        if isinstance(alpha, Tensor) and (alpha.dtype != u.dtype or alpha.device != u.device):
            factor = alpha.to(device=u.device, dtype=u.dtype)
        if levels:  # vmap has no rule for out=
            if isinstance(factor, Tensor):
                factor = _levels.lower(factor, levels)
                factor = factor.reshape(*factor.shape, *[1] * u.ndim)
            u, v, place = (_levels.lower(leaf, levels) for leaf in (u, v, place))
        if isinstance(factor, Tensor):
            torch.addcmul(v, factor, u, out=place)
        else:
            torch.add(v, u, alpha=factor, out=place)


def is_differentiable(value: Any) -> bool:
    """Whether a value is a tensor that a derivative can be taken with respect to."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def detach(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The same values, cut from every graph and transform; what is not a tensor stays as it is."""
    return tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def out_of_inference(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The same leaves, with copies of tensors from inference mode where that has ended.

    Autograd refuses such tensors, and takes their copies.
    """
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
    return tuple(0 if leaf.is_inference() else leaf._version for leaf in map(innermost, tensors))


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
        self._tracked = is_tracked(primals) if tracked is None else tracked
        self._unused: dict[int, Leaves] = {}
        pair = fn if has_aux else lambda *leaves: (fn(*leaves), ())
        if optional is not None and groups[optional] and transforms_active():
            pair = self._probing(pair, optional, groups[optional])
        self._engine = _make_engine(
            pair, tuple(primals), tuple(tuple(group) for group in groups), self._tracked
        )
        self.outputs = self._engine.outputs
        self.aux = self._engine.aux
        self.captures_gradient = self._engine.captures_gradient
        self._pushes: dict[int, Callable[[Leaves], Leaves]] = {}

    def pull(self, cotangents: Leaves, group: int = 0) -> Leaves:
        """The product with the transposed Jacobian, for the primals of a group."""
        if group in self._unused:
            return tuple(torch.zeros_like(leaf) for leaf in self._unused[group])
        return self._engine.pull(cotangents, group)

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        """`pull`, with None for the primals that the function is known not to use."""
        if group in self._unused:
            return (None,) * len(self._unused[group])
        if isinstance(self._engine, _GraphEngine):
            return self._engine.pull_used(cotangents, group)
        return self._engine.pull(cotangents, group)

    def push(self, tangents: Leaves, group: int = 0) -> Leaves:
        """The product with the Jacobian, as the transpose of the transposed product."""
        if group not in self._pushes:
            zeros = tuple(torch.zeros_like(out) for out in self.outputs)
            # tracked like the point: the zeros are not, but the product depends on the point too
            transpose = Linearization(
                lambda *u: self.pull(u, group),
                zeros,
                (tuple(range(len(zeros))),),
                tracked=self._tracked,
            )
            self._pushes[group] = transpose.pull
        return self._pushes[group](tangents)

    def _probing(self, fn: _AuxFunction, group: int, indices: Sequence[int]) -> _AuxFunction:
        """The function, which finds out in its first call whether it uses the primals of a group.

        Without transforms there is no need to: a graph that does not reach them costs nothing.
        """
        probed = torch.compiler.is_compiling()

        def probing(*primals: Any) -> tuple[Leaves, Leaves]:
            nonlocal probed
            if probed:
                return fn(*primals)
            probed = True

            def restricted(*selected: Tensor) -> tuple[Leaves, Leaves]:
                outputs, aux = fn(*_replace(primals, indices, selected))
                if not any(out.requires_grad for out in outputs):
                    self._unused[group] = tuple(primals[index] for index in indices)
                return tuple(outputs), tuple(aux)

            selected = (primals[index] for index in indices)
            outputs, _, aux = torch.func.vjp(  # type: ignore[misc]
                restricted, *selected, has_aux=True
            )
            return outputs, aux

        return probing


def gradient(
    fn: Callable[..., Tensor], primals: Leaves, *, create_graph: bool | None = None
) -> Leaves:
    """Gradient of a scalar function of flat tensors.

    The result is differentiable whenever the primals are tracked (or ``create_graph`` says so).
    """
    if transforms_active():
        return tuple(torch.func.grad(lambda leaves: fn(*leaves))(tuple(primals)))
    tracked = is_tracked(primals) if create_graph is None else create_graph
    with torch.enable_grad():
        inputs = [
            _enter(leaf.clone() if leaf.is_inference() else leaf, tracked) for leaf in primals
        ]
        value = fn(*inputs)
        if not value.requires_grad:
            return tuple(torch.zeros_like(leaf) for leaf in primals)
        grads = torch.autograd.grad(value, inputs, create_graph=tracked, allow_unused=True)
    return _fill(grads, primals)


def count_true(flag: Tensor) -> int:
    """How many tasks of the enclosing ``vmap`` levels a 0-d bool holds for (a host sync)."""
    try:
        return int(_gathered(flag).sum() if transforms_active() else flag)
    except RuntimeError as error:
        if "Batching rule not implemented" in str(error):
            raise RuntimeError(_OLD_VMAP) from error
        raise


def count_tasks(flag: Tensor) -> int:
    """How many tasks the enclosing ``vmap`` levels hold that the flag depends on."""
    if not transforms_active():
        return 1
    return _gathered(flag).numel()


def all_true(flag: Tensor) -> bool:
    """Whether a 0-d bool holds for every task of the ``vmap`` levels (a host sync)."""
    return count_true(~flag) == 0


def any_true(flag: Tensor) -> bool:
    """Whether a 0-d bool holds for some task of the ``vmap`` levels (a host sync)."""
    return count_true(flag) > 0


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two vectors, a task at a time under vmap where they are long.

    torch batches inner products as products of matrices, which take several times as long.
    """
    if x.shape[0] < _LONG or not _in_vmap() or is_tracked((x, y)):
        return torch.dot(x, y)
    return _Dot.apply(x, y)  # type: ignore[no-any-return]


class _Dot(torch.autograd.Function):
    """The inner product where nothing is differentiated."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return torch.dot(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, y: Tensor
    ) -> tuple[Tensor, int | None]:
        rows = [
            [vector] * info.batch_size if dim is None else vector.unbind(dim)
            for vector, dim in zip((x, y), in_dims, strict=True)
        ]
        return torch.stack([dot(a, b) for a, b in zip(*rows, strict=True)]), 0


def true_indices(flag: Tensor) -> list[tuple[int, ...]]:
    """Where a bool holds: indices into the ``vmap`` levels, outermost first, then its own."""
    return [tuple(index) for index in _gathered(flag).nonzero().tolist()]


def _gathered(flag: Tensor) -> Tensor:
    gathered: Tensor = _Gathered.apply(flag.to(torch.int64))
    return gathered


class _Gathered(torch.autograd.Function):
    """An integer tensor with the levels of vmap that it is batched in as its first dimensions."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], value: Tensor) -> tuple[Tensor, None]:
        if in_dims[0] is not None:
            value = value.movedim(in_dims[0], 0)
        return _Gathered.apply(value), None


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """What ``Function.backward`` saved; it may run after its transform, as by ``torch.func.vjp``.

    A tensor of a level that has ended is not what it seems: it says that it requires grad, while
    what is computed from it has no graph.
    """
    return tuple(map(_functorch.unwrap_if_dead, ctx.saved_tensors))


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
    with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield tuple(_primal(t) if is_differentiable(t) else t for t in tensors)


@contextlib.contextmanager
def outside_idle_vmaps(tensors: Sequence[Any]) -> Iterator[None]:
    """Leave the innermost vmap levels in which none of these tensors is batched.

    Such levels come with ``jacfwd`` and ``hessian``, and inside them code that nobody maps over is
    not allowed what it does elsewhere: ``backward()``, in-place operations, random numbers.
    """
    interpreter: Any = retrieve_current_functorch_interpreter() if _in_vmap() else None
    if (
        interpreter is None
        or interpreter.randomness() == "different"
        or any(has_level(tensor, interpreter.level()) for tensor in tensors)
    ):
        yield
        return
    with temporarily_pop_interpreter_stack(), outside_idle_vmaps(tensors):
        yield


def innermost(tensor: Tensor) -> Tensor:
    """The tensor below all levels of transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is not sparse, of which torch 2.4 does not tell inside a transform."""
    below = tensor if torch.compiler.is_compiling() else innermost(tensor)
    return below.layout is torch.strided


def loses_gradients() -> bool:
    """Whether an enclosing transform makes zeros of gradients, as torch 2.4 in inference mode."""
    return (
        torch.is_inference_mode_enabled()
        and any(
            interpreter.key() == _functorch.TransformType.Grad
            for interpreter in _functorch.get_interpreter_stack() or ()
        )
        and not _records_in_inference_mode()
    )


def has_level(value: Any, level: int | None = None) -> bool:
    """Whether a tensor belongs to this level of the transforms, or to any level."""
    if not isinstance(value, Tensor):
        return False
    own: int = _functorch.maybe_get_level(value)
    return own > 0 if level is None else own == level


def escaped(error: RuntimeError) -> bool:
    """Whether a tensor of a transform was used below its level, as in ``Function.forward``."""
    return "INTERNAL ASSERT FAILED" in str(error) and "functorch" in str(error)


def is_attached(value: Any) -> bool:
    """Whether a tensor carries a derivative at any level: autograd's own or a transform's."""
    if not isinstance(value, Tensor):
        return False
    interpreter: Any = _functorch.peek_interpreter_stack()
    if interpreter is None:
        tangents = torch.autograd.forward_ad._current_level >= 0
        return value.requires_grad or (tangents and _has_tangent(value))
    if interpreter.key() != _functorch.TransformType.Vmap and (
        value.requires_grad or _has_tangent(value)
    ):
        return True
    with temporarily_pop_interpreter_stack():
        if _functorch.maybe_get_level(value) == interpreter.level():
            value = _functorch.get_unwrapped(value)
        return is_attached(value)


@functools.lru_cache(maxsize=1)
def _records_in_inference_mode() -> bool:
    with temporarily_clear_interpreter_stack(), torch.inference_mode():
        return bool(torch.func.grad(torch.sin)(torch.zeros((), device="cpu")) == 1)


def _in_vmap() -> bool:
    if torch.compiler.is_compiling():
        return False
    interpreter = _functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == _functorch.TransformType.Vmap


def _forward_mode_is_nested() -> bool:
    if torch.compiler.is_compiling():
        return False
    stack = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1


def _primal(value: Tensor) -> Tensor:
    """The tensor without the tangent of the innermost jvp level, below any vmap levels."""
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter.key() != _functorch.TransformType.Vmap:
        primal: Tensor = torch.autograd.forward_ad.unpack_dual(value, level=0).primal
        return primal
    level = interpreter.level()
    if _functorch.maybe_get_level(value) != level:
        with temporarily_pop_interpreter_stack():
            return _primal(value)
    inner, dim = _functorch._unwrap_batched(value, level)
    with temporarily_pop_interpreter_stack():
        inner = _primal(inner)
    assert dim is not None
    return _functorch._add_batch_dim(inner, dim, level)


def _has_tangent(value: Tensor) -> bool:
    if not is_differentiable(value):
        return False
    return torch.autograd.forward_ad.unpack_dual(value, level=0).tangent is not None


def reaches_foreign_leaf(outputs: Sequence[Tensor], inputs: Sequence[Any]) -> bool:
    """Whether the graph of the outputs ends in a leaf variable that is not among the inputs."""
    known = {id(leaf) for leaf in inputs if _requires_grad(leaf)}
    stop = {leaf.grad_fn for leaf in inputs if _requires_grad(leaf) and leaf.grad_fn is not None}
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
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in known and not hasattr(variable, _OWN):
                return True
    return False


class _Engine(Protocol):
    """A way to take the products of a `Linearization`."""

    outputs: Leaves
    aux: Leaves
    captures_gradient: bool

    def pull(self, cotangents: Leaves, group: int) -> Leaves: ...


class _GraphEngine:
    """Products from one recorded autograd graph, for use outside all transforms."""

    def __init__(
        self, fn: _AuxFunction, primals: tuple[Any, ...], groups: _Groups, tracked: bool
    ) -> None:
        chosen = {index for group in groups for index in group}
        primals = out_of_inference(primals)
        with torch.enable_grad():
            inputs = [
                _enter(leaf, tracked) if index in chosen else leaf
                for index, leaf in enumerate(primals)
            ]
            outputs, aux = fn(*inputs)
        self.captures_gradient = reaches_foreign_leaf(outputs, inputs)
        self.outputs = tuple(outputs) if tracked else detach(outputs)
        self.aux = tuple(aux) if tracked else detach(aux)
        self._tracked = tracked
        self._inputs = [[inputs[index] for index in group] for group in groups]
        self._live = [index for index, out in enumerate(outputs) if out.requires_grad]
        self._live_outputs = [outputs[index] for index in self._live]

    def pull(self, cotangents: Leaves, group: int) -> Leaves:
        inputs = self._inputs[group]
        return tuple(
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(self.pull_used(cotangents, group), inputs, strict=True)
        )

    def pull_used(self, cotangents: Leaves, group: int) -> tuple[Tensor | None, ...]:
        inputs = self._inputs[group]
        if not self._live or not inputs:
            return (None,) * len(inputs)
        selected = [cotangents[index] for index in self._live]
        create_graph = torch.is_grad_enabled() and (
            self._tracked or any(cotangent.requires_grad for cotangent in selected)
        )
        grads = torch.autograd.grad(
            self._live_outputs,
            inputs,
            selected,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        return _sharding.align(grads, inputs)


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
        self.outputs, self.aux = self._record(0)
        self.captures_gradient = not tracked and any(map(_requires_grad, self.outputs))

    def pull(self, cotangents: Leaves, group: int) -> Leaves:
        if not self._groups[group]:
            return ()
        if group not in self._vjps:
            self._record(group)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (self._tracked or is_tracked(cotangents))
        ):
            return tuple(self._vjps[group](tuple(cotangents)))

    def _record(self, group: int) -> tuple[Leaves, Leaves]:
        indices = self._groups[group]

        def restricted(*selected: Tensor) -> tuple[Leaves, Leaves]:
            outputs, aux = self._fn(*_replace(self._primals, indices, selected))
            return tuple(outputs), tuple(aux)

        selected = (self._primals[index] for index in indices)
        outputs, self._vjps[group], aux = torch.func.vjp(  # type: ignore[misc]
            restricted, *selected, has_aux=True
        )
        return outputs, aux


def _make_engine(
    fn: _AuxFunction, primals: tuple[Any, ...], groups: _Groups, tracked: bool
) -> _Engine:
    if not transforms_active():
        return _GraphEngine(fn, primals, groups, tracked)
    return _FunctionalEngine(fn, primals, groups, tracked)


def _replace(items: Sequence[Any], indices: Sequence[int], new: Sequence[Any]) -> list[Any]:
    replaced = list(items)
    for index, item in zip(indices, new, strict=True):
        replaced[index] = item
    return replaced


def _requires_grad(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    # a batched tensor does not tell that the tensor it wraps requires grad
    while _functorch.is_batchedtensor(value) and not value.requires_grad:
        value = _functorch.get_unwrapped(value)
    return bool(value.requires_grad)


def _enter(leaf: Tensor, tracked: bool) -> Tensor:
    # A view, not the tensor itself: a primal may depend on another one, and products are partial.
    if tracked and leaf.requires_grad:
        return leaf.view_as(leaf)
    own = leaf.detach().requires_grad_()
    setattr(own, _OWN, True)
    return own


def _fill(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> Leaves:
    filled = tuple(
        [
            torch.zeros_like(leaf) if grad is None else grad
            for grad, leaf in zip(grads, like, strict=True)
        ]
    )
    return _sharding.align(filled, like)
