"""Preconditioners: cheap approximations of the inverse of an operator."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._engine.random_vectors import random_signs
from hyperfunc._engine.shown import show
from hyperfunc._engine.trees import ravel, ravel_local, unravel
from hyperfunc._torch import tracking
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.linear_solvers._base import (
    AbstractLinearSolver,
    IterativeLinearSolver,
    LinearOperator,
    parts,
)

_WRITE_A_PAIR = (
    "Write preconditioner=(M, MT), with M close to the inverse of A, the Jacobian of the "
    "condition, and MT its transpose; or take an object such as hf.JacobiPreconditioner()"
)


class AbstractPreconditioner(abc.ABC):
    """What builds an approximate inverse for each solve; a subclass is a frozen dataclass."""

    @abc.abstractmethod
    def prepare(self, operator: LinearOperator, b: Leaves) -> Callable[[Leaves], Leaves]:
        """Build the map ``r -> M r`` with ``M`` close to ``A^{-1}``.

        Args:
            operator: the operator ``A`` of the system that is about to be solved.
            b: its right-hand side, a tuple of leaves.

        Returns:
            A linear function of tuples of leaves like ``b``, the same in every call.
        """


Linear: TypeAlias = Callable[[TensorTree], TensorTree]
Preconditioner: TypeAlias = AbstractPreconditioner | Linear | tuple[Linear, Linear]
"""An object with `AbstractPreconditioner.prepare`, a linear function of trees like params, or two:
close to the inverse of ``A``, and to that of ``A^T``, with ``A`` the Jacobian of the condition."""


@dataclasses.dataclass(frozen=True)
class JacobiPreconditioner(AbstractPreconditioner):
    """Divides by an estimate of the diagonal of the operator.

    Hutchinson's estimate is the mean of ``z * (A z)`` over vectors ``z`` of random signs, exact for
    a diagonal operator. Elsewhere the error is about ``|a_i| / sqrt(num_probes)`` at most, with the
    norm of the row; a smaller entry is replaced by that, so that the inverse is positive and
    bounded. It pays where the rows of ``A`` differ much in scale.

    Args:
        num_probes: products to spend in each solve, >= 1.
        seed: of the signs, which are the same for each task of ``vmap``; >= 0.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 100.0, 10000.0]))
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> solver = hf.CG(maxiter=1, preconditioner=hf.JacobiPreconditioner(num_probes=1))
        >>> solver.solve(operator, (torch.ones(3),))[0]
        (tensor([1.0000e+00, 1.0000e-02, 1.0000e-04]),)

    References:
        Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007.
    """

    num_probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "num_probes", self.num_probes)
        check_count(self, "seed", self.seed, 0)

    def prepare(self, operator: LinearOperator, b: Leaves) -> Callable[[Leaves], Leaves]:
        scale = self.scale(operator, b)
        inverse = unravel(torch.where(scale > 0, 1 / scale, 1.0), b)
        return lambda r: tuple(d * leaf for d, leaf in zip(inverse, r, strict=True))

    def scale(self, operator: LinearOperator, b: Leaves) -> Tensor:
        """The estimate of the absolute diagonal, for the entries that this rank holds."""
        dtype = trees.accumulation_dtype(b)
        diagonal = length = torch.zeros((), dtype=dtype, device=b[0].device)
        for probe in range(self.num_probes):
            signs = random_signs(b, self.seed * self.num_probes + probe)
            product = ravel_local(operator.mv(signs), dtype)
            diagonal = diagonal + product * ravel_local(signs, dtype) / self.num_probes
            length = torch.hypot(length, product)  # whose square may overflow
        return torch.maximum(diagonal.abs(), length / self.num_probes)


@dataclasses.dataclass(frozen=True)
class NystromPreconditioner(AbstractPreconditioner):
    r"""Inverts a randomised low-rank approximation of a symmetric positive definite operator.

    With the Nystrom approximation :math:`U \Lambda U^\top` of :math:`A - \mu I` from ``rank``
    products, the preconditioner is

    .. math::
        M = (\lambda_k + \mu) \, U (\Lambda + \mu I)^{-1} U^\top + (I - U U^\top),

    with :math:`\lambda_k` the smallest of the eigenvalues :math:`\Lambda` that is not rounding
    noise. It suits `CG` where few eigenvalues are large and the others are close to each other.

    Args:
        rank: products to spend in each solve and vectors to keep, from 1 to the number of inner
            parameters; by default 10, or that number if it is smaller.
        damping: :math:`\mu \ge 0`, a multiple of the identity that the operator contains, such as
            the weight of a squared norm in the inner loss, or the damping of `Damped`.
        seed: of the test vectors, which are the same for each task of ``vmap``; >= 0.

    An operator that turns out not to be positive definite is left without preconditioner.

    Example:
        >>> A = torch.diag(torch.tensor([10000.0, 100.0, 1.0, 1.0]))
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> preconditioner = hf.NystromPreconditioner(rank=4)
        >>> solver = hf.CG(rtol=1e-3, preconditioner=preconditioner)
        >>> solver.solve(operator, (torch.ones(4),))[1].num_steps
        tensor(1)

    References:
        Frangella, Tropp and Udell, Randomized Nystrom preconditioning, arXiv 2110.02820,
        algorithm 2.1 and equation 1.3, with random signs as test vectors.
    """

    rank: int | None = None
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None:
            check_count(self, "rank", self.rank)
        check_number(self, "damping", self.damping)
        check_count(self, "seed", self.seed, 0)

    def prepare(self, operator: LinearOperator, b: Leaves) -> Callable[[Leaves], Leaves]:
        rank = resolve_count(self, "rank", self.rank, 10, b)
        dtype = trees.accumulation_dtype(b)
        seeds = range(self.seed * rank, (self.seed + 1) * rank)
        signs = torch.stack([ravel(random_signs(b, seed), dtype) for seed in seeds]).mT
        tests = torch.linalg.qr(signs)[0]
        sketch = torch.stack([ravel(operator.mv(unravel(test, b)), dtype) for test in tests.mT]).mT
        sketch = sketch - self.damping * tests
        # the small shift makes the factorisation succeed on an operator of low rank
        shift = rank * trees.epsilon(b) * torch.linalg.matrix_norm(sketch)
        sketch = sketch + shift * tests
        core = tests.mT @ sketch
        factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        half = torch.linalg.solve_triangular(factor.mT, sketch, upper=True, left=False)
        usable = (info == 0) & torch.isfinite(half).all()
        # svd raises on what is not finite
        half = torch.where(usable, half, 0.0)
        vectors, values, _ = torch.linalg.svd(half, full_matrices=False)
        eigenvalues = (values**2 - shift).clamp_min(0) + self.damping
        # an eigenvalue that is rounding noise would spoil the scale of the others
        kept = usable & (eigenvalues > shift)
        smallest = torch.where(kept, eigenvalues, torch.inf).amin()
        change = torch.where(kept, smallest / eigenvalues - 1, 0.0)

        def apply(r: Leaves) -> Leaves:
            flat = ravel(r, dtype)
            return unravel(flat + vectors @ (change * (vectors.mT @ flat)), b)

        return apply


@dataclasses.dataclass(frozen=True)
class PreconditionedSolver(IterativeLinearSolver):
    """An iterative solver that takes a preconditioner; see `CG`."""

    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preconditioner(self)


def prepare(
    preconditioner: Preconditioner | None, operator: LinearOperator, b: Leaves
) -> Callable[[Leaves], Leaves] | None:
    """The approximate inverse for one solve, or None for the identity."""
    if isinstance(preconditioner, AbstractPreconditioner):
        return preconditioner.prepare(operator, b)
    if preconditioner is None:
        return None
    if isinstance(preconditioner, tuple):
        preconditioner = preconditioner[operator.transposed]
    return functools.partial(_apply, preconditioner, operator.structure(b))


def prepare_normal(
    preconditioner: Preconditioner | None, operator: LinearOperator, b: Leaves
) -> Callable[[Leaves], Leaves] | None:
    """The approximate inverse of ``A^T A`` for one solve, or None for the identity."""
    if isinstance(preconditioner, AbstractPreconditioner):
        return preconditioner.prepare(operator.normal(), b)
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, tuple) and not operator.symmetric:
        raise ValueError(
            "NormalCG: preconditioner is one function, but A is not known to be symmetric, and the "
            f"normal equations need an approximation of the inverse of A^T too. {_WRITE_A_PAIR}"
        )
    inverse, transposed = (prepare(preconditioner, side, b) for side in (operator, operator.T))
    assert inverse is not None
    assert transposed is not None
    return lambda r: inverse(transposed(r))


@torch.no_grad()
def _apply(function: Linear, spec: trees.TreeSpec, r: Leaves) -> Leaves:
    """A user's function on leaves."""
    try:
        output = function(trees.unflatten(spec, r))
    except RuntimeError as error:
        if tracking.escaped(error):
            raise ValueError(
                "the preconditioner uses a tensor that was made inside an enclosing torch.func "
                "transform, which it runs outside of. Make it of tensors from outside, or take "
                "an object such as hf.JacobiPreconditioner(), which is built in each solve"
            ) from error
        raise
    leaves, output_spec = trees.flatten(output)
    trees.check_like(leaves, output_spec, r, spec, "the output of the preconditioner", "params")
    return tuple(leaves)


