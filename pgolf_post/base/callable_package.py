"""A package that can be called like the function it is about: `pg.fit(view, data, …)` beside `pgolf_post.fit.solve`.

The stages calibrate, pack, score and fit are folders, and each has one function that a caller wants by the folder's
name. Python binds a submodule's name in its parent package on import, so a function of that name there would be lost;
a package whose class defines `__call__` is both. (docs.python.org, "Customizing module attribute access".)
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package with one function that a call of it runs. The function's module is imported when it is first needed."""

    __target__: str  # "module:function", the module relative to the package

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        module, _, name = self.__target__.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.__name__}.{module}"), name)
        return function

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickle and copy by name, as a function is: worker processes may be handed `pg.fit`."""
        return importlib.import_module, (self.__name__,)


def make_callable(package_name: str, target: str) -> None:
    """Let a package be called as its function `target` ("module:function"). Call it from the package's __init__."""
    package = sys.modules[package_name]
    package.__class__ = CallablePackage
    package.__target__ = target  # type: ignore[attr-defined]
