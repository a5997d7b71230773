"""report: what a shell sees, and the commands and audits that it shows."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Call

CKPT = "checkpoints/latest"


def test_a_report_of_what_commands_did(pgolf: Call, tmp_path: Path) -> None:
    assert pgolf("eval", CKPT, "--max-tokens", 300).code == 0
    audited = pgolf("audit", CKPT, "--max-tokens", 300, "--tokens", 60, "--samples", 1)
    assert audited.code == 0, audited.err
    answer = pgolf("report", "pico", "--json")
    assert answer.code == 0, answer.err
    html = (tmp_path / "report.html").read_text()
    assert answer.json["report_bytes"] == len(html.encode())
    assert answer.json["rows"] > 2
    assert f"pgolf-post eval {CKPT} --max-tokens 300" in html
    assert 'id="audits"' in html
    assert "pgolf-post report pico --json" in html
    told = pgolf("ledger", "table", "--kind", "audit", "--json").json["rows"]
    assert [row["result"]["passed"] for row in told] == [True]
    assert told[0]["command"].startswith(f"pgolf-post audit {CKPT}")


def test_what_cannot_be_reported_is_refused(pgolf: Call, tmp_path: Path) -> None:
    answer = pgolf("report", "nowhere")
    assert (answer.code, answer.out) == (1, "")
    assert "nowhere is not a run" in answer.err
    assert "checkpoint list" in answer.err
    assert pgolf("report", "--root", tmp_path / "empty").code == 1
    assert not (tmp_path / "report.html").exists()
