"""Derived folders: the same knobs find the same result, other knobs another, and damage is recomputed aloud."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from pgolf_post.base.storage import sha256_file
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.derived import ANOTHER_PLACE, derived_id, load_or_make, require_writable_result, verified_meta
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

CONFIG = {"stage": "stats", "version": 1}
SCALARS = st.integers() | st.text(max_size=5) | st.booleans() | st.none()
IDENTITIES = st.tuples(
    st.sampled_from(["stats", "artifact"]),
    st.integers(0, 3),
    st.lists(st.text("ab", max_size=2), max_size=3),
    st.dictionaries(st.text("xyz", min_size=1, max_size=2), SCALARS, max_size=3),
)


class Maker:
    """A stage that writes `payload` and counts how often it was asked to."""

    def __init__(self, contents: bytes = b"result", fails: BaseException | None = None) -> None:
        self.contents, self.fails, self.calls = contents, fails, 0

    def __call__(self, building: Path) -> Mapping[str, Any]:
        self.calls += 1
        (building / "payload").write_bytes(self.contents)
        if self.fails:
            raise self.fails
        return {"answer": 42, "call": self.calls}


def everything_in(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "derived" / "stats" / "0123456789ab"


def test_the_second_call_does_not_recompute_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = Maker()
    first, first_cached = load_or_make(folder, "payload", CONFIG, make)
    second, second_cached = load_or_make(folder, "payload", CONFIG, make)
    assert (first_cached, second_cached, make.calls) == (False, True, 1)
    assert second == first
    assert first["answer"] == 42
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["stats 0123456789ab: cached"]
    assert captured.out == ""


def test_a_folder_holds_the_payload_its_sha256_and_what_made_it(folder: Path) -> None:
    meta, _ = load_or_make(folder, "payload", CONFIG, Maker(b"bytes"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "meta.json", "payload"]
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert meta["payload_sha256"] == sha256_file(folder / "payload")
    assert meta == verified_meta(folder, "payload") == json.loads((folder / "meta.json").read_text())


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "delete", "meta garbage", "meta empty", "meta a list"])
def test_damage_is_detected_and_recomputed_aloud(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    load_or_make(folder, "payload", CONFIG, Maker())
    intact = everything_in(folder)
    if damage.startswith("meta"):
        (folder / "meta.json").write_text({"garbage": "{", "empty": "", "a list": "[]"}[damage.removeprefix("meta ")])
    elif damage == "delete":
        (folder / "payload").unlink()
    else:
        (folder / "payload").write_bytes({"flip": b"resulu", "truncate": b"resul", "grow": b"result\0"}[damage])
    with pytest.raises((DamagedFileError, NotFoundError)):
        verified_meta(folder, "payload")
    capsys.readouterr()
    make = Maker()
    _, cached = load_or_make(folder, "payload", CONFIG, make)
    assert (cached, make.calls) == (False, 1)
    message = capsys.readouterr().err
    assert message.startswith("stats 0123456789ab: ")
    assert message.endswith("; recomputing\n")
    assert ("meta.json" if damage.startswith("meta") else "payload") in message
    assert everything_in(folder)["payload"] == intact["payload"]
    assert load_or_make(folder, "payload", CONFIG, make)[1]


def test_an_incomplete_folder_is_made_again(folder: Path) -> None:
    load_or_make(folder, "payload", CONFIG, Maker(b"old"))
    (folder / "meta.json").unlink()
    _, cached = load_or_make(folder, "payload", CONFIG, Maker(b"new"))
    assert not cached
    assert (folder / "payload").read_bytes() == b"new"


def test_fresh_recomputes_an_intact_result(folder: Path) -> None:
    load_or_make(folder, "payload", CONFIG, Maker(b"old"))
    meta, cached = load_or_make(folder, "payload", CONFIG, Maker(b"new"), fresh=True)
    assert not cached
    assert (folder / "payload").read_bytes() == b"new"
    assert meta["payload_sha256"] == sha256_file(folder / "payload")


@pytest.mark.parametrize("fails", [ValueError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("state", ["intact", "damaged", "absent"])
def test_a_stage_that_fails_leaves_nothing_and_what_was_there_intact(
    folder: Path, state: str, fails: BaseException
) -> None:
    if state != "absent":
        load_or_make(folder, "payload", CONFIG, Maker(b"old"))
    if state == "damaged":
        (folder / "payload").write_bytes(b"flipped")
    root = folder.parent.parent.parent
    before = everything_in(root)
    with pytest.raises(PgolfError if isinstance(fails, OSError) else type(fails)):
        load_or_make(folder, "payload", CONFIG, Maker(b"half", fails), fresh=True)
    assert everything_in(root) == before
    assert not list(root.rglob(".tmp-*"))


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(IDENTITIES, IDENTITIES)
def test_ids_are_equal_exactly_when_stage_version_parents_and_settings_are(left: Any, right: Any) -> None:
    same = repr((*left[:3], sorted(left[3].items()))) == repr((*right[:3], sorted(right[3].items())))
    assert (derived_id(*left) == derived_id(*right)) == same
    assert derived_id(*left[:3], dict(reversed(left[3].items()))) == derived_id(*left)


def test_changed_settings_or_weights_find_another_folder_and_the_old_one_stays(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    view = pico_checkpoint.load()
    stats = [calibrate(view, pico_data, CalibrationSettings(tokens=256, seed=seed)) for seed in (0, 1, 0)]
    assert [each.cached for each in stats] == [False, False, True]
    assert stats[0].id == stats[2].id != stats[1].id
    assert not calibrate(pico_checkpoint.load("raw"), pico_data, CalibrationSettings(tokens=256)).cached
    assert len(list(pico_checkpoint.path.glob("derived/stats/*/meta.json"))) == 3


def test_a_damaged_hessian_file_is_recomputed_to_the_same_hessians(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    view, settings = pico_checkpoint.load(), CalibrationSettings(tokens=256)
    first = calibrate(view, pico_data, settings)
    (payload,) = pico_checkpoint.path.glob("derived/stats/*/stats.safetensors")
    intact = payload.read_bytes()
    payload.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    again = calibrate(view, pico_data, settings)
    assert not again.cached
    assert "does not match the sha256 recorded in meta.json; recomputing" in capsys.readouterr().err
    assert all((again.hessians[site] == hessian).all() for site, hessian in first.hessians.items())


def test_a_place_that_cannot_be_a_folder_offers_another_one(tmp_path: Path) -> None:
    (tmp_path / "derived").write_text("x")
    for use in (require_writable_result, lambda folder: load_or_make(folder, "payload", CONFIG, Maker())):
        with pytest.raises(PgolfError, match=r"could not write .*/stats/0123") as caught:
            use(tmp_path / "derived" / "stats" / "0123")
        assert caught.value.hint == ANOTHER_PLACE
