"""What products tell of an operator: symmetry, eigenvalues, singular values, contraction.

All estimates come from Krylov spaces of random vectors, by the Rayleigh-Ritz procedure on a basis
that is orthogonalised in full, and each carries the uncertainty that its own residual gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.random_vectors import random_signs, random_uniform
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._torch import batching
from hyperfunc._torch.containers import loadable
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import LinearOperator

PROBES = 3


@loadable
class Estimate(NamedTuple):
    """A number and how far off it may be, as two 0-d tensors.

    For an extreme eigenvalue or singular value the uncertainty is ``min(r, 4 r^2 / gap)`` with the
    norm ``r`` of its residual and the gap to the next Ritz value. A value whose vector the random
    start has no part of is missed.
    """

    value: Tensor
    uncertainty: Tensor

    @property
    def upper(self) -> Tensor:
        return self.value + self.uncertainty

    @property
    def lower(self) -> Tensor:
        return self.value - self.uncertainty


class Spectrum(NamedTuple):
    """What was measured of an operator ``A``; what was not is NaN.

    The asymmetry is ``||A - A^T|| / ||A||`` in the Frobenius norm. Eigenvalues and curvature signs
    (int64: how many Ritz values are negative, zero up to rounding, positive) are those of the
    symmetric part ``(A + A^T) / 2``, the contraction is the norm of ``I - step_size A``.
    """

    asymmetry: Estimate
    symmetric: Tensor
    eig_min: Estimate
    eig_max: Estimate
    curvature_signs: Tensor
    sigma_min: Estimate
    sigma_max: Estimate
    step_size: Tensor
    contraction: Estimate
    spectral_radius: Estimate
    num_products: Tensor


def measure(
    operator: LinearOperator,
    like: Leaves,
    num_steps: int,
    *,
    is_map: bool,
    full: bool,
    seed: int = 0,
) -> Spectrum:
    """Measure an operator, ``I - J`` with ``is_map``: what a choice depends on, or all if full."""
    num_steps = min(num_steps, sum(leaf.numel() for leaf in like))
    nan = torch.full((), torch.nan, dtype=trees.accumulation_dtype(like), device=like[0].device)
    zero, unknown = torch.zeros_like(nan), Estimate(nan, nan)
    asymmetry, count = Estimate(zero, zero), 0
    if not operator.symmetric:
        asymmetry, count = _asymmetry(operator, like, seed), 2 * PROBES
    symmetric = asymmetry.value <= 10 * trees.epsilon(like) ** 0.75
    known = batching.all_true(symmetric)
    eig_min = eig_max = contraction = radius = unknown
    signs = torch.zeros_like(nan, dtype=torch.int64).expand(3)
    if known or full:
        product = operator.mv if known else operator.symmetric_part
        ritz = eigenvalues(product, like, num_steps, seed)
        count += num_steps if known else 2 * num_steps
        eig_min, eig_max, sigma_min, sigma_max = ritz.extremes()
        signs = ritz.signs()
    if not known:
        sigma_min, sigma_max = singular_values(operator.gram, like, num_steps, seed)
        count += 2 * num_steps
    step_size = _step_size(is_map, eig_min, eig_max, sigma_max, symmetric)
    step = LinearOperator(
        lambda v: trees.axpy(-step_size, operator.mv(v), v),
        lambda v: trees.axpy(-step_size, operator.T.mv(v), v),
    )
    if known:
        contraction = radius = ritz.largest(torch.ones_like(zero), -step_size)
    elif full or is_map:
        _, contraction = singular_values(step.gram, like, num_steps, seed)
        count += 2 * num_steps
    if full and not known:
        radius = spectral_radius(step.mv, like, num_steps, seed)
        count += num_steps
    return Spectrum(
        asymmetry=asymmetry,
        symmetric=symmetric,
        eig_min=eig_min,
        eig_max=eig_max,
        curvature_signs=signs,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        step_size=step_size,
        contraction=contraction,
        spectral_radius=radius,
        num_products=torch.full_like(zero, count, dtype=torch.int64),
    )


class Ritz(NamedTuple):
    """The Ritz values of a symmetric operator in increasing order, and their uncertainties."""

    values: Tensor
    uncertainties: Tensor
    rounding: Tensor

    def extremes(self) -> tuple[Estimate, Estimate, Estimate, Estimate]:
        """The least and the greatest value, then those in absolute value."""
        least, greatest = (Estimate(self.values[i], self.uncertainties[i]) for i in (0, -1))
        one = torch.ones_like(least.value)
        return least, greatest, self._smallest(least, greatest), self.largest(0 * one, one)

    def largest(self, shift: Tensor, slope: Tensor) -> Estimate:
        """The largest ``|shift + slope theta|`` over the spectrum, which one of its ends has."""
        sizes = (shift + slope * self.values[[0, -1]]).abs()
        value = sizes.amax()
        upper = (sizes + slope.abs() * self.uncertainties[[0, -1]]).amax()
        return Estimate(value, upper - value)

    def signs(self) -> Tensor:
        """How many values are negative, zero up to rounding, and positive."""
        zero = self.values.abs() <= self.rounding
        flags = torch.stack([(self.values < 0) & ~zero, zero, (self.values > 0) & ~zero])
        return flags.sum(-1)

    def _smallest(self, least: Estimate, greatest: Estimate) -> Estimate:
        sizes = self.values.abs()
        index = sizes.argmin(keepdim=True)
        inner = self.uncertainties.gather(0, index).squeeze(0)
        # an interval of values between the ends may hold an eigenvalue that no Ritz value is near
        definite = least.value * greatest.value > 0
        complete = self.uncertainties.amax() <= 10 * self.rounding
        uncertainty = torch.where(definite | complete, inner, torch.maximum(inner, sizes.amin()))
        return Estimate(sizes.amin(), uncertainty)


def eigenvalues(
    product: Callable[[Leaves], Leaves], like: Leaves, num_steps: int, seed: int = 0
) -> Ritz:
    """Ritz values of a symmetric operator by Lanczos' method."""
    basis, images, _, finite = _krylov(lambda v: (product(v),) * 2, like, num_steps, seed)
    matrix = basis @ images.mT
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    residual = vectors.mT @ images - values[:, None] * (vectors.mT @ basis)
    rounding = _rounding(values.abs().amax(), like)
    uncertainties = _sharpen(torch.linalg.vector_norm(residual, dim=1), values, rounding)
    return Ritz(*_where_finite(finite, values, uncertainties), rounding)


