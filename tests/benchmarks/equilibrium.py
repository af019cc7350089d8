"""An equilibrium layer, forward and backward: P7."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hyperfunc as hf
from tests.benchmarks.harness import FLOOR, OURS, PEER, RAW, Entry, Problem

UNITS, BATCH, STEPS = 64, 256, 30


def p7(device: Any = "cpu") -> Problem:
    """``z = tanh(x U^T + z W^T + b)`` by 30 iterations, and the adjoint by 30 more."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        0.4 * torch.linalg.qr(torch.randn(UNITS, UNITS, generator=generator))[0],
        torch.randn(UNITS, UNITS, generator=generator) / 8,
        torch.zeros(UNITS),
    ]
    x = torch.randn(BATCH, UNITS, generator=generator).to(device)
    weights = [leaf.to(device) for leaf in weights]

    def entry(name: str, group: str, build: Callable[..., Callable[[], Any]]) -> Entry:
        return Entry(name, group, lambda: build(weights, x))

    def reference() -> list[Tensor]:
        return by_hand([leaf.double() for leaf in weights], x.double())()

    entries = [
        entry("cells and products", FLOOR, floor),
        entry("by hand", RAW, by_hand),
        entry("hyperfunc, hypergrad", OURS, hyperfunc),
        entry("hyperfunc, implicit_diff and backward", OURS, hyperfunc_backward),
        entry("hyperfunc, hypergrad, compiled", OURS, functools.partial(hyperfunc, compile=True)),
        entry("torchdeq", PEER, torchdeq),
    ]
    return Problem("P7", f"equilibrium layer, {UNITS} units, batch {BATCH}", entries, reference)


def cell(z: Tensor, weights: list[Tensor], x: Tensor) -> Tensor:
    W, U, b = weights
    return torch.tanh(x @ U.T + z @ W.T + b)


def outer_loss(z: Tensor, weights: list[Tensor], x: Tensor) -> Tensor:
    return (z**2).mean() * 10


def floor(weights: list[Tensor], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        z = torch.zeros_like(x)
        injected = x @ weights[1].T + weights[2]
        for _ in range(STEPS):
            torch.tanh(torch.addmm(injected, z, weights[0].T))
        z = z.requires_grad_()
        leaves = [leaf.detach().requires_grad_() for leaf in weights]
        value = cell(z, leaves, x)
        for _ in range(STEPS):
            torch.autograd.grad(value, z, x, retain_graph=True)
        torch.autograd.grad(value, leaves, x)

    return run


def by_hand(weights: list[Tensor], x: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        z = torch.zeros_like(x)
        injected = x @ weights[1].T + weights[2]
        for _ in range(STEPS):
            z = torch.addmm(injected, z, weights[0].T).tanh_()
        z.requires_grad_()
        leaves = [leaf.detach().requires_grad_() for leaf in weights]
        (b,) = torch.autograd.grad(outer_loss(z, leaves, x), z)
        value = cell(z, leaves, x)
        u = b
        for _ in range(STEPS - 1):
            u = torch.autograd.grad(value, z, u, retain_graph=True)[0].add_(b)
        return list(torch.autograd.grad(value, leaves, u))

    return run


def _method() -> Any:
    return hf.FixedPoint(maxiter=STEPS, rtol=0, atol=0)


def hyperfunc(weights: list[Tensor], x: Tensor, compile: Any = False) -> Callable[[], list[Tensor]]:
    solver = hf.iterate(cell, STEPS, init=lambda weights, x: torch.zeros_like(x), compile=compile)
    transformed = hf.hypergrad(solver, outer_loss, method=_method(), compile=compile)
    return lambda: transformed(weights, x)


def hyperfunc_backward(weights: list[Tensor], x: Tensor) -> Callable[[], list[Tensor]]:
    solver = hf.iterate(cell, STEPS, init=lambda weights, x: torch.zeros_like(x))
    layer = hf.implicit_diff(solver, method=_method())

    def run() -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in weights]
        return list(torch.autograd.grad(outer_loss(layer(leaves, x), leaves, x), leaves))

    return run


def torchdeq(weights: list[Tensor], x: Tensor) -> Callable[[], list[Tensor]]:
    from torchdeq import get_deq

    deq = get_deq(
        f_solver="simple_fixed_point_iter",
        b_solver="fixed_point_iter",
        f_max_iter=STEPS,
        b_max_iter=STEPS,
        f_tol=0.0,
        b_tol=0.0,
        ift=True,
    )

    def run() -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in weights]
        outputs, _ = deq(lambda z: cell(z, leaves, x), torch.zeros_like(x))
        return list(torch.autograd.grad(outer_loss(outputs[-1], leaves, x), leaves))

    return run
