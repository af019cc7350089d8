"""What is batched by ``vmap``, and what that allows: values looked at, vectors overwritten.

A tensor inside ``vmap`` is, outside of it, one tensor with the batch in front.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._torch import internals, tracking
from hyperfunc._torch.internals import active_transforms, innermost_transform, is_traced
from hyperfunc._types import Leaves

_OLD_VMAP = (
    "is_grads_batched=True in torch.autograd.grad, and vectorize=True in torch.autograd.functional "
    "map by an older vmap, in which no value of a tensor can be looked at. Use torch.func.jacrev, "
    "jacfwd, hessian or vmap instead"
)

# Entries of a vector that are multiplied at a time under vmap, so that the products stay in cache.
_PIECE = 16384

Levels: TypeAlias = tuple[tuple[int, int], ...]
"""The level and the batch size of each ``vmap``, the outermost first."""


def active_vmaps() -> Levels:
    """The active transforms, if these are ``vmap`` alone; or ()."""
    if torch.compiler.is_compiling():
        return ()
    stack = active_transforms()
    if not stack or any(transform.key() != internals.VMAP for transform in stack) or is_traced():
        return ()
    return tuple((vmap.level(), internals.vmap_size(vmap)) for vmap in stack)


def levels_of_vmaps() -> Levels:
    """The active levels of vmap, whatever else is active."""
    vmaps = [each for each in active_transforms() or () if each.key() == internals.VMAP]
    return tuple((vmap.level(), internals.vmap_size(vmap)) for vmap in vmaps)


def vmap_levels() -> Levels:
    """`active_vmaps`, if nothing else follows values either; or ()."""
    if internals.forward_mode_active() or torch.is_inference_mode_enabled():
        return ()
    return active_vmaps()


def is_batched(tensor: Tensor, levels: Levels) -> bool:
    """Whether a tensor has the batch dimension of every level."""
    for level, _ in reversed(levels):
        if internals.level_of(tensor) != level:
            return False
        tensor = internals.unwrapped(tensor)
    return True


def is_plain_below(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one below vmaps, and of no transform that is over."""
    while internals.is_batched(tensor):
        tensor = internals.unwrapped(tensor)
    return type(tensor) is Tensor and not internals.is_wrapped(tensor)


def lower(tensor: Tensor, levels: Levels) -> Tensor:
    """The tensor below all levels, with a dimension for each of them in front."""
    dims: dict[int, int] = {}
    for level, _ in reversed(levels):
        if internals.level_of(tensor) == level:
            dims[level] = internals.batch_dim(tensor)
            tensor = internals.unwrapped(tensor)
    for place, (level, size) in enumerate(levels):
        if level not in dims:
            shape = tensor.shape
            tensor = tensor.unsqueeze(place).expand(*shape[:place], size, *shape[place:])
        elif dims[level]:
            tensor = tensor.movedim(dims[level] + place, place)
    return tensor


def lift(tensor: Tensor, levels: Levels) -> Tensor:
    """The inverse of `lower`."""
    for level, _ in levels:
        tensor = internals.with_batch_dim(tensor, 0, level)
    return tensor


def mapped_alike(outputs: Leaves, operands: Sequence[Tensor]) -> Leaves:
    """The outputs of a function, copied for each task of a vmap that any operand or output is in.

    The rule that torch makes for a `torch.autograd.Function` under vmap takes the cotangent of an
    output that is the same for all tasks as one of each task, and counts it that often.
    """
    held = {level for tensor in (*operands, *outputs) for level in levels_of(tensor)}
    levels = tuple(each for each in active_vmaps() if each[0] in held)
    return tuple(
        leaf if is_batched(leaf, levels) else lift(lower(leaf, levels).clone(), levels)
        for leaf in outputs
    )


