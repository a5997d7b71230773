"""Post-hoc EMA is the EMA that was not tracked: real pico runs, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pgolf_post.average.posthoc import find_combination, posthoc_ema, run_snapshots, synthesise
from pgolf_post.average.profiles import ExponentialLength, Length, PowerLength
from pgolf_post.average.snapshots import list_snapshots, snapshot_path, write_snapshot
from pgolf_post.checkpoint import Checkpoint, default_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, SettingsError
from pgolf_post.score.metric import verify_metric
from tests.conftest import pico_recipe
from trainer.optim.averages import PowerEMA
from trainer.run.loop import Trainer

pytestmark = pytest.mark.slow

NUM_STEPS = 240
TRACKS = {"power_ema_sigmas": (0.05, 0.10), "power_ema_snapshots": 16, "ema_decay": 0.95}


@dataclass
class Tracked:
    """A run and averages of other lengths, tracked as it went, at its end and at an earlier step."""

    final: Checkpoint
    direct: dict[tuple[Length, int], dict[str, Tensor]]


class DebiasedEMA:
    """θ̂ ← d θ̂ + (1 - d) θ from zero, divided by what all shares sum to."""

    def __init__(self, parameters: dict[str, Tensor], half_life: float) -> None:
        self.decay, self.total, self.parameters = 0.5 ** (1 / half_life), 0.0, parameters
        self.sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}

    def update(self, _: int) -> None:
        self.total = self.decay * self.total + 1 - self.decay
        for name, parameter in self.parameters.items():
            self.sums[name].mul_(self.decay).add_(parameter.detach(), alpha=1 - self.decay)

    def value(self) -> dict[str, Tensor]:
        return {name: (tensor / self.total).float() for name, tensor in self.sums.items()}


@pytest.fixture(scope="module")
def tracked_original(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Tracked:
    """A pico run of 240 steps that snapshots two tracks, watched by four other averages. Do not change it."""
    root = tmp_path_factory.mktemp("tracked") / "checkpoints"
    recipe = pico_recipe(pico_data, root, schedule={"steps": NUM_STEPS}, optim=TRACKS, checkpoint={"steps": (45, 190)})
    trainer = Trainer(recipe)
    parameters = dict(trainer.model.named_parameters())
    power = {PowerLength(sigma): PowerEMA(trainer.model, [sigma]) for sigma in (0.075, 0.15)}
    exponential = {ExponentialLength(h): DebiasedEMA(parameters, h) for h in (12.0, 24.0)}
    direct: dict[tuple[Length, int], dict[str, Tensor]] = {}
    step = trainer.timed_step

    def watched(at: float) -> tuple[float, float]:
        result = step(at)
        for average in (*power.values(), *exponential.values()):
            average.update(trainer.state.step)
        if trainer.state.step in (190, NUM_STEPS):
            for length, track in power.items():
                values = track.tracks[length.sigma]
                direct[length, trainer.state.step] = {name: tensor.clone() for name, tensor in values.items()}
            direct.update({(length, trainer.state.step): average.value() for length, average in exponential.items()})
        return result

    trainer.timed_step = watched  # type: ignore[method-assign]
    return Tracked(trainer.run(), direct)


@pytest.fixture
def tracked(tmp_path: Path, tracked_original: Tracked) -> Tracked:
    """A private copy of the run."""
    root = tracked_original.final.path.parents[1]
    shutil.copytree(root, tmp_path / "tracked", symlinks=True)
    return Tracked(Checkpoint.open(tmp_path / "tracked" / "latest"), tracked_original.direct)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return float(sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs) ** 0.5)


@pytest.mark.parametrize(
    ("length", "end_step"),
    [
        (PowerLength(0.075), NUM_STEPS),
        (PowerLength(0.075), 190),
        (PowerLength(0.15), NUM_STEPS),
        (PowerLength(0.15), 190),
        (ExponentialLength(12.0), NUM_STEPS),
        (ExponentialLength(12.0), 190),
        (ExponentialLength(24.0), NUM_STEPS),
    ],
    ids=str,
)
def test_it_reproduces_a_directly_tracked_ema(tracked_original: Tracked, length: Length, end_step: int) -> None:
    direct = tracked_original.direct[length, end_step]
    synthesis = find_combination(run_snapshots(tracked_original.final), length, end_step, 0.05)
    raw = dict(tracked_original.final.load("raw").tensors)
    assert distance(synthesise(synthesis), direct) < 0.01 * distance(direct, raw)


def test_it_reproduces_the_ema_that_the_trainer_kept(tracked_original: Tracked) -> None:
    final = tracked_original.final
    kept = dict(final.load("ema").tensors)  # its ramp is over long before the end, and what it began with forgotten
    half_life = torch.log(torch.tensor(0.5)) / torch.log(torch.tensor(0.95))
    synthesis = find_combination(run_snapshots(final), ExponentialLength(float(half_life)), NUM_STEPS, 0.05)
    assert distance(synthesise(synthesis), kept) < 0.01 * distance(kept, dict(final.load("raw").tensors))


def test_it_is_a_verifiable_checkpoint_that_is_made_once(
    tracked: Tracked, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    made, cached = posthoc_ema(tracked.final, PowerLength(0.075), pico_data)
    assert not cached
    assert (made.meta["kind"], made.meta["step"], made.meta["no_op"]) == ("ema-blend", NUM_STEPS, False)
    assert 0 < made.meta["reconstruction_error"] < 0.01
    assert sum(parent["share"] for parent in made.meta["parents"]) == pytest.approx(1)
    assert len(made.meta["parents"]) == len(run_snapshots(tracked.final))
    assert made.meta["ema"]["sigma"] == 0.075
    assert verify_metric(made.load(), pico_data).passed
    assert default_checkpoint(tracked.final.path.parents[1]).path == tracked.final.path
    assert posthoc_ema(tracked.final, PowerLength(0.075), pico_data) == (made, True)
    assert f"{made.path}: cached" in capsys.readouterr().err
    other, cached = posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    assert not cached
    assert other.path != made.path


def test_an_average_that_was_tracked_is_marked_no_op(tracked: Tracked, pico_data: DataFolder) -> None:
    made, _ = posthoc_ema(tracked.final, PowerLength(0.10), pico_data)
    assert made.meta["no_op"] is True
    assert made.meta["reconstruction_error"] == 0
    kept = load_file(snapshot_path(tracked.final.path.parent, NUM_STEPS, 0.10))
    assert distance(dict(made.load().tensors), kept) == 0


def test_an_average_that_ends_earlier_has_the_graph_of_its_time(tracked: Tracked, pico_data: DataFolder) -> None:
    early, _ = posthoc_ema(tracked.final, PowerLength(0.08), pico_data, end_step=45)
    late, _ = posthoc_ema(tracked.final, ExponentialLength(24.0), pico_data, end_step=180)
    assert (early.config["graph"]["active_loops"], late.config["graph"]["active_loops"]) == (0, 1)
    assert (early.meta["step"], early.meta["tokens_seen"]) == (45, 45 * 64)
    for made in (early, late):
        assert verify_metric(made.load(), pico_data).passed


def test_what_the_snapshots_cannot_give_is_refused(tracked: Tracked, pico_data: DataFolder) -> None:
    with pytest.raises(
        SettingsError, match=r"half-life 1 steps at step 240: reconstruction error \d+\.\d%, limit 5.0%"
    ):
        posthoc_ema(tracked.final, ExponentialLength(1.0), pico_data)
    made, _ = posthoc_ema(tracked.final, ExponentialLength(1.0), pico_data, max_error=1.0)
    assert made.meta["reconstruction_error"] > 0.05
    with pytest.raises(SettingsError, match=r"step 200: reconstruction error .*the nearest of steps 195 and 210"):
        posthoc_ema(tracked.final, PowerLength(0.06), pico_data, end_step=200)
    for end_step in (0, NUM_STEPS + 1):
        with pytest.raises(SettingsError, match="outside 1 … 240"):
            posthoc_ema(tracked.final, PowerLength(0.1), pico_data, end_step=end_step)


def test_a_run_without_snapshots_and_a_blend_are_refused(
    pico_checkpoint: Checkpoint, tracked: Tracked, pico_data: DataFolder
) -> None:
    with pytest.raises(NotFoundError, match="kept no power-function averages"):
        posthoc_ema(pico_checkpoint, PowerLength(0.1), pico_data)
    made, _ = posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    with pytest.raises(MismatchError, match="'ema-blend' checkpoint"):
        posthoc_ema(made, PowerLength(0.1), pico_data)


def test_a_damaged_snapshot_is_named(tracked: Tracked, pico_data: DataFolder) -> None:
    path = snapshot_path(tracked.final.path.parent, 120, 0.05)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(DamagedFileError, match=r"step_000120-sigma_0\.05\.safetensors changed after it was written"):
        posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    path.write_bytes(whole[:100])
    with pytest.raises(DamagedFileError, match=r"step_000120-sigma_0\.05\.safetensors is not a snapshot"):
        posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    assert not list(tracked.final.path.parent.glob("ema_*"))


def test_a_nan_and_a_foreign_snapshot_are_named(tracked: Tracked, pico_data: DataFolder) -> None:
    run = tracked.final.path.parent
    snapshot = list_snapshots(run)[0]
    tensors = load_file(snapshot.path)
    tensors["tok_emb.weight"][3, 2] = float("nan")
    write_snapshot(run, snapshot.step, snapshot.sigma, snapshot.progress, snapshot.graph, tensors)
    with pytest.raises(NumericsError, match=rf"{snapshot.path.name}: tok_emb\.weight\[3, 2\] is nan"):
        posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    tensors["tok_emb.weight"] = torch.zeros(2, 2)
    write_snapshot(run, snapshot.step, snapshot.sigma, snapshot.progress, snapshot.graph, tensors)
    with pytest.raises(MismatchError, match="hold different tensors"):
        posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
    save_file({"a": torch.zeros(1)}, snapshot.path)
    with pytest.raises(DamagedFileError, match="is not a snapshot of an average"):
        posthoc_ema(tracked.final, PowerLength(0.08), pico_data)
