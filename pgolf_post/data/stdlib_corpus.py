"""The Python standard library as a corpus of prose and code, without any download.

Three kinds of documents: the language reference's help topics (`pydoc_data.topics`); each module's docstrings, which
are English; and each module's source without those docstrings. So no text appears twice. A module's two documents have
the same key, so that both fall into the same split. The walk is sorted and reads only
files that belong to the standard library: the corpus depends on the Python version and on nothing else.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from pgolf_post.data.documents import Document
from pgolf_post.errors import NotFoundError

# Tests hold no prose and much noise, the GUI and packaging packages are not installed everywhere, and pydoc_data is
# read as topics.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "pydoc_data"}
    | {"site-packages", "dist-packages", "__pycache__", "encodings"}  # encodings: tables of hex codes, not text
)
EXCLUDED_PREFIXES = ("_sysconfigdata",)

Docstring = ast.Constant
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_documents() -> Iterator[Document]:
    """Yield every document of the running Python's standard library. Raises NotFoundError if it has no sources."""
    yield from _topic_documents()
    root = Path(sysconfig.get_path("stdlib"))
    modules = module_files(root)
    if not modules:
        raise NotFoundError(f"{root} has no Python sources of the standard library", hint="name text files instead")
    for path in modules:
        yield from module_documents(path, key="stdlib/" + path.relative_to(root).as_posix())


def stdlib_source() -> dict[str, str]:
    """Return what a manifest records of this corpus: Python's implementation and version."""
    return {"corpus": "stdlib", "python": f"{sys.implementation.name} {sys.version.split()[0]}"}


def _topic_documents() -> Iterator[Document]:
    """Yield one document per help topic of the language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc_data.topics/{name}", topics[name])


def module_files(root: Path) -> list[Path]:
    """Return the standard library's .py files under `root`, sorted by path."""
    return sorted((path for path in root.rglob("*.py") if _is_wanted(path.relative_to(root))), key=Path.as_posix)


def _is_wanted(relative: Path) -> bool:
    """Return whether a file belongs to a standard module of the corpus."""
    module = relative.parts[0].removesuffix(".py")
    return (
        module in sys.stdlib_module_names
        and not EXCLUDED_FOLDERS.intersection(relative.with_suffix("").parts)
        and not relative.name.startswith(EXCLUDED_PREFIXES)
    )


def module_documents(path: Path, key: str) -> Iterator[Document]:
    """Yield a module's docstrings, then its source without them; nothing if the file does not decode or parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    docstrings = find_docstrings(tree)
    prose = "\n\n".join(_prose(node) for node in docstrings)
    for text in (prose, without_spans(source, docstrings)):
        if text.strip():
            yield Document(key, text)


def _prose(node: Docstring) -> str:
    """Return a docstring as help() shows it: dedented, without the lone surrogates that an escape can spell."""
    return inspect.cleandoc(str(node.value)).encode("utf-8", "ignore").decode("utf-8")


def find_docstrings(tree: ast.Module) -> list[Docstring]:
    """Return the docstring nodes of a module in the order of its text."""
    docstrings = [node for owner in ast.walk(tree) if isinstance(owner, Documented) and (node := _docstring(owner))]
    return sorted(docstrings, key=lambda node: (node.lineno, node.col_offset))


def _docstring(owner: Documented) -> Docstring | None:
    """Return the string that opens the owner's body, or None."""
    first = owner.body[0] if owner.body else None
    value = first.value if isinstance(first, ast.Expr) else None
    return value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def without_spans(source: str, nodes: list[Docstring]) -> str:
    """Return `source` without the text of `nodes` and without the lines that held nothing else."""
    lines = [line.encode("utf-8") for line in source.split("\n")]  # ast counts columns in UTF-8 bytes
    for node in reversed(nodes):
        assert node.end_lineno is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        joined = lines[first][: node.col_offset] + lines[last][node.end_col_offset :]
        lines[first : last + 1] = [joined] if joined.strip() else []
    return b"\n".join(lines).decode("utf-8")
