"""attribute and requant's trials from the command line: tables for people, one JSON object for machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pgolf_post.artifacts import is_no_op, requant
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import read_plan

FEW = ("--calibration-tokens", 512)


def test_attribute_prints_a_row_per_group_and_answers_from_the_cache(pgolf: Any) -> None:
    command = ("attribute", "--plan", "record-1855", "--by", "layer", "--tokens", 300, "--json", *FEW)
    first = pgolf(*command)
    assert first.code == 0, first.err
    rows = {row["group"]: row for row in first.json["rows"]}
    assert list(rows) == ["block 0", "block 1", "block 2", "outside the blocks", "all"]
    assert "bpb gained" in first.err
    assert first.json["symbols_sha256"]
    again = pgolf(*command)
    assert again.json["cached"]
    assert again.json["rows"] == first.json["rows"]


@pytest.mark.parametrize("wrong", [("--by", "colour"), ("--set", "nothing.clip=3"), ("--codec", "tar")])
def test_attribute_refuses_what_it_does_not_know(pgolf: Any, wrong: tuple[str, str]) -> None:
    assert pgolf("attribute", *wrong, *FEW).code == 2


@pytest.mark.parametrize("command", ["requant", "fit"])
def test_tokens_to_score_need_a_score(pgolf: Any, command: str) -> None:
    answer = pgolf(command, "--eval-tokens", 300, *FEW)
    assert answer.code == 2
    assert "--eval-tokens does nothing without --eval" in answer.err


def test_several_values_are_trials_against_the_first_and_a_trial_that_changes_nothing_is_marked(pgolf: Any) -> None:
    first = pgolf("requant", "--block-size", "64,128", "--lambda", "0,0.4", "--json", "--eval", *FEW)
    assert first.code == 0, first.err
    trials = {trial["trial"]: trial for trial in first.json["trials"]}
    assert {name: trial["no_op"] for name, trial in trials.items()} == {
        "--lambda 0.0 --block-size 64": False,  # the control
        "--lambda 0.0 --block-size 128": True,
        "--lambda 0.4 --block-size 64": False,
        "--lambda 0.4 --block-size 128": False,
    }
    assert "NO-OP: the control's symbols" in first.err
    control = trials["--lambda 0.0 --block-size 64"]
    assert trials["--lambda 0.0 --block-size 128"]["symbols_sha256"] == control["symbols_sha256"]
    assert first.json["symbols_sha256"] == control["symbols_sha256"]
    alone = pgolf("requant", "--block-size", 64, "--lambda", 0, "--json", "--eval", *FEW)
    assert alone.json["artifact_cached"]
    assert "trials" not in alone.json


def test_a_pruned_checkpoint_is_compared_and_can_be_shown(pgolf: Any) -> None:
    pruned = pgolf("prune", "--share", 0.1, "--json", *FEW)
    assert pruned.code == 0, pruned.err
    rows = pruned.json["rows"]
    assert rows["pruned"]["artifact_bytes"] < rows["before"]["artifact_bytes"]
    shown = pgolf("show", pruned.json["checkpoint"], "--json")
    assert shown.code == 0, shown.err
    assert "step_000012-final (ema)" in shown.err
    assert shown.json["checkpoint_id"] == pruned.json["checkpoint_id"]


def test_equal_symbols_under_other_scales_are_no_no_op(view: View, stats: Stats) -> None:
    plan = read_plan("sdclip-1394")
    control, trial = requant(view, stats, plan), requant(view, stats, plan, "brotli")
    assert is_no_op(trial, control)  # other bytes, the same model
    model = read_artifact(control.path).model
    first = next(iter(model.quantized))
    tensor = model.quantized[first]
    doubled = replace(tensor, factors=(replace(tensor.factors[0], values=2 * tensor.factors[0].values),))
    changed = replace(model, quantized={**model.quantized, first: doubled})
    trial.path.write_bytes(pack(changed, PackSettings()))
    recorded = {**trial.meta, "content_sha256": changed.content_sha256()}
    assert not is_no_op(replace(trial, meta=recorded, verified=None), control)
    assert is_no_op(replace(trial, meta=recorded), control)  # what was verified in memory is the model itself
    older = {key: value for key, value in trial.meta.items() if key != "content_sha256"}
    assert not is_no_op(replace(trial, meta=older, verified=None), control)  # made before content was hashed


def test_several_values_are_refused_where_one_trial_is_made(pgolf: Any) -> None:
    answer = pgolf("attribute", "--lambda", "0,0.1", *FEW)
    assert answer.code == 2
    assert "--lambda has several values" in answer.err
    assert pgolf("requant", "--lambda", "0,x", *FEW).code == 2


def test_requant_distils_block_by_block_and_says_what_it_did(pgolf: Any) -> None:
    flags = ("requant", "--sequential", "--distill", "--set", "distill.steps=3", "--json", *FEW)
    answer = pgolf(*flags)
    assert answer.code == 0, answer.err
    assert answer.json["settings"]["sequential"]
    assert answer.json["settings"]["distill"]["steps"] == answer.json["distill"]["steps"] == 3
    assert "held-out KL" in answer.err
    assert "quantized blocks" in answer.err
    plain = pgolf("requant", "--json", *FEW).json
    assert plain["artifact"] != answer.json["artifact"]
    assert plain["distill"] is None
    off = pgolf("requant", "--no-distill", "--set", "distill.steps=3", "--json", *FEW).json
    assert off["artifact"] == plain["artifact"]
    shown = pgolf("requant", "--sequential", "--distill", "--show-plan")
    assert "steps of distillation" in shown.err
