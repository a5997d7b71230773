"""Trials with the ids of their rows: how a sweep knows what is done already.

An id is a hash of what decides the result: the ids of the files that the weights are made of, and every setting that
acts. Settings that came later are left out where they are off, so that rows of older sweeps are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgolf_post.derived import derived_id
from pgolf_post.errors import PgolfError
from pgolf_post.sweep.quantizers import identity as quantizing_identity
from pgolf_post.sweep.settings import SweepSpec
from pgolf_post.sweep.trials import Trial
from pgolf_post.sweep.workbench import Workbench, versions

TRIAL_VERSION = 2


@dataclass(frozen=True)
class Listed:
    """A trial and the id that its row has, or will have."""

    trial: Trial
    id: str
    control_id: str


def trial_id(bench: Workbench, spec: SweepSpec, trial: Trial, control_id: str) -> str:
    """Return the id of a trial's row: of the ids of what its weights are made of, and every setting that acts."""
    settings = trial.settings
    data = None if settings.train else bench.calibration.data(spec, bench.weights.checkpoint(settings))
    identity = {
        "calibration": settings.calibration.model_dump(mode="json"),
        "weights": settings.model_dump(mode="json", include={"blend", "ema", "quantize", "jitter_seed"}),
        "plan": quantizing_identity(spec, settings),
        "codec": settings.codec,
        "ttt": settings.ttt,
        "stages": spec.stages.identity(),
        "deciding": [spec.ranking, spec.noise_repeats if trial.role != "noise" else 0],
        "budget": [spec.budget_bytes, list(spec.code), spec.gates.drop_if_over_budget],
        "role": trial.role,
        "control": control_id,
        "versions": versions(spec, settings),
        **({"data": data.manifest_sha256} if data else {}),
    }
    return derived_id("trial", TRIAL_VERSION, bench.weights.source_ids(settings), identity)


def list_trials(bench: Workbench, spec: SweepSpec, trials: Sequence[Trial]) -> list[Listed]:
    """Return trials with their ids. One that cannot be named gets an id of its error, so that it can have a row."""
    listed, controls = [], dict[str, str]()
    for trial in trials:
        control_id = controls.get(trial.group, "")
        try:
            own_id = trial_id(bench, spec, trial, control_id)
        except PgolfError as error:
            if trial.role == "control":
                raise
            identity = {"settings": trial.settings.facts(), "error": str(error)}
            own_id = derived_id("trial", TRIAL_VERSION, [control_id], identity)
        if trial.role == "control":
            controls[trial.group] = control_id = own_id
        listed.append(Listed(trial, own_id, control_id))
    return listed
