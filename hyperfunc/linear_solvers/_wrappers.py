"""Solvers made from solvers: damping, a second try, independent blocks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperfunc._engine import loop, trees
from hyperfunc._engine.checks import check_flags, check_number
from hyperfunc._engine.random_vectors import random_uniform
from hyperfunc._engine.results import RESULTS, UNFINISHED, ChoiceStats, SolveStats, code_where
from hyperfunc._engine.shown import show
from hyperfunc._engine.trees import ravel, unravel
from hyperfunc._types import Leaves
from hyperfunc.linear_solvers._base import AbstractLinearSolver, LinearOperator, Solved
from hyperfunc.linear_solvers._units import in_units

Blocks = Literal["children", "leaves", "batch"]


@dataclasses.dataclass(frozen=True)
class Damped(AbstractLinearSolver):
    """Solves ``(A + damping I) x = b`` in place of ``A x = b``.

    A damping above the size of the most negative eigenvalue makes a symmetric operator positive
    definite, as CG needs it, and any damping bounds the solution of a nearly singular system, at a
    relative bias of about ``damping ||A^{-1}||``. The statistics are those of the damped system.

    Args:
        solver: the linear solver for the damped system.
        damping: > 0.

    Example:
        >>> A = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> hf.Damped(hf.CG(), damping=1.0).solve(operator, (torch.tensor([1.0, 1.0]),))[0]
        (tensor([1.0000, 0.5000]),)

    References:
        Martens, Deep learning via Hessian-free optimization, 2010.
    """

    solver: AbstractLinearSolver
    damping: float

    def __post_init__(self) -> None:
        check_solver(self, "solver", self.solver)
        check_number(self, "damping", self.damping, above=True)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        damped = dataclasses.replace(operator, shift=operator.shift + self.damping)
        return self.solver.solve(damped, b, x0)


@dataclasses.dataclass(frozen=True)
class Fallback(AbstractLinearSolver):
    """Solves with ``first``, and with ``then`` where that one did not succeed.

    The step limit counts as no success. The second solver starts where the first one did. Under
    ``vmap`` it runs if some task needs it; ``num_steps`` adds up the steps of both. Where neither
    succeeds, the answer is the one with the smaller residual, found by one product for each, and
    the step limit is what is reported if one of them has reached it, as that is no failure. It
    takes one host synchronisation, and one more where the second runs.

    Args:
        first: the linear solver to try.
        then: the linear solver for what is left; a `Fallback` again for a third.

    ``Solution.stats`` is a `ChoiceStats`, which says whose answer it is.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> operator = hf.linear_solvers.LinearOperator.from_matrix(A)
        >>> solver = hf.Fallback(hf.CG(), hf.GMRES())
        >>> solver.solve(operator, (torch.tensor([4.0, 3.0]),))[0]
        (tensor([-3.,  2.]),)
    """

    first: AbstractLinearSolver
    then: AbstractLinearSolver

    def __post_init__(self) -> None:
        check_solver(self, "first", self.first)
        check_solver(self, "then", self.then)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        x, stats = self.solve_and_tell(operator, b, x0)
        return x, SolveStats(*stats[:3])

    @in_units
    def solve_and_tell(
        self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None
    ) -> tuple[Leaves, ChoiceStats]:
        """`solve`, with the choice in the statistics."""
        x, stats = self.first.solve(operator, b, x0)
        first = ChoiceStats(*stats, torch.zeros_like(stats.result))
        open_ = stats.result != int(RESULTS.success)
        return try_next(self.then, 1, open_, operator, b, x0, x, first)


def try_next(
    solver: AbstractLinearSolver,
    index: int,
    open_: Tensor,
    operator: LinearOperator,
    b: Leaves,
    x0: Leaves | None,
    x: Leaves,
    stats: ChoiceStats,
) -> tuple[Leaves, ChoiceStats]:
    """Solve the tasks that are open, and keep the better answer of each."""
    open_ = open_ & (stats.result != UNFINISHED)

    def attempt(found: tuple[Leaves, ChoiceStats]) -> tuple[Leaves, ChoiceStats]:
        x, stats = found
        # what is solved becomes a system with the solution zero, which takes no steps
        zeros = trees.zeros_like(b)
        start = None if x0 is None else trees.where(open_, x0, zeros)
        y, (num_steps, norm, code, *_) = solver.solve(operator, trees.where(open_, b, zeros), start)

        def compare(_: Any) -> Any:
            """Who is better off, the norms of the residuals of both, and their codes."""
            old, norm = (trees.norm(operator.residual(v, b)) for v in (x, y))
            better = open_ & ((code == int(RESULTS.success)) | ~(norm >= old))
            better = better & (torch.isfinite(norm) | ~torch.isfinite(old))
            kept = open_ & ~better
            no_failure = kept & (code == int(RESULTS.max_steps))
            spared = better & (stats.result == int(RESULTS.max_steps))
            failed = code > int(RESULTS.max_steps)
            return (
                better,
                torch.where(kept, old, stats.residual_norm),
                norm,
                code_where(no_failure, RESULTS.max_steps, stats.result),
                code_where(spared & failed, RESULTS.max_steps, code),
            )

        untested = open_, stats.residual_norm, norm, stats.result, code
        failed = open_ & (code != int(RESULTS.success))
        better, old, new, old_code, new_code = loop.when(failed, compare, untested)
        result = torch.where(better, new_code, old_code)
        merged = ChoiceStats(
            torch.where(open_, stats.num_steps + num_steps, stats.num_steps),
            torch.where(better, new, old),
            torch.where(open_ & (code == UNFINISHED), UNFINISHED, result),
            torch.where(better, index, stats.choice),
        )
        return trees.where(better, y, x), merged

    return loop.when(open_, attempt, (x, stats))


@dataclasses.dataclass(frozen=True)
class Blockwise(AbstractLinearSolver):
    """Solves for blocks of params that do not interact, each with scalars of its own.

    Where the operator is block diagonal, one product gives that of each block. The wrapped solver
    runs on all blocks at once, as under ``vmap``: step lengths, stopping and breakdown are decided
    for each, and the number of steps is that of the hardest block, not of all eigenvalues together.
    `Dense` takes as many products as the largest block has entries.

    Args:
        solver: the linear solver for one block.
        blocks: what a block is. ``"children"``: the subtree under each key or index at the top of
            params; ``"leaves"``: each leaf; ``"batch"``: each index of the first dimension, which
            all leaves share. The first two pad each block to the size of the largest.
        step_sizes: a factor > 0 for each block, by which its equations are scaled: with
            ``FixedPoint(step_size=1)`` its step size.
        check_blocks: whether to spend two products on the test ``A (D v) = D (A v)`` for a random
            vector ``v`` and a random factor ``D`` for each block; failing it is a breakdown.

    The statistics are the largest number of steps, the norm of all residuals together, and the
    result of the block with the highest code. A preconditioner of the solver is built for blocks.

    Example:
        >>> matrices = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[9.0, 3.0], [3.0, 8.0]]])
        >>> def product(v):  # params: one leaf with a dimension of tasks
        ...     return (torch.einsum("tij,tj->ti", matrices, v[0]),)
        >>> operator = hf.linear_solvers.LinearOperator(product, product, symmetric=True)
        >>> b = (torch.tensor([[2.0, 3.0], [12.0, 11.0]]),)
        >>> x, stats = hf.Blockwise(hf.CG(), blocks="batch").solve(operator, b)
        >>> x
        (tensor([[1.0000, 3.0000],
            [1.0000, 1.0000]]),)
        >>> stats.num_steps  # of four eigenvalues in all
        tensor(2)
    """

    solver: AbstractLinearSolver
    blocks: Blocks = "children"
    step_sizes: tuple[float, ...] | None = None
    check_blocks: bool = False

    def __post_init__(self) -> None:
        check_solver(self, "solver", self.solver)
        check_flags(self, check_blocks=self.check_blocks)
        if self.blocks not in get_args(Blocks):
            names = ", ".join(map(repr, get_args(Blocks)))
            raise ValueError(f"Blockwise: blocks is {show(self.blocks)}; expected one of {names}")
        if self.step_sizes is not None and not isinstance(self.step_sizes, tuple):
            raise TypeError(
                f"Blockwise: step_sizes is {show(self.step_sizes)}; expected a tuple of numbers > 0"
            )
        for index, step in enumerate(self.step_sizes or ()):
            check_number(self, f"step_sizes[{index}]", step, above=True)

    def solve(self, operator: LinearOperator, b: Leaves, x0: Leaves | None = None) -> Solved:
        layout = _make_layout(self.blocks, operator, b)
        factors = self._factors(layout.num_blocks, b)

        def lifted(product: Callable[[Leaves], Leaves]) -> Callable[[Leaves], Leaves]:
            return lambda v: _scale(factors, layout.complete(product(layout.merge(v)), v))

        product, transposed = lifted(operator.mv), lifted(operator.T.mv)

        def solve_block(rhs: Leaves, start: Leaves) -> Solved:
            block = LinearOperator(
                lambda v: _JointProduct.apply(product, rhs[0], *v),
                lambda v: _JointProduct.apply(transposed, rhs[0], *v),
                symmetric=operator.symmetric,
                spec=operator.spec if self.blocks == "batch" else None,
            )
            return self.solver.solve(block, rhs, start or None)

        rhs = _scale(factors, layout.split(b))
        start = () if x0 is None else layout.split(x0)
        solution, (num_steps, residual_norm, result) = torch.func.vmap(solve_block)(rhs, start)
        if factors is not None:
            residual_norm = residual_norm / factors
        result = result.amax(0)
        if self.check_blocks:
            separate = _seem_separate(product, rhs, layout.num_blocks)
            result = code_where(separate, result, RESULTS.breakdown)
        residual_norm = torch.linalg.vector_norm(residual_norm)
        return layout.merge(solution), SolveStats(num_steps.amax(0), residual_norm, result)

    def _factors(self, num_blocks: int, b: Leaves) -> Tensor | None:
        if self.step_sizes is None:
            return None
        if len(self.step_sizes) != num_blocks:
            raise ValueError(
                f"Blockwise: step_sizes has {len(self.step_sizes)} numbers, but params have "
                f"{num_blocks} blocks (blocks={show(self.blocks)}); expected one for each"
            )
        dtype = trees.accumulation_dtype(b)
        return torch.tensor(self.step_sizes, dtype=dtype, device=b[0].device)


class _JointProduct(torch.autograd.Function):
    """A product for all blocks, called for one inside ``vmap``, where the anchor is batched."""

    @staticmethod
    def forward(product: Any, anchor: Tensor, *v: Tensor) -> Leaves:
        raise AssertionError("called outside the vmap over blocks")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, product: Any, anchor: Tensor, *v: Tensor) -> Any:
        stacked = tuple(
            leaf.expand(info.batch_size, *leaf.shape) if dim is None else leaf.movedim(dim, 0)
            for leaf, dim in zip(v, in_dims[2:], strict=True)
        )
        if in_dims[1] is None:  # not the vmap over blocks, but one of several vectors in it
            each = [
                _JointProduct.apply(product, anchor, *row) for row in zip(*stacked, strict=True)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(v)
        return product(stacked), (0,) * len(v)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the leaves of params are stacked into blocks, and what is padding there."""

    num_blocks: int
    split: Callable[[Leaves], Leaves]
    merge: Callable[[Leaves], Leaves]
    padding: Tensor | None

    def complete(self, product: Leaves, v: Leaves) -> Leaves:
        """The product in blocks; the operator is the identity on the padding."""
        stacked = self.split(product)
        return stacked if self.padding is None else trees.where(self.padding, v, stacked)


