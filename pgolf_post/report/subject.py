"""Subject of a report: rows of the ledger and of the disk, and the checkpoint folders that they belong to.

Without arguments everything under a checkpoint root; a run, a checkpoint folder or a sweep's TOML file narrows it to
what belongs to them, what that was made of, and what was made of it. Nothing is scored, decoded or loaded onto a device
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pgolf_post.base.paths import followed
from pgolf_post.base.storage import read_json
from pgolf_post.cache import CacheEntry, list_entries
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.disk import entry_id, scan
from pgolf_post.ledger.lineage import Node, trees
from pgolf_post.ledger.store import LEDGER_FILE
from pgolf_post.report.points import Point, points_of

ID_DIGITS = 12  # of the ids by which folders are named


@dataclass(frozen=True)
class Subject:
    """Everything that a report shows, read once."""

    title: str
    root: Path
    rows: list[Row]  # oldest first
    budget_bytes: int
    names: tuple[str, ...] = ()  # what was asked for; empty: all
    opened: Sequence[Checkpoint] = ()  # checkpoints that are shown
    listed: Sequence[CacheEntry] = ()  # derived results under the root

    @cached_property
    def folders(self) -> list[Path]:
        """Folders of the checkpoints."""
        return [checkpoint.path for checkpoint in self.opened]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, by run and step."""
        return sorted(self.opened, key=lambda one: (one.path.parent.name, int(one.meta["step"])))

    @cached_property
    def trees(self) -> list[Node]:
        """Trees of all rows but notes."""
        return trees(self.rows)

    @cached_property
    def points(self) -> list[Point]:
        """Artifacts and packed trials with their scores, the fewest bits per byte first."""
        return points_of(self.rows, self.trees)

    @cached_property
    def run_folders(self) -> list[Path]:
        """Folders of runs that have checkpoints here, or a row."""
        named = {self.root / row.run for row in self.rows if row.kind in ("run", "checkpoint") and row.run}
        there = {folder.parent for folder in self.folders} | {path for path in named if path.is_dir()}
        return sorted(there)

    @cached_property
    def _complete(self) -> list[CacheEntry]:
        return [entry for entry in self.listed if entry.state in ("complete", "orphan")]

    @cached_property
    def entries(self) -> dict[str, CacheEntry]:
        """Complete derived results by the id of their row, of the rows that are shown."""
        wanted = {row.id for row in self.rows}
        found = {}
        for entry in self._complete:
            entry_row_id = entry_id(entry, read_json(entry.path / "meta.json"))
            if entry_row_id in wanted:
                found[entry_row_id] = entry
        return found

    def results(self, stage: str) -> list[CacheEntry]:
        """Complete results of a stage that has no rows, of the checkpoints that are shown; oldest first."""
        here = set(self.folders)
        own = [entry for entry in self._complete if entry.stage == stage and entry.checkpoint in here]
        return sorted(own, key=lambda entry: entry.modified_unix)

    def of_kind(self, *kinds: str) -> list[Row]:
        """Return the rows of some kinds, oldest first."""
        return [row for row in self.rows if row.kind in kinds]


def find_subject(targets: Sequence[Path], root: Path, budget_bytes: int) -> Subject:
    """Return what a report on some runs, checkpoints or sweeps shows; on everything if none is named.

    Raises NotFoundError for a path that is none of them, or a root without anything; MismatchError if they lie under
    several roots.
    """
    asked = [_Asked.of(path, root) for path in targets]
    roots = list(dict.fromkeys(one.root for one in asked)) or [root]
    if len({path.resolve() for path in roots}) > 1:
        raise MismatchError(
            f"{', '.join(map(str, targets))} lie under several checkpoint folders: {', '.join(map(str, roots))}",
            hint="make a report for each",
        )
    own_root = roots[0]
    opened, entries = list_checkpoints(own_root), list_entries(own_root)
    rows = all_rows(own_root, opened, entries)
    if not rows:
        raise NotFoundError(f"nothing is recorded under {own_root}", hint="pgolf-post demo")
    if not asked:
        return Subject(f"{own_root.resolve().name}", own_root, rows, budget_bytes, (), opened, entries)
    seeds = [row for row in rows if any(one.fits(row) for one in asked)]
    kept = related(rows, seeds)
    opened = [checkpoint for checkpoint in opened if any(one.holds(checkpoint.path) for one in asked)]
    names = tuple(one.name for one in asked)
    if not seeds and not opened:
        raise NotFoundError(
            f"nothing is recorded of {', '.join(names)} under {own_root}",
            hint=f"pgolf-post ledger scan --root {own_root}, or pgolf-post sweep run for a sweep",
        )
    return Subject(", ".join(names), own_root, kept, budget_bytes, names, opened, entries)


