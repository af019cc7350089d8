"""``"auto"`` beside ``"cg"`` on ten problems: what each leaves, in products and in time.

Run as ``python -m tests.linear_solvers.auto_table``; it takes a few minutes. The residual is
computed anew from the operator, in units of the right-hand side; products are all that a solve
takes, for trials and checks too; time is that of the hypergradient. A code that raises by default
is put in brackets.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hyperfunc as hf
from hyperfunc._engine import trees
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers import AbstractLinearSolver, LinearOperator

F64 = torch.float64


@dataclasses.dataclass(frozen=True, eq=False)
class Observed(AbstractLinearSolver):
    """A solver, with a list of what each solve took and left."""

    solver: Any
    seen: list[tuple[float, int, str, str]]

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Any:
        count = 0

        def counted(product: Callable[[Leaves], Leaves]) -> Callable[[Leaves], Leaves]:
            def call(v: Leaves) -> Leaves:
                nonlocal count
                count += batching.count_tasks(v[0].sum() > 0)  # Dense takes many at once
                return product(v)

            return call

        watched = dataclasses.replace(
            operator,
            product=counted(operator.product),
            transposed_product=counted(operator.transposed_product),
        )
        choice = "cg"
        if isinstance(self.solver, hf.Auto):
            x, stats = self.solver.solve_and_tell(watched, b, x0)
            choice = hf.Auto.CHOICES[int(stats.choice)]
            stats = hf.SolveStats(*stats[:3])
        else:
            x, stats = self.solver.solve(watched, b, x0)
        products = count
        residual = float(trees.norm(operator.residual(x, b)) / trees.norm(b))
        code = hf.RESULTS(int(stats.result))
        name = f"({code.name})" if code.failed else code.name
        self.seen.append((residual, products, name, choice))
        return x, stats


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _quadratic(values: Tensor, scales: Tensor | float = 1.0) -> Any:
    """Curvature with given eigenvalues, in units of given sizes."""
    n = len(values)
    Q = torch.linalg.qr(_randn(n, n))[0]
    A = Q @ (values[:, None] * Q.T)
    A = A * scales * scales[:, None] if isinstance(scales, Tensor) else A

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return w @ (A @ w) / 2 - h @ w

    return {"inner_loss": inner_loss}, torch.linalg.solve(A, torch.ones(n, dtype=F64)), n


def _logistic(samples: int, scales: Tensor, penalties: Tensor) -> Any:
    """Logistic regression with a penalty for each feature, solved by Newton's method."""
    n = len(scales)
    X = _randn(samples, n) * scales
    y = (X @ _randn(n, seed=1) > 0).to(F64)

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        logits = X @ w
        fit = torch.nn.functional.softplus(logits) - y * logits
        return fit.mean() + (h.exp() * w**2).sum() / 2

    w = torch.zeros(n, dtype=F64)
    for _ in range(30):
        p = torch.sigmoid(X @ w)
        H = X.T @ ((p * (1 - p))[:, None] * X) / samples + torch.diag(penalties.exp())
        gradient = X.T @ (p - y) / samples + penalties.exp() * w
        w = w - torch.linalg.solve(H, gradient).clamp(-1, 1)
    return {"inner_loss": inner_loss}, w, penalties


def _network(composed: bool) -> Any:
    """A network with 1,201 weights, a hundred steps of descent from its start."""
    X, y = _randn(64, 10), _randn(64, seed=1)
    net = torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.Tanh(), torch.nn.Linear(100, 1))
    apply, params = hf.functional(net.to(F64))
    flat = [_randn(p.numel(), seed=i).reshape(p.shape) / 3 for i, p in enumerate(params.values())]
    start = dict(zip(params, flat, strict=True))

    def model(w: Any, h: Tensor) -> Tensor:
        return apply(w, X)[:, 0]

    def loss(outputs: Tensor, h: Tensor) -> Tensor:
        return ((outputs - y - h) ** 2).mean()

    inner = hf.composed(model, loss) if composed else lambda w, h: loss(model(w, h), h)
    inner = hf.proximal(inner, 1e-2, lambda h: start)
    solver = hf.minimize(inner, hf.optim.sgd(lr=0.1), 100, init=lambda h: start)
    return {"inner_loss": inner}, solver(torch.zeros(64, dtype=F64)), 64


