"""Build the pages of the interface by pdoc, and those of the README and the guides beside them.

python .ci/docs.py docs-html
"""

import re
import shutil
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parents[1]
STYLES = ("resources/bootstrap-reboot.min", "theme", "syntax-highlighting", "content")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style} main {{max-width: 60rem; margin: 2rem auto; padding: 0 1rem}}</style>
{math}
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
    # pdoc cannot resolve the types of a NamedTuple's constructor, and prints them as they are
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(ROOT / "hyperfunc", output_directory=folder)
    template = pdoc.render.env.get_template
    style = "\n".join(template(f"{name}.css").render() for name in STYLES)
    math = template("math.html.jinja2").render()
    guides = folder / "guides"
    pictures = ROOT / "examples" / "guides" / "pictures"
    shutil.copytree(pictures, guides / "pictures", dirs_exist_ok=True)
    for source in [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]:
        text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", linked, source.read_text())
        name = "index" if source.stem == "README" else source.stem
        title = text.split("\n", 1)[0].lstrip("# ")
        page = PAGE.format(title=title, style=style, math=math, body=to_html(text))
        (guides / f"{name}.html").write_text(page)


def linked(link: re.Match[str]) -> str:
    """A link between pages, as one of the folder; to other files of the repository, their name."""
    image, words, target = link.groups()
    path, _, anchor = target.partition("#")
    stem = "index" if path == "../../README.md" else Path(path).stem
    places = ("", f"{stem}.md", f"examples/guides/{stem}.md", "../../README.md")
    if target.startswith(("http", "pictures/")):
        return link[0]
    if image:
        return f"*{words}: see {path}*"
    if path not in places:
        return words
    return f"[{words}]({stem + '.html' if path else ''}{'#' if anchor else ''}{anchor})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
