"""Checks of a predicted timeline, which find what is wrong with a run before it is paid for.

A check yields findings. "refuse" is for a setting that can never act (a boundary after the end, a warm-up longer than
the run): its result would be reported as a null result. "warn" is for what is probably not meant. Each names the key,
its value, the limit and a way out. The checks, in the order of CHECKS:

    boundaries that the run's end comes before      refuse    loops_at, warmdown, fractions, steps, …
    momentum                                        refuse    warm-up longer than the run; warn: cycle longer than it
    loops                                           refuse    a two-phase curriculum without two repeats
    ema                                             refuse    never updated; warn: a decay that its warm-up hides
    swa                                             refuse    fewer than two models; warn: models of two graphs
    power_ema                                       refuse    fewer steps than snapshots
    periodic                                        refuse    a period longer than the run
    cap                                             refuse    Hessians that end after it; warn: a last step that does
    stop                                            refuse    a log to compare with that has no loss; warn: too short
    meta_ttt                                        refuse    no step that adapts first
    speed                                           refuse    slower than run.min_tokens_per_second
    limits                                          warn      schedule.steps that schedule.seconds comes before
    scoring                                         warn      checkpoints that take over 5 % of the run's time
    averaging                                       warn      fewer than two checkpoints in the warm-down
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pgolf_post.errors import PgolfError
from trainer.optim.averages import decay_acts_from, warmup_decay
from trainer.optim.tensor_groups import freeze_moments
from trainer.plan.timeline import Boundary, Timeline, count_steps, reaches
from trainer.run.phases import fraction_name
from trainer.run.stopping import StopWatch
from trainer.schedule.functions import warmdown_start

MAX_SCORING_SHARE = 0.05  # of the training time
FORWARD_SPEEDUP = 3.0  # scoring runs the forward pass alone, about a third of a training step


@dataclass(frozen=True)
class Finding:
    """A refusal or warning of one check."""

    level: Literal["refuse", "warn"]
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


def preflight(timeline: Timeline, val_tokens: int | None = None) -> list[Finding]:
    """Return all findings, refusals first. `val_tokens` is the size of the validation split, where the data is here."""
    findings = [finding for check in CHECKS for finding in check(timeline)]
    findings += check_scoring(timeline, val_tokens)
    return sorted(findings, key=lambda finding: finding.level)


def _end(timeline: Timeline) -> str:
    """Return, for messages, where the run ends and by which limit."""
    end = timeline.clock.end_step
    limit, kept = getattr(timeline.recipe.schedule, timeline.ends_by), ""
    if timeline.ends_by == "seconds" and timeline.reserve and timeline.reserve.seconds:
        kept = f", {timeline.reserve.seconds:.3g} reserved"
    return f"the run ends after {end:,} step{'s' * (end != 1)} (schedule.{timeline.ends_by} {limit:g}{kept})"


# ---- refusals ------------------------------------------------------------------------------------------------------


def check_boundaries(timeline: Timeline) -> Iterator[Finding]:
    """Refuse settings whose moment the run's end comes before."""
    schedule, settings = timeline.recipe.schedule, timeline.recipe.checkpoint
    sources: dict[str, tuple[str, object]] = {
        "loops_on": ("schedule.loops_at", schedule.loops_at),
        "all_loops_on": ("schedule.all_loops_at", schedule.all_loops_at),
        "warmdown_start": ("schedule.warmdown", schedule.warmdown),
        "lr_warmup_done": ("schedule.lr_warmup", schedule.lr_warmup),
        "weight_decay_taper": ("schedule.weight_decay_taper_at", schedule.weight_decay_taper_at),
        "swa_start": ("optim.swa_start", timeline.recipe.optim.swa_start),
        **{fraction_name(fraction): ("checkpoint.fractions", fraction) for fraction in settings.fractions},
        **{f"step{step}": ("checkpoint.steps", step) for step in settings.steps},
        **{f"stage@{stage.at:g}": ("schedule.stages", stage.at) for stage in schedule.stages},
        "qat": ("qat.at", timeline.recipe.qat.at if timeline.recipe.qat else None),
        **freeze_moments(timeline.recipe.optim.groups),
    }
    for name in timeline.never:
        if name in sources:
            key, value = sources[name]
            yield Finding(
                "refuse", key, f"{key} {value}: {name} never comes; {_end(timeline)}; move it or leave it out"
            )


