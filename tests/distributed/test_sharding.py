"""DTensors as params, hparams and data: on several ranks, the numbers of one process."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from typing import Any

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
from hyperfunc._engine import trees
from tests import ranks
from tests.cells import thinned
from tests.ranks import OLD, DTensor, Replicate, Shard, distribute_tensor, mesh_of

if OLD:
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import distribute_module
    from torch.distributed._tensor.debug import CommDebugMode
else:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module
    from torch.distributed.tensor.debug import CommDebugMode

# Views of DTensors have no rules there, nor do uneven shards on meshes of two dimensions.
newer_dtensors = pytest.mark.skipif(OLD, reason="the DTensors of torch 2.4 lack operations")

F64 = torch.float64


# A regulariser for each weight of a linear model with three outputs -------------------------------


def _outputs(params: Any, reg: Any, x: Tensor, y: Tensor, start: Any) -> Any:
    return x @ params["weight"] + params["bias"], params


def _loss_of_outputs(outputs: Any, reg: Any, x: Tensor, y: Tensor, start: Any) -> Tensor:
    values, params = outputs
    penalty = sum((reg[name].exp() * params[name] ** 2).sum() for name in params)
    return 0.5 * ((values - y) ** 2).sum() / 27 + 0.5 * penalty


def _inner_loss(params: Any, reg: Any, *args: Any) -> Tensor:
    return _loss_of_outputs(_outputs(params, reg, *args), reg, *args)


def _step(params: Any, reg: Any, *args: Any) -> Any:
    grads = torch.func.grad(_inner_loss)(params, reg, *args)
    return {name: params[name] - 0.3 * grads[name] for name in params}


def _outer_loss(params: Any, reg: Any, x: Tensor, y: Tensor, start: Any) -> Tensor:
    fit = (torch.tanh(x @ params["weight"]) ** 2).sum() / 27
    return fit + (params["bias"] ** 3).sum() + (reg["weight"] * params["weight"]).sum()


SOLVER = hf.iterate(_step, 6, init=lambda reg, x, y, start: start)


# size: rows and columns of the weights, and samples; on two ranks, some have one more of them
SIZES = {"uneven": (7, 3, 9), "even": (8, 4, 10)}


def _arguments(size: str = "uneven") -> tuple[Any, Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    rows, columns, samples = SIZES[size]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    reg = {"weight": 0.3 * randn(rows, columns), "bias": randn(columns)}
    start = {name: 0.1 * randn(*leaf.shape) for name, leaf in reg.items()}
    return reg, randn(samples, rows), randn(samples, columns), start


def _three_rows(step: int, x: Tensor, y: Tensor, start: Any) -> tuple[Tensor, Tensor, Any]:
    return x[step : step + 3], y[step : step + 3], start


CONDITIONS: dict[str, dict[str, Any]] = {
    "inner_loss": {"inner_loss": _inner_loss},
    "composed": {"inner_loss": hf.composed(_outputs, _loss_of_outputs)},
    "fixed_point": {"fixed_point": _step},
    "": {},
}

# method: the method, and the condition to give it
METHODS: dict[str, tuple[Any, str]] = {
    "cg": (hf.CG(), "inner_loss"),
    "cg, checked and preconditioned": (
        hf.CG(preconditioner=hf.JacobiPreconditioner(), check_symmetry=True),
        "inner_loss",
    ),
    "cg, gauss-newton": (hf.CG(), "composed"),
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
    "replayed, every second": (hf.Reverse(checkpoint=2), ""),
    "replayed, sqrt": (hf.Reverse(checkpoint="sqrt"), ""),
    "replayed, binomial": (hf.Reverse(checkpoint="binomial", slots=2), ""),
    "replayed, the last": (hf.Reverse(last=3), ""),
    "dense": (hf.Dense(), "inner_loss"),
    "anderson": (hf.AndersonFixedPoint(), "fixed_point"),
    "nystrom": (hf.Nystrom(rank=24), "inner_loss"),
    "auto": (hf.Auto(), "inner_loss"),
    "minibatches": (hf.StochasticAID(num_steps=5, sampler=_three_rows), "fixed_point"),
}

WHOLE_ONLY = ("dense", "anderson", "nystrom")
WHERE_SHARDED = [name for name in METHODS if name not in WHOLE_ONLY]

# layout: how weights and biases of reg, x, y, and weights and biases of params lie on a mesh;
# numbers are dimensions to shard, None replicates
LAYOUTS: dict[str, Any] = {
    "params": ((None,), (None,), (None,), (None,), (0,), (0,)),
    "hparams": ((1,), (0,), (None,), (None,), (None,), (None,)),
    "args": ((None,), (None,), (0,), (0,), (None,), (None,)),
    "all": ((0,), (0,), (1,), (1,), (0,), (0,)),
    "otherwise": ((0,), (None,), (None,), (1,), (1,), (0,)),
    "nothing": ((None,), (None,), (None,), (None,), (None,), (None,)),
}
LAYOUTS_2D: dict[str, Any] = {
    "weights both ways": ((0, 1), (None, None), (None, None), (None, None), (0, 1), (None, None)),
    "weights and data": ((None, 0), (None, None), (0, None), (0, None), (None, 0), (None, None)),
    "twice": ((0, 0), (0, 0), (None, None), (None, None), (0, 0), (0, 0)),
    "one way": ((1, None), (None, None), (None, None), (None, None), (1, None), (None, None)),
    "each its own": ((0, None), (None, 0), (None, 1), (0, None), (None, 1), (0, None)),
}


def _distribute(mesh: Any, layout: Any, size: str = "uneven") -> tuple[Any, Tensor, Tensor, Any]:
    reg, x, y, start = _arguments(size)
    weight, bias, x, y, *params = (
        distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d) for d in dims])
        for t, dims in zip((*reg.values(), x, y, *start.values()), layout, strict=True)
    )
    return {"weight": weight, "bias": bias}, x, y, dict(zip(start, params, strict=True))


def _full(tree: Any) -> list[Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tree.values()]


def _transform(method: str) -> Any:
    rule, condition = METHODS[method]
    keywords = CONDITIONS[condition]
    return hf.hypergrad_and_solution(SOLVER, _outer_loss, method=rule, **keywords)


@functools.cache
def _of_one_process(method: str, size: str) -> Any:
    return _transform(method)(*_arguments(size))


def _compare_with_one_process(
    method: str, shape: tuple[int, ...], layout: Any, size: str = "uneven"
) -> Any:
    """Hypergradients, value and adjoint by a method, against the same with ordinary tensors."""
    fn = _transform(method)
    expected, reference = _of_one_process(method, size)
    arguments = _distribute(mesh_of(*shape), layout, size)
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
    right = "max_steps" if method == "nystrom" else "success"  # a system with rho added
    assert int(solution.stats.result) == int(reference.stats.result) == hf.RESULTS[right]
    return [float(field) for field in solution.stats]


# Of these, every kind of argument is sharded by itself; of the others, all at once. Those of the
# first two are one of each kind, and the rest of the product is slow.
KEPT = ("cg", "replayed")
EVERYWHERE = (*KEPT, "pipelined cg", "normal cg", "gmres", "bicgstab", "fixed point", "stochastic")
EVERYWHERE += ("unrolled",)


@pytest.mark.parametrize(
    ("method", "layout", "size"),
    [
        pytest.param(
            *(m, layout, size),
            marks=([newer_dtensors] if "replayed" in m else [])
            + (
                []
                if size == "uneven" and (layout == "all" or (m in KEPT and layout != "params"))
                else [pytest.mark.slow]
            ),
        )
        for m in WHERE_SHARDED
        for layout in LAYOUTS
        for size in SIZES
        if m in EVERYWHERE or layout == "all"
    ],
)
def test_dtensors_give_the_numbers_of_one_process(
    pair: ranks.Ranks, method: str, layout: str, size: str
) -> None:
    first, second = pair.run(_compare_with_one_process, method, (2,), LAYOUTS[layout], size)
    assert first == second


@newer_dtensors
@pytest.mark.parametrize(
    ("layout", "method", "shape"),
    thinned(LAYOUTS_2D, ("pipelined cg", "replayed", "gmres"), [(1, 2), (2, 1)], every=4),
)
def test_meshes_of_two_dimensions(
    pair: ranks.Ranks, method: str, layout: str, shape: tuple[int, int]
) -> None:
    first, second = pair.run(_compare_with_one_process, method, shape, LAYOUTS_2D[layout])
    assert first == second


@pytest.mark.slow
@newer_dtensors
@pytest.mark.parametrize("layout", LAYOUTS_2D)
@pytest.mark.parametrize("method", WHERE_SHARDED)
def test_four_ranks_in_a_square(four: ranks.Ranks, method: str, layout: str) -> None:
    results = four.run(_compare_with_one_process, method, (2, 2), LAYOUTS_2D[layout])
    assert results[1:] == results[:-1]


def _inner_products(shape: tuple[int, ...], layout: Any) -> None:
    reg, x, y, _ = _arguments()
    plain = (reg["weight"], reg["bias"], x, y)
    distributed, x_, y_, _ = _distribute(mesh_of(*shape), layout)
    vectors = (distributed["weight"], distributed["bias"], x_, y_)
    other = trees.scale(2.0, trees.add(vectors, vectors))
    moved = tuple(leaf.redistribute(placements=[Replicate()] * len(shape)) for leaf in other)
    expected = trees.dot(plain, plain)
    close = functools.partial(torch.testing.assert_close, rtol=1e-14, atol=0)
    close(trees.dot(vectors, vectors), expected)
    close(trees.start_dots((vectors, moved), (vectors, vectors))(), (4 * expected, expected))
    # the last leaf an ordinary tensor
    close(trees.dot((*vectors[:3], y), (*vectors[:3], y)), expected)
    assert trees.all_finite(vectors)
    for leaf in range(4):
        spoiled = [t.clone() for t in plain]
        spoiled[leaf].reshape(-1)[-1] = torch.inf
        places = [v.placements for v in vectors]
        again = (
            distribute_tensor(t, mesh_of(*shape), p) for t, p in zip(spoiled, places, strict=True)
        )
        assert not trees.all_finite(tuple(again))


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
    _, x, y, _ = _arguments()
    keywords: dict[str, Any] = {"inner_loss": _ridge_loss, "method": hf.CG()}
    solver = hf.iterate(_ridge_step, 6, init=lambda reg, x, y: torch.zeros_like(reg))
    fn = hf.hypergrad(solver, _ridge_outer, **keywords)
    solution = hf.implicit_diff(solver, **keywords)
    place = [Replicate() if d is None else Shard(d) for d in dims]
    reg = 0.1 * x[0]
    expected = transform(fn, solution)(reg, x, y[:, 0])
    tensors = (distribute_tensor(t, mesh_of(2), place) for t in (reg, x.clone(), y[:, 0].clone()))
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
    "mean over successes": lambda fn, _: (
        lambda reg, x, y: hf.mean_over_successes(
            torch.stack([fn(reg, x, y), fn(reg, x, y) / 0, fn(2 * reg, x, y)])
        )[0]
    ),
}


@newer_dtensors
@pytest.mark.parametrize(("name", "dim"), thinned(TRANSFORMS, [None, 0]))
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
    sharded = {"a": distribute_tensor(h["a"], mesh_of(2), [Shard(0)]), "b": h["b"]}
    for method in (hf.CG(), hf.PipelinedCG(), hf.GMRES(), hf.NormalCG()):
        fn = hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method=method)
        grads = fn(sharded)
        assert not isinstance(grads["b"], DTensor)
        torch.testing.assert_close(_full(grads), _full(fn(h)), rtol=1e-10, atol=1e-12)


@newer_dtensors
def test_some_leaves_sharded_and_some_not(pair: ranks.Ranks) -> None:
    pair.run(_mixed)


KINDS = ("plain", "replicated", "sharded")


def _placed(t: Tensor, kind: str, dim: int = 0) -> Tensor:
    place = [Shard(dim) if kind == "sharded" else Replicate()]
    return t.clone() if kind == "plain" else distribute_tensor(t.clone(), mesh_of(2), place)


def _combinations(transform: str) -> dict[tuple[str, str, str], str]:
    """What comes of each combination of kinds of params, hparams and args: "", or an error."""
    reg, x, y, start = (t["weight"][:, 0] if isinstance(t, dict) else t for t in _arguments())
    y = y[:, 0].contiguous()
    w = start
    for _ in range(40):
        w = _ridge_step(w, reg, x, y)

    def call(w: Tensor, reg: Tensor, x: Tensor, y: Tensor) -> Any:
        keywords: dict[str, Any] = {"inner_loss": _ridge_loss, "method": hf.CG()}
        if transform == "hypergrad":
            return hf.hypergrad(lambda *_: w, _ridge_outer, **keywords)(reg, x, y)
        solution = hf.implicit_diff(lambda *_: w, **keywords)
        return torch.func.grad(lambda reg: (solution(reg, x, y) ** 3).sum())(reg)

    expected = call(w, reg, x, y)
    outcomes = {}
    for kinds in itertools.product(KINDS, repeat=3):
        params, hparams, args = kinds
        y_kind = "replicated" if args == "sharded" else args  # x by its columns
        placed = _placed(w, params), _placed(reg, hparams), _placed(x, args, 1), _placed(y, y_kind)
        try:
            grads = call(*placed)
        except ValueError as error:
            outcomes[kinds] = str(error)
            continue
        assert type(grads) is type(placed[1])
        if transform == "hypergrad":  # autograd leaves sums over ranks for later
            assert getattr(grads, "placements", ()) == getattr(placed[1], "placements", ())
        grads = grads.full_tensor() if isinstance(grads, DTensor) else grads
        torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-14)
        outcomes[kinds] = ""
    return outcomes


@newer_dtensors
@pytest.mark.parametrize("transform", ["hypergrad", "implicit_diff"])
def test_each_combination_of_kinds_works_or_is_refused_with_the_remedy(
    pair: ranks.Ranks, transform: str
) -> None:
    outcomes, others = pair.run(_combinations, transform)
    assert outcomes == others
    assert len(outcomes) == 27
    for (params, hparams, args), outcome in outcomes.items():
        plain = [kind == "plain" for kind in (params, hparams, args)]
        if all(plain) or not any(plain):
            assert outcome == "", (params, hparams, args)
            continue
        assert "an operation got ordinary tensors and DTensors together" in outcome
        names = (["hparams"] if plain[1] else []) + (["args[0], args[1]"] if plain[2] else [])
        named = ", ".join(names) or "one that the inner solver returned or your functions made"
        assert f"The ordinary ones: {named}. Write distribute_tensor(x, " in outcome
        if not plain[1]:
            assert "hparams.device_mesh" in outcome or "args[1].device_mesh" in outcome


def _part_of_the_ranks(dims: str, method: str, layout: Any) -> list[float]:
    """Each row of a square of ranks on a problem of its own, or one rank of each with itself."""
    rule, condition = METHODS[method]
    keywords = CONDITIONS[condition]
    fn = hf.hypergrad_and_solution(SOLVER, _outer_loss, method=rule, **keywords)
    whole = mesh_of(*((2, 2) if dist.get_world_size() == 4 else (2, 1)))
    size = "even" if whole.get_coordinate()[0] else "uneven"
    expected, _ = fn(*_arguments(size))
    grads, solution = fn(*_distribute(whole[dims], layout, size))
    torch.testing.assert_close(_full(grads), _full(expected), rtol=1e-12, atol=1e-13)
    return [float(field) for field in solution.stats or ()]


@newer_dtensors
@pytest.mark.parametrize("method", ["cg", "pipelined cg", "replayed"])
def test_meshes_of_a_part_of_the_ranks(pair: ranks.Ranks, method: str) -> None:
    pair.run(_part_of_the_ranks, "b", method, LAYOUTS["all"])


@pytest.mark.slow
@newer_dtensors
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", WHERE_SHARDED)
def test_two_meshes_of_two_ranks_each(four: ranks.Ranks, method: str, layout: str) -> None:
    results = four.run(_part_of_the_ranks, "b", method, LAYOUTS[layout])
    assert results[0] == results[1]
    assert results[2] == results[3]


@newer_dtensors
@pytest.mark.parametrize("method", WHOLE_ONLY)
def test_what_is_refused_where_sharded_works_where_replicated(
    pair: ranks.Ranks, method: str
) -> None:
    pair.run(_compare_with_one_process, method, (2,), LAYOUTS["nothing"])


def _refusals() -> dict[str, str]:
    reg, x, y, start = _distribute(mesh_of(2), LAYOUTS["all"])
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("c", "d"))
    meshes = {"weight": reg["weight"], "bias": distribute_tensor(_arguments()[0]["bias"], other)}
    messages = {}
    for name, method in REFUSED.items():
        fn = hf.hypergrad(SOLVER, _outer_loss, fixed_point=_step, method=method)
        with pytest.raises(ValueError, match=r"Use") as error:
            fn(reg, x, y, start)
        messages[name] = str(error.value)
    with pytest.raises(ValueError, match="mesh") as error:
        hf.linear_solvers.CG().solve(
            hf.linear_solvers.LinearOperator(lambda v: v, lambda v: v), tuple(meshes.values())
        )
    messages["two meshes"] = str(error.value)
    with pytest.raises(ValueError, match="Use") as error:
        hf.fixed_point_solvers.Anderson()(_step, start, reg, x, y, start)
    messages["fixed-point solver"] = str(error.value)
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
    assert "init['bias'] is a DTensor that is sharded" in messages["fixed-point solver"]


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
    mesh, sizes = mesh_of(2), []
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


MODULE_METHODS = (hf.GMRES(maxiter=4, rtol=0), hf.NormalCG(maxiter=3, rtol=0))


def _net() -> torch.nn.Module:
    layers = torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    net = torch.nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return net


def _module_hypergrad(
    net: Any, x: Tensor, y: Tensor, place: Any = lambda leaf: leaf, method: Any = None
) -> Any:
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

    return hf.hypergrad(solve, outer_loss, inner_loss=inner_loss, method=method)(hparams, x, y)


def _module(way: str) -> str:
    mesh, (_, x, y, _) = mesh_of(2), _arguments()
    x = x[:, :5]
    everywhere = tuple(distribute_tensor(t.contiguous(), mesh, [Replicate()]) for t in (x, y))
    if way.startswith("fully_shard"):
        net = _net()
        fully_shard(net[0] if way.endswith("a layer") else net, mesh=mesh)
        with pytest.raises(TypeError) as error:
            hf.functional(net)
        return str(error.value)
    for method in MODULE_METHODS:
        compute = functools.partial(_module_hypergrad, method=method)
        expected = compute(_net(), x, y)
        if way == "distribute_tensor":
            shard = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
            actual = compute(_net(), *everywhere, shard)
        elif way == "distribute_module":
            actual = compute(distribute_module(_net(), mesh), *everywhere)
        else:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            actual = compute(parallelize_module(_net(), mesh, plan), x, y)
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


@pytest.mark.parametrize("way", ["fully_shard", "fully_shard of a layer"])
def test_modules_by_fully_shard_are_refused(pair: ranks.Ranks, way: str) -> None:
    for message in pair.run(_module, way):
        assert "hooks gather the parameters that it holds" in message
        assert "torch.distributed.tensor.distribute_tensor(p, mesh, [Shard(0)])" in message
