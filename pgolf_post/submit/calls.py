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

from pgolf_post.submit.facts import UNKNOWN
from pgolf_post.submit.sources import Definition, is_address
from pgolf_post.submit.trees import bound_names, walk

LEFT_ALONE = ("forward",)  # called through __call__
REMAKERS = ("_replace", "replace", "dataclasses:replace", "types:SimpleNamespace")


@dataclass
class Calls:
    """Calls of a program by the address, or ".name", of what is called; and what is handed on as a value."""

    by_name: dict[str, list[ast.Call]] = field(default_factory=dict)
    handed_on: set[str] = field(default_factory=set)
    all: list[ast.Call] = field(default_factory=list)
    around: dict[int, tuple[ast.FunctionDef, str]] = field(default_factory=dict)  # call → function that it stands in
    bases: set[str] = field(default_factory=set)  # classes that others are made from
    stored: set[str] = field(default_factory=set)  # attributes that a statement gives an object
    remade: set[str] = field(default_factory=set)  # attributes that a call gives one: `replace(record, name=…)`

    @classmethod
    def of(cls, reached: Mapping[str, Definition]) -> Calls:
        """Collect the calls of a program, each with the function that it stands in."""
        calls, spoken = cls(bases=base_names(reached.values())), set[int]()
        for at, definition in reached.items():
            node = definition.node
            for function, name in _functions(at, node):
                calls.around.update({id(e): (function, name) for e in walk(function) if isinstance(e, ast.Call)})
            for each in walk(node):
                calls.stored.update(_stored(each))
                spoken.update(id(part) for said in _only_said(each) for part in walk(said))
                if isinstance(each, ast.Call):
                    calls.all.append(each)
                    calls.remade.update(_remade(each))
                if isinstance(each, ast.Call) and (name := called(each.func)):
                    calls.by_name.setdefault(name, []).append(each)
                    spoken.add(id(each.func))
            for each in walk(node):
                if id(each) not in spoken and isinstance(each, (ast.Name, ast.Attribute)) and (name := called(each)):
                    calls.handed_on.add(name)
        return calls


def _functions(at: str, node: ast.AST) -> list[tuple[ast.FunctionDef, str]]:
    """Return the functions of a definition, each with the name by which calls know it, if its calls are all known."""
    if isinstance(node, ast.FunctionDef):
        return [(node, at)]
    return [(each, "") for each in getattr(node, "body", []) if isinstance(each, ast.FunctionDef)]


def _stored(node: ast.AST) -> Iterable[str]:
    """Return the attributes that a node gives an object: an attribute that is set, what a class has but methods."""
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return [node.attr]
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [name for each in body if not isinstance(each, ast.FunctionDef) for name in bound_names(each)]


