"""A package of made-up modules, to make one file of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.settings import Settings
from pgolf_post.submit.amalgamate import Amalgam, amalgamate
from pgolf_post.submit.facts import Facts
from pgolf_post.submit.sources import Sources

NUMBER = itertools.count()


class Known(Settings):
    """Settings that are known when the program is made."""

    loud: bool = False
    width: int = 3


class Project:
    """A package of made-up modules, each test its own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = f"made_{next(NUMBER)}"
        self.folder = root / self.name
        self.folder.mkdir()
        monkeypatch.syspath_prepend(root)
        (self.folder / "__init__.py").write_text("")

    def write(self, **modules: str) -> None:
        for name, text in modules.items():
            (self.folder / f"{name}.py").write_text(text.replace("HERE", self.name))

    def amalgamate(self, facts: Facts = Facts(), silent: tuple[str, ...] = ()) -> Amalgam:  # noqa: B008
        silent = tuple(each.replace("HERE", self.name) for each in silent)
        return amalgamate(Sources([self.name]), f"{self.name}.main:main", facts, silent)

    def knowing(self, settings: Settings) -> Facts:
        """What makes parameters annotated `Known` of the made-up `main` these settings."""
        return Facts({f"{self.name}.main:Known": settings})


def run(amalgam: Amalgam) -> Any:
    """What `main` of an amalgam returns."""
    scope: dict[str, Any] = {"__name__": __name__}  # a module that is there, for dataclasses look theirs up
    exec(compile(amalgam.source, "amalgam", "exec"), scope)
    return scope["main"]()


def placeholders(amalgam: Amalgam) -> set[str]:
    """Definitions that only say what is known when a script is made, and are left in it: they would raise."""
    raising = {part.name for part in amalgam.parts if "NotImplementedError" in part.source}
    return raising | {part.name for part in amalgam.parts if part.name in ("known", "known_protocol")}
