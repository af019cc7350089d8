"""Fixtures for doctests and tests alike.

pyproject.toml loads this file as a plugin, because a conftest.py here would not reach the doctests
in hyperfunc/, README.md and examples/guides/.
"""

import gc

import pytest
import torch

import hyperfunc as hf

# One thread: results do not depend on the machine, and small products are faster.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(doctest_namespace: dict[str, object]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, hf=hf)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # a guide whose snippets take long says so in a comment under its title
        if item.path.suffix == ".md" and "\n<!-- slow" in item.path.read_text():
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    # thousands of tests stay until the end, and would be looked through for garbage all the time
    gc.collect()
    gc.freeze()
