"""The imports of the whole tree, read from its source: they go down one table of floors, and never in a circle.

An import counts wherever it stands: at the top of a file, inside a function, under TYPE_CHECKING, or as a string that
spells a module for `import_module`. A name imported from a package counts as an import of the file that defines it, so
that an `__init__.py` may re-export what its package's own files import from each other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pgolf_post", "trainer", "benchmarks")

# A file imports from its own floor and from those above it in this table; names on one line do not import each other.
FLOORS = """
pgolf_post.errors
pgolf_post.base
pgolf_post.settings
pgolf_post.watching
pgolf_post.families
pgolf_post.checkpoint
pgolf_post.derived
pgolf_post.cache pgolf_post.elsewhere pgolf_post.provenance
pgolf_post.presets
pgolf_post.rules
pgolf_post.plan
pgolf_post.data
pgolf_post.ledger
pgolf_post.calibrate
pgolf_post.quantize
pgolf_post.pack
pgolf_post.artifacts
pgolf_post.artifacts_report
pgolf_post.score
pgolf_post.average pgolf_post.importers
pgolf_post.curves
pgolf_post.diagnose
pgolf_post.fit
pgolf_post.attribute pgolf_post.prune pgolf_post.demo pgolf_post.describe pgolf_post.submit pgolf_post.doctor
pgolf_post.sweep
pgolf_post.sizing
pgolf_post.report
pgolf_post
pgolf_post.cli
pgolf_post.__main__
trainer.tables
trainer.model
trainer.schedule
trainer
benchmarks
"""

FORBIDDEN = {("trainer", "pgolf_post.cli"): "the trainer is used as a library too, and prints through base.progress"}

# importing module → imported module: why this one import may go upwards or close a cycle
EXCEPTIONS: dict[tuple[str, str], str] = {}

Modules = dict[str, Path]
Graph = dict[str, set[str]]


def modules_under(root: Path, packages: tuple[str, ...] = PACKAGES) -> Modules:
    """Return dotted module name → file; a package's name stands for its `__init__.py`."""
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(module: str, path: Path) -> list[tuple[str, str]]:
    """Return every import in a file as (module, name imported from it); the name is empty for a plain `import`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            names += [(".".join([*above, *filter(None, [node.module])]), alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\w+(\.\w+)+(:\w+)?", str(node.value)):
            names.append((str(node.value).partition(":")[0], ""))
    return names


def defining_module(source: str, name: str, modules: Modules) -> str:
    """Return the module that `from source import name` takes the name from, through packages that re-export it."""
    if f"{source}.{name}" in modules:
        return f"{source}.{name}"
    path = modules.get(source)
    if path is None or path.name != "__init__.py":
        return source
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module != source:
                    return defining_module(node.module, alias.name, modules)
    return source


def graph_of(modules: Modules) -> Graph:
    """Return module → the modules of the tree that it imports."""
    graph: Graph = {}
    for module, path in modules.items():
        targets = {defining_module(source, name, modules) for source, name in imported_names(module, path)}
        graph[module] = (targets & modules.keys()) - {module}
    return graph


def cycles(graph: Graph) -> list[str]:
    """Return one line for each cycle that a depth-first walk closes; none if and only if the graph has none."""
    lines: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            lines.append(" → ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return lines


def floor_names() -> list[tuple[int, str]]:
    """Return (number, prefix) of every name in the table, the longest prefixes first."""
    rows = [(number, name) for number, row in enumerate(FLOORS.split("\n")) for name in row.split()]
    return sorted(rows, key=lambda row: -len(row[1]))


def floor_of(module: str) -> tuple[int, str]:
    """Return the floor's number and its name. Raises LookupError if the table lacks the module."""
    for number, name in floor_names():
        if module == name or (name != "pgolf_post" and module.startswith(name + ".")):  # it is its __init__.py alone
            return number, name
    raise LookupError(f"{module} is on no floor: add it to FLOORS")


