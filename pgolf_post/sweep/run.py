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
from pgolf_post.sweep.state import State
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
        self.ledger = Ledger.open(options.places.root)
        self.provenance = Provenance(options.name, code_commit(), device_name(device), options.dollars_per_hour)
        self._stamp: tuple[float, int] | None = None
        self._listed: list[Listed] = []
        self._spec: SweepSpec | None = None

    def close(self) -> None:
        self.ledger.close()

    def state(self) -> State:
        """Return the spec as the file has it now, and the rows. A file that cannot be read leaves the last spec."""
        with contextlib.suppress(FileNotFoundError):
            stat = self.options.spec.stat()
            if (stat.st_mtime, stat.st_size) != self._stamp or self._spec is None:
                self._read((stat.st_mtime, stat.st_size))
        if self._spec is None:
            self._read(None)
        assert self._spec is not None
        there = [(one, self.row(one.id)) for one in self._listed]
        rows = {one.id: as_asked(row, one.trial) for one, row in there if row is not None}
        return State(self._spec, self._listed, rows)

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
        self._spec, self._listed, self._stamp = spec, listed, stamp

    def run_one(self, state: State, listed: Listed) -> Row:
        """Run a trial and write its row, after the rows of what it was made of."""
        row, extra = self.compute(state, listed)
        write(self.ledger, row, extra, replace=self.options.retry_before is not None)
        return row

    def compute(self, state: State, listed: Listed) -> tuple[Row, tuple[Row, ...]]:
        """Run a trial. Returns its row, not yet written, and rows of what it was made of."""
        control_trial, control = state.control(listed)
        if listed.trial.role != "control" and (control is None or "error" in control.result):
            raise _control_failed(control)
        if (why := state.why_stopped(listed)) is not None:
            return self._stopped(listed, why), ()
        noise = [state.rows[one.id] for one in state.noise(listed) if one.id in state.rows]
        run = Run(self.bench, state.spec, listed, control, control_trial, noise, self.provenance)
        failed = self.ledger.get("trial", listed.id)  # only where failures are tried again
        run.attempt = 1 if failed is None else int(failed.result.get("attempt", 1)) + 1
        return run.row()

    def _stopped(self, listed: Listed, why: str) -> Row:
        trial, facts = listed.trial, self.provenance
        settings = {**trial.named(), "trial": trial.settings.facts()}
        return Row(
            "trial", listed.id, (listed.control_id,), trial.name, facts.sweep, settings, "",
            {"stopped": why}, facts.commit, facts.device, 0.0, None, None, why,
        )  # fmt: skip


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
        if not state.open:
            return state
        if not _take_one(sweep, state, on_row):
            time.sleep(WAIT_SECONDS)


def _take_one(sweep: Sweep, state: State, on_row: Callable[[State, Row], None] | None) -> bool:
    """Run the first trial that is ready and that nobody else is at. Returns whether there was one."""
    claims = sweep.options.places.results / "claims"  # of all sweeps: two may share a trial
    for listed in state.open:
        if not state.is_ready(listed):
            continue
        with claim(claims, listed.id) as mine:
            if not mine:
                continue
            if sweep.row(listed.id) is not None:
                return True  # another process finished it a moment ago
            row = sweep.run_one(state, listed)
        state.rows[listed.id] = row
        if on_row:
            on_row(state, row)
        return True
    return False
