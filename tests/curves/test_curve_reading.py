"""Reading curves: every merged form of line, through all that real logs do to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pgolf_post.curves.curve import Log
from pgolf_post.curves.public_log import gather_public
from pgolf_post.curves.reading import read_log
from pgolf_post.errors import MismatchError, NotFoundError

BASELINE = """\
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
warmup_step:1/20
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:50/20000 train_loss:4.0000 train_time:2175ms step_avg:43.50ms
step:100/20000 train_loss:3.5000 train_time:4350ms step_avg:43.50ms
step:100/20000 val_loss:3.4000 val_bpb:2.0100 train_time:4352ms step_avg:43.52ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
"""
RECORD = """\
Hyperparameters:
  train_batch_tokens: 786432
  iterations: 20000
loop_warmup_step: 1/20
0/20000 val_loss: 9.0090 val_bpb: 3.4877
500/20000 train_loss: 3.3346 train_time: 0.9m tok/s: 7864320
layer_loop:enabled step:918 frac:0.350 encoder:[0, 1, 2, 3, 4, 5, 3, 4] decoder:[5, 3]
1000/20000 train_loss: 3.1948 train_time: 1.7m tok/s: 7864320
1000/20000 val_loss: 3.1 val_bpb: 1.2019
stopping_early: wallclock_cap train_time: 588047ms step: 4550/20000
quantized val_loss:2.84065044 val_bpb:1.09970431 eval_time:25515ms
"""


def read_text(folder: Path, text: str, name: str = "train.log") -> Log:
    (folder / name).write_text(text)
    return read_log(folder / name)


def test_the_baselines_lines(tmp_path: Path) -> None:
    log = read_text(tmp_path, BASELINE)
    train = log.curve("train_loss")
    assert train.step.tolist() == [50, 100]
    assert train.values.tolist() == [4.0, 3.5]
    assert train.along("seconds") == pytest.approx([2.175, 4.35])
    assert train.along("tokens").tolist() == [50 * 524288, 100 * 524288]
    assert log.curve("val_bpb").values.tolist() == [4.1077, 2.01]
    assert set(log.curves) == {"val_loss", "val_bpb", "train_loss"}
    assert log.notes == []


def test_the_records_lines_have_seconds_from_their_rate(tmp_path: Path) -> None:
    log = read_text(tmp_path, RECORD)
    assert log.curve("train_loss").along("seconds") == pytest.approx([50.0, 100.0])  # 0.9 and 1.7 min to the second
    assert log.curve("val_bpb").step.tolist() == [0, 1000]
    assert log.curve("val_bpb").along("seconds") == pytest.approx([0.0, 100.0])  # from the training losses


def test_colours_carriage_returns_prefixes_and_mixed_lines_change_nothing() -> None:
    plain = gather_public(BASELINE).curves()["train_loss"]
    dirty = "\x1b[32mstep:50/20000 train_loss:4.0000 train_time:2175ms step_avg:43.50ms\x1b[0m\r"
    mixed = "step:50/20000 train_loss:4.0000 train_time:2175ms step_avg:43.50msstep:100/20000 train_loss:3.5000 "
    two_ranks = "\n".join(
        f"[rank{rank}]:{line.replace('3.5', f'3.{5 + rank}')}" for rank in (1, 0) for line in BASELINE.splitlines()
    )
    for text in (
        BASELINE.replace("\n", "\r\n"),
        f"0: {dirty}\nstep:100/20000 train_loss:3.5000 train_time:4350ms",
        f"{mixed}train_time:4350ms step_avg:43.50ms",
        two_ranks,
        BASELINE + BASELINE,
    ):
        curve = gather_public(text).curves()["train_loss"]
        assert curve.step.tolist() == plain.step.tolist()
        assert curve.values.tolist() == plain.values.tolist()
        assert curve.seconds.tolist() == plain.seconds.tolist()


def test_a_restart_replaces_what_it_does_again() -> None:
    again = "step:50/200 train_loss:4.1 train_time:1ms\nstep:100/200 train_loss:3.6 train_time:2ms\n"
    gathering = gather_public(BASELINE + again)
    assert gathering.curves()["train_loss"].values.tolist() == [4.1, 3.6]
    assert gathering.notes() == ["the run began again at step 50"]


def test_losses_that_are_not_finite_are_left_out_and_said() -> None:
    gathering = gather_public("step:1/9 train_loss:2.5 train_time:1ms\nstep:2/9 train_loss:nan train_time:2ms")
    assert gathering.curves()["train_loss"].values.tolist() == [2.5]
    assert gathering.notes() == ["1 values are not finite, left out"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_with_a_column_of_steps(tmp_path: Path, delimiter: str) -> None:
    rows = [("step", "loss", "val_bpb", "train_time_ms"), ("1", "5.5", "", "100"), ("2", "5.0", "2.9", "250")]
    log = read_text(tmp_path, "\n".join(delimiter.join(row) for row in rows), "curve.csv")
    assert log.curve("train_loss").values.tolist() == [5.5, 5.0]
    assert log.curve("train_loss").along("seconds") == pytest.approx([0.1, 0.25])
    assert log.curve("val_bpb").step.tolist() == [2]


def test_a_run_of_ours_has_its_log_and_what_its_checkpoints_measured(pico_run: Path) -> None:
    log = read_log(pico_run / "pico")
    records = [json.loads(line) for line in (pico_run / "pico" / "train.jsonl").read_text().splitlines()]
    loss = log.curve("train_loss")
    assert loss.values.tolist() == [record["loss"] for record in records]
    assert loss.along("tokens").tolist() == [64 * record["step"] for record in records]
    assert loss.along("seconds").tolist() == [record["train_seconds"] for record in records]
    assert {"val_bpb", "val_bpb_ema", "val_loss", "grad_norm"} <= set(log.curves)
    assert log.phases is not None
    assert log.phases["init"] == 0
    assert log.phases["final"] == 12
    assert np.array_equal(read_log(pico_run / "latest").curve("train_loss").values, loss.values)


def test_a_torn_line_is_left_out_and_said(pico_run: Path, tmp_path: Path) -> None:
    text = (pico_run / "pico" / "train.jsonl").read_text()
    log = read_text(tmp_path, text[:-20], "train.jsonl")
    assert len(log.curve("train_loss")) == 11
    assert log.notes == ["1 torn lines left out"]


def test_what_has_no_curve_is_an_error_that_says_what_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Hyperparameters:\n  iterations: 20000\nwarmup_step: 1/20\n")
    with pytest.raises(MismatchError, match="holds no curve") as caught:
        read_log(tmp_path / "notes.txt")
    assert "CSV with a column `step`" in str(caught.value.hint)
    with pytest.raises(MismatchError, match="holds no curve"):
        read_log(tmp_path)
    with pytest.raises(NotFoundError, match="no such log"):
        read_log(tmp_path / "missing.log")


def test_an_axis_that_a_log_does_not_tell_is_refused(tmp_path: Path) -> None:
    curve = read_text(tmp_path, "step:1/9 train_loss:2.5\nstep:2/9 train_loss:2.4").curve("train_loss")
    with pytest.raises(MismatchError, match="no seconds for its points; it has step"):
        curve.along("seconds")
