"""Hypergradients that are zero because no derivative reaches hparams, told from other zeros."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._rule.implicit import ImplicitProblem
from hyperfunc._rule.unused import UNUSED, is_used
from hyperfunc._torch import autodiff, batching, tracking
from hyperfunc._types import Leaves
from hyperfunc.inner_solvers._solvers import IterativeSolver
from hyperfunc.iterative import FirstOrder

_AS_THEY_ARE = ". Pass throw=False to get the zeros"

_NOT_FOLLOWED = (
    "no derivative reaches hparams: neither the result of the inner solver nor outer_loss depends "
    "on them by operations that autograd follows. {likely}Look in the inner solver for "
    "torch.optim, backward(), detach(), .data, .item(), NumPy, torch.no_grad() or "
    "create_graph=False, and for a loop that takes no step. Make the solver with hf.minimize or "
    "hf.iterate, or name what its result satisfies and take an implicit method, which needs no "
    "graph of it: inner_loss=..., method='cg'"
)

_LIKELY = (
    "Most likely init returns a constant, and inner_loss or step uses no hparams, or not its "
    "params (module(x) in place of apply(params, x)). "
)

_PARAMETERS = (
    "the inner solver returned in {path} a tensor that it made and that requires grad (as "
    "torch.optim trains), which is cut off from hparams. {method!r} needs params that were "
    "computed from hparams. Make the solver with hf.minimize, whose steps can be "
    "differentiated, or name what its result satisfies and take an implicit method: "
    "inner_loss=..., method='cg'"
)


def is_sound(grads: Leaves) -> bool:
    """Whether a sum shows that all entries are finite and not all of them zero, for each task."""
    return not grads or batching.all_true(trees.sum_is_finite_and_nonzero(grads))


def refuse_unreached_by_rule(
    problem: ImplicitProblem,
    outer: Callable[..., Tensor],
    w: Leaves,
    theta: Leaves,
    grads: Leaves,
) -> None:
    """Raise if all is zero as condition and outer loss, of ``(*w, *theta)``, use no hparams."""
    bound, size = problem.bound, problem.arguments.num_hparams
    assert bound is not None
    if not _are_zero(grads) or is_used(bound, w, theta, range(size)):
        return
    indices = range(len(w), len(w) + size)
    if not autodiff.uses(lambda *leaves: (outer(*leaves),), (*w, *theta), indices):
        raise ValueError(UNUSED.format(kind=problem.condition.kind) + _AS_THEY_ARE)


def refuse_unreached_by_solver(
    inner_solver: Any,
    method: Any,
    value: Callable[..., Leaves],
    linearized: autodiff.Linearization,
    theta: Leaves,
    grads: Leaves,
) -> None:
    """Raise if all is zero as the ``value`` by a solver, a function of theta, does not use hparams.

    It was linearized; but of a method that replays steps the graph does not tell, while one step
    does.
    """
    if not _are_zero(grads):
        return
    likely = _LIKELY if isinstance(inner_solver, IterativeSolver) else ""
    message = _NOT_FOLLOWED.format(likely=likely)
    if isinstance(method, FirstOrder):
        message = method.unused
        value_of = functools.partial(value, method.followed(inner_solver))
        used = autodiff.uses(value_of, theta, range(len(grads)))
    elif isinstance(inner_solver, IterativeSolver):
        count = min(inner_solver.num_steps, 1)
        inputs = trees.tree_map(lambda leaf: leaf[:count], inner_solver.inputs)
        short = dataclasses.replace(inner_solver, num_steps=count, inputs=inputs, compiler=None)
        used = autodiff.uses(functools.partial(value, short), theta, range(len(grads)))
    else:
        one = tuple(map(torch.ones_like, linearized.outputs))
        used = any(grad is not None for grad in linearized.pull_used(one, 0))
    if not used:
        raise ValueError(message + _AS_THEY_ARE)


def refuse_own_leaves(w: Leaves, spec: trees.TreeSpec, given: Leaves, method: Any) -> None:
    """Raise if an inner solver returned leaf variables that it was not given."""
    if tracking.transforms_active():
        return
    known = set(map(id, given))
    for path, leaf in zip(trees.paths(spec, "params"), w, strict=True):
        if leaf.requires_grad and leaf.is_leaf and id(leaf) not in known:
            raise ValueError(_PARAMETERS.format(path=path, method=method))


def _are_zero(grads: Leaves) -> bool:
    return not batching.any_true(trees.norm(grads) != 0)
