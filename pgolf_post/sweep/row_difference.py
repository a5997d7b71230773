"""Differences of ledger rows (`ledger diff`): the settings in which two runs, trials or artifacts differ, and the Δ.

The difference in bpb has an interval where one can be had: over seeds, where both are trials that were trained with
several; over documents, where scores of both by one protocol lie on disk. Else it is the difference of two numbers of
the same text and protocol, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.lineage import comparable, difference_in_kind
from pgolf_post.ledger.query import bpb_of, counted_bytes
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import SCORE
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.paired import t_interval
from pgolf_post.sweep.seed_statistics import seed_difference

NAMING = ("run.name", "run.base", "run.why", "run.checkpoint_root")  # of a recipe: what decides no weight
PLACES = ("role", "changes", "axis", "group", "of", "rung", "question", "seed")  # of a trial in its sweep
ID_DIGITS = 12  # of a derived id, which folders are named by
ABSENT = "—"


@dataclass(frozen=True)
class Subject:
    """One side: the runs of a trial over seeds, or one row."""

    name: str
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]


@dataclass(frozen=True)
class RowDifference:
    """The settings and numbers in which two sides differ, the first minus the second."""

    names: tuple[str, str]
    settings: dict[str, tuple[Any, Any]]
    bpb: dict[str, Any]  # difference_bpb, low_bpb, high_bpb, by; or not_compared
    bytes: int | None
    why: tuple[str, str]

    def facts(self) -> dict[str, Any]:
        """Return the difference as JSON."""
        changed = {key: list(values) for key, values in self.settings.items()}
        told = {"names": list(self.names), "settings": changed, **self.bpb, "delta_bytes": self.bytes}
        return {**told, "why": list(self.why)}


def subject(ledger: Ledger, text: str) -> Subject:
    """Return what a name stands for: `SWEEP/TRIAL` with seeds, or one row. Raises NotFoundError, MismatchError."""
    sweep, slash, trial = text.partition("/")
    if slash:
        runs = [row for row in ledger.rows("trial", run=sweep) if row.settings.get("of") == trial]
        last = max((row.settings.get("rung", 0) for row in runs), default=0)
        if runs:
            return Subject(text, tuple(row for row in runs if row.settings.get("rung", 0) == last))
        named = [row for row in ledger.rows(None, run=sweep) if row.name == trial]
        if len(named) == 1:
            return Subject(text, tuple(named))
    row = ledger.find(text)
    return Subject(row.name or row.id[:ID_DIGITS], (row,))


def row_difference(ledger: Ledger, root: Path, one: Subject, other: Subject, level: float = 0.95) -> RowDifference:
    """Return what is different between two subjects."""
    sizes = counted_bytes(one.first), counted_bytes(other.first)
    return RowDifference(
        (one.name, other.name),
        changed_settings(one.first, other.first),
        _bpb(ledger, root, one, other, level),
        sizes[0] - sizes[1] if sizes[0] is not None and sizes[1] is not None else None,
        (_why(one.first), _why(other.first)),
    )


def changed_settings(one: Row, other: Row) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two rows differ, by dotted key; what names a run or places a trial is left out."""
    first, second = dict(_flat(one.settings)), dict(_flat(other.settings))
    keys = [key for key in dict.fromkeys((*first, *second)) if first.get(key, ABSENT) != second.get(key, ABSENT)]
    kept = [key for key in keys if key not in NAMING and key.partition(".")[0] not in PLACES]
    return {key: (first.get(key, ABSENT), second.get(key, ABSENT)) for key in kept}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _why(row: Row) -> str:
    run = row.settings.get("run")
    said = run.get("why") if isinstance(run, Mapping) else None
    return str(said or row.settings.get("motivation") or row.settings.get("question") or "")


