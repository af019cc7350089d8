"""The README beside its snippets, which run as doctests: tables, links and the version."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def rows_under(title: str) -> dict[str, str]:
    """The first two columns of the table with this title in its first cell."""
    lines = README[README.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[1].strip("`") for row in cells}


RECOMMENDED = rows_under("`hf.diagnose` finds")
SIZE = 300


def orthogonal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]


def linear(make: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
    A = make(orthogonal(0), orthogonal(1))
    return {"optimality": lambda w, h: A @ w - h}


def mapped(make: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    J = make(orthogonal(0))
    return {"fixed_point": lambda w, h: J @ w + h}


def spread(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, SIZE, dtype=torch.float64).diag()


def bowl(w: Tensor, h: Tensor) -> Tensor:
    return (spread(1, 50).diag() * w**2).sum() / 2 - h @ w


# A problem for each row of the table, in its order.
FINDINGS: list[tuple[int, dict[str, Any]]] = [
    (3, {"optimality": lambda w, h: torch.stack([w[1], w[2] + w[0], 9 * w[0]]) - h}),
    (SIZE, {"inner_loss": bowl}),
    (SIZE, mapped(lambda Q: 0.2 * Q)),
    (SIZE, mapped(lambda Q: 0.97 * Q)),
    (SIZE, linear(lambda Q, P: Q @ spread(-50, 50) @ Q.T)),
    (SIZE, linear(lambda Q, P: Q @ spread(1, 1.05) @ P)),
    (SIZE, linear(lambda Q, P: Q @ spread(0.01, 1) @ P)),
]


@pytest.mark.parametrize("row", range(len(FINDINGS)))
def test_diagnose_recommends_what_the_table_says(row: int) -> None:
    size, condition = FINDINGS[row]
    point = torch.zeros(size, dtype=torch.float64)
    facts = hf.diagnose(point, torch.ones_like(point), **condition)
    assert type(facts.method).__name__ == list(RECOMMENDED.values())[row]


def test_the_table_has_no_other_rows() -> None:
    assert len(RECOMMENDED) == len(FINDINGS)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings
    }
    for name in ("README.md", "examples/README.md"):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif not target.startswith("http"):
                assert ((ROOT / name).parent / target).exists(), target


def test_every_section_is_in_the_contents() -> None:
    contents = README[: README.index("## Two commands")]
    for title in re.findall(r"^## (.*)$", README, flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
        assert f"(#{anchor})" in contents, title


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^\*\*([\d.]+)\*\*", README[README.index("## Changelog") :], re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1]


def test_every_paper_is_among_the_references() -> None:
    references = README[README.index("## References") :]
    for folder in ("hyperfunc", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text()):
                assert number in references, f"{path}: arXiv {number}"
