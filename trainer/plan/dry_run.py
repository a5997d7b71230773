"""`--dry-run`: the timeline of a run as a table, from a given step time or from four real steps, and its findings.

Measuring takes two steps without loops and two with all of them, because a step gets slower when they start, and keeps
the faster of each pair: the first also pays for warming up. Under a cap in seconds, what must follow the last step
inside it is measured too. Nothing is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pgolf_post.base.progress import print_table, say
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.families import on_no_device
from trainer.config import Recipe
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT
from trainer.optim.optimizer import step_groups
from trainer.optim.tensor_groups import in_words as in_groups
from trainer.plan.costs import Costs, Wanted, check_bytes, costs_of, show_costs
from trainer.plan.disk import check_free, disk_need, free_bytes
from trainer.plan.preflight import Finding, preflight
from trainer.plan.timeline import Timeline, predict
from trainer.run.loop import Trainer
from trainer.run.measuring import measure_reserve
from trainer.run.reserve import Reserve
from trainer.schedule.step_times import StepTimes, num_visits
from trainer.start.building import new_model
from trainer.start.init_from import Start, show_start, start_from_checkpoint
from trainer.step.future_heads import with_heads
from trainer.step.loss import in_words
from trainer.step.meta_ttt import require_halves
from trainer.step.objective import Objective
from trainer.step.qat import rounding_of


def measure_times(recipe: Recipe) -> tuple[StepTimes, Reserve | None]:
    """Measure step times and, under a cap, the reserve, on a model that is thrown away."""
    trainer = Trainer(recipe)
    return _measure_step_times(trainer), measure_reserve(trainer.state, trainer.gradients)


def _measure_step_times(trainer: Trainer) -> StepTimes:
    """Return the seconds of a step, measured on four real steps, or on two if the model has no loops."""
    recipe = trainer.recipe
    num_loops = recipe.model.max_active_loops
    say(f"measuring steps of {recipe.data.batch_tokens:,} tokens on {trainer.state.device}")
    plain = _step_seconds(trainer)
    if not num_loops:
        return StepTimes(plain, plain, "measured")
    trainer.state.set_active_loops(num_loops)
    looped = _step_seconds(trainer)
    if looped < plain:
        say(f"{looped:.4g} s with loops, {plain:.4g} s without: other work disturbs the measurement; taking the longer")
    return StepTimes(plain, max(plain, looped), "measured")


def _step_seconds(trainer: Trainer) -> float:
    """Return the seconds of the faster of two steps."""
    ends = [trainer.state.train_seconds]
    for _ in range(2):
        trainer.timed_step(1.0)
        ends.append(trainer.state.train_seconds)
    return min(ends[1] - ends[0], ends[2] - ends[1])


def validation_tokens(recipe: Recipe) -> int | None:
    """Return the number of tokens of the validation split; None where the data folder is not here."""
    if not recipe.data.dir.is_dir():
        return None
    return sum(len(shard) for _, shard in DataFolder.open(recipe.data.dir).shards("val"))


@dataclass(frozen=True)
class DryRun:
    """The prediction of a run, and the findings on it."""

    timeline: Timeline
    findings: list[Finding]
    costs: Costs | None  # None where the data folder is not here
    start: Start | None = None  # from another model's weights


def dry_run(recipe: Recipe, times: StepTimes, reserve: Reserve | None = None, wanted: Wanted | None = None) -> DryRun:
    """Predict and check a run, show both, and return them. A missing reserve is estimated.

    Raises SettingsError or NotFoundError for a plan or code of `wanted` that cannot be read, SettingsError for a loss
    that the vocabulary does not have, micro-batches that do not halve, or groups of tensors that the model does not
    have, MismatchError for a start that no rule covers.
    """
    check_loss(recipe)
    require_halves(recipe, world_size=1)  # what one rank cannot halve, several cannot
    changes = check_model(recipe)
    start = start_of(recipe) if recipe.init.is_on else None
    timeline = predict(recipe, times, reserve)
    findings = preflight(timeline, validation_tokens(recipe))
    costs = costs_of(timeline, wanted or Wanted())
    show(timeline)
    if start is not None:
        show_start(start)
    for line in changes:
        say(line)
    if costs is not None:
        show_costs(costs)
        refused = check_bytes(costs)
        findings = [*([refused] if refused else []), *findings]
    elif wanted is not None and wanted.plan is not None:
        raise NotFoundError(f"--plan needs the vocabulary, and there is no data folder {recipe.data.dir}")
    if need := disk_need(timeline):
        free = free_bytes(recipe)
        say(f"disk: {need}; {free / 1e9:.1f} GB free")
        refused = check_free(need, free, recipe.run.checkpoint_root)
        findings = [*([refused] if refused else []), *findings]
    for finding in findings:
        say(str(finding))
    return DryRun(timeline, findings, costs, start)


def check_loss(recipe: Recipe) -> None:
    """Raise SettingsError if settings of the loss name what the vocabulary, where the data is here, does not have."""
    if recipe.loss.is_on and recipe.data.dir.is_dir():
        Objective(recipe.loss, recipe.model.num_heads, DataFolder.open(recipe.data.dir), torch.device("cpu"))


def start_of(recipe: Recipe) -> Start:
    """Return the start that a recipe's run would have from another model, in a model that is thrown away."""
    data = DataFolder.open(recipe.data.dir)
    return start_from_checkpoint(new_model(recipe, data, torch.device("cpu"), None), recipe.init, data)


