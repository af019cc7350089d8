"""Try the installed wheel as a newcomer would: the README's first example, from another folder.

build/empty/bin/python .ci/try_wheel.py    # after it was installed there; `make dist` does both
"""

import doctest
import importlib.metadata
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Close(doctest.OutputChecker):
    """Accepts numbers that differ in their last digit, as another machine prints them."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        (words, numbers), (others, found) = map(parts, (want, got))
        return words == others and all(
            abs(a - b) < 2e-4 for a, b in zip(numbers, found, strict=True)
        )


def parts(text: str) -> tuple[list[str], list[float]]:
    """What stands around the numbers of a text, and the numbers."""
    number = r"(-?\d+\.\d*)"
    return re.sub(number, " ", text).split(), [float(found) for found in re.findall(number, text)]


def main() -> None:
    """Exit with a message where something is not as it should be."""
    os.chdir(tempfile.mkdtemp())  # sys.path begins with the folder of this script, not the root
    import hyperfunc as hf

    place = Path(hf.__file__).parent
    files = importlib.metadata.files("torch-hyperfunc") or []
    top = {file.parts[0] for file in files}
    version = importlib.metadata.version("torch-hyperfunc")
    if place == ROOT / "hyperfunc" or f'version = "{version}"' not in read("pyproject.toml"):
        sys.exit(f"{place} holds version {version}, which is not the wheel")
    if top != {"hyperfunc", f"torch_hyperfunc-{version}.dist-info"}:
        sys.exit(f"the wheel brings {sorted(top)}")
    for name in ("py.typed", "LICENSE"):
        if name not in {file.name for file in files}:
            sys.exit(f"the wheel lacks {name}")
    first = re.search(r"## The idea\n(.*?)\n## ", read("README.md"), re.DOTALL)
    example = doctest.DocTestParser().get_doctest(first[1], {}, "README.md", None, 0)
    failed, tried = doctest.DocTestRunner(Close()).run(example)
    if failed or not tried:
        sys.exit(f"{failed} of {tried} statements of the README's first example failed")
    print(f"torch-hyperfunc {version}, in {place}: {tried} statements")


def read(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text()


if __name__ == "__main__":
    main()
