"""Loops that call a module itself, with its hooks: for ``fully_shard``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperfunc._engine import checks, trees
from hyperfunc._engine.user_functions import call
from hyperfunc._torch import autodiff, sharding, tracking
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.bilevel._base import Loop, Method, Point, State, TakesOwnGradient

# Those whose gradients are averaged by other means, of which hparams would know nothing.
_OTHERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def module_loop(
    method: Callable[..., Loop],
    module: nn.Module,
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor],
    **settings: Any,
) -> Loop:
    r"""A first-order loop that calls a module itself, as ``fully_shard`` (FSDP2) needs it.

    The losses take the module where those of other loops take params: ``inner_loss(module, hparams,
    *inner_batch)``. For each gradient the params are written into the module, which is called with
    all its hooks, and ``backward`` is: the one way to a gradient by parameters that ``fully_shard``
    has split, as its hooks gather those that the module holds, whatever `torch.func` put in their
    place, and leave the gradients in ``.grad``.

    An update is a function of its arguments still: when it ends, the module has the parameters,
    gradients and buffers that it had before. To see what a loop has found, write
    ``module.load_state_dict(state.params, strict=False)``.

    With ``fully_shard`` each rank calls ``update`` with a batch of its own, of equal size. The
    params of the state are DTensors, whose gradients are means over the ranks; the hparams are
    ordinary tensors, the same on all, whose gradients this loop averages, in one all-reduce for
    each. A state that `hyperfunc.distributed.save_state` has written goes on on any number of
    ranks. It takes no transform of ``torch.func``, and copies of the parameters for the time of an
    update.

    Args:
        method: `f2sa`, `bome`, `pbgd`, `meha`, `sama` or `darts`.
        module: as it is, or by ``fully_shard``; its parts too.
        inner_loss: ``(module, hparams, *inner_batch) -> scalar``.
        outer_loss: ``(module, hparams, *outer_batch) -> scalar``.
        settings: those of the method.

    Returns:
        A `Loop`. ``init(params, hparams)`` takes the parameters that are trained, by their names:
        ``dict(module.named_parameters())``, or some of these. All others stay as they are.

    Raises:
        TypeError: as the method; no module, or one in a wrapper; a method that takes products; when
            called, hparams that are DTensors.
        ValueError: as the method; when called, params with other names than the module has, or
            inside a transform.

    Example:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> inner_loss = lambda net, h, x: (net(x) - h * x).square().mean()
        >>> outer_loss = lambda net, h, x: (net(x) - 3 * x).square().mean()
        >>> loop = hf.bilevel.module_loop(
        ...     hf.bilevel.f2sa, net, inner_loss, outer_loss, inner_lr=0.4, outer_lr=0.1
        ... )
        >>> state = loop.init(dict(net.named_parameters()), torch.tensor(0.0))
        >>> for _ in range(80):
        ...     state = loop.update(state, (torch.ones(4, 1),), (torch.ones(4, 1),))
        >>> state.params["weight"], state.hparams
        (tensor([[3.0000]]), tensor(3.0000))
    """
    name = getattr(method, "__name__", repr(method))
    if not isinstance(module, nn.Module):
        raise TypeError(f"module_loop: got {type(module).__name__}; expected an nn.Module")
    for part in module.modules():
        if type(part).__name__ in _OTHERS:
            raise TypeError(
                f"module_loop: got a module in {type(part).__name__}; expected the module as it "
                f"is, or by torch.distributed.fsdp.fully_shard"
            )
    losses = {"inner_loss": inner_loss, "outer_loss": outer_loss}
    for key, loss in losses.items():
        checks.check_callable(loss, f"{name}: {key}", "(module, hparams, *batch) -> scalar")
    loop = method(*(_ModuleLoss(module, loss) for loss in losses.values()), **settings)
    made = getattr(loop.update, "__self__", None)
    if not isinstance(made, Method) or not made.first_order:
        raise TypeError(
            f"module_loop: {name} takes products with second derivatives, which hooks do not "
            f"follow; expected f2sa, bome, pbgd, meha, sama or darts of hf.bilevel"
        )
    return Loop(loop.init, _Update(loop.update, module))


@dataclasses.dataclass(frozen=True)
class _Update:
    """An update that leaves the module as it was."""

    update: Callable[..., State]
    module: nn.Module

    def __call__(self, state: State, inner_batch: Any, outer_batch: Any) -> State:
        if tracking.transforms_active():
            raise ValueError(
                "module_loop: update was called inside a transform of torch.func, which does not "
                "see the hooks of a module; expected a plain call"
            )
        with _left_as_it_was(self.module):
            return self.update(state, inner_batch, outer_batch)


@dataclasses.dataclass(frozen=True)
class _ModuleLoss(TakesOwnGradient):
    """A loss of a module, at params that are written into it."""

    module: nn.Module
    fn: Callable[..., Tensor]

    def __call__(self, params: TensorTree, hparams: TensorTree, *batch: Any) -> Tensor:
        raise TypeError("module_loop: expected f2sa, bome, pbgd, meha, sama or darts")

    def gradient_used(
        self, point: Point, key: str, batch: tuple[Any, ...], chosen: slice
    ) -> tuple[Tensor | None, ...]:
        values = trees.unflatten(point.params_spec, point.w)
        if not isinstance(values, dict) or not values.keys() <= set(_parameters(self.module)):
            raise ValueError(
                "module_loop: params are no dictionary of parameters of the module by their "
                "names; write loop.init(dict(module.named_parameters()), hparams)"
            )
        if any(sharding.is_dtensor(leaf) for leaf in point.h):
            raise TypeError(
                "module_loop: hparams are DTensors; expected ordinary tensors, the same on all "
                "ranks, for module_loop averages their gradients itself"
            )
        _write(self.module, values)
        with torch.enable_grad():
            by_params, by_hparams = chosen.start == 0, chosen.stop is None
            h = tuple(leaf.detach().requires_grad_(by_hparams) for leaf in point.h)
            hparams = trees.unflatten(point.hparams_spec, h)
            name = f"{point.method.name}: {key}"
            value = call(f"{name}(module, hparams, *batch)", self.fn, self.module, hparams, *batch)
            checks.check_scalar(value, name)
            if value.requires_grad:
                # only a backward to the parameters runs the hooks that add up their gradients
                value.backward(inputs=None if by_params else h)
        own = _parameters(self.module)
        found: list[Tensor | None] = []
        if by_params:
            grads = {name: own[name].grad for name in values}
            found += trees.flatten(grads, none_is_leaf=True)[0]
            for parameter in own.values():
                parameter.grad = None
        if by_hparams:
            found += _means([leaf.grad for leaf in h], h, point.w)
        return tuple(found)


def _means(grads: list[Tensor | None], like: Leaves, w: Leaves) -> list[Tensor | None]:
    """The means over the ranks that the params are sharded over."""
    sharded: list[Any] = [leaf for leaf in w if sharding.is_dtensor(leaf)]
    if not sharded or not like:
        return grads
    mesh, filled = sharded[0].device_mesh, autodiff.zeros_for_none(grads, like)
    total = trees.ravel(filled, trees.accumulation_dtype(filled))
    for dim in range(mesh.ndim):
        dist.all_reduce(total, group=mesh.get_group(dim))
    return [*trees.unravel(total / mesh.size(), filled)]


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name: of ``fully_shard``, the parts that this rank holds."""
    for part in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            part.reshard()  # type: ignore[operator]
    return dict(module.named_parameters())


@torch.no_grad()
def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
    own = _parameters(module)
    for name, value in values.items():
        own[name].copy_(value)


@contextlib.contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Within this, parameters, gradients and buffers may change; after it they are as before."""
    own, buffers = _parameters(module), dict(module.named_buffers())
    values = {name: parameter.detach().clone() for name, parameter in own.items()}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    grads = {name: parameter.grad for name, parameter in own.items()}
    for parameter in own.values():
        parameter.grad = None

    def restore() -> None:
        _write(module, values)
        for name, parameter in _parameters(module).items():
            parameter.grad = grads[name]
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])

    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of hooks that the error has cut off
            restore()
        raise
    restore()
