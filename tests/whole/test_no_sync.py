"""Loops of a fixed length never wait for a value: they run on tensors that have none.

On a GPU each look at a value waits for the device. On tensors without values it raises, so that
what runs here queues all its work ahead, and can be captured in a CUDA graph. Nor do they mix
devices, but for numbers held as CPU tensors, which a GPU takes too.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperfunc as hf
from tests.cells import each_cell

FIXED: dict[str, Any] = {"maxiter": 3, "rtol": 0, "atol": 0}
METHODS: dict[str, Any] = {
    "cg": hf.CG(**FIXED),
    "cg, jacobi": hf.CG(**FIXED, preconditioner=hf.JacobiPreconditioner(2)),
    "cg, nystrom": hf.CG(**FIXED, preconditioner=hf.NystromPreconditioner(2)),
    "damped": hf.Damped(hf.CG(**FIXED), 0.1),
    "nystrom": hf.Nystrom(2),
    "anderson": hf.AndersonFixedPoint(**FIXED),
    "dense": hf.Dense(),
    "blockwise": hf.Blockwise(hf.CG(**FIXED), "leaves"),
    "stoch_aid": hf.StochasticAID(3, hf.optim.sgd(0.1)),
    "pipelined_cg": hf.PipelinedCG(**FIXED),
    "normal_cg": hf.NormalCG(**FIXED),
    "bicgstab": hf.BiCGStab(**FIXED),
    "gmres": hf.GMRES(**FIXED),
    "fixed_point": hf.FixedPoint(**FIXED, step_size=0.1),
    "neumann": hf.Neumann(**FIXED, step_size=0.1),
    "one_step": hf.OneStep(),
    "reverse_unroll": hf.ReverseUnroll(),
    "reverse": hf.Reverse(),
    "reverse in segments": hf.Reverse("sqrt"),
    "forward": hf.ForwardMode(),
    "first_order": hf.FirstOrder(),
}


def inner_loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w).square().mean() + (h.exp() * w**2).sum()


def outer_loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return (x @ w).sum()


def transform(method: Any, loss: Any = inner_loss, optimizer: Any = None) -> Any:
    solver = hf.minimize(
        loss, optimizer or hf.optim.adam(0.1), 5, init=lambda h, x: torch.zeros_like(h)
    )
    return hf.hypergrad_and_solution(solver, outer_loss, method=method, throw=False)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU would: tensors, other than single numbers, of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device for t in tensors if t.ndim or t.device.type != "cpu"}
        if len(devices) > 1 and func is not torch.ops.aten._to_copy.default:
            raise RuntimeError(f"{func} of tensors on {devices}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_no_loop_looks_at_a_value(name: str) -> None:
    fn = transform(METHODS[name])
    h, x = torch.zeros(4, device="meta"), torch.ones(2, 3, 4, device="meta")
    with each_cell() as cell:
        for mapped in (False, True):
            with cell("vmap" if mapped else "alone"):
                with OneDevice():
                    grads = torch.func.vmap(fn, (None, 0))(h, x)[0] if mapped else fn(h, x[0])[0]
                assert grads.is_meta
                assert grads.shape == ((2, 4) if mapped else (4,))


@pytest.mark.parametrize(
    "optimizer", [hf.optim.sgd(0.1, momentum=0.9), hf.optim.heavy_ball(0.1, 0.5)]
)
def test_no_proximal_step_does(optimizer: Any) -> None:
    fn = transform(METHODS["cg"], hf.proximal(inner_loss, 0.5), optimizer)
    assert fn(torch.zeros(4, device="meta"), torch.ones(3, 4, device="meta"))[0].shape == (4,)


def test_a_tolerance_does() -> None:
    fn = transform(hf.CG(maxiter=3))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        fn(torch.zeros(4, device="meta"), torch.ones(3, 4, device="meta"))


class Looks(TorchDispatchMode):
    """Counts the values that are looked at, but for an optimiser's count of steps, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].dtype != torch.int64 or args[0].device.type != "cpu"
        return func(*args, **(kwargs or {}))


def test_throwing_looks_at_the_end_only(device: torch.device) -> None:
    h, x = torch.zeros(4, device=device), torch.ones(3, 4, device=device)
    counts = []
    for steps in (2, 20):
        solver = hf.minimize(
            inner_loss, hf.optim.sgd(0.1), steps, init=lambda h, x: torch.zeros_like(h)
        )
        method = hf.NormalCG(maxiter=steps, rtol=0, atol=0)
        with Looks() as looks:
            hf.hypergrad(solver, outer_loss, method=method)(h, x)
        counts.append(looks.count)
    assert counts[0] == counts[1] > 0
