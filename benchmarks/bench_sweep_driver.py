"""What the driver of a sweep costs beside its trials: 1,000 trials that each wait 50 ms and compute nothing.

Everything around a trial is real: the list, the claims, the look at the rows, the row's transaction. `--engine local`
runs them in this process, `--engine ray` on a Ray of this machine with `--workers` workers, whose trials overlap. The
overhead is wall time less the trials' own, per trial and worker, and the CPU time of this process, per trial.

    python -m benchmarks.bench_sweep_driver [--engine ray] [--workers 2] [--trials 1000] [--milliseconds 50]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pgolf_post.sweep.engines.local as local_engine
import pgolf_post.sweep.engines.ray as ray_engine
from benchmarks.bench_hot_start import random_checkpoint
from pgolf_post.base.progress import print_table
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.documents import Document
from pgolf_post.ledger import Row
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.run import Options, Sweep
from pgolf_post.sweep.state import State

SCORE = {"bpb": 1.0, "difference_bpb": 0.0, "low_bpb": -0.001, "high_bpb": 0.001}


@dataclass(frozen=True)
class WaitingOptions(Options):
    """Options of a sweep whose trials only wait."""

    milliseconds: int = 50


def wait(sweep: Sweep, listed: Listed) -> tuple[Row, tuple[Row, ...]]:
    """Take a trial's time and find nothing; the row is as long as a real one's."""
    trial, facts, options = listed.trial, sweep.provenance, sweep.options
    assert isinstance(options, WaitingOptions)
    time.sleep(options.milliseconds / 1e3)
    result = {"screen": SCORE, "bpb": 1.0, "artifact_bytes": 1_000_000, "stage_seconds": {"screen": 0.05}, "shared": []}
    settings = {**trial.named(), "trial": trial.settings.facts()}
    row = Row(
        "trial", listed.id, (listed.control_id,), trial.name, facts.sweep, settings, "", result, facts.commit,
        facts.device, 0.05, None, "neutral", "",
    )  # fmt: skip
    return row, ()


class WaitingSweep(Sweep):
    """A sweep whose trials only wait."""

    def compute(self, state: State, listed: Listed, attempt: int = 1) -> tuple[Row, tuple[Row, ...]]:
        return wait(self, listed)


class WaitingActor(ray_engine.TrialActor):
    """A Ray worker whose trials only wait."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.sweep.compute = lambda state, listed, attempt=1: wait(self.sweep, listed)  # type: ignore[method-assign]


def documents() -> list[Document]:
    """A little text, for a data folder that nothing reads."""
    return [Document(f"text/{number}", f"line {number} of a text\n" * 40) for number in range(40)]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="bench_sweep_driver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int, default=1, help="workers of the Ray engine")
    parser.add_argument("--trials", type=int, default=1000, help="number of trials")
    parser.add_argument("--milliseconds", type=int, default=50, help="length of a trial")
    given = parser.parse_args(list(arguments))
    measure(given.engine, given.workers, given.trials, given.milliseconds)


def measure(engine: str, workers: int, trials: int, milliseconds: int) -> None:
    """Run a sweep of trials that wait, and print what the driver adds to them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build(documents(), folder / "data", BuildSettings(name="bench", vocab_size=290, val_fraction=0.2))
        checkpoint = random_checkpoint(folder / "checkpoints", data)
        values = ", ".join(f"{number / trials:.6f}" for number in range(1, trials + 1))
        spec = folder / "spec.toml"
        spec.write_text(
            f'question = "?"\nbaselines = []\nnoise_repeats = 0\n[grid]\n"*.hessian_lambda" = [{values}]\n'
            "[stages.screen]\ntokens = 320\n",
            encoding="utf-8",
        )
        places = Places(checkpoint.path, data.path, folder / "checkpoints", folder / "results")
        options = WaitingOptions(spec, (), places, milliseconds=milliseconds)
        arrived: list[float] = []

        def on_row(_: State, __: Row) -> None:
            arrived.append(time.perf_counter())

        # Until the first row: the list, and workers that start. From it to the last: the driver and the trials.
        cpu, began = time.process_time(), time.perf_counter()
        with patch.object(local_engine, "Sweep", WaitingSweep), patch.object(ray_engine, "TrialActor", WaitingActor):
            if engine == "local":
                state = local_engine.run_local(options, 1, on_row)
            else:
                state = ray_engine.run_ray(options, ray_engine.RayOptions(workers=workers), on_row)
        cpu = time.process_time() - cpu
    assert len(state.rows) == trials + 1, len(state.rows)
    between = (arrived[-1] - arrived[0]) / (len(arrived) - 1)
    own = milliseconds / 1e3 / workers
    row = (
        engine, str(workers), f"{len(arrived):,}", f"{arrived[0] - began:.2f}", f"{1e3 * between:.2f}",
        f"{1e3 * (between - own):.2f}", f"{1e3 * cpu / len(arrived):.2f}",
    )  # fmt: skip
    header = ("engine", "workers", "rows", "s to the first", "ms a trial", "less the trial's own", "driver's CPU ms")
    print_table(f"Trials of {milliseconds} ms", header, [row])


if __name__ == "__main__":
    main(sys.argv[1:])
