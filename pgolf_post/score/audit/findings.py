"""The outcome of one test of an audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pgolf_post.errors import VerificationError


@dataclass(frozen=True)
class Finding:
    """One test's outcome; `passed` is None where it does not apply."""

    test: str
    passed: bool | None
    evidence: str

    def facts(self) -> dict[str, Any]:
        return {"test": self.test, "passed": self.passed, "evidence": self.evidence}


def require_passed(findings: list[Finding], name: str) -> None:
    """Raise VerificationError naming every test that failed."""
    failed = [finding.test for finding in findings if finding.passed is False]
    if failed:
        raise VerificationError(f"{name} fails {len(failed)} of {len(findings)} tests: {', '.join(failed)}")
