"""Products in half precision by ``torch.autocast`` in the user's functions, the rest in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf
from tests import half_precision

# Few steps: beyond what bfloat16 can resolve, an exact count goes on with noise, and breaks down.
FIXED: dict[str, Any] = {"maxiter": 6, "rtol": 0, "atol": 0}
METHODS: dict[str, Any] = {
    "cg": hf.CG(**FIXED),
    "normal_cg": hf.NormalCG(**FIXED),
    "bicgstab": hf.BiCGStab(**FIXED),
    "gmres": hf.GMRES(**FIXED),
    "pipelined_cg": hf.PipelinedCG(maxiter=4, rtol=0, atol=0),
    "fixed_point": hf.FixedPoint(maxiter=60, rtol=0, atol=0, step_size=0.3),
    "neumann": hf.Neumann(maxiter=60, rtol=0, atol=0, step_size=0.3),
    "nystrom": hf.Nystrom(rank=8, rho=1e-3),
    "dense": hf.Dense(),
    "one_step": hf.OneStep(),
    "reverse_unroll": hf.ReverseUnroll(),
    "reverse": hf.Reverse(),
    "forward": hf.ForwardMode(),
    "first_order": hf.FirstOrder(),
}


def network(w: dict[str, Tensor], x: Tensor, device: torch.device, half: bool) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        y = torch.tanh(x @ w["first"]) @ w["second"]
    assert y.dtype == (torch.bfloat16 if half else torch.float32)
    return y.float()


def problem(device: torch.device, method: Any, half: bool, compile: Any = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(30, 6, generator=generator).to(device) for _ in range(2))
    meta = {
        "first": (torch.randn(6, 4, generator=generator) / 2).to(device),
        "second": (torch.randn(4, 2, generator=generator) / 2).to(device),
    }

    def inner_loss(w: Any, h: Any, x: Tensor, v: Tensor) -> Tensor:
        loss = (network(w, x, device, half) - x[:, :2]).square().mean()
        return loss + sum(((a - h[key]) ** 2).sum() for key, a in w.items())

    def outer_loss(w: Any, h: Any, x: Tensor, v: Tensor) -> Tensor:
        return (network(w, v, device, half) - v[:, :2]).square().mean()

    solver = hf.minimize(inner_loss, hf.optim.sgd(0.2), 10, init=lambda h, x, v: h, compile=compile)
    transform = hf.hypergrad_and_solution(
        solver,
        outer_loss,
        inner_loss=inner_loss,
        method=method,
        compile=compile,
    )
    return transform, meta, x, v


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.values()])


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_products_with_float32_vectors(name: str, device: torch.device) -> None:
    fn, *args = problem(device, METHODS[name], half=True)
    plain, *_ = problem(device, METHODS[name], half=False)
    grads, solution = fn(*args)
    expected, _ = plain(*args)
    for tree in (grads, solution.params, solution.adjoint or {}):
        assert all(leaf.dtype == torch.float32 for leaf in tree.values())
    error = (flat(grads) - flat(expected)).norm() / flat(expected).norm()
    assert 0 < error < 0.02
    # the solver adds up in float32: its residual goes below what bfloat16 rounds off, 4e-3
    if isinstance(METHODS[name], (hf.CG, hf.GMRES)):
        assert solution.stats.residual_norm < 4e-3 * flat(solution.adjoint).norm()


@pytest.mark.slow
def test_under_vmap_and_compiled(device: torch.device) -> None:
    expected, *_ = problem(device, METHODS["cg"], half=False)
    for compile in (False, "aot_eager"):
        fn, meta, x, v = problem(device, METHODS["cg"], half=True, compile=compile)
        tasks = torch.stack([x, 0.5 * x]), torch.stack([v, v])
        dims = (None, 0, 0)
        got = torch.func.vmap(fn, dims)(meta, *tasks)[0]
        close = torch.func.vmap(expected, dims)(meta, *tasks)[0]
        assert (flat(got) - flat(close)).norm() < 0.02 * flat(close).norm()
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["reverse", "cg"])
def test_half_precision_is_as_accurate_as_the_manual_says(method: str) -> None:
    limits = dict(zip(list(half_precision.KINDS)[1:], (1e-5, 0.03, 0.05, 0.06), strict=True))
    for kind, limit in limits.items():
        assert half_precision.error(kind, 0, method) < limit * (0.3 if method == "cg" else 1)
