"""Known objects are written as None: nobody may read one, or be handed one, without knowing it."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from pgolf_post.errors import MismatchError
from pgolf_post.submit.facts import Facts
from pgolf_post.submit.reduce import is_known_object
from pgolf_post.submit.sources import Definition
from pgolf_post.submit.trees import walk


def check_known(reached: Mapping[str, Definition], facts: Facts) -> None:
    """Raise MismatchError where a known object, written as None, is read by something that does not know it."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    functions: dict[str, ast.FunctionDef] = {}
    for at, definition in reached.items():
        node = definition.node
        if isinstance(node, ast.FunctionDef):
            functions[at] = node
        for each in walk(node):
            if isinstance(each, ast.ClassDef):
                own = [part for part in each.body if isinstance(part, ast.FunctionDef)]
                for method in own:
                    methods.setdefault(method.name, []).append(method)
                    if method.name == "__init__" and each is node:
                        functions[at] = method
    for at, definition in reached.items():
        for part in walk(definition.node):
            if isinstance(part, (ast.Attribute, ast.Subscript)) and is_known_object(part.value):
                raise MismatchError(f"{at}: {ast.unparse(part)} reads a setting that is not known when it is written")
            if not isinstance(part, ast.Call):
                continue
            for place, argument in enumerate(part.args):
                if is_known_object(argument):
                    for function, first in _callees(part.func, definition.node, functions, methods):
                        _check_parameter(at, function, place + first, facts)


def _callees(
    called: ast.expr,
    around: ast.AST,  # the definition that the call stands in
    functions: Mapping[str, ast.FunctionDef],
    methods: Mapping[str, list[ast.FunctionDef]],
) -> list[tuple[ast.FunctionDef, int]]:
    """Return the functions that a call may reach, and how many parameters come before its first argument."""
    if ast.unparse(called) == "super().__init__" and isinstance(around, ast.ClassDef):
        return [(functions[base.id], 1) for base in around.bases if isinstance(base, ast.Name) and base.id in functions]
    if isinstance(called, ast.Name):
        function = functions.get(called.id)
        return [(function, int(function.name == "__init__"))] if function is not None else []
    if isinstance(called, ast.Attribute):
        return [(method, 1) for method in methods.get(called.attr, [])]
    return []


def _check_parameter(at: str, function: ast.FunctionDef, place: int, facts: Facts) -> None:
    args = function.args.args
    annotation = args[place].annotation if place < len(args) else None
    if place >= len(args) or (isinstance(annotation, ast.Name) and annotation.id in facts.values):
        return
    read = {each.id for each in walk(function) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    if args[place].arg in read:
        raise MismatchError(f"{at} hands a known object to {function.name}({args[place].arg}), which does not know it")
