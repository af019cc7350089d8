"""Vectors whose leaves are DTensors: which entries a rank holds, and sums over the ranks.

Elementwise arithmetic needs nothing from here, as DTensors bring it along. Inner products do: the
ranks multiply what they hold and add up the results, in one all-reduce for as many products as are
wanted at a time. What comes out is an ordinary tensor, the same on every rank.

``torch.distributed.tensor`` is looked up, never imported: where nobody did, there is no DTensor.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._types import Leaves

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor itself, not one that a transform has wrapped."""
    if type(value) in _PLAIN:
        return False
    dtensor = getattr(_tensor_module(), "DTensor", None)
    return dtensor is not None and isinstance(value, dtensor)


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor of which no rank holds everything."""
    return is_dtensor(value) and not all(p.is_replicate() for p in value.placements)


def layout_of(leaves: Leaves) -> Layout | None:
    """How leaves lie on the ranks; None for ordinary tensors, and where autograd follows them.

    DTensors have derivative rules, sums made here do not.
    """
    if all(type(leaf) in _PLAIN for leaf in leaves):
        return None
    distributed: list[Any] = [leaf for leaf in leaves if is_dtensor(leaf)]
    if not distributed or (
        torch.is_grad_enabled() and any(leaf.requires_grad for leaf in distributed)
    ):
        return None
    mesh = distributed[0].device_mesh
    for leaf in distributed:
        if leaf.device_mesh != mesh:
            raise ValueError(
                f"got DTensors on two device meshes, {mesh} and {leaf.device_mesh}; expected one. "
                f"Distribute all of them on one mesh, with Replicate() along the dimensions that "
                f"a tensor is not sharded over"
            )
    return Layout(mesh, tuple(_settled(leaf) if is_dtensor(leaf) else None for leaf in leaves))


def align(values: tuple[Any, ...], like: Sequence[Any]) -> tuple[Any, ...]:
    """The same values, each tensor laid out on the ranks as its counterpart."""
    if all(type(value) in _PLAIN for value in values):
        return values
    return tuple(
        _place(value, ref.device_mesh, _settled(ref))
        if is_dtensor(value) and is_dtensor(ref)
        else value
        for value, ref in zip(values, like, strict=True)
    )


def replicate(value: Any) -> Any:
    """A value that every rank holds, where sums over the ranks were still to be done."""
    if not is_dtensor(value):
        return value
    mesh = value.device_mesh
    return _place(value, mesh, (_tensor_module().Replicate(),) * mesh.ndim)


def full(value: Any) -> Any:
    """All of a DTensor as an ordinary tensor, or the value itself."""
    return value.full_tensor() if is_dtensor(value) else value


def spread_like(value: Any, ref: Any) -> Any:
    """A tensor that every rank has, as a DTensor where another tensor is one."""
    return _spread(value, ref.device_mesh) if is_dtensor(ref) else value


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the leaves of a vector lie on the ranks: their placements, None for ordinary tensors.

    A leaf that several ranks hold is counted by the first of them.
    """

    mesh: Any
    placements: tuple[tuple[Any, ...] | None, ...]

    def local(self, x: Leaves) -> Leaves:
        """What this rank holds of a vector."""
        return tuple(self._local(*pair) for pair in zip(x, self.placements, strict=True))

    def stacked(self) -> Layout:
        """The layout of vectors like these with one more dimension before the others."""
        shard = _tensor_module().Shard
        placements = (
            each and tuple(shard(p.dim + 1) if p.is_shard() else p for p in each)
            for each in self.placements
        )
        return Layout(self.mesh, tuple(placements))

    def wrap(self, parts: Iterable[Tensor], like: Leaves) -> Leaves:
        """The inverse of `local`, for vectors of the shapes of another."""

        def wrapped(part: Any, leaf: Tensor, placements: Any) -> Any:
            if placements is None:
                return part
            sizes = {"shape": leaf.shape, "stride": leaf.stride()}
            return _tensor_module().DTensor.from_local(
                part, self.mesh, placements, run_check=False, **sizes
            )

        return tuple(wrapped(*each) for each in zip(parts, like, self.placements, strict=True))

    def counted(self) -> tuple[bool, ...]:
        """For each leaf, whether this rank's part of it enters sums over the ranks."""
        coordinate = self.mesh.get_coordinate()
        return tuple(
            all(coordinate[dim] == 0 or _splits(each, dim) for dim in self._sharded_dims)
            for each in self.placements
        )

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        return self.start_sum(values)()

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Start a sum over the ranks; the function that is returned waits for it."""
        dims, values = self._sharded_dims, values.detach().clone()
        groups = [None]  # one all-reduce, or one for each dimension of the mesh
        if self.mesh.size() != torch.distributed.get_world_size() or len(dims) < self.mesh.ndim:
            groups = [self.mesh.get_group(dim) for dim in dims]
        for group in groups[:-1]:
            torch.distributed.all_reduce(values, group=group)
        if not groups:
            return lambda: values
        work = torch.distributed.all_reduce(values, group=groups[-1], async_op=True)

        def wait() -> Tensor:
            work.wait()
            return values

        return wait

    @property
    def _sharded_dims(self) -> list[int]:
        """The dimensions of the mesh over which some leaf is sharded."""
        dims = range(self.mesh.ndim)
        return [dim for dim in dims if any(_splits(each, dim) for each in self.placements)]

    def _local(self, leaf: Any, placements: tuple[Any, ...] | None) -> Any:
        if placements is None:
            return full(leaf)
        if not is_dtensor(leaf):
            leaf = _spread(leaf, self.mesh)
        return _place(leaf, self.mesh, placements).to_local()


def _spread(value: Tensor, mesh: Any) -> Any:
    """A tensor that every rank has as a DTensor."""
    module = _tensor_module()
    everywhere = [module.Replicate()] * mesh.ndim
    return module.DTensor.from_local(value, mesh, everywhere, run_check=False)


def _place(value: Any, mesh: Any, placements: tuple[Any, ...]) -> Any:
    if value.device_mesh == mesh and tuple(value.placements) == placements:
        return value
    return value.redistribute(mesh, placements)


def _splits(placements: tuple[Any, ...] | None, dim: int) -> bool:
    return placements is not None and not placements[dim].is_replicate()


def _settled(leaf: Any) -> tuple[Any, ...]:
    """The placements of a DTensor once sums that are still to be done are."""
    return tuple(_tensor_module().Replicate() if p.is_partial() else p for p in leaf.placements)


def _tensor_module() -> Any:
    module = sys.modules.get("torch.distributed.tensor")
    # where DTensor lived up to torch 2.4
    return module if hasattr(module, "DTensor") else sys.modules.get("torch.distributed._tensor")
