"""Commands write what they did into the ledger, and never fail because of it; `ledger` shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.artifacts import ARTIFACT, FITTED
from pgolf_post.calibrate.stage import STATS
from pgolf_post.diagnose.stage import DIAGNOSIS
from pgolf_post.ledger import LEDGER_FILE, Ledger, Row
from pgolf_post.ledger.disk import STAGES, scan
from pgolf_post.score.cached import SCORE
from tests.cli.conftest import Call
from tests.conftest import pico_recipe, write_recipe

ROOT = Path("checkpoints")
CKPT = "checkpoints/latest"
FEW = ("--calibration-tokens", 512, "--eval-tokens", 300, "--eval", "--json")
LOG = "| # | Name | Base | Result | Learning | BPB |\n|---|---|---|---|---|---|\n| 1 | a | | Baseline | x | 1.2 |\n"
LOG += "| 2 | b | 1 | Negative | y | 1.3 |\n"


def rows(kind: str | None = None) -> list[Row]:
    with Ledger.open(ROOT, read_only=True) as ledger:
        return ledger.rows(kind)


def one(kind: str) -> Row:
    (found,) = rows(kind)
    return found


def test_requant_records_its_artifact_statistics_score_and_checkpoint(pgolf: Call, tmp_path: Path) -> None:
    code = tmp_path / "train_gpt.py"
    code.write_text("print(1)\n")
    answer = pgolf("requant", *FEW, "--code", code, "--dollars-per-hour", 36).json
    artifact, stats, score = one("artifact"), one("stats"), one("score")
    keys = ("artifact_bytes", "code_bytes", "total_bytes", "headroom_bytes", "symbols_sha256", "checkpoint_id")
    assert {key: artifact.result[key] for key in keys} == {key: answer[key] for key in keys}
    assert artifact.parents == (answer["checkpoint_id"], stats.id)
    assert stats.id == answer["stats_id"]
    assert {key: score.result[key] for key in ("bpb", "nats", "tokens", "bytes")} == {
        key: answer[key] for key in ("bpb", "nats", "tokens", "bytes")
    }
    assert score.parents == (artifact.id,)
    assert score.cost_dollars == pytest.approx(score.seconds / 100, abs=1e-6)
    assert (score.device, stats.device) == ("cpu", "cpu")
    assert answer["checkpoint_id"] in {row.id for row in rows("checkpoint")}
    assert one("run").name == "pico"


def test_a_cached_result_is_one_row_and_a_scan_finds_the_same_rows(pgolf: Call) -> None:
    for _ in range(2):
        pgolf("requant", *FEW)
    pgolf("eval", CKPT, "--max-tokens", 300)
    recorded = {(row.kind, row.id): row for row in rows()}
    found = pgolf("ledger", "scan", "--json").json
    scanned = {(row.kind, row.id): row for row in rows()}
    assert recorded.items() <= scanned.items()
    assert found["new"] == len(scanned) - len(recorded) > 0  # the run's earlier checkpoints
    assert found["kinds"] == {
        "run": 1,
        "checkpoint": found["kinds"]["checkpoint"],
        "stats": 1,
        "artifact": 1,
        "score": 2,
    }
    assert {(row.kind, row.id) for row in scan(ROOT)} == set(scanned)
    assert pgolf("ledger", "scan", "--json").json["new"] == 0


def test_the_ledger_calls_the_stages_by_the_names_that_they_have() -> None:
    assert set(STAGES) == {stage.name for stage in (STATS, DIAGNOSIS, ARTIFACT, FITTED, SCORE)}
    assert [stage.kind for stage in STAGES.values()] == list(STAGES)
    assert Path(ARTIFACT.payload).match("artifact.*")  # the file whose bytes a row tells


def test_a_result_of_an_earlier_checkpoint_leaves_the_run_as_its_end_was(pgolf: Call) -> None:
    earlier, *_, final = sorted((ROOT / "pico").glob("step_*"))
    for checkpoint in (final, earlier):
        pgolf("eval", checkpoint, "--max-tokens", 300)
        assert one("run").result["step"] == 12
    assert len(rows("score")) == 2


def test_calibrate_blend_and_compare_record_too(pgolf: Call) -> None:
    pgolf("calibrate", "--tokens", 512)
    assert one("stats").result["tokens"] == 512
    blended = pgolf("swa-blend", "--ema-share", 0.5, "--json").json
    blend = next(row for row in rows("checkpoint") if row.id == blended["checkpoint_id"])
    assert blend.result["bpb"] == blended["bpb"]
    assert len(blend.parents) > 1
    for _ in range(2):
        compared = pgolf("compare", blended["checkpoint"], CKPT, "--max-tokens", 300, "--json").json
    comparison = one("comparison")
    assert comparison.result["difference_bpb"] == compared["difference_bpb"]
    assert set(comparison.parents) == {row.id for row in rows("score")}
    pgolf("compare", "--record", "1.08,1.081,1.079", "1.1,1.101,1.099", "--variant", "sp8192")
    assert len(rows("comparison")) == 2


def test_a_training_run_records_itself_and_its_checkpoints(train: Call, tmp_path: Path, pico_data: Any) -> None:
    recipe = write_recipe(pico_recipe(pico_data, tmp_path / "checkpoints"), tmp_path / "pico.toml")
    answer = train(recipe, "--json").json
    run = one("run")
    assert (run.name, run.result["step"]) == ("pico", 12)
    assert run.settings["optim"]["ema_decay"] == 0.9
    assert run.result["bpb"] == answer["views"]["ema"]["bpb"]
    assert {row.id for row in rows()} == {row.id for row in scan(ROOT)}


@pytest.mark.parametrize("damage", ["a folder in its place", "other bytes"])
def test_a_ledger_that_cannot_be_written_is_a_warning(pgolf: Call, damage: str) -> None:
    if damage == "other bytes":
        (ROOT / LEDGER_FILE).write_bytes(b"not a database" * 99)
    else:
        (ROOT / LEDGER_FILE).mkdir()
    answer = pgolf("eval", CKPT, "--max-tokens", 300, "--json")
    assert answer.code == 0
    assert answer.json["bpb"] > 0
    assert "warning: not recorded in the ledger" in answer.err
    assert "pgolf-post ledger scan --root" in answer.err


def test_table_sorts_filters_and_limits(pgolf: Call) -> None:
    Path("log.md").write_text(LOG)
    pgolf("ledger", "import", "log.md")
    answer = pgolf("ledger", "table", "--run", "log", "--sort", "-bpb", "--limit", 1, "--json")
    assert ([row["name"] for row in answer.json["rows"]], answer.json["count"]) == (["b"], 2)
    assert "1 of 2 rows" in answer.err
    assert pgolf("ledger", "table", "--where", "bpb=1.2", "--json").json["rows"][0]["name"] == "a"
    assert pgolf("ledger", "table", "--where", "bpb").code == 2
    refused = pgolf("ledger", "table", "--sort", "colour")
    assert (refused.code, "none of the 2 rows has a 'colour'" in refused.err) == (2, True)


def test_show_note_and_lineage_by_prefix(pgolf: Call) -> None:
    Path("log.md").write_text(LOG)
    pgolf("ledger", "import", "log.md")
    first, second = rows("trial")
    noted = pgolf("ledger", "note", second.id[:10], "too slow to matter", "--verdict", "neutral", "--json").json
    assert (noted["verdict"], noted["conclusion"]) == ("neutral", "too slow to matter")
    shown = pgolf("ledger", "show", second.id[:10], "--json")
    assert shown.json["settings"]["learning"] == "y"
    assert [note["conclusion"] for note in shown.json["notes"]] == ["too slow to matter"]
    drawn = pgolf("ledger", "lineage", "b", "--json")
    assert [(n["id"], n["depth"]) for n in drawn.json["nodes"]] == [(first.id, 0), (second.id, 1)]
    assert "└── trial b  bpb 1.30000 (+0.10000) · neutral" in drawn.err
    with Ledger.open(ROOT) as ledger:
        ledger.add_all([Row("trial", "twin1"), Row("trial", "twin2")])
    ambiguous = pgolf("ledger", "show", "twin")
    assert (ambiguous.code, "twin1" in ambiguous.err, "twin2" in ambiguous.err) == (1, True, True)
    assert pgolf("ledger", "show", "nothing").code == 1


def test_best_keeps_to_the_budget_and_says_what_does_not_compare(pgolf: Call) -> None:
    counted = [("small", 1.3, 900), ("large", 1.1, 1100), ("even", 1.2, 1000)]
    with Ledger.open(ROOT) as ledger:
        ledger.add_all([Row("trial", name, result={"bpb": bpb, "total_bytes": size}) for name, bpb, size in counted])
        ledger.add(Row("score", "no bytes", result={"bpb": 1.0, "tokens": 5}))
    answer = pgolf("ledger", "best", "--budget", 1000, "--json")
    assert [row["id"] for row in answer.json["rows"]] == ["even", "small"]
    assert "2 rows with a bpb are over 1,000 bytes or have no bytes" in answer.err
    everything = pgolf("ledger", "best", "--json")
    assert [row["id"] for row in everything.json["rows"]] == ["no bytes", "large", "even", "small"]
    assert "do not compare" in everything.err
    assert pgolf("ledger", "best", "--budget", 10).code == 1


def test_import_declares_lists_and_counts(pgolf: Call) -> None:
    Path("log.md").write_text(LOG)
    listed = pgolf("ledger", "import", "log.md", "--list", "--json")
    assert (listed.json["rows_in"], listed.json["written"]) == (2, False)
    assert not (ROOT / LEDGER_FILE).exists()
    answer = pgolf("ledger", "import", "log.md", "--run", "book", "--json")
    assert (answer.json["rows_in"], answer.json["rows_out"], answer.json["new"]) == (2, 2, 2)
    assert "number ← '#', name ← 'Name', base ← 'Base'" in answer.err
    assert "2 rows in, 2 rows out" in answer.err
    assert {row.run for row in rows()} == {"book"}
    Path("log.md").write_text(LOG.replace("| y |", "| z |"))
    assert pgolf("ledger", "import", "log.md", "--run", "book").code == 1
    assert pgolf("ledger", "import", "log.md", "--run", "book", "--replace").code == 0
    assert rows()[1].conclusion == "z"


def test_export_and_import_elsewhere_is_the_same_ledger(pgolf: Call) -> None:
    pgolf("ledger", "scan")
    assert pgolf("ledger", "export", "--format", "jsonl", "--out", "rows.jsonl", "--json").json["rows"] == len(rows())
    pgolf("ledger", "import", "rows.jsonl", "--root", "elsewhere")
    with Ledger.open(Path("elsewhere"), read_only=True) as ledger:
        assert ledger.rows() == rows()
    printed = pgolf("ledger", "export", "--format", "jsonl")
    assert [json.loads(line)["id"] for line in printed.out.splitlines()] == [row.id for row in rows()]
    assert pgolf("ledger", "export", "--format", "csv", "--json").code == 2


def test_without_a_ledger_the_next_command_is_named(pgolf: Call) -> None:
    answer = pgolf("ledger", "table")
    assert (answer.code, "pgolf-post ledger scan" in answer.err) == (1, True)
    assert not (ROOT / LEDGER_FILE).exists()