def _map(n: int) -> Any:
    W = _randn(n, n) * 0.9 / n**0.5

    def fixed_point(w: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(W @ w + h)

    h = _randn(n, seed=1)
    w = torch.zeros(n, dtype=F64)
    for _ in range(300):
        w = fixed_point(w, h)
    return {"fixed_point": fixed_point}, w, h


def _least_squares() -> Any:
    """More parameters than data: a singular Hessian, and an outer loss of the predictions."""
    X = _randn(100, 600)

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((X @ w - h) ** 2).sum() / 2

    h = _randn(100, seed=1)
    return (
        {"inner_loss": inner_loss, "outer": lambda w, h: (X @ w).sin().sum()},
        (torch.linalg.pinv(X) @ h),
        h,
    )


PROBLEMS: dict[str, Callable[[], Any]] = {
    "quadratic, condition 1e2": lambda: _quadratic(torch.logspace(0, 2, 1000, dtype=F64)),
    "quadratic, condition 1e4": lambda: _quadratic(torch.logspace(0, 4, 1000, dtype=F64)),
    "quadratic, a few large eigenvalues": lambda: _quadratic(
        torch.cat([torch.logspace(0, 2, 980, dtype=F64), torch.logspace(4, 8, 20, dtype=F64)])
    ),
    "quadratic in other units": lambda: _quadratic(
        torch.logspace(0, 1, 1000, dtype=F64), torch.logspace(-2, 2, 1000, dtype=F64)
    ),
    "logistic regression, 1,000 penalties": lambda: _logistic(
        400, torch.logspace(-1, 1, 1000, dtype=F64), 12 * (_randn(1000, seed=2).sigmoid() - 1)
    ),
    "network": lambda: _network(False),
    "network, Gauss-Newton": lambda: _network(True),
    "fixed point, not symmetric": lambda: _map(1000),
    "least squares, 600 parameters, 100 data": _least_squares,
    "quadratic, 100 parameters, condition 1e8": lambda: _quadratic(
        torch.logspace(0, 8, 100, dtype=F64)
    ),
}


def rows(
    names: Any = PROBLEMS,
) -> Iterator[tuple[str, dict[str, tuple[float, int, str, str, float]]]]:
    """For each problem, by method: residual, products, code, choice and seconds."""
    for name in names:
        condition, w, h = PROBLEMS[name]()
        h = torch.ones(h, dtype=F64) if isinstance(h, int) else h
        outer = condition.pop("outer", lambda w, h: sum(x.sin().sum() for x in trees.tensors(w)))
        row = {}
        for method in (hf.CG(maxiter=5000), hf.Auto(maxiter=5000)):
            seen: list[Any] = []
            solver = Observed(method, seen)
            fn = hf.hypergrad(lambda h, w=w: w, outer, method=solver, throw=False, **condition)
            start = time.perf_counter()
            fn(h)
            seconds = time.perf_counter() - start
            row[type(method).__name__] = (*seen[0], seconds)
        yield name, row


def main() -> None:
    print(
        "| problem | cg: residual | products | time | auto: residual | products | time | choice |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    next(rows())  # what the first call of all takes longer
    for name, row in rows():
        cells = [name]
        for residual, products, code, _, seconds in row.values():
            failed = f" {code}" if code != "success" else ""
            cells += [f"{residual:.0e}{failed}", f"{products}", f"{seconds:.2f} s"]
        print("| " + " | ".join([*cells, row["Auto"][3]]) + " |", flush=True)


if __name__ == "__main__":
    main()
