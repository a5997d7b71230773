"""The alarm on the gradient norm: it warns once of a stretch, or ends the run with a checkpoint that can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.settings import parse_settings
from tests.conftest import pico_recipe
from trainer.config import RunSettings
from trainer.run.loop import Trainer, WorseRun
from trainer.run.norm_alarm import NormAlarm, hint_of_divergence


def alarm(**settings: Any) -> NormAlarm:
    return NormAlarm(parse_settings(RunSettings, {"name": "x", **settings}, "recipe"))


def heard(alarm: NormAlarm, norms: list[float]) -> list[dict[str, Any] | None]:
    found = []
    for step, norm in enumerate(norms):
        (above,) = alarm.above(torch.tensor(norm, dtype=torch.float64))
        found.append(alarm.hear(float(above), norm, step))
    return found


def test_a_stretch_above_the_limit_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert heard(alarm(grad_norm_limit=1.0), [0.5, 1.0, 1.5, 2.5, 0.5, 3.0]) == [None] * 6
    said = capsys.readouterr().err
    assert said.count("warning: gradient norm") == 2
    assert "gradient norm 1.5 at step 2 is above run.grad_norm_limit 1" in said
    assert "gradient norm 3 at step 5" in said
    assert alarm().above(torch.tensor(1e9)) == ()


def test_a_norm_that_is_no_number_is_above_every_limit() -> None:
    for norm in (float("nan"), float("inf")):
        with pytest.raises(NumericsError, match=f"gradient norm is {norm} at step 0"):
            heard(alarm(grad_norm_limit=1e30), [norm])


def test_a_higher_precision_is_advised_where_there_is_one() -> None:
    assert "run.precision=fp32" in hint_of_divergence(torch.bfloat16)
    assert "precision" not in hint_of_divergence(None)
    assert "optim.matrix_lr" in hint_of_divergence(None)


def test_a_stop_without_a_limit_is_refused() -> None:
    with pytest.raises(SettingsError, match="grad_norm_stop acts only with grad_norm_limit"):
        alarm(grad_norm_stop=True)
    with pytest.raises(SettingsError, match=r"grad_norm_limit = 0: .*greater than 0"):
        alarm(grad_norm_limit=0)


@pytest.mark.slow
def test_a_run_ends_with_a_checkpoint_at_the_first_step_above_the_limit(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    norms = [json.loads(line)["grad_norm"] for line in (pico_run / "pico" / "train.jsonl").read_text().splitlines()]
    limit = sorted(norms)[-3]
    first = next(number for number, norm in enumerate(norms, start=1) if norm > limit)
    run = {"grad_norm_limit": limit + 1e-6, "grad_norm_stop": True}
    with pytest.raises(WorseRun, match=f"stopped early: gradient norm .* at step {first} is above"):
        Trainer(pico_recipe(pico_data, tmp_path, run=run)).run()
    saved = Checkpoint.open(next((tmp_path / "pico").glob(f"step_{first:06d}-stopped_early")))
    assert saved.meta["stopped_early"]["grad_norm"] == pytest.approx(norms[first - 1], abs=1e-6)
    warned = Trainer(pico_recipe(pico_data, tmp_path, run={**run, "grad_norm_stop": False}))
    warned.resume(saved.path)
    assert warned.run().view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")
