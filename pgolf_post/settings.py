"""Strict, frozen settings: one class per stage, read from TOML, overridden by `--set a.b=value`.

An unknown key is the most expensive typo in this field: a setting that never acted is reported as a null result. So an
unknown key is an error that names the valid ones, and a bad value an error that names the key, the value and the limit.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from pgolf_post.base.paths import absent
from pgolf_post.base.text import decode_text
from pgolf_post.errors import NotFoundError, SettingsError


class Settings(BaseModel):
    """Base of every settings class: unknown keys are refused, instances are immutable, floats are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


LARGEST_SEED = 2**63 - 1  # that every generator of random numbers here takes
Precision = Literal["fp32", "bf16"]


class PrecisionIdentity(Settings):
    """Settings that leave a precision of float32 out of what an id is made of: results are older than the choice."""

    @model_serializer(mode="wrap")
    def _identity(self, own_values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = own_values(self)
        return {key: value for key, value in values.items() if not (key.endswith("precision") and value == "fp32")}


class PrecisionSettings(PrecisionIdentity):
    """Settings with the precision of forward passes."""

    precision: Precision = Field(
        "fp32", description="Type of forward passes' products; bf16 is faster on a GPU and gives other numbers."
    )


S = TypeVar("S", bound=Settings)


def parse_settings(cls: type[S], tree: Mapping[str, Any], source: str) -> S:
    """Validate `tree` (nested plain values) as `cls`. Raises SettingsError listing every offending key at once."""
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors()]
        raise SettingsError(f"{source}: " + "; ".join(lines)) from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """Return one pydantic problem as one line: dotted key, what is wrong, and the valid keys if the key is unknown."""
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location) or "(whole)"
    if problem["type"] == "extra_forbidden":
        valid = sorted(_model_at(cls, location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], valid, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {dotted!r}{guess}; valid keys here: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"key {dotted!r} is required"
    said = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):  # of several keys, which it names
        return f"{dotted}: {said}" if location else said
    return f"{dotted} = {problem['input']!r}: {said}"


def _model_at(cls: type[BaseModel], location: Iterable[str]) -> type[BaseModel]:
    """Return the settings class that holds the key at `location`, or the innermost one on the way there."""
    for part in location:
        field = cls.model_fields.get(part)
        annotation = field.annotation if field else None
        kinds = [kind for kind in (annotation, *get_args(annotation)) if kind is not type(None)]  # one, or X | None
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(inner) != 1:
            break
        cls = inner[0]
    return cls


def read_settings(path: Path, cls: type[S], overrides: Iterable[str] = ()) -> S:
    """Read a TOML file as `cls`, after applying `key.path=value` overrides. Raises SettingsError, NotFoundError."""
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    return parse_settings(cls, tree, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as nested plain values. Raises SettingsError, NotFoundError."""
    try:
        return tomllib.loads(decode_text(path.read_bytes()))
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(absent(path, "settings file")) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in a nested dict. The value is read as TOML, or as a bare string if it is not TOML."""
    key, equals, text = override.partition("=")
    *parents, leaf = key.strip().split(".")
    if not equals or not all([*parents, leaf]):
        raise SettingsError(f"--set {override!r}: expected key=value, for example --set optim.matrix_lr=0.02")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise SettingsError(f"--set {override!r}: {parent!r} is a value, not a table")
        node = child
    try:
        node[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[leaf] = text.strip()


def canonical_json(value: object) -> bytes:
    """Return the canonical bytes of a JSON value, from which ids are hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