def may_overwrite(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing follows what these tensors hold: no derivative, trace, or transform but vmap.

    Under vmap each must have every batch dimension, so that the result of any of them fits.
    """
    levels = vmap_levels()
    if (not levels and tracking.transforms_active()) or is_traced():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return False
        if levels and (tracking.requires_grad(tensor) or not is_batched(tensor, levels)):
            return False
    return True


def can_read(tensors: Sequence[Tensor]) -> bool:
    """Whether the values of tensors that `may_overwrite` holds for can be read without waiting.

    Numbers then do for scalars what 0-d tensors do, at a fraction of the overhead. Not where
    something records what is computed, which is to hold for other values too.
    """
    return (
        not tracking.transforms_active()
        and not internals.is_recorded()
        and all(tensor.device.type == "cpu" for tensor in tensors)
        and may_overwrite(tensors)
    )


def write_sum(alpha: Tensor | float, x: Leaves, y: Leaves, out: Leaves) -> None:
    """Write ``y + alpha x`` over x or y, which `may_overwrite` has to allow for both."""
    levels = vmap_levels()
    if out is y and not levels and not isinstance(alpha, Tensor):
        internals.add_to_all(y, x, alpha)  # less than half the time where leaves are small
        return
    for u, v, place in zip(x, y, out, strict=True):
        factor: Any = alpha
        if isinstance(alpha, Tensor) and (alpha.dtype != u.dtype or alpha.device != u.device):
            factor = alpha.to(device=u.device, dtype=u.dtype)
        if levels:  # vmap has no rule for out=
            if isinstance(factor, Tensor):
                factor = lower(factor, levels)
                factor = factor.reshape(*factor.shape, *[1] * u.ndim)
            u, v, place = (lower(leaf, levels) for leaf in (u, v, place))
        if isinstance(factor, Tensor):
            torch.addcmul(v, factor, u, out=place)
        else:
            torch.add(v, u, alpha=factor, out=place)


def loop_over_tasks(fn: Callable[..., Leaves], operands: Leaves, rng: Tensor) -> Leaves:
    """What ``vmap`` would make of a function of flat tensors, run for each task by itself.

    The function sees plain tensors outside of all transforms. With ``randomness="same"`` each task
    draws the same numbers, from the state of the generator ``rng``.
    """
    torch.set_rng_state(rng)
    used = {level for operand in operands for level in levels_of(operand)}
    levels = tuple((level, size) for level, size in active_vmaps() if level in used)
    sizes = [size for _, size in levels]
    modes = {internals.vmap_randomness(vmap) for vmap in active_transforms() or ()}
    lowered = [lower(operand, levels) for operand in operands]
    results = []
    with internals.outside_all():
        for index in itertools.product(*map(range, sizes)):
            before = torch.get_rng_state()
            results.append(tracking.detach(fn(*(operand[index] for operand in lowered))))
            if "different" not in modes and not torch.equal(before, torch.get_rng_state()):
                if "error" in modes:
                    raise RuntimeError(
                        "it draws random numbers under vmap, which must be told whether tasks "
                        'share them: torch.func.vmap(..., randomness="different") or "same"'
                    )
                if len(results) < math.prod(sizes):
                    torch.set_rng_state(before)
        for task in results:
            if [leaf.shape for leaf in task] != [leaf.shape for leaf in results[0]]:
                shapes = [[tuple(leaf.shape) for leaf in each] for each in (results[0], task)]
                raise ValueError(
                    f"it returned tensors of shapes {shapes[0]} for one task and {shapes[1]} for "
                    f"another; expected the same shapes for all tasks of a vmap"
                )
        columns = zip(*results, strict=True)
        stacked = [torch.stack(leaves).reshape(*sizes, *leaves[0].shape) for leaves in columns]
    return tuple(lift(leaf, levels) for leaf in stacked)


def levels_of(tensor: Tensor) -> list[int]:
    """The levels of ``vmap`` that a tensor is batched in."""
    levels = []
    while internals.is_batched(tensor):
        levels.append(internals.level_of(tensor))
        tensor = internals.unwrapped(tensor)
    return levels


def common_value(tensor: Tensor) -> Tensor:
    """The one number that a tensor holds for all tasks of ``vmap``, or the tensor if they differ.

    Code that branches on it takes the branch that it takes for each task by itself.
    """
    if not internals.is_wrapped(tensor) or tensor.numel() != 1 or is_traced():
        return tensor
    if tracking.is_foreign(tensor):
        return tensor
    values = tracking.innermost(tensor).detach().reshape(-1)
    if len(values) < 2 or internals.is_recorded() or not bool((values == values[0]).all()):
        return tensor
    return values[0]


def count_true(flag: Tensor) -> int:
    """How many tasks of the enclosing ``vmap`` levels a 0-d bool holds for (a host sync)."""
    try:
        return int(_gathered(flag).sum() if tracking.transforms_active() else flag)
    except RuntimeError as error:
        if "Batching rule not implemented" in str(error):
            raise RuntimeError(_OLD_VMAP) from error
        raise


def count_tasks(flag: Tensor) -> int:
    """How many tasks the enclosing ``vmap`` levels hold that the flag depends on."""
    return _gathered(flag).numel() if tracking.transforms_active() else 1


def all_true(flag: Tensor) -> bool:
    """Whether a 0-d bool holds for every task of the ``vmap`` levels (a host sync)."""
    return count_true(~flag) == 0


def any_true(flag: Tensor) -> bool:
    """Whether a 0-d bool holds for some task of the ``vmap`` levels (a host sync)."""
    return count_true(flag) > 0


def can_look(tensor: Tensor) -> bool:
    """Whether a value may be looked at: there is one, and no CUDA graph is captured."""
    if tensor.is_meta or internals.is_traced():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two vectors.

    torch batches ``torch.dot`` as a product of matrices, which takes several times as long.
    """
    if not _in_vmap():
        return torch.dot(x, y)
    if x.shape[0] <= _PIECE or is_traced():
        return (x * y).sum()
    return functools.reduce(torch.add, map(dot, x.split(_PIECE), y.split(_PIECE)))


def true_indices(flag: Tensor) -> list[tuple[int, ...]]:
    """Where a bool holds: indices into the ``vmap`` levels, outermost first, then its own."""
    return [tuple(index) for index in _gathered(flag).nonzero().tolist()]


def largest(value: Tensor) -> float:
    """The largest value over all tasks of the ``vmap`` levels (a host sync)."""
    return float(_Gathered.apply(value.detach().to(torch.float64)).max())


def _gathered(flag: Tensor) -> Tensor:
    levels = active_vmaps()
    if levels and is_plain_below(flag):
        held = levels_of(flag)
        with internals.outside_all():
            return lower(flag, tuple(each for each in levels if each[0] in held)).to(torch.int64)
    gathered: Tensor = _Gathered.apply(flag.to(torch.int64))
    return gathered


class _Gathered(torch.autograd.Function):
    """A constant with the levels of vmap that it is batched in as its first dimensions."""

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
        return _Gathered.apply(value if in_dims[0] is None else value.movedim(in_dims[0], 0)), None


@contextlib.contextmanager
def outside_idle_vmaps(tensors: Sequence[Any]) -> Iterator[None]:
    """Leave the innermost vmap levels in which none of these tensors is batched.

    Such levels come with ``jacfwd`` and ``hessian``, and inside them code that nobody maps over may
    not use ``backward()``, in-place operations or random numbers.
    """
    vmap = innermost_transform() if _in_vmap() else None
    if (
        vmap is None
        or internals.vmap_randomness(vmap) == "different"
        or any(tracking.has_level(tensor, vmap.level()) for tensor in tensors)
    ):
        yield
        return
    with internals.outside_innermost(), outside_idle_vmaps(tensors):
        yield


def vmap_marker() -> Leaves:
    """An operand that is batched in every vmap level with different randomness, if there is one.

    It makes those levels run a step for each task even if no other operand tells tasks apart.
    """
    vmaps = [each for each in active_transforms() or () if each.key() == internals.VMAP]
    vmaps = [vmap for vmap in vmaps if internals.vmap_randomness(vmap) == "different"]
    levels = tuple((vmap.level(), internals.vmap_size(vmap)) for vmap in vmaps)
    if not levels:
        return ()
    with internals.outside_all():
        marker = torch.zeros([size for _, size in levels])
    return (lift(marker, levels),)


def mapped_zero(tree: Any) -> Tensor:
    """A 0-d False that is mapped by every vmap that maps a tensor of the tree."""
    zero = torch.zeros((), dtype=torch.bool)
    # torch's own notion of a tree, as it is vmap's.
    for leaf in internals.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            zero = zero | leaf.new_zeros((), dtype=torch.bool, layout=torch.strided)
    return zero


def _in_vmap() -> bool:
    transform = None if torch.compiler.is_compiling() else innermost_transform()
    return transform is not None and transform.key() == internals.VMAP
