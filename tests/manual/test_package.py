"""The package as a whole: what its import brings along, and the names that it offers."""

import inspect
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


@pytest.mark.parametrize("name", hf.__all__)
def test_each_name_is_documented(name: str) -> None:
    value = getattr(hf, name)
    assert inspect.getdoc(value)
    if not isinstance(value, ModuleType):
        assert value.__module__.startswith("hyperfunc")
