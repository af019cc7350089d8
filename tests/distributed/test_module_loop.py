"""Loops that call a module by ``fully_shard``: the numbers of one process, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import optree
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hyperfunc as hf
from hyperfunc.bilevel import Loop, State
from tests import ranks
from tests.bilevel.loops import make_loop, settings_of, variables
from tests.ranks import OLD, DTensor, mesh_of

if OLD:
    from torch.distributed._composable.fsdp import fully_shard
else:
    from torch.distributed.fsdp import fully_shard

F64 = torch.float64
FIRST_ORDER = ("f2sa", "bome", "pbgd", "meha", "sama", "darts")


class Block(nn.Module):
    """Attention by the default kernel, a buffer that each call writes to, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        # no bias: that of the keys has a gradient of zero, whose rounding Adam would blow up
        self.first, self.last = nn.Linear(4, 12, bias=False), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        q, k, v = self.first(self.norm(x)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(self.frozen * mixed + x).mean(-2)


def net() -> Block:
    module = Block().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def inner_loss(module: Any, h: Any, x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    errors = ((module(x) - y - h["shift"]) ** 2).mean(-1)
    return (h["weights"].sigmoid()[group] * errors).mean()


def outer_loss(module: Any, h: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((module(x) - y) ** 2).mean() + 0.1 * (h["shift"] ** 2).sum()


def hparams() -> dict[str, Tensor]:
    return {"weights": torch.zeros(4, dtype=F64), "shift": torch.ones(3, dtype=F64)}


def batches() -> list[Any]:
    """Of three updates, of eight samples of five words each."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    group = torch.arange(8) % 4
    return [((randn(8, 5, 4), randn(8, 3), group), (randn(8, 5, 4), randn(8, 3))) for _ in range(3)]


def optimizers(name: str) -> dict[str, Any]:
    adam = hf.optim.clip_grad_norm(hf.optim.adam(hf.optim.cosine(0.05, 10)), 0.5)
    return {key: adam for key in variables(name)}


def make(name: str, module: nn.Module, by_adam: bool) -> Loop:
    own = optimizers(name) if by_adam else {}
    return hf.bilevel.module_loop(
        getattr(hf.bilevel, name), module, inner_loss, outer_loss, **settings_of(name, **own)
    )


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _full(tree: Any) -> list[Tensor]:
    leaves = optree.tree_leaves(tree, namespace="hyperfunc")
    return [leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for leaf in leaves]


def functional(name: str, by_adam: bool) -> State:
    """Three updates by the pure function of the module."""
    apply, params = hf.functional(net())
    losses = (
        lambda w, *rest: inner_loss(lambda x: apply(w, x), *rest),
        lambda w, *rest: outer_loss(lambda x: apply(w, x), *rest),
    )
    loop = make_loop(name, losses, **(optimizers(name) if by_adam else {}))
    state = loop.init(params, hparams())
    for batch in batches():
        state = loop.update(state, *batch)
    return state


def assert_like(name: str, state: State, expected: State) -> None:
    tol = 1e-8 if name in ("sama", "darts") else 1e-10
    torch.testing.assert_close(_full(state), _full(expected), rtol=tol, atol=tol)


@pytest.mark.parametrize(
    "name",
    [
        each if each == "f2sa" else pytest.param(each, marks=pytest.mark.slow)
        for each in FIRST_ORDER
    ],
)
def test_a_module_is_called_as_its_function_is_and_left_as_it_was(name: str) -> None:
    for by_adam in (False, True):
        module = net()
        module.last.weight.grad = torch.ones_like(module.last.weight)
        before = copy.deepcopy(module)
        loop = make(name, module, by_adam)
        state = loop.init(trained(module), hparams())
        with torch.no_grad():
            module.last.bias.zero_()  # what the module holds does not matter
            before.last.bias.zero_()
        for batch in batches():
            new = loop.update(state, *batch)
            torch.testing.assert_close(loop.update(state, *batch), new, rtol=0, atol=0)
            state = new
        assert_like(name, state, functional(name, by_adam))
        assert not any(leaf.requires_grad for leaf in _full(state))
        for mine, theirs in zip(module.parameters(), before.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.requires_grad == theirs.requires_grad
        held = [name for name, mine in module.named_parameters() if mine.grad is not None]
        assert held == ["last.weight"]
        assert (module.calls, module.last.weight.grad.sum()) == (0, 12)


def sharded(
    name: str, by_adam: bool, folder: Path, shape: tuple[int, ...] = (2,)
) -> tuple[list[Any], int]:
    """Three updates on this rank's half of each batch; saved after two."""
    module, mesh = net(), mesh_of(*shape)
    for part in (module.first, module.last, module):
        fully_shard(part, mesh=mesh)
    loop = make(name, module, by_adam)
    state = loop.init(trained(module), hparams())
    before = [leaf.clone() for leaf in _full(dict(module.named_parameters()))]
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for step, batch in enumerate(batches()):
        if step == 2:
            hf.distributed.save_state(state, folder, step).result()
        count = mock.Mock(wraps=dist.all_reduce)
        with mock.patch.object(dist, "all_reduce", count):
            state = loop.update(state, *optree.tree_map(lambda leaf: leaf[mine], batch))
    after = _full(dict(module.named_parameters()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(isinstance(leaf, DTensor) for leaf in optree.tree_leaves(state.params))
    assert not any(isinstance(leaf, DTensor) for leaf in optree.tree_leaves(state.hparams))
    module.load_state_dict(state.params, strict=False)
    held = dict(module.named_parameters())
    for key, leaf in state.params.items():
        assert torch.equal(held[key].full_tensor(), leaf.full_tensor())
    return _full(state), count.call_count


# Of an update: inner products over params and hparams, beside the means of three gradients.
PRODUCTS = {"bome": 2, "sama": 2, "darts": 2}


@pytest.mark.slow
@pytest.mark.parametrize("by_adam", [False, True])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_fully_sharded_modules(pair: ranks.Ranks, name: str, by_adam: bool, tmp_path: Path) -> None:
    expected, clipped = functional(name, by_adam), by_adam * (len(variables(name)) - 1)
    for leaves, sums in pair.run(sharded, name, by_adam, tmp_path):
        assert_like(name, leaves, expected)
        assert sums == 3 + PRODUCTS.get(name, 0) + clipped
    module = net()
    loop = make(name, module, by_adam)
    loaded = hf.distributed.load_state(loop.init(trained(module), hparams()), tmp_path)
    assert loaded is not None
    state, step = loaded
    assert step == 2
    assert_like(name, loop.update(state, *batches()[2]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_modules_that_some_ranks_replicate(
    pair: ranks.Ranks, shape: tuple[int, int], tmp_path: Path
) -> None:
    for leaves, _ in pair.run(sharded, "f2sa", True, tmp_path, shape):
        assert_like("f2sa", leaves, functional("f2sa", True))


def misuse(module: nn.Module) -> dict[str, tuple[Any, type[Exception], str]]:
    f2sa, losses = hf.bilevel.f2sa, (inner_loss, outer_loss)
    rates = {"inner_lr": 0.1, "outer_lr": 0.1}
    loop = hf.bilevel.module_loop(f2sa, module, *losses, **rates)
    state, batch = loop.init(trained(module), hparams()), batches()[0]
    return {
        "products": (
            lambda: hf.bilevel.module_loop(hf.bilevel.soba, module, *losses, **rates),
            TypeError,
            r"module_loop: soba takes products with second derivatives, .* expected f2sa, bome",
        ),
        "no module": (
            lambda: hf.bilevel.module_loop(f2sa, inner_loss, *losses, **rates),  # type: ignore[arg-type]
            TypeError,
            r"module_loop: got function; expected an nn\.Module",
        ),
        "a wrapper": (
            lambda: hf.bilevel.module_loop(f2sa, nn.DataParallel(module), *losses, **rates),
            TypeError,
            r"module_loop: got a module in DataParallel; expected the module as it is",
        ),
        "no loss": (
            lambda: hf.bilevel.module_loop(f2sa, module, inner_loss, 3.0, **rates),  # type: ignore[arg-type]
            TypeError,
            r"f2sa: outer_loss is 3\.0 .*expected a function \(module, hparams, \*batch\)",
        ),
        "other params": (
            lambda: loop.update(loop.init({"weight": torch.ones(2)}, hparams()), *batch),
            ValueError,
            r"module_loop: params are no dictionary of parameters of the module by their names",
        ),
        "a transform": (
            lambda: torch.func.vmap(lambda h: loop.update(state._replace(hparams=h), *batch))(
                {key: torch.stack([leaf] * 2) for key, leaf in hparams().items()}
            ),
            ValueError,
            r"module_loop: update was called inside a transform",
        ),
        "a loss that is no scalar": (
            lambda: hf.bilevel.module_loop(
                f2sa, module, lambda net, h, x, y, group: net(x), outer_loss, **rates
            ).update(state, *batch),
            ValueError,
            r"f2sa: inner_loss returned a tensor of shape",
        ),
    }


def test_misuse() -> None:
    module = net()
    for call, error, message in misuse(module).values():
        with pytest.raises(error, match=message):
            call()
        assert all(map(torch.equal, module.parameters(), net().parameters()))
