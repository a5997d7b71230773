"""Running a sweep: take the next trial that is ready, run it, write its row, look at the file again.

All state is the ledger. A trial that has a row is done; one that has none is to be done; a killed process loses its
claims and nothing else. So a sweep is resumed by running it again, two processes share it by both running it, and a
trial that is added to the file while it runs is found at the next look.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from pgolf_post.base.progress import say
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.families import family_sources, load_family
from pgolf_post.ledger import Ledger, Row
from pgolf_post.provenance import code_commit, device_name
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.expand import expand, read_spec
from pgolf_post.sweep.listed import Listed, list_trials
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.settings import SweepSpec
from pgolf_post.sweep.spending import BudgetSpentError
from pgolf_post.sweep.state import State
from pgolf_post.sweep.trainer_process import Asked
from pgolf_post.sweep.training import run_id
from pgolf_post.sweep.training_price import training_price
from pgolf_post.sweep.trial import Provenance, Run
from pgolf_post.sweep.trials import Trial
from pgolf_post.sweep.workbench import Workbench

WAIT_SECONDS = 0.1  # between looks at what others are doing


@dataclass(frozen=True)
class Options:
    """Options of running a sweep; the same for every process that takes part."""

    spec: Path
    overrides: tuple[str, ...] = ()
    places: Places = field(default_factory=Places)
    compiled: bool | None = None  # None: where there is a GPU
    retry_before: str | None = None  # trials that failed before this moment (ISO 8601, UTC) are run again
    dollars_per_hour: float | None = None
    max_seconds: float | None = None  # of all the sweep's trials together
    families: tuple[str, ...] = field(default_factory=family_sources)  # that worker processes load too

    @property
    def name(self) -> str:
        return self.spec.stem

    @property
    def results(self) -> Path:
        return self.places.results / self.name


class Sweep:
    """One process's view of a sweep."""

    def __init__(self, options: Options, device: torch.device | None = None) -> None:
        self.options = options
        for source in options.families:
            if source not in family_sources():
                load_family(source)
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compiled = device.type == "cuda" if options.compiled is None else options.compiled
        self.bench = Workbench(options.places, compiled, device)
        self.provenance = Provenance(options.name, code_commit(), device_name(device), options.dollars_per_hour)
        self._stamp: tuple[float, int] | None = None
        self._listed: list[Listed] = []
        self.unfinished_seconds = 0.0  # of trainings that the budget stopped: no row has them
        self._rows: dict[str, Row] = {}  # of the listed trials, as this sweep calls them
        self._spec: SweepSpec | None = None

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, opened by who reads or writes rows: a worker that is sent them never does."""
        return Ledger.open(self.options.places.root, flush_later=True)

    def close(self) -> None:
        if "ledger" in vars(self):
            self.ledger.close()

    def state(self) -> State:
        """Return the spec as the file has it now, and the rows. A file that cannot be read leaves the last spec."""
        state = self.asked()
        self._look()
        return replace(state, rows=dict(self._rows))

    def asked(self) -> State:
        """Return the spec as the file has it now, without rows."""
        with contextlib.suppress(FileNotFoundError):
            stat = self.options.spec.stat()
            if (stat.st_mtime, stat.st_size) != self._stamp or self._spec is None:
                self._read((stat.st_mtime, stat.st_size))
        if self._spec is None:
            self._read(None)
        assert self._spec is not None
        return State(self._spec, self._listed, {})

    def _look(self) -> None:
        """Read the rows that came since the last look: one that is there stays as it is."""
        missing = [one for one in self._listed if one.id not in self._rows]
        there = self.ledger.ids("trial") if missing else set()
        for one in missing:
            row = self.row(one.id) if one.id in there else None
            if row is not None:
                self._rows[one.id] = as_asked(row, one.trial)

    def row(self, trial_id: str) -> Row | None:
        """Return a trial's row, unless it failed before and failures are to be tried again."""
        row, before = self.ledger.get("trial", trial_id), self.options.retry_before
        if row is not None and before is not None and "error" in row.result and row.created < before:
            return None
        return row

    def _read(self, stamp: tuple[float, int] | None) -> None:
        try:
            spec = read_spec(self.options.spec, self.options.overrides)
            trials = expand(spec, self.bench.weights.num_blocks)
            listed = list_trials(self.bench, spec, trials)
        except PgolfError as error:
            if self._spec is None:
                raise
            say(f"{self.options.spec} changed and cannot be used, going on with what it was: {error}")
            self._stamp = stamp
            return
        if self._spec is not None and len(listed) != len(self._listed):
            say(f"{self.options.spec} changed: {len(listed)} trials instead of {len(self._listed)}")
        self._spec, self._listed, self._stamp, self._rows = spec, listed, stamp, {}
        self.bench.weights.asked = asked_of(self.options.name, spec, listed)
        self.bench.weights.seconds_left = self.seconds_left

    def seconds_left(self) -> float | None:
        """Return the seconds that the sweep's trials may still take, by all rows that it has; None without a limit."""
        if self.options.max_seconds is None:
            return None
        rows = [row for row in self._rows.values() if row.run == self.options.name]
        return max(0.0, self.options.max_seconds - self.unfinished_seconds - sum(row.seconds or 0.0 for row in rows))

    def is_affordable(self, listed: Listed, left: float) -> bool:
        """Whether a trial may be begun: there are seconds left, and its training's price, where known, fits in them."""
        train = listed.trial.settings.train
        if train is None or left <= 0:
            return left > 0
        runs = self.ledger.rows("run")
        price = training_price(train, self.options.places.root, runs, self.provenance.device).seconds
        return price is None or price <= left

    def run_one(self, state: State, listed: Listed) -> Row:
        """Run a trial and write its row, after the rows of what it was made of."""
        if (why := state.why_stopped(listed)) is not None:
            made: tuple[Row, tuple[Row, ...]] = self.stopped(listed, why), ()
        else:
            made = self.compute(state, listed, self.attempt(listed))
        row, extra = made
        write(self.ledger, row, extra, replace=self.options.retry_before is not None)
        return row

    def attempt(self, listed: Listed) -> int:
        """Return which attempt at a trial the next one is; more than the first only where failures are tried again."""
        failed = self.ledger.get("trial", listed.id) if self.options.retry_before is not None else None
        return 1 if failed is None else int(failed.result.get("attempt", 1)) + 1

    def compute(self, state: State, listed: Listed, attempt: int = 1) -> tuple[Row, tuple[Row, ...]]:
        """Run a trial. Returns its row, not yet written, and rows of what it was made of."""
        control_trial, control = state.control(listed)
        if listed.trial.role != "control" and (control is None or "error" in control.result):
            raise _control_failed(control)
        noise = [state.rows[one.id] for one in state.noise(listed) if one.id in state.rows]
        run = Run(self.bench, state.spec, listed, control, control_trial, noise, self.provenance, attempt=attempt)
        return run.row()

    def stopped(self, listed: Listed, why: str) -> Row:
        """Return the row of a trial that is not run."""
        trial, facts = listed.trial, self.provenance
        settings = {**trial.named(), "trial": trial.settings.facts()}
        return Row(
            "trial", listed.id, (listed.control_id,), trial.name, facts.sweep, settings, "",
            {"stopped": why}, facts.commit, facts.device, 0.0, None, None, why,
        )  # fmt: skip


