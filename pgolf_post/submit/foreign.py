"""Attribute names of libraries' objects: where one of ours has the same name, `x.name` says nothing about x."""

from __future__ import annotations

import builtins
import importlib
import pathlib
import warnings
from collections.abc import Iterable
from functools import cache
from types import FunctionType, ModuleType


def foreign_names(external: Iterable[str]) -> frozenset[str]:
    """Return the attributes of objects of Python's own types and of the modules behind these addresses."""
    modules = {at.partition(":")[0] for at in external if ":" in at} | {builtins.__name__, pathlib.__name__}
    return frozenset().union(*(_names_of(name) for name in sorted(modules)))


@cache
def _names_of(module: str) -> frozenset[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.distributed says so of a name as soon as it is looked at
        return _names_in(importlib.import_module(module))


def _names_in(found: ModuleType) -> frozenset[str]:
    names = {*dir(found), *dir(FunctionType)}
    for value in list(vars(found).values()):
        if isinstance(value, type):
            names.update(dir(value), getattr(value, "__annotations__", ()))
        elif isinstance(value, ModuleType) and value.__name__.startswith(f"{found.__name__}."):
            kinds = [each for each in list(vars(value).values()) if isinstance(each, type)]
            names.update(name for each in kinds for name in (*dir(each), *getattr(each, "__annotations__", ())))
    return frozenset(names)
