"""Build the pages of the interface by pdoc, and those of the README and the guides beside them.

The pages need no network: mathematics is MathML, and scripts and styles are part of each page.

python .ci/docs.py docs-html
"""

import re
import shutil
import sys
import warnings
from pathlib import Path

import pdoc
from math_core import LatexToMathML
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parents[1]
STYLES = ("resources/bootstrap-reboot.min", "theme", "syntax-highlighting", "content", "custom")
# What is code, and the ways to write mathematics beside it: TeX in $$ $$, in \( \), in $ $
CODE_OR_MATH = re.compile(
    r"^```.*?^```|^>>>.*?(?=^\s*$)|``.*?``|`[^`]*`"
    r"|\$\$(.+?)\$\$|\\\\\((.+?)\\\\\)|(?<![\w$])\$([^$]+?)\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)
TEX = LatexToMathML(fancy_error=False)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style} main {{max-width: 60rem; margin: 2rem auto; padding: 0 1rem}}</style>
</head>
<body>
<main class="pdoc">
<p><a href="../hyperfunc.html">The interface</a> · <a href="index.html">The guides</a></p>
<section class="module-info"><div class="docstring">{body}</div></section>
</main>
</body>
</html>
"""


def main(folder: Path) -> None:
    """Write all pages into a folder."""
    # pdoc cannot resolve the types of constructors that Python writes, and prints them as they are
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    pdoc.render.configure(
        docformat="google", template_directory=Path(__file__).parent / "templates"
    )
    pdoc.render.env.filters["to_html"] = pdoc.search.to_html = rendered
    # "hyperfunc.task_map" is the function, on the page of the package
    pdoc.pdoc(ROOT / "hyperfunc", "!hyperfunc.task_map", output_directory=folder)
    template = pdoc.render.env.get_template
    style = "\n".join(template(f"{name}.css").render() for name in STYLES)
    guides = folder / "guides"
    for place in ("pictures", "guides/pictures"):
        shutil.copytree(ROOT / "examples" / place, folder / place, dirs_exist_ok=True)
    for source in [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]:
        text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", linked, source.read_text())
        name = "index" if source.stem == "README" else source.stem
        title = text.split("\n", 1)[0].lstrip("# ")
        page = PAGE.format(title=title, style=style, body=rendered(text))
        (guides / f"{name}.html").write_text(page)


def rendered(text: str) -> str:
    """The html of Markdown, with mathematics as MathML."""
    return to_html(CODE_OR_MATH.sub(as_mathml, text))


def as_mathml(found: re.Match[str]) -> str:
    """The MathML of a formula; code as it is. A command that is not known raises."""
    block, *inline = found.groups()
    formula = block or next(filter(None, inline), None)
    if formula is None:
        return found[0]
    if r"\\" in formula and r"\begin" not in formula:  # several lines, as Sphinx has them
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    mathml = " ".join(TEX.convert_with_local_state(formula, displaystyle=bool(block)).split())
    # a line of Markdown that began with <math> would be a paragraph of its own
    return mathml if block else f"<span>{mathml}</span>"


def linked(link: re.Match[str]) -> str:
    """A link between pages, as one of the folder; to other files of the repository, their name."""
    image, words, target = link.groups()
    path, _, anchor = target.partition("#")
    stem = "index" if path == "../../README.md" else Path(path).stem
    places = ("", f"{stem}.md", f"examples/guides/{stem}.md", "../../README.md")
    if image:
        nearer = path.replace("examples/guides/", "").replace("examples/", "../")
        return f"![{words}]({nearer})"
    if target.startswith("http"):
        return link[0]
    if path not in places:
        return words
    return f"[{words}]({stem + '.html' if path else ''}{'#' if anchor else ''}{anchor})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
