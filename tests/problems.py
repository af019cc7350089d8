"""Inner problems with solutions in closed form: one row of a table each.

A case fixes the functions that a user would write and the solution as a formula, which torch can
differentiate in reverse mode. (Not in forward mode: a `torch.linalg.solve` nested in two forward
modes, or in forward over reverse mode under vmap, gives wrong numbers, so that the references are
computed task by task in reverse mode only.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import jacrev

import hyperfunc as hf

TASKS = 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """An inner problem and outer loss.

    `step_size` makes ``I - step_size A`` a contraction, with ``A`` the Jacobian of the residual.
    """

    name: str
    condition: str
    fn: Callable[..., Any]
    solution: Callable[..., Any]
    outer_loss: Callable[..., Tensor]
    sample: Callable[[torch.Generator], tuple[Any, tuple[Tensor, ...]]]
    step_size: float
    symmetric: bool

    @property
    def keywords(self) -> dict[str, Any]:
        """What the transforms take besides the functions: the condition."""
        return {self.condition: self.fn}

    def inner_solver(self, hparams: Any, *args: Tensor) -> Any:
        """The solution, by code that nothing can differentiate."""
        with torch.no_grad():
            return self.solution(hparams, *args)

    def methods(self, dtype: torch.dtype) -> dict[str, Any]:
        """The methods that this problem satisfies the assumptions of, run to full accuracy."""
        rtol = 1e-14 if dtype is torch.float64 else 4e-7
        table: dict[str, Any] = {
            "normal_cg": hf.NormalCG(maxiter=60, rtol=rtol),
            "fixed_point": hf.FixedPoint(maxiter=120, rtol=rtol, step_size=self.step_size),
            "neumann": hf.Neumann(maxiter=120, rtol=rtol, step_size=self.step_size),
            "dense": hf.Dense(),
        }
        if self.symmetric:
            table["cg"] = hf.CG(maxiter=60, rtol=rtol)
        return table

    def tasks(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> list[tuple[Any, tuple[Tensor, ...]]]:
        """Hyperparameters and arguments for each of a few tasks."""
        generator = torch.Generator().manual_seed(1)
        samples = [self.sample(generator) for _ in range(TASKS)]
        return [optree.tree_map(lambda t: t.to(device, dtype), sample) for sample in samples]

    def value(self, hparams: Any, *args: Tensor) -> Tensor:
        """The outer loss at the solution, by the formula."""
        return self.outer_loss(self.solution(hparams, *args), hparams, *args)

    def reference(self, what: str, i: int = 0, j: int = 0) -> Tensor:
        """A derivative for the hparams of task i and the arguments of task j, in float64.

        ``gradient`` and ``hessian`` are those of the outer value, ``jacobian`` that of the
        solution, all with hparams and params as flat vectors; ``args`` is the gradient of the
        outer value with respect to the arguments.
        """
        return _reference(self, what, i, j)

    def references(self, what: str) -> Tensor:
        """Those of each task with its own hparams and arguments."""
        return torch.stack([self.reference(what, i, i) for i in range(TASKS)])


@functools.cache
def _reference(problem: Problem, what: str, i: int, j: int) -> Tensor:
    tasks = problem.tasks()
    hparams, args = tasks[i][0], tasks[j][1]
    unravel = unraveller(hparams)
    if what == "args":
        return ravel(torch.func.grad(lambda a: problem.value(hparams, *a))(args))
    if what == "jacobian":
        return jacrev(lambda v: ravel(problem.solution(unravel(v), *args)))(ravel(hparams))
    derivative = jacrev(lambda v: problem.value(unravel(v), *args))
    return {"gradient": derivative, "hessian": jacrev(derivative)}[what](ravel(hparams))


class Flat:
    """What the library makes of a problem, as functions of the hparams in one vector.

    Attributes:
        v: the hparams of the first task; `V`: those of all tasks.
        a: the arguments of the first task; `A`: those of all tasks, stacked.
    """

    def __init__(
        self,
        problem: Problem,
        method: Any,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        tasks = problem.tasks(dtype, device)
        self._unravel = unraveller(tasks[0][0])
        self._outer_loss = problem.outer_loss
        keywords = problem.keywords | {"method": method}
        self._hypergrad = hf.hypergrad(problem.inner_solver, problem.outer_loss, **keywords)
        self._solution = hf.implicit_diff(problem.inner_solver, **keywords)
        self.V, self.A = torch.stack([ravel(h) for h, _ in tasks]), stack([a for _, a in tasks])
        self.v, self.a = self.V[0], tasks[0][1]

    def hypergrad(self, v: Tensor, *args: Tensor) -> Tensor:
        """By `hyperfunc.hypergrad`."""
        return ravel(self._hypergrad(self._unravel(v), *args))

    def solution(self, v: Tensor, *args: Tensor) -> Tensor:
        """By `hyperfunc.implicit_diff`."""
        return ravel(self._solution(self._unravel(v), *args))

    def value(self, v: Tensor, *args: Tensor) -> Tensor:
        """The outer loss at the solution by `hyperfunc.implicit_diff`."""
        hparams = self._unravel(v)
        return self._outer_loss(self._solution(hparams, *args), hparams, *args)


def ravel(tree: Any) -> Tensor:
    """The leaves of a tree as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def unraveller(like: Any) -> Callable[[Tensor], Any]:
    """The inverse of `ravel` for trees like this one."""
    leaves, spec = optree.tree_flatten(like)
    sizes = [leaf.numel() for leaf in leaves]

    def unravel(vector: Tensor) -> Any:
        parts = vector.split(sizes)
        return optree.tree_unflatten(
            spec, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    return unravel


def stack(trees: list[Any]) -> Any:
    """Trees of one structure, leaf by leaf in one batch."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


# Ridge regression: A = X^T X + diag(exp(reg)), with X^T X <= 1/4 ----------------------------------


def _regression(generator: torch.Generator, n: int, d: int) -> tuple[Tensor, ...]:
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    target = torch.randn(d, generator=generator, dtype=torch.float64)
    return X / (2 * X.norm()), y, target


def _sample_ridge(generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _uniform(generator), _regression(generator, 5, 3)


def _sample_ridge_many(generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _uniform(generator, 3), _regression(generator, 5, 3)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Between -0.25 and 0.25."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) / 2 - 0.25


def ridge_loss(w: Tensor, reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((X @ w - y) ** 2).sum() + 0.5 * (reg.exp() * w**2).sum()


def ridge_gradient(w: Tensor, reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return X.T @ (X @ w - y) + reg.exp() * w


def ridge_step(w: Tensor, reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return w - 0.85 * ridge_gradient(w, reg, X, y, target)


def ridge_solution(reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    regulariser = torch.diag(reg.exp().expand(X.shape[1]))
    return torch.linalg.solve(X.T @ X + regulariser, X.T @ y)


def distance(w: Tensor, hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return (((w - target) ** 2).sum() / 8).exp()


def regularised_distance(w: Tensor, reg: Tensor, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return distance(w, reg, X, y, target) + reg.sin().sum() * w.sum()


# Least squares biased towards hparams, over a tree: A = X^T X + exp(reg) --------------------------


def _sample_biased(generator: torch.Generator) -> tuple[Any, tuple[Tensor, ...]]:
    hparams = {
        "reg": _uniform(generator),
        "center": [_uniform(generator, 2), {"bias": _uniform(generator)}],
    }
    return hparams, _regression(generator, 5, 2)


def _predict(params: Any, X: Tensor) -> Tensor:
    weight, rest = params
    return X @ weight + 0.2 * rest["bias"]


def biased_loss(params: Any, hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    difference = ravel(params) - ravel(hparams["center"])
    penalty = 0.5 * hparams["reg"].exp() * (difference**2).sum()
    return 0.5 * ((_predict(params, X) - y) ** 2).sum() + penalty


def biased_solution(hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Any:
    reg, center = hparams["reg"].exp(), hparams["center"]
    Z = torch.cat([X, 0.2 * torch.ones_like(X[:, :1])], dim=1)
    A = Z.T @ Z + reg * torch.eye(3).to(X)
    return unraveller(center)(torch.linalg.solve(A, Z.T @ y + reg * ravel(center)))


def biased_outer(params: Any, hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return ((_predict(params, X) - 2 * y) ** 2).sum() + (params[0] * target).sum().sin()


# A linear map with a non-symmetric Jacobian: phi(w) = s J w + tanh(h) -----------------------------


def _sample_map(generator: torch.Generator) -> tuple[Any, tuple[Tensor, ...]]:
    J = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    hparams = (_uniform(generator), _uniform(generator, 3))
    return hparams, (J / (4 * torch.linalg.matrix_norm(J, 2)), _uniform(generator, 3))


def linear_map(w: Tensor, hparams: Any, J: Tensor, target: Tensor) -> Tensor:
    s, h = hparams
    return s.exp() * J @ w + h.tanh()


def linear_map_solution(hparams: Any, J: Tensor, target: Tensor) -> Tensor:
    s, h = hparams
    return torch.linalg.solve(torch.eye(3).to(J) - s.exp() * J, h.tanh())


def linear_map_outer(w: Tensor, hparams: Any, J: Tensor, target: Tensor) -> Tensor:
    return ((w - target) ** 4).sum() + hparams[0] * w[0]


# A nonlinear root with a non-symmetric Jacobian: w0 = h0^2, w1 (1 + w0^2) = h1 + c ----------------


def _sample_root(generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _uniform(generator, 2) + 0.7, (_uniform(generator),)


def root(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return torch.stack([w[0] - h[0] ** 2, w[1] * (1 + w[0] ** 2) - h[1] - c])


def root_map(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return w - 0.85 * root(w, h, c)


def root_solution(h: Tensor, c: Tensor) -> Tensor:
    return torch.stack([h[0] ** 2, (h[1] + c) / (1 + h[0] ** 4)])


def root_outer(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return (w[0] * w[1]).sin() + (w**2).sum() * h[1] + c * w[1]


# 0-d params and hparams, with an operator that varies with w: w^3 + w = h -------------------------


def _sample_cubic(generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _uniform(generator) + 0.3, (_uniform(generator),)


def cubic(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return w**3 + w - h


def cubic_loss(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return w**4 / 4 + w**2 / 2 - h * w


def cubic_solution(h: Tensor, c: Tensor) -> Tensor:
    root = (h**2 / 4 + 1 / 27).sqrt()
    return (root + h / 2) ** (1 / 3) - (root - h / 2) ** (1 / 3)


def cubic_outer(w: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return (w - c) ** 2 + h * w


# Logistic regression with weights on the samples, solved by Newton's method -----------------------


def _sample_logistic(generator: torch.Generator) -> tuple[Any, tuple[Tensor, ...]]:
    X, y, target = _regression(generator, 4, 2)
    return {"reg": _uniform(generator), "weights": _uniform(generator, 4)}, (X, y, target)


def logistic_loss(w: Tensor, hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    losses = torch.nn.functional.softplus(-y.sign() * (X @ w))
    return (hparams["weights"].exp() * losses).sum() + 0.5 * hparams["reg"].exp() * (w**2).sum()


def logistic_newton(w: Tensor, hparams: Any, X: Tensor, y: Tensor) -> Tensor:
    s, weights, reg = y.sign(), hparams["weights"].exp(), hparams["reg"].exp()
    p = torch.sigmoid(-s * (X @ w))
    gradient = -X.T @ (weights * s * p) + reg * w
    hessian = (X.T * (weights * p * (1 - p))) @ X + reg * torch.eye(2).to(X)
    return w - torch.linalg.solve(hessian, gradient)


def logistic_solution(hparams: Any, X: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """From the solution, each step of Newton's method doubles the orders of right derivatives."""
    w = torch.zeros_like(target)
    with torch.no_grad():
        for _ in range(7):
            w = logistic_newton(w, hparams, X, y)
    for _ in range(2):
        w = logistic_newton(w, hparams, X, y)
    return w


PROBLEMS = [
    Problem(
        name="ridge with one regulariser",
        condition="inner_loss",
        fn=ridge_loss,
        solution=ridge_solution,
        outer_loss=regularised_distance,
        sample=_sample_ridge,
        step_size=0.85,
        symmetric=True,
    ),
    Problem(
        name="ridge with many regularisers",
        condition="optimality",
        fn=ridge_gradient,
        solution=ridge_solution,
        outer_loss=regularised_distance,
        sample=_sample_ridge_many,
        step_size=0.85,
        symmetric=True,
    ),
    Problem(
        name="ridge as a gradient step",
        condition="fixed_point",
        fn=ridge_step,
        solution=ridge_solution,
        outer_loss=distance,
        sample=_sample_ridge_many,
        step_size=1.0,
        symmetric=True,
    ),
    Problem(
        name="biased least squares",
        condition="inner_loss",
        fn=biased_loss,
        solution=biased_solution,
        outer_loss=biased_outer,
        sample=_sample_biased,
        step_size=0.8,
        symmetric=True,
    ),
    Problem(
        name="non-symmetric map",
        condition="fixed_point",
        fn=linear_map,
        solution=linear_map_solution,
        outer_loss=linear_map_outer,
        sample=_sample_map,
        step_size=1.0,
        symmetric=False,
    ),
    Problem(
        name="non-symmetric root",
        condition="optimality",
        fn=root,
        solution=root_solution,
        outer_loss=root_outer,
        sample=_sample_root,
        step_size=0.85,
        symmetric=False,
    ),
    Problem(
        name="non-symmetric root as a map",
        condition="fixed_point",
        fn=root_map,
        solution=root_solution,
        outer_loss=root_outer,
        sample=_sample_root,
        step_size=1.0,
        symmetric=False,
    ),
    Problem(
        name="scalar loss",
        condition="inner_loss",
        fn=cubic_loss,
        solution=cubic_solution,
        outer_loss=cubic_outer,
        sample=_sample_cubic,
        step_size=0.8,
        symmetric=True,
    ),
    Problem(
        name="scalar root",
        condition="optimality",
        fn=cubic,
        solution=cubic_solution,
        outer_loss=cubic_outer,
        sample=_sample_cubic,
        step_size=0.8,
        symmetric=True,
    ),
    Problem(
        name="logistic regression",
        condition="inner_loss",
        fn=logistic_loss,
        solution=logistic_solution,
        outer_loss=distance,
        sample=_sample_logistic,
        step_size=0.8,
        symmetric=True,
    ),
]


class CubeOnce(torch.autograd.Function):
    """A cube whose gradient says of itself that it has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2
