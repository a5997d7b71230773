"""Questions about resolved trees that need no values: what they assign, whether they act, what a class declares."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from pgolf_post.submit.sources import Definition, is_address
from pgolf_post.submit.trees import name_of, walk

NEEDS_FIELDS = ("dataclasses:dataclass",)


def assignments(body: list[Any]) -> list[tuple[ast.expr, ast.expr | None]]:
    """Return the assignments of statements as (target, value), tuples taken apart; value None: not one expression."""
    pairs: list[tuple[ast.expr, ast.expr | None]] = []
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs += _apart(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            pairs.append((node.target, node.value))
        elif isinstance(node, ast.AugAssign):
            pairs.append((node.target, None))
    return pairs


def _apart(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr | None]]:
    if not isinstance(target, (ast.Tuple, ast.List)):
        return [(target, value)]
    if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
        return [pair for each, own in zip(target.elts, value.elts, strict=True) for pair in _apart(each, own)]
    return [(each, None) for each in target.elts]


def is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, (ast.Store, ast.Del))


def is_own_attribute(node: ast.expr) -> bool:
    """Return whether an expression is an attribute of self."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


HARMLESS = frozenset(  # builtins and functions of libraries that only return something
    (
        *("bool", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min", "range", "set"),
        *("sorted", "str", "sum", "tuple", "zip", "functools:partial", "time:perf_counter", "torch.nn:Identity"),
    )
)


def acts(node: ast.AST) -> bool:
    """Return whether evaluating an expression may do something: it calls or awaits."""
    for each in walk(node):
        if isinstance(each, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
            return True
        if isinstance(each, ast.Call) and called_name(each) not in HARMLESS:
            return True
    return False


def called_name(node: ast.Call) -> str:
    """Return the name or address of what is called, `nn.Identity` as "torch.nn:Identity"; else nothing."""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        module, _, name = node.func.value.id.partition(":")
        return f"{module}.{name}".rstrip(".") + f":{node.func.attr}" if is_address(node.func.value.id) else ""
    return node.func.id if isinstance(node.func, ast.Name) else ""


def has_fields(node: ast.ClassDef) -> bool:
    """Return whether declarations of a class are fields: of a dataclass or a NamedTuple."""
    decorated = any(name_of(each) in NEEDS_FIELDS for each in node.decorator_list)
    return decorated or any(name_of(base) == "typing:NamedTuple" for base in node.bases)


def inherits(node: ast.ClassDef) -> bool:
    """Return whether a class is made from another one than NamedTuple, whose fields would come before its own."""
    return any(name_of(base) != "typing:NamedTuple" for base in node.bases)


def set_elsewhere(definitions: Iterable[Definition]) -> set[str]:
    """Return attributes that are set on another object than self, or by a class and one that it is made from."""
    definitions = list(definitions)
    outside: set[str] = set()
    own: dict[str, set[str]] = {}  # class → attributes that its methods set on self
    for definition in definitions:
        stored = [each for each in walk(definition.node) if isinstance(each, ast.Attribute)]
        stored = [each for each in stored if isinstance(each.ctx, (ast.Store, ast.Del))]
        outside |= {each.attr for each in stored if not is_own_attribute(each)}
        if isinstance(definition.node, ast.ClassDef):
            own[definition.addresses[0]] = {each.attr for each in stored if is_own_attribute(each)}
    for definition in definitions:
        if isinstance(definition.node, ast.ClassDef):
            for base in definition.node.bases:
                base = base.value if isinstance(base, ast.Subscript) else base
                inherited = own.get(base.id, set()) if isinstance(base, ast.Name) else set()
                outside |= inherited & own[definition.addresses[0]]
    return outside
