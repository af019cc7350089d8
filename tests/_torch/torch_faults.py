"""What torch's own derivative rules give, operation by operation: a report that can be posted.

    python -m tests._torch.torch_faults [--operations layer_norm ...]

Each case of ``test_derivative_rules`` is run by torch alone, in each nest of that test, and
compared with the numbers of this package, which are held against differences there. A row says
where torch raises and where it is wrong without a word; where no row of an operation is left, its
rule can go.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hyperfunc._torch import derivative_rules
from tests._torch.test_derivative_rules import (
    CASES,
    FIRST,
    SECOND,
    THIRD,
    Case,
    Params,
    dot,
    of_tasks,
    plain,
    product,
    variables,
)

RIGHT = "right"


def truths(case: Case) -> list[Params]:
    """Gradient, product with the Hessian and its derivative, one task at a time by our rules."""
    x, params, v, u = case.sample()
    with derivative_rules.active():
        return [
            of_tasks(lambda x: plain(lambda p: case.loss(x, p), variables(params)), x),
            of_tasks(lambda x: product(case, x, params, v), x),
            of_tasks(
                lambda x: plain(lambda p: dot(product(case, x, p, v), u), variables(params)), x
            ),
        ]


def found(run: Callable[[], Any], expected: Params) -> str:
    """``right``, by how much torch is off, or what it raises."""
    torch.manual_seed(0)
    try:
        got = run()
        scale = max(e.abs().max().item() for e in expected) or 1.0
        off = max((g - e).abs().max().item() for g, e in zip(got, expected, strict=True)) / scale
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:90]}"
    if math.isnan(off):
        return "WRONG: NaN"
    return RIGHT if off < 1e-6 else f"WRONG by {off:.1%} of the largest entry"


def report(case: Case) -> dict[str, list[str]]:
    """What torch gives, and the nests in which it does."""
    x, params, v, u = case.sample()
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    groups = zip((FIRST, SECOND, THIRD), ((), (v,), (v, u)), truths(case), strict=True)
    for nests, directions, expected in groups:
        for name, nest in nests.items():
            run = functools.partial(nest, case.loss, x, params, *directions)
            kinds[found(run, expected)].append(name)
    return kinds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torch_faults", description=__doc__)
    parser.add_argument("--operations", nargs="+", help="the first words of cases")
    options = parser.parse_args(argv)
    print(f"torch {torch.__version__}")
    counts: collections.Counter[str] = collections.Counter()
    for case in CASES:
        if options.operations and not case.name.startswith(tuple(options.operations)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds = report(case)
        for kind, names in kinds.items():
            key = RIGHT if kind == RIGHT else "wrong" if kind.startswith("WRONG") else "raised"
            counts[key] += len(names)
            if kind != RIGHT:
                print(f"{case.name}: {kind}\n    in {'; '.join(names)}", flush=True)
    print(", ".join(f"{counts[key]} {key}" for key in (RIGHT, "raised", "wrong")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
