"""Power-function averages along a run: their recurrence, where snapshots fall, and what resuming makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from pgolf_post.average.profiles import PowerLength
from pgolf_post.average.snapshots import Snapshot, list_snapshots
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError
from tests.conftest import pico_recipe
from trainer.optim.averages import PowerEMA, decay_acts_from, snapshots_due, warmup_decay
from trainer.optim.settings import OptimSettings
from trainer.run.loop import Trainer

TRACKS: dict[str, dict[str, Any]] = {
    "optim": {"power_ema_sigmas": (0.05, 0.1), "power_ema_snapshots": 4},
    "checkpoint": {"steps": (5,), "fractions": (), "metric_tokens": 40},
}


def kept(root: Path) -> dict[tuple[int, float], str]:
    return {(s.step, s.sigma): s.tensors_sha256 for s in list_snapshots(root)}


def test_a_track_is_the_average_that_its_profile_says() -> None:
    generator, model = torch.Generator().manual_seed(3), nn.Linear(4, 3)
    ema, weights = PowerEMA(model, [0.05, 0.2]), []
    for step in range(1, 41):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 4, generator=generator))
        ema.update(step)
        weights.append(model.weight.detach().double().numpy().copy())
    for sigma, track in ema.tracks.items():
        expected = np.tensordot(PowerLength(sigma).profile(40), np.stack(weights), 1)
        np.testing.assert_allclose(track["weight"].numpy(), expected, atol=1e-5)
        assert track["weight"].dtype == torch.float32


@given(st.integers(1, 9999), st.integers(1, 50))
def test_a_decay_acts_from_the_first_update_at_which_the_warm_up_has_reached_it(parts: int, every: int) -> None:
    decay, step = parts / 10_000, decay_acts_from(parts / 10_000, every)
    assert step % every == 0
    assert warmup_decay(step) >= decay - 1e-12
    assert step == every or warmup_decay(step - every) < decay


def test_a_decay_of_0_995_acts_from_step_1790() -> None:
    assert [decay_acts_from(decay) for decay in (0.995, 0.99, 0.97)] == [1790, 890, 290]


@given(st.integers(1, 400), st.integers(2, 32))
def test_snapshots_are_evenly_spaced_and_one_is_of_the_last_step(num_steps: int, num_snapshots: int) -> None:
    due = [s for s in range(1, num_steps + 1) if snapshots_due((s - 1) / num_steps, s / num_steps, num_snapshots)]
    assert len(due) == min(num_snapshots, num_steps)
    assert due[-1] == num_steps
    gaps = np.diff([0, *due])
    assert gaps.max() - gaps.min() <= 2


def test_a_run_leaves_its_snapshots_and_they_are_the_tracks(tmp_path: Path, pico_data: DataFolder) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, **TRACKS))
    trainer.run()
    found = list_snapshots(tmp_path / "pico")
    evenly, at_a_checkpoint = (3, 6, 9, 12), (5,)
    steps = sorted(evenly + at_a_checkpoint)
    assert [(s.step, s.sigma) for s in found] == [(step, sigma) for step in steps for sigma in (0.05, 0.1)]
    assert [s.progress for s in found[::2]] == pytest.approx([step / 12 for step in steps])
    assert [s.graph["active_loops"] for s in found[::2]] == [0, 1, 1, 1, 1]
    assert trainer.state.averages.power_ema
    for snapshot in found[-2:]:
        for name, tensor in load_file(snapshot.path).items():
            assert torch.equal(tensor, trainer.state.averages.power_ema.tracks[snapshot.sigma][name])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """The folder of a run with two tracks and a checkpoint after step 5. Do not change it."""
    root = tmp_path_factory.mktemp("tracks")
    Trainer(pico_recipe(pico_data, root, **TRACKS)).run()
    return root / "pico"


@pytest.mark.parametrize("name", ["pico", "branch"])
def test_a_resumed_run_has_the_snapshots_of_one_never_stopped(
    tmp_path: Path, pico_data: DataFolder, whole_run: Path, name: str
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, run={"name": name}, **TRACKS))
    trainer.resume(whole_run / "step_000005-step5")
    trainer.run()
    assert kept(tmp_path / name) == kept(whole_run)


def test_snapshots_later_than_the_checkpoint_of_a_killed_run_go(
    tmp_path: Path, pico_data: DataFolder, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Trainer(pico_recipe(pico_data, tmp_path, **TRACKS, schedule={"steps": 12}))
    first.run()
    for folder in (tmp_path / "pico").glob("step_*"):
        if Checkpoint.open(folder).meta["step"] > 5:
            folder.rename(tmp_path / folder.name)  # as if killed before they were written
    other = dict(TRACKS, optim=dict(TRACKS["optim"], matrix_lr=0.001))
    trainer = Trainer(pico_recipe(pico_data, tmp_path, **other))
    trainer.resume(tmp_path / "pico" / "step_000005-step5")
    trainer.run()
    assert "deleted 6 snapshots of averages later than step 5" in capsys.readouterr().err
    mine, theirs = kept(tmp_path / "pico"), kept(whole_run)
    assert {key for key in mine if mine[key] == theirs[key]} == {
        (step, sigma) for step in (3, 5) for sigma in (0.05, 0.1)
    }


def test_tracks_that_a_checkpoint_does_not_hold_are_not_taken_up(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path, whole_run: Path
) -> None:
    trainer = Trainer(pico_recipe(pico_data, tmp_path, **TRACKS))
    with pytest.raises(NotFoundError, match=r"holds no power-function EMA of sigma 0\.05"):
        trainer.resume(next(pico_run.glob("pico/*frac75")))
    other = Trainer(pico_recipe(pico_data, tmp_path, optim={"power_ema_sigmas": (0.05, 0.2)}))
    with pytest.raises(NotFoundError, match=r"holds no power-function EMA of sigma 0\.2"):
        other.resume(whole_run / "step_000005-step5")
    without = Trainer(pico_recipe(pico_data, tmp_path))
    without.resume(whole_run / "step_000005-step5")  # as the hint says


@pytest.mark.parametrize(
    ("sigmas", "message"), [((0.05, 0.05), "names one twice"), ((0.3,), "power_ema_sigmas: sigma 0.3 is outside")]
)
def test_sigmas_that_cannot_be_tracked_are_refused(sigmas: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimSettings(power_ema_sigmas=sigmas)


def test_averages_do_not_change_training(pico_run: Path, whole_run: Path) -> None:
    assert Checkpoint.open(next(whole_run.glob("*-final"))).view_id("raw") == Checkpoint.open(
        pico_run / "latest"
    ).view_id("raw")


def test_a_snapshot_knows_its_length(whole_run: Path) -> None:
    snapshot: Snapshot = list_snapshots(whole_run)[0]
    assert snapshot.length == PowerLength(0.05)
