"""The page "When it goes wrong" knows every result code and every family of errors."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import hyperfunc as hf

ROOT = Path(__file__).parents[2]
SOURCES = {path: path.read_text() for path in (ROOT / "hyperfunc").rglob("*.py")}
PAGE = (ROOT / "examples" / "guides" / "when_it_goes_wrong.md").read_text()
FAMILIES = ("HypergradError", "NotImplementedError", "RuntimeError", "Unmappable")


def rows() -> list[tuple[str, ...]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")][2:]
    return [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines]


def phrases() -> list[str]:
    return [
        p
        for first, *_ in rows()
        for p in re.findall(r'"([^"]+)"', first)
        if p != "... expected ..."
    ]


def constants(text: str) -> dict[str, str]:
    """The texts that a module keeps under a name in capitals."""
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = literals(node.value)
    return found


def literals(node: ast.AST) -> str:
    parts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return "".join(part for part in parts if isinstance(part, str))


def raised() -> list[tuple[str, str]]:
    """Where errors of these families are raised, and the fixed parts of their texts."""
    everywhere: dict[str, str] = {}
    for text in SOURCES.values():
        everywhere.update(constants(text))
    found = []
    for path, text in SOURCES.items():
        known = everywhere | constants(text)
        for node in ast.walk(ast.parse(text)):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in FAMILIES:
                named = "".join(
                    known.get(n.id, "") for n in ast.walk(call) if isinstance(n, ast.Name)
                )
                if "{advice}" in (ast.get_source_segment(text, call) or ""):
                    named += known["_ADVICE"]
                # a text that is made elsewhere in the module
                fixed = literals(call) + named or literals(ast.parse(text))
                found.append((f"{path.name}:{node.lineno}", fixed))
    return found


def covers(phrase: str, text: str) -> bool:
    return all(part.strip() in text for part in phrase.replace("torch.sparse_coo", "").split("..."))


@pytest.mark.parametrize("code", [code for code in hf.RESULTS if code is not hf.RESULTS.success])
def test_every_result_code_has_a_row_and_an_example(code: hf.RESULTS) -> None:
    assert any(first.startswith(f"`{code.name}`") for first, *_ in rows())
    example = (
        f"'{code.name}'" if not code.failed else code.message.split(":")[0].split(" (")[0][:20]
    )
    assert example in PAGE.split("```python")[1]


def test_every_row_has_a_cause_and_a_fix() -> None:
    assert len(rows()) > 20
    assert all(len(row) == 3 and all(row) for row in rows())


def test_every_error_has_a_row() -> None:
    assert len(raised()) > 12
    missing = [place for place, text in raised() if not any(covers(p, text) for p in phrases())]
    assert not missing


def test_every_phrase_is_in_the_library() -> None:
    everything: Any = "".join(literals(ast.parse(text)) for text in SOURCES.values())
    assert not [phrase for phrase in phrases() if not covers(phrase, everything)]
