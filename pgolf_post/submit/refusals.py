"""The reasons for which a submission is refused, each with its name; a draft may have some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgolf_post.errors import OverBudgetError, PgolfError, VerificationError
from pgolf_post.ledger.phases import LIMIT_SECONDS
from pgolf_post.pack.report.size import SizeReport
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.compare.record import RECORD_SEEDS
from pgolf_post.submit.seeds import Seed

TRAINING_SECONDS, EVALUATION_SECONDS = LIMIT_SECONDS["training"], LIMIT_SECONDS["evaluation"]
SHOWN = 6  # differing settings that a message names

# name: (whether a draft may have it, what it means)
REASONS: dict[str, tuple[bool, str]] = {
    "over-budget": (False, "artifact and code are larger than the budget"),
    "audit-failed": (False, "a test of the challenge's rules fails"),
    "audit-missing": (True, "the rules were not tested"),
    "part-of-text": (True, "only a part of the validation split, or another split, was scored"),
    "few-seeds": (True, f"fewer than {RECORD_SEEDS} seeds"),
    "same-seed": (False, "two artifacts are of one seed, or of the same weights"),
    "configs-differ": (False, "seeds were not made by the same settings"),
    "unknown-checkpoint": (False, "the ledger does not have the checkpoint"),
    "unknown-seconds": (True, "it is not known how long training read training data"),
    "over-time": (True, "training or evaluation takes longer than its limit"),
    "training-data-after-cap": (True, "statistics or tuning read training data after the limit"),
}


@dataclass(frozen=True)
class Refusal:
    """One reason, with its evidence."""

    name: str
    evidence: str

    @property
    def stops_a_draft(self) -> bool:
        return not REASONS[self.name][0]

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}"


def about_bytes(seed: Seed, report: SizeReport) -> list[Refusal]:
    """Return the refusal of an artifact that does not fit, by the count that the report is by."""
    if not report.over:
        return []
    how = "by convention" if report.by_convention else "strict"
    over = f"{report.total_bytes:,} bytes ({how}) are {-report.headroom_bytes:,} over {report.budget_bytes:,}"
    return [Refusal("over-budget", f"{seed.name}: {over}")]


def about_seeds(seeds: Sequence[Seed]) -> list[Refusal]:
    """Return what is wrong with the group of seeds."""
    found = []
    if len(seeds) < RECORD_SEEDS:
        found.append(Refusal("few-seeds", f"{len(seeds)} given, the challenge asks for {RECORD_SEEDS}"))
    known = [seed.seed for seed in seeds if seed.seed is not None]
    twice = sorted({seed for seed in known if known.count(seed) > 1})
    if twice:
        found.append(Refusal("same-seed", f"several artifacts are of seed {', '.join(map(str, twice))}"))
    weights = [seed.view_id for seed in seeds]
    again = sorted({seed.name for seed in seeds if weights.count(seed.view_id) > 1})
    if again and not twice:  # of an imported checkpoint the seed is not known
        found.append(Refusal("same-seed", f"several artifacts are of the weights of {', '.join(again)}"))
    differences = setting_differences([seed.in_common() for seed in seeds])
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        found.append(Refusal("configs-differ", "; ".join(differences[:SHOWN]) + more))
    missing = [seed for seed in seeds if not seed.is_in_ledger()]
    for seed in missing:
        hint = f"pgolf-post ledger scan --root {seed.checkpoint.path.parent.parent}"
        found.append(Refusal("unknown-checkpoint", f"{seed.checkpoint.path} is not in the ledger ({hint})"))
    return found


def setting_differences(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings in which seeds differ, each with its values."""
    keys = sorted({key for tree in trees for key in tree})
    values = {key: [repr(tree[key]) if key in tree else "absent" for tree in trees] for key in keys}
    return [f"{key} = {' | '.join(each)}" for key, each in values.items() if len(set(each)) > 1]


def about_training_time(seed: Seed, limit: float = TRAINING_SECONDS) -> list[Refusal]:
    """Return what the seconds on training data are refused for."""
    seconds = seed.training_seconds()
    if seconds is None:
        return [Refusal("unknown-seconds", f"{seed.name}: {seed.checkpoint.path} names no training run that is here")]
    if seconds["training"] > limit:
        return [Refusal("over-time", f"{seed.name}: training read data for {seconds['training']:.1f} s of {limit:.0f}")]
    spent = 0.0
    for name, each in seconds.items():
        spent += each
        if spent > limit:
            what = f"{name} ends {spent:.1f} s into {limit:.0f} s of training data"
            return [Refusal("training-data-after-cap", f"{seed.name}: {what}")]
    return []


def about_evaluation_time(seed: Seed, seconds: float, limit: float = EVALUATION_SECONDS) -> list[Refusal]:
    """Return the refusal of an evaluation whose strict seconds exceed the limit."""
    if seconds <= limit:
        return []
    return [Refusal("over-time", f"{seed.name}: evaluation took {seconds:.1f} s of {limit:.0f} on this machine")]


def about_text(protocol: Mapping[str, Any]) -> list[Refusal]:
    """Return the refusal of a protocol that does not score the whole validation split."""
    if protocol["split"] != "val":
        return [Refusal("part-of-text", f"the split {protocol['split']!r} is scored, not 'val'")]
    if protocol["max_tokens"] is not None:
        return [Refusal("part-of-text", f"only the first {protocol['max_tokens']:,} tokens are scored")]
    return []


def about_audit(seed: Seed, findings: Sequence[Finding] | None) -> list[Refusal]:
    """Return what an audit refuses; `findings` None: there was none."""
    if findings is None:
        return [Refusal("audit-missing", f"{seed.name}: no audit of {seed.artifact} by this protocol")]
    failed = [f"{finding.test} ({finding.evidence})" for finding in findings if finding.passed is False]
    return [Refusal("audit-failed", f"{seed.name}: {'; '.join(failed)}")] if failed else []


def require_none(refusals: Sequence[Refusal], draft: bool) -> list[Refusal]:
    """Return the refusals that a draft may have. Raises an error that names every one that stops it."""
    stopping = [each for each in refusals if each.stops_a_draft or not draft]
    if not stopping:
        return list(refusals)
    message = f"refused: {'; '.join(map(str, stopping))}"
    hint = None if any(each.stops_a_draft for each in stopping) else "make a draft all the same: --draft"
    if all(each.name == "over-budget" for each in stopping):
        raise OverBudgetError(
            message, hint="pgolf-post fit --budget, or count as the convention does: --count convention"
        )
    if any(each.name.startswith("audit") for each in stopping):
        raise VerificationError(message, hint=hint)
    raise PgolfError(message, hint=hint)
