"""An equilibrium network on scikit-learn's digits, differentiated in four ways.

The state of a row x is where an RNN with that constant input comes to rest, where
z = tanh(A z + B x + c), and a linear layer classifies z. The gradient goes through z by T steps
from zero that are differentiated one by one (reverse), or by the implicit function theorem with K
steps of a linear solver (fixed_point, normal_cg, gmres). For A to stay a contraction, it is
projected onto the ball of spectral norm 0.99 after every update. A last run parametrises it as
0.99 A / |A| instead, by torch's spectral_norm, and stops by tolerances. The baseline is logistic
regression.

    python examples/equilibrium.py

Reference: Grazzi et al., On the iteration complexity of hypergradient computation, 2020, arXiv
2006.16218, section 3.2.
"""

from __future__ import annotations

import time

import common
import torch
import torch.nn.functional as F
from datasets import stratified_digits
from sklearn.linear_model import LogisticRegression
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import hyperfunc as hf
from hyperfunc.fixed_point_solvers import Anderson, Picard

SIZE, RADIUS = 100, 0.99


class Cell(torch.nn.Module):
    def __init__(self, parametrised):
        super().__init__()
        self.A, self.B = torch.nn.Linear(SIZE, SIZE, bias=False), torch.nn.Linear(64, SIZE)
        self.scale = RADIUS if parametrised else 1.0
        torch.nn.init.normal_(self.A.weight, std=0.01)
        torch.nn.init.normal_(self.B.weight, std=0.1)
        if parametrised:
            spectral_norm(self.A, n_power_iterations=5)

    def forward(self, z, x):
        return torch.tanh(self.scale * self.A(z) + self.B(x))


def network(cell, solver, method, readout):
    start = lambda x: x.new_zeros(len(x), SIZE)  # noqa: E731
    return torch.nn.Sequential(hf.EquilibriumLayer(cell, solver, method, init=start), readout)


def main(argv: list[str] | None = None) -> None:
    settings = {"steps": (20, "T and K"), "iterations": (80, "full-batch steps of SGD")}
    args = common.options(argv, __doc__, "equilibrium", **settings)
    train, test = stratified_digits(898, seed=0)
    steps, tolerance = args.steps, 1e-3
    ways = {
        "reverse": (Picard(0, rtol=0), hf.Reverse(last=steps)),
        "fixed_point": (Picard(steps, rtol=0), hf.FixedPoint(steps, rtol=0)),
        "normal_cg": (Picard(steps, rtol=0), hf.NormalCG(steps, rtol=0)),
        "gmres": (Picard(steps, rtol=0), hf.GMRES(steps, rtol=0)),
        "parametrised": (Anderson(rtol=tolerance, batch_dim=0), hf.GMRES(rtol=tolerance)),
    }
    table, curves = {}, {}
    for name, (solver, method) in ways.items():
        torch.manual_seed(0)
        cell = Cell(name == "parametrised")
        net = network(cell, solver, method, torch.nn.Linear(SIZE, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        curves[name], begin = [], time.process_time()
        for _ in tqdm(range(args.iterations), desc=name, unit="it"):
            loss = F.cross_entropy(net.train()(train[0]), train[1])
            with torch.no_grad():
                hits = net.eval()(test[0]).argmax(1) == test[1]
            curves[name].append(hits.float().mean().item())
            net.zero_grad()
            loss.backward()
            optimizer.step()
            if name != "parametrised":
                with torch.no_grad():
                    U, S, V = torch.linalg.svd(cell.A.weight)
                    cell.A.weight.copy_(U @ torch.diag(S.clamp(max=RADIUS)) @ V)
        seconds = time.process_time() - begin
        with common.Meter((SIZE, SIZE)) as meter:
            loss = F.cross_entropy(net.train()(train[0]), train[1])
            forward = meter.products
            loss.backward()
        counts = meter.products - forward, meter.peak / 2**20
        table[name] = curves[name][-1], *counts, seconds
    linear = LogisticRegression(max_iter=5000).fit(*train).score(*test)
    table["logistic regression"] = linear, None, None, None
    columns = {"test accuracy": ".1%", "products": "d", "memory (MiB)": ".1f", "seconds": ".1f"}
    common.table("", columns, table)

    figure, (axis,) = common.panels(1, (7, 3.8))
    axis.axhline(linear, color="black", ls="--", label="logistic regression")
    common.curves(
        axis, curves, title="test accuracy", xlabel="step of SGD", ylim=(min(0.9, linear - 0.02), 1)
    )
    common.save(args, figure, table=table, linear=linear, curves=curves)


if __name__ == "__main__":
    common.run(main)
