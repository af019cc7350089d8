"""Fixtures that the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ranks


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device on this machine that the library supports."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, which the variable HYPERFUNC_DATA names."""
    if not os.environ.get("HYPERFUNC_DATA"):
        pytest.skip("set HYPERFUNC_DATA to the folder of data sets to run this test")
    path = Path(os.environ["HYPERFUNC_DATA"])
    if not path.is_dir():
        pytest.fail(f"HYPERFUNC_DATA is {str(path)!r}, which is not a folder")
    return path


@pytest.fixture(scope="session")
def pair() -> Iterator[ranks.Ranks]:
    """Two ranks, which start with the first test that needs them."""
    with ranks.running(2) as two:
        yield two


@pytest.fixture(scope="session")
def four() -> Iterator[ranks.Ranks]:
    """Four ranks, on more cores or on fewer."""
    with ranks.running(4) as processes:
        yield processes
