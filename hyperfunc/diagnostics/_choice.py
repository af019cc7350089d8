"""The rates by which methods are compared, and the choice that facts of an operator call for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._torch import batching
from hyperfunc.linear_solvers import CG, GMRES, AbstractLinearSolver, Dense, FixedPoint, NormalCG
from hyperfunc.linear_solvers._auto import MOST_ENTRIES
from hyperfunc.linear_solvers._spectrum import Estimate, Spectrum

FEW_PRODUCTS = 30  # products up to which a plain fixed-point iteration is good enough


class Choice(NamedTuple):
    """The name of a solver, and the products of each over all tasks, -1 where it does not apply."""

    name: str
    products: dict[str, int]


def choose(spectrum: Spectrum, size: int, is_map: bool, accuracy: float) -> Choice:
    r"""Choose a solver for the operators of all tasks, inside or outside of `vmap`.

    With the condition number :math:`\kappa`, the contraction factor :math:`q` of a map, and the
    relative error :math:`\epsilon`, the first that applies:

    1. symmetric without negative curvature: `CG`, about
       :math:`\log(2 \sqrt\kappa / \epsilon) / \log\frac{\sqrt\kappa + 1}{\sqrt\kappa - 1}`
       products;
    2. a fixed-point map with :math:`q < 1` that needs 30 products or fewer: `FixedPoint`,
       :math:`\log \epsilon / \log q` products;
    3. any other map with :math:`q < 1`: `GMRES`, at most as many;
    4. symmetric, or :math:`\kappa` so small that it takes 30 products or fewer: `NormalCG`, with
       the rate of `CG` for :math:`\kappa^2`, and two products a step;
    5. otherwise `GMRES`, for which there is no such rate.

    Where that is expected to take more products than there are inner parameters, and these are 256
    or fewer, the choice is `Dense`.
    """
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


def make_solver(name: str, maxiter: int, rtol: float | None) -> AbstractLinearSolver:
    """The solver of a choice."""
    if name == "dense":
        return Dense()
    if name == "gmres":
        return GMRES(maxiter, rtol=rtol)
    if name == "normal_cg":
        return NormalCG(maxiter, rtol)
    return CG(maxiter, rtol) if name == "cg" else FixedPoint(maxiter, rtol)


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