def asked_of(sweep: str, spec: SweepSpec, listed: Sequence[Listed]) -> dict[str, Asked]:
    """Return by a training's id what its run is called, why it is made, and the control's run that it changes."""
    asked: dict[str, Asked] = {}
    controls = {one.id: one.trial.settings.train for one in listed if one.trial.role == "control"}
    for one in listed:
        train = one.trial.settings.train
        if train is None:
            continue
        with contextlib.suppress(PgolfError):  # a recipe that cannot be read is its trial's error
            control = controls.get(one.control_id)
            changed = control if control is not None and control is not train else None
            told = Asked(f"{sweep}/{one.trial.name}", f"{spec.question} ({one.trial.name})", changed)
            asked.setdefault(run_id(train), told)
    return asked


def as_asked(row: Row, trial: Trial) -> Row:
    """Return a row under this sweep's name for it: another sweep may have run the very same trial before."""
    return replace(row, name=trial.name, settings={**row.settings, **trial.named()})


def write(ledger: Ledger, row: Row, extra: Sequence[Row], replace: bool = False) -> None:
    """Write a trial's row, after those of what it was made of where nobody wrote them before."""
    for one in extra:
        if ledger.get(one.kind, one.id) is None:
            ledger.add(one, replace=True)  # another process may come between: what it wrote is as good
    if replace or ledger.get(row.kind, row.id) is None:
        ledger.add(row, replace=replace)


