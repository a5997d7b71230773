"""A generated program as `train_gpt.py`: its names shortened, minified, compressed.

The minifier leaves a parameter's name as it is, since somebody may call by it. Here the whole program is in sight: a
parameter that no call names is positional, and so gets a short name. Types of fields are read by nobody either.
"""

from __future__ import annotations

import ast

from pgolf_post.pack.script import PackedScript, pack_source
from pgolf_post.submit.trees import walk

KEPT = ("main",)  # all other globals may have short names: nobody imports the script


def packed(source: str) -> PackedScript:
    """Return a generated program as the file that is handed in."""
    return pack_source(shortened(source), KEPT, hoist=False)


def shortened(source: str) -> str:
    """Return a whole program with parameters positional where no call names them, and fields without types."""
    tree = ast.parse(source)
    spoken = _spoken(tree)
    for node in walk(tree):
        if isinstance(node, ast.FunctionDef):
            _positional(node.args, spoken)
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.AnnAssign):
                    each.annotation = ast.Constant(0)
    return ast.unparse(tree)


def _spoken(tree: ast.AST) -> set[str]:
    """Return the names that a call gives an argument by, or that a string may be."""
    names = {each.arg for each in walk(tree) if isinstance(each, ast.keyword) and each.arg}
    strings = (each.value for each in walk(tree) if isinstance(each, ast.Constant))
    return names | {value for value in strings if isinstance(value, str)}


def _positional(own: ast.arguments, spoken: set[str]) -> None:
    """Mark the parameters before the first one that may be given by name."""
    size = next((place for place, each in enumerate(own.args) if each.arg in spoken), len(own.args))
    own.posonlyargs, own.args = [*own.posonlyargs, *own.args[:size]], own.args[size:]
