"""The plan of the package: who imports whom, who uses private names of torch, how long files are.

Everything is read from the syntax trees, so that imports inside functions and for type checkers
count too. The checks are functions of sources, which the tests also give small faulty packages.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import hyperfunc

# From the ground up. A room (a folder of the package, or a module beside the folders) may import
# rooms on lower floors: not on higher ones, and not on its own.
FLOORS = (
    ("_types",),
    ("_torch",),
    ("_engine",),
    ("_compile", "modules", "optim", "task_map"),
    ("prox",),
    ("inner_solvers", "linear_solvers"),
    ("_rule",),
    ("bilevel", "distributed", "fixed_point_solvers", "iterative"),
    ("transforms",),
    ("diagnostics", "equilibrium"),
    ("__init__",),
)
# Where names that are private to torch may be used.
SEAM = ("_torch", "_compile")
MOST_LINES = 600

PACKAGE = Path(hyperfunc.__file__).parent
# Not private in spite of the underscore: of a named tuple, and where an nn.Module keeps things.
ALLOWED = {"_asdict", "_fields", "_replace", "_buffers", "_modules", "_parameters"}

Modules = Mapping[str, ast.Module]
"""The syntax trees of a package by their paths in it, such as ``prox/_base``."""


def read(root: Path) -> Modules:
    """All modules of a package."""
    return {
        path.relative_to(root).with_suffix("").as_posix(): ast.parse(path.read_text())
        for path in sorted(root.rglob("*.py"))
    }


def room_of(module: str) -> str:
    return module.split("/")[0]


def imports(modules: Modules, package: str) -> Iterator[tuple[str, int, str]]:
    """Each import of the package's own modules: the importing module, the line, the imported."""

    def find(dotted: str) -> str:
        """The module that a dotted name below the package is, or is defined in."""
        path = dotted.replace(".", "/").strip("/")
        while path and path not in modules and f"{path}/__init__" not in modules:
            path = path.rpartition("/")[0]
        return path if path in modules else f"{path}/__init__".strip("/")

    for module, tree in modules.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = node.module or ""
                if node.level:
                    above = [package, *module.split("/")][: -node.level]
                    start = ".".join([*above, start]).strip(".")
                names = [f"{start}.{alias.name}" for alias in node.names]
            for name in names:
                if name == package or name.startswith(f"{package}."):
                    yield module, node.lineno, find(name.removeprefix(package))


def pointing_up(modules: Modules, package: str, floors: Sequence[Sequence[str]]) -> list[str]:
    """The imports of rooms that are not on a lower floor."""
    floor = {room: height for height, rooms in enumerate(floors) for room in rooms}
    return [
        f"{module}.py:{line} imports {target}"
        for module, line, target in imports(modules, package)
        if (above := room_of(target)) != (room := room_of(module))
        and floor.get(above, -1) >= floor.get(room, len(floors))
    ]


def circles(modules: Modules, package: str) -> list[str]:
    """The circles of imports, between rooms and between modules: each broken to find the next."""
    found = []
    edges = [(module, target) for module, _, target in imports(modules, package)]
    between_rooms = [(room_of(module), room_of(target)) for module, target in edges]
    for pairs in (between_rooms, edges):
        graph: dict[str, set[str]] = {}
        for start, end in pairs:
            if start != end:
                graph.setdefault(start, set()).add(end)
        while True:
            try:
                graphlib.TopologicalSorter(graph).prepare()
            except graphlib.CycleError as error:
                _, *circle = error.args[1][::-1]  # from the importing to the imported
                first = circle.index(min(circle))
                circle = [*circle[first:], *circle[: first + 1]]
                found.append(" -> ".join(circle))
                graph[circle[0]].discard(circle[1])
            else:
                break
    return found


def unplanned(modules: Modules, floors: Sequence[Sequence[str]]) -> list[str]:
    """The rooms that the table lacks, and those that it has and the package has not."""
    rooms, table = {room_of(module) for module in modules}, {r for floor in floors for r in floor}
    return [f"{room} is not in FLOORS" for room in sorted(rooms - table)] + [
        f"{room} of FLOORS is not in the package" for room in sorted(table - rooms)
    ]


