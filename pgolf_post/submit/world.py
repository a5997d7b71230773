"""Attributes and functions that are constant in the whole program, whoever asks.

A plan without trellises makes every record with `trellis=None`. No class of the program gives the attribute another
value, and no library's object has one of that name, so `anything.trellis` is None, and what only a trellis needs goes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pgolf_post.settings import Settings
from pgolf_post.submit.calls import Calls, argument, closed_functions, is_made_otherwise, is_open
from pgolf_post.submit.facts import SCALARS, UNKNOWN, Partly, World, settings_class
from pgolf_post.submit.known import Evaluator
from pgolf_post.submit.sources import Definition, is_address
from pgolf_post.submit.syntax import assignments, has_fields, inherits, is_own_attribute
from pgolf_post.submit.trees import name_of, walk

SAME: Any = object()  # the attribute of the same name of another object
PROPERTIES = ("property", "functools:cached_property")


def constant_world(
    reached: Mapping[str, Definition], calls: Calls, evaluator: Evaluator, foreign: frozenset[str]
) -> World:
    """Return what is constant in a program."""
    changed = evaluator.changed | calls.remade
    values: dict[str, list[Any]] = {}
    fields: dict[str, dict[str, Any]] = {}
    for at, definition in reached.items():
        if isinstance(definition.node, ast.ClassDef):
            given = _of_fields(definition.node, at, calls)
            alone = _of_fields(definition.node, at, calls, follows=False)
            fields[at] = {k: v for k, v in alone.items() if v is not UNKNOWN and k not in changed}
            for name, value in _of_class(definition, given, evaluator):
                values.setdefault(name, []).append(value)
    agreed = {name: _agreed(own) for name, own in values.items() if name not in changed | foreign}
    attributes = {name: value for name, value in agreed.items() if value is not UNKNOWN and value is not SAME}
    closed = list(closed_functions(reached, calls, foreign))
    kinds = kinds_by_name(reached, evaluator, foreign)
    return World(attributes, fields, kinds, constant_functions(closed), passing_functions(closed, calls))


def remade_settings(definitions: Iterable[Definition], objects: Iterable[Settings]) -> set[str]:
    """Return the settings that `model_copy(update={…})` gives another value than the known objects have."""
    objects, names = list(objects), set[str]()
    for definition in definitions:
        for call in walk(definition.node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "model_copy":
                for update in [key.value for key in call.keywords if isinstance(key.value, ast.Dict)]:
                    for key, value in zip(update.keys, update.values, strict=True):
                        held = [getattr(each, key.value) for each in objects if hasattr(each, key.value)]  # type: ignore[union-attr]
                        same = isinstance(value, ast.Constant) and all(each == value.value for each in held)
                        names.update(set() if same else {key.value})  # type: ignore[union-attr]
    return names


def constant_functions(closed: Iterable[tuple[str, ast.FunctionDef, int]]) -> dict[str, Any]:
    """Return the functions and methods that do nothing but return a constant, with it."""
    found = {at: _returned(each) for at, each, _ in closed if not each.decorator_list and each.name != "__init__"}
    return {at: value for at, value in found.items() if value is not UNKNOWN}


def passing_functions(closed: Iterable[tuple[str, ast.FunctionDef, int]], calls: Calls) -> dict[str, int]:
    """Return the functions that do nothing but return an argument, with its place in a call."""
    found = {}
    for at, function, first in closed:
        only = _only_return(function)
        value = None if only is None else only.value
        names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)][first:]
        is_own = isinstance(value, ast.Name) and value.id in names and not function.decorator_list
        if is_own and at not in calls.handed_on and function.name != "__init__":
            found[at] = names.index(value.id)  # type: ignore[union-attr]
    return found


def _returned(node: ast.FunctionDef) -> Any:
    """Return the constant that a function returns; UNKNOWN where it does more."""
    only = _only_return(node)
    if only is None:
        return UNKNOWN
    if only.value is None:
        return None
    return only.value.value if isinstance(only.value, ast.Constant) and only.value.kind is None else UNKNOWN


def _only_return(node: ast.FunctionDef) -> ast.Return | None:
    """Return the statement that is all of a function but its docstring, if it returns."""
    *before, last = node.body
    is_all = all(isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in before)
    return last if is_all and isinstance(last, ast.Return) else None


def _of_class(definition: Definition, given: Mapping[str, Any], evaluator: Evaluator) -> Iterator[tuple[str, Any]]:
    """Yield every attribute that objects of a class have, with its value in all of them, or UNKNOWN."""
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    real = settings_class(definition)
    if real is not None:
        yield from _of_settings(real, evaluator)
    else:
        known = evaluator.attributes(definition)
        stored = {t.attr for each in node.body for t, _ in assignments(list(walk(each))) if is_own_attribute(t)}  # type: ignore[attr-defined]
        named = {t.id for t, _ in assignments(node.body) if isinstance(t, ast.Name)}
        for name in sorted(stored | named | given.keys()):
            is_plain = name in given and name not in stored
            yield name, given[name] if is_plain else known.get(name, UNKNOWN)
    for method in node.body:
        if isinstance(method, ast.FunctionDef):
            is_property = any(name_of(each) in PROPERTIES for each in method.decorator_list)
            yield method.name, _returned(method) if is_property else UNKNOWN


def _of_settings(real: type[Settings], evaluator: Evaluator) -> Iterator[tuple[str, Any]]:
    objects = [each for each in evaluator.facts.objects if isinstance(each, real)]
    for name in real.model_fields:
        for each in objects:
            yield name, getattr(each, name)
        if not objects:
            yield name, UNKNOWN


def _of_fields(node: ast.ClassDef, at: str, calls: Calls, follows: bool = True) -> dict[str, Any]:
    """Return the fields of a record class, each with the constant that every call of the class gives it.

    If it `follows`, what is taken from the attribute of that name of another object is left to that object, and SAME
    stands for a field of which there is nothing else; such constants hold only if all objects agree.
    """
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)] if has_fields(node) else []
    makers = calls.by_name.get(at, [])
    is_open_class = at in calls.handed_on or at in calls.bases or is_made_otherwise(node) or inherits(node)
    found: dict[str, Any] = {}
    for place, each in enumerate(fields):
        assert isinstance(each.target, ast.Name)
        name = each.target.id
        defaults = {} if each.value is None else {name: each.value}
        more = (name, place, defaults, len(fields), name if follows else "", calls, 3)
        given = [_resolved(call, *more) for call in makers]
        found[name] = UNKNOWN if is_open_class else _agreed(given)
    return found


def _resolved(
    call: ast.Call,
    parameter: str,
    place: int | None,
    defaults: Mapping[str, ast.expr],
    room: int,
    attribute: str,  # that the argument becomes in the end
    calls: Calls,
    depth: int,  # of functions that hand on their own parameter
) -> Any:
    """Return the constant that a call gives a parameter, SAME for the attribute of another object; else UNKNOWN."""
    node = UNKNOWN if is_open(call) else argument(call, parameter, place, defaults, room)
    if node is None or node is UNKNOWN:
        return UNKNOWN
    if isinstance(node, ast.Constant):
        return node.value if node.kind is None else UNKNOWN
    if isinstance(node, ast.Attribute):
        is_global = isinstance(node.value, ast.Name) and is_address(node.value.id)
        return SAME if node.attr == attribute and not is_global else UNKNOWN
    around, at = calls.around.get(id(call), (None, ""))
    if not isinstance(node, ast.Name) or around is None or at in calls.handed_on or not depth:
        return UNKNOWN
    names = [each.arg for each in (*around.args.posonlyargs, *around.args.args)]
    if names.count(node.id) != 1 or _is_bound_again(around, node.id):
        return UNKNOWN
    own = around.args
    with_default = dict(zip(names[len(names) - len(own.defaults) :], own.defaults, strict=True))
    makers = calls.by_name.get(at, [])
    more = (names.index(node.id), with_default, len(names), attribute, calls, depth - 1)
    return _agreed([_resolved(each, node.id, *more) for each in makers])


def _is_bound_again(function: ast.FunctionDef, name: str) -> bool:
    """Whether a parameter's name also stands for something else inside its function."""
    names = [each for each in walk(function) if isinstance(each, ast.Name) and each.id == name]
    arguments = [each for each in walk(function) if isinstance(each, ast.arg) and each.arg == name]
    return len(arguments) > 1 or any(not isinstance(each.ctx, ast.Load) for each in names)


