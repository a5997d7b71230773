"""Post-hoc EMA against the EMA itself: a pico run that snapshots two tracks while averages of other lengths watch.

Baseline: the average tracked step by step. Stated as a share of how far that average is from the raw weights, for
snapshots in float32, as they are stored, and for the same ones rounded to bfloat16, which would take half the disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pgolf_post.average.posthoc import Synthesis, find_combination, run_snapshots
from pgolf_post.average.profiles import ExponentialLength, Length, PowerLength
from pgolf_post.average.snapshots import stream_tensors
from pgolf_post.base.progress import print_table
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data.build import BuildSettings, build
from tests.conftest import pico_documents, pico_recipe
from trainer.optim.averages import PowerEMA
from trainer.run.loop import Trainer

NUM_STEPS = 300
SIGMAS = (0.03, 0.04, 0.05, 0.075, 0.15, 0.20)
HALF_LIFE_SHARES = (0.02, 0.035, 0.05, 0.10, 0.20)  # of the run's steps


class Watched:
    """A run, and averages tracked beside it in float64."""

    def __init__(self, trainer: Trainer) -> None:
        parameters = dict(trainer.model.named_parameters())
        self.power = PowerEMA(trainer.model, SIGMAS)
        self.weights: list[dict[str, Tensor]] = []
        step = trainer.timed_step

        def watched(at: float) -> tuple[float, float]:
            result = step(at)
            self.power.update(trainer.state.step)
            self.weights.append({name: p.detach().clone() for name, p in parameters.items()})
            return result

        trainer.timed_step = watched  # type: ignore[method-assign]

    def average(self, length: Length) -> dict[str, Tensor]:
        """The power-function average as its recurrence left it, or the exponential one summed over all steps."""
        if isinstance(length, PowerLength):
            return self.power.tracks[length.sigma]
        shares = torch.from_numpy(length.profile(NUM_STEPS))
        return {
            name: torch.tensordot(shares, torch.stack([step[name] for step in self.weights]).double(), 1)
            for name in self.weights[0]
        }


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return float(sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs) ** 0.5)


def combined(synthesis: Synthesis, dtype: torch.dtype) -> dict[str, Tensor]:
    """The combination of snapshots as if they were stored in `dtype`."""
    parts = synthesis.parts
    return {
        name: sum((share * t.to(dtype).double() for (_, share), t in zip(parts, tensors, strict=True)), torch.zeros(()))
        for name, tensors in stream_tensors([snapshot for snapshot, _ in parts])
    }


def row(final: Checkpoint, watched: Watched, length: Length) -> tuple[str, ...]:
    direct, raw = watched.average(length), dict(final.load("raw").tensors)
    synthesis = find_combination(run_snapshots(final), length, NUM_STEPS, max_error=10.0)
    apart = distance(direct, raw)
    errors = [distance(combined(synthesis, dtype), direct) / apart for dtype in (torch.float32, torch.bfloat16)]
    solution = synthesis.combination
    size = distance(raw, {name: torch.zeros_like(t) for name, t in raw.items()})
    return (
        str(length), f"{solution.residual:.2%}", f"{solution.amplification:.1f}", f"{apart / size:.1%}",
        *(f"{error:.2%}" for error in errors),
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = BuildSettings(name="pico", vocab_size=320, val_fraction=0.2)
        data = build(pico_documents(), Path(folder) / "data", settings)
        optim = {"power_ema_sigmas": (0.05, 0.10), "power_ema_snapshots": 16}
        trainer = Trainer(pico_recipe(data, Path(folder) / "runs", schedule={"steps": NUM_STEPS}, optim=optim))
        watched = Watched(trainer)
        final = trainer.run()
        lengths: list[Length] = [*map(PowerLength, SIGMAS)]
        lengths += [ExponentialLength(share * NUM_STEPS) for share in HALF_LIFE_SHARES]
        num_snapshots = len(run_snapshots(final))
        rows = [row(final, watched, length) for length in lengths]
    header = ("average", "profile error", "Σ|share|", "‖EMA - raw‖ ÷ ‖raw‖", "error ÷ ‖EMA - raw‖", "with bfloat16")
    print_table(f"Post-hoc EMA after {NUM_STEPS} steps from {num_snapshots} snapshots", header, rows)


if __name__ == "__main__":
    main()