def private_uses(modules: Modules) -> list[tuple[str, int, str]]:
    """Where names that are private to torch, or to another library, are used: module, line, name.

    Names reached through torch are known by their imports. Beyond those it is attributes with an
    underscore of other values that count, if the package defines nothing of that name.
    """
    ours = ALLOWED | {name for tree in modules.values() for name in _defined(tree)}
    uses = [
        (module, line, name)
        for module, tree in modules.items()
        for line, name in _private_names(tree, ours)
    ]
    return sorted(uses)


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _private_names(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    known: dict[str, str] = {}  # what a name in the module stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if _is_private(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = name
                if _is_private(name):
                    yield node.lineno, name
    for node in tree.body:  # _aten = torch.ops.aten
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = _dotted(node.value, known)
            if name.startswith("torch."):
                known[node.targets[0].id] = name

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        name = _dotted(node, known)
        if _is_private(name):
            yield node.lineno, name  # type: ignore[attr-defined]
        elif not name:
            if isinstance(node, ast.Attribute) and _hidden(node.attr) and node.attr not in ours:
                yield node.lineno, node.attr
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*", text):
                yield node.lineno, text
            if isinstance(node, ast.Call) and _dotted(node.func, known) == "":
                function = node.func.id if isinstance(node.func, ast.Name) else ""
                if function in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
                    attribute = getattr(node.args[1], "value", None)
                    if isinstance(attribute, str) and _hidden(attribute) and attribute not in ours:
                        yield node.lineno, attribute
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(tree)


def _dotted(node: ast.AST, known: Mapping[str, str]) -> str:
    """What a chain of attributes of an imported name stands for, or the empty string."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
        return ".".join([known[node.id], *reversed(parts)])
    return ""


def _is_private(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(map(_hidden, rest))


def _hidden(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def outside_the_seam(modules: Modules, seam: Sequence[str]) -> list[str]:
    """The uses of private names in other rooms than those."""
    return [
        f"{module}.py:{line} uses {name}"
        for module, line, name in private_uses(modules)
        if room_of(module) not in seam
    ]


def too_long(root: Path, most: int) -> list[str]:
    """The modules of more lines than that."""
    lengths = {path: len(path.read_text().splitlines()) for path in sorted(root.rglob("*.py"))}
    return [
        f"{path.relative_to(root).as_posix()} has {length} lines"
        for path, length in lengths.items()
        if length > most
    ]


@pytest.fixture(scope="module")
def modules() -> Modules:
    return read(PACKAGE)


def test_every_room_has_a_floor(modules: Modules) -> None:
    assert unplanned(modules, FLOORS) == []


def test_imports_point_down(modules: Modules) -> None:
    assert pointing_up(modules, "hyperfunc", FLOORS) == []


def test_imports_have_no_circles(modules: Modules) -> None:
    assert circles(modules, "hyperfunc") == []


def test_private_names_of_torch_stay_in_the_seam(modules: Modules) -> None:
    assert outside_the_seam(modules, SEAM) == []


def test_no_module_is_too_long() -> None:
    assert too_long(PACKAGE, MOST_LINES) == []


# Faults planted in a small package, and what is to be found: nothing else, for all else is right.
PLAN = (("low", "_torch"), ("high", "side"), ("__init__",))
SOUND = {
    "__init__": "from small.high import rise",
    "low": "import torch\nfrom torch import nn",
    "_torch/__init__": "from torch._C import _functorch\nfloor = _functorch.maybe_get_level",
    "high/__init__": "from small.high._a import rise",
    "high/_a": "from . import _b\nfrom .. import low\n\ndef rise():\n    _b._own()",
    "high/_b": "import small._torch as seam\n\ndef _own():\n    return (1,)._replace()",
    "side": "from small.low import torch",
}
UP = [
    "from small.high import rise",
    "from small import high",
    "import small.high",
    "import small.high._a as a",
    "from .high._a import rise",
    "def f():\n    from small.high import rise",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.high import rise",
]
PRIVATE = {
    "import torch._dynamo": "torch._dynamo",
    "import torch._inductor.config as c": "torch._inductor.config",
    "from torch._subclasses.fake_tensor import FakeTensorMode": (
        "torch._subclasses.fake_tensor.FakeTensorMode"
    ),
    "from torch._higher_order_ops import while_loop": "torch._higher_order_ops.while_loop",
    "from torch import _functorch": "torch._functorch",
    "def f():\n    import torch\n    return torch._C._get_tracing_state()": (
        "torch._C._get_tracing_state"
    ),
    "import torch\nlevel = torch.autograd.forward_ad._current_level": (
        "torch.autograd.forward_ad._current_level"
    ),
    "from torch.autograd import forward_ad as fa\nfa._current_level": (
        "torch.autograd.forward_ad._current_level"
    ),
    "from torch.nn.utils.parametrizations import _WeightNorm": (
        "torch.nn.utils.parametrizations._WeightNorm"
    ),
    "from torch.utils._pytree import tree_leaves": "torch.utils._pytree.tree_leaves",
    "import torch\ntorch._foreach_add_([], [])": "torch._foreach_add_",
    "import torch\naten = torch.ops.aten\naten.mm._schema": "torch.ops.aten.mm._schema",
    "import torch\ntorch.ops.mkldnn._linear_pointwise.default()": (
        "torch.ops.mkldnn._linear_pointwise.default"
    ),
    "def f(x):\n    return x.detach()._version": "_version",
    "def f(x):\n    return getattr(x, '_is_view')()": "_is_view",
    "import sys\nsys.modules['torch.distributed._tensor']": "torch.distributed._tensor",
}


def planted(folder: Path, sources: Mapping[str, str]) -> Path:
    """The small package, with these modules in place of its own or beside them."""
    for module, source in {**SOUND, **sources}.items():
        path = folder / "small" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    return folder / "small"


def faults(root: Path) -> list[str]:
    """All that the checks find."""
    modules = read(root)
    return [
        *unplanned(modules, PLAN),
        *pointing_up(modules, "small", PLAN),
        *circles(modules, "small"),
        *outside_the_seam(modules, ["_torch"]),
        *too_long(root, 10),
    ]


def test_the_checks_find_nothing_where_nothing_is(tmp_path: Path) -> None:
    assert faults(planted(tmp_path, {})) == []


@pytest.mark.parametrize("source", UP)
def test_an_import_that_points_up_is_named(source: str, tmp_path: Path) -> None:
    found = pointing_up(read(planted(tmp_path, {"low": source})), "small", PLAN)
    assert len(found) == 1
    assert re.fullmatch(r"low\.py:\d imports high/(__init__|_a)", found[0])


def test_an_import_on_the_same_floor_is_named(tmp_path: Path) -> None:
    assert faults(planted(tmp_path, {"side": "import torch\nfrom small.high import rise"})) == [
        "side.py:2 imports high/__init__"
    ]


def test_each_circle_is_named(tmp_path: Path) -> None:
    sources = {
        "low": "import small.side",
        "side": "import small.low",
        "high/_a": "def f():\n    from small.high import _b",
        "high/_b": "from . import _a",
    }
    assert circles(read(planted(tmp_path, sources)), "small") == [
        "low -> side -> low",  # of rooms
        "high/_a -> high/_b -> high/_a",
        "low -> side -> low",  # of modules
    ]


def test_a_room_that_is_not_planned_is_named(tmp_path: Path) -> None:
    assert faults(planted(tmp_path, {"attic/__init__": "", "attic/_a": ""})) == [
        "attic is not in FLOORS"
    ]
    assert unplanned(read(tmp_path / "small"), [*PLAN, ("attic", "cellar")]) == [
        "cellar of FLOORS is not in the package"
    ]


@pytest.mark.parametrize("source", PRIVATE)
def test_a_use_of_a_private_name_is_named(source: str, tmp_path: Path) -> None:
    line = source.count("\n") + 1
    assert faults(planted(tmp_path, {"side": source})) == [f"side.py:{line} uses {PRIVATE[source]}"]
    assert faults(planted(tmp_path, {"side": "", "_torch/_more": source})) == []


def test_each_use_of_an_imported_private_name_is_named(tmp_path: Path) -> None:
    source = "from torch._C import _functorch as f\nf.unwrap_if_dead\nf.is_batchedtensor"
    assert faults(planted(tmp_path, {"side": source})) == [
        "side.py:1 uses torch._C._functorch",
        "side.py:2 uses torch._C._functorch.unwrap_if_dead",
        "side.py:3 uses torch._C._functorch.is_batchedtensor",
    ]


def test_a_module_that_is_too_long_is_named(tmp_path: Path) -> None:
    assert faults(planted(tmp_path, {"side": "x = 1\n" * 10})) == ["side.py has 11 lines"]