def _agreed(values: list[Any]) -> Any:
    """Return the one constant among values, SAME left out; SAME if there is nothing else; UNKNOWN if they differ."""
    constants = [each for each in values if each is not SAME]
    if not values or any(each is UNKNOWN or type(each) not in SCALARS for each in constants):
        return UNKNOWN
    if not constants:
        return SAME
    one = constants[0]
    return one if all(type(each) is type(one) and each == one for each in constants) else UNKNOWN


def kinds_by_name(
    reached: Mapping[str, Definition], evaluator: Evaluator, foreign: frozenset[str]
) -> dict[str, Partly]:
    """Return what is known of `anything.name`, where every class that has the attribute declares it of known kinds."""
    declared: dict[str, list[Any]] = {}
    for definition in reached.values():
        for name, annotation in _declared(definition.node):
            known = evaluator.facts.values.get(annotation.id) if isinstance(annotation, ast.Name) else None
            declared.setdefault(name, []).append(known)
    return {
        name: _common(kinds)
        for name, kinds in declared.items()
        if name not in foreign and all(isinstance(each, Partly) for each in kinds)
    }


def _declared(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield every attribute that a class gives its objects, with the class that it is declared to be of, if one is."""
    if not isinstance(node, ast.ClassDef):
        return
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            yield each.target.id, each.annotation
        elif isinstance(each, ast.FunctionDef):
            yield each.name, each.returns if any(name_of(d) in PROPERTIES for d in each.decorator_list) else None
            yield from ((t.attr, None) for t, _ in assignments(list(walk(each))) if is_own_attribute(t))  # type: ignore[attr-defined]


def _common(kinds: list[Partly]) -> Partly:
    first, *rest = kinds
    same = {k: v for k, v in first.attributes.items() if all(k in o.attributes and o.attributes[k] == v for o in rest)}
    return Partly(same)
