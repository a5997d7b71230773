"""calibrate, requant, size, eval and swa-blend on a real tiny run: numbers agree, caches tell, exit codes hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.quantize.tensor import symbols_sha256
from tests import processes

FEW = ("--calibration-tokens", 512)
RESULT_KEYS = {"bpb", "nats", "tokens", "bytes", "artifact_bytes", "code_bytes", "total_bytes", "headroom_bytes"}
RESULT_KEYS |= {"symbols_sha256", "checkpoint_id", "seconds"}
SUMS = ("bpb", "nats", "tokens", "bytes")


def picked(answer: dict[str, Any], keys: tuple[str, ...] = ("symbols_sha256", *SUMS)) -> dict[str, Any]:
    return {key: answer[key] for key in keys}


# ---- requant ---------------------------------------------------------------------------------------------------------


def test_requant_answers_on_stdout_alone_and_exits_3_over_budget(pico_run: Path) -> None:
    """As a process: the table goes to stderr, one JSON line to stdout, and an over-budget answer is still given."""
    arguments = ["requant", "--json", "--eval", "--budget", "1000", *map(str, FEW)]
    done = processes.run(["-m", "pgolf_post", *arguments], cwd=pico_run.parent)
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 1
    answer = json.loads(done.stdout)
    assert answer.keys() >= RESULT_KEYS
    assert answer["headroom_bytes"] == 1000 - answer["total_bytes"] < 0
    assert "error: " in done.stderr
    assert "over the budget of 1,000" in done.stderr
    assert "headroom bytes" in done.stderr


def test_requant_counts_what_lies_on_disk_and_names_what_it_started_from(
    pgolf: Any, pico_checkpoint: Checkpoint
) -> None:
    answer = pgolf("requant", "--json", "--eval", *FEW)
    assert answer.code == 0, answer.err
    assert f"checkpoint: checkpoints/pico/{pico_checkpoint.path.name} (the newest final one)" in answer.err
    result = answer.json
    assert result.keys() >= RESULT_KEYS
    artifact = Path(result["artifact"])
    assert result["artifact_bytes"] == result["total_bytes"] == artifact.stat().st_size
    assert result["headroom_bytes"] == 16_000_000 - artifact.stat().st_size
    assert result["code_bytes"] == 0
    assert "code counted as 0 bytes" in answer.err
    assert result["checkpoint_id"] == pico_checkpoint.view_id("ema")
    assert result["symbols_sha256"] == symbols_sha256(read_artifact(artifact).symbols)
    assert artifact.resolve().is_relative_to(pico_checkpoint.path / "derived" / "artifact")


def test_a_second_requant_reads_the_cache_and_a_fresh_one_finds_the_same_numbers(pgolf: Any) -> None:
    first, second = (pgolf("requant", "--json", "--eval", *FEW).json for _ in range(2))
    fresh = pgolf("requant", "--json", "--eval", "--fresh", *FEW).json
    cached = [(answer["stats_cached"], answer["artifact_cached"]) for answer in (first, second, fresh)]
    assert cached == [(False, False), (True, True), (True, False)]
    assert picked(first) == picked(second) == picked(fresh)


def test_every_knob_makes_another_artifact_and_the_first_is_found_again(pgolf: Any) -> None:
    knobs: list[tuple[object, ...]] = [(), ("--lambda", 0.4), ("--embed-bits", 6), ("--no-act-order",)]
    knobs += [("--weights", "raw"), ("--calibration-seed", 1), ("--codec", "zlib")]
    answers = [pgolf("requant", "--json", *FEW, *knob).json for knob in knobs]
    assert len({answer["artifact"] for answer in answers}) == len(knobs)
    assert all(not answer["artifact_cached"] for answer in answers)
    assert answers[-1]["symbols_sha256"] == answers[0]["symbols_sha256"]
    again = pgolf("requant", "--json", *FEW).json
    assert again["artifact_cached"]
    assert again["artifact"] == answers[0]["artifact"]


def test_fewer_bits_give_a_smaller_artifact(pgolf: Any) -> None:
    sizes = [pgolf("requant", "--json", *FEW, "--bits", bits).json["artifact_bytes"] for bits in (8, 5, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--lambda", 1.5], ["hessian_lambda = 1.5", "less than or equal to 1"]),
        (["--lambda", -0.1], ["hessian_lambda = -0.1", "greater than or equal to 0"]),
        (["--bits", 9], ["bits = 9", "less than or equal to 8"]),
        (["--damp", 0], ["damp = 0.0", "greater than 0"]),
        (["--lambda", "nan"], ["hessian_lambda = nan", "finite"]),
        (["--calibration-tokens", 1], ["tokens = 1", "greater than or equal to 2"]),
        (["--budget", -1], ["--budget", "-1"]),
        (["--weights", "best"], ["--weights", "best"]),
        (["--bits", 5.5], ["--bits", "5.5"]),
        (["--codec", "brotly"], ["--codec", "'brotly'", "'brotli'", "'best'"]),
    ],
)
def test_a_knob_out_of_range_exits_2_and_nothing_is_computed(
    pgolf: Any, pico_run: Path, arguments: list[object], parts: list[str]
) -> None:
    answer = pgolf("requant", "--json", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert [part for part in parts if part not in answer.err] == []
    assert list(pico_run.rglob("derived")) == []


def test_more_calibration_text_than_there_is_names_the_most_there_is(pgolf: Any) -> None:
    answer = pgolf("requant", "--calibration-tokens", 10**6)
    assert answer.code == 1
    hint = answer.err.partition("next: ")[2].split()
    assert hint[0] == "--calibration-tokens"
    assert pgolf("requant", *hint).code == 0


def test_a_missing_code_file_is_an_error_and_a_counted_one_adds_its_bytes(pgolf: Any, tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(b"x" * 123)
    counted = pgolf("requant", "--json", *FEW, "--code", "train_gpt.py").json
    assert counted["code_bytes"] == 123
    assert counted["total_bytes"] == counted["artifact_bytes"] + 123
    missing = pgolf("requant", "--json", *FEW, "--code", "absent.py")
    assert missing.code == 1
    assert "absent.py" in missing.err


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_budget_of_exactly_the_total_passes_and_one_byte_less_exits_3(pgolf: Any, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_bytes(b"x" * 77)
    result = pgolf("requant", "--json", *FEW, "--code", "code.py").json
    for subject in (result["artifact"], Path(result["artifact"]).parent):
        exact = pgolf("size", subject, "--code", "code.py", "--budget", result["total_bytes"], "--json")
        assert (exact.code, exact.json["headroom_bytes"]) == (0, 0)
        over = pgolf("size", subject, "--code", "code.py", "--budget", result["total_bytes"] - 1, "--json")
        assert (over.code, over.json["headroom_bytes"]) == (3, -1)
        for answer in (exact, over):
            assert picked(answer.json, ("artifact_bytes", "code_bytes", "total_bytes", "symbols_sha256")) == picked(
                result, ("artifact_bytes", "code_bytes", "total_bytes", "symbols_sha256")
            )


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval_of_an_artifact_finds_the_score_that_requant_gave(pgolf: Any) -> None:
    requanted = pgolf("requant", "--json", "--eval", *FEW).json
    for subject in (requanted["artifact"], Path(requanted["artifact"]).parent):
        cached, fresh = pgolf("eval", subject, "--json").json, pgolf("eval", subject, "--json", "--fresh").json
        assert (cached["cached"], fresh["cached"]) == (True, False)
        assert picked(cached, SUMS) == picked(fresh, SUMS) == picked(requanted, SUMS)


def test_an_artifact_taken_elsewhere_needs_its_data_named_and_scores_the_same(
    pgolf: Any, tmp_path: Path, pico_data: DataFolder
) -> None:
    requanted = pgolf("requant", "--json", "--eval", *FEW).json
    elsewhere = tmp_path / "submission" / "artifact.pgolf"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(Path(requanted["artifact"]).read_bytes())
    refused = pgolf("eval", elsewhere)
    assert refused.code == 1
    assert "next: pass --data FOLDER" in refused.err
    assert picked(pgolf("eval", elsewhere, "--data", pico_data.path, "--json").json, SUMS) == picked(requanted, SUMS)


def test_raw_ema_and_quantized_weights_score_differently_on_the_same_text(pgolf: Any) -> None:
    raw, ema = (pgolf("eval", "--weights", weights, "--json").json for weights in ("raw", "ema"))
    quantized = pgolf("requant", "--json", "--eval", *FEW).json
    assert len({answer["bpb"] for answer in (raw, ema, quantized)}) == 3
    assert (
        picked(raw, ("tokens", "bytes")) == picked(ema, ("tokens", "bytes")) == picked(quantized, ("tokens", "bytes"))
    )
    default = pgolf("eval", "--json").json
    assert (default["bpb"], default["cached"]) == (ema["bpb"], True)


def test_eval_reproduces_the_metric_that_training_recorded(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    for weights in ("raw", "ema"):
        metric = pico_checkpoint.meta["views"][weights]["metric"]
        found = pgolf("eval", "--weights", weights, "--max-tokens", metric["max_tokens"], "--json").json
        assert found["bpb"] == pytest.approx(metric["bpb"], rel=1e-6)
        assert picked(found, ("tokens", "bytes")) == picked(metric, ("tokens", "bytes"))


def test_every_choice_of_text_is_another_score(pgolf: Any) -> None:
    choices: list[tuple[object, ...]] = [(), ("--split", "train"), ("--seq-len", 8), ("--max-tokens", 300)]
    choices += [("--tail", "score")]
    answers = [pgolf("eval", "--json", *choice).json for choice in choices]
    assert [answer["cached"] for answer in answers] == [False] * len(choices)
    assert len({answer["nats"] for answer in answers}) == len(choices)


def test_an_artifact_has_only_one_set_of_weights(pgolf: Any) -> None:
    artifact = pgolf("requant", "--json", *FEW).json["artifact"]
    answer = pgolf("eval", artifact, "--weights", "raw")
    assert answer.code == 2
    assert "--weights" in answer.err


def test_a_damaged_artifact_is_never_scored(pgolf: Any, tmp_path: Path) -> None:
    artifact = Path(pgolf("requant", "--json", *FEW).json["artifact"])
    contents = bytearray(artifact.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged = tmp_path / "damaged.pgolf"
    damaged.write_bytes(contents)
    for command in ("eval", "size", "show"):
        answer = pgolf(command, damaged, "--json")
        assert (answer.code, answer.out) == (1, "")
        assert "damaged.pgolf" in answer.err


# ---- calibrate, swa-blend --------------------------------------------------------------------------------------------


def test_the_second_calibration_is_cached_and_says_so(pgolf: Any) -> None:
    first, second = (pgolf("calibrate", "--json", *FEW) for _ in range(2))
    assert (first.json["cached"], second.json["cached"]) == (False, True)
    assert "cached" in second.err
    assert picked(first.json, ("stats_id", "sites", "tokens", "checkpoint_id")) == picked(
        second.json, ("stats_id", "sites", "tokens", "checkpoint_id")
    )
    assert pgolf("requant", "--json", *FEW).json["stats_cached"]
    assert not pgolf("calibrate", "--json", "--fresh", *FEW).json["cached"]


def test_a_blend_is_requantized_and_verified_like_any_checkpoint(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    first, second = (pgolf("swa-blend", "--ema-share", 0.5, "--json") for _ in range(2))
    blended = first.json
    assert (blended["cached"], second.json["cached"], blended["no_op"]) == (False, True, False)
    assert blended["checkpoint_id"] not in (pico_checkpoint.view_id("raw"), pico_checkpoint.view_id("ema"))
    requanted = pgolf("requant", blended["checkpoint"], "--json", "--eval", *FEW).json
    assert requanted["checkpoint_id"] == blended["checkpoint_id"]
    assert requanted["bpb"] != pgolf("requant", "--json", "--eval", *FEW).json["bpb"]
    assert pgolf("checkpoint", "verify", blended["checkpoint"]).code == 0
    assert pgolf("swa-blend", "--ema-share", 1.5).code == 2


def test_members_shares_and_parts_are_named_on_the_command_line(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    steps = pgolf("swa-blend", "--steps", "6,12", "--shares", "1,3", "--json").json
    parents = Checkpoint.open(Path(steps["checkpoint"])).meta["parents"]
    assert [(parent["folder"], parent["share"]) for parent in parents] == [
        ("step_000006-warmdown_start", 0.25),
        ("step_000012-final", 0.75),
    ]
    run = pico_checkpoint.path.parent
    parts = ("--part", f"{run}/step_000006-warmdown_start:raw=1/4", "--part", f"{pico_checkpoint.path}:raw=0.75")
    named = pgolf("swa-blend", *parts, "--json").json
    assert named["checkpoint_id"] == steps["checkpoint_id"]
    assert Path(named["checkpoint"]).name.startswith("blend_")
    assert pgolf("swa-blend", "--last", 1, "--ema-share", 0.5).code == 0


def test_a_search_writes_its_winner(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    answer = pgolf("swa-blend", "--search", "--search-tokens", 800, "--json")
    assert answer.code == 0
    found = answer.json["search"]
    assert found["winner"] in {row["name"] for row in found["candidates"]}
    assert len(found["candidates"]) == 8
    winner = Checkpoint.open(Path(answer.json["checkpoint"]))
    assert winner.meta["search"]["winner"] == found["winner"]
    assert "against EMA" in answer.err
    assert pgolf("checkpoint", "verify", winner.path).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search-tokens", 100), "--search-tokens does nothing without --search"),
        (("--search", "--ema-share", 0.5), "leave out --ema-share"),
        (("--part", "x=1", "--last", 2), "--part names all that is blended; leave out --last"),
        (("--part", "nothing"), "expected PATH[:VIEW]=SHARE"),
        (("--part", "a=1/0"), "expected PATH[:VIEW]=SHARE"),
        (("--steps", "6,x"), "expected numbers with commas"),
        (("--steps", "6", "--last", 2), "steps and last are different ways"),
        (("--last", 0), "greater than or equal to 1"),
        (("--allow-different", "graph.loops"), "no such config key"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(pgolf: Any, words: tuple[Any, ...], message: str) -> None:
    answer = pgolf("swa-blend", *words)
    assert answer.code == 2
    assert message in answer.err.replace("\n", " ")
