"""A submission is refused by name, and a draft may have only what time and patience would mend."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.errors import OverBudgetError, PgolfError, VerificationError
from pgolf_post.pack.report.size import FileBytes, SizeReport
from pgolf_post.score.audit.findings import Finding
from pgolf_post.submit import refusals
from pgolf_post.submit.refusals import REASONS, Refusal, require_none
from pgolf_post.submit.writing import sample_deviation


@dataclass
class Fake:
    """What refusals ask of a seed."""

    seed: int | None = 42
    seconds: dict[str, float] | None = field(default_factory=lambda: {"training": 590.0, "statistics": 4.0})
    common: dict[str, Any] = field(default_factory=lambda: {"config.model.num_layers": 11})
    known: bool = True
    artifact: Path = Path("artifact.pgolf")

    @property
    def name(self) -> str:
        return f"seed {self.seed}"

    @property
    def checkpoint(self) -> Any:
        return type("Folder", (), {"path": Path("checkpoints/run/step_1-final")})

    @property
    def view_id(self) -> str:
        return f"weights of {self.seed}"

    def training_seconds(self) -> dict[str, float] | None:
        return self.seconds

    def in_common(self) -> dict[str, Any]:
        return self.common

    def is_in_ledger(self) -> bool:
        return self.known


def names(found: list[Refusal]) -> list[str]:
    return [each.name for each in found]


def three(**changes: Any) -> list[Any]:
    return [Fake(42), Fake(1337), Fake(**{"seed": 2024, **changes})]


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (three(), []),
        (three()[:2], ["few-seeds"]),
        (three(seed=42), ["same-seed"]),
        ([Fake(None), Fake(None), Fake(7)], ["same-seed"]),
        (three(common={"config.model.num_layers": 10}), ["configs-differ"]),
        (three(known=False), ["unknown-checkpoint"]),
    ],
    ids=["three", "two", "twice", "same weights", "differ", "unknown"],
)
def test_groups_of_seeds(seeds: list[Any], expected: list[str]) -> None:
    assert names(refusals.about_seeds(seeds)) == expected


def test_settings_that_differ_are_named_with_their_values() -> None:
    (refusal,) = refusals.about_seeds(three(common={"config.model.num_layers": 10}))
    assert "config.model.num_layers = 11 | 11 | 10" in refusal.evidence


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"training": 590.0, "statistics": 10.0}, []),
        ({"training": 600.5}, ["over-time"]),
        ({"training": 598.0, "statistics": 3.5}, ["training-data-after-cap"]),
        ({"training": 590.0, "statistics": 3.5, "kappa": 2.0, "fine-tuning": 30.0}, ["training-data-after-cap"]),
        (None, ["unknown-seconds"]),
    ],
    ids=["within", "training", "statistics", "tuning", "unknown"],
)
def test_seconds_on_training_data(seconds: dict[str, float] | None, expected: list[str]) -> None:
    found = refusals.about_training_time(Fake(seconds=seconds))  # type: ignore[arg-type]
    assert names(found) == expected


def test_the_step_that_ends_late_is_named() -> None:
    seconds = {"training": 590.0, "statistics": 3.5, "fine-tuning": 30.0}
    (refusal,) = refusals.about_training_time(Fake(seconds=seconds))  # type: ignore[arg-type]
    assert "fine-tuning ends 623.5 s into 600 s" in refusal.evidence


@pytest.mark.parametrize(("artifact", "over"), [(15_990_000, False), (15_990_001, True)])
def test_one_byte_over_is_over(artifact: int, over: bool) -> None:
    code = (FileBytes(Path("train_gpt.py"), 10_000),)
    report = SizeReport(FileBytes(Path("artifact.pgolf"), artifact), code, 16_000_000, code)
    assert names(refusals.about_bytes(Fake(), report)) == ["over-budget"] * over  # type: ignore[arg-type]


def test_audits() -> None:
    seed: Any = Fake()
    assert names(refusals.about_audit(seed, None)) == ["audit-missing"]
    assert refusals.about_audit(seed, [Finding("causality", True, ""), Finding("isolation", None, "")]) == []
    (refusal,) = refusals.about_audit(seed, [Finding("causality", False, "target 7 moved")])
    assert str(refusal) == "audit-failed: seed 42: causality (target 7 moved)"


def test_a_slow_evaluation() -> None:
    seed: Any = Fake()
    assert refusals.about_evaluation_time(seed, 600.0) == []
    assert names(refusals.about_evaluation_time(seed, 600.1)) == ["over-time"]


@pytest.mark.parametrize("name", REASONS)
def test_a_draft_may_have_some_and_says_them(name: str) -> None:
    refusal = Refusal(name, "evidence")
    with pytest.raises(PgolfError, match=f"refused: {name}: evidence"):
        require_none([refusal], draft=False)
    if REASONS[name][0]:
        assert require_none([refusal], draft=True) == [refusal]
    else:
        with pytest.raises(PgolfError, match=name):
            require_none([refusal], draft=True)


def test_exit_codes_and_hints() -> None:
    with pytest.raises(OverBudgetError):
        require_none([Refusal("over-budget", "")], draft=True)
    with pytest.raises(VerificationError):
        require_none([Refusal("audit-failed", ""), Refusal("few-seeds", "")], draft=False)
    with pytest.raises(PgolfError) as caught:
        require_none([Refusal("few-seeds", "")], draft=False)
    assert "--draft" in str(caught.value.hint)


def test_numbers_in_the_files() -> None:
    assert sample_deviation([1.0]) is None
    assert sample_deviation([1.0, 3.0]) == pytest.approx(2**0.5)
