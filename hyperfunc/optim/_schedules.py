"""Coefficients that depend on the step, and those of torch.optim.lr_scheduler among them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperfunc._engine import trees
from hyperfunc._engine.checks import check_callable, check_count
from hyperfunc._engine.shown import show
from hyperfunc._engine.wrapped_functions import PrintsAsCall
from hyperfunc._torch import indexing
from hyperfunc.optim._base import (
    ByName,
    Coefficient,
    Schedule,
    check_coefficient,
    check_single,
    describe,
    evaluate,
)


def schedule(fn: Callable[[Any, Tensor], Any]) -> Schedule:
    """A coefficient that is a function of hparams and of the step.

    It may stand for any number of any optimiser, and is differentiated in hparams, replayed,
    batched and compiled as the step is.

    Args:
        fn: ``(hparams, step) -> value``, pure, of torch operations: a 0-d tensor, or a tensor or
            tree as any `Coefficient`. ``step`` counts from 0 the updates that the optimiser's
            state has seen; it is an int64 0-d tensor, so that ``rates[step]`` is a row of a
            tensor, and ``0.9 ** step.double()`` is not rounded to the default dtype.

    Raises:
        TypeError: ``fn`` is not a function.

    Example:
        >>> optimizer = hf.optim.sgd(lr=hf.optim.schedule(lambda rates, step: rates[step]))
        >>> def train(rates):
        ...     w = torch.tensor(1.0)
        ...     state = optimizer.init(w)
        ...     for _ in range(2):
        ...         w, state = optimizer.update(w, state, w, rates)  # the gradient of w^2 / 2
        ...     return w
        >>> train(torch.tensor([0.5, 0.2])), torch.func.grad(train)(torch.tensor([0.5, 0.2]))
        (tensor(0.4000), tensor([-0.8000, -0.5000]))
    """
    check_callable(fn, "schedule: fn", "(hparams, step) -> value")
    return _Own(fn)


def constant(value: Coefficient, factor: Coefficient = 1 / 3, num_steps: int = 5) -> Schedule:
    """``factor * value`` for the first steps, then ``value``: ``ConstantLR``.

    Args:
        value: a `Coefficient`, such as a learning rate; as in all schedules here it may be a
            function of hparams, a tree, or another schedule, with which this one then is chained.
        factor: a number, a 0-d tensor, or a function of hparams that returns one.
        num_steps: how many steps, at least 1.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of their range.

    Example:
        >>> rate = hf.optim.constant(0.1, factor=0.5, num_steps=2)
        >>> [round(float(rate(None, torch.tensor(t))), 3) for t in range(4)]
        [0.05, 0.05, 0.1, 0.1]
    """
    return _named("constant", _constant, value, num_steps, factor=factor)


def linear(
    value: Coefficient,
    start_factor: Coefficient = 1 / 3,
    end_factor: Coefficient = 1.0,
    num_steps: int = 5,
) -> Schedule:
    """``value`` times a factor that goes from one to another and stays there: ``LinearLR``.

        (start_factor + (end_factor - start_factor) min(t / num_steps, 1)) value

    The arguments and errors are those of `constant`.

    Example:
        >>> rate = hf.optim.linear(1.0, 0.0, 1.0, num_steps=4)
        >>> rate(None, torch.tensor(3))
        tensor(0.7500, dtype=torch.float64)
    """
    return _named(
        *("linear", _linear, value, num_steps), start_factor=start_factor, end_factor=end_factor
    )


def warmup(value: Coefficient, num_steps: int, start_factor: Coefficient = 1 / 3) -> Schedule:
    """`linear` up to ``value`` itself, which may be a schedule that goes on after it.

    Example:
        >>> rate = hf.optim.warmup(hf.optim.cosine(0.1, 100), num_steps=10)
        >>> rate(None, torch.tensor(50))
        tensor(0.0500, dtype=torch.float64)
    """
    return linear(value, start_factor, 1.0, num_steps)


def cosine(value: Coefficient, num_steps: int, end: Coefficient = 0.0) -> Schedule:
    """Half a period of the cosine, from ``value`` to ``end``: ``CosineAnnealingLR``.

        end + (value - end) (1 + cos(pi t / num_steps)) / 2

    which goes up again after ``num_steps``. ``end`` is like ``factor`` in `constant`; the other
    arguments and errors are those too.

    Example:
        >>> hf.optim.cosine(0.1, 10)(None, torch.tensor(5))
        tensor(0.0500, dtype=torch.float64)

    References:
        Loshchilov, Hutter. SGDR: stochastic gradient descent with warm restarts. ICLR 2017.
    """
    return _named("cosine", _cosine, value, num_steps, end=end)


def exponential(value: Coefficient, gamma: Coefficient, every: int = 1) -> Schedule:
    """``value * gamma ** (t // every)``: ``ExponentialLR``, and with ``every`` ``StepLR``.

    ``gamma`` is like ``factor`` in `constant`, and ``every`` like ``num_steps``.

    Example:
        >>> hf.optim.exponential(0.1, 0.5)(None, torch.tensor(3))
        tensor(0.0125, dtype=torch.float64)
    """
    return _named("exponential", _exponential, value, every, "every", gamma=gamma)


def polynomial(value: Coefficient, num_steps: int, power: Coefficient = 1.0) -> Schedule:
    """``value * (1 - t / num_steps) ** power``, and zero from then on: ``PolynomialLR``.

    ``power`` is like ``factor`` in `constant`.

    Example:
        >>> hf.optim.polynomial(0.1, 4, power=2.0)(None, torch.tensor(2))
        tensor(0.0250, dtype=torch.float64)
    """
    return _named("polynomial", _polynomial, value, num_steps, power=power)


def piecewise(values: Sequence[Coefficient], boundaries: Sequence[int]) -> Schedule:
    """One coefficient after the other: ``SequentialLR``, and of numbers ``MultiStepLR``.

    Args:
        values: coefficients, one more than ``boundaries``: all of them single values, or all trees
            of one structure. Schedules among them begin with step 0 where their turn comes.
        boundaries: the steps at which the second and all further ones begin, increasing.

    Raises:
        TypeError, ValueError: other numbers of them, or boundaries that do not increase.

    Example:
        Warm-up, then a constant that is a hyperparameter:

        >>> rate = hf.optim.piecewise([hf.optim.linear(0.4, 0.0), lambda h: h["lr"]], [5])
        >>> h = {"lr": torch.tensor(0.5)}
        >>> [round(float(rate(h, torch.tensor(t))), 2) for t in (0, 4, 5, 100)]
        [0.0, 0.32, 0.5, 0.5]
    """
    lists: tuple[tuple[str, Any], ...] = (("values", values), ("boundaries", boundaries))
    for name, given in lists:
        if not isinstance(given, Sequence) and not (isinstance(given, Tensor) and given.ndim):
            raise TypeError(f"piecewise: {name} is {show(given)}; expected a list")
    values, boundaries = tuple(values), tuple(boundaries)
    for bound in boundaries:
        check_count("piecewise", "each of the boundaries", bound)
    increasing = all(a < b for a, b in itertools.pairwise(boundaries))
    if len(values) != len(boundaries) + 1 or not increasing:
        raise ValueError(
            f"piecewise: got {len(values)} values and boundaries={show(boundaries)}; expected "
            f"increasing steps, one less than values"
        )
    for index, value in enumerate(values):
        check_coefficient("piecewise", f"values[{index}]", value)
    return _Piecewise(values, boundaries)


def per_step(values: Coefficient) -> Schedule:
    """One value for each step: row ``t`` of a tensor, or of each tensor of a tree.

    Args:
        values: a tensor with a leading dimension of steps, a tree of them for values layer by
            layer or leaf by leaf, or a function of hparams that returns one of these. After the
            last row, that row stays.

    Raises:
        TypeError, ValueError: something else; when called, a tensor without rows.

    Example:
        A learned rate for each step and layer, as in MAML++:

        >>> optimizer = hf.optim.sgd(lr=hf.optim.per_step(lambda rates: rates))
        >>> rates = {"layer1": torch.tensor([0.1, 0.2]), "layer2": torch.tensor([0.3, 0.4])}
        >>> w = {"layer1": torch.ones(2), "layer2": torch.ones(2)}
        >>> optimizer.update(w, optimizer.init(w), w, rates)[0]["layer2"]
        tensor([0.7000, 0.7000])

    References:
        Antoniou, Edwards, Storkey. How to train your MAML. ICLR 2019.
    """
    check_coefficient("per_step", "values", values)
    return _PerStep(values)


@dataclasses.dataclass(frozen=True, repr=False)
class _Own(PrintsAsCall, Schedule):
    fn: Callable[[Any, Tensor], Any]

    name = "schedule"

    def __call__(self, hparams: Any, step: Tensor) -> Any:
        with indexing.RowsByIndex():
            return self.fn(hparams, step)


@dataclasses.dataclass(frozen=True, repr=False)
class _PerStep(PrintsAsCall, Schedule):
    values: Coefficient

    name = "per_step"

    def __call__(self, hparams: Any, step: Tensor) -> Any:
        def row(rows: Any) -> Tensor:
            if not isinstance(rows, Tensor) or rows.ndim == 0 or not len(rows):
                got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else describe(rows)
                raise ValueError(
                    f"per_step: got values of {got}; expected tensors with a leading dimension of "
                    f"steps"
                )
            return indexing.row(rows, step.clamp(max=len(rows) - 1))

        return trees.tree_map(row, _values("per_step", "values", self.values, hparams, step))


@dataclasses.dataclass(frozen=True, repr=False)
class _Piecewise(PrintsAsCall, Schedule):
    values: tuple[Coefficient, ...]
    boundaries: tuple[int, ...]

    name = "piecewise"

    def __call__(self, hparams: Any, step: Tensor) -> Any:
        begins = (0, *self.boundaries)
        result: Any = None
        for index, (value, begin) in enumerate(zip(self.values, begins, strict=True)):
            now = (step - begin).clamp(min=0)
            new = trees.tree_map(
                _as_tensor, _values("piecewise", f"values[{index}]", value, hparams, now)
            )
            if result is None:
                result = new
                continue

            def choose(old: Tensor, new: Tensor, begun: Tensor = step >= begin) -> Tensor:
                return torch.where(begun.to(new.device), new, old)

            result = trees.tree_map(choose, result, new)
        return result


@dataclasses.dataclass(frozen=True, repr=False)
class _Named(Schedule):
    """A rule ``(t, num_steps, value, *single values) -> value``."""

    name: str
    rule: Callable[..., Any]
    count: tuple[str, int]
    coefficients: tuple[tuple[str, Coefficient], ...]  # the first is the value

    def __call__(self, hparams: Any, step: Tensor) -> Any:
        numbers = []
        for key, coefficient in self.coefficients:
            numbers.append(_values(self.name, key, coefficient, hparams, step))
            if len(numbers) > 1:
                check_single(f"{self.name}: {key}", numbers[-1], "put them into value")
        value, *others = numbers
        t = step.to(torch.float64)
        return trees.tree_map(lambda leaf: self.rule(t, self.count[1], leaf, *others), value)

    def __repr__(self) -> str:
        shown = (f"{key}={show(value)}" for key, value in (*self.coefficients, self.count))
        return f"{self.name}({', '.join(shown)})"


def _named(
    name: str,
    rule: Callable[..., Any],
    value: Coefficient,
    number: int,
    count: str = "num_steps",
    **others: Coefficient,
) -> _Named:
    check_count(name, count, number)
    coefficients = {"value": value, **others}
    for key, coefficient in coefficients.items():
        check_coefficient(name, key, coefficient)
    return _Named(name, rule, (count, number), tuple(coefficients.items()))


def _values(name: str, key: str, coefficient: Coefficient, hparams: Any, step: Tensor) -> Any:
    """The value of a coefficient, which holds no function of names or for single leaves."""
    value = evaluate(name, key, coefficient, hparams, step)
    for leaf in trees.flatten(value)[0]:
        if callable(leaf) or isinstance(leaf, ByName):
            raise TypeError(
                f"{name}: {key} holds {describe(leaf)}; expected numbers and tensors, or one "
                f"function of hparams for all of them. For a schedule by the name of a parameter "
                f"write hf.optim.by_name(lambda name: hf.optim.{name}(...))"
            )
    return value


def _constant(t: Tensor, n: int, value: Any, factor: Any) -> Any:
    return value * (1 + (factor - 1) * (t < n).to(torch.float64))


def _linear(t: Tensor, n: int, value: Any, start: Any, end: Any) -> Any:
    return value * (start + (end - start) * (t / n).clamp(max=1.0))


def _cosine(t: Tensor, n: int, value: Any, end: Any) -> Any:
    return end + (value - end) * (1 + torch.cos(t * (math.pi / n))) / 2


def _exponential(t: Tensor, n: int, value: Any, gamma: Any) -> Any:
    return value * gamma ** torch.floor(t / n)


def _polynomial(t: Tensor, n: int, value: Any, power: Any) -> Any:
    return value * (1 - (t / n).clamp(max=1.0)) ** power


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
