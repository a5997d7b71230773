"""Trials on a Ray cluster, or on a Ray of this machine: workers compute rows, the driver alone writes them.

A worker holds its weights and Hessians between trials. Where one dies, its trial is given to another, up to so many
times. Workers read checkpoints and data by path, so machines of a cluster need one file system.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.progress import say, silence
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.run import Options, Sweep, check_control, write
from pgolf_post.sweep.state import State


@dataclass(frozen=True)
class RayOptions:
    """Settings of the Ray engine."""

    address: str | None = None  # of a cluster that runs already; None starts one on this machine
    workers: int = 1
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0
    retries: int = 2  # of a trial whose worker died
    object_store_mib: int = 100  # of a local Ray; only rows travel


class TrialActor:
    """One worker: a sweep's bench that stays warm."""

    def __init__(self, options: Options) -> None:
        silence()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sweep = Sweep(options, device)

    def run(self, trial_id: str, rows: dict[str, Row]) -> tuple[Row, tuple[Row, ...]]:
        """Run a trial. Returns its row and those of what it was made of; `rows` are the driver's."""
        state = self.sweep.state()
        listed = next((one for one in state.listed if one.id == trial_id), None)
        if listed is None:
            raise PgolfError(f"this worker's copy of the sweep has no trial {trial_id[:12]}")
        return self.sweep.compute(State(state.spec, state.listed, rows), listed)


def run_ray(options: Options, wanted: RayOptions, on_row: Callable[[State, Row], None] | None = None) -> State:
    """Run a sweep to its end. Raises PgolfError if Ray is missing, or a trial's workers keep dying."""
    try:
        import ray
    except ImportError:
        raise PgolfError("the Ray engine needs the extra `cluster`", hint="pip install 'pgolf-post[cluster]'") from None
    if torch.cuda.is_available() and not wanted.gpus_per_trial:
        say("warning: trials run on processors, as Ray gives them no GPU: --gpus-per-trial 1")
    options = _absolute(options)
    driver = Sweep(options, torch.device("cpu"))
    driver.state()
    if wanted.address:
        ray.init(address=wanted.address, log_to_driver=False)
    else:
        cpus = max(1, round(wanted.workers * wanted.cpus_per_trial))
        memory = wanted.object_store_mib << 20
        ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=memory, log_to_driver=False)
    try:
        return _drive(ray, driver, options, wanted, on_row)
    finally:
        driver.close()
        ray.shutdown()


def _drive(
    ray: Any, driver: Sweep, options: Options, wanted: RayOptions, on_row: Callable[[State, Row], None] | None
) -> State:
    """Hand out ready trials to idle workers, write rows as they come, replace workers that died."""
    make = ray.remote(num_cpus=wanted.cpus_per_trial, num_gpus=wanted.gpus_per_trial)(TrialActor)
    idle = [make.remote(options) for _ in range(wanted.workers)]
    running: dict[Any, tuple[Any, Listed]] = {}  # future → worker, trial
    deaths: dict[str, int] = {}
    while True:
        state = driver.state()
        check_control(state)
        if not state.open and not running:
            return state
        busy = {listed.id for _, listed in running.values()}
        ready = [one for one in state.open if one.id not in busy and state.is_ready(one)]
        while idle and ready:
            worker, listed = idle.pop(), ready.pop(0)
            running[worker.run.remote(listed.id, state.rows)] = worker, listed
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
        for future in done:
            worker, listed = running.pop(future)
            try:
                row, extra = ray.get(future)
            except ray.exceptions.RayActorError as error:
                _count_death(deaths, listed, wanted.retries, error)
                idle.append(make.remote(options))
                continue
            except ray.exceptions.RayTaskError as error:
                raise PgolfError(f"{listed.trial.name}: {error.cause or error}") from error
            idle.append(worker)
            write(driver.ledger, row, extra, replace=options.retry_before is not None)
            state.rows[listed.id] = row
            if on_row:
                on_row(state, row)


def _count_death(deaths: dict[str, int], listed: Listed, retries: int, error: Exception) -> None:
    """Raise PgolfError once too many workers have died over one trial."""
    deaths[listed.id] = deaths.get(listed.id, 0) + 1
    if deaths[listed.id] > retries:
        raise PgolfError(
            f"{listed.trial.name}: its worker died {deaths[listed.id]} times, --retries is {retries}: {error}",
            hint="look at Ray's logs; memory is the usual reason (pgolf-post sweep plan says what a trial takes)",
        ) from error
    say(f"{listed.trial.name}: its worker died; given to another")


def _absolute(options: Options) -> Options:
    """Return the options with paths that hold in a worker's own folder."""
    places = options.places

    def full(path: Path | None) -> Path | None:
        return path.resolve() if path else None

    absolute = replace(
        places, checkpoint=full(places.checkpoint), data=full(places.data),
        root=places.root.resolve(), results=places.results.resolve(), derived=full(places.derived),
    )  # fmt: skip
    return replace(options, spec=options.spec.resolve(), places=absolute)
