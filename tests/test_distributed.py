"""Past one machine: on several ranks, the numbers of one process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import hyperfunc as hf
from tests import ranks

try:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
except ImportError:  # where they lived up to torch 2.4
    from torch.distributed._tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed._tensor.debug import CommDebugMode

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
    penalty = (reg["weight"].exp() * params["weight"] ** 2).sum()
    return (
        0.5 * (residual**2).mean()
        + 0.5 * penalty
        + reg["bias"].exp() * params["bias"].dot(params["bias"])
    )


def _step(params: Any, reg: Any, x: Tensor, y: Tensor) -> Any:
    grads = torch.func.grad(_inner_loss)(params, reg, x, y)
    return {name: params[name] - 0.3 * grads[name] for name in params}


def _outer_loss(params: Any, reg: Any, x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ params["weight"]) ** 2).mean() + (params["bias"] ** 3).sum()


def _start(reg: Any, x: Tensor, y: Tensor) -> Any:
    return {"weight": torch.zeros_like(reg["weight"]), "bias": torch.zeros_like(y[0])}


SOLVER = hf.iterate(_step, 6, init=_start)


def _arguments() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    return {"weight": 0.3 * randn(7, 3), "bias": randn()}, randn(9, 7), randn(9, 3)


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
    "all": ((0,), (None,), (1,), (1,)),
    "nothing": ((None,), (None,), (None,), (None,)),
}
LAYOUTS_2D: dict[str, Any] = {
    "weights both ways": ((0, 1), (None, None), (None, None), (None, None)),
    "weights and data": ((None, 0), (None, None), (0, None), (0, None)),
    "twice": ((0, 0), (None, None), (None, None), (None, None)),
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
    [(m, layout) for m in METHODS for layout in LAYOUTS if m in EVERYWHERE or layout == "all"],
)
def test_dtensors_give_the_numbers_of_one_process(
    pair: ranks.Ranks, method: str, layout: str
) -> None:
    first, second = pair.run(_compare_with_one_process, method, (2,), LAYOUTS[layout])
    assert first == second


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
@pytest.mark.parametrize("layout", LAYOUTS_2D)
@pytest.mark.parametrize("method", METHODS)
def test_four_ranks_in_a_square(four: ranks.Ranks, method: str, layout: str) -> None:
    results = four.run(_compare_with_one_process, method, (2, 2), LAYOUTS_2D[layout])
    assert results[1:] == results[:-1]


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
    return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (reg.exp() * w**2).sum()


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
    return messages


REFUSED: dict[str, Any] = {
    "dense": hf.Dense(),
    "anderson": hf.AndersonFixedPoint(),
    "nystrom": hf.Nystrom(rank=2),
    "blockwise": hf.Blockwise(hf.CG()),
    "forward": hf.ForwardMode(),
}


def test_what_no_rank_can_do_alone_is_refused(pair: ranks.Ranks) -> None:
    messages, others = pair.run(_refusals)
    assert messages == others
    for name in ("dense", "anderson", "nystrom", "blockwise"):
        assert "is a DTensor with placements (Shard(dim=0),)" in messages[name]
        assert "Use CG, PipelinedCG" in messages[name]
        assert "placements=[Replicate()]" in messages[name]
    assert "torch has no forward mode. Use method=hf.Reverse()" in messages["forward"]
    assert "two device meshes" in messages["two meshes"]


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
