"""One row of the ledger: what was done, of what it was made, what came of it, and what was concluded.

Every stage leaves rows of one shape, so that a training run, an artifact and a line of a contestant's old notebook can
stand in one table and in one tree. `settings` is what was asked for, `result` what was measured, under the names that
`--json` uses everywhere: bpb, nats, tokens, bytes (of text), artifact_bytes, code_bytes, total_bytes, headroom_bytes,
symbols_sha256, checkpoint_id; `error` is the text of a failure.

The fields of `Row` are the columns of the file. A new column is one line here, with a default and with `since` raised
to a new version: `store.Ledger.open` adds it to older files, whose rows then have the default.
"""

# ruff: noqa: RUF009 (`column` returns a field: the columns are described where they are declared)
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.settings import canonical_json

Kind = Literal["run", "checkpoint", "stats", "diagnosis", "trial", "artifact", "score", "comparison", "audit", "note"]
Verdict = Literal["positive", "neutral", "negative", "no-op", "stopped early"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SECONDS_PER_HOUR = 3600.0


class Column(NamedTuple):
    """A column of the ledger's table. Its name is the field of `Row`, the key of `--json` and the heading in CSV."""

    name: str
    sql: str  # TEXT or REAL
    is_json: bool  # stored as JSON text
    since: int  # the version of the file that first had it
    has_default: bool
    description: str


def column(description: str, sql: str = "TEXT", since: int = 1, is_json: bool = False, **default: Any) -> Any:
    """Return a field of `Row` with what the file needs to know of it; `default` or `default_factory` as in `field`."""
    return field(metadata={"description": description, "sql": sql, "since": since, "is_json": is_json}, **default)


def columns_of(row_type: type[Row]) -> tuple[Column, ...]:
    """Return the columns of a class of rows. Raises SettingsError for a later column without a default."""
    columns = []
    for each in fields(row_type):
        about = each.metadata
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        if about["since"] > 1 and not has_default:
            raise SettingsError(f"ledger column {each.name!r} is new in version {about['since']} and needs a default")
        sql, is_json, since = about["sql"], about["is_json"], about["since"]
        columns.append(Column(each.name, sql, is_json, since, has_default, about["description"]))
    return tuple(columns)


@dataclass(frozen=True)
class Row:
    """One thing that was done. `(kind, id)` names it; parents are ids of rows, of any kind, or `external:NAME`."""

    kind: Kind = column(
        "What it is: run, checkpoint, stats, diagnosis, trial, artifact, score, comparison, audit or note."
    )
    id: str = column("Its content id, or the name of a run.")
    parents: tuple[str, ...] = column("Ids of what it was made of.", is_json=True, default=())
    name: str = column("What people call it.", default="")
    run: str = column("The training run, sweep or imported log that it belongs to.", default="")
    settings: dict[str, Any] = column("What was asked for.", is_json=True, default_factory=dict)
    settings_hash: str = column("The sha256 of the settings; filled in where left out.", default="")
    result: dict[str, Any] = column("What was measured.", is_json=True, default_factory=dict)
    commit: str | None = column("The git commit of the code.", default=None)
    device: str | None = column("The accelerator or processor.", default=None)
    seconds: float | None = column("How long it took.", sql="REAL", default=None)
    cost_dollars: float | None = column("What it cost, in US dollars.", sql="REAL", default=None)
    verdict: Verdict | None = column("Its outcome: positive, neutral, negative, no-op or stopped early.", default=None)
    conclusion: str | None = column("What was learned.", default=None)
    created: str = column("When it was made: ISO 8601, UTC; now where left out.", default="")
    command: str | None = column("The command that made it, as it was typed.", since=2, default=None)
    phases: list[dict[str, Any]] = column(
        "Seconds by phase, with what each limit counts of them (phases.py).",
        since=3,
        is_json=True,
        default_factory=list,
    )

    def __post_init__(self) -> None:
        """Raise SettingsError (unknown kind or verdict, empty id), NumericsError (a value that JSON cannot hold)."""
        require_one_of("kind", self.kind, KINDS)
        if self.verdict is not None:
            require_one_of("verdict", self.verdict, VERDICTS)
        if not self.id:
            raise SettingsError(f"a ledger row of kind {self.kind!r} needs an id (name {self.name!r})")
        object.__setattr__(self, "parents", tuple(self.parents))
        settings_bytes = _json_bytes(self, "settings", self.settings)
        _json_bytes(self, "result", self.result)
        object.__setattr__(self, "settings_hash", self.settings_hash or hashlib.sha256(settings_bytes).hexdigest())
        object.__setattr__(self, "created", self.created or iso_utc())

    def content(self) -> bytes:
        """Return what two rows of one id must agree on: not when, where, how fast, or what was concluded."""
        return canonical_json([self.parents, self.name, self.run, self.settings, self.result])

    def facts(self) -> dict[str, Any]:
        """Return the row as JSON."""
        return {**vars(self), "parents": list(self.parents)}


def require_one_of(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raise SettingsError naming the valid values."""
    if value not in allowed:
        raise SettingsError(f"{what} {value!r} is not one of {', '.join(allowed)}")


def _json_bytes(row: Row, what: str, value: Mapping[str, Any]) -> bytes:
    try:
        return canonical_json(value)
    except (ValueError, TypeError) as error:
        raise NumericsError(
            f"ledger row {row.kind} {row.id[:12]}: {what} cannot be kept as JSON: {error}",
            hint="leave out what is not finite, and say why under the key 'error'",
        ) from None


def iso_utc(unix_seconds: float | None = None) -> str:
    """Return a moment as ISO 8601 in UTC, to the millisecond; now if none is given."""
    moment = datetime.now(UTC) if unix_seconds is None else datetime.fromtimestamp(unix_seconds, UTC)
    return moment.isoformat(timespec="milliseconds")


def priced(row: Row, dollars_per_hour: float | None) -> Row:
    """Return the row with its cost computed from its seconds; a cost that is known stays."""
    if row.cost_dollars is not None or row.seconds is None or dollars_per_hour is None:
        return row
    return replace(row, cost_dollars=round(row.seconds / SECONDS_PER_HOUR * dollars_per_hour, 6))
