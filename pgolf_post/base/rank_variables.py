"""This process's place among several, from torchrun's variables: complete and sensible, or an error that names them.

Clusters export WORLD_SIZE or RANK for purposes of their own, some of them empty. Half a set would make a process wait
for others that never come, so a partial or senseless one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from pgolf_post.errors import SettingsError

PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
HINT = f"start it with torchrun, or alone: env {' '.join(f'-u {name}' for name in PLACE)} COMMAND"


class Place(NamedTuple):
    """A process's place in its group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place_of_process(variables: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place; alone where none of the variables is set. Raises SettingsError."""
    given = {name: variables[name] for name in PLACE if name in variables}
    if not given:
        return Place()
    numbers = {name: _number(name, text) for name, text in given.items()}
    if numbers.get("WORLD_SIZE", 0) == 1 and not any(numbers[name] for name in numbers if name != "WORLD_SIZE"):
        return Place()
    missing = [name for name in (*PLACE, *ADDRESS) if not variables.get(name)]
    if missing:
        raise _error(given, f"{', '.join(missing)} not set")
    place = Place(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])
    if place.rank >= place.world_size or place.local_rank > place.rank:
        raise _error(given, "RANK must be below WORLD_SIZE, and LOCAL_RANK at most RANK")
    _number("MASTER_PORT", variables["MASTER_PORT"])
    return place


def _number(name: str, text: str) -> int:
    """Return a variable's value. Raises SettingsError unless it is a number ≥ 0, and a WORLD_SIZE ≥ 1."""
    if not (text.isascii() and text.isdigit()) or (name == "WORLD_SIZE" and int(text) == 0):
        lowest = 1 if name == "WORLD_SIZE" else 0
        raise SettingsError(f"the variable {name} is {text!r}, expected a whole number of at least {lowest}", hint=HINT)
    return int(text)


def _error(given: Mapping[str, str], problem: str) -> SettingsError:
    values = ", ".join(f"{name}={value}" for name, value in given.items())
    return SettingsError(f"the variables of a distributed start do not fit together: {values}; {problem}", hint=HINT)
