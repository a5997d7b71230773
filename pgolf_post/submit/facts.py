"""Values that are known before a program runs, by class and function, and what is constant in all of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from pgolf_post.settings import Settings
from pgolf_post.submit.sources import Definition

UNKNOWN: Any = object()
SCALARS = (bool, int, float, str, bytes, type(None))
MOST_ITEMS = 4096  # of a literal that is written out


@dataclass(frozen=True)
class Partly:
    """An object of which only some attributes are known."""

    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class ByName:
    """Answers of a function that is called with a name."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Instance:
    """An object of one of our classes, of which those attributes are known that all its objects share."""

    owner: Definition


@dataclass(frozen=True)
class Facts:
    """Everything that is known about the program, by the addresses of classes and functions."""

    values: Mapping[str, Any] = field(default_factory=dict)  # class → the object that a parameter so annotated is
    answers: Mapping[str, Any] = field(default_factory=dict)  # function → the value of each of its calls
    shared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # class → attributes of all its objects
    module: nn.Module | None = None  # the model: attributes that all modules of a class share are known
    absent: frozenset[str] = frozenset()  # attributes that no object has
    objects: tuple[Settings, ...] = ()  # all objects of their classes that the program makes
    pure: frozenset[str] = frozenset()  # packages whose functions are evaluated where all their arguments are known


@dataclass
class Scope:
    """Values that are known inside one function."""

    locals: dict[str, Any] = field(default_factory=dict)
    owner: Definition | None = None  # the class of a method
    is_complete: bool = True  # nothing will be added


@dataclass(frozen=True)
class World:
    """Attributes and functions that are constant in the whole program."""

    attributes: Mapping[str, Any]  # name → value in all objects that have it
    fields: Mapping[str, Mapping[str, Any]]  # record class → field → value in all of its objects
    kinds: Mapping[str, Partly]  # name → what is known of the object that it is
    functions: Mapping[str, Any]  # function that does nothing but return a constant → it
    passing: Mapping[str, int]  # function or ".method" that does nothing but return an argument → which one


def settings_class(definition: Definition) -> type[Settings] | None:
    """Return the class of settings that a definition is; None if it is something else."""
    real = getattr(importlib.import_module(definition.module), definition.names[0], None)
    return real if isinstance(real, type) and issubclass(real, Settings) else None


def plain(value: Any) -> Any:
    """Return a value that a known function gave, if it is plain data, a function or a record of such; else UNKNOWN."""
    if isinstance(value, (*SCALARS, FunctionType, functools.partial)):
        return value
    if isinstance(value, (tuple, list, set, frozenset)):
        return value if all(plain(item) is not UNKNOWN for item in value) else UNKNOWN
    if isinstance(value, dict):
        return value if all(plain(item) is not UNKNOWN for item in value.values()) else UNKNOWN
    return value if dataclasses.is_dataclass(value) and not isinstance(value, type) else UNKNOWN


def unchanging(value: Any) -> Any:
    """Return a value that nobody can change through another name of it; else UNKNOWN."""
    return UNKNOWN if isinstance(value, (list, dict, set)) else value
