"""Content-addressed results: change a knob, get a new folder; same knobs, a cache hit, said aloud.

A derived id is sha256(parent ids ‖ canonical stage settings ‖ stage version). Parents are ids of tensors actually used,
never paths, so a cache entry cannot outlive or outrun what it was made from. A folder holds the payload, config.json
(what made it) and meta.json (written last, with the payload's sha256, so that damage is found and recomputed, aloud).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_folder, read_json, sha256_file, write_json
from pgolf_post.errors import DamagedFileError, PgolfError
from pgolf_post.settings import canonical_json


def derived_id(stage: str, version: int, parents: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The id of a stage's result."""
    identity = {"stage": stage, "version": version, "parents": list(parents), "settings": dict(settings)}
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def verified_meta(folder: Path, payload: str) -> dict[str, Any]:
    """A derived folder's meta.json, its payload checked by sha256. Raises DamagedFileError, NotFoundError."""
    meta = read_json(folder / "meta.json")
    recorded = {payload: meta.get("payload_sha256")} | dict(meta.get("more_sha256", {}))
    for name, sha256 in recorded.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise DamagedFileError(f"{path} does not match the sha256 recorded in meta.json")
    return meta


def intact_meta(folder: Path, payload: str) -> dict[str, Any] | None:
    """The meta of a result that is there and whole, said aloud; None if there is none, or if it is damaged (aloud)."""
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


def store(
    folder: Path, payload: str, config: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """Run `make(building)` and keep what it wrote and reports, in one atomic step. Returns the folder's meta.

    `make` writes `payload`, and other files if it likes, into the folder it is given and returns JSON facts for
    meta.json; `seconds` is measured here unless it is among them.
    """
    started = time.perf_counter()
    with atomic_folder(folder, replace=True) as building:
        facts = make(building)
        written = {path.name: sha256_file(path) for path in sorted(building.iterdir())}
        write_json(building / "config.json", config)
        seconds = round(time.perf_counter() - started, 3)
        recorded: dict[str, Any] = {"payload_sha256": written.pop(payload), "seconds": seconds, **facts}
        if written:
            recorded["more_sha256"] = written
        write_json(building / "meta.json", recorded)
    return read_json(folder / "meta.json")


def load_or_make(
    folder: Path,
    payload: str,
    config: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
    fresh: bool = False,
) -> tuple[dict[str, Any], bool]:  # meta, whether it was cached
    """Return the folder's meta if it is intact, else make and store it (see `store`)."""
    meta = None if fresh else intact_meta(folder, payload)
    if meta is not None:
        return meta, True
    return store(folder, payload, config, make), False