def all_rows(root: Path, checkpoints: Sequence[Checkpoint], entries: Sequence[CacheEntry]) -> list[Row]:
    """Return the rows of what lies on disk and of the ledger, oldest first; the ledger's say more."""
    rows = {(row.kind, row.id): row for row in scan(root, checkpoints, entries)}
    if (root / LEDGER_FILE).is_file():
        with Ledger.open(root, read_only=True) as ledger:
            for row in ledger.rows():
                known = rows.get((row.kind, row.id))
                result = {**known.result, **row.result} if known else row.result
                rows[row.kind, row.id] = replace(row, result=result)
    return sorted(rows.values(), key=lambda row: row.created)


def related(rows: Sequence[Row], seeds: Iterable[Row]) -> list[Row]:
    """Return seeds, what they were made of, and what was made of them, in the order of `rows`."""
    keys = {id(row): _key(row.id) for row in rows}
    by_key: dict[str, list[Row]] = {}
    children: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(keys[id(row)], []).append(row)
        for parent in row.parents:
            children.setdefault(_key(parent), []).append(row)
    starts = list(seeds)
    kept = {id(row) for row in starts}
    up = list(starts)
    while up:
        for parent in up.pop().parents:
            new = [row for row in by_key.get(_key(parent), []) if id(row) not in kept]
            kept |= {id(row) for row in new}
            up += new
    below, down = {id(row) for row in starts}, list(starts)
    while down:
        new = [row for row in children.get(keys[id(down.pop())], []) if id(row) not in below]
        below |= {id(row) for row in new}
        down += new
    return [row for row in rows if id(row) in kept | below]


def _key(row_id: str) -> str:
    """Return an id as parents are looked up by: folders are named by its first digits."""
    is_hex = len(row_id) >= ID_DIGITS and all(digit in "0123456789abcdef" for digit in row_id[:ID_DIGITS])
    return row_id[:ID_DIGITS] if is_hex else row_id


@dataclass(frozen=True)
class _Asked:
    """One argument: a run, a checkpoint folder or a sweep."""

    name: str
    root: Path
    run: str = ""  # of rows: a run's or a sweep's name
    folder: Path | None = None
    ids: frozenset[str] = frozenset()  # of a checkpoint's views

    @classmethod
    def of(cls, path: Path, root: Path) -> _Asked:
        """Return what a path means. Raises NotFoundError."""
        if path.suffix == ".toml":
            if not path.is_file():
                raise NotFoundError(f"no such sweep: {path}", hint="ls sweeps/*.toml")
            return cls(path.stem, root, run=path.stem)
        for folder in (path, root / path):
            if (folder / "config.json").is_file() and (folder / "meta.json").is_file():
                own = followed(folder)
                checkpoint = Checkpoint.open(own)
                ids = frozenset(str(view["id"]) for view in checkpoint.meta["views"].values())
                return cls(f"{own.parent.name}/{own.name}", own.parent.parent, folder=own, ids=ids)
            if folder.is_dir() and any((child / "meta.json").is_file() for child in folder.iterdir()):
                return cls(folder.resolve().name, folder.parent, run=folder.resolve().name, folder=folder)
        raise NotFoundError(
            f"{path} is not a run, a checkpoint folder or a sweep's .toml file", hint="pgolf-post checkpoint list"
        )

    def fits(self, row: Row) -> bool:
        """Whether a row is what was asked for."""
        return row.id in self.ids or (bool(self.run) and row.run == self.run)

    def holds(self, folder: Path) -> bool:
        """Whether a checkpoint folder is what was asked for, or of it."""
        return self.folder is not None and self.folder.resolve() in (folder.resolve(), folder.parent.resolve())
