"""One clock for the whole chain: the seconds of every phase from the first step of training to the last scored token.

Stages record their own seconds where they work; here they stand in one list, with what each limit counts of them.
*Strict* counts of the training limit every phase of the run (loading, compiling, checkpoints too) and the making of the
artifact, by *convention* only what reads training data. Of the evaluation limit, strict counts every phase of scoring,
convention scoring and adapting alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pgolf_post.score.phase_times import CONVENTION
from pgolf_post.submit.seeds import Seed

Limit = Literal["training", "evaluation"]
LIMIT_SECONDS = 600.0
UNLIMITED = ("scoring",)  # of a run: recorded metrics, which no submission needs


@dataclass(frozen=True)
class ChainPhase:
    """One phase of the chain."""

    name: str
    seconds: float
    limit: Limit
    by_convention: bool  # counted by convention, too; strictly every phase is
    reads_training_data: bool = False

    def facts(self) -> dict[str, Any]:
        """Return the phase as JSON."""
        return dict(vars(self))


def chain(seed: Seed, evaluation: Mapping[str, float] | None = None) -> list[ChainPhase]:
    """Return the phases of a seed in order, as far as they are recorded; `evaluation` as of one score."""
    phases = [*_run_phases(seed), *_making(seed)]
    for name, seconds in (evaluation or {}).items():
        if name not in ("strict", "convention"):
            phases.append(ChainPhase(name, seconds, "evaluation", name in CONVENTION))
    return phases


def _run_phases(seed: Seed) -> list[ChainPhase]:
    """Return the phases of the training run, which the trainer's clock wrote."""
    times = (seed.run.meta if seed.run else {}).get("ledger") or {}
    phases = []
    for name, phase in (times.get("phases") or {}).items():
        if phase["seconds"] and name not in UNLIMITED:
            reads = bool(phase["reads_training_data"])
            phases.append(ChainPhase(f"training: {name}", float(phase["seconds"]), "training", reads, reads))
    return phases


def _making(seed: Seed) -> list[ChainPhase]:
    """Return what was done between training and the artifact: what read training data, then the rest of its stage."""
    reading = {
        name: each for name, each in (seed.training_seconds() or seed.later_seconds()).items() if name != "training"
    }
    phases = [ChainPhase(name, seconds, "training", True, True) for name, seconds in reading.items()]
    inside = sum(seconds for name, seconds in reading.items() if name != "statistics")
    rest = float(seed.meta.get("seconds", 0.0)) - inside
    return [*phases, ChainPhase("quantize and compress", round(max(rest, 0.0), 3), "training", False)]


def sums(phases: Sequence[ChainPhase]) -> dict[str, float]:
    """Return strict and by-convention seconds against each limit, and what reads training data."""
    found: dict[str, float] = {}
    for limit in ("training", "evaluation"):
        own = [phase for phase in phases if phase.limit == limit]
        found[f"{limit}_strict_seconds"] = round(sum(phase.seconds for phase in own), 3)
        found[f"{limit}_convention_seconds"] = round(sum(phase.seconds for phase in own if phase.by_convention), 3)
    found["training_data_seconds"] = round(sum(phase.seconds for phase in phases if phase.reads_training_data), 3)
    return found


def chain_rows(phases: Sequence[ChainPhase]) -> list[tuple[str, str, str, str, str]]:
    """Return phases and their sums as rows: phase, seconds, limit, reads training data, by convention."""
    rows: list[tuple[str, str, str, str, str]] = [
        (
            phase.name,
            f"{phase.seconds:,.1f}",
            phase.limit,
            "yes" if phase.reads_training_data else "",
            "yes" if phase.by_convention else "",
        )
        for phase in phases
    ]
    for name, seconds in sums(phases).items():
        if name != "training_data_seconds":
            limit, how, _ = name.split("_")
            rows.append((f"{limit} in all, {how}", f"{seconds:,.1f}", f"{LIMIT_SECONDS:.0f}", "", ""))
    return rows


CHAIN_HEADER = ("phase", "seconds", "limit", "reads training data", "by convention")
