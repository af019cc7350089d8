"""All loops in one table, for tests of what holds for every one."""

from typing import Any

import hyperfunc as hf
from hyperfunc.bilevel import Loop

N, M = 6, 4  # inner and outer batches
Q = 2
SERIES = {"num_adjoint_steps": Q}
ONE = {"num_inner_steps": 1}
# For each loop: settings with which an update is one step on each variable, the size of the leading
# dimension of the inner batches, and what its adjoint is.
LOOPS: dict[str, tuple[dict[str, Any], int | None, str]] = {
    "soba": ({}, None, "steps"),
    "saba": ({"num_inner_batches": N, "num_outer_batches": M}, None, "steps"),
    "ma_soba": ({"outer_weight": 0.3}, None, "steps"),
    "srba": ({"period": 2}, None, "steps"),
    "fsla": ({"outer_weight": 0.3}, 3, "steps"),
    "amigo": ({**ONE, "num_adjoint_steps": 1}, 3, "steps"),
    "stocbio": ({**ONE, **SERIES}, Q + 2, "series"),
    "bsa": ({**ONE, **SERIES}, Q + 2, "series"),
    "ttsa": (SERIES, Q + 2, "series"),
    "sustain": (SERIES, Q + 2, "series"),
    "mrbo": (SERIES, Q + 2, "series"),
    "vrbo": ({**ONE, **SERIES, "period": 2}, 2 * (Q + 2), "series"),
    "pzobo": (ONE, 1, "none"),
    "truncated": (ONE, 1, "none"),
    "f2sa": (ONE, None, "params"),
    "bome": (ONE, None, "restarted"),
    "pbgd": (ONE, None, "restarted"),
    "meha": ({}, None, "params"),
    "sama": ({}, None, "none"),
    "darts": ({"unroll_lr": 0.3}, None, "none"),
}
RATES = {"inner": 0.4, "adjoint": 0.3, "outer": 0.1}
PLACES = {"inner": 0, "adjoint": 1, "outer": 2}


def variables(name: str) -> tuple[str, ...]:
    """What an optimiser may step on."""
    adjoint = LOOPS[name][2] in ("steps", "params", "restarted")
    return ("inner", "adjoint", "outer") if adjoint else ("inner", "outer")


def make_loop(name: str, losses: Any, **optimizers: Any) -> Loop:
    """A loop with these optimisers, and with plain steps for all else."""
    return getattr(hf.bilevel, name)(*losses, **settings_of(name, **optimizers))


def settings_of(name: str, **optimizers: Any) -> dict[str, Any]:
    """What a loop is made with."""
    settings, _, adjoint = LOOPS[name]
    steps: dict[str, Any] = {}
    for variable, rate in RATES.items():
        if variable in optimizers:
            steps[f"{variable}_optimizer"] = optimizers[variable]
        elif (name, variable) == ("sama", "inner"):  # whose inner_lr is that of Adam
            steps["inner_optimizer"] = hf.optim.sgd(rate)
        elif variable != "adjoint" or adjoint != "none":
            steps[f"{variable}_lr"] = rate
    return {**settings, **steps}