def _bpb(ledger: Ledger, root: Path, one: Subject, other: Subject, level: float) -> dict[str, Any]:
    if len(one.rows) > 1 or len(other.rows) > 1:
        return _over_seeds(one, other, level)
    for first, second in _score_pairs(ledger, one.first, other.first):
        sums = _sums(root, first), _sums(root, second)
        if sums[0] is not None and sums[1] is not None:
            found = t_interval(paired_documents(sums[0], sums[1]), level).facts()
            kept = {key: found[key] for key in ("difference_bpb", "low_bpb", "high_bpb", "tokens")}
            return {**kept, "by": f"documents, {first.name}"}
    bpb = bpb_of(one.first), bpb_of(other.first)
    if bpb[0] is None or bpb[1] is None:
        return {"not_compared": f"{(one if bpb[0] is None else other).name} has no bpb"}
    if not comparable(one.first, other.first):
        return {"not_compared": difference_in_kind(one.first, other.first)}
    return {"difference_bpb": bpb[0] - bpb[1], "low_bpb": None, "high_bpb": None, "by": "two numbers"}


def _over_seeds(one: Subject, other: Subject, level: float) -> dict[str, Any]:
    sides = []
    for side in (one, other):
        there = {int(row.settings.get("seed") or 0): bpb_of(row) for row in side.rows}
        sides.append({seed: bpb for seed, bpb in there.items() if bpb is not None})
    if not all(sides):
        return {"not_compared": f"{(other if sides[0] else one).name} has no bpb"}
    apart = next((difference_in_kind(a, b) for a in one.rows for b in other.rows if not comparable(a, b)), "")
    if apart:
        return {"not_compared": apart}
    fixed = len(other.rows) == 1 and other.first.settings.get("seed") is None
    seen = seed_difference(sides[0], next(iter(sides[1].values())) if fixed else sides[1], level)
    return {**seen.facts(), "by": f"seeds, {seen.kind}"}


def _score_pairs(ledger: Ledger, one: Row, other: Row) -> Iterator[tuple[Row, Row]]:
    """Yield pairs of scores of two things by the same protocol on the same text, the newest first."""
    rows = ledger.rows()
    theirs = {row.settings_hash: row for row in _scores_of(rows, other)}
    for score in reversed(_scores_of(rows, one)):
        if score.settings_hash in theirs:
            yield score, theirs[score.settings_hash]


def _scores_of(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the scores of a thing: its own, or of a run those of its last checkpoint."""
    if row.kind == "score":
        return [row]
    if row.kind == "run":
        saved = [one for one in rows if one.kind == "checkpoint" and row.id in one.parents]
        last = max((int(one.settings.get("step", 0)) for one in saved), default=0)
        ids = {one.id for one in saved if int(one.settings.get("step", 0)) == last}
    else:
        ids = {row.id, *(row.parents if row.kind == "trial" else ())}
    return [one for one in rows if one.kind == "score" and ids & set(one.parents)]


def _sums(root: Path, score: Row) -> Score | None:
    """Return a score's sums by document, None where its folder is not there."""
    found = next(root.glob(f"*/*/derived/{SCORE.name}/{score.id[:ID_DIGITS]}/{SCORE.payload}"), None)
    return Score.load(found) if found is not None else None


def show(difference: RowDifference) -> list[str]:
    """Return the difference as lines for people."""
    first, second = difference.names
    lines = [f"{first} against {second}"]
    lines += [f"  why {name}: {why}" for name, why in zip(difference.names, difference.why, strict=True) if why]
    width = max((len(key) for key in difference.settings), default=0)
    lines += [f"  {key:<{width}}  {mine}  (was {theirs})" for key, (mine, theirs) in difference.settings.items()]
    lines += [] if difference.settings else ["  the same settings"]
    bpb = difference.bpb
    if "not_compared" in bpb:
        lines.append(f"  bpb not compared: {bpb['not_compared']}")
    else:
        low, high = bpb["low_bpb"], bpb["high_bpb"]
        interval = f" [{low:+.5f} … {high:+.5f}]" if low is not None and high is not None else ", no interval"
        lines.append(f"  Δ bpb {bpb['difference_bpb']:+.5f}{interval} (by {bpb['by']})")
    lines += [f"  Δ bytes {difference.bytes:+,}"] if difference.bytes is not None else []
    return lines
