"""Print how far hypergradients of bfloat16 models are from those in float64.

    python tests/half_precision.py

A column says where bfloat16 is used, a row is a method, an entry the largest relative error over a
few problems: 20 steps of descent on a network with layer normalisation, differentiated by
regulariser and step size; or, by implicit methods, its last layer trained to the minimum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hyperfunc as hf

ITERATIVE = ("reverse_unroll", "reverse", "forward")
IMPLICIT = ("cg", "gmres", "normal_cg", "dense")
# By name: the dtypes of params and hparams, and of the model.
KINDS = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "autocast": (torch.float32, torch.float32),
    "float32 params": (torch.float32, torch.bfloat16),
    "bfloat16 params": (torch.bfloat16, torch.bfloat16),
}
SEEDS = 5


def make(kind: str, seed: int, method: str) -> tuple[Callable[..., Any], Any]:
    """A hypergradient and its argument."""
    outside, inside = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    data = [torch.randn(64, n, generator=generator, dtype=torch.float64) for n in (16, 4, 16, 4)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))
    if method in IMPLICIT:
        net[:2].requires_grad_(False)
    apply, start = hf.functional(net.to(inside))
    start = {name: p.to(outside) for name, p in start.items()}

    def forward(w: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            output: Tensor = apply({name: p.to(inside) for name, p in w.items()}, x.to(inside))
        return output.to(outside)

    def inner_loss(w: Any, h: Any) -> Tensor:
        penalty = sum((p**2).sum() for p in w.values())
        return ((forward(w, data[0]) - data[1].to(outside)) ** 2).mean() + h["reg"].exp() * penalty

    def outer_loss(w: Any, h: Any) -> Tensor:
        return ((forward(w, data[2]) - data[3].to(outside)) ** 2).mean()

    hparams = {"reg": torch.tensor(-2.0, dtype=outside), "lr": torch.tensor(0.1, dtype=outside)}
    if method in IMPLICIT:
        del hparams["lr"]
        optimizer, num_steps = hf.optim.sgd(lr=0.3), 100
    else:
        optimizer, num_steps = hf.optim.sgd(lr=lambda h: h["lr"]), 20
    solver = hf.minimize(inner_loss, optimizer, num_steps, init=lambda h: start)
    return hf.hypergrad(solver, outer_loss, method=method), hparams


def compute(kind: str, seed: int, method: str) -> Tensor:
    fn, hparams = make(kind, seed, method)
    return torch.stack([g.double() for g in fn(hparams).values()])


def error(kind: str, seed: int, method: str) -> float:
    """The relative error of a hypergradient."""
    expected = compute("float64", seed, method)
    return float((compute(kind, seed, method) - expected).norm() / expected.norm())


if __name__ == "__main__":
    columns = list(KINDS)[1:]
    print(f"{'':15s}" + "".join(f"{kind:>17s}" for kind in columns))
    for method in (*ITERATIVE, *IMPLICIT):
        worst = [max(error(kind, seed, method) for seed in range(SEEDS)) for kind in columns]
        print(f"{method:15s}" + "".join(f"{each:17.1e}" for each in worst))
