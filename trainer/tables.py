"""Tables of methods: a name → all that there is to say of the method. A new method is a new row.

Settings name a method by its row's name. The table itself says which names there are, so an unknown one is refused
where settings are read, with the list of those that exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import AfterValidator

from pgolf_post.errors import SettingsError

Method = TypeVar("Method")


def pick(table: Mapping[str, Method], name: str, what: str) -> Method:
    """Return the row called `name`. Raises SettingsError listing the names that the table has."""
    if name not in table:
        raise SettingsError(_unknown(table, name, what))
    return table[name]


def name_in(table: Mapping[str, Any], what: str) -> AfterValidator:
    """Return pydantic's check that a settings value is the name of a row, or a list of such names."""

    def check(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in (names,) if isinstance(names, str) else names:
            if name not in table:
                raise ValueError(_unknown(table, name, what))
        return names

    return AfterValidator(check)


def read_keys(settings: object, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of the settings that a row reads, by key, as its function's keyword arguments."""
    return {key: getattr(settings, key) for key in keys}


def _unknown(table: Mapping[str, Any], name: str, what: str) -> str:
    return f"unknown {what} {name!r}; choose one of {', '.join(table)}"
