"""The solver that measures the operator first, and the rates by which solvers are compared."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count
from hyperfunc._torch import batching
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    LinearOperator,
    Solved,
    check_stopping,
)
from hyperfunc.linear_solvers._dense import Dense
from hyperfunc.linear_solvers._gmres import GMRES
from hyperfunc.linear_solvers._krylov import CG, NormalCG
from hyperfunc.linear_solvers._spectrum import Estimate, Spectrum, measure
from hyperfunc.linear_solvers._stationary import FixedPoint
from hyperfunc.linear_solvers._wrappers import Fallback

MOST_ENTRIES = 256  # inner parameters up to which the matrix may be formed
FEW_PRODUCTS = 30  # products up to which a plain fixed-point iteration is good enough


@dataclasses.dataclass(frozen=True)
class Auto(AbstractLinearSolver):
    r"""Measures the operator, then solves with the method that the facts call for: ``"auto"``.

    What is measured, in Krylov spaces of dimension ``num_steps``, are the symmetry of :math:`A`
    (known for an inner loss), the signs of its curvature, its condition number :math:`\kappa`, and
    the contraction factor :math:`q` of a fixed-point map. The choice is the first that applies:

    1. symmetric without negative curvature: `CG`, about
       :math:`\log(2 \sqrt\kappa / \epsilon) / \log\frac{\sqrt\kappa + 1}{\sqrt\kappa - 1}`
       products for the relative error :math:`\epsilon`;
    2. a fixed-point map with :math:`q < 1` that needs 30 products or fewer: `FixedPoint`,
       :math:`\log \epsilon / \log q` products;
    3. any other map with :math:`q < 1`: `GMRES`, at most as many;
    4. symmetric, or :math:`\kappa` so small that it takes 30 products or fewer: `NormalCG`, with
       the rate of `CG` for :math:`\kappa^2`, and two products a step;
    5. otherwise `GMRES`, for which there is no such rate.

    Where that is expected to take more products than there are inner parameters, and these are 256
    or fewer, the choice is `Dense`. Where the choice does not succeed, `GMRES` and then `NormalCG`
    go on from the start. `hyperfunc.diagnose` reports these facts and the choice.

    Every solve measures anew, by ``num_steps`` products for an inner loss and up to
    ``4 num_steps + 6`` for a map, and waits for the device a few times. Under ``vmap`` one method
    is chosen, whose assumptions hold in all tasks. The statistics count the steps of the chosen
    solver alone.

    Args:
        num_steps: dimension of the Krylov spaces, >= 1.
        maxiter: largest number of steps of each solver, >= 0.

    All other arguments are those of `CG`.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])  # not symmetric, so that CG would fail
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.Auto().solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)

    References:
        The rates: Grazzi et al., arXiv 2006.16218; GMRES: Saad and Schultz, 1986.
    """

    num_steps: int = 10
    maxiter: int = 1000
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_count(self, "num_steps", self.num_steps)
        check_stopping(self)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        is_map = isinstance(operator.shift, float) and (operator.shift, operator.scale) == (1, -1)
        spectrum = measure(operator, b, self.num_steps, is_map=is_map, full=False)
        size = sum(leaf.numel() for leaf in b)
        accuracy = trees.epsilon(b) ** 0.75 if self.rtol is None else max(self.rtol, 1e-16)
        choice = choose(spectrum, size, is_map, accuracy)
        settings = self.maxiter, self.rtol, self.atol
        if choice.name in ("dense", "normal_cg"):
            return make_solver(choice.name, *settings).solve(operator, b, x0)
        solver: AbstractLinearSolver = NormalCG(*settings)
        for name in dict.fromkeys(("gmres", choice.name)):
            solver = Fallback(make_solver(name, *settings), solver)
        return solver.solve(operator, b, x0)


class Choice(NamedTuple):
    """The name of a solver, and the products of each over all tasks, -1 where it does not apply."""

    name: str
    products: dict[str, int]


def choose(spectrum: Spectrum, size: int, is_map: bool, accuracy: float) -> Choice:
    """Choose a solver for the operators of all tasks, inside or outside of `vmap`."""
    kappa = condition_number(spectrum).value
    q = spectrum.contraction.value
    finite = torch.isfinite(kappa)
    definite = spectrum.symmetric & (spectrum.eig_min.value > 0) & finite
    rates = {
        "cg": (definite, torch.clamp_max(_cg_steps(kappa.sqrt(), accuracy), size)),
        "fixed_point": ((q < 1) & is_map, _steps(accuracy, q) - 1),
        "normal_cg": (finite, 2 * _cg_steps(kappa, accuracy)),
    }
    tasks = _total(torch.ones_like(kappa))
    products = {
        name: _total(count) if _everywhere(applies) else -1
        for name, (applies, count) in rates.items()
    }
    products |= {"gmres": products["fixed_point"], "dense": size * tasks}
    few = FEW_PRODUCTS * tasks
    if products["cg"] >= 0:
        name = "cg"
    elif products["fixed_point"] >= 0:
        name = "fixed_point" if products["fixed_point"] <= few else "gmres"
    elif 0 <= products["normal_cg"] <= few or _everywhere(spectrum.symmetric):
        name = "normal_cg"
    else:
        name = "gmres"
    expected = products["normal_cg"] if name == "gmres" and products[name] < 0 else products[name]
    if size <= MOST_ENTRIES and (expected > products["dense"] or expected < 0):
        name = "dense"
    return Choice(name, products)


def make_solver(
    name: str, maxiter: int = 1000, rtol: float | None = None, atol: float = 0.0
) -> AbstractLinearSolver:
    """The solver of a choice."""
    if name == "dense":
        return Dense()
    if name == "gmres":
        return GMRES(maxiter, None, rtol, atol)
    if name == "normal_cg":
        return NormalCG(maxiter, rtol, atol)
    return CG(maxiter, rtol, atol) if name == "cg" else FixedPoint(maxiter, rtol, atol)


def condition_number(spectrum: Spectrum) -> Estimate:
    """The ratio of the extreme singular values; Inf for a singular operator."""
    low, high = spectrum.sigma_min, spectrum.sigma_max
    singular = low.value <= torch.finfo(low.value.dtype).eps * high.value
    kappa = torch.where(singular, torch.inf, high.value / low.value)
    relative = low.uncertainty / low.value + high.uncertainty / high.value
    return Estimate(kappa, torch.where(singular, torch.inf, kappa * relative))


def _cg_steps(root: Tensor, accuracy: float) -> Tensor:
    """The ``K`` with ``2 root ((root - 1) / (root + 1))^K`` at the accuracy."""
    return _steps(accuracy / (2 * root), (root - 1) / (root + 1))


def _steps(accuracy: float | Tensor, rate: Tensor) -> Tensor:
    """The least ``K`` with ``rate^K <= accuracy``, and one at least."""
    goal = torch.as_tensor(accuracy, dtype=rate.dtype, device=rate.device)
    return (goal.log() / rate.clamp(1e-30, 1 - 1e-15).log()).ceil().clamp_min(1)


def _everywhere(flag: Tensor) -> bool:
    return batching.all_true(flag.all())


def _total(count: Tensor) -> int:
    whole = torch.nan_to_num(count, nan=0.0, posinf=1e12).clamp(0, 1e12).to(torch.int64)
    return batching.count_true(whole.sum())
