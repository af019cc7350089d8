"""The package as a whole: what its import brings along, and the names that it offers."""

import inspect
import re
import subprocess
import sys
from types import ModuleType

import pytest

import hyperfunc as hf

# What torch itself leaves to its first use, or what only a user of it has.
HEAVY = [
    *("torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "sympy"),
    *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("numpy.testing", "scipy", "sklearn", "matplotlib", "jax", "tensordict", "lightning"),
]


def test_the_import_brings_optree_and_nothing_heavy() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import hyperfunc
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new - set(sys.stdlib_module_names)))
print([name for name in {HEAVY} if name in set(sys.modules) - before])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought, heavy = map(eval, run.stdout.splitlines())
    # torch 2.4 brings optree itself
    assert set(brought) - {"torch", "optree"} == {"hyperfunc"}
    assert heavy == []


def test_names_are_there_once() -> None:
    assert len(set(hf.__all__)) == len(hf.__all__)
    for name in hf.__all__:
        assert not name.startswith("_")
        assert hasattr(hf, name)


PAGES = [hf, hf.bilevel, hf.distributed, hf.fixed_point_solvers, hf.optim, hf.prox]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_each_name_is_documented_with_an_example(page: ModuleType) -> None:
    assert ">>> " in (page.__doc__ or "")
    for name in page.__all__:
        value = getattr(page, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("hyperfunc")
            assert ">>> " in (value.__doc__ or ""), name
        else:  # a page of its own, or an alias of types, which has no docstring
            assert value in PAGES or value in (hf.optim.Coefficient, hf.bilevel.StepSize)


def test_the_index_by_task_names_everything() -> None:
    named = set(re.findall(r"`([\w.]+)`", hf.__doc__ or ""))
    pages = {page.__name__ for page in PAGES[1:]}
    assert pages | {name for name in hf.__all__ if f"hyperfunc.{name}" not in pages} <= named
