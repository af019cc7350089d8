"""Past one machine: on several ranks, the numbers of one process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import optree
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import hyperfunc as hf
from hyperfunc import _tree
from tests import ranks

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )
    from torch.distributed.tensor.debug import CommDebugMode

    OLD = False
except ImportError:  # where they lived up to torch 2.4
    OLD = True
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )
    from torch.distributed._tensor.debug import CommDebugMode

# Views of DTensors have no rules there, nor do uneven shards on meshes of two dimensions.
newer_dtensors = pytest.mark.skipif(OLD, reason="the DTensors of torch 2.4 lack operations")

F64 = torch.float64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ranks.Ranks]:
    with ranks.running(2, tmp_path_factory.mktemp("pair")) as two:
        yield two


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ranks.Ranks]:
    with ranks.running(4, tmp_path_factory.mktemp("four")) as four:
        yield four


# A regulariser for each weight of a linear model with three outputs -------------------------------


def _inner_loss(params: Any, reg: Any, x: Tensor, y: Tensor) -> Tensor:
    residual = x @ params["weight"] + params["bias"] - y
    penalty = sum((reg[name].exp() * params[name] ** 2).sum() for name in params)
    return 0.5 * (residual**2).sum() / 27 + 0.5 * penalty


def _step(params: Any, reg: Any, x: Tensor, y: Tensor) -> Any:
    grads = torch.func.grad(_inner_loss)(params, reg, x, y)
    return {name: params[name] - 0.3 * grads[name] for name in params}


def _outer_loss(params: Any, reg: Any, x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ params["weight"]) ** 2).sum() / 27 + (params["bias"] ** 3).sum()


def _start(reg: Any, x: Tensor, y: Tensor) -> Any:
    return {name: torch.zeros_like(leaf) for name, leaf in reg.items()}


SOLVER = hf.iterate(_step, 6, init=_start)


def _arguments() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    return {"weight": 0.3 * randn(7, 3), "bias": randn(3)}, randn(9, 7), randn(9, 3)


CONDITIONS = {"inner_loss": _inner_loss, "fixed_point": _step}

# method: the method, and the condition to give it
METHODS: dict[str, tuple[Any, str]] = {
    "cg": (hf.CG(), "inner_loss"),
    "cg, checked and preconditioned": (
        hf.CG(preconditioner=hf.JacobiPreconditioner(), check_symmetry=True),
        "inner_loss",
    ),
    "pipelined cg": (hf.PipelinedCG(), "inner_loss"),
    "normal cg": (hf.NormalCG(), "fixed_point"),
    "gmres": (hf.GMRES(restart=6), "fixed_point"),
    "gmres, preconditioned": (
        hf.GMRES(preconditioner=hf.JacobiPreconditioner()),
        "inner_loss",
    ),
    "bicgstab": (hf.BiCGStab(), "fixed_point"),
    "fixed point": (hf.FixedPoint(rtol=0.05), "fixed_point"),
    "neumann": (hf.Neumann(maxiter=5, rtol=0), "fixed_point"),
    "stochastic": (hf.StochasticAID(num_steps=5), "fixed_point"),
    "fallback": (hf.Fallback(hf.CG(maxiter=2), hf.GMRES()), "inner_loss"),
    "damped": (hf.Damped(hf.CG(), damping=0.1), "inner_loss"),
    "unrolled": (hf.ReverseUnroll(), ""),
    "replayed": (hf.Reverse(), ""),
    "replayed, sqrt": (hf.Reverse(checkpoint="sqrt"), ""),
}

# layout: how weight, bias, x and y lie on a mesh; numbers are dimensions to shard, None replicates
LAYOUTS: dict[str, Any] = {
    "rows of the weights": ((0,), (None,), (None,), (None,)),
    "columns of the weights": ((1,), (None,), (None,), (None,)),
    "data": ((None,), (None,), (0,), (0,)),
    "all": ((0,), (0,), (1,), (1,)),
    "nothing": ((None,), (None,), (None,), (None,)),
}
LAYOUTS_2D: dict[str, Any] = {
    "weights both ways": ((0, 1), (None, None), (None, None), (None, None)),
    "weights and data": ((None, 0), (None, None), (0, None), (0, None)),
    "twice": ((0, 0), (0, 0), (None, None), (None, None)),
    "one way": ((1, None), (None, None), (None, None), (None, None)),
}


@functools.cache
def _mesh(*shape: int) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def _distribute(mesh: Any, layout: Any) -> tuple[Any, Tensor, Tensor]:
    reg, x, y = _arguments()
    weight, bias, x, y = (
        distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d) for d in dims])
        for t, dims in zip((reg["weight"], reg["bias"], x, y), layout, strict=True)
    )
    return {"weight": weight, "bias": bias}, x, y


def _full(tree: Any) -> list[Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tree.values()]


def _compare_with_one_process(method: str, shape: tuple[int, ...], layout: Any) -> Any:
    """Hypergradients, value and adjoint by a method, against the same with ordinary tensors."""
    rule, condition = METHODS[method]
    keywords = {name: fn for name, fn in CONDITIONS.items() if name == condition}
    fn = hf.hypergrad_and_solution(SOLVER, _outer_loss, method=rule, **keywords)
    expected, reference = fn(*_arguments())
    arguments = _distribute(_mesh(*shape), layout)
    grads, solution = fn(*arguments)
    for name, grad in grads.items():
        assert grad.placements == arguments[0][name].placements
    torch.testing.assert_close(_full(grads), list(_full(expected)), rtol=1e-12, atol=1e-13)
    assert all(p.is_replicate() for p in solution.value.placements)
    value = solution.value.to_local()
    torch.testing.assert_close(value, reference.value, rtol=1e-13, atol=0)
    if not solution.stats:
        return float(value)
    torch.testing.assert_close(
        _full(solution.adjoint), _full(reference.adjoint), rtol=1e-10, atol=1e-11
    )
    assert not any(isinstance(field, DTensor) for field in solution.stats)
    assert int(solution.stats.result) == int(reference.stats.result) == hf.RESULTS.success
    return [float(field) for field in solution.stats]


EVERYWHERE = ("cg", "pipelined cg", "normal cg", "gmres", "bicgstab", "fixed point", "neumann")
EVERYWHERE += ("stochastic", "unrolled", "replayed")


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(m, layout, marks=newer_dtensors if "replayed" in m else ())
        for m in METHODS
        for layout in LAYOUTS
        if m in EVERYWHERE or layout == "all"
    ],
)
def test_dtensors_give_the_numbers_of_one_process(
    pair: ranks.Ranks, method: str, layout: str
) -> None:
    first, second = pair.run(_compare_with_one_process, method, (2,), LAYOUTS[layout])
    assert first == second


@newer_dtensors
@pytest.mark.parametrize("layout", LAYOUTS_2D)
@pytest.mark.parametrize(
    ("method", "shape"),
    [("pipelined cg", (1, 2)), ("pipelined cg", (2, 1)), ("gmres", (2, 1)), ("replayed", (2, 1))],
)
def test_meshes_of_two_dimensions(
    pair: ranks.Ranks, method: str, layout: str, shape: tuple[int, int]
) -> None:
    first, second = pair.run(_compare_with_one_process, method, shape, LAYOUTS_2D[layout])
    assert first == second


@pytest.mark.slow
@newer_dtensors
@pytest.mark.parametrize("layout", LAYOUTS_2D)
@pytest.mark.parametrize("method", METHODS)
def test_four_ranks_in_a_square(four: ranks.Ranks, method: str, layout: str) -> None:
    results = four.run(_compare_with_one_process, method, (2, 2), LAYOUTS_2D[layout])
    assert results[1:] == results[:-1]


def _inner_products(shape: tuple[int, ...], layout: Any) -> None:
    reg, x, y = _arguments()
    plain = (reg["weight"], reg["bias"], x, y)
    distributed, x_, y_ = _distribute(_mesh(*shape), layout)
    vectors = (distributed["weight"], distributed["bias"], x_, y_)
    other = _tree.scale(2.0, _tree.add(vectors, vectors))
    moved = tuple(leaf.redistribute(placements=[Replicate()] * len(shape)) for leaf in other)
    expected = _tree.dot(plain, plain)
    close = functools.partial(torch.testing.assert_close, rtol=1e-14, atol=0)
    close(_tree.dot(vectors, vectors), expected)
    close(_tree.start_dots((vectors, moved), (vectors, vectors))(), (4 * expected, expected))
    # the last leaf an ordinary tensor
    close(_tree.dot((*vectors[:3], y), (*vectors[:3], y)), expected)
    assert _tree.all_finite(vectors)
    for leaf in range(4):
        spoiled = [t.clone() for t in plain]
        spoiled[leaf].reshape(-1)[-1] = torch.inf
        places = [v.placements for v in vectors]
        again = (
            distribute_tensor(t, _mesh(*shape), p) for t, p in zip(spoiled, places, strict=True)
        )
        assert not _tree.all_finite(tuple(again))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inner_products_count_each_entry_once(pair: ranks.Ranks, layout: str) -> None:
    pair.run(_inner_products, (2,), LAYOUTS[layout])


@pytest.mark.slow
@newer_dtensors
@pytest.mark.parametrize("layout", LAYOUTS_2D)
def test_inner_products_on_four_ranks(four: ranks.Ranks, layout: str) -> None:
    four.run(_inner_products, (2, 2), LAYOUTS_2D[layout])


def _under_transforms(name: str, dims: tuple[int | None, ...]) -> None:
    transform = TRANSFORMS[name]
    x, y = _arguments()[1:]
    keywords: dict[str, Any] = {"inner_loss": _ridge_loss, "method": hf.CG()}
    solver = hf.iterate(_ridge_step, 6, init=lambda reg, x, y: torch.zeros_like(reg))
    fn = hf.hypergrad(solver, _ridge_outer, **keywords)
    solution = hf.implicit_diff(solver, **keywords)
    place = [Replicate() if d is None else Shard(d) for d in dims]
    reg = 0.1 * x[0]
    expected = transform(fn, solution)(reg, x, y[:, 0])
    tensors = (distribute_tensor(t, _mesh(2), place) for t in (reg, x.clone(), y[:, 0].clone()))
    actual = transform(fn, solution)(*tensors).full_tensor()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def _ridge_loss(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (((x * w).sum(1) - y) ** 2).sum() / 9 + 0.5 * (reg.exp() * w**2).sum()


def _ridge_step(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return w - 0.3 * torch.func.grad(_ridge_loss)(w, reg, x, y)


def _ridge_outer(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (w**3).sum()


def _backward(fn: Any) -> Any:
    def call(reg: Tensor, x: Tensor, y: Tensor) -> Tensor:
        reg = reg.detach().clone().requires_grad_()
        (fn(reg, x, y) ** 2).sum().backward()
        assert reg.grad is not None
        return reg.grad

    return call


TRANSFORMS: dict[str, Any] = {
    "grad of the hypergradient": lambda fn, _: torch.func.grad(
        lambda reg, x, y: (fn(reg, x, y) ** 2).sum()
    ),
    "jacrev of the hypergradient": lambda fn, _: torch.func.jacrev(fn),
    "jacrev of the solution": lambda _, solution: torch.func.jacrev(solution),
    "backward": lambda _, solution: _backward(solution),
    "backward of the hypergradient": lambda fn, _: _backward(fn),
    "vmap": lambda fn, _: (
        lambda reg, x, y: torch.func.vmap(fn, in_dims=(0, None, None))(
            torch.stack([reg, 2 * reg]), x, y
        )
    ),
}


@newer_dtensors
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dim", [None, 0])
def test_transforms_of_dtensors(pair: ranks.Ranks, name: str, dim: int | None) -> None:
    pair.run(_under_transforms, name, (dim,))


def _mixed() -> None:
    """One leaf sharded, one an ordinary tensor, and a loss that brings the two together."""

    def inner_loss(w: Any, h: Any) -> Tensor:
        own = 0.5 * (h["a"].exp() * w["a"] ** 2).sum() - w["a"].sum()
        total = w["a"].sum()
        own, total = (t.full_tensor() if isinstance(t, DTensor) else t for t in (own, total))
        return own + 0.5 * ((w["b"] - h["b"]) ** 2).sum() + 0.05 * total * w["b"].sum()

    def outer_loss(w: Any, h: Any) -> Tensor:
        a = (w["a"] ** 3).sum()
        return (a.full_tensor() if isinstance(a, DTensor) else a) + (w["b"] ** 2).sum()

    def solve(h: Any) -> Any:
        w = {name: torch.zeros_like(leaf).requires_grad_() for name, leaf in h.items()}
        for _ in range(5):
            grads = torch.autograd.grad(inner_loss(w, h), list(w.values()))
            w = {
                name: (w[name] - 0.3 * grad).detach().requires_grad_()
                for name, grad in zip(w, grads, strict=True)
            }
        return w

    generator = torch.Generator().manual_seed(0)
    h = {name: torch.randn(n, generator=generator, dtype=F64) for name, n in (("a", 5), ("b", 3))}
    sharded = {"a": distribute_tensor(h["a"], _mesh(2), [Shard(0)]), "b": h["b"]}
    for method in (hf.CG(), hf.PipelinedCG(), hf.GMRES(), hf.NormalCG()):
        fn = hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method=method)
        grads = fn(sharded)
        assert not isinstance(grads["b"], DTensor)
        torch.testing.assert_close(_full(grads), _full(fn(h)), rtol=1e-10, atol=1e-12)


@newer_dtensors
def test_some_leaves_sharded_and_some_not(pair: ranks.Ranks) -> None:
    pair.run(_mixed)


def _refusals() -> dict[str, str]:
    reg, x, y = _distribute(_mesh(2), LAYOUTS["rows of the weights"])
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("c", "d"))
    meshes = {"weight": reg["weight"], "bias": distribute_tensor(_arguments()[0]["bias"], other)}
    messages = {}
    for name, method in REFUSED.items():
        fn = hf.hypergrad(SOLVER, _outer_loss, fixed_point=_step, method=method)
        with pytest.raises(ValueError, match=r"Use") as error:
            fn(reg, x, y)
        messages[name] = str(error.value)
    with pytest.raises(ValueError, match="mesh") as error:
        hf.linear_solvers.CG().solve(
            hf.linear_solvers.LinearOperator(lambda v: v, lambda v: v), tuple(meshes.values())
        )
    messages["two meshes"] = str(error.value)
    with pytest.raises(ValueError, match="Use") as error:
        hf.fixed_point_solvers.Anderson()(_step, _start(reg, x, y), reg, x, y)
    messages["fixed-point solver"] = str(error.value)
    return messages


REFUSED: dict[str, Any] = {
    "dense": hf.Dense(),
    "anderson": hf.AndersonFixedPoint(),
    "nystrom": hf.Nystrom(rank=2),
    "blockwise": hf.Blockwise(hf.CG()),
    "auto": hf.Auto(),
    "forward": hf.ForwardMode(),
}


def test_what_no_rank_can_do_alone_is_refused(pair: ranks.Ranks) -> None:
    messages, others = pair.run(_refusals)
    assert messages == others
    for name in ("dense", "anderson", "nystrom", "blockwise", "auto"):
        assert "is a DTensor with placements (Shard(dim=0),)" in messages[name]
        assert "Use CG, PipelinedCG" in messages[name]
        assert "placements=[Replicate()]" in messages[name]
    assert "torch has no forward mode. Use method=hf.Reverse()" in messages["forward"]
    assert "two device meshes" in messages["two meshes"]
    assert "init['weight'] is a DTensor that is sharded" in messages["fixed-point solver"]


def test_what_nobody_uses_is_not_imported() -> None:
    code = "import sys, hyperfunc; print([m for m in NAMES if m in sys.modules])"
    names = [
        "torch.distributed.tensor",
        "torch.distributed._tensor",
        "torch.distributed.checkpoint",
    ]
    command = [sys.executable, "-c", code.replace("NAMES", repr(names))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


# What a step sends --------------------------------------------------------------------------------


def _halve(v: tuple[Tensor]) -> tuple[Tensor]:
    return (0.5 * v[0],)


def _count(name: str, maxiter: int) -> tuple[int, int]:
    """All-reduces of a solve whose products send nothing, and the numbers summed in them."""
    make, _, _ = SENT[name]
    solver = make(maxiter=maxiter, rtol=1e-300, atol=0)
    mesh, sizes = _mesh(2), []
    scales = torch.linspace(1, 2, 50, dtype=F64)
    A, b = (distribute_tensor(t, mesh, [Shard(0)]) for t in (scales, torch.ones(50, dtype=F64)))
    operator = hf.linear_solvers.LinearOperator(lambda v: (A * v[0],), lambda v: (A * v[0],))
    all_reduce = dist.all_reduce

    def counting(values: Tensor, *args: Any, **keywords: Any) -> Any:
        sizes.append(values.numel())
        return all_reduce(values, *args, **keywords)

    dist.all_reduce = counting
    try:
        with CommDebugMode() as mode:
            solver.solve(operator, (b,))
    finally:
        dist.all_reduce = all_reduce
    counted = sum(mode.get_comm_counts().values())
    assert counted == len(sizes), "a collective that is not an all-reduce of this package"
    return len(sizes), sum(sizes)


# solver: all-reduces a step, and numbers summed in them
SENT: dict[str, tuple[Any, int, int]] = {
    "cg": (hf.CG, 2, 3),
    "cg, preconditioned": (functools.partial(hf.CG, preconditioner=_halve), 2, 4),
    "pipelined cg": (hf.PipelinedCG, 1, 3),
    "normal cg": (hf.NormalCG, 2, 3),
    "bicgstab": (hf.BiCGStab, 3, 6),
    # the k-th step takes the overlaps with k vectors twice, and two norms; here k is 4 and 5
    "gmres": (hf.GMRES, 3, 11),
    "fixed point": (functools.partial(hf.FixedPoint, step_size=0.1), 1, 1),
    "neumann": (functools.partial(hf.Neumann, step_size=0.1), 1, 1),
}


@pytest.mark.parametrize("name", SENT)
def test_scalars_of_a_step_are_summed_together(pair: ranks.Ranks, name: str) -> None:
    _, collectives, numbers = SENT[name]
    few, many = (pair.run(_count, name, K)[0] for K in (3, 5))
    assert (many[0] - few[0], many[1] - few[1]) == (2 * collectives, 2 * numbers)


# Modules ------------------------------------------------------------------------------------------


def _net() -> torch.nn.Module:
    layers = torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    net = torch.nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return net


def _module_hypergrad(net: Any, x: Tensor, y: Tensor, place: Any = lambda leaf: leaf) -> Any:
    apply, params = hf.functional(net)
    params = {name: place(leaf) for name, leaf in params.items()}
    hparams = {name: torch.full_like(leaf, 0.5) for name, leaf in params.items()}

    def outer_loss(w: Any, h: Any, x: Tensor, y: Tensor) -> Tensor:
        return ((apply(w, x) - y) ** 2).sum() / 27

    def inner_loss(w: Any, h: Any, x: Tensor, y: Tensor) -> Tensor:
        loss, penalty = outer_loss(w, h, x, y), sum((h[k] * w[k] ** 2).sum() for k in w)
        if isinstance(penalty, DTensor) and not isinstance(loss, DTensor):
            penalty = penalty.full_tensor()
        return loss + penalty

    def solve(h: Any, x: Tensor, y: Tensor) -> Any:
        w = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        for _ in range(3):
            grads = torch.autograd.grad(inner_loss(w, h, x, y), list(w.values()))
            w = {
                k: (leaf - 0.1 * g).detach().requires_grad_()
                for (k, leaf), g in zip(w.items(), grads, strict=True)
            }
        return w

    method = hf.GMRES(maxiter=4, rtol=0)
    return hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method=method)(hparams, x, y)


def _module(way: str) -> str:
    mesh, (_, x, y) = _mesh(2), _arguments()
    net, x = _net(), x[:, :5]
    expected = _module_hypergrad(net, x, y)
    everywhere = tuple(distribute_tensor(t.contiguous(), mesh, [Replicate()]) for t in (x, y))
    if way == "distribute_tensor":
        shard = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
        actual = _module_hypergrad(net, *everywhere, shard)
    elif way == "distribute_module":
        actual = _module_hypergrad(distribute_module(net, mesh), *everywhere)
    elif way == "parallelize_module":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        actual = _module_hypergrad(parallelize_module(net, mesh, plan), x, y)
    else:
        with pytest.raises(TypeError) as error:
            hf.functional(fully_shard(net, mesh=mesh))
        return str(error.value)
    torch.testing.assert_close(_full(actual), _full(expected), rtol=1e-11, atol=1e-13)
    return ""


@pytest.mark.parametrize(
    "way",
    [
        "distribute_tensor",
        "distribute_module",
        pytest.param("parallelize_module", marks=newer_dtensors),
    ],
)
def test_modules_of_dtensors(pair: ranks.Ranks, way: str) -> None:
    pair.run(_module, way)


def test_modules_by_fully_shard_are_refused(pair: ranks.Ranks) -> None:
    for message in pair.run(_module, "fully_shard"):
        assert "hooks gather the parameters that it holds" in message
        assert "torch.distributed.tensor.distribute_tensor(p, mesh, [Shard(0)])" in message


# Tasks --------------------------------------------------------------------------------------------


def _task_loss(w: Tensor, m: Any, task: Any) -> Tensor:
    return 0.5 * ((task["x"] @ w - task["y"]) ** 2).sum() + 0.5 * ((w - m["w"]) ** 2).sum()


def _query_loss(w: Tensor, m: Any, task: Any) -> tuple[Tensor, Tensor]:
    return (w**3).sum() + m["shift"] * w.sum(), w[0] > 0


def _solve_task(m: Any, task: Any) -> Tensor:
    x = task["x"]
    return torch.linalg.solve(x.mT @ x + torch.eye(3, dtype=F64), x.mT @ task["y"] + m["w"])


def _task_arguments(num_tasks: int = 6) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    tasks = {"x": randn(num_tasks, 4, 3), "y": randn(num_tasks, 4)}
    return {"w": randn(3), "shift": randn()}, tasks


TASK_TRANSFORMS = {"grads": hf.hypergrad, "value": hf.hypergrad_and_value}
TASK_TRANSFORMS["solution"] = hf.hypergrad_and_solution


def _adapt(transform: str, throw: bool = True) -> Any:
    has_aux = transform != "grads"
    return TASK_TRANSFORMS[transform](
        _solve_task,
        _query_loss if has_aux else lambda *args: _query_loss(*args)[0],
        inner_loss=_task_loss,
        has_aux=has_aux,
        method=hf.CG(),
        throw=throw,
    )


def _my_tasks(tasks: Any, split: int) -> Any:
    mine = slice(0, split) if dist.get_rank() == 0 else slice(split, None)
    return {name: leaf[mine] for name, leaf in tasks.items()}


def _tasks_like_one_process(transform: str, split: int, reduce: Any, chunk_size: Any) -> None:
    hparams, tasks = _task_arguments()
    fn = torch.func.vmap(_adapt(transform), in_dims=(None, 0))
    call = hf.distributed.task_parallel(fn, reduce=reduce, chunk_size=chunk_size)
    mine = _my_tasks(tasks, split)
    actual, expected = call(hparams, mine), fn(hparams, tasks)
    if transform == "grads":
        actual, expected = (actual,), (expected,)
    how = {"mean": lambda t: t.mean(0), "sum": lambda t: t.sum(0), None: lambda t: t}[reduce]
    close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-14)
    close(actual[0], {name: how(grad) for name, grad in expected[0].items()})
    if transform == "value":
        close(actual[1], expected[1])
    if transform == "solution":
        solution, whole = actual[1], expected[1]
        for field in ("value", "aux", "stats"):
            close(getattr(solution, field), getattr(whole, field))
        if len(mine["x"]):
            own = fn(hparams, mine)[1]
            close((solution.params, solution.adjoint), (own.params, own.adjoint))
        else:
            assert (solution.params, solution.adjoint) == ((), ())


@pytest.mark.parametrize("split", [3, 5, 6, 0])
@pytest.mark.parametrize(
    ("transform", "reduce", "chunk_size"),
    [
        ("grads", "mean", None),
        ("value", "sum", None),
        ("solution", "mean", None),
        ("solution", "mean", 2),
        ("value", None, None),
        ("value", None, 4),
    ],
)
def test_tasks_give_the_numbers_of_one_process(
    pair: ranks.Ranks, transform: str, split: int, reduce: Any, chunk_size: Any
) -> None:
    pair.run(_tasks_like_one_process, transform, split, reduce, chunk_size)


def _one_by_one(adapt: Any) -> Any:
    """A loop over tasks in place of vmap, with an exception for one of them."""

    def one(hparams: Any, task: Any) -> Any:
        if task["x"].isnan().any():
            raise ArithmeticError("bad data")
        grads, (value, _) = adapt(hparams, task)
        return grads, value

    def fn(hparams: Any, tasks: Any) -> Any:
        each = [one(hparams, {k: t[i] for k, t in tasks.items()}) for i in range(len(tasks["x"]))]
        grads = {name: torch.stack([grads[name] for grads, _ in each]) for name in hparams}
        return grads, torch.stack([value for _, value in each])

    return fn


def _failing(name: str, chunk_size: int | None) -> str:
    """The error on this rank when the fifth of six tasks, the first of rank 1, is bad."""
    hparams, tasks = _task_arguments()
    tasks["x"][4, 0, 0] = torch.nan
    fn: Any = {
        "raises, mapped": torch.func.vmap(_adapt("value"), in_dims=(None, 0)),
        "raises, one by one": _one_by_one(_adapt("value")),
        "NaN": torch.func.vmap(_adapt("value", throw=False), in_dims=(None, 0)),
    }.get(name, lambda hparams, tasks: 1 / 0)
    mine = _my_tasks(tasks, 3)
    if name == "no tree" and dist.get_rank() == 1:
        mine["y"] = mine["y"][:2]
    if name in ("no tree", "other parts"):
        tasks["x"][4, 0, 0] = 0.0

        def fn(hparams: Any, tasks: Any) -> Any:
            grads = {"w": tasks["x"][:, 0], "shift": tasks["y"][:, 0]}
            return (grads, tasks["y"]) if dist.get_rank() else (grads, tasks["x"])

    call = hf.distributed.task_parallel(fn, chunk_size=chunk_size)
    with pytest.raises((hf.HypergradError, ValueError)) as error:
        call(hparams, mine)
    torch.testing.assert_close(_sum_of_ranks(), 1.0)  # the group still works
    return f"{type(error.value).__name__}: {error.value}"


def _sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total)


TASK = "task_parallel failed on rank 1 of 2 at its task 1, number 4 of 6"
FAILURES = {
    "raises, mapped": (TASK, "the inner solver returned non-finite values"),
    "raises, one by one": (TASK, "ArithmeticError: bad data"),
    "NaN": (TASK, "the hypergradient with respect to hparams['shift'] is not finite"),
    "no tree": ("rank 1 of 2: ValueError", "tasks['x'] has 3 tasks, but tasks['y'] has 2"),
    "division": ("rank 0 of 2 at its task 0, number 0 of 6 (2 ranks", "ZeroDivisionError"),
    "other parts": ("something else beside the hypergradients on rank 1 than on rank 0", "ValueE"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_failure_ends_the_call_on_all_ranks(
    pair: ranks.Ranks, name: str, chunk_size: int | None
) -> None:
    first, second = pair.run(_failing, name, chunk_size)
    assert first == second
    for part in FAILURES[name]:
        assert part in first


def _sent_by_tasks(chunk_size: int | None) -> list[tuple[str, int]]:
    hparams, tasks = _task_arguments()
    hparams["half"] = torch.ones(5, dtype=torch.bfloat16)
    fn = torch.func.vmap(
        lambda m, task: (m, {"loss": task["y"].sum(), "hit": task["y"][0] > 0}), in_dims=(None, 0)
    )
    sent = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reducing(values: Tensor, **keywords: Any) -> Any:
        sent.append(("all_reduce", values.nbytes))
        return all_reduce(values, **keywords)

    def gathering(out: Any, values: Tensor, **keywords: Any) -> Any:
        sent.append(("all_gather", values.nbytes))
        return all_gather(out, values, **keywords)

    dist.all_reduce, dist.all_gather = reducing, gathering
    try:
        call = hf.distributed.task_parallel(fn, chunk_size=chunk_size)
        grads, _ = call(hparams, _my_tasks(tasks, 2))
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather
    assert grads["half"].dtype == torch.bfloat16
    torch.testing.assert_close(grads, hparams)
    return sent


def test_what_tasks_send(pair: ranks.Ranks) -> None:
    """Status, a vector for each dtype in at least float32, losses and hits of the busier rank."""
    status, data = ("all_gather", 4 * 8), [("all_reduce", 5 * 4), ("all_reduce", 4 * 8)]
    rest = [("all_gather", 4), ("all_gather", 4 * 8)]
    for sent in pair.run(_sent_by_tasks, None):
        assert sent == [status, *data, *rest]
    for sent in pair.run(_sent_by_tasks, 3):
        assert sent == [("all_gather", 8), *data, *data, status, *rest]


def _shares(num_tasks: int) -> list[int]:
    return hf.distributed.local_tasks({"x": torch.arange(num_tasks)})["x"].tolist()


@pytest.mark.parametrize("num_tasks", [5, 1, 0])
def test_shares_are_even_and_in_order(pair: ranks.Ranks, num_tasks: int) -> None:
    first, second = pair.run(_shares, num_tasks)
    assert first + second == list(range(num_tasks))
    assert 0 <= len(second) - len(first) <= 1


def _two_groups() -> tuple[float, float]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    call = hf.distributed.task_parallel(lambda m, tasks: (m * tasks, tasks), group=groups[rank % 2])
    mine = torch.full((rank,), float(rank))
    (grad, values) = call(torch.tensor(2.0), mine)
    with pytest.raises(ValueError, match="not in the group"):
        hf.distributed.task_parallel(lambda m, tasks: m, group=groups[1 - rank % 2])(
            torch.tensor(1.0), mine
        )
    return float(grad), values.tolist()


@pytest.mark.slow
def test_groups_of_ranks(four: ranks.Ranks) -> None:
    even, odd = (4.0, [2.0, 2.0]), (2 * (1 + 3 * 3) / 4, [1.0, 3.0, 3.0, 3.0])
    assert four.run(_two_groups) == [even, odd, even, odd]


def test_alone_without_a_process_group() -> None:
    hparams, tasks = _task_arguments()
    adapt = _adapt("value")
    fn = torch.func.vmap(adapt, in_dims=(None, 0))
    expected, values = fn(hparams, tasks)
    for chunk_size, mapped in ((None, fn), (4, hf.task_map(adapt, (None, 0), chunk_size=3))):
        call = hf.distributed.task_parallel(mapped, chunk_size=chunk_size)
        grads, (value, _) = call(hparams, hf.distributed.local_tasks(tasks))
        torch.testing.assert_close(grads, {name: grad.mean(0) for name, grad in expected.items()})
        torch.testing.assert_close(value, values[0])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"reduce": "max"}, "expected 'mean', 'sum' or None"),
        ({"chunk_size": 0}, "expected an integer >= 1, or None"),
        ({}, "Put it into fn"),
    ],
)
def test_bad_arguments_of_task_parallel(keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(
            lambda t: hf.distributed.task_parallel(lambda m, t: m, **keywords)(torch.ones(()), t)
        )(torch.ones(2, 2))


def _run_imaml(out: Path) -> tuple[list[Any], list[Any]]:
    """Hypergradients and learning curve of three iterations of iMAML in float64, on noise."""
    import fewshot
    import imaml

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 4, 28, 28), dtype=torch.uint8, generator=generator)
    split = fewshot.Split(images, list("abcdefghijkl"), "noise")
    data = fewshot.Data(split, split, split)
    options = "--ways=2 --queries=2 --tasks=3 --inner-steps=3 --test-tasks=3 --iterations=3"
    options += " --meta-lr=1e-4"
    torch.set_default_dtype(F64)
    try:
        with (
            mock.patch.object(fewshot, "load_glyphs", return_value=data),
            mock.patch.object(fewshot, "VALIDATION_TASKS", 2),
            mock.patch.object(hf, "assign_grads", wraps=hf.assign_grads) as assigned,
        ):
            imaml.main([*options.split(), f"--out={out}"])
    finally:
        torch.set_default_dtype(torch.float32)
    grads = [{k: g.numpy() for k, g in call.args[1].items()} for call in assigned.call_args_list]
    files = sorted(path.name for path in out.iterdir())
    results = out / "results.json"
    return grads, json.loads(results.read_text())["history"] if results.name in files else files


def test_imaml_on_two_ranks_is_imaml_on_one(pair: ranks.Ranks, tmp_path: Path) -> None:
    expected, history = _run_imaml(tmp_path / "one")
    (first, curve), (second, _) = pair.run(_run_imaml, tmp_path / "two")
    assert len(expected) == 3
    for grads in (first, second):
        for actual, single in zip(grads, expected, strict=True):
            for name, grad in single.items():
                scale = abs(grad).max()
                assert abs(actual[name] - grad).max() <= 1e-12 * scale, name
    for entry, single in zip(curve, history, strict=True):
        assert entry == pytest.approx(single, rel=1e-12)


def test_no_tasks_at_all() -> None:
    with pytest.raises(ValueError, match="no rank has a task"):
        hf.distributed.task_parallel(lambda m, tasks: m)(torch.ones(()), torch.ones(0))


# States -------------------------------------------------------------------------------------------


def _state(mesh: Any, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight, scale = (torch.randn(*n, generator=generator, dtype=F64) for n in ((7, 3), (4,)))
    if mesh is not None:
        weight = distribute_tensor(weight, mesh, [Shard(0)] * mesh.ndim)
    return {
        "hparams": {"weight": weight, "scale": scale.float()},
        "optimizer": hf.optim.adam(lr=0.1).init({"weight": weight}),
        "rng": generator.get_state(),
        "data": (seed, 0.5 * seed, "train", True),
    }


def _equal(state: Any, expected: Any) -> None:
    leaves, others = (optree.tree_leaves(tree) for tree in (state, expected))
    for leaf, other in zip(leaves, others, strict=True):
        leaf, other = (t.full_tensor() if isinstance(t, DTensor) else t for t in (leaf, other))
        assert torch.equal(leaf, other) if isinstance(leaf, Tensor) else leaf == other


def _save_and_load(folder: Path, background: bool) -> None:
    mesh, group = _mesh(2), dist.new_group(backend="gloo")
    save, load = hf.distributed.save_state, hf.distributed.load_state
    like = _state(mesh, 9)
    assert load(like, folder) is None
    for step in (1, 2, 3, 3):
        state = _state(mesh, step)
        future = save(state, folder, step, background=background, group=group)
        state["hparams"]["scale"].zero_()  # a copy is written
        future.result()
    dist.barrier()
    (folder / ".step-00000004.partial").mkdir(exist_ok=True)  # what a killed run leaves
    loaded, step = load(like, folder)
    assert step == 3
    assert loaded["hparams"]["weight"].placements == (Shard(0),)
    if background:
        _equal(loaded, _state(mesh, 3))
    _equal(load(like, folder, step=2)[0]["optimizer"], _state(mesh, 2)["optimizer"])
    _equal(like, _state(mesh, 9))


@pytest.mark.parametrize("background", [False, True])
def test_states_are_loaded_on_other_numbers_of_ranks(
    pair: ranks.Ranks, tmp_path: Path, background: bool
) -> None:
    pair.run(_save_and_load, tmp_path, background)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".step-00000004.partial", "step-00000002", "step-00000003"]
    loaded = hf.distributed.load_state(_state(None, 0), tmp_path)
    assert loaded is not None
    state, step = loaded
    assert step == 3
    if background:
        _equal(state, _state(None, 3))
    hf.distributed.save_state(state, tmp_path / "one", 7, keep=1)
    pair.run(_load_on_two, tmp_path / "one", state["hparams"]["weight"].numpy())


def _load_on_two(folder: Path, weight: Any) -> None:
    state, step = hf.distributed.load_state(_state(_mesh(2, 1), 0), folder)
    assert step == 7
    assert (state["hparams"]["weight"].full_tensor().numpy() == weight).all()


def _bad_states(folder: Path) -> list[str]:
    save, load = hf.distributed.save_state, hf.distributed.load_state
    save({"a": torch.ones(3)}, folder, 1)
    rank = dist.get_rank()
    calls = [
        lambda: save({"rng": torch.full((3,), rank)}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, 2, background=True),
        lambda: load({"b": torch.ones(3)}, folder),
        lambda: load({"a": torch.ones(4)}, folder),
        lambda: load({"a": torch.ones(3)}, folder, step=5),
        lambda: save({"g": object}, folder, 2),
        lambda: save({"a": torch.ones(3)}, folder, -1),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        messages.append(str(error.value))
    return messages


def test_states_that_cannot_be_saved_or_loaded(pair: ranks.Ranks, tmp_path: Path) -> None:
    first, second = pair.run(_bad_states, tmp_path)
    assert first == second
    for message, part in zip(
        first,
        [
            "state['rng'] on rank 1 is not what it is on rank 0",
            'group = torch.distributed.new_group(backend="gloo")',
            "state['b'] was not saved in",
            "state['a'] has shape (4,), but (3,) was saved",
            "no state of step 5; expected one of ['step-00000001']",
            "Put generator.get_state() for a generator",
            "step is -1; expected an integer >= 0",
        ],
        strict=True,
    ):
        assert part in message


def _torchrun(folder: Path, *options: str, num_ranks: int = 2, restarts: int = 0) -> str:
    """Run the outer loop of distributed_loop.py; returns its result."""
    folder.mkdir()
    script = Path(__file__).parent / "distributed_loop.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_ranks}", f"--max-restarts={restarts}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(script.parent.parent),
        # without it, ranks that start again meet the addresses of those before them
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    process = subprocess.Popen(
        [*command, str(script), str(folder), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return (folder / "result").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("background", [(), ("--background",)])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ranks_end_with_the_result_of_an_undisturbed_run(
    tmp_path: Path, seed: int, background: tuple[str, ...]
) -> None:
    """Ranks end themselves by SIGKILL at random steps, before the step or while saving."""
    expected = _torchrun(tmp_path / "undisturbed", *background)
    draws = random.Random(seed)
    kills = [f"{draws.randrange(2)}:{draws.randrange(6)}:before", "1:3:saving"]
    kills += [f"{draws.randrange(2)}:{draws.randrange(6)}:saving"]
    folder = tmp_path / "killed"
    assert _torchrun(folder, *background, "--kill", *kills, restarts=len(kills)) == expected
    assert {mark for mark in kills if (folder / mark).exists()} == set(kills)
