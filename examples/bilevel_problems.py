"""Three bilevel problems whose outer optimum is known: for stochastic_bilevel.py.

Least squares, whose value function has a closed form; logistic regression on handwritten digits
with a regulariser for each pixel; and hyper-cleaning, where 40 % of the training labels are wrong
and each sample has a weight. Each function gives a problem and the least value of its outer loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import lbfgs
from datasets import centred_digits
from torch import Tensor

import hyperfunc as hf


@dataclasses.dataclass(frozen=True)
class Problem:
    """Losses that are means over samples; data are tuples of tensors with a sample dimension."""

    title: str
    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor]
    inner_data: tuple[Tensor, ...]
    outer_data: tuple[Tensor, ...]
    params: Tensor
    hparams: Tensor
    solve: Callable[[Tensor], Tensor]
    inner_lr: float
    outer_lr: dict[str, float]  # the best of a grid for each method
    passes: int  # oracle calls in multiples of the number of samples

    def value(self, hparams: Tensor) -> float:
        return self.outer_loss(self.solve(hparams), hparams, *self.outer_data).item()

    @property
    def num_samples(self) -> int:
        return len(self.inner_data[0])

    @property
    def budget(self) -> int:
        return self.passes * self.num_samples


def least_squares(
    n: int = 1000, n_val: int = 1000, dim: int = 20, hdim: int = 10
) -> tuple[Problem, float]:
    """The hparams shift the targets; the value function is a quadratic, minimised exactly."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.linspace(1, 0.5, dim, dtype=torch.float64)
    X, Z, X_val = scales * randn(n, dim), randn(n, hdim), scales * randn(n_val, dim)
    Z = Z + X[:, :hdim]
    y, y_val = randn(n), X_val @ randn(dim) + randn(n_val)

    def inner_loss(w: Tensor, h: Tensor, X: Tensor, Z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - Z @ h - y) ** 2).mean() + 0.1 * (w**2).sum()

    def outer_loss(w: Tensor, h: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).mean() + 0.05 * (h**2).sum()

    A = X.T @ X / n + 0.2 * torch.eye(dim, dtype=torch.float64)
    G, offset = torch.linalg.solve(A, X.T @ Z / n), torch.linalg.solve(A, X.T @ y / n)
    C = X_val.T @ X_val / n_val
    hessian = G.T @ C @ G + 0.1 * torch.eye(hdim, dtype=torch.float64)
    best = torch.linalg.solve(hessian, G.T @ (X_val.T @ y_val / n_val - C @ offset))

    problem = Problem(
        title="least squares",
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        inner_data=(X, Z, y),
        outer_data=(X_val, y_val),
        params=torch.zeros(dim, dtype=torch.float64),
        hparams=torch.zeros(hdim, dtype=torch.float64),
        solve=lambda h: G @ h + offset,
        inner_lr=0.2,
        outer_lr={"soba": 0.05, "saba": 0.1, "stocbio": 0.05, "amigo": 0.05, "full-batch AID": 1.6},
        passes=400,
    )
    return problem, problem.value(best)


def digits(noise: float) -> tuple[Tensor, ...]:
    """Training images, their labels (some of them wrong), validation images and labels."""
    (X, y), (X_val, y_val) = centred_digits(800, 800)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(1797, generator=generator)
    wrong = torch.rand(800, generator=generator) < noise
    noisy = y.clone()
    noisy[wrong] = (noisy + torch.randint(1, 10, (800,), generator=generator))[wrong] % 10
    return X, noisy, X_val, y_val


def regularisation() -> tuple[Problem, float]:
    X, y, X_val, y_val = digits(noise=0.1)

    def inner_loss(W: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(X @ W, y) + 0.5 * (reg.exp()[:, None] * W**2).sum()

    def outer_loss(W: Tensor, reg: Tensor, X: Tensor, y: Tensor) -> Tensor:
        # the second term keeps the regularisers of useless pixels from growing without end
        return F.cross_entropy(X @ W, y) + 1e-3 * ((reg + 4) ** 2).sum()

    return with_reference(
        Problem(
            title="regularisation of logistic regression",
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_data=(X, y),
            outer_data=(X_val, y_val),
            params=torch.zeros(64, 10, dtype=X.dtype),
            hparams=torch.full((64,), -4.0, dtype=X.dtype),
            solve=Minimizer(inner_loss, (X, y)),
            inner_lr=0.5,
            outer_lr={"soba": 40, "saba": 40, "stocbio": 40, "amigo": 40, "full-batch AID": 160},
            passes=400,
        )
    )


def cleaning() -> tuple[Problem, float]:
    X, y, X_val, y_val = digits(noise=0.4)

    def inner_loss(W: Tensor, weights: Tensor, X: Tensor, y: Tensor, i: Tensor) -> Tensor:
        losses = F.cross_entropy(X @ W, y, reduction="none")
        return (weights[i].sigmoid() * losses).mean() + 2e-3 * (W**2).sum()

    def outer_loss(W: Tensor, weights: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(X @ W, y) + 1e-5 * (weights**2).sum()

    data = X, y, torch.arange(len(y))
    return with_reference(
        Problem(
            title="hyper-cleaning of labels",
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            inner_data=data,
            outer_data=(X_val, y_val),
            params=torch.zeros(64, 10, dtype=X.dtype),
            hparams=torch.zeros(len(y), dtype=X.dtype),
            solve=Minimizer(inner_loss, data),
            inner_lr=0.5,
            outer_lr={
                "soba": 800,
                "saba": 200,
                "stocbio": 400,
                "amigo": 200,
                "full-batch AID": 3200,
            },
            passes=400,
        )
    )


class Minimizer:
    """The inner problem solved by L-BFGS on all data, each time from the last solution."""

    def __init__(
        self, inner_loss: Callable[..., Tensor], data: tuple[Tensor, ...], *shape: int
    ) -> None:
        self.inner_loss, self.data = inner_loss, data
        self.last = torch.zeros(shape or (64, 10), dtype=data[0].dtype)

    def __call__(self, hparams: Tensor) -> Tensor:
        self.last = lbfgs(
            lambda W: self.inner_loss(W, hparams, *self.data),
            self.last.nan_to_num(),
            max_iter=200,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
        )
        return self.last


def with_reference(problem: Problem) -> tuple[Problem, float]:
    """The least value that L-BFGS finds with converged hypergradients."""
    hypergrad = hf.hypergrad_and_value(
        lambda hparams, *args: problem.solve(hparams),
        lambda W, hparams, *args: problem.outer_loss(W, hparams, *problem.outer_data),
        inner_loss=problem.inner_loss,
        method=hf.CG(rtol=1e-6),
    )
    hparams = problem.hparams.clone()
    optimizer = torch.optim.LBFGS([hparams], max_iter=60, line_search_fn="strong_wolfe")
    values = []

    def closure() -> Tensor:
        hparams.grad, value = hypergrad(hparams.detach(), *problem.inner_data)
        values.append(value.item())
        return value

    optimizer.step(closure)
    return problem, min(values)
