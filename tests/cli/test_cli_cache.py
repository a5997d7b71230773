"""calibrate's switches and `cache` as a shell sees them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pgolf_post.checkpoint import Checkpoint

FEW = ("--tokens", 64)


def test_calibrate_collects_both_halves_and_tells(pgolf: Any) -> None:
    answer = pgolf("calibrate", "--json", "--fisher", *FEW)
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["fisher"], found["tokens"], found["sites"], found["stale"]) == (True, 64, 13, None)
    assert set(found["traces"]) >= {"head.in", "blocks.0.attn.in"}
    assert all(word in answer.err for word in ("memory: about", "with the backward half", "share of each visit"))


def test_validation_text_is_refused_with_the_rule(pgolf: Any) -> None:
    for flag, command in (("--source", "calibrate"), ("--calibration-source", "requant")):
        answer = pgolf(command, flag, "val")
        assert answer.code == 2
        assert "the challenge allows no GPTQ calibration on the text that will be scored" in answer.err
    answer = pgolf("calibrate", "--source", "books")
    assert answer.code == 2
    assert "source = 'books'" in answer.err


def test_stale_statistics_are_used_only_by_name_and_tell(pgolf: Any) -> None:
    raw = pgolf("calibrate", "--weights", "raw", "--json", *FEW).json
    answer = pgolf("requant", "--allow-stale", raw["stats_id"], "--json", "--calibration-tokens", 64)
    assert answer.code == 0, answer.err
    assert "STALE statistics" in answer.err
    assert answer.json["stale"]["view_id"] == raw["checkpoint_id"] != answer.json["checkpoint_id"]
    assert pgolf("requant", "--json", "--calibration-tokens", 64).json["stale"] is None
    assert "no statistics 'abc'" in pgolf("requant", "--allow-stale", "abc").err


def test_the_cache_is_listed_verified_and_pruned(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    pgolf("calibrate", *FEW)
    entries = pgolf("cache", "list", "--json").json["entries"]
    assert [entry["stage"] for entry in entries] == ["stats"]
    left = Path(entries[0]["path"]).with_name("0123456789ab.partial")  # by a killed process: nothing says what it was
    left.mkdir()
    listed = pgolf("cache", "list")
    assert (listed.code, "partial" in listed.out + listed.err) == (0, True)
    left.rmdir()
    assert pgolf("cache", "verify", "--json").json == {"verified": 1, "damaged": []}
    payload = next(pico_checkpoint.path.glob("derived/stats/*/stats.safetensors"))
    payload.write_bytes(payload.read_bytes() + b"x")
    verified = pgolf("cache", "verify", "--json")
    assert verified.code == 4
    assert [Path(path).name for path in verified.json["damaged"]] == [payload.parent.name]
    assert "recomputing" in pgolf("calibrate", *FEW).err
    assert pgolf("cache", "prune", "--stage", "stats", "--json").json["deleted"] is False
    assert payload.exists()
    assert len(pgolf("cache", "prune", "--stage", "stats", "--yes", "--json").json["entries"]) == 1
    assert not payload.exists()
    assert pgolf("cache", "list", "--json").json == {"entries": [], "bytes": 0}


def test_a_result_dated_later_than_now_is_not_of_a_negative_age(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    pgolf("calibrate", *FEW)
    folder = next(pico_checkpoint.path.glob("derived/stats/*"))
    later = time.time() + 3 * 86400
    for path in (folder, *folder.iterdir()):
        os.utime(path, (later, later))
    listed = pgolf("cache", "list", "--json")
    assert listed.json["entries"][0]["age_days"] == 0
    assert "1 dated later than now, by up to 3.0 days" in listed.err
    assert len(pgolf("cache", "prune", "--older-than", "0", "--json").json["entries"]) == 1
