"""`ledger diff`: settings that differ, and an interval over seeds, over documents, or none, said why."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli.ledger import command
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.disk import run_row, scan
from pgolf_post.ledger.lineage import trees
from pgolf_post.score.cached import load_score, score_view
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.paired import t_interval
from pgolf_post.score.protocols import PlainProtocol
from pgolf_post.sweep.row_difference import row_difference, show, subject
from pgolf_post.sweep.seed_statistics import seed_difference
from tests.conftest import pico_recipe
from trainer.__main__ import require_base

MEASURED = {"tokens": 900, "bytes": 2000, "protocol": "plain"}


def run_of(name: str, bpb: float, lr: float, base: str | None = None) -> Row:
    recipe = {"run": {"name": name, "base": base, "why": f"why {name}"}, "optim": {"lr": lr, "momentum": 0.9}}
    parents = (f"run:{base}",) if base else ()
    return Row("run", f"run:{name}", parents, name, name, recipe, result={"bpb": bpb, **MEASURED})


def test_runs_differ_in_what_their_recipes_say(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        ledger.add_all([run_of("narrow", 1.5, 0.02), run_of("wide", 1.4, 0.04, "narrow")])
        found = row_difference(ledger, tmp_path, subject(ledger, "run:wide"), subject(ledger, "narrow"))
        (root,) = trees(ledger.rows())
    assert found.settings == {"optim.lr": (0.04, 0.02)}
    assert found.bpb == {"difference_bpb": pytest.approx(-0.1), "low_bpb": None, "high_bpb": None, "by": "two numbers"}
    assert "  why wide: why wide" in show(found)
    assert root.children[0].delta_bpb == pytest.approx(-0.1)


def test_trials_differ_over_their_seeds(tmp_path: Path) -> None:
    ours, theirs = {1: 1.4, 2: 1.43, 3: 1.41}, {1: 1.5, 2: 1.51, 3: 1.52}
    result = {"protocols": {"plain": "p"}, "tokens": 900, "bytes": 2000}
    with Ledger.open(tmp_path) as ledger:
        for name, bpb in (("wide", ours), ("control", theirs)):
            for seed, value in bpb.items():
                settings = {"of": name, "seed": seed, "rung": 0, "trial": {"width": len(name)}}
                row_id = f"{name}{seed}"
                ledger.add(Row("trial", row_id, (), row_id, "s", settings, result={**result, "bpb": value}))
        found = row_difference(ledger, tmp_path, subject(ledger, "s/wide"), subject(ledger, "s/control"))
    expected = seed_difference(ours, theirs, 0.95)
    assert (found.bpb["low_bpb"], found.bpb["high_bpb"]) == (expected.low, expected.high)
    assert found.bpb["by"] == "seeds, paired"
    assert found.settings == {"trial.width": (4, 7)}


def test_checkpoints_differ_over_documents_where_scores_are_on_disk(pico_run: Path, pico_data: DataFolder) -> None:
    checkpoint = Checkpoint.open(pico_run / "latest")
    views = [checkpoint.load(name) for name in ("ema", "raw")]
    protocol = PlainProtocol(seq_len=views[0].train_seq_len)
    sums = [load_score(score_view(view, pico_data, protocol)[0]) for view in views]
    with Ledger.open(pico_run) as ledger:
        ledger.complete_all(scan(pico_run))
    asked = [*(view.id for view in views), "--root", str(pico_run), "--json"]
    answer = CliRunner().invoke(command, ["diff", *asked], catch_exceptions=False)
    expected = t_interval(paired_documents(*sums)).facts()
    assert f'"low_bpb": {expected["low_bpb"]}' in answer.output or f'"low_bpb":{expected["low_bpb"]}' in answer.output


def test_another_text_is_not_subtracted(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        other = run_of("b", 1.2, 0.02)
        ledger.add_all([run_of("a", 1.5, 0.02), Row(**{**vars(other), "result": {**other.result, "tokens": 7}})])
        found = row_difference(ledger, tmp_path, subject(ledger, "run:a"), subject(ledger, "run:b"))
    assert found.bpb == {"not_compared": "another text"}
    assert show(found)[-1] == "  bpb not compared: another text"


def test_a_run_remembers_its_base_which_must_exist(pico_run: Path, pico_data: DataFolder) -> None:
    checkpoint = Checkpoint.open(pico_run / "latest")
    checkpoint.meta["recipe"]["run"] |= {"base": "earlier", "why": "wider"}
    row = run_row(checkpoint)
    assert (row.parents, row.settings["run"]["why"]) == (("run:earlier",), "wider")
    recipe = pico_recipe(pico_data, pico_run, run={"name": "next", "base": "pico"})
    require_base(recipe)
    lost = pico_recipe(pico_data, pico_run, run={"name": "next", "base": "earlier"})
    with pytest.raises(NotFoundError, match=r"run\.base = 'earlier': no such run"):
        require_base(lost)
    with Ledger.open(pico_run) as ledger:
        ledger.add(Row("run", "run:earlier", name="earlier"))
    require_base(lost)
