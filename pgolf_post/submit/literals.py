"""Known values as source: what a handed-in program may spell where it worked something out."""

from __future__ import annotations

import ast
import dataclasses
import functools
from types import FunctionType
from typing import Any

from pgolf_post.settings import Settings
from pgolf_post.submit.facts import MOST_ITEMS, SCALARS
from pgolf_post.submit.sources import address


def literal(value: Any, records: bool = False) -> ast.expr | None:
    """Return a value as source: scalars, tuples, lists, dicts, functions of modules, partials of them; else None.

    With `records`, also dataclasses and settings, as calls of their classes.
    """
    if isinstance(value, SCALARS):
        is_special = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
        return None if is_special else _constant(value)
    if isinstance(value, (tuple, list)) and len(value) <= MOST_ITEMS:
        items = [literal(item, records) for item in value]
        if any(item is None for item in items):
            return None
        kind = ast.Tuple if isinstance(value, tuple) else ast.List
        return kind([item for item in items if item is not None], ast.Load())
    if type(value) is dict and len(value) <= MOST_ITEMS:
        keys, values = [literal(key) for key in value], [literal(item, records) for item in value.values()]
        return None if None in keys or None in values else ast.Dict(keys, values)  # type: ignore[arg-type]
    if isinstance(value, FunctionType) and value.__qualname__.isidentifier():
        return ast.Name(address(value.__module__, value.__qualname__), ast.Load())
    if isinstance(value, functools.partial) and not value.args:
        function = literal(value.func)
        named = {key: literal(item) for key, item in value.keywords.items()}
        if function is None or None in named.values():
            return None
        if not named:
            return function
        keywords = [ast.keyword(key, item) for key, item in named.items() if item is not None]
        return ast.Call(ast.Name(address("functools", "partial"), ast.Load()), [function], keywords)
    return _record(value) if records else None


def _record(value: Any) -> ast.expr | None:
    """Return a dataclass or settings object as a call of its class."""
    if isinstance(value, Settings):
        named = {name: getattr(value, name) for name in type(value).model_fields}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return None
    written = {name: literal(item, records=True) for name, item in named.items()}
    if None in written.values():
        return None
    keywords = [ast.keyword(name, item) for name, item in written.items() if item is not None]
    return ast.Call(ast.Name(address(type(value).__module__, type(value).__qualname__), ast.Load()), [], keywords)


def _constant(value: Any) -> ast.expr:
    """Return a constant; negative numbers as Python's grammar has them."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)
