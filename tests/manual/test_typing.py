"""The public functions' types, as mypy and pyright see them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests" / "typing_samples.py"

CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", str(SAMPLES)],
    "pyright": [
        *(sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable),
        *("--level", "error", str(SAMPLES)),
    ],
}


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="Tensor is less typed in torch 2.4")
@pytest.mark.parametrize("checker", [pytest.param("mypy", marks=pytest.mark.slow), "pyright"])
def test_errors_are_found_where_they_are_and_nowhere_else(checker):
    lines = SAMPLES.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "# wrong" in line}
    run = subprocess.run(CHECKERS[checker], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(rf"{SAMPLES.name}:(\d+)(?::\d+)?(?: -|:) error", run.stdout)
    assert {int(number) for number in found} == wrong, run.stdout + run.stderr
    assert len(wrong) == 4


@pytest.mark.parametrize("folder", ["hyperfunc", "tests", "examples"])
def test_the_syntax_is_that_of_python_3_10(folder):
    """Newer modules and methods are found by mypy, which takes this version for its own."""
    for path in (ROOT / folder).rglob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in settings
    assert 'target-version = "py310"' in settings
    assert 'python_version = "3.10"' in settings
