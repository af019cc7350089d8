"""What loops share whose directions are averaged over the steps, or corrected from step to step.

With the direction ``D`` of new batches at the point of now, ``D'`` of the same batches at the point
before, and the weight ``a`` of what is new, the estimates ``d`` are

    moving average      d <- a D + (1 - a) d
    STORM               d <- D + (1 - a) (d - D')
    SPIDER, SARAH       STORM with a = 1 once in a period, else 0
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_count, is_number
from hyperfunc._engine.shown import show
from hyperfunc._types import Leaves, TensorTree
from hyperfunc.bilevel._base import Method, Point, State, check_rate

VARIABLES = ("params", "adjoint", "hparams")


@dataclasses.dataclass(frozen=True, repr=False)
class Remembering(Method):
    """A loop whose memory holds directions, and some variables as they were a step ago."""

    directed: ClassVar[tuple[str, ...]]
    looks_back: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[str, ...]] = ()  # the settings that say how much of an estimate is new

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.weights:
            weight = getattr(self, key)
            if not callable(weight):
                check_rate(self.name, key, weight)
            if is_number(weight) and weight > 1:
                raise ValueError(
                    f"{self.name}: {key} is {show(weight)}; expected a number in [0, 1]"
                )
        if hasattr(self, "period"):
            check_count(self.name, "period", self.period)

    def init(self, params: TensorTree, hparams: TensorTree) -> State:
        state = super().init(params, hparams)
        return state._replace(
            memory={
                "directions": {
                    key: trees.tree_map(torch.zeros_like, getattr(state, key))
                    for key in self.directed
                },
                "before": {
                    key: trees.tree_map(torch.clone, getattr(state, key)) for key in self.looks_back
                },
            }
        )

    def recall(self, point: Point) -> tuple[list[Leaves], Point]:
        """The directions of the last step, and the point it started from."""
        memory = point.state.memory
        keys = {"directions": self.directed, "before": self.looks_back}
        if not isinstance(memory, dict) or any(
            sorted(memory.get(part, ())) != sorted(names) for part, names in keys.items()
        ):
            raise TypeError(
                f"{self.name}: state.memory is not that of {self.name}; make the state with the "
                f"init of {self.name} itself"
            )
        found = [tuple(trees.flatten(memory["directions"][key])[0]) for key in self.directed]
        names = dict(zip(VARIABLES, "wuh", strict=True))
        before: dict[str, Any] = {
            names[key]: tuple(trees.flatten(memory["before"][key])[0]) for key in self.looks_back
        }
        return found, dataclasses.replace(point, **before)

    def remember(self, point: Point, state: State, directions: list[Leaves]) -> State:
        """The next state, with the directions and the variables of the point in its memory."""
        specs = dict(
            zip(VARIABLES, (point.params_spec, point.params_spec, point.hparams_spec), strict=True)
        )
        pairs = zip(self.directed, directions, strict=True)
        return state._replace(
            memory={
                "directions": {key: trees.unflatten(specs[key], d) for key, d in pairs},
                "before": {key: getattr(point.state, key) for key in self.looks_back},
            }
        )


def kept(point: Point, key: str) -> Tensor:
    """``1 - a`` for the weight of a setting, float64; 0 in the first step: nothing is kept then."""
    kept: Tensor = (point.state.step > 0).to(torch.float64) * (1 - point.rate(key))
    return kept


def kept_in_period(point: Point, period: int) -> Tensor:
    """``1 - a`` of SPIDER, float64: 0 in the steps that are multiples of the period, else 1."""
    return (point.state.step % period > 0).to(torch.float64)


def corrected(keep: Tensor, new: Leaves, old: Leaves, direction: Leaves) -> Leaves:
    """``D + (1 - a) (d - D')``."""
    return trees.axpy(keep, trees.sub(direction, old), new)
