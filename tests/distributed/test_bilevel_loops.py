"""Loops whose tasks, params, hparams and data lie on two ranks: the numbers of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import vmap

import hyperfunc as hf
from tests import ranks
from tests.bilevel.loops import LOOPS, make_loop, variables
from tests.ranks import OLD, DTensor, Replicate, Shard, distribute_tensor, mesh_of

if OLD:
    from torch.distributed._tensor.debug import CommDebugMode
else:
    from torch.distributed.tensor.debug import CommDebugMode

pytestmark = pytest.mark.slow
newer_dtensors = pytest.mark.skipif(OLD, reason="the DTensors of torch 2.4 lack operations")

F64 = torch.float64
BY_DIFFERENCES = ("sama", "darts", "soba by differences")
TASKS, FEATURES, SAMPLES = 5, 3, 7

# layout: the dimensions that are sharded: of params, of hparams, of data (samples, tasks, features)
LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    "tasks": (0, None, 1),
    "data": (None, None, 0),
    "params": (1, None, None),
    "hparams": (None, 1, None),
    "all": (0, 0, 0),
}
KEPT = ("tasks", "all")  # for each loop; of the others, `soba` stands for all


def _loss(w: Any, x: Tensor, y: Tensor) -> Tensor:
    return (((x * w["weight"]).sum(-1) + w["bias"].sum(-1) - y) ** 2).mean()


def inner_loss(w: Any, h: Any, x: Tensor, y: Tensor) -> Tensor:
    return _loss(w, x, y) + 0.5 * sum((h[name].exp() * w[name] ** 2).sum() for name in w) / TASKS


def outer_loss(w: Any, h: Any, x: Tensor, y: Tensor) -> Tensor:
    return _loss(w, x, y) + 0.01 * sum((leaf**2).sum() for leaf in h.values())


def problem(width: int | None) -> Any:
    """Params, hparams and the batches of three updates."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    w, h = (
        {"weight": randn(TASKS, FEATURES), "bias": randn(TASKS, 2)},
        {"weight": -1 + 0.3 * randn(TASKS, FEATURES), "bias": 0.3 * randn(TASKS, 2)},
    )
    lead = () if width is None else (width,)
    batches = [
        (
            (randn(*lead, SAMPLES, TASKS, FEATURES), randn(*lead, SAMPLES, TASKS)),
            (randn(SAMPLES, TASKS, FEATURES), randn(SAMPLES, TASKS)),
        )
        for _ in range(3)
    ]
    return w, h, batches


def laid_out(layout: str, width: int | None) -> Any:
    """The same as DTensors."""
    of_w, of_h, of_data = LAYOUTS[layout]

    def place(leaf: Tensor, dim: int | None, lead: int = 0) -> Tensor:
        placement = Replicate() if dim is None or dim + lead >= leaf.ndim else Shard(dim + lead)
        return distribute_tensor(leaf, mesh_of(2), [placement])

    w, h, batches = problem(width)
    w, h = (
        {name: place(leaf, dim) for name, leaf in tree.items()}
        for tree, dim in ((w, of_w), (h, of_h))
    )
    lead = 0 if width is None else 1
    return (
        w,
        h,
        [
            (
                tuple(place(leaf, of_data, lead) for leaf in inner),
                tuple(place(leaf, of_data) for leaf in outer),
            )
            for inner, outer in batches
        ],
    )


def _full(tree: Any) -> list[Tensor]:
    leaves = optree.tree_leaves(tree, namespace="hyperfunc")
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves]


def build(name: str, optimizers: bool) -> Any:
    if name == "soba by differences":
        rates = {"inner_lr": 0.3, "outer_lr": 0.1, "products": "finite_difference"}
        return hf.bilevel.soba(inner_loss, outer_loss, **rates)
    rate = hf.optim.schedule(lambda hparams, step: 0.1 / (1 + step.double()))
    adam = hf.optim.clip_grad_norm(hf.optim.adam(rate), 0.5)
    own = {key: adam for key in variables(name)} if optimizers else {}
    return make_loop(name, (inner_loss, outer_loss), **own)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """All collectives, and those of them that are sums of this package."""
    all_reduce, count = dist.all_reduce, [0, 0]

    def counting(*args: Any, **keywords: Any) -> Any:
        count[1] += 1
        return all_reduce(*args, **keywords)

    dist.all_reduce = counting
    try:
        with CommDebugMode() as mode:
            yield count
    finally:
        dist.all_reduce = all_reduce
    count[0] = sum(mode.get_comm_counts().values())


