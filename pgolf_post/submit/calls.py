"""Parameters that every call of a function gives the same constant: inside it, they are that constant.

A forward that can continue a text is only ever called to read one from its start, so `past` is None in it. All calls in
the program are in sight. A call `x.name(…)` may be of any method called `name`; a function that is handed on, or called
with `*arguments`, is left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pgolf_post.submit.known import UNKNOWN
from pgolf_post.submit.sources import Definition, is_address, walk

LEFT_ALONE = ("forward",)  # called through __call__


@dataclass
class Calls:
    """Calls of a program by the address, or ".name", of what is called; and what is handed on as a value."""

    by_name: dict[str, list[ast.Call]] = field(default_factory=dict)
    handed_on: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, nodes: Iterable[ast.AST]) -> Calls:
        """Collect the calls in definitions."""
        calls, called = cls(), set[int]()
        for node in nodes:
            for each in walk(node):
                if isinstance(each, ast.Call) and (name := _name(each.func)):
                    calls.by_name.setdefault(name, []).append(each)
                    called.add(id(each.func))
            for each in walk(node):
                if id(each) not in called and isinstance(each, (ast.Name, ast.Attribute)) and (name := _name(each)):
                    calls.handed_on.add(name)
        return calls


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id if is_address(node.id) else ""
    return f".{node.attr}" if isinstance(node, ast.Attribute) else ""


def constant_parameters(
    reached: Mapping[str, Definition],
) -> list[tuple[Definition, ast.FunctionDef, dict[str, Any]]]:
    """Return functions of a program, each with its parameters that all calls give one constant."""
    calls = Calls.of(each.node for each in reached.values())
    bases = {part.id for each in reached.values() for part in _bases(each.node)}
    found = []
    for at, definition in reached.items():
        node = definition.node
        if isinstance(node, ast.FunctionDef):
            found.append((definition, node, _constants(node, calls, at, 0)))
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name in LEFT_ALONE:
                    continue
                if method.name == "__init__" and at not in bases:
                    found.append((definition, method, _constants(method, calls, at, 1)))
                elif not method.name.startswith("__"):
                    found.append((definition, method, _constants(method, calls, f".{method.name}", 1)))
    return [each for each in found if each[2]]


def _bases(node: ast.AST) -> list[ast.Name]:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return [each for base in bases for each in walk(base) if isinstance(each, ast.Name)]


def _constants(function: ast.FunctionDef, calls: Calls, name: str, first: int) -> dict[str, Any]:
    """Return the parameters from number `first` on that all calls give one constant, with it."""
    own = function.args
    if (
        own.vararg
        or own.kwarg
        or own.posonlyargs
        or (name in calls.handed_on and first == 0)
        or not calls.by_name.get(name)
    ):
        return {}
    if name.startswith(".") and (name in calls.handed_on or _is_static(function)):
        return {}
    if name in calls.handed_on and function.name != "__init__":
        return {}
    names = [arg.arg for arg in own.args]
    defaults: dict[str, ast.expr] = dict(zip(names[len(names) - len(own.defaults) :], own.defaults, strict=True))
    defaults.update({a.arg: d for a, d in zip(own.kwonlyargs, own.kw_defaults, strict=True) if d is not None})
    constants = {}
    for parameter in [*names[first:], *(arg.arg for arg in own.kwonlyargs)]:
        place = names.index(parameter) - first if parameter in names else None
        given = [_given(call, parameter, place, defaults, len(names) - first) for call in calls.by_name[name]]
        values = [each for each in given if each is not None]
        if values and all(_same(each, values[0]) for each in values) and values[0] is not UNKNOWN:
            constants[parameter] = values[0][0]
    return constants


def _is_static(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id in ("staticmethod", "classmethod") for d in function.decorator_list)


def _given(call: ast.Call, parameter: str, place: int | None, defaults: Mapping[str, ast.expr], room: int) -> Any:
    """Return what a call gives a parameter as (value,); None if it cannot be a call of the function; or UNKNOWN."""
    if any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords):
        return UNKNOWN
    if len(call.args) > room:
        return None
    named = {each.arg: each.value for each in call.keywords}
    node = named.get(parameter)
    if node is None and place is not None and place < len(call.args):
        node = call.args[place]
    node = node if node is not None else defaults.get(parameter)
    if isinstance(node, ast.Constant) and node.kind is None:
        return (node.value,)
    return UNKNOWN


def _same(one: Any, other: Any) -> bool:
    """Whether two calls give one constant; 0, 0.0 and False are three."""
    return one is other or (
        one is not UNKNOWN and other is not UNKNOWN and type(one[0]) is type(other[0]) and one[0] == other[0]
    )
