"""SABA: SOBA with variance reduction."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._engine.finite_differences import Products
from hyperfunc._engine.shown import show
from hyperfunc._torch import sharding
from hyperfunc._torch.containers import loadable
from hyperfunc._types import Loss, TensorTree
from hyperfunc.bilevel._base import AdjointSteps, Loop, Method, State, directions, taking

if TYPE_CHECKING:
    from typing_extensions import Unpack


@loadable
class Memory(NamedTuple):
    """What `saba` saw last on each batch: trees like params or hparams, with a leading index.

    The gradient of the inner loss, the products of its Hessian and of its cross derivative with the
    adjoint, and the gradient of the outer loss with respect to params and to hparams.

    Example:
        >>> loop = hf.bilevel.saba(
        ...     lambda w, h, x: (w - h * x) ** 2,
        ...     lambda w, h, x: (w - x) ** 2,
        ...     num_inner_batches=3,
        ...     num_outer_batches=2,
        ...     inner_lr=0.1,
        ...     outer_lr=0.1,
        ... )
        >>> memory = loop.init(torch.tensor(0.0), torch.tensor(0.0)).memory
        >>> memory.inner_gradient.shape, memory.outer_params.shape
        (torch.Size([3]), torch.Size([2]))
    """

    inner_gradient: TensorTree
    product: TensorTree
    cross: TensorTree
    outer_params: TensorTree
    outer_hparams: TensorTree


@taking(AdjointSteps)
def saba(
    inner_loss: Loss,
    outer_loss: Loss,
    *,
    num_inner_batches: int,
    num_outer_batches: int,
    products: Products = "reverse",
    **steps: Unpack[AdjointSteps],
) -> Loop:
    r"""SABA: `soba` with variance reduction, as SAGA has it.

    The data are split once into ``n`` inner batches and ``m`` outer batches of equal weight, so
    that the losses are the means :math:`\frac1n \sum_i \ell_i` and :math:`\frac1m \sum_j E_j` (a
    batch may be a single sample). For each of the five terms that make up the directions, the loop
    remembers the value :math:`g_i` that it saw last on batch :math:`i`, and steps along

    .. math:: g_i^{new} - g_i + \frac1n \sum_k g_k ,

    which has the same mean and, near a solution, no variance: with constant step sizes it converges
    at the rate of gradient descent. The memory starts at zero. It holds ``n (2 |w| + |h|)`` and
    ``m (|w| + |h|)`` numbers and is copied in every step, as the update is pure.

    ``num_inner_batches`` is ``n`` and ``num_outer_batches`` ``m``, both >= 1. All other arguments
    are those of `soba`.

    Returns:
        A `Loop`, with ``update(state, inner_batch, outer_batch, inner_index, outer_index)``. The
        indices say which of the batches these are: integers or 0-d integer tensors in ``[0, n)``
        and ``[0, m)``, drawn uniformly. The same index must always come with the same batch.

    Raises:
        TypeError: as `soba`; an index that is no integer.
        ValueError: as `soba`; a number of batches below 1; a Python integer as an index out of
            range.

    Example:
        >>> x, y = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
        >>> inner_loss = lambda w, h, x: (w - h * x) ** 2 / 2
        >>> outer_loss = lambda w, h, y: (w - y) ** 2 / 2
        >>> rates = {"inner_lr": 0.2, "outer_lr": 0.02}
        >>> loop = hf.bilevel.saba(
        ...     inner_loss, outer_loss, num_inner_batches=2, num_outer_batches=2, **rates
        ... )
        >>> state = loop.init(torch.tensor(0.0), torch.tensor(0.0))
        >>> for i, j in torch.randint(2, (1000, 2)).tolist():
        ...     state = loop.update(state, (x[i],), (y[j],), i, j)
        >>> state.params, state.hparams
        (tensor(6.0000), tensor(3.0000))

    References:
        Dagreou, Ablin, Vaiter and Moreau, arXiv 2201.13409; Defazio, Bach and Lacoste-Julien,
        SAGA, arXiv 1407.0202.
    """
    check_count("saba", "num_inner_batches", num_inner_batches)
    check_count("saba", "num_outer_batches", num_outer_batches)
    return _SABA(
        inner_loss, outer_loss, steps, num_inner_batches, num_outer_batches, products=products
    ).loop()


@dataclasses.dataclass(frozen=True, repr=False)
class _SABA(Method):
    num_inner_batches: int
    num_outer_batches: int

    name = "saba"

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        state = super().init(params, hparams)

        def table(tree: TensorTree, size: int) -> TensorTree:
            # a stack of DTensors lies on the ranks as they do
            return trees.tree_map(lambda leaf: torch.stack([torch.zeros_like(leaf)] * size), tree)

        w, h, n, m = state.params, state.hparams, self.num_inner_batches, self.num_outer_batches
        tables = (table(w, n), table(w, n), table(h, n), table(w, m), table(h, m))
        return state._replace(memory=Memory(*tables))

    def update(
        self,
        state: State,
        inner_batch: tuple[Any, ...],
        outer_batch: tuple[Any, ...],
        inner_index: int | Tensor,
        outer_index: int | Tensor,
    ) -> State:
        point = self.enter(state)
        i = _check_index("inner_index", inner_index, self.num_inner_batches)
        j = _check_index("outer_index", outer_index, self.num_outer_batches)
        seen = point.terms(inner_batch, outer_batch)
        if not isinstance(state.memory, Memory):
            raise TypeError(
                "saba: state.memory is not a Memory; make the state with the init of saba itself"
            )
        reduced, memory = [], []
        for new, old, index in zip(seen, state.memory, (i, i, i, j, j), strict=True):
            table, spec = trees.flatten(old)
            pairs = [_saga(*each, index) for each in zip(new, table, strict=True)]
            terms, tables = zip(*pairs, strict=True)
            reduced.append(terms)
            memory.append(trees.unflatten(spec, tables))
        return point.stepped(*directions(reduced)).leave()._replace(memory=Memory(*memory))


def _saga(new: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of reduced variance, and the table with the new row."""
    index = index.to(table.device)
    rows = torch.arange(table.shape[0], device=table.device) == index
    mask = sharding.spread_like(rows.reshape(-1, *[1] * new.ndim), table)
    old = table.index_select(0, sharding.spread_like(index.reshape(1), table))[0]
    # the mean is taken anew, as a running one gathers rounding errors
    return new - old + table.mean(0), torch.where(mask, new, table)


def _check_index(key: str, index: Any, size: int) -> Tensor:
    if isinstance(index, Tensor):
        if not index.ndim and index.dtype is not torch.bool and not index.is_floating_point():
            return index
        got = f"a tensor of shape {tuple(index.shape)} and dtype {index.dtype}"
    elif isinstance(index, int) and not isinstance(index, bool):
        if 0 <= index < size:
            return torch.tensor(index)
        raise ValueError(f"saba: {key} is {index}; expected an integer in [0, {size})")
    else:
        got = f"{show(index)} of type {type(index).__name__}"
    raise TypeError(f"saba: {key} is {got}; expected an integer or a 0-d integer tensor")
