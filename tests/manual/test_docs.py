"""The pages of the interface and the guides: links lead somewhere, names are links, no warnings."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hyperfunc as hf

VOID = {"br", "hr", "img", "input", "link", "meta", "path"}


class Page(HTMLParser):
    """The anchors and links of a page, and the words set as code in docstrings without a link."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.code: set[str] = set()
        self._open: list[tuple[str, str]] = []
        self._text: str | None = None
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        outside = {name for name, _ in self._open}
        if tag not in VOID:
            self._open.append((tag, given.get("class", "")))
        if tag == "a":
            self.links.add(given.get("href", ""))
            self._text = None
        in_docstring = any("docstring" in kind for _, kind in self._open)
        if tag == "code" and in_docstring and not outside & {"pre", "a"}:
            self._text = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "code" and self._text is not None:
            self.code.add(self._text)
            self._text = None
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text += data


@pytest.mark.slow
def test_the_pages(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    recipe = re.search(r"/python (\S+) docs-html", (root / "Makefile").read_text())
    assert recipe
    command = [sys.executable, "-W", "error", root / recipe[1], tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (run.returncode, run.stderr) == (0, "")
    pages = {path.relative_to(tmp_path): Page(path) for path in tmp_path.rglob("*.html")}
    guides = {path.stem for path in (root / "examples" / "guides").glob("*.md")}
    assert {Path("guides", f"{name}.html") for name in guides | {"index"}} < set(pages)
    assert len(pages) > 5 + len(guides)
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if target.startswith(("http", "mailto")):
                continue
            place = (tmp_path / path.parent / target).resolve() if target else tmp_path / path
            found = pages.get(place.relative_to(tmp_path.resolve()))
            assert found, f"{path}: {link}"
            assert not anchor or anchor in found.anchors, f"{path}: {link}"
        for word in () if path.parts[0] == "guides" else page.code:
            assert word.removeprefix("hyperfunc.") not in hf.__all__ or word.islower(), word
            assert not word.startswith("hyperfunc."), f"{path}: {word} leads nowhere"
