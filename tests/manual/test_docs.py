"""The pages of the interface and the guides, which warn of nothing and need no network.

Links lead somewhere, names are links, formulas are MathML, and noise is left out.
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hyperfunc as hf

VOID = {"br", "hr", "img", "input", "link", "meta", "path"}


class Page(HTMLParser):
    """The anchors and links of a page, what it loads, and its words.

    Of these ``code`` are those set as code in docstrings without a link, and ``prose`` what is
    outside of code.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.code: set[str] = set()
        self.prose: list[str] = []
        self._open: list[tuple[str, str]] = []
        self._text: str | None = None
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag not in {"a", "math"}:
            sources = {given.get("src", ""), given.get("href", "")} - {""}
            self.loaded |= {url for url in sources if not url.startswith("data:")}
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
        if not {name for name, _ in self._open} & {"pre", "code", "script", "style"}:
            self.prose.append(data)


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
    assert "<math" in (tmp_path / "hyperfunc.html").read_text()
    for path, page in pages.items():
        for place in page.loaded:  # pictures of the folder, and nothing from the network
            assert (tmp_path / path.parent / place).is_file(), f"{path}: {place}"
        for data in page.prose:  # TeX, or what a NamedTuple says of its fields
            assert not re.search(r"\$|\\[a-zA-Z(]|Alias for field", data), f"{path}: {data}"
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