def refuse_one_direction(solver: AbstractLinearSolver) -> None:
    """Raise if a solver, or one inside it, has a preconditioner for the other direction only."""
    for each in parts(solver):
        lone = callable(getattr(each, "preconditioner", None))
        if lone and not getattr(each, "symmetric_only", False):
            raise ValueError(
                f"{type(each).__name__}: preconditioner is one function, which stands for the "
                f"inverse of A^T in the adjoint system. A derivative in forward mode, or a second "
                f"one, solves with A itself, which is not known to be symmetric. {_WRITE_A_PAIR}"
            )


def check_preconditioner(solver: Any) -> None:
    """Raise for what cannot be a preconditioner."""
    preconditioner, name = solver.preconditioner, type(solver).__name__
    if preconditioner is None or isinstance(preconditioner, AbstractPreconditioner):
        return
    if isinstance(preconditioner, type):
        raise TypeError(
            f"{name}: preconditioner is the class {preconditioner.__name__}; expected an object. "
            f"Write preconditioner=hf.{preconditioner.__name__}()"
        )
    both = isinstance(preconditioner, tuple) and len(preconditioner) == 2
    if not all(map(callable, preconditioner if both else (preconditioner,))):
        raise TypeError(
            f"{name}: preconditioner is {show(preconditioner)}; "
            f"expected a linear function of trees "
            f"like params, a pair of them, or an object such as hf.JacobiPreconditioner()"
        )


def resolve_count(owner: object, name: str, value: int | None, default: int, b: Leaves) -> int:
    """A number of vectors, with an error if it exceeds the dimension, which bounds the default."""
    dimension = sum(leaf.numel() for leaf in b)
    if value is not None and value > dimension:
        raise ValueError(
            f"{type(owner).__name__}: {name} is {value}, but params have {dimension} entries in "
            f"all; expected {name} <= {dimension}"
        )
    return min(default, dimension) if value is None else value
