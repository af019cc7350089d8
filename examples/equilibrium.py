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
    args = common.options(
        argv,
        __doc__,
        "equilibrium",
        steps=(20, "T and K"),
        iterations=(80, "full-batch steps of SGD"),
        seed=(0, "of the split and the weights"),
    )
    train, test = stratified_digits(898, seed=args.seed)
    steps, tolerance = args.steps, 1e-3
    settings = {
        "reverse": (Picard(0, rtol=0), hf.Reverse(last=steps)),
        "fixed_point": (Picard(steps, rtol=0), hf.FixedPoint(steps, rtol=0)),
        "normal_cg": (Picard(steps, rtol=0), hf.NormalCG(steps, rtol=0)),
        "gmres": (Picard(steps, rtol=0), hf.GMRES(steps, rtol=0)),
        "parametrised": (Anderson(rtol=tolerance, batch_dim=0), hf.GMRES(rtol=tolerance)),
    }
    table, curves = {}, {}
    for name, (solver, method) in settings.items():
        torch.manual_seed(args.seed)
        cell = Cell(name == "parametrised")
        net = network(cell, solver, method, torch.nn.Linear(SIZE, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        curves[name] = []
        for _ in (bar := tqdm(range(args.iterations), desc=name, unit="it")):
            loss = F.cross_entropy(net.train()(train[0]), train[1])
            with torch.no_grad():
                hits = net.eval()(test[0]).argmax(1) == test[1]
            curves[name].append(hits.float().mean().item())
            bar.set_postfix(loss=loss.item(), test=curves[name][-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if name != "parametrised":
                with torch.no_grad():
                    U, S, V = torch.linalg.svd(cell.A.weight)
                    cell.A.weight.copy_(U @ torch.diag(S.clamp(max=RADIUS)) @ V)
        with common.Meter((SIZE, SIZE)) as meter:
            loss = F.cross_entropy(net.train()(train[0]), train[1])
            forward = meter.products
            loss.backward()
        table[name] = curves[name][-1], meter.products - forward, meter.peak / 2**20
        if name == "gmres":
            errors = gradient_errors(cell.double(), net[1].double(), train[0].double(), train[1])
    linear = LogisticRegression(max_iter=5000).fit(*train).score(*test)
    table["logistic regression"] = linear, None, None
    columns = {"test accuracy": ".1%", "products": "d", "memory (MiB)": ".1f"}
    common.table("", columns, table)

    figure, (left, right) = common.panels(2, (11, 3.8))
    left.axhline(linear, color="black", ls="--", label="logistic regression")
    floor = min(0.9, linear - 0.02)
    common.curves(left, curves, title="test accuracy", xlabel="step of SGD", ylim=(floor, 1))
    for (name, points), style in zip(errors.items(), ("o-", "x--", "s-", "^-"), strict=True):
        products, line = zip(*points, strict=True)
        common.curves(right, {name: line}, style, products, xlabel="products", yscale="log")
    right.set(title="error of the trained network's gradient")
    common.save(args, figure, table=table, linear=linear, curves=curves, gradient_errors=errors)


def gradient_errors(cell, readout, x, y):
    """Relative errors of the gradient for A, after each number of products."""

    def gradient(method):
        net = network(cell, Anderson(rtol=1e-13, batch_dim=0), method, readout)
        return torch.autograd.grad(F.cross_entropy(net(x), y), cell.A.weight)[0]

    exact = gradient(hf.GMRES(rtol=1e-13))
    families = {
        "reverse": (lambda K: hf.Reverse(last=K), 1),
        "fixed_point": (lambda K: hf.FixedPoint(K + 1, rtol=0), 1),
        "normal_cg": (lambda K: hf.NormalCG(K, rtol=0), 2),
        "gmres": (lambda K: hf.GMRES(K, restart=20, rtol=0), 1),
    }
    error = lambda method: ((gradient(method) - exact).norm() / exact.norm()).item()  # noqa: E731
    return {
        name: [(products * K, error(make(K))) for K in (1, 2, 4, 7, 10, 15, 20)]
        for name, (make, products) in families.items()
    }


if __name__ == "__main__":
    common.run(main)
