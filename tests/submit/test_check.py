"""A record folder as a reviewer reads it: over the cap on disk, wrong bytes, numbers that do not fit together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pgolf_post.cli.submit import command
from pgolf_post.errors import OverBudgetError, VerificationError
from pgolf_post.submit.check import Review, check_folder
from pgolf_post.submit.logs import read_run_log

SP8192 = 40_540_160
TEXT = 151_080_000
OVER_ON_DISK = (16_027_377, 16_031_904, 16_083_044)  # the published range of merged folders, on disk


def script_of(num_bytes: int) -> str:
    """A script of so many bytes that wraps into few."""
    head, foot = 'import torch\n\nTABLE = "', '"\n'
    filling = "alike " * num_bytes
    return head + filling[: num_bytes - len(head) - len(foot)] + foot


def log_of(seed: int, bpb: float, tokens: int = SP8192, text: int = TEXT, **more: Any) -> str:
    """A log in the public script's words."""
    loss = bpb * math.log(2) * text / tokens
    train = more.get("train_ms", 599_900)
    lines = [
        f"seed:{seed}",
        f"val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{tokens}",
        f"step:4988/20000 val_loss:{loss + 0.02:.4f} val_bpb:{bpb + 0.01:.4f} train_time:{train}ms step_avg:120.1ms",
        f"gptq:collected 67 hessians in {more.get('hessians', 0.0)}s",
        f"Code size: {more.get('code', 48_000)} bytes",
        f"Total submission size quantized+brotli: {more.get('total', 15_900_000)} bytes",
        f"quantized_sliding val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{more.get('eval_ms', 98_000)}ms",
    ]
    return "\n".join(lines) + "\n"


def record_folder(
    folder: Path, bpbs: tuple[float, ...] = (1.081, 1.082, 1.0805), code: int = 48_000, **more: Any
) -> Path:
    """A merged folder rebuilt: script, README, submission.json, a log a seed."""
    folder.mkdir()
    (folder / "train_gpt.py").write_text(script_of(code))
    (folder / "README.md").write_text("# A record\n")
    for seed, bpb in zip((42, 1337, 2024), bpbs, strict=False):
        (folder / f"train_seed{seed}.log").write_text(log_of(seed, bpb, code=code, **more))
    facts = {"name": "A record", "val_bpb": sum(bpbs) / len(bpbs), "bytes_total": more.get("total", 15_900_000)}
    (folder / "submission.json").write_text(json.dumps(facts))
    return folder


def names(review: Review) -> list[str]:
    return [objection.name for objection in review.objections]


def test_a_folder_without_faults_has_no_objections(tmp_path: Path) -> None:
    review = check_folder(record_folder(tmp_path / "record"))
    assert names(review) == []
    assert review.strict_bytes == 15_900_000
    assert review.convention_bytes is not None
    assert review.convention_bytes < 15_860_000


@pytest.mark.parametrize("on_disk", OVER_ON_DISK)
def test_a_merged_folder_over_the_cap_on_disk_is_legal_by_convention_alone(tmp_path: Path, on_disk: int) -> None:
    folder = record_folder(tmp_path / "record", code=130_000, total=on_disk)
    review = check_folder(folder)
    assert names(review) == ["over-on-disk"]
    assert review.strict_bytes == on_disk
    assert f"{on_disk - 16_000_000:,} over 16,000,000" in review.objections[0].evidence
    result = CliRunner().invoke(command, ["check", str(folder)])
    assert isinstance(result.exception, OverBudgetError)
    assert CliRunner().invoke(command, ["check", str(folder), "--count", "convention"]).exit_code == 0


def test_real_files_count_where_they_are_there(tmp_path: Path) -> None:
    folder = record_folder(tmp_path / "record", code=10_000, total=15_999_000)
    with (folder / "final_model.int6.ptz").open("wb") as file:
        file.truncate(16_000_001)
    assert "over-budget" in names(check_folder(folder))


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"text": 176_330_000}, "wrong-bytes", "the space before a word is counted twice"),
        ({"tokens": 47_851_520, "text": 164_590_000}, "wrong-bytes", "case sentinels are counted"),
        ({"train_ms": 604_000}, "over-time", "training took 604.0 s of 600"),
        ({"hessians": 3.5}, "training-data-after-cap", "Hessians for 3.5 s after 599.9 s"),
        ({"eval_ms": 717_000}, "over-time", "evaluation took 717.0 s of 600"),
        ({"bpbs": (1.08, 1.081)}, "few-seeds", "logs of 2 seed(s)"),
    ],
    ids=["space-twice", "sentinels", "training", "hessians", "evaluation", "seeds"],
)
def test_what_a_log_gives_away(tmp_path: Path, changes: dict[str, Any], name: str, words: str) -> None:
    review = check_folder(record_folder(tmp_path / "record", **changes))
    assert set(names(review)) == {name}
    assert words in review.objections[0].evidence


@pytest.mark.parametrize("tokens", [62_021_632, 45_508_608, SP8192, 47_851_520])
def test_published_texts_imply_their_bytes(tmp_path: Path, tokens: int) -> None:
    assert names(check_folder(record_folder(tmp_path / "record", tokens=tokens))) == []


def test_a_bpb_that_is_not_the_logs_and_code_counted_as_nothing(tmp_path: Path) -> None:
    folder = record_folder(tmp_path / "record")
    facts = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps({**facts, "val_bpb": 1.07}))
    log = folder / "train_seed42.log"
    log.write_text(log.read_text().replace("Code size: 48000", "Code size: 0"))
    assert {"bpb-differs", "code-counted-as-nothing"} <= set(names(check_folder(folder)))


def test_a_bare_folder_is_told_what_it_lacks_and_a_script_that_calls_home_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "record"
    folder.mkdir()
    assert names(check_folder(folder)) == ["no-submission-json", "no-script", "no-logs"]
    (folder / "train_gpt.py").write_text("import requests\nfrom urllib.request import urlopen\n")
    review = check_folder(folder)
    assert "network" in names(review)
    assert "requests, urllib.request.urlopen" in next(o.evidence for o in review.objections if o.name == "network")
    result = CliRunner().invoke(command, ["check", str(folder)])
    assert isinstance(result.exception, VerificationError)


def test_our_own_logs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "train_seed7.log"
    sums = {"bpb": 1.5, "nats": 1200.0, "tokens": 600, "bytes": 1154, "seconds": {"score": 2.5, "load": 0.5}}
    path.write_text(json.dumps({"step": 1, "train_seconds": 3.25}) + "\n" + json.dumps(sums) + "\nnot json {\n")
    log = read_run_log(path)
    assert (log.seed, log.train_seconds) == (7, 3.25)
    assert log.final is not None
    assert (log.final.loss, log.final.bpb, log.final.seconds, log.final.tokens) == (2.0, 1.5, 3.0, 600)
