"""Parts of the steps that the direction of hparams does not see: what is said of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.convergence import warn_at_call_site
from hyperfunc._torch import autodiff, sharding
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.optim._base import Optimizer, Schedule
from hyperfunc.optim._decay import tell_of_decay


def tell_of_decays(method: Any, spec: trees.TreeSpec, hparams: TensorTree) -> None:
    """Raise or warn if an optimiser decays params or adjoint, of which the losses know not."""
    for key in ("inner", "adjoint"):
        rule = method.steps.get(key)
        if not isinstance(rule, Optimizer) or key == method.follows:
            continue
        what = f"{method.name}: the weight decay of {key}_optimizer"
        remedy = "Leave it at 0 (hf.optim.adam in place of adamw)"
        if (key, method.adjoint) == ("adjoint", "steps"):
            text = f"{what} shifts the adjoint, and so the direction of hparams. {remedy}"
            tell_of_decay(rule, spec, hparams, text, text)
            continue
        remedy += ", and write + 0.5 * decay * (w**2).sum() into inner_loss"
        function = f"{what} is a function of hparams, to which no derivative reaches. {remedy}"
        constant = (
            f"{what} takes the params to another point than the minimum of inner_loss, which "
            f"the direction of hparams is that of. {remedy}"
        )
        # what has no adjoint follows the steps themselves
        tell_of_decay(rule, spec, hparams, function, constant if method.adjoint else None)


def tell_of_learned(method: Any, point: Any) -> None:
    """Warn of steps that depend on hparams, where the direction of hparams does not show it.

    Not of DTensors: looking takes a step, and some torch cannot differentiate on uneven shards.
    """
    if torch.compiler.is_compiling() or any(map(sharding.is_dtensor, (*point.w, *point.h))):
        return
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    settings |= {f"{key}_lr": method.steps.get(key) for key in ("inner", "adjoint")}
    known = [settings.get(f"{method.follows}_lr")]
    point.used.update(dict.fromkeys(("inner_loss", "outer_loss"), (True,) * len(point.w)))
    for name, rule in settings.items():
        if not isinstance(rule, Schedule | Optimizer) or any(rule is each for each in known):
            continue
        known.append(rule)

        def value(*h: Tensor, name: str = name, rule: Any = rule) -> Leaves:
            return _stepped(point.at(h), name, rule)

        if autodiff.uses(value, point.h, range(len(point.h))):
            reached = (i for i in range(len(point.h)) if autodiff.uses(value, point.h, [i]))
            index = next(reached)
            name = name.replace("_lr", "_optimizer") if isinstance(rule, Optimizer) else name
            path = trees.paths(point.hparams_spec, "hparams")[index]
            text = f"{method.name}: {name} depends on {path}, {method.unseen}. If it is not to be "
            warn_at_call_site(UserWarning(f"{text}learned there, detach it: hparams.detach()"))


def _stepped(point: Any, name: str, rule: Any) -> Leaves:
    """The value of a schedule, or what an optimiser makes of some gradient."""
    if isinstance(rule, Schedule):
        return (torch.as_tensor(point.value(name, rule)),)
    key: Any = name.removesuffix("_lr")
    place = "u" if (key, point.method.adjoint) == ("adjoint", "steps") else "w"
    new = point.step(key, tuple(map(torch.ones_like, point.w)), on=place)
    leaves: Leaves = new.w if place == "w" else new.u
    return leaves
