"""Operators made from operators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, check_number
from hyperfunc._engine.convergence import warn_unless_converged
from hyperfunc._engine.results import RESULTS, SolveStats
from hyperfunc._torch import batching
from hyperfunc._types import TensorTree
from hyperfunc.optim._base import match_prefix
from hyperfunc.prox._base import check_prox


def joint(prox: Callable[..., TensorTree]) -> Callable[..., TensorTree]:
    r"""Apply an operator to all leaves as one vector, in flattening order.

    Args:
        prox: ``(params, hparams, lr) -> params``, called with a vector; such as
            ``hf.prox.l2_ball(3.0)``, which then bounds the norm of the whole tree.

    Raises:
        TypeError: ``prox`` is not a function, or is one that still makes an operator.

    Example:
        >>> hf.prox.joint(hf.prox.l2_ball())({"a": torch.tensor(3.0), "b": torch.tensor([4.0])})
        {'a': tensor(0.6000), 'b': tensor([0.8000])}
    """
    return _Joint(check_prox(prox, "prox.joint"))


def blocks(proxes: Any) -> Callable[..., TensorTree]:
    r"""Give parts of params their own operators, and all of them the same hparams.

    Args:
        proxes: a tree of operators with the structure of params cut off at any depth, such as
            ``{"weights": hf.prox.simplex(), "bias": hf.prox.identity()}``.

    Raises:
        TypeError: the tree holds something else than functions.
        ValueError: when called, the tree does not fit params.

    Example:
        >>> prox = hf.prox.blocks({"b": hf.prox.identity(), "w": hf.prox.l1(2.0)})
        >>> prox({"w": torch.tensor([5.0, 1.0]), "b": torch.tensor(1.0)}, None, 1.0)
        {'b': tensor(1.), 'w': tensor([3., 0.])}
    """
    for prox in trees.flatten(proxes)[0]:
        check_prox(prox, "prox.blocks")
    return _Blocks(proxes)


def chain(*proxes: Callable[..., TensorTree]) -> Callable[..., TensorTree]:
    r"""Apply operators one after another, the first one first.

    The result is the operator of the sum of their functions in these cases, among others, and in
    general it is not; the order counts:

    - `l1`, then `group_lasso`: the sparse group lasso;
    - `l1`, `elastic_net` or another convex function of each entry, then `non_negative` or `box`;
    - `non_negative`, then `group_lasso` or `l2_ball`; `l1`, then `l2_ball`;
    - a `group_lasso` for each of several nested groups, the smallest first: a tree of groups.

    For sets that meet otherwise see `intersection`; for a box and one equation, `box_section`.

    Args:
        proxes: each ``(params, hparams, lr) -> params``; with none, the identity.

    Raises:
        TypeError: one is not a function, or is one that still makes an operator.

    Example:
        >>> prox = hf.prox.chain(hf.prox.l1(1.0), hf.prox.group_lasso(2.5))
        >>> prox(torch.tensor([4.0, -5.0, 0.5]))
        tensor([ 1.5000, -2.0000,  0.0000])

    References:
        Yu, On decomposing the proximal map, 2013; Jenatton, Mairal, Obozinski and Bach, Proximal
        methods for hierarchical sparse coding, arXiv 1009.2139.
    """
    return _Chain(tuple(check_prox(prox, "prox.chain") for prox in proxes))


def intersection(
    *projections: Callable[..., TensorTree], maxiter: int = 1000, rtol: float = 1e-10
) -> Callable[..., TensorTree]:
    r"""The projection onto the points that several convex sets share, by Dykstra's algorithm.

    Each set has a memory :math:`p_i`, zero at first, and in turn, until nothing changes,

    .. math:: z \leftarrow P_i(w + p_i), \qquad p_i \leftarrow w + p_i - z, \qquad w \leftarrow z

    Derivatives are those of the steps, and converge with them: at a geometric rate where the sets
    have flat faces, else more slowly. Of operators that are no projections, the result is the
    operator of the sum of their functions.

    Args:
        projections: each ``(params, hparams, lr) -> params``, one at least.
        maxiter: the most rounds, at least 1.
        rtol: stop once no leaf of a memory changes in a round by more than this times its entries
            and those of params; in float32, by more than 4 rounding errors. Under ``vmap`` it is
            the last task that ends the rounds.

    Raises:
        TypeError: one is not a function, or is one that still makes an operator.
        ValueError: ``maxiter`` below 1, or ``rtol`` below 0.

    Warns:
        ConvergenceWarning: ``maxiter`` rounds were not enough, as where the sets share no point.

    Example:
        >>> both = hf.prox.intersection(
        ...     hf.prox.simplex(), hf.prox.halfspace(torch.tensor([1.0, 0]))
        ... )
        >>> both(torch.tensor([3.0, 1.0]))
        tensor([0., 1.])

    References:
        Boyle and Dykstra, A method for finding projections onto the intersection of convex sets in
        Hilbert spaces, 1986; Bauschke and Combettes, A Dykstra-like algorithm for two monotone
        operators, 2008.
    """
    check_count("prox.intersection", "maxiter", maxiter, 1)
    check_number("prox.intersection", "rtol", rtol)
    made = tuple(check_prox(prox, "prox.intersection") for prox in projections)
    if not made:
        raise TypeError("prox.intersection: got no projections; expected one at least")
    return _Intersection(made, maxiter, rtol)


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
    proxes: tuple[Callable[..., TensorTree], ...]

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        for prox in self.proxes:
            params = prox(params, hparams, lr)
        return params


@dataclasses.dataclass(frozen=True, eq=False)
class _Intersection:
    proxes: tuple[Callable[..., TensorTree], ...]
    maxiter: int
    rtol: float

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        z, spec = trees.flatten_floating(params, "params")
        rounds = 0
        sizes = [leaf.detach().abs() for leaf in z]
        memories = [tuple(torch.zeros_like(leaf) for leaf in z)] * len(self.proxes)
        for _ in range(self.maxiter):
            rounds += 1
            most = torch.zeros(())  # of the changes, each in units of what is allowed
            for index, prox in enumerate(self.proxes):
                old = memories[index]
                moved = trees.add(z, old)
                z = tuple(trees.flatten(prox(trees.unflatten(spec, moved), hparams, lr))[0])
                memories[index] = trees.sub(moved, z)
                for leaf, before, scale in zip(memories[index], old, sizes, strict=True):
                    least = max(self.rtol, 4 * torch.finfo(leaf.dtype).eps)
                    bound = least * (scale + leaf.detach().abs()).amax()
                    change = (leaf - before).detach().abs().amax()
                    ratio = torch.where(change == 0, 0.0, change / bound)
                    most = torch.maximum(most, ratio.to(most))
            if batching.all_true(~(most > 1)):
                break
        code = torch.where(most > 1, int(RESULTS.max_steps), int(RESULTS.success))
        stats = SolveStats(torch.tensor(rounds), most, code)
        warn_unless_converged(self, stats, "prox.intersection", lambda _: "Raise maxiter or rtol.")
        return trees.unflatten(spec, z)


@dataclasses.dataclass(frozen=True, eq=False)
class _Joint:
    prox: Callable[..., TensorTree]

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        leaves, spec = trees.flatten_floating(params, "params")
        dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
        flat = torch.cat([leaf.to(dtype).reshape(-1) for leaf in leaves])
        parts = self.prox(flat, hparams, lr).split([leaf.numel() for leaf in leaves])
        pairs = zip(parts, leaves, strict=True)
        return trees.unflatten(spec, [x.reshape(like.shape).to(like.dtype) for x, like in pairs])


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    proxes: Any

    def __call__(
        self, params: TensorTree, hparams: TensorTree = None, lr: float | Tensor = 1.0
    ) -> TensorTree:
        parts = match_prefix("prox.blocks", self.proxes, params)
        moved = [prox(part, hparams, lr) for prox, part in parts]
        return trees.unflatten(trees.flatten(self.proxes)[1], moved)
