"""The demo, whole and for real, with a few training steps instead of 90 seconds of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import default_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.demo import Demo, show
from pgolf_post.errors import SettingsError
from pgolf_post.pack.artifact import read_artifact

FEW_STEPS = ("schedule.steps=8", "optim.momentum_warmup_steps=2", "model.num_layers=3", "checkpoint.metric_tokens=2048")


def test_the_demo_ends_with_a_table_of_real_artifacts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Demo(tmp_path, FEW_STEPS, CalibrationSettings(tokens=4096), score_tokens=8192).run()
    show(answer, seconds=1.0)
    printed = capsys.readouterr().err
    assert [row["name"] for row in answer["rows"]] == ["λ = 0", "λ = 0.1", "λ = 0.4", "SWA blend, 75% EMA, λ = 0"]
    assert len({row["symbols_sha256"] for row in answer["rows"]}) == 4
    for row in answer["rows"]:
        path = Path(row["artifact"])
        assert path.stat().st_size == row["artifact_bytes"]
        assert read_artifact(path).manifest["symbols_sha256"] == row["symbols_sha256"]
        assert row["bpb"] == pytest.approx(answer["pre_quant_bpb"], abs=0.1)
    assert default_checkpoint(tmp_path / "checkpoints").view_id() == answer["checkpoint_id"]
    for words in ("before quantization", "order-3 byte model", "total", "headroom"):
        assert words in printed


def test_training_that_fails_ends_the_demo_as_the_trainer_ends(tmp_path: Path, pico_data: DataFolder) -> None:
    with pytest.raises(SettingsError, match="training failed"):
        Demo(tmp_path, ("model.no_such_key=1",)).train(pico_data)
    assert not (tmp_path / "checkpoints").exists()
