"""Attributes that all modules of one class have alike in the model at hand."""

from __future__ import annotations

import ast
import importlib
from typing import Any

from torch import nn

from pgolf_post.submit.facts import SCALARS, UNKNOWN
from pgolf_post.submit.sources import Definition
from pgolf_post.submit.syntax import assignments, is_own_attribute
from pgolf_post.submit.trees import walk


class Alike:
    """The modules of a model by the class that defines them."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        self._alike: dict[str, dict[str, Any]] = {}  # class → what `shared` returned
        self._modules: dict[str, list[nn.Module]] = {}  # class → what `instances` returned

    def shared(self, owner: Definition) -> dict[str, Any]:
        """Return scalars that `__init__` alone sets and that all of the model's modules of this class have alike."""
        at = owner.addresses[0]
        if at not in self._alike:
            self._alike[at] = self._found_alike(owner)
        return self._alike[at]

    def _found_alike(self, owner: Definition) -> dict[str, Any]:
        assert isinstance(owner.node, ast.ClassDef)
        instances = self.instances(owner)
        if not instances:
            return {}
        outside: set[str] = set()
        inside: set[str] = set()
        for method in owner.node.body:
            if isinstance(method, ast.FunctionDef):
                names = {t.attr for t, _ in assignments(list(walk(method))) if is_own_attribute(t)}  # type: ignore[attr-defined]
                (inside if method.name == "__init__" else outside).update(names)
        shared = {}
        for name in inside - outside:
            values = [getattr(each, name, UNKNOWN) for each in instances]
            if type(values[0]) in SCALARS and all(type(v) is type(values[0]) and v == values[0] for v in values):
                shared[name] = values[0]
        return shared

    def instances(self, owner: Definition) -> list[nn.Module]:
        at = owner.addresses[0]
        if at not in self._modules:
            real = getattr(importlib.import_module(owner.module), owner.names[0], None)
            modules = [] if self.module is None else self.module.modules()
            self._modules[at] = [each for each in modules if type(each) is real]
        return self._modules[at]
