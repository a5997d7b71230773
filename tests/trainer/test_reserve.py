"""Room under the cap: what is reserved is what follows training, and measuring it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer
from trainer.run.measuring import measure_reserve
from trainer.run.reserve import Reserve, make_reserve, resumed_reserve
from trainer.schedule.functions import ScheduleSettings

CAPPED: dict[str, Any] = {"steps": 6, "seconds": 1e6, "hessian_seconds": "auto", "hessian_tokens": 4096}
seconds = st.floats(0, 100)


@given(last_step=seconds, snapshot=seconds, measured=seconds, given_seconds=seconds)
def test_auto_is_the_sum_of_its_parts_and_a_number_stands(
    last_step: float, snapshot: float, measured: float, given_seconds: float
) -> None:
    def reserved(**settings: Any) -> Reserve:
        return make_reserve(ScheduleSettings(seconds=1e6, **settings), last_step, snapshot, measured, "measured")

    assert reserved().seconds == pytest.approx(last_step + snapshot)
    assert reserved(hessian_seconds="auto").seconds == pytest.approx(last_step + snapshot + measured)
    assert reserved(hessian_seconds=given_seconds).seconds == pytest.approx(last_step + snapshot + given_seconds)
    number = reserved(reserve_seconds=given_seconds, hessian_seconds="auto")
    assert number.seconds == given_seconds
    assert number.needed == pytest.approx(last_step + snapshot + measured)
    assert ("s short" in str(number)) == (number.needed - given_seconds > 1e-6)


def test_a_cap_that_leaves_no_time_to_train_is_an_error() -> None:
    with pytest.raises(
        SettingsError, match=r"seconds 5 leaves no time to train in: 5\.5 s reserved \(last step 1\.5 s"
    ):
        make_reserve(ScheduleSettings(seconds=5, hessian_seconds=4.0), 1.5, 0.0, 0.0, "measured")


def test_measuring_leaves_the_trainer_as_it_was(tmp_path: Path, pico_data: DataFolder) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, schedule=CAPPED))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state, graph = torch.get_rng_state(), trainer.model.graph
    reserve = measure_reserve(trainer.state, trainer.gradients)
    assert reserve
    assert reserve.origin == "measured"
    assert min(reserve.last_step, reserve.snapshot, reserve.hessians or 0.0) > 0
    assert reserve.seconds == pytest.approx(reserve.needed)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.graph == graph
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_run_without_a_cap_reserves_nothing(tmp_path: Path, pico_data: DataFolder) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path))
    assert measure_reserve(trainer.state, trainer.gradients) is None


def test_a_run_says_what_it_reserves_and_a_resumed_one_keeps_it(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path / "whole", schedule=CAPPED, checkpoint={"steps": (4,)}))
    final = trainer.run()
    assert trainer.state.reserve
    assert "cap 1e+06 s: " in capsys.readouterr().err
    assert Reserve(**final.meta["reserve"]) == trainer.state.reserve
    resumed = Trainer(pico_recipe(pico_data, tmp_path / "resumed", schedule=CAPPED))
    resumed.resume(next((tmp_path / "whole" / "pico").glob("step_000004-*")))
    assert resumed.state.reserve == trainer.state.reserve
    assert resumed.run().view_id("raw") == final.view_id("raw")


def test_the_run_stops_where_the_reserve_begins(tmp_path: Path, pico_data: DataFolder) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, schedule={"steps": None, "seconds": 600.0}))
    trainer.state.reserve = Reserve(100.0, 1.0, 1.0, 98.0, "measured")
    trainer.state.train_seconds = 250.0
    assert trainer.state.progress == 0.5
    trainer.state.train_seconds = 500.0
    assert trainer.state.progress == 1.0
    final = trainer.run()
    assert (final.meta["step"], final.meta["progress"]) == (0, 1.0)


def test_a_number_in_the_recipe_acts_on_resuming_too(pico_checkpoint: Checkpoint) -> None:
    facts = {"seconds": 3.0, "last_step": 1.0, "snapshot": 1.0, "hessians": 1.0, "origin": "measured"}
    assert resumed_reserve(ScheduleSettings(steps=5), facts) is None
    assert resumed_reserve(ScheduleSettings(seconds=600), pico_checkpoint.meta["reserve"]) is None  # to be measured
    found = [resumed_reserve(ScheduleSettings(seconds=600, **keys), facts) for keys in ({}, {"reserve_seconds": 9.0})]
    assert [reserve.seconds for reserve in found if reserve] == [3.0, 9.0]
