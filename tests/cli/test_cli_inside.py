"""`diagnose` and `curves` from the command line: exit codes, JSON, gates, and the ledger's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.data import DataFolder
from pgolf_post.ledger import Ledger, Row
from tests.cli.conftest import Call
from tests.conftest import pico_recipe, write_recipe

SMALL = ("--tokens", 256, "--removal-tokens", 64)
pytestmark = pytest.mark.slow


@pytest.fixture
def run(pgolf: Call) -> Path:
    """The folder of a private copy of the pico run."""
    return Path("checkpoints/pico")


def test_diagnose_answers_in_json_and_leaves_a_row_in_the_ledger(pgolf: Call) -> None:
    answer = pgolf("diagnose", *SMALL, "--json")
    assert answer.code == 0, answer.err
    assert {"numbers", "marks", "checkpoint_id", "seconds", "cached"} <= answer.json.keys()
    assert "worst row" in answer.err
    table = pgolf("ledger", "table", "--kind", "diagnosis", "--show", "largest_condition,marks", "--json")
    (row,) = table.json["rows"]
    assert row["result"]["marks"] == len(answer.json["marks"])
    assert row["parents"] == [answer.json["checkpoint_id"]]
    assert "largest_condition" in table.err
    assert pgolf("ledger", "table", "--show", "nonsense").code == 2
    again = pgolf("ledger", "scan", "--json")
    assert again.code == 0, again.err


def test_a_gate_exits_4_when_its_rule_marks_something(pgolf: Call) -> None:
    marked = {mark["rule"] for mark in pgolf("diagnose", *SMALL, "--json").json["marks"]}
    assert "softcap-saturation" not in marked
    assert "dead-block" not in marked or len(marked) > 1
    assert pgolf("diagnose", *SMALL, "--fail-on", "softcap-saturation").code == 0
    failing = sorted(marked)[0]
    answer = pgolf("diagnose", *SMALL, "--fail-on", failing, "--json")
    assert answer.code == 4
    assert f"marked by {failing}; the worst: " in answer.err
    assert answer.json["cached"]
    unknown = pgolf("diagnose", "--fail-on", "deadblock")
    assert unknown.code == 2
    assert "rules: low-rank, ill-conditioned" in unknown.err


def test_a_run_is_diagnosed_over_its_steps_and_drawn(pgolf: Call, run: Path) -> None:
    answer = pgolf("diagnose", run, "--tokens", 0, "--weights", "raw", "--by", "layer", "--plot", "run.svg", "--json")
    assert answer.code == 0, answer.err
    assert [one["step"] for one in answer.json["diagnoses"]] == [0, 3, 6, 9, 12]
    assert "effective_rank_share block 1" in answer.err
    assert "<svg" in Path("run.svg").read_text()
    assert pgolf("diagnose", "--plot", "one.svg").code == 2


def test_scalars_are_printed_as_toml(pgolf: Call) -> None:
    answer = pgolf("diagnose", "--as-toml", "--round", 2)
    assert answer.code == 0, answer.err
    assert answer.out.startswith("[model]\nq_gain_init = ")


def test_a_run_without_its_data_says_what_to_do(pgolf: Call, run: Path) -> None:
    meta = sorted(run.glob("step_*-final"))[0] / "meta.json"
    text = meta.read_text()
    start = text.index('"data_dir": "') + len('"data_dir": "')
    meta.write_text(text[:start] + "gone/" + text[start:])
    answer = pgolf("diagnose", *SMALL)
    assert answer.code == 1
    assert "is not here" in answer.err
    assert "--data FOLDER" in answer.err
    assert pgolf("diagnose", "--tokens", 0).code == 0


def test_curves_compares_a_run_with_a_public_log(pgolf: Call, run: Path) -> None:
    lines = [f"step:{step}/20 train_loss:{6 - 0.1 * step:.4f} train_time:{step * 100}ms" for step in range(1, 21)]
    Path("train.log").write_text("\n".join(lines))
    answer = pgolf("curves", "train.log", run, "--at", "6,12", "--window", 6, "--plot", "curves.svg", "--json")
    assert answer.code == 0, answer.err
    first, last = answer.json["differences"]["pico"]
    assert (first["at"], last["at"]) == (6, 12)
    assert first["control"] == pytest.approx(5.4)
    assert first["difference"] == pytest.approx(first["other"] - 5.4)
    assert "<svg" in Path("curves.svg").read_text()
    assert "± (1 σ)" in answer.err


def test_curves_of_one_log_are_listed(pgolf: Call, run: Path) -> None:
    answer = pgolf("curves", run, "--json")
    assert answer.code == 0
    assert "val_bpb_ema" in answer.err
    assert answer.json["logs"][0]["phases"]["final"] == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing.log",), "no such log"),
        (("empty.log",), "holds no curve"),
        (("checkpoints/pico", "late.log"), "no step in common"),
        (("checkpoints/pico", "checkpoints/pico", "--at", "99"), "both curves reach 1 … 12 step"),
        (("checkpoints/pico", "checkpoints/pico", "--at", "soon"), "expected numbers"),
        (("checkpoints/pico", "late.log", "--by", "tokens"), "has no tokens"),
        (("checkpoints/pico", "late.log", "--curve", "val_bpb"), "has no curve 'val_bpb'"),
    ],
    ids=["missing", "no-curve", "apart", "outside", "no-number", "no-axis", "no-such-curve"],
)
def test_what_cannot_be_compared_is_a_named_error(pgolf: Call, words: tuple[str, ...], said: str) -> None:
    Path("empty.log").write_text("nothing here\n")
    Path("late.log").write_text("step:50/99 train_loss:2.0\nstep:60/99 train_loss:1.9\n")
    answer = pgolf("curves", *words)
    assert answer.code in (1, 2)
    assert said in answer.err


def test_a_run_that_is_worse_than_another_exits_5(train: Call, pico_data: DataFolder, tmp_path: Path) -> None:
    """Compared with losses that no model has: 0 at every step."""
    log = tmp_path / "train.log"
    log.write_text("\n".join(f"step:{step}/12 train_loss:0.0 train_time:{step}ms" for step in range(1, 13)))
    recipe = pico_recipe(pico_data, Path("checkpoints"), stop={"against": log, "at": [0.5]})
    answer = train(write_recipe(recipe, tmp_path / "recipe.toml"), "--json")
    assert answer.code == 5
    assert answer.json["stopped_early"]["at"] == 6
    assert "next: go on all the same: --resume" in answer.err
    with Ledger.open(Path("checkpoints"), read_only=True) as ledger:
        (row,) = ledger.rows("run")
    assert row.result["stopped_early"] == answer.json["stopped_early"]["reason"]


def test_the_ledgers_table_says_that_a_run_stopped_early(pgolf: Call) -> None:
    with Ledger.open(Path("checkpoints")) as ledger:
        ledger.add(Row("run", "run:a", result={"stopped_early": "worse by 0.05"}))
    assert "stopped early: worse by 0.05" in " ".join(pgolf("ledger", "table").err.split())


def test_show_has_a_runs_history_and_what_its_newest_diagnosis_marked(pgolf: Call, run: Path) -> None:
    before = pgolf("show", "--json")
    assert [row["phase"] for row in before.json["history"]][-1] == "final"
    assert "init 5." in before.err
    assert " → final " in before.err
    assert before.json["diagnosis"] is None
    marks = pgolf("diagnose", *SMALL, "--json").json["marks"]
    after = pgolf("show", "--json")
    assert len(after.json["diagnosis"]["marks"]) == len(marks)
    assert f": {len(marks)} of " in after.err
    assert marks[0]["subject"] in after.err
    whole = pgolf("show", run, "--json")
    assert whole.json["history"] == after.json["history"]
    assert whole.json["diagnosis"] == after.json["diagnosis"]