def check_solver(owner: object, field: str, solver: object) -> None:
    """Raise unless a field is a linear solver."""
    if isinstance(solver, AbstractLinearSolver):
        return
    name = type(owner).__name__
    if isinstance(solver, type) and issubclass(solver, AbstractLinearSolver):
        raise TypeError(
            f"{name}: {field} is the class {solver.__name__}; expected an object. "
            f"Write hf.{solver.__name__}()"
        )
    raise TypeError(
        f"{name}: {field} is {show(solver)}; expected a linear solver such as hf.CG(maxiter=20)"
    )


def _make_layout(blocks: Blocks, operator: LinearOperator, b: Leaves) -> _Layout:
    spec = operator.structure(b)
    if blocks == "batch":
        _check_first_dimension(b, trees.paths(spec, "params"))
        return _Layout(b[0].shape[0], lambda v: v, lambda v: v, None)
    counts = [1] * len(b) if blocks == "leaves" else [c.num_leaves for c in spec.children()]
    if not counts:
        raise ValueError(
            "Blockwise: blocks is 'children', but params is a single tensor; expected a tree. "
            "Write blocks='batch' if its first dimension counts blocks"
        )
    stops = list(itertools.accumulate(counts))
    groups = [slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True) if count]
    sizes = [sum(leaf.numel() for leaf in b[group]) for group in groups]
    largest, device = max(sizes), b[0].device
    dtype = functools.reduce(torch.promote_types, (leaf.dtype for leaf in b))

    def split(v: Leaves) -> Leaves:
        rows = [ravel(v[group], dtype).to(device) for group in groups]
        pad = torch.nn.functional.pad
        return (torch.stack([pad(row, (0, largest - len(row))) for row in rows]),)

    def merge(stacked: Leaves) -> Leaves:
        parts = zip(stacked[0], sizes, groups, strict=True)
        return tuple(leaf for row, size, group in parts for leaf in unravel(row[:size], b[group]))

    positions = torch.arange(largest, device=device)
    padding = positions >= torch.tensor(sizes, device=device)[:, None]
    return _Layout(len(groups), split, merge, padding if min(sizes) < largest else None)


