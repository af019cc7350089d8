"""Step sizes that decrease, and penalties that grow."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hyperfunc._engine.checks import check_number


def power_decay(initial: float, exponent: float) -> Callable[[int | Tensor], float | Tensor]:
    """The step sizes ``initial / (1 + step) ** exponent``.

    Args:
        initial: the first step size, > 0.
        exponent: how fast they decrease, >= 0. `soba` converges with 0.4 for the params and the
            adjoint and 0.6 for the hparams.

    Returns:
        A function of the step, an integer or a 0-d tensor; also a coefficient for the optimiser of
        `hyperfunc.StochasticAID`.

    Raises:
        ValueError: a number out of its range.
        TypeError: no number.

    Example:
        >>> hf.bilevel.power_decay(0.5, exponent=0.5)(torch.tensor(3))
        tensor(0.2500, dtype=torch.float64)
    """
    check_number("power_decay", "initial", initial, above=True)
    check_number("power_decay", "exponent", exponent)
    return functools.partial(_decayed, initial, exponent)


def power_growth(initial: float, exponent: float) -> Callable[[int | Tensor], float | Tensor]:
    """The penalties ``initial * (1 + step) ** exponent``.

    Args:
        initial: the first penalty, > 0.
        exponent: how fast they grow, >= 0.

    Returns:
        A function of the step, an integer or a 0-d tensor.

    Raises:
        ValueError: a number out of its range.
        TypeError: no number.

    Example:
        >>> hf.bilevel.power_growth(2.0, exponent=0.5)(torch.tensor(3))
        tensor(4., dtype=torch.float64)
    """
    check_number("power_growth", "initial", initial, above=True)
    check_number("power_growth", "exponent", exponent)
    return functools.partial(_decayed, initial, -exponent)


def _decayed(initial: float, exponent: float, step: int | Tensor) -> float | Tensor:
    # float32 counts to 16 million only
    count = step.to(torch.float64) if isinstance(step, Tensor) else float(step)
    return initial / (1.0 + count) ** exponent
