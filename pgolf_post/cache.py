"""Derived folders under a root: which there are, what made them, whether they are intact, and how to delete them.

Results live beside the checkpoint they were made from, `RUN/CHECKPOINT/derived/STAGE/ID`, so that they travel with it.
An entry has one of these states; only complete entries are ever used:

    complete     its meta.json is there; `verify_entry` checks its bytes
    orphan       complete, but its checkpoint is gone, or holds other weights than those it was made from
    partial      the progress of an interrupted calibration, attribution or fit; the same command resumes from it
    temporary    left by a killed process (`.tmp-…`, `.old-…`)
    incomplete   anything else
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal

from pgolf_post.base.ownership import TEMPORARY_PREFIX, is_abandoned
from pgolf_post.base.storage import OLD_PREFIX, PARTIAL_SUFFIX, read_json, sha256_file
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

State = Literal["complete", "orphan", "partial", "temporary", "incomplete"]
DAY_SECONDS = 86400.0
CLOCKS_DIFFER_DAYS = 60 / DAY_SECONDS  # of a file server and of this machine, without a word
KEPT: tuple[State, ...] = ("complete", "orphan", "partial")  # deleted only if asked for
HEADER = ("checkpoint", "stage", "id", "state", "bytes", "days", "made by")
NOT_SETTINGS = ("stage", "version", "view", "view_id", "spans", "calibration_sha256", "data_manifest_sha256")


@dataclass(frozen=True)
class CacheEntry:
    """One derived folder, or what is left of one."""

    path: Path
    stage: str
    state: State
    num_bytes: int
    modified_unix: float
    checkpoint: Path
    config: dict[str, Any]  # the settings it was made with; empty if they cannot be read

    @property
    def age_days(self) -> float:
        """Days since it was last changed; 0 where it is dated later than now (see `ahead_days`)."""
        return max(0.0, -self.ahead_days)

    @property
    def ahead_days(self) -> float:
        """Days by which the clock that dated it was ahead of this machine's; negative where it was not."""
        return (self.modified_unix - time.time()) / DAY_SECONDS

    def made_by(self) -> str:
        """Return the settings it was made with, shortened; a plan by its name."""
        kept = {
            key: value
            for key, value in self.config.items()
            if key not in NOT_SETTINGS and value is not None and not isinstance(value, list | dict)
        }
        parts = [f"{key}={value[:12] if isinstance(value, str) else value}" for key, value in kept.items()]
        weights = [f"{self.config['view']} weights"] if "view" in self.config else []
        return ", ".join(weights + parts)

    def cells(self, root: Path) -> tuple[str, ...]:
        """Return the entry's cells under HEADER."""
        where = self.path.relative_to(root)
        size, age = f"{self.num_bytes:,}", f"{self.age_days:.1f}"
        return str(where.parents[2]), self.stage, where.name, self.state, size, age, self.made_by()[:60]

    def facts(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        return {
            "path": str(self.path),
            "stage": self.stage,
            "state": self.state,
            "bytes": self.num_bytes,
            "age_days": round(self.age_days, 3),
            "checkpoint": str(self.checkpoint),
            "config": {key: value for key, value in self.config.items() if key != "spans"},
        }


def dated_ahead(entries: list[CacheEntry]) -> str:
    """Return a sentence on entries that are dated later than now; nothing if there are none."""
    ahead = [entry.ahead_days for entry in entries if entry.ahead_days > CLOCKS_DIFFER_DAYS]
    if not ahead:
        return ""
    return (
        f"{len(ahead)} dated later than now, by up to {max(ahead):,.1f} days (a clock was wrong): shown as 0 days old"
    )


def list_entries(root: Path) -> list[CacheEntry]:
    """Return every derived folder under `root`, by checkpoint, stage and name. Raises NotFoundError without a root."""
    if not root.is_dir():
        raise NotFoundError(f"no folder {root}", hint="pgolf-post cache list --root FOLDER")
    found = []
    for stage in sorted(_stage_folders(root)):
        with suppress(FileNotFoundError):  # finished, or deleted, since its name was read
            for path in sorted(stage.iterdir()):
                with suppress(FileNotFoundError):
                    found.append(entry_at(path))
    return found


def _stage_folders(root: Path) -> Iterator[Path]:
    for derived in root.rglob("derived"):
        if derived.is_dir() and not derived.is_symlink():
            yield from (stage for stage in derived.iterdir() if stage.is_dir())


def entry_at(path: Path) -> CacheEntry:
    """Return the entry at `RUN/CHECKPOINT/derived/STAGE/ID`. Raises FileNotFoundError if it goes while it is read."""
    checkpoint, sizes = path.parents[2], [path.lstat()]
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # a stage that works there renames and removes its files
            sizes.append(file.lstat())
    num_bytes = sum(size.st_size for size in sizes if not S_ISDIR(size.st_mode))
    try:
        config = read_json(path / "config.json")
    except (PgolfError, OSError):
        config = {}
    modified = max(size.st_mtime for size in sizes)
    return CacheEntry(path, path.parent.name, _state(path, checkpoint, config), num_bytes, modified, checkpoint, config)


def _state(path: Path, checkpoint: Path, config: dict[str, Any]) -> State:
    if path.name.startswith((TEMPORARY_PREFIX, OLD_PREFIX)):
        return "temporary"
    if path.name.endswith(PARTIAL_SUFFIX):
        return "partial"
    if not (path / "meta.json").is_file() or not config:
        return "incomplete"
    try:
        views = {str(view["id"]) for view in read_json(checkpoint / "meta.json")["views"].values()}
    except (PgolfError, KeyError, TypeError, AttributeError):
        return "orphan"
    return "orphan" if config.get("view_id") not in (None, *views) else "complete"


def verify_entry(entry: CacheEntry) -> None:
    """Raise DamagedFileError naming a file of a complete entry whose sha256 is not the recorded one."""
    meta = read_json(entry.path / "meta.json")
    more = dict(meta.get("more_sha256", {}))
    payloads = [path for path in sorted(entry.path.iterdir()) if path.name not in ("meta.json", "config.json", *more)]
    recorded = {path: str(meta.get("payload_sha256")) for path in payloads}
    recorded |= {entry.path / name: str(sha256) for name, sha256 in more.items()}
    if not payloads:
        raise DamagedFileError(f"{entry.path} lost its payload")
    for path, sha256 in recorded.items():
        if not path.is_file() or sha256_file(path) != sha256:
            raise DamagedFileError(f"{path} does not match the sha256 recorded in meta.json")


def is_owned(entry: CacheEntry) -> bool:
    """Return whether somebody may still work in a temporary folder."""
    return entry.path.name.startswith(TEMPORARY_PREFIX) and not is_abandoned(entry.path)


def choose(
    entries: list[CacheEntry],
    stages: tuple[str, ...] = (),
    older_than_days: float | None = None,
    orphans: bool = False,
) -> list[CacheEntry]:
    """Return the entries that `prune` deletes: leftovers of dead processes, and results only if a filter asks for them.

    `stages` and `older_than_days` restrict both; `orphans` restricts the results to orphans.
    """
    chosen = []
    for entry in entries:
        fits = entry.stage in stages if stages else True
        fits = fits and (older_than_days is None or entry.age_days >= older_than_days)
        leftover = entry.state in ("temporary", "incomplete") and not is_owned(entry)
        asked = bool(stages) or older_than_days is not None or orphans
        wanted = leftover or (asked and (entry.state == "orphan" if orphans else entry.state in KEPT))
        if fits and wanted:
            chosen.append(entry)
    return chosen


def remove(entries: list[CacheEntry]) -> int:
    """Delete entries and return the bytes freed. A result is renamed away in one step before its files are deleted."""
    freed = 0
    for entry in entries:
        doomed = entry.path.with_name(f"{OLD_PREFIX}{entry.path.name.lstrip('.')}")
        try:
            entry.path.rename(doomed)
            if doomed.is_dir() and not doomed.is_symlink():
                shutil.rmtree(doomed)
            else:
                doomed.unlink()
        except FileNotFoundError:  # another process was faster
            continue
        freed += entry.num_bytes
    return freed
