"""Parameters and fields that nobody reads, left out at both ends: here, and in the calls that give them.

Where a setting is off, the function that would read it is handed it all the same. All calls of a program are in sight,
so a parameter that its function does not read goes, and the argument in every call, unless working it out does more.
A method is treated so only if no other class of the program has one of its name, and no library's object either.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

from pgolf_post.submit.calls import Calls, closed_functions, is_made_otherwise, is_open
from pgolf_post.submit.facts import settings_class
from pgolf_post.submit.sources import Definition
from pgolf_post.submit.syntax import acts, has_fields, inherits
from pgolf_post.submit.trees import name_of, walk

ARRAYS = ("ndarray", "torch:Tensor", "pgolf_post.calibrate.stats:Tensors")


def trim(reached: Mapping[str, Definition], calls: Calls, named: set[str], foreign: frozenset[str]) -> None:
    """Leave out parameters and fields that nothing reads, in place."""
    for at, function, first in closed_functions(reached, calls, foreign):
        if at not in calls.handed_on:
            _trim_function(function, calls.by_name.get(at, []), first)
    for at, definition in reached.items():
        node = definition.node
        is_closed = at not in calls.handed_on and at not in calls.bases
        if isinstance(node, ast.ClassDef) and is_closed and has_fields(node) and not inherits(node):
            _trim_fields(node, at, calls, named)
        if settings_class(definition) is not None:
            for call in calls.by_name.get(at, []):
                call.keywords = [key for key in call.keywords if key.arg is None or key.arg in named or acts(key.value)]


def _trim_function(function: ast.FunctionDef, calls: list[ast.Call], first: int) -> None:
    own = function.args
    if own.vararg or own.kwarg or own.posonlyargs or not calls or any(is_open(call) for call in calls):
        return
    read = {each.id for body in function.body for each in walk(body) if isinstance(each, ast.Name)}
    for place in reversed(range(first, len(own.args))):
        name = own.args[place].arg
        if name not in read and _take_out(calls, name, place - first):
            without_default = len(own.args) - len(own.defaults)
            if place >= without_default:
                del own.defaults[place - without_default]
            del own.args[place]
    for place in reversed(range(len(own.kwonlyargs))):
        if own.kwonlyargs[place].arg not in read and _take_out(calls, own.kwonlyargs[place].arg, None):
            del own.kwonlyargs[place], own.kw_defaults[place]


def _is_never_compared(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass that holds arrays, which cannot be compared; a tuple is also read by place."""
    spoken = [part for each in node.body if isinstance(each, ast.AnnAssign) for part in walk(each.annotation)]
    names = [each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in spoken]
    return any(name in ARRAYS for name in names) and not any(
        name_of(base) == "typing:NamedTuple" for base in node.bases
    )


def _trim_fields(node: ast.ClassDef, at: str, calls: Calls, named: set[str]) -> None:
    """Leave out the fields of a dataclass that nothing reads."""
    makers = calls.by_name.get(at, [])
    is_open_class = any(is_open(call) for call in makers) or is_made_otherwise(node)
    if is_open_class or not makers or not _is_never_compared(node):
        return
    changed = {key.arg for call in calls.all if _changes(call) for key in call.keywords}
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    for place in reversed(range(len(fields))):
        name = fields[place].target.id  # type: ignore[union-attr]
        if name not in named and name not in changed and _take_out(makers, name, place):
            node.body.remove(fields[place])
    node.body = node.body or [ast.Pass()]


def _changes(call: ast.Call) -> bool:
    """Whether a call makes a record from another one: `replace(record, field=…)`, `record._replace(field=…)`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("_replace", "replace", "dataclasses:replace")


def _take_out(calls: list[ast.Call], name: str, place: int | None) -> bool:
    """Leave out an argument of every call; False, with nothing changed, where working one out does something."""
    takers: list[Callable[[], None]] = []
    for call in calls:
        if place is not None and place < len(call.args):
            if acts(call.args[place]):
                return False
            takers.append(lambda call=call: call.args.__delitem__(place))  # type: ignore[misc]
        for keyword in call.keywords:
            if keyword.arg == name:
                if acts(keyword.value):
                    return False
                takers.append(lambda call=call, keyword=keyword: call.keywords.remove(keyword))  # type: ignore[misc]
    for take in takers:
        take()
    return True
