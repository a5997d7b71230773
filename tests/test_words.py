"""The words of our docstrings: each begins with a verb or with a noun phrase that names the thing.

An opening such as "What …" or "Of …" makes the reader guess what is described before it is named.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pgolf_post", "trainer")
REFUSED = ("Of ", "By ", "The same", "What ", "All ", "How ", "Which ", "Where ", "In ", "Every ")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def refused(source: str) -> list[tuple[int, str]]:
    """Return the line and the first line of each docstring with a refused beginning."""
    return [(line, text.split("\n")[0]) for line, text in docstrings(source) if text.startswith(REFUSED)]


def test_docstrings_begin_by_naming_the_thing() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    bad = [f"{path.relative_to(ROOT)}:{line}: {text}" for path in files for line, text in refused(path.read_text())]
    assert bad == []


@pytest.mark.parametrize("beginning", REFUSED)
@pytest.mark.parametrize(
    "place", ['"""{}it is."""', 'class A:\n    """{}it is."""', 'def f():\n    """\n    {}it is."""']
)
def test_a_refused_beginning_is_seen_wherever_it_stands(beginning: str, place: str) -> None:
    assert [text for _, text in refused(place.format(beginning))] == [f"{beginning}it is."]