def _remade(call: ast.Call) -> Iterable[str]:
    """Return the attributes that a call gives an object: `replace(record, name=…)` and its like."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function == "setattr" and len(call.args) > 1 and isinstance(call.args[1], ast.Constant):
        return [str(call.args[1].value)]
    return [key.arg for key in call.keywords if key.arg] if function in REMAKERS else []


def _only_said(node: ast.AST) -> list[ast.expr]:
    """Return the parts of a node that name a class and do nothing with it: annotations, and what `isinstance` asks."""
    if isinstance(node, ast.arg):
        parts = [node.annotation]
    elif isinstance(node, ast.FunctionDef):
        parts = [node.returns]
    elif isinstance(node, ast.AnnAssign):
        parts = [node.annotation]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.bases]
    else:
        is_question = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        parts = [*node.args[1:]] if is_question else []  # type: ignore[attr-defined]
    return [each for each in parts if each is not None]


def is_open(call: ast.Call) -> bool:
    """Return whether a call hands on arguments that are not written out."""
    return any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords)


def is_made_otherwise(node: ast.ClassDef) -> bool:
    """Return whether a class makes objects of itself by another name: `cls(…)`, `type(self)(…)`."""
    called = [each.func for each in walk(node) if isinstance(each, ast.Call)]
    return any(
        (isinstance(each, ast.Name) and each.id == "cls")
        or (isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id == "type")
        for each in called
    )


def called(node: ast.AST) -> str:
    """Return the address, or ".name" of a method, by which a call knows what it calls; else nothing."""
    if isinstance(node, ast.Name):
        return node.id if is_address(node.id) else ""
    return f".{node.attr}" if isinstance(node, ast.Attribute) else ""


def constant_parameters(
    reached: Mapping[str, Definition], calls: Calls
) -> list[tuple[Definition, ast.FunctionDef, dict[str, Any]]]:
    """Return functions of a program, each with its parameters that all calls give one constant."""
    found = []
    for at, definition in reached.items():
        node = definition.node
        if isinstance(node, ast.FunctionDef):
            found.append((definition, node, _constants(node, calls, at, 0)))
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name in LEFT_ALONE:
                    continue
                if method.name == "__init__" and at not in calls.bases:
                    found.append((definition, method, _constants(method, calls, at, 1)))
                elif not method.name.startswith("__"):
                    found.append((definition, method, _constants(method, calls, f".{method.name}", 1)))
    return [each for each in found if each[2]]


def base_names(definitions: Iterable[Definition]) -> set[str]:
    """Return the addresses of all classes that others are made from: their objects may be of those."""
    bases = [base for each in definitions if isinstance(each.node, ast.ClassDef) for base in each.node.bases]
    return {each.id for base in bases for each in walk(base) if isinstance(each, ast.Name)}


def _constants(function: ast.FunctionDef, calls: Calls, name: str, first: int) -> dict[str, Any]:
    """Return the parameters from number `first` on that all calls give one constant, with it."""
    own = function.args
    is_handed_on = name in calls.handed_on and function.name != "__init__"
    has_others = own.vararg or own.kwarg or own.posonlyargs
    if has_others or is_handed_on or is_static(function) or not calls.by_name.get(name):
        return {}
    names = [arg.arg for arg in own.args]
    defaults: dict[str, ast.expr] = dict(zip(names[len(names) - len(own.defaults) :], own.defaults, strict=True))
    defaults.update({a.arg: d for a, d in zip(own.kwonlyargs, own.kw_defaults, strict=True) if d is not None})
    constants = {}
    for parameter in [*names[first:], *(arg.arg for arg in own.kwonlyargs)]:
        place = names.index(parameter) - first if parameter in names else None
        given = [given_to(call, parameter, place, defaults, len(names) - first) for call in calls.by_name[name]]
        values = [each for each in given if each is not None]
        if values and all(_same(each, values[0]) for each in values) and values[0] is not UNKNOWN:
            constants[parameter] = values[0][0]
    return constants


def closed_functions(
    reached: Mapping[str, Definition], calls: Calls, foreign: frozenset[str]
) -> Iterable[tuple[str, ast.FunctionDef, int]]:
    """Yield functions whose calls are all known: how they are called, and how many parameters are given by Python."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for at, definition in reached.items():
        node = definition.node
        if isinstance(node, ast.FunctionDef):
            yield at, node, 0
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, ast.FunctionDef):
                methods.setdefault(method.name, []).append(method)
                if method.name == "__init__" and at not in calls.bases:
                    yield at, method, 1
    for name, same in methods.items():
        is_alone = len(same) == 1 and name not in calls.stored | calls.remade and not same[0].decorator_list
        if is_alone and name not in foreign and name not in LEFT_ALONE and not name.startswith("__"):
            yield f".{name}", same[0], 1


def is_static(function: ast.FunctionDef) -> bool:
    """Return whether a method is called on its class."""
    return any(isinstance(d, ast.Name) and d.id in ("staticmethod", "classmethod") for d in function.decorator_list)


def argument(
    call: ast.Call, parameter: str, place: int | None, defaults: Mapping[str, ast.expr], room: int
) -> ast.expr | None:
    """Return what a call gives a parameter, or its default; None if it cannot be a call of the function."""
    if len(call.args) > room:
        return None
    node = next((each.value for each in call.keywords if each.arg == parameter), None)
    if node is None and place is not None and place < len(call.args):
        node = call.args[place]
    return node if node is not None else defaults.get(parameter)


def given_to(call: ast.Call, parameter: str, place: int | None, defaults: Mapping[str, ast.expr], room: int) -> Any:
    """Return what a call gives a parameter as (value,); None if it cannot be a call of the function; or UNKNOWN."""
    if is_open(call):
        return UNKNOWN
    if len(call.args) > room:
        return None
    node = argument(call, parameter, place, defaults, room)
    if isinstance(node, ast.Constant) and node.kind is None:
        return (node.value,)
    return UNKNOWN


def _same(one: Any, other: Any) -> bool:
    """Whether two calls give one constant; 0, 0.0 and False are three."""
    return one is other or (
        one is not UNKNOWN and other is not UNKNOWN and type(one[0]) is type(other[0]) and one[0] == other[0]
    )
