"""The README and the guides beside their snippets, which run as doctests: tables, links, sizes."""

import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hyperfunc as hf
from tests import plugin

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FOLDER = ROOT / "examples" / "guides"
GUIDES = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}


def rows_under(title: str) -> dict[str, str]:
    """The first two columns of the table with this title in its first cell."""
    page = GUIDES["methods"]
    lines = page[page.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
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


def anchors(text: str) -> set[str]:
    """Where a link may lead on a page: its headings, outside of code."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(FOLDER.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if name.startswith("http"):
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_section_and_every_guide_is_in_the_contents() -> None:
    contents = README[: README.index("## Two commands")]
    for title in re.findall(r"^## (.*)$", README, flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
        assert f"(#{anchor})" in contents, title
    for name in GUIDES:
        assert f"](examples/guides/{name}.md)" in README, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_of_code_are_closed(page: Path) -> None:
    fences = re.findall(r"^```.*$", page.read_text(), flags=re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[1::2]) <= {"```"}


def test_pages_that_say_so_are_slow(tmp_path: Path) -> None:
    marked = []
    for name, text in GUIDES.items():
        path = tmp_path / f"{name}.md"
        path.write_text(text)
        item = SimpleNamespace(path=path, add_marker=lambda mark, name=name: marked.append(name))
        plugin.pytest_collection_modifyitems([item])
    assert marked
    assert set(marked) == {
        name for name, text in GUIDES.items() if "`make test-all` only -->" in text
    }


def test_pages_are_short() -> None:
    assert len(README.splitlines()) <= 350
    for name, text in GUIDES.items():
        assert len(text.splitlines()) <= 250, name


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^\*\*([\d.]+)\*\*", GUIDES["changelog"], re.MULTILINE)
    assert version
    assert newest
    assert newest[1] == version[1]


def test_pictures_are_small_and_drawn_by_a_script() -> None:
    made = (FOLDER / "pictures.py").read_text()
    for folder in (FOLDER / "pictures", ROOT / "examples" / "pictures"):
        for picture in folder.iterdir():
            assert picture.stat().st_size < 200_000, picture
            script = (ROOT / "examples" / f"{picture.stem}.py").is_file()
            assert f"- {picture.name}: " in made if folder.parent == FOLDER else script, picture


def test_the_tree_of_methods_is_the_same_wherever_it_stands() -> None:
    tree = re.compile(r"^```\nDoes your inner solver.*?^```", re.MULTILINE | re.DOTALL)
    assert tree.findall(README) == tree.findall(GUIDES["methods"])
    assert len(tree.findall(README)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_those_of_the_package(page: Path) -> None:
    names = set(re.findall(r"\bhf\.([A-Za-z_][\w.]*\w)", page.read_text()))
    for name in names - {"SteepestDescent"}:  # which the guide on extending would add
        assert attrgetter(name)(hf) is not None


def test_every_paper_is_among_the_references() -> None:
    for folder in ("hyperfunc", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text()):
                assert number in GUIDES["references"], f"{path}: arXiv {number}"