def _check_first_dimension(b: Leaves, paths: list[str]) -> None:
    for leaf, path in zip(b, paths, strict=True):
        if leaf.ndim == 0:
            fault = f"{path} is a scalar (0-d); expected a first dimension that counts blocks"
        elif leaf.shape[0] != b[0].shape[0]:
            shapes = f"{tuple(b[0].shape)} and {path} has shape {tuple(leaf.shape)}"
            fault = f"{paths[0]} has shape {shapes}; expected the same first dimension"
        else:
            continue
        raise ValueError(f"Blockwise: blocks is 'batch', but {fault}")


def _scale(factors: Tensor | None, stacked: Leaves) -> Leaves:
    if factors is None:
        return stacked
    return tuple(leaf * factors.to(leaf).reshape(-1, *[1] * (leaf.ndim - 1)) for leaf in stacked)


def _seem_separate(product: Callable[[Leaves], Leaves], like: Leaves, num_blocks: int) -> Tensor:
    v = random_uniform(like, 0)
    (factors,) = random_uniform((like[0].new_ones(num_blocks),), 1)
    one, other = _scale(factors, product(v)), product(_scale(factors, v))
    gap, size = trees.norm(trees.sub(one, other)), trees.norm(one) + trees.norm(other)
    return torch.le(gap, trees.epsilon(like) ** 0.75 * size)
