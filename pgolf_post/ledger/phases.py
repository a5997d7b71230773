"""One clock for the whole chain: the seconds of every phase from the first step of training to the last scored token.

Stages record their own seconds where they work, in their meta.json. Here they stand in one list, with what each limit
of the challenge counts of them. *Strict* counts of the training limit every phase of the run (loading, compiling,
checkpoints too) and the making of the artifact, by *convention* only what reads training data. Of the evaluation
limit, strict counts every phase of scoring, convention scoring and adapting alone. A cap or budget that a command was
given stands beside its phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pgolf_post.ledger.lineage import ancestors

if TYPE_CHECKING:
    from pgolf_post.ledger.schema import Row

Limit = Literal["training", "evaluation"]
LIMIT_SECONDS: dict[Limit, float] = {"training": 600.0, "evaluation": 600.0}
SCORING = ("score", "adapt")  # phases of an evaluation that count by convention
UNLIMITED = ("scoring",)  # of a run: recorded metrics, which no submission needs
READS_TRAINING_TEXT = "train"  # source of a calibration
HEADER = ("phase", "seconds", "limit", "given", "reads training data", "by convention")


@dataclass(frozen=True)
class ChainPhase:
    """One phase of the chain."""

    name: str
    seconds: float
    limit: Limit
    by_convention: bool  # counted by convention, too; strictly every phase is
    reads_training_data: bool = False
    given_seconds: float | None = None  # the cap or budget of the command, for all phases that it counts

    def facts(self) -> dict[str, Any]:
        """Return the phase as JSON."""
        return dict(vars(self))


# ---- phases of what stages recorded ----------------------------------------------------------------------------------


def of_run(meta: Mapping[str, Any]) -> list[ChainPhase]:
    """Return the phases of a training run, which the trainer's clock wrote into a checkpoint's meta.json."""
    times, phases = meta.get("ledger") or {}, []
    for name, phase in (times.get("phases") or {}).items():
        if phase["seconds"] and name not in UNLIMITED:
            reads = bool(phase["reads_training_data"])
            given = times.get("cap_seconds") if reads else None
            phases.append(ChainPhase(f"training: {name}", float(phase["seconds"]), "training", reads, reads, given))
    return phases


def of_stats(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[ChainPhase]:
    """Return the phase of statistics; those of text that the model wrote itself read no training data."""
    reads = config.get("source") == READS_TRAINING_TEXT
    return [ChainPhase("statistics", float(meta["seconds"]), "training", reads, reads)] if "seconds" in meta else []


def of_artifact(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[ChainPhase]:
    """Return the phases of making an artifact but for its statistics: what read training data, then the rest.

    A sequential plan runs its text through every block that it has quantized, so quantizing reads it. An artifact of
    before its phases were recorded has one figure for the rest.
    """
    reading = {name: float(seconds) for name, seconds in reading_seconds(meta).items() if name != "statistics"}
    phases = [ChainPhase(name, seconds, "training", True, True) for name, seconds in reading.items()]
    if "phase_seconds" not in meta:
        rest = float(meta.get("seconds", 0.0)) - sum(reading.values())
        return [*phases, ChainPhase("quantize and compress", round(max(rest, 0.0), 3), "training", False)]
    for name, seconds in meta["phase_seconds"].items():
        reads = name == "quantize" and bool(config.get("sequential"))
        phases.append(ChainPhase(name, float(seconds), "training", reads, reads))
    return phases


def reading_seconds(meta: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of an artifact's steps, quantizing aside, that read training text; from its meta.json."""
    found = dict(meta.get("train_seconds") or {})
    distill = meta.get("distill") or {}
    if "seconds" in distill:
        found["distillation"] = float(distill["seconds"])
    return found


def of_score(meta: Mapping[str, Any]) -> list[ChainPhase]:
    """Return the phases of a score."""
    given = meta.get("time_budget")
    seconds = {key.removesuffix("_seconds"): float(value) for key, value in meta.items() if key.endswith("_seconds")}
    return [
        ChainPhase(name, spent, "evaluation", name in SCORING, given_seconds=given)
        for name, spent in seconds.items()
        if name not in ("strict", "convention")
    ]


# ---- phases of rows --------------------------------------------------------------------------------------------------


def phases_of(row: Row) -> list[ChainPhase]:
    """Return the phases that a row records."""
    return [ChainPhase(**phase) for phase in row.phases]


def chain_of(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return the rows of one chain in order: what a row was made of, itself, and of an artifact its longest score."""
    chain = [*ancestors(rows, row), row]
    if row.kind != "score":
        scores = [each for each in rows if each.kind == "score" and row.id in each.parents and each.phases]
        chain += sorted(scores, key=lambda each: int(each.result.get("tokens", 0)))[-1:]
    return [each for each in chain if each.phases]


# ---- sums ------------------------------------------------------------------------------------------------------------


def sums(phases: Sequence[ChainPhase]) -> dict[str, float]:
    """Return strict and by-convention seconds against each limit, and what reads training data."""
    found: dict[str, float] = {}
    for limit in LIMIT_SECONDS:
        own = [phase for phase in phases if phase.limit == limit]
        found[f"{limit}_strict_seconds"] = round(sum(phase.seconds for phase in own), 3)
        found[f"{limit}_convention_seconds"] = round(sum(phase.seconds for phase in own if phase.by_convention), 3)
    found["training_data_seconds"] = round(sum(phase.seconds for phase in phases if phase.reads_training_data), 3)
    return found


def phase_rows(phases: Sequence[ChainPhase]) -> list[tuple[str, ...]]:
    """Return phases and their sums as rows under HEADER."""
    rows: list[tuple[str, ...]] = [
        (
            phase.name,
            f"{phase.seconds:,.1f}",
            phase.limit,
            "" if phase.given_seconds is None else f"{phase.given_seconds:,.0f}",
            "yes" if phase.reads_training_data else "",
            "yes" if phase.by_convention else "",
        )
        for phase in phases
    ]
    found = sums(phases)
    for limit, seconds in LIMIT_SECONDS.items():
        for how in ("strict", "convention"):
            rows.append(
                (f"{limit} in all, {how}", f"{found[f'{limit}_{how}_seconds']:,.1f}", f"{seconds:.0f}", *[""] * 3)
            )
    return rows
