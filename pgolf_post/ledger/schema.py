"""One row of the ledger: what was done, of what it was made, what came of it, and what was concluded.

Every stage leaves rows of one shape, so that a training run, an artifact and a line of a contestant's old notebook can
stand in one table and in one tree. `settings` is what was asked for, `result` what was measured, under the names that
`--json` uses everywhere: bpb, nats, tokens, bytes (of text), artifact_bytes, code_bytes, total_bytes, headroom_bytes,
symbols_sha256, checkpoint_id; `error` is the text of a failure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.settings import canonical_json

Kind = Literal["run", "checkpoint", "stats", "trial", "artifact", "score", "comparison", "note"]
Verdict = Literal["positive", "neutral", "negative", "no-op"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Row:
    """One thing that was done. `(kind, id)` names it; parents are ids of rows, of any kind, or `external:NAME`."""

    kind: Kind
    id: str
    parents: tuple[str, ...] = ()
    name: str = ""
    run: str = ""  # the training run or the sweep it belongs to
    settings: dict[str, Any] = field(default_factory=dict)
    settings_hash: str = ""  # filled in from `settings` where left out
    result: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    device: str | None = None
    seconds: float | None = None
    cost_dollars: float | None = None
    verdict: Verdict | None = None
    conclusion: str | None = None
    created: str = ""  # ISO 8601, UTC; now where left out

    def __post_init__(self) -> None:
        """Raises SettingsError (unknown kind or verdict, empty id), NumericsError (what JSON cannot say)."""
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
        """What two rows of one id must agree on: not when, where, how fast, or what was concluded."""
        return canonical_json([self.parents, self.name, self.run, self.settings, self.result])

    def facts(self) -> dict[str, Any]:
        """The row as JSON."""
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
    """A moment as ISO 8601 in UTC, to the millisecond; now if none is given."""
    moment = datetime.now(UTC) if unix_seconds is None else datetime.fromtimestamp(unix_seconds, UTC)
    return moment.isoformat(timespec="milliseconds")


def priced(row: Row, dollars_per_hour: float | None) -> Row:
    """The row with its seconds turned into dollars; a cost that is known stays."""
    if row.cost_dollars is not None or row.seconds is None or dollars_per_hour is None:
        return row
    return replace(row, cost_dollars=round(row.seconds / SECONDS_PER_HOUR * dollars_per_hour, 6))