def check_model(recipe: Recipe) -> list[str]:
    """Return in words how tensors step and are rounded, where the recipe says so and the data is here.

    Raises SettingsError or NotFoundError for groups or a plan that cannot act on the model.
    """
    if not (recipe.optim.groups or recipe.qat or recipe.loss.future_tokens) or not recipe.data.dir.is_dir():
        return []
    with on_no_device():
        model = GolfGPT(recipe.model_config_in(DataFolder.open(recipe.data.dir)), GraphState())
    lines = []
    trained = with_heads(recipe, model)
    sizes = {name: parameter.numel() for name, parameter in trained.named_parameters()}
    for group in step_groups(trained, recipe.optim) if recipe.optim.groups else ():
        lines.append(f"optim.groups: {in_groups(group, sum(sizes[name] for name in group.names))}")
    if rounding := rounding_of(recipe, model):
        lines.append(f"qat: {rounding.in_words()}")
    return lines


def require_no_refusal(findings: list[Finding], source: str) -> None:
    """Raise SettingsError if a check refused the recipe."""
    refused = [finding for finding in findings if finding.level == "refuse"]
    if refused:
        keys = ", ".join(dict.fromkeys(finding.key for finding in refused))
        raise SettingsError(
            f"{source}: {len(refused)} setting{'s' * (len(refused) != 1)} cannot act in this run: {keys}",
            hint="change them (--set KEY=VALUE) and run --dry-run again",
        )


def show(timeline: Timeline) -> None:
    """Show the boundaries as a table, then the times that they rest on."""
    groups = list(timeline.boundaries[0].lr)
    header = ("phase", "step", "second", "progress", "lr ×", *(f"lr {group}" for group in groups))
    rows = [
        (
            each.phase, f"{each.step:,}", f"{each.second:,.1f}", f"{each.progress:.3f}", f"{each.lr_multiplier:.3f}",
            *(f"{lr:.3g}" for lr in each.lr.values()),
            f"{each.weight_decay_multiplier:.3g}", f"{each.momentum:.3f}", str(each.active_loops),
            "yes" if each.checkpoint else "",
        )
        for each in timeline.boundaries
    ]  # fmt: skip
    title = f"dry run of {timeline.recipe.run.name}: nothing is trained, nothing is written"
    print_table(title, (*header, "decay ×", "momentum", "loops", "saved"), rows)
    say(f"{_times_line(timeline)}; {_totals_line(timeline)}")
    if timeline.recipe.loss.is_on:
        say(f"loss: {in_words(timeline.recipe.loss)}; the metric stays plain nats")
    if timeline.reserve:
        say(_cap_line(timeline, timeline.reserve))


def _times_line(timeline: Timeline) -> str:
    """Return a line with the step times and where they come from."""
    times, model = timeline.times, timeline.recipe.model
    line = f"step time {times.plain:.4g} s ({times.origin})"
    if model.max_active_loops:
        visits = num_visits(model, 0), num_visits(model, model.max_active_loops)
        line += f", {times.looped:.4g} s with all loops ({visits[1]} block visits instead of {visits[0]})"
    if sizes := [f"{stage.batch_tokens:,} tokens from {stage.at:g} on" for stage in timeline.recipe.stages[1:]]:
        line += f", in proportion to tokens in later stages ({', '.join(sizes)})"
    return line


def _cap_line(timeline: Timeline, reserve: Reserve) -> str:
    """Return a line with the parts that the cap is spent on."""
    end, line = timeline.seconds, f"cap {timeline.recipe.schedule.seconds:g} s: {reserve}"
    if reserve.hessians is None:
        return f"{line}; training ends at {end:,.1f} s (Hessians inside the cap: schedule.hessian_seconds)"
    return f"{line}; training ends at {end:,.1f} s, Hessians at {end + reserve.after_last_step:,.1f} s"


def _totals_line(timeline: Timeline) -> str:
    """Return a line with steps, tokens, seconds and checkpoints of the run."""
    steps, periodic = timeline.clock.end_step, timeline.num_periodic
    tokens = timeline.clock.tokens(steps)
    return (
        f"{steps:,} steps, {tokens:,} tokens, {timeline.seconds:,.1f} s of training (ends by {timeline.ends_by}), "
        f"{timeline.num_checkpoints} checkpoints" + (f" and {periodic} periodic" if periodic else "")
    )


def answer(found: DryRun) -> dict[str, Any]:
    """Return the dry run as the JSON object of --json."""
    timeline, findings = found.timeline, found.findings
    times, steps = timeline.times, timeline.clock.end_step
    return {
        "dry_run": True,
        "steps": steps,
        "seconds": timeline.seconds,
        "tokens": timeline.clock.tokens(steps),
        "ends_by": timeline.ends_by,
        "step_seconds": {"plain": times.plain, "looped": times.looped, "origin": times.origin},
        "reserve": asdict(timeline.reserve) if timeline.reserve else None,
        "boundaries": [asdict(boundary) for boundary in timeline.boundaries],
        "disk_bytes": asdict(need) if (need := disk_need(timeline)) else None,
        "never": list(timeline.never),
        **({"loss": timeline.recipe.loss.settings_on()} if timeline.recipe.loss.is_on else {}),
        **({"init": found.start.facts()} if found.start else {}),
        **({"costs": found.costs.facts()} if found.costs else {}),
        "findings": [asdict(finding) for finding in findings],
    }
