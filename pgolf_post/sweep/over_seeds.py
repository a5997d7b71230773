"""Trials that train with several seeds, as a run for each: a row of its own, compared with the control of its seed.

With rungs, every trial is there once for each rung, at that rung's length; state.py says which of them are run. Runs
stand seed by seed, so that a sweep that is stopped early has compared all trials by some seeds instead of some trials
by all. Noise repeats are left out: what rounding does is a part of what seeds do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pgolf_post.errors import SettingsError
from pgolf_post.sweep.settings import TrialSettings
from pgolf_post.sweep.train_stage import Halving, Rung, TrainStage
from pgolf_post.sweep.trials import Trial


def over_seeds(trials: Sequence[Trial], halving: Halving | None) -> list[Trial]:
    """Return a base's trials, its control first, with a run for each seed (and rung). Raises SettingsError."""
    rungs: Sequence[Rung | None] = (None,)
    if halving is not None:
        for trial in trials:
            _require_rungs(trial, halving)
        rungs = halving.rungs
    elif not any(_seeds(trial) for trial in trials):
        return list(trials)
    spread: list[Trial] = []
    for number, rung in enumerate(rungs):
        last = number == len(rungs) - 1
        there = [_at_rung(trial, number, rung) for trial in trials if trial.role != "baseline" or last]
        spread += _by_seed(there, several=len(rungs) > 1)
    return spread


def _require_rungs(trial: Trial, halving: Halving) -> None:
    """Raise SettingsError unless a trial can be trained at every rung."""
    wanted = max(rung.seeds for rung in halving.rungs)
    if len(_seeds(trial)) < wanted:
        raise SettingsError(
            f"[halving] takes up to {wanted} seeds of every trial, and {trial.name!r} has {len(_seeds(trial))}",
            hint='say them in the base: train = { recipe = "…", seeds = [1, 2, 3] }',
        )


def _seeds(trial: Trial) -> tuple[int, ...]:
    return trial.settings.train.seeds if trial.settings.train else ()


def _at_rung(trial: Trial, number: int, rung: Rung | None) -> Trial:
    if rung is None or trial.settings.train is None:
        return trial
    return replace(trial, rung=number, settings=_training(trial, trial.settings.train.at_rung(rung)))


def _training(trial: Trial, train: TrainStage) -> TrialSettings:
    return trial.settings.model_copy(update={"train": train})


def _by_seed(trials: Sequence[Trial], several: bool) -> list[Trial]:
    """Return runs seed by seed. A trial's seed that the control lacks is compared with the control's first."""
    control = trials[0]
    own = _seeds(control)
    runs: list[tuple[int, Trial]] = []
    for trial in trials:
        seeds = _seeds(trial)
        if not seeds:
            runs.append((0, replace(trial, group=_group(control, own[0], several) if own else trial.group)))
        elif trial.role != "noise":
            runs += [(place, run) for place, run in enumerate(_runs(trial, control, several))]
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]  # stable: the control stays first of its seed


def _runs(trial: Trial, control: Trial, several: bool) -> Iterator[Trial]:
    own, train = _seeds(control), trial.settings.train
    assert train is not None
    for seed in train.seeds:
        name = f"{trial.name}, rung {trial.rung + 1}, seed {seed}" if several else f"{trial.name}, seed {seed}"
        group = _group(control, seed if seed in own else own[0], several) if own else control.group
        settings = _training(trial, train.with_seed(seed))
        yield replace(trial, name=name, group=group, settings=settings, of=trial.name, seed=seed)


def _group(control: Trial, seed: int, several: bool) -> str:
    rung = f"rung {control.rung + 1} " if several else ""
    return f"{control.group} {rung}seed {seed}".strip()
