"""What a submission takes from the ledger, and the ledger from stages: audits, and seconds by phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pgolf_post.artifacts import PackedArtifact, requant
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli.audit import command as audit_command
from pgolf_post.cli.ledger import command as ledger_command
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.disk import scan
from pgolf_post.ledger.phases import ChainPhase, chain_of, of_artifact, of_score, phases_of, sums
from pgolf_post.plan import read_plan
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.stage import Audit
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.session import Session
from pgolf_post.score.stage import score
from pgolf_post.submit import audits
from pgolf_post.submit.audits import audited
from pgolf_post.submit.chain import chain
from pgolf_post.submit.seeds import Seed


@pytest.fixture
def artifact(pico_run: Path, pico_data: DataFolder) -> PackedArtifact:
    view = Checkpoint.open(pico_run / "latest").load()
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=320))
    return requant(view, stats, read_plan("sdclip-1394"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Excerpts of audits that submit makes itself."""
    made: list[int | None] = []

    def audit(*_: object, tokens: int | None) -> Audit:
        made.append(tokens)
        return Audit((Finding("causality", True, "made now"),), tokens or 99)

    monkeypatch.setattr(audits, "audit", audit)
    return made


def test_an_audit_is_made_once_and_then_the_ledgers(
    artifact: PackedArtifact, pico_data: DataFolder, calls: list[int | None]
) -> None:
    seed, plain = Seed.open(artifact.folder), PlainProtocol(seq_len=32)
    assert audited(seed, pico_data, plain, None, make=False) is None
    assert audited(seed, pico_data, plain, None, make=True) == [Finding("causality", True, "made now")]
    part = plain.model_copy(update={"max_tokens": 300})  # the audit is of the protocol, however much is scored
    assert audited(seed, pico_data, part, None, make=False) == [Finding("causality", True, "made now")]
    assert calls == [None]
    assert audited(seed, pico_data, plain, 60, make=False) is None  # another excerpt, another protocol
    assert audited(seed, pico_data, PlainProtocol(seq_len=16), None, make=False) is None


def test_a_verdict_of_the_command_counts_and_the_newest_one(
    artifact: PackedArtifact, pico_data: DataFolder, calls: list[int | None]
) -> None:
    arguments = [str(artifact.folder), "--max-tokens", "300", "--tokens", "60", "--samples", "1", "--seq-len", "32"]
    done = CliRunner().invoke(audit_command, [*arguments, "--data", str(pico_data.path)], catch_exceptions=False)
    assert done.exit_code == 0
    seed, plain = Seed.open(artifact.folder), PlainProtocol(seq_len=32)
    findings = audited(seed, pico_data, plain, 60, make=True)
    assert findings
    assert {each.passed for each in findings} <= {True, None}
    assert calls == []
    root = seed.checkpoint.path.parent.parent
    with Ledger.open(root) as ledger:
        (row,) = ledger.rows("audit")
        failed = [{"test": "causality", "passed": False, "evidence": "target 7"}]
        ledger.add(Row("audit", "later", row.parents, "", "", row.settings, result={**row.result, "tests": failed}))
    assert audited(seed, pico_data, plain, None, make=True) == [Finding("causality", False, "target 7")]


def test_one_chain_by_the_folders_and_by_the_ledger(artifact: PackedArtifact, pico_data: DataFolder) -> None:
    """Training, statistics, quantizing, compressing, scoring: each once, with what cap and budget were given."""
    stored = score(artifact, pico_data, PlainProtocol(seq_len=32), session=Session(PhaseTimes(50.0)))
    seed = Seed.open(artifact.folder)
    phases = chain(seed, stored.facts)
    names = [phase.name for phase in phases]
    assert [name for name in names if not name.startswith("training: ")][:4] == [
        "statistics", "quantize", "compress", "verify",
    ]  # fmt: skip
    assert names.count("training: train_plain") == 1
    assert {phase.given_seconds for phase in phases if phase.limit == "evaluation"} == {50.0}
    found = sums(phases)
    assert found["training_data_seconds"] == found["training_convention_seconds"]
    assert found["training_strict_seconds"] > found["training_convention_seconds"] > 0
    assert found["evaluation_strict_seconds"] == pytest.approx(stored.facts["strict_seconds"], abs=0.01)

    root = seed.checkpoint.path.parent.parent
    with Ledger.open(root) as ledger:
        ledger.complete_all(scan(root))
        rows = ledger.rows()
    row = next(each for each in rows if each.kind == "artifact" and each.id == artifact.id)
    assert sums([phase for each in chain_of(rows, row) for phase in phases_of(each)]) == found
    shown = CliRunner().invoke(ledger_command, ["phases", artifact.id, "--root", str(root), "--json"])
    assert f'"training_strict_seconds": {found["training_strict_seconds"]}' in shown.stdout
    every = CliRunner().invoke(ledger_command, ["phases", "--root", str(root), "--kind", "artifact", "--json"])
    assert artifact.id in every.stdout
    with Ledger.open(root) as ledger:
        ledger.add(Row("note", "n1"))
        ledger.add(Row("trial", "untimed"))
    nothing = CliRunner().invoke(ledger_command, ["phases", "untimed", "--root", str(root)])
    assert isinstance(nothing.exception, NotFoundError)


@pytest.mark.parametrize(
    ("meta", "config", "expected"),
    [
        (  # an artifact of a plan, distilled
            {"seconds": 9.0, "distill": {"seconds": 4.0}, "phase_seconds": {"quantize": 3.0, "compress": 2.0}},
            {},
            [("distillation", 4.0, True), ("quantize", 3.0, False), ("compress", 2.0, False)],
        ),
        ({"phase_seconds": {"quantize": 3.0}}, {"sequential": True}, [("quantize", 3.0, True)]),
        (  # of fit, whose statistics have a row of their own
            {"train_seconds": {"statistics": 5.0, "kappa": 1.0}, "phase_seconds": {"compress": 2.0}},
            {},
            [("kappa", 1.0, True), ("compress", 2.0, False)],
        ),
        (
            {"seconds": 9.0, "distill": {"seconds": 4.0}},
            {},
            [("distillation", 4.0, True), ("quantize and compress", 5.0, False)],
        ),
    ],
    ids=["plan", "sequential", "fit", "older"],
)
def test_what_of_an_artifact_reads_training_data(
    meta: dict[str, Any], config: dict[str, Any], expected: list[tuple[str, float, bool]]
) -> None:
    found = of_artifact(meta, config)
    assert [(phase.name, phase.seconds, phase.reads_training_data) for phase in found] == expected
    assert all(phase.by_convention == phase.reads_training_data for phase in found)


def test_what_of_a_score_counts_by_convention() -> None:
    meta = {"load_seconds": 1.0, "compile_seconds": 2.0, "score_seconds": 4.0, "adapt_seconds": 8.0}
    meta["strict_seconds"] = 15.0
    assert sums(of_score(meta)) == {
        "training_strict_seconds": 0, "training_convention_seconds": 0, "training_data_seconds": 0,
        "evaluation_strict_seconds": 15.0, "evaluation_convention_seconds": 12.0,
    }  # fmt: skip
    assert ChainPhase(**of_score(meta)[0].facts()) == of_score(meta)[0]
