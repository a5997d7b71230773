"""The outcome of one look at a machine: fine, doubtful or failed, with the mend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    value: str  # what was found, with its unit
    mend: str = ""  # what to do, where it is not ok

    def facts(self) -> dict[str, Any]:
        """Return the finding as JSON."""
        return {"name": self.name, "state": self.state, "value": self.value, "mend": self.mend}


def ok(name: str, value: str) -> Finding:
    """Return a finding that is fine."""
    return Finding(name, "ok", value)


def warning(name: str, value: str, mend: str) -> Finding:
    """Return a finding that a run survives."""
    return Finding(name, "warning", value, mend)


def failed(name: str, value: str, mend: str) -> Finding:
    """Return a finding with which a run would fail or be refused."""
    return Finding(name, "failed", value, mend)


Look = Callable[[], Sequence[Finding]]


def look(name: str, what: Look) -> list[Finding]:
    """Return what a look finds; one that raises has failed, with its error."""
    started = time.perf_counter()
    try:
        return list(what())
    except Exception as error:
        seconds = time.perf_counter() - started
        return [failed(name, f"{type(error).__name__}: {error} (after {seconds:.1f} s)"[:300], "see the error")]


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings are of each state."""
    return {state: sum(each.state == state for each in findings) for state in ("ok", "warning", "failed")}
