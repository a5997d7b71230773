"""The trials that a sweep's file stands for.

A trial is the base settings with some of them changed. A change is addressed by a dotted key: one that begins with a
field of `TrialSettings` (`calibration.tokens`, `blend.ema_share`, `fit.budget`, `codec`) changes that; any other is a
change of the quantization plan, as `requant --set` takes it (`mlp.clip`, `*.hessian_lambda`, `lqer.top_k`).
`RULE@3.clip` changes the rule for block 3 alone and `RULE@each.clip` stands for one trial per block.

    [grid]  the product of its lists        [each]  one list at a time        [[trials]]  by name

The control, the base settings unchanged, is always the first trial; one that equals it is that very trial.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgolf_post.errors import SettingsError
from pgolf_post.settings import apply_override, canonical_json, parse_settings, read_toml
from pgolf_post.sweep.block_rules import EACH_BLOCK, trial_plan
from pgolf_post.sweep.over_seeds import over_seeds
from pgolf_post.sweep.settings import UNQUANTIZED, FitStage, SweepSpec, TrialSettings, is_of_plan
from pgolf_post.sweep.trials import Trial


def read_spec(path: Path, overrides: Iterable[str] = ()) -> SweepSpec:
    """Read a sweep's TOML file, with `key.path=value` overrides. Raises SettingsError, NotFoundError."""
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    base = {key: tree.pop(key) for key in list(tree) if key in TrialSettings.model_fields}
    tree["base"] = {**tree.get("base", {}), **base}
    spec = parse_settings(SweepSpec, tree, str(path))
    for trial in expand(spec, lambda _: 1):  # whatever is wrong with a trial's settings is said before any work
        content_of(trial.settings)
    return spec


def flat_lists(tree: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, list[Any]]:
    """Return `{"mlp": {"clip": [10, 11]}}` as `{"mlp.clip": [10, 11]}`. Raises SettingsError for what is no list."""
    lists: dict[str, list[Any]] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lists |= flat_lists(value, where, f"{dotted}.")
        elif isinstance(value, list | tuple) and value:
            lists[dotted] = list(value)
        else:
            raise SettingsError(f"[{where}] {dotted} = {value!r}: expected a list of values")
    return lists


def expand(spec: SweepSpec, num_blocks: Callable[[TrialSettings], int]) -> list[Trial]:
    """Return all trials of a spec: for each checkpoint its control, baselines, noise repeats, and what was asked for.

    `num_blocks` says how many blocks a base's model has; it is asked only where `RULE@each` stands.
    Raises SettingsError for settings that cannot be used and for names that are used twice.
    """
    trials: list[Trial] = []
    for checkpoint in spec.checkpoints or (None,):
        base = spec.base if checkpoint is None else spec.base.with_change("checkpoint", checkpoint)
        several = len(spec.checkpoints) > 1
        trials += _of_base(spec, base, f"{checkpoint}: " if several else "", checkpoint or "", num_blocks)
    names = [trial.name for trial in trials]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"trials need different names; used twice: {', '.join(twice)}")
    return trials


def _of_base(
    spec: SweepSpec, base: TrialSettings, prefix: str, group: str, num_blocks: Callable[[TrialSettings], int]
) -> list[Trial]:
    control = Trial(f"{prefix}control", "control", base, group)
    asked = [_changed(base, prefix, group, *point) for point in _points(spec, base, num_blocks)]
    if base.set and all(settings.method == "fit" for settings in (base, *(trial.settings for trial in asked))):
        raise SettingsError(f"[set] {', '.join(base.set)}: every trial has method = 'fit', which reads no plan")
    own = content_of(base) if any(trial.axis for trial in asked) else b""
    twin = next((trial for trial in asked if trial.axis and content_of(trial.settings) == own), None)
    if twin:  # a point of an axis that changes nothing: the control itself lies there
        asked = [trial for trial in asked if trial is not twin]
        label = twin.name.removeprefix(prefix)
        control = replace(control, name=f"{prefix}control ({label})", changes=twin.changes, axis=twin.axis)
    baselines = [_baseline(base, prefix, group, name) for name in spec.baselines]
    noise = [
        Trial(f"{prefix}noise {n}", "noise", base.with_change("jitter_seed", n), group)
        for n in range(1, spec.noise_repeats + 1)
    ]
    return over_seeds([control, *baselines, *noise, *asked], spec.halving)


def content_of(settings: TrialSettings) -> bytes:
    """Return what settings come to, however they are written. Raises SettingsError for a plan that cannot be read."""
    rest = settings.model_dump(mode="json", exclude={"plan", "set", "fit"})
    if settings.method == "fit":
        return canonical_json({**rest, "fit": (settings.fit or FitStage()).identity()})
    return canonical_json({**rest, "plan": trial_plan(settings).identity()})


def _baseline(base: TrialSettings, prefix: str, group: str, name: str) -> Trial:
    if name == UNQUANTIZED:
        return Trial(f"{prefix}{UNQUANTIZED}", "baseline", base.with_change("quantize", False), group)
    by_preset = base.model_copy(update={"method": "plan", "fit": None, "plan": name, "set": {}})
    return Trial(f"{prefix}{name}", "baseline", by_preset, group)


Point = tuple[str, list[tuple[str, Any]], str]  # name, changes, axis


def _points(spec: SweepSpec, base: TrialSettings, num_blocks: Callable[[TrialSettings], int]) -> list[Point]:
    """Return every asked-for point: the grid's product, each list alone, the named trials."""
    grid, each = flat_lists(spec.grid, "grid"), flat_lists(spec.each, "each")
    points: list[Point] = []
    if grid:
        keys, last = list(grid), list(grid)[-1]
        for point in itertools.product(*grid.values()):
            changes = list(zip(keys, point, strict=True))
            points.append((_label(changes), changes, last))
    for key, values in each.items():
        for concrete in _blocks(key, base, num_blocks):
            points += [(_label([(concrete, value)]), [(concrete, value)], concrete) for value in values]
    for number, tree in enumerate(spec.trials):
        changes = list(_flat(tree))
        name = dict(changes).pop("name", None)
        if not isinstance(name, str) or not name:
            raise SettingsError(f"[[trials]] number {number + 1} has no name")
        points.append((name, [change for change in changes if change[0] != "name"], ""))
    return points


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _blocks(key: str, base: TrialSettings, num_blocks: Callable[[TrialSettings], int]) -> list[str]:
    if EACH_BLOCK not in key:
        return [key]
    rule, setting = key.split(EACH_BLOCK)
    if base.train and base.train.seeds:
        base = base.model_copy(update={"train": base.train.with_seed(base.train.seeds[0])})
    return [f"{rule}@{block}.{setting}" for block in range(num_blocks(base))]


def _changed(
    base: TrialSettings, prefix: str, group: str, name: str, changes: list[tuple[str, Any]], axis: str
) -> Trial:
    settings = base.with_changes(changes)
    idle = [key for key, _ in changes if is_of_plan(key)]
    if idle and settings.method == "fit":
        raise SettingsError(f"{name}: {', '.join(idle)} changes the plan, and method = 'fit' reads none")
    return Trial(f"{prefix}{name}", "trial", settings, group, tuple(changes), axis)


def _label(changes: list[tuple[str, Any]]) -> str:
    return ", ".join(f"{key.removeprefix('*.')} = {value}" for key, value in changes)