def upward_imports(graph: Graph) -> list[tuple[str, str]]:
    """Return the imports of a higher floor, of another name on the same one, or that are forbidden outright."""
    upward = []
    for module, targets in graph.items():
        number, name = floor_of(module)
        for target in sorted(targets):
            target_number, target_name = floor_of(target)
            sideways = number == target_number and name != target_name
            forbidden = (name.partition(".")[0], target_name) in FORBIDDEN
            if target_number > number or sideways or forbidden:
                upward.append((module, target))
    return upward


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(modules_under(ROOT))


def without(graph: Graph, pairs: Iterable[tuple[str, str]]) -> Graph:
    """Return the graph without some of its imports."""
    return {
        module: targets - {target for source, target in pairs if source == module} for module, targets in graph.items()
    }


def test_no_import_cycle(graph: Graph) -> None:
    assert cycles(without(graph, EXCEPTIONS)) == []


def test_every_import_goes_down(graph: Graph) -> None:
    assert upward_imports(without(graph, EXCEPTIONS)) == []


@pytest.mark.parametrize("pair", EXCEPTIONS, ids=" → ".join)
def test_an_exception_is_needed_and_has_a_reason(graph: Graph, pair: tuple[str, str]) -> None:
    with_it = without(graph, EXCEPTIONS.keys() - {pair})
    assert pair[1] in graph[pair[0]]
    assert upward_imports(with_it) == [pair] or cycles(with_it) != []
    assert len(EXCEPTIONS[pair]) > 10


def test_every_name_of_the_table_exists(graph: Graph) -> None:
    assert [name for _, name in floor_names() if name not in graph] == []


MADE = {
    "pgolf_post/__init__.py": "",
    "pgolf_post/base/__init__.py": "from pgolf_post.base.tool import use\n",
    "pgolf_post/base/tool.py": "use = 1\n",
    "pgolf_post/base/other.py": "from pgolf_post.base import use\n",
}


@pytest.mark.parametrize(
    ("added", "upward", "circular"),
    [
        ({}, [], 0),
        ({"base/tool.py": "def f():\n    from pgolf_post.base.other import x\n"}, [], 1),
        ({"base/tool.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .other import x\n"}, [], 1),
        ({"base/tool.py": "use = 'pgolf_post.base.other:x'\n"}, [], 1),
        ({"base/tool.py": "import pgolf_post.base.other\n"}, [], 1),
        ({"data.py": "from pgolf_post.base import use\n"}, [], 0),
        (
            {"data.py": "", "base/tool.py": "def f():\n    from pgolf_post import data\n"},
            [("pgolf_post.base.tool", "pgolf_post.data")],
            0,
        ),
        (
            {"cache.py": "", "provenance.py": "import pgolf_post.cache\n"},
            [("pgolf_post.provenance", "pgolf_post.cache")],
            0,
        ),
    ],
)
def test_the_reader_sees_imports_wherever_they_stand(
    tmp_path: Path, added: dict[str, str], upward: list[tuple[str, str]], circular: int
) -> None:
    for name, text in (MADE | {f"pgolf_post/{name}": text for name, text in added.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    made = graph_of(modules_under(tmp_path))
    assert upward_imports(made) == upward
    assert len(cycles(made)) == circular


@pytest.mark.parametrize("module", ["trainer.run.loop", "trainer.model.gpt"])
def test_the_trainer_must_not_import_the_command_line(module: str) -> None:
    made = {module: {"pgolf_post.cli.common", "pgolf_post.checkpoint"}}
    assert upward_imports(made) == [(module, "pgolf_post.cli.common")]


def test_the_model_does_not_know_what_trains_it() -> None:
    made = {"trainer.model.gpt": {"trainer.tables", "trainer.config"}}
    assert upward_imports(made) == [("trainer.model.gpt", "trainer.config")]


def test_a_module_that_the_table_lacks_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"pgolf_post\.novelty is on no floor"):
        floor_of("pgolf_post.novelty")
