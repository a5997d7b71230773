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
from pgolf_post.sweep.run import Options, Sweep, check_control, is_spent, write
from pgolf_post.sweep.spending import BudgetSpentError
from pgolf_post.sweep.state import State

WAIT_SECONDS = 1.0  # for a trial to finish, between looks at the spec
START = "a worker's start"


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

    def started(self) -> None:
        """Return once the worker is there."""

    def run(
        self, trial_id: str, rows: dict[str, Row], attempt: int, seconds_left: float | None
    ) -> tuple[Row, tuple[Row, ...]]:
        """Run a trial. Returns its row and those of what it was made of; `rows` are what it is compared with.

        Raises BudgetSpentError when no seconds are left.
        """
        asked = self.sweep.asked()
        self.sweep.bench.weights.seconds_left = lambda: seconds_left
        listed = next((one for one in asked.listed if one.id == trial_id), None)
        if listed is None:
            raise PgolfError(f"this worker's copy of the sweep has no trial {trial_id[:12]}")
        return self.sweep.compute(State(asked.spec, asked.listed, rows), listed, attempt)


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
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=memory, log_to_driver=False
        )
    try:
        return _drive(Crew(ray, options, wanted), driver, on_row)
    finally:
        driver.close()
        ray.shutdown()


class Crew:
    """Workers by what they are at: starting, idle, or running a trial.

    A worker is given a trial once it has started: one that waits for a machine that died holds no trial back.
    """

    def __init__(self, ray: Any, options: Options, wanted: RayOptions) -> None:
        self.ray, self.options, self.wanted = ray, options, wanted
        self.make = ray.remote(num_cpus=wanted.cpus_per_trial, num_gpus=wanted.gpus_per_trial)(TrialActor)
        self.starting: dict[Any, Any] = {}  # future → worker
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, Listed]] = {}  # future → worker, trial
        self.deaths: dict[str, int] = {}  # by trial id, or START
        self.unfinished_seconds = 0.0  # of trainings that the budget stopped
        for _ in range(wanted.workers):
            self.start()

    def start(self) -> None:
        worker = self.make.remote(self.options)
        self.starting[worker.started.remote()] = worker

    def give(self, listed: Listed, rows: dict[str, Row], attempt: int, seconds_left: float | None) -> None:
        """Give a trial to an idle worker."""
        worker = self.idle.pop()
        self.running[worker.run.remote(listed.id, rows, attempt, seconds_left)] = worker, listed

    @property
    def busy(self) -> set[str]:
        return {listed.id for _, listed in self.running.values()}

    def finished(self) -> list[tuple[Listed, tuple[Row, tuple[Row, ...]]]]:
        """Return trials that finished since the last call; waits up to a second for one. Replaces workers that died."""
        found = []
        done, _ = self.ray.wait([*self.running, *self.starting], num_returns=1, timeout=WAIT_SECONDS)
        for future in done:
            worker, listed = self.running.pop(future, (None, None))
            worker = worker or self.starting.pop(future)
            try:
                rows = self.ray.get(future)
            except self.ray.exceptions.RayActorError as error:
                self._count_death(listed, error)
                self.start()
                continue
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, BudgetSpentError) and listed is not None:
                    say(f"{listed.trial.name}: {error.cause}")
                    self.unfinished_seconds += error.cause.seconds
                    self.idle.append(worker)
                    continue
                raise PgolfError(f"{listed.trial.name if listed else START}: {error.cause or error}") from error
            self.idle.append(worker)
            if listed is not None:
                found.append((listed, rows))
        return found

    def _count_death(self, listed: Listed | None, error: Exception) -> None:
        """Raise PgolfError once too many workers have died over one trial, or at their start."""
        key, name = (listed.id, listed.trial.name) if listed else (START, START)
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] > self.wanted.retries:
            raise PgolfError(
                f"{name}: its worker died {self.deaths[key]} times, --retries is {self.wanted.retries}: {error}",
                hint="look at Ray's logs; memory is the usual reason (pgolf-post sweep plan says what a trial takes)",
            ) from error
        say(f"{name}: its worker died; " + ("given to another" if listed else "starting another"))


def _drive(crew: Crew, driver: Sweep, on_row: Callable[[State, Row], None] | None) -> State:
    """Hand out ready trials to idle workers, and write rows as they come: the driver does, and nobody else."""

    def keep(listed: Listed, row: Row, extra: tuple[Row, ...]) -> None:
        write(driver.ledger, row, extra, replace=driver.options.retry_before is not None)
        if on_row:
            state.rows[listed.id] = row
            on_row(state, row)

    while True:
        state = driver.state()
        check_control(state)
        driver.unfinished_seconds = crew.unfinished_seconds
        left = driver.seconds_left()
        if not crew.running and (not state.open or is_spent(driver, state)):
            return state
        busy = crew.busy
        for listed in state.open if crew.idle else ():
            if listed.id in busy or not state.is_ready(listed):
                continue
            if left is not None and not driver.is_affordable(listed, left):
                continue
            if (why := state.why_stopped(listed)) is not None:
                keep(listed, driver.stopped(listed, why), ())
                break  # by this row others may be ready
            crew.give(listed, state.compared(listed), driver.attempt(listed), left)
            if not crew.idle:
                break
        for listed, (row, extra) in crew.finished():
            keep(listed, row, extra)


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
