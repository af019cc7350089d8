"""Fixtures that every test and doctest shares."""

import os
from pathlib import Path

import pytest
import torch

import hyperfunc as hf

# One thread: results do not depend on the machine, and small products are faster.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine that the library supports."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, named by the variable HYPERFUNC_DATA."""
    if "HYPERFUNC_DATA" not in os.environ:
        pytest.skip("set HYPERFUNC_DATA to the folder of data sets to run this test")
    path = Path(os.environ["HYPERFUNC_DATA"])
    if not path.is_dir():
        pytest.fail(f"HYPERFUNC_DATA is {str(path)!r}, which is not a folder")
    return path


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, hf=hf)
