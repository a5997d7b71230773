"""`cache list|verify|prune` over real derived folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pgolf_post.artifacts import requant
from pgolf_post.base.ownership import kernel_id
from pgolf_post.cache import CacheEntry, choose, entry_at, list_entries, remove, verify_entry
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, NotFoundError
from pgolf_post.plan import read_plan


@pytest.fixture
def root(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> Path:
    """A run's root with statistics of two views and an artifact."""
    settings = CalibrationSettings(tokens=64)
    for weights in ("raw", "ema"):
        stats = calibrate(pico_checkpoint.load(weights), pico_data, settings)  # type: ignore[arg-type]
    requant(pico_checkpoint.load("ema"), stats, read_plan("sdclip-1394"))
    return pico_checkpoint.path.parent.parent


def states(root: Path) -> dict[str, str]:
    return {entry.path.name: entry.state for entry in list_entries(root)}


def test_what_is_kept_is_listed_with_what_made_it(root: Path) -> None:
    entries = list_entries(root)
    assert sorted((entry.stage, entry.state) for entry in entries) == [
        ("artifact", "complete"),
        ("stats", "complete"),
        ("stats", "complete"),
    ]
    for entry in entries:
        assert entry.num_bytes == sum(path.stat().st_size for path in entry.path.iterdir())
        assert entry.checkpoint.name == "step_000012-final"
        assert 0 <= entry.age_days < 1
        assert ("tokens=64" if entry.stage == "stats" else "plan=sdclip-1394") in entry.made_by()
        verify_entry(entry)
    with pytest.raises(NotFoundError, match="no folder"):
        list_entries(root / "nowhere")


def test_what_goes_while_it_is_listed_or_deleted_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command finishes its work, or prunes, at the same time."""
    entries = list_entries(root)
    going = entries[0].path

    def entry_of_what_is_left(path: Path) -> CacheEntry:
        if path == going:
            shutil.rmtree(path)
        return entry_at(path)

    monkeypatch.setattr("pgolf_post.cache.entry_at", entry_of_what_is_left)
    assert list_entries(root) == entries[1:]
    assert remove(entries) == sum(entry.num_bytes for entry in entries[1:])
    assert remove(entries) == 0


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_damage_is_found(root: Path, damage: str) -> None:
    for entry in list_entries(root):
        (payload,) = (path for path in entry.path.iterdir() if path.suffix != ".json")
        if damage == "flip":
            payload.write_bytes(payload.read_bytes()[:-1] + b"?")
        else:
            payload.unlink()
        with pytest.raises(DamagedFileError, match=r"does not match the sha256|lost its payload"):
            verify_entry(entry)


def test_prune_takes_leftovers_of_the_dead_and_only_what_is_asked_for_beside(root: Path) -> None:
    stats = next(entry.path for entry in list_entries(root) if entry.stage == "stats").parent
    dead, alive = f".tmp-{kernel_id()}-lock-0-x", ".tmp-0123abcd-lock-0-y"  # the second of another machine, just made
    for name in (dead, alive, ".old-0-z", "incomplete", "0123.partial"):
        (stats / name).mkdir()
    entries = list_entries(root)
    chosen = {entry.path.name for entry in choose(entries)}
    assert chosen == {dead, ".old-0-z", "incomplete"}
    assert "0123.partial" in {entry.path.name for entry in choose(entries, stages=("stats",))}
    assert {entry.stage for entry in choose(entries, stages=("artifact",))} == {"artifact"}
    assert not choose(entries, older_than_days=1.0)
    for entry in entries:
        if entry.path.name != alive:
            os.utime(entry.path, (0, 0))
    freed = remove(choose(list_entries(root)))
    assert freed == 0
    assert set(states(root).values()) == {"complete", "partial", "temporary"}
    assert not (stats / "incomplete").exists()
    assert (stats / alive).exists()


def test_results_of_weights_that_are_gone_are_orphans(root: Path) -> None:
    (checkpoint,) = {entry.checkpoint for entry in list_entries(root)}
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["views"]["raw"]["id"] = "another"
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    orphans = choose(list_entries(root), orphans=True)
    assert [entry.config["view"] for entry in orphans] == ["raw"]
    (checkpoint / "meta.json").unlink()
    assert len(choose(list_entries(root), orphans=True)) == 3
    assert remove(choose(list_entries(root), orphans=True)) > 0
    assert not list_entries(root)
