"""Settings of parts that most models lack: they are written down only where a model has the part.

config.json, and with it a checkpoint's id and the header of an artifact, so stay byte for byte what they were before a
part existed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from pgolf_post.settings import Settings

Whole = Any  # the architecture that a part belongs to: its class is made of the parts, so none of them can import it


class Part(Settings):
    """Base of a part's settings; those that are at their defaults are left out of dumps."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = dump(self)
        fields = type(self).model_fields
        off = {name for name in settings_of_parts(type(self)) if getattr(self, name) == fields[name].default}
        return {name: value for name, value in written.items() if name not in off}


@cache
def settings_of_parts(kind: type[Settings]) -> frozenset[str]:
    """Return the settings that a class has from its parts."""
    parts = (each for each in kind.__mro__ if Part in each.__bases__ and issubclass(each, Part))
    return frozenset(name for part in parts for name in part.model_fields)
