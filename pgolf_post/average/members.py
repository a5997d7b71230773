"""Members: the checkpoints of a run that take part in an average.

SWA (Izmailov et al. 2018, arXiv 1803.05407) averages points along the end of training. Which points is a choice: those
from the warm-down on (the default), the last n, those at named steps, or all from some phase on; each with the same
share, or with shares in given proportions.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgolf_post.average.settings import Selection
from pgolf_post.checkpoint import Checkpoint, run_checkpoints
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError

WARMDOWN = "warmdown"
INTERRUPTED = "interrupted"  # phase of a checkpoint saved because the run was asked to stop, wherever that was
SAVE_MORE = 'train with checkpoint.phases including "warmdown_start", or checkpoint.fractions = [0.7, 0.85]'


def select_members(final: Checkpoint, selection: Selection) -> list[Checkpoint]:
    """Return the members among the run's checkpoints up to `final`, in step order. Raises NotFoundError.

    Checkpoints of interruptions take part only where their steps are named: a run's average does not depend on them.
    """
    saved = [c for c in run_checkpoints(final) if int(c.meta["step"]) <= int(final.meta["step"])]
    if selection.steps is not None:
        return [_at_step(saved, step, final) for step in sorted(selection.steps)]
    saved = [c for c in saved if c.meta["phase"] != INTERRUPTED or c.path == final.path]
    if selection.last is not None:
        if len(saved) < selection.last:
            raise NotFoundError(f"{_run(final, saved)}: there are no {selection.last} of them", hint=SAVE_MORE)
        return saved[-selection.last :]
    return _from_phase(final, saved, selection.phase or WARMDOWN)


def member_shares(members: Sequence[Checkpoint], selection: Selection) -> list[float]:
    """Return each member's share of their average; they sum to 1. Raises SettingsError on a wrong number of shares."""
    if selection.shares is None:
        return [1 / len(members)] * len(members)
    if len(selection.shares) != len(members):
        names = ", ".join(member.path.name for member in members)
        raise SettingsError(f"{len(selection.shares)} shares for {len(members)} members: {names}")
    return [share / sum(selection.shares) for share in selection.shares]


def _at_step(saved: Sequence[Checkpoint], step: int, final: Checkpoint) -> Checkpoint:
    at_step = [c for c in saved if int(c.meta["step"]) == step]
    if not at_step:
        raise NotFoundError(f"{_run(final, saved)}: none at step {step}")
    if len({c.view_id("raw") for c in at_step}) > 1:
        raise MismatchError(f"several different checkpoints at step {step}: {', '.join(c.path.name for c in at_step)}")
    return at_step[0]


def _from_phase(final: Checkpoint, saved: Sequence[Checkpoint], phase: str) -> list[Checkpoint]:
    """Return the members from a phase on: from the recipe's warm-down, else from the checkpoint named so."""
    schedule = final.meta.get("recipe", {}).get("schedule", {})
    if phase == WARMDOWN and "warmdown" in schedule:
        start = 1.0 - float(schedule["warmdown"])
        members = [c for c in saved if float(c.meta.get("progress", 0.0)) >= start - 1e-9]
        where = f"from its warm-down on (progress ≥ {start:.2f})"
    else:
        wanted = {phase, "warmdown_start"} if phase == WARMDOWN else {phase}
        first = next((i for i, c in enumerate(saved) if wanted & set(str(c.meta["phase"]).split("+"))), len(saved))
        members, where = list(saved[first:]), f"from phase {phase!r} on"
    if len(members) < 2:
        raise NotFoundError(f"{_run(final, saved)}: {len(members)} of them {where}; SWA needs 2", hint=SAVE_MORE)
    return members


def _run(final: Checkpoint, saved: Sequence[Checkpoint]) -> str:
    steps = ", ".join(f"{c.meta['step']} ({c.meta['phase']})" for c in saved)
    return f"{final.path.parent} has {len(saved)} checkpoint(s) up to {final.path.name}: {steps}"
