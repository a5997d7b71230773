"""What later stages made and kept: every derived folder under a root, what it is, whether it is whole, how to be rid of
it.

Results live beside the checkpoint they were made from, `RUN/CHECKPOINT/derived/STAGE/ID`, so that they travel with it.
An entry is in one of these states; only the first is ever used:

    complete     its meta.json is there; whether its bytes are those that were written is for `verify` to say
    orphan       complete, but its checkpoint is gone, or holds other weights than those it was made from
    partial      what an interrupted calibration, attribution or fit has done; the same command takes it up again
    temporary    left by a killed process (`.tmp-…`, `.old-…`)
    incomplete   anything else
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgolf_post.base.storage import TEMPORARY_PREFIX, read_json, sha256_file
from pgolf_post.derived import OLD_PREFIX, PARTIAL_SUFFIX
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

State = Literal["complete", "orphan", "partial", "temporary", "incomplete"]
DAY_SECONDS = 86400.0
NOT_SETTINGS = ("stage", "version", "view", "view_id", "spans", "calibration_sha256", "data_manifest_sha256")


@dataclass(frozen=True)
class Entry:
    """One derived folder (or what is left of one)."""

    path: Path
    stage: str
    state: State
    num_bytes: int
    modified_unix: float
    checkpoint: Path
    config: dict[str, Any]  # what made it; empty where that cannot be read

    @property
    def age_days(self) -> float:
        return (time.time() - self.modified_unix) / DAY_SECONDS

    def made_by(self) -> str:
        """The settings that made it, shortened; a plan by its name."""
        kept = {
            key: value
            for key, value in self.config.items()
            if key not in NOT_SETTINGS and value is not None and not isinstance(value, list | dict)
        }
        parts = [f"{key}={value[:12] if isinstance(value, str) else value}" for key, value in kept.items()]
        weights = [f"{self.config['view']} weights"] if "view" in self.config else []
        return ", ".join(weights + parts)

    def facts(self) -> dict[str, Any]:
        """The entry as JSON."""
        return {
            "path": str(self.path),
            "stage": self.stage,
            "state": self.state,
            "bytes": self.num_bytes,
            "age_days": round(self.age_days, 3),
            "checkpoint": str(self.checkpoint),
            "config": {key: value for key, value in self.config.items() if key != "spans"},
        }


def list_entries(root: Path) -> list[Entry]:
    """Every derived folder under `root`, by checkpoint, stage and name. Raises NotFoundError if there is no root."""
    if not root.is_dir():
        raise NotFoundError(f"no folder {root}", hint="pgolf-post cache list --root FOLDER")
    return [entry_at(path) for stage in sorted(_stage_folders(root)) for path in sorted(stage.iterdir())]


def _stage_folders(root: Path) -> Iterator[Path]:
    for derived in root.rglob("derived"):
        if derived.is_dir() and not derived.is_symlink():
            yield from (stage for stage in derived.iterdir() if stage.is_dir())


def entry_at(path: Path) -> Entry:
    """What is at `RUN/CHECKPOINT/derived/STAGE/ID`."""
    checkpoint, files = path.parents[2], [path, *path.rglob("*")]
    sizes = [file.lstat() for file in files]
    num_bytes = sum(size.st_size for file, size in zip(files, sizes, strict=True) if not file.is_dir())
    try:
        config = read_json(path / "config.json")
    except (PgolfError, OSError):
        config = {}
    modified = max(size.st_mtime for size in sizes)
    return Entry(path, path.parent.name, _state(path, checkpoint, config), num_bytes, modified, checkpoint, config)


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


def verify_entry(entry: Entry) -> None:
    """Raise DamagedFileError naming a file of a complete entry whose bytes are not what was written."""
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


def is_owned(entry: Entry) -> bool:
    """Whether a temporary folder belongs to a process that still runs."""
    owner = entry.path.name.removeprefix(TEMPORARY_PREFIX).split("-", 1)[0]
    return owner.isdigit() and Path(f"/proc/{owner}").exists()


def choose(
    entries: list[Entry],
    stages: tuple[str, ...] = (),
    older_than_days: float | None = None,
    orphans: bool = False,
) -> list[Entry]:
    """What `prune` would remove: leftovers of dead processes always, and complete entries only as the filters say.

    With a stage or an age, entries of that stage and at least that age; with `orphans`, orphans among them alone.
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


KEPT: tuple[State, ...] = ("complete", "orphan", "partial")


def remove(entries: list[Entry]) -> int:
    """Delete entries; returns the bytes that were freed. A result disappears by one rename before its files go."""
    freed = 0
    for entry in entries:
        doomed = entry.path.with_name(f"{OLD_PREFIX}{entry.path.name.lstrip('.')}")
        entry.path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()
        freed += entry.num_bytes
    return freed