def singular_values(
    gram: Callable[[Leaves], tuple[Leaves, Leaves]], like: Leaves, num_steps: int, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """The smallest and the largest singular value of ``M``, from ``v -> (M v, M^T M v)``."""
    basis, images, seconds, finite = _krylov(gram, like, num_steps, seed)
    # the singular values of M on the space, without the squares of M^T M
    _, values, rows = torch.linalg.svd(images.mT, full_matrices=False)
    # in fewer dimensions than the space has, some vectors go to zero
    missing = basis.shape[0] - values.shape[0]
    column = values[:, None]
    floor = torch.finfo(values.dtype).tiny
    residual = (rows @ seconds) / column.clamp_min(floor) - column * (rows @ basis)
    rounding = _rounding(values.amax(), like)
    norms = torch.where(values > rounding, torch.linalg.vector_norm(residual, dim=1), rounding)
    values = values.flip(0)
    ends = _where_finite(finite, values, _sharpen(norms.flip(0), values, rounding))
    smallest, largest = (Estimate(*(part[i] for part in ends)) for i in (0, -1))
    return Estimate(torch.zeros_like(rounding), rounding) if missing else smallest, largest


def spectral_radius(
    product: Callable[[Leaves], Leaves], like: Leaves, num_steps: int, seed: int = 0
) -> Estimate:
    """By Arnoldi's method: the Ritz values of the Krylov space, and the residual of the largest."""
    basis, images, _, finite = _krylov(lambda v: (product(v),) * 2, like, num_steps, seed)
    values, vectors = torch.linalg.eig(basis @ images.mT)
    index = values.abs().argmax(keepdim=True)
    y = vectors.index_select(1, index)[:, 0]
    value = values.index_select(0, index)[0]
    residual = images.mT.to(y.dtype) @ y - value * (basis.mT.to(y.dtype) @ y)
    uncertainty = torch.linalg.vector_norm(residual) + _rounding(value.abs(), like)
    return Estimate(*_where_finite(finite, value.abs(), uncertainty))


def _where_finite(finite: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(finite, a, torch.nan), torch.where(finite, b, torch.nan)


def _krylov(
    apply: Callable[[Leaves], tuple[Leaves, Leaves]], like: Leaves, num_steps: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An orthonormal basis, its images, what extends it, and whether all of them are finite."""
    dtype = trees.accumulation_dtype(like)
    eps = torch.finfo(dtype).eps
    num_steps = min(num_steps, sum(leaf.numel() for leaf in like))
    start = ravel(random_uniform(like, seed), dtype)
    basis = (start / torch.linalg.vector_norm(start))[None]
    images, seconds = [], []
    for step in range(num_steps):
        image, second = apply(unravel(basis[-1], like))
        images.append(ravel(image, dtype))
        seconds.append(ravel(second, dtype))
        if step + 1 == num_steps:
            break
        vector = _orthogonal(seconds[-1], basis)
        fresh = _orthogonal(ravel(random_uniform(like, seed + step + 1), dtype), basis)
        noise = 100 * eps * torch.linalg.vector_norm(seconds[-1])
        # where the space is exhausted early, a new random vector goes on
        vector = torch.where(torch.linalg.vector_norm(vector) > noise, vector, fresh)
        vector = vector / torch.linalg.vector_norm(vector)
        basis = torch.cat([basis, _orthogonal(vector, basis)[None]])
    parts = basis, torch.stack(images), torch.stack(seconds)
    finite = torch.isfinite(parts[1]).all() & torch.isfinite(parts[2]).all()
    basis, image_rows, second_rows = (torch.where(finite, part, 0.0) for part in parts)
    return basis, image_rows, second_rows, finite


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _asymmetry(operator: LinearOperator, like: Leaves, seed: int) -> Estimate:
    """For random signs ``v`` the squared norm of ``M v`` has the mean ``||M||_F^2``."""
    gaps, sizes = [], []
    for probe in range(PROBES):
        v = random_signs(like, seed + probe)
        image, other = operator.mv(v), operator.T.mv(v)
        difference = trees.sub(image, other)
        gaps.append(trees.dot(difference, difference))
        sizes.append((trees.dot(image, image) + trees.dot(other, other)) / 2)
    gap, size = torch.stack(gaps), torch.stack(sizes).mean()
    scale = torch.where(size > 0, size, 1.0)
    value = (gap.mean() / scale).sqrt()
    spread = gap.std() / scale / PROBES**0.5
    error = torch.where(value > 0, spread / (2 * value), 0.0)
    return Estimate(value, error + 10 * trees.epsilon(like))


def _sharpen(residuals: Tensor, values: Tensor, rounding: Tensor) -> Tensor:
    """``min(r, 4 r^2 / gap)`` and rounding, for values in increasing order."""
    far = torch.full_like(values[:1], torch.inf)
    steps = values[1:] - values[:-1]
    gaps = torch.minimum(torch.cat([far, steps]), torch.cat([steps, far]))
    gaps = torch.where(torch.isfinite(gaps), gaps, 0.0).clamp_min(torch.finfo(values.dtype).tiny)
    sharp: Tensor = torch.minimum(residuals, 4 * residuals**2 / gaps) + rounding
    return sharp


def _rounding(scale: Tensor, like: Leaves) -> Tensor:
    size = sum(leaf.numel() for leaf in like)
    noise: Tensor = 10 * trees.epsilon(like) * size**0.5 * scale
    return noise


def _step_size(
    is_map: bool, eig_min: Estimate, eig_max: Estimate, sigma_max: Estimate, symmetric: Tensor
) -> Tensor:
    """1 for a map; else what contracts best, if the symmetric part is surely positive definite."""
    if is_map:
        return torch.ones_like(sigma_max.value)
    low, high, sigma = eig_min.value, eig_max.value, sigma_max.value
    best = torch.where(symmetric, 2 / (low + high), low / sigma**2)
    usual = torch.where(sigma > 0, 1 / sigma, 1.0)
    return torch.where((low > eig_min.uncertainty) & torch.isfinite(best), best, usual)