def check_control(state: State) -> None:
    """Raise PgolfError if a control failed, VerificationError if it does not reproduce what the gate says."""
    gates = state.spec.gates
    for listed in state.listed:
        row = state.rows.get(listed.id)
        if listed.trial.role != "control" or row is None:
            continue
        if "error" in row.result:
            raise _control_failed(row)
        if gates.control_bpb is not None and abs(row.result["bpb"] - gates.control_bpb) > gates.tolerance:
            raise VerificationError(
                f"the control has {row.result['bpb']:.6f} bpb, gates.control_bpb says {gates.control_bpb:.6f} ± "
                f"{gates.tolerance:g}: nothing that is compared with it would mean what it seems to",
                hint="find out what changed (checkpoint, data, calibration), or correct the gate",
            )


def _control_failed(row: Row | None) -> PgolfError:
    said = row.result["error"] if row else "it has no row"
    return PgolfError(
        f"the control failed, and every trial is compared with it: {said}", hint="pgolf-post sweep run … --retry-failed"
    )


def work(sweep: Sweep, on_row: Callable[[State, Row], None] | None = None) -> State:
    """Take trials, one at a time, until every one has a row. Other processes may do the same beside it."""
    while True:
        state = sweep.state()
        check_control(state)
        if not state.open or is_spent(sweep, state):
            return state
        if not _take_one(sweep, state, on_row):
            time.sleep(WAIT_SECONDS)


def is_spent(sweep: Sweep, state: State) -> bool:
    """Whether the sweep's budget ends it here: no trial that is ready can be paid. Says so."""
    left = sweep.seconds_left()
    if left is None:
        return False
    ready = [one for one in state.open if state.is_ready(one)]
    if not ready or any(sweep.is_affordable(one, left) for one in ready):
        return False
    say(f"{left:.0f} s are left of {sweep.options.max_seconds:.0f}: none of {len(state.open)} trials fits; they wait")
    return True


def _take_one(sweep: Sweep, state: State, on_row: Callable[[State, Row], None] | None) -> bool:
    """Run the first trial that is ready and that nobody else is at. Returns whether there was one."""
    claims = sweep.options.places.results / "claims"  # of all sweeps: two may share a trial
    left = sweep.seconds_left()
    for listed in state.open:
        if not state.is_ready(listed) or (left is not None and not sweep.is_affordable(listed, left)):
            continue
        with claim(claims, listed.id) as mine:
            if not mine:
                continue
            if sweep.row(listed.id) is not None:
                return True  # another process finished it a moment ago
            try:
                row = sweep.run_one(state, listed)
            except BudgetSpentError as spent:
                say(f"{listed.trial.name}: {spent}")
                sweep.unfinished_seconds += spent.seconds
                return True
        state.rows[listed.id] = row
        if on_row:
            on_row(state, row)
        return True
    return False
