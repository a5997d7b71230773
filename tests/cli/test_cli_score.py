"""eval by every protocol, audit and compare: what a shell sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf_post.data import DataFolder
from pgolf_post.data.shards import read_shard, write_shard
from tests.cli.conftest import Call

CKPT = "checkpoints/latest"
SHORT = ("--max-tokens", 300, "--json")
LORA_SET = ("--set", "chunk_tokens=8", "--set", "rank=2", "--set", "batch_documents=4")
LORA = ("--protocol", "ttt", "--ttt", "lora", *LORA_SET)


def test_eval_by_every_protocol(pgolf: Call) -> None:
    plain = pgolf("eval", CKPT, *SHORT).json
    slid = pgolf("eval", CKPT, "--protocol", "sliding", "--stride", 4, *SHORT).json
    learned = pgolf("eval", CKPT, *LORA, *SHORT).json
    assert plain["tokens"] == slid["tokens"] == learned["tokens"]
    assert slid["protocol"]["stride"] == 4
    assert learned["optimizer_steps"] > 0
    assert learned["strict_seconds"] >= learned["adapt_seconds"] + learned["score_seconds"] - 0.01
    again = pgolf("eval", CKPT, *LORA, *SHORT)
    assert again.json["cached"]
    assert "by convention" in again.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ttt", "lora"), "belong to --protocol ttt"),
        (("--stride", 4), "--stride belongs to"),
        (("--protocol", "ttt"), "needs --ttt"),
        (("--protocol", "ttt", "--ttt", "lara"), "'lara' is not one of 'sgd-1493', 'record-1855'"),
        (
            ("--protocol", "ttt", "--ttt", "lora", "--set", "chunk_tokens=8", "--set", "epochs=2"),
            "unknown key 'epochs'",
        ),
        (("--protocol", "ttt", "--ttt", "lora", "--compile", "--set", "chunk_tokens=8"), "--compile is for"),
    ],
)
def test_options_that_do_not_go_together_are_refused(pgolf: Call, flags: tuple[Any, ...], message: str) -> None:
    answer = pgolf("eval", CKPT, *flags, "--max-tokens", 300)
    assert answer.code == 2
    assert message in answer.err


def test_a_time_budget_stops_and_the_rest_is_done_later(pgolf: Call) -> None:
    stopped = pgolf("eval", CKPT, *LORA, "--max-tokens", 300, "--time-budget", 0.0001)
    assert stopped.code == 1
    assert "the time budget" in stopped.err
    assert "raise --time-budget" in stopped.err
    done = pgolf("eval", CKPT, *LORA, *SHORT)
    assert done.code == 0
    assert "going on from" in done.err


def test_audit_passes_and_says_why(pgolf: Call) -> None:
    answer = pgolf("audit", CKPT, "--protocol", "sliding", "--stride", 8, "--samples", 2, "--json")
    assert answer.code == 0, answer.err
    tests = {test["test"]: test for test in answer.json["tests"]}
    assert tests["flip"]["passed"]
    assert tests["implied bytes"]["passed"]
    assert tests["score before update"]["passed"] is None
    assert "bit-identical" in tests["flip"]["evidence"]
    learned = pgolf("audit", CKPT, *LORA, "--tokens", 100, "--samples", 1, "--json")
    assert learned.code == 0, learned.err


def test_audit_fails_with_4(pgolf: Call, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DataFolder.token_bytes

    def doubled(self: DataFolder, split: Any, tokens: np.ndarray) -> np.ndarray:
        return honest(self, split, tokens) + self.byte_table.has_leading_space[tokens]

    monkeypatch.setattr(DataFolder, "token_bytes", doubled)
    answer = pgolf("audit", CKPT, "--samples", 1, "--json")
    assert answer.code == 4
    assert "implied bytes" in answer.err
    assert not answer.json["passed"]


def test_compare_two_checkpoints(pgolf: Call) -> None:
    earlier = sorted(str(path) for path in Path("checkpoints/pico").iterdir() if path.is_dir())[1]
    answer = pgolf("compare", CKPT, earlier, "--seq-len", 16, "--json")
    assert answer.code == 0, answer.err
    facts = answer.json
    assert facts["difference_bpb"] == pytest.approx(facts["bpb"] - facts["control_bpb"], abs=1e-9)
    assert facts["low_bpb"] <= facts["difference_bpb"] <= facts["high_bpb"]
    assert facts["better"] + facts["worse"] == facts["clusters"]
    same = pgolf("compare", CKPT, CKPT, "--json").json
    assert (same["difference_bpb"], same["sign_p"]) == (0.0, 1.0)
    screened = pgolf("compare", CKPT, earlier, "--until-ci", 0.0003, "--json").json
    assert 0 < screened["share"] <= 1
    assert "stopped" in screened
    expected = pgolf("compare", CKPT, earlier, "--until-ci", 0.0003, "--reference", CKPT, "--json")
    assert expected.code == 0, expected.err
    facts = expected.json
    assert facts["candidate_divergence_bpb"] == pytest.approx(0, abs=1e-7)
    assert facts["difference_bpb"] == pytest.approx(-facts["control_divergence_bpb"], abs=1e-6)
    assert facts["surprise_bpb"] == pytest.approx(facts["measured_bpb"] - facts["difference_bpb"], rel=0.1)
    assert "measured less expected" in expected.err


def test_compare_two_views_of_one_checkpoint(pgolf: Call) -> None:
    bpb = {view: pgolf("eval", CKPT, "--weights", view, "--json").json["bpb"] for view in ("raw", "ema")}
    assert bpb["raw"] != bpb["ema"]
    facts = pgolf("compare", f"{CKPT}:raw", f"{CKPT}:ema", "--json").json
    assert (facts["bpb"], facts["control_bpb"]) == (bpb["raw"], bpb["ema"])
    assert pgolf("compare", CKPT, f"{CKPT}:ema", "--json").json["difference_bpb"] == 0.0
    missing = pgolf("compare", f"{CKPT}:swa", CKPT)
    assert missing.code == 1
    assert "swa" in missing.err


def test_the_record_rule_from_numbers(pgolf: Call) -> None:
    new, old = "1.1150812,1.11437394,1.11475014", "1.11922988,1.12002032,1.11888882"
    verdict = pgolf("compare", "--record", new, old, "--variant", "sp1024", "--json").json
    assert round(verdict["t"], 2) == -11.83
    assert round(verdict["degrees"], 2) == 3.31
    assert round(verdict["p"], 4) == 0.0004
    assert verdict["record"]
    without = pgolf("compare", "--record", new, old)
    assert without.code == 2
    assert "--variant" in without.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--record", "--level", 0.9, "--variant", "sp1024"), "--record does not read --level"),
        (
            ("--bytes-per-token", "2.4", "--variant", "sp1024"),
            "a paired comparison does not read --bytes-per-token, --variant",
        ),
        (("--until-ci", 0.1, "--compile"), "--until-ci does not read --compile"),
        (("--reference", "somewhere"), "a paired comparison does not read --reference"),
        (("--record", "--bytes-per-token", "-2"), "--bytes-per-token -2: it must be positive"),
        (("--record", "--bytes-per-token", "nan"), "'nan' is not a finite number"),
        (("--record", "--until-ci", 0.1), "choose one"),
    ],
)
def test_compare_refuses_options_that_would_do_nothing(pgolf: Call, options: tuple[object, ...], says: str) -> None:
    answer = pgolf("compare", "1.08,1.09", "1.1,1.11", *options)
    assert answer.code == 2
    assert says in " ".join(answer.err.split())


def test_the_record_rule_wants_numbers_that_can_be(pgolf: Call) -> None:
    answer = pgolf("compare", "--record", "nan,1.07", "1.08,1.07", "--variant", "sp8192")
    assert answer.code == 2
    assert "bits per byte are positive numbers" in answer.err


def test_a_sidecar_of_another_length_is_refused(pgolf: Call, pico_data: DataFolder, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "with_sidecar"
    shutil.copytree(pico_data.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["splits"]["val"]["shards"][0]
    write_shard(folder / "val_bytes.bin", np.ones(len(read_shard(folder / shard["file"])) - 5, dtype=np.uint16))
    manifest["splits"]["val"]["byte_sidecars"] = [{**shard, "file": "val_bytes.bin"}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = pgolf("eval", CKPT, "--data", folder)
    assert answer.code == 1
    assert "byte sidecar of 'val' holds" in answer.err


def test_a_text_shorter_than_a_window_is_refused(pgolf: Call) -> None:
    answer = pgolf("eval", CKPT, "--seq-len", 400, "--max-tokens", 300)
    assert answer.code == 1
    assert "fewer than one window" in answer.err
    assert "--tail score" in answer.err


def test_another_tokenizer_is_refused(pgolf: Call, other_data: DataFolder) -> None:
    answer = pgolf("audit", CKPT, "--data", other_data.path)
    assert answer.code == 1
    assert "has tokenizer" in answer.err


def test_eval_and_compare_by_bins(pgolf: Call) -> None:
    answer = pgolf("eval", CKPT, "--breakdown", "token-class,calibration", *SHORT)
    assert answer.code == 0, answer.err
    bins = answer.json["breakdown"]["bins"]
    assert list(bins) == ["token-class", "calibration"]
    for rows in bins.values():
        assert sum(row["tokens"] for row in rows) == answer.json["tokens"]
        assert sum(row["nats"] for row in rows) == pytest.approx(answer.json["nats"], rel=1e-14)
    assert "by class of token" in answer.err
    assert "expected calibration error" in answer.err
    row = pgolf("ledger", "export", "--format", "jsonl", "--kind", "score")
    assert '"top1_accuracy"' in row.out
    learned = ("--protocol", "ttt", "--ttt", "lora", *LORA_SET, "--control-protocol", "plain")
    compared = pgolf("compare", CKPT, CKPT, *learned, "--breakdown", "document", *SHORT)
    assert compared.code == 0, compared.err
    rows = compared.json["bins"]["document"]
    assert sum(row["difference_bpb"] for row in rows) == pytest.approx(compared.json["difference_bpb"], abs=1e-12)
    assert "difference by tokens of the document before it" in compared.err
    table = compared.err.partition("difference by")[2].splitlines()
    assert max(map(len, table)) <= 80
    assert len(table) >= 2 + len(rows)  # a line for each bin


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("eval", CKPT, "--breakdown", "colour"), "no kind of bins 'colour'; there are: position, token-class"),
        (("eval", CKPT, "--breakdown", ","), "no kind of bins"),
        (("compare", "--record", "1,2", "1,2", "--variant", "sp1024", "--breakdown", "all"), "does not read"),
    ],
)
def test_kinds_of_bins_that_there_are_not_are_refused(pgolf: Call, command: tuple[Any, ...], message: str) -> None:
    answer = pgolf(*command)
    assert answer.code == 2
    assert message in answer.err
