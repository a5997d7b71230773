"""Content-addressed results: change a setting, get a new folder; the same settings give a cache hit, said aloud.

A derived id is sha256(parent ids ‖ canonical stage settings ‖ stage version). Parents are ids of tensors actually used,
never paths, so a cache entry cannot outlive what it was made from. A result lies at `derived/STAGE/ID` beside its
checkpoint, with the first 12 digits of its id, and holds

    the payload and any further files     what the stage made
    config.json                           what decided it: stage, version, names for people, settings
    meta.json                             what came of it; written last, with the sha256 of every other file

so that damage is noticed and the result made again, aloud.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.base.ownership import TEMPORARY_PREFIX
from pgolf_post.base.progress import say
from pgolf_post.base.storage import (
    ANOTHER_PATH,
    OLD_PREFIX,
    PARTIAL_SUFFIX,
    WRITABLE,
    atomic_folder,
    read_json,
    require_writable,
    sha256_file,
    write_json,
)
from pgolf_post.errors import DamagedFileError, PgolfError
from pgolf_post.settings import canonical_json

ANOTHER_PLACE = "keep results in a folder of your own: --derived FOLDER, the same again in later commands"
NAMING = ("stage", "version", "view", "view_id", "stats_id", "plan")  # keys of config.json that are not settings

Make = Callable[[Path], Mapping[str, Any]]  # fills the folder that it is given, returns facts for meta.json


@dataclass(frozen=True)
class Stage:
    """One kind of derived result."""

    name: str
    version: int  # rises when the same settings make another result
    payload: str  # the file that every result has

    def id(self, parents: Sequence[str], settings: Mapping[str, Any]) -> str:
        """Return the id of the result that these parents and settings have."""
        return derived_id(self.name, self.version, parents, settings)

    def folder(self, root: Path, result_id: str) -> Path:
        """Return where a result lies under `root`, a checkpoint's `derived` folder."""
        return root / self.name / result_id[:12]

    def intact_meta(self, folder: Path) -> dict[str, Any] | None:
        """Return a result's meta.json if it is there and undamaged (see `intact_meta`)."""
        return intact_meta(folder, self.payload)

    def store(self, folder: Path, config: Mapping[str, Any], make: Make) -> dict[str, Any]:
        """Make a result and keep it (see `store`); config.json begins with the stage's name and version."""
        return store(folder, self.payload, self._config(config), make)

    def load_or_make(
        self, folder: Path, config: Mapping[str, Any], make: Make, fresh: bool = False
    ) -> tuple[dict[str, Any], bool]:  # meta, whether it was cached
        """Return a result's meta.json if it is intact, else make and keep it."""
        return load_or_make(folder, self.payload, self._config(config), make, fresh)

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"stage": self.name, "version": self.version, **config}


def derived_id(stage: str, version: int, parents: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Return the id of a stage's result."""
    identity = {"stage": stage, "version": version, "parents": list(parents), "settings": dict(settings)}
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def id_from_config(config: Mapping[str, Any], parents: Sequence[str]) -> str:
    """Return a result's id, computed again from its config.json."""
    settings = {key: value for key, value in config.items() if key not in NAMING}
    return derived_id(str(config["stage"]), int(config.get("version", 0)), parents, settings)


def derived_folders(checkpoint: Path) -> list[Path]:
    """Return the folders of a checkpoint's finished results, by stage and name.

    What an interrupted or replaced stage left (`.tmp-…`, `.old-…`, `….partial`) is no result and is passed over.
    """
    folders = (path for path in checkpoint.glob("derived/*/*") if not is_leftover(path))
    return sorted(path for path in folders if (path / "meta.json").is_file())


def is_leftover(path: Path) -> bool:
    """Whether a name under `derived/STAGE` says that a stage is under way there or did not finish."""
    return path.name.startswith((TEMPORARY_PREFIX, OLD_PREFIX)) or PARTIAL_SUFFIX in path.suffixes


def verified_meta(folder: Path, payload: str) -> dict[str, Any]:
    """Return a derived folder's meta.json, its files checked by sha256. Raises DamagedFileError, NotFoundError."""
    meta = read_json(folder / "meta.json")
    recorded = {payload: meta.get("payload_sha256")} | dict(meta.get("more_sha256", {}))
    for name, sha256 in recorded.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise DamagedFileError(f"{path} does not match the sha256 recorded in meta.json")
    return meta


def intact_meta(folder: Path, payload: str) -> dict[str, Any] | None:
    """Return the meta.json of an intact result, said aloud; None if there is none or if it is damaged (said aloud)."""
    what = f"{folder.parent.name} {folder.name}"
    if not (folder / "meta.json").is_file():
        return None
    try:
        meta = verified_meta(folder, payload)
    except PgolfError as error:
        say(f"{what}: {error}; recomputing")
        return None
    say(f"{what}: cached")
    return meta


def store(folder: Path, payload: str, config: Mapping[str, Any], make: Make) -> dict[str, Any]:
    """Run `make(building)` and keep what it wrote and reports, in one atomic step. Returns the folder's meta.json.

    `make` writes `payload`, and further files if it likes, into the folder that it is given and returns JSON facts for
    meta.json. `seconds` is measured here unless it is among them.
    """
    started = time.perf_counter()
    with _another_place(), atomic_folder(folder, replace=True) as building:
        facts = make(building)
        written = {path.name: sha256_file(path) for path in sorted(building.iterdir())}
        write_json(building / "config.json", config)
        seconds = round(time.perf_counter() - started, 3)
        recorded: dict[str, Any] = {"payload_sha256": written.pop(payload), "seconds": seconds, **facts}
        if written:
            recorded["more_sha256"] = written
        write_json(building / "meta.json", recorded)
    return read_json(folder / "meta.json")


def require_writable_result(folder: Path) -> None:
    """Raise PgolfError if a result could not be written here; for work that is long, before it begins."""
    with _another_place():
        require_writable(folder)


@contextmanager
def _another_place() -> Iterator[None]:
    """Let the error for a folder that cannot be written say how results are kept in another one."""
    try:
        yield
    except PgolfError as error:
        if error.hint in (WRITABLE, ANOTHER_PATH):
            error.hint = ANOTHER_PLACE
        raise


def load_or_make(
    folder: Path, payload: str, config: Mapping[str, Any], make: Make, fresh: bool = False
) -> tuple[dict[str, Any], bool]:  # meta, whether it was cached
    """Return the folder's meta.json if it is intact, else make and store it (see `store`)."""
    meta = None if fresh else intact_meta(folder, payload)
    if meta is not None:
        return meta, True
    return store(folder, payload, config, make), False
