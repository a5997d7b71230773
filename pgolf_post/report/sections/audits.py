"""Audits: each test of the challenge's rules, its outcome and the evidence."""

from __future__ import annotations

from pgolf_post.ledger import Row
from pgolf_post.report.blocks import Cell, Section, Table, number
from pgolf_post.report.subject import Subject

HEADER = ("test", "outcome", "evidence", "audited", "excerpt, tokens", "when")
WORDS = {True: "pass", False: "FAIL", None: "n/a"}


def audits(subject: Subject) -> Section | None:
    """Return the section of the recorded audits, failures first, then the newest."""
    rows = [row for audit in reversed(subject.of_kind("audit")) for row in _rows(audit)]
    rows.sort(key=lambda cells: cells[1].shown != WORDS[False])
    failed = sum(cells[1].shown == WORDS[False] for cells in rows)
    note = f"{failed} tests failed." if failed else "No test failed; n/a: a test that does not apply."
    return Section("audits", "Audits", [Table("Verdicts", HEADER, rows)], note) if rows else None


def _rows(audit: Row) -> list[tuple[Cell, ...]]:
    return [
        (
            Cell(str(test["test"])),
            Cell(WORDS[test["passed"]]),
            Cell(str(test["evidence"])),
            Cell(audit.name),
            number(audit.result.get("excerpt_tokens")),
            Cell(audit.created[:16].replace("T", " ")),
        )
        for test in audit.result.get("tests", [])
    ]