def check_momentum(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a momentum warm-up longer than the run; warn of a cycle longer than what follows it."""
    optim, end = timeline.recipe.optim, timeline.clock.end_step
    if optim.momentum_warmup_steps >= end:
        yield Finding(
            "refuse",
            "optim.momentum_warmup_steps",
            f"optim.momentum_warmup_steps {optim.momentum_warmup_steps:,} is not over before {_end(timeline)}; "
            f"momentum would only reach {optim.momentum_for(end - 1):.3f}; set it to a tenth of the run, for example "
            f"{max(end // 10, 0)}",
        )
    elif optim.momentum_cycle_steps and optim.momentum_cycle_steps > end - optim.momentum_warmup_steps:
        yield Finding(
            "warn",
            "optim.momentum_cycle_steps",
            f"optim.momentum_cycle_steps {optim.momentum_cycle_steps:,} is longer than the "
            f"{end - optim.momentum_warmup_steps:,} steps after momentum warm-up: not one cycle is completed",
        )


def check_loops(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a two-phase curriculum of fewer than two extra visits."""
    wanted, num_loops = timeline.recipe.schedule.all_loops_at, timeline.recipe.model.max_active_loops
    if wanted is not None and num_loops < 2:
        yield Finding(
            "refuse",
            "schedule.all_loops_at",
            f"schedule.all_loops_at {wanted} acts only with model.num_loops of 2 or more, which is {num_loops}",
        )


def check_ema(timeline: Timeline) -> Iterator[Finding]:
    """Refuse an EMA that is never updated; warn of a decay that its warm-up hides.

    The decay at step t is min(ema_decay, (1+t)/(10+t)). While the second is the smaller, every decay makes the same
    average, in which the weights of step t count as t⁸.
    """
    optim, end = timeline.recipe.optim, timeline.clock.end_step
    if not optim.ema_decay:
        return
    acts_from = decay_acts_from(optim.ema_decay, optim.ema_every)
    if optim.ema_every > end:
        yield Finding("refuse", "optim.ema_every", f"optim.ema_every {optim.ema_every:,}: {_end(timeline)}, no update")
    elif acts_from > end:
        yield Finding(
            "warn",
            "optim.ema_decay",
            f"optim.ema_decay {optim.ema_decay} never acts: the decay is at most (1+t)/(10+t) at step t, so this one "
            f"acts from step {acts_from:,} on, and {_end(timeline)}; decays above {warmup_decay(end):.4f} are all the "
            "same here, take a smaller one",
        )


def check_swa(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a running mean of fewer than two models; warn of one that mixes two graphs."""
    recipe, start = timeline.recipe, timeline.recipe.optim.swa_start
    if start is None or "swa_start" in timeline.never:
        return
    count = count_steps(timeline.clock, lambda step, at: at >= start, recipe.optim.swa_every)
    if count < 2:
        yield Finding(
            "refuse",
            "optim.swa_every",
            f"optim.swa_every {recipe.optim.swa_every:,} from optim.swa_start {start} on averages {count} "
            f"model{'s' * (count != 1)}, at least 2; {_end(timeline)}; start earlier or average more often",
        )
    max_loops = recipe.model.max_active_loops
    full = next((boundary for boundary in timeline.boundaries if boundary.active_loops == max_loops), None)
    if full and start < full.progress:
        yield Finding(
            "warn",
            "optim.swa_start",
            f"optim.swa_start {start} comes before all loops are on at {full.progress:.3f}: the mean would mix "
            "models that were trained as different graphs",
        )


def check_power_ema(timeline: Timeline) -> Iterator[Finding]:
    """Refuse more snapshots of power-function averages than the run has steps."""
    optim, end = timeline.recipe.optim, timeline.clock.end_step
    if optim.power_ema_sigmas and optim.power_ema_snapshots > end:
        yield Finding(
            "refuse",
            "optim.power_ema_snapshots",
            f"optim.power_ema_snapshots {optim.power_ema_snapshots}: {_end(timeline)}, fewer than snapshots; take "
            "fewer, or none with optim.power_ema_sigmas = []",
        )


def check_periodic(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a period of checkpoints that is longer than the run."""
    settings = timeline.recipe.checkpoint
    for key, period, length in (
        ("every_steps", settings.every_steps, timeline.clock.end_step),
        ("every_seconds", settings.every_seconds, timeline.seconds),
    ):
        if period is not None and period >= length:
            yield Finding(
                "refuse",
                f"checkpoint.{key}",
                f"checkpoint.{key} {period:g}: {_end(timeline)}, before the first; shorten it or leave it out",
            )


def check_meta_ttt(timeline: Timeline) -> Iterator[Finding]:
    """Refuse steps that adapt first of which the run has none."""
    settings = timeline.recipe.meta_ttt
    if settings and settings.every > timeline.clock.end_step:
        yield Finding(
            "refuse",
            "meta_ttt.every",
            f"meta_ttt.every {settings.every:,}: {_end(timeline)}, before the first; take fewer, or leave it out",
        )


def check_speed(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a run that run.min_tokens_per_second would stop."""
    minimum = timeline.recipe.run.min_tokens_per_second
    rate = timeline.recipe.data.batch_tokens / timeline.times.plain
    if minimum is not None and rate < minimum:
        yield Finding(
            "refuse",
            "run.min_tokens_per_second",
            f"run.min_tokens_per_second {minimum:,.0f}: {timeline.times.plain:.4g} s a step is {rate:,.0f} tokens/s; "
            "the run would be stopped within its first 30 steps",
        )


def check_cap(timeline: Timeline) -> Iterator[Finding]:
    """Refuse Hessians that would end after schedule.seconds; warn of a last step that would."""
    schedule, reserve, end = timeline.recipe.schedule, timeline.reserve, timeline.seconds
    if schedule.seconds is None or reserve is None:
        return
    last, hessians = end + reserve.after_last_step, reserve.hessians
    if last <= schedule.seconds + 1e-6:
        return
    way_out = f'set it to "auto" or to at least {math.ceil(100 * reserve.needed) / 100:g}'
    if hessians:
        yield Finding(
            "refuse",
            "schedule.reserve_seconds",
            f"schedule.reserve_seconds {reserve.seconds:g}: Hessians would end at {last:,.1f} s, after "
            f"schedule.seconds {schedule.seconds:g}: training ends at {end:,.1f} s, Hessians take {hessians:,.3g} s; "
            f"{way_out}",
        )
    else:
        yield Finding(
            "warn",
            "schedule.reserve_seconds",
            f"schedule.reserve_seconds {reserve.seconds:g}: the last step and its snapshot would end at {last:,.2f} s, "
            f"after schedule.seconds {schedule.seconds:g}; {way_out}",
        )


def check_stop(timeline: Timeline) -> Iterator[Finding]:
    """Refuse a log to compare with that cannot be read; warn of a moment that it does not reach."""
    settings = timeline.recipe.stop
    try:
        reference = StopWatch(settings, progress=0.0).reference
    except PgolfError as error:
        yield Finding("refuse", "stop.against", f"stop.against: {error}")
        return
    if reference is None:
        return
    end = float(reference.along(settings.by)[-1])
    for moment in settings.at:
        step = timeline.clock.first_step(reaches(moment)) or timeline.clock.end_step
        places = {"step": step, "tokens": timeline.clock.tokens(step), "seconds": timeline.clock.second(step)}
        if places[settings.by] > end:
            yield Finding(
                "warn",
                "stop.against",
                f"stop.against {settings.against} ends at {end:,g} {settings.by}, before stop.at {moment:g} of this "
                f"run ({places[settings.by]:,g} {settings.by}): there the run is not compared",
            )


# ---- warnings ------------------------------------------------------------------------------------------------------


def check_limits(timeline: Timeline) -> Iterator[Finding]:
    """Warn of a schedule.steps that schedule.seconds comes before."""
    schedule, end = timeline.recipe.schedule, timeline.clock.end_step
    if schedule.steps and end < schedule.steps:
        yield Finding(
            "warn",
            "schedule.steps",
            f"schedule.steps {schedule.steps:,} will not be reached: {_end(timeline)}, {end / schedule.steps:.0%} of "
            "them; schedules follow the seconds and still complete, settings in steps may not",
        )


def check_averaging(timeline: Timeline) -> Iterator[Finding]:
    """Warn where swa-blend would find fewer than two checkpoints in the warm-down, and no running mean is kept."""
    if timeline.recipe.optim.swa_start is not None:
        return
    start = warmdown_start(timeline.recipe.schedule)
    saved = [boundary for boundary in timeline.boundaries if boundary.checkpoint]
    members = {boundary.step for boundary in saved if boundary.progress >= start - 1e-9}
    if len(members) < 2:
        yield Finding(
            "warn",
            "checkpoint.fractions",
            f"nothing to average: {len(members)} checkpoint from progress {start:.3f} on, swa-blend needs 2; add "
            "checkpoint.fractions = [0.7, 0.85], the phase warmdown_start, or optim.swa_start",
        )


def check_scoring(timeline: Timeline, val_tokens: int | None) -> Iterator[Finding]:
    """Warn of recorded metrics that cost much beside training."""
    metric_tokens = timeline.recipe.checkpoint.metric_tokens or val_tokens
    if metric_tokens is None:
        yield Finding(
            "warn",
            "checkpoint.metric_tokens",
            "checkpoint.metric_tokens is not set: every checkpoint scores the whole validation split, whose size is "
            "not known here; set it, for example to 65536",
        )
        return
    seconds = scoring_seconds(timeline, metric_tokens)
    if seconds > MAX_SCORING_SHARE * timeline.seconds:
        yield Finding(
            "warn",
            "checkpoint.metric_tokens",
            f"scoring {metric_tokens:,} tokens at {len(_scored(timeline))} checkpoints costs about {seconds:,.1f} s "
            f"beside {timeline.seconds:,.1f} s of training, more than {MAX_SCORING_SHARE:.0%}; lower "
            'checkpoint.metric_tokens, write fewer checkpoints, or score the last alone: checkpoint.metric = "final"',
        )


def scoring_seconds(timeline: Timeline, metric_tokens: int) -> float:
    """Return about how many seconds the recorded metrics of all checkpoints take."""
    recipe = timeline.recipe
    seconds = 0.0
    for boundary in _scored(timeline):
        rate = recipe.data.batch_tokens / timeline.times.of(recipe.model, boundary.active_loops) * FORWARD_SPEEDUP
        seconds += _num_views(timeline, boundary) * metric_tokens / rate
    return seconds


def _scored(timeline: Timeline) -> list[Boundary]:
    """Return the boundaries whose folders are scored; the last stands for every periodic checkpoint too."""
    folders = list({boundary.step: boundary for boundary in timeline.boundaries if boundary.checkpoint}.values())
    if timeline.recipe.checkpoint.metric == "final":
        return folders[-1:]
    return folders + folders[-1:] * timeline.num_periodic


def _num_views(timeline: Timeline, boundary: Boundary) -> int:
    """Return the number of views in the folder written at a boundary."""
    optim = timeline.recipe.optim
    return 1 + bool(optim.ema_decay) + (optim.swa_start is not None and boundary.progress > optim.swa_start)


CHECKS: tuple[Callable[[Timeline], Iterator[Finding]], ...] = (
    check_boundaries,
    check_momentum,
    check_loops,
    check_ema,
    check_swa,
    check_power_ema,
    check_periodic,
    check_cap,
    check_meta_ttt,
    check_speed,
    check_stop,
    check_limits,
    check_averaging,
)