def compare(name: str, layout: str, optimizers: bool) -> list[tuple[int, ...]]:
    """Three updates, beside those with ordinary tensors; the collectives of each of them."""
    width, loop = LOOPS.get(name, LOOPS["soba"])[1], build(name, optimizers)
    extra = (1, 2) if name == "saba" else ()
    ends, counts = [], []
    for w, h, batches in (problem(width), laid_out(layout, width)):
        state = loop.init(w, h)
        for batch in batches:
            with counted() as count:
                new = loop.update(state, *batch, *extra)
            counts.append(tuple(count))
            for field in ("params", "adjoint", "hparams", "memory", "optimizers"):
                pairs = zip(
                    *(
                        optree.tree_leaves(getattr(each, field), namespace="hyperfunc")
                        for each in (new, state)
                    ),
                    strict=True,
                )
                for leaf, before in pairs:
                    assert isinstance(leaf, DTensor) == isinstance(before, DTensor), field
                    if isinstance(leaf, DTensor):
                        assert leaf.placements == before.placements, field
            state = new
        ends.append(state)
    tol = 1e-8 if name in BY_DIFFERENCES else 1e-11
    torch.testing.assert_close(_full(ends[1]), _full(ends[0]), rtol=tol, atol=tol)
    assert counts[:3] == [(0, 0)] * 3
    return counts[3:]


# Inner products over params and hparams that an update takes of itself, besides what losses send.
OWN = {"pzobo": (1, 0), "bome": (2, 2), "sama": (2, 0), "darts": (2, 0)}


@newer_dtensors
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, each) for name in LOOPS for each in LAYOUTS if name == "soba" or each in KEPT],
)
def test_dtensors_give_the_numbers_of_one_process(
    pair: ranks.Ranks, name: str, layout: str
) -> None:
    """By plain steps and by optimisers; a clipped one sends a sum more for what is sharded."""
    plain, adam = (pair.run(compare, name, layout, each)[0] for each in (False, True))
    assert len(set(plain)) == len(set(adam)) == 1  # each update sends the same
    sharded = [dim is not None for dim in LAYOUTS[layout][:2]]
    own = sum(n for n, is_sharded in zip(OWN.get(name, (0, 0)), sharded, strict=True) if is_sharded)
    assert plain[0][1] == own
    clipped = sum(sharded[key == "outer"] for key in variables(name))
    clipped += name == "pzobo" and sharded[0]  # which steps from pushed hparams too
    assert adam[0][1] == own + clipped


@newer_dtensors
def test_dtensors_and_products_by_differences(pair: ranks.Ranks) -> None:
    pair.run(compare, "soba by differences", "all", False)


def shared(name: str, tasks: Any) -> Any:
    """Three updates of tasks, each with params of its own, that share hparams: those of one and
    all params."""
    width, loop = LOOPS[name][1], build(name, True)
    extra = (1, 2) if name == "saba" else ()

    def step(h: Any, state: Any, *batch: Any) -> Any:
        new = loop.update(state._replace(hparams=h), *batch, *extra)
        return new.hparams, new

    w, h, batches = problem(width)
    offsets = torch.linspace(-1, 1, 5, dtype=F64)
    states = vmap(lambda o: loop.init(optree.tree_map(lambda leaf: leaf + o, w), h))(offsets)
    call = hf.distributed.task_parallel(
        lambda h, tasks: vmap(step, in_dims=(None, 0, 0, 0))(h, tasks[0], *tasks[1])
    )
    for batch in batches:
        rows = optree.tree_map(lambda leaf: torch.stack([leaf * (1 + o) for o in offsets]), batch)
        h, states = call(h, tasks((states, rows)))
    return h, states


@pytest.mark.parametrize("name", LOOPS)
def test_tasks_that_share_hparams(pair: ranks.Ranks, name: str) -> None:
    """Spread over the ranks by `task_parallel`, beside one process."""
    expected = shared(name, lambda tree: tree)
    tol = 1e-8 if name in BY_DIFFERENCES else 1e-12
    for found in pair.run(shared, name, hf.distributed.local_tasks):
        torch.testing.assert_close(_full(found), _full(expected), rtol=tol, atol=tol)
