"""A sweep's rows as a table, the best first, on the terminal and as files; it says what is inside the noise."""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import print_table, say
from pgolf_post.base.storage import atomic_file
from pgolf_post.ledger import Row
from pgolf_post.sweep.outcomes import HEADER as OUTCOME_HEADER
from pgolf_post.sweep.outcomes import Outcome, outcomes
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.state import State
from pgolf_post.sweep.verdict import noise_floor

HEADER = ("trial", "bytes", "headroom", "bpb", "Δ control", "interval", "verdict", "seconds", "note")
NOTED = ("error", "dropped", "stopped", "stopped_early")  # keys of a result that say why a trial has no score


def ranked(state: State) -> list[Row]:
    """Return the rows there are: by the ranking, then what was not scored; noise repeats at the end."""

    def key(row: Row) -> tuple[int, float]:
        if row.settings.get("role") == "noise":
            return 3, 0.0
        value = rank_value(state, row)
        return (2 if "error" in row.result else 1, 0.0) if value is None else (0, value)

    return sorted((state.rows[one.id] for one in state.listed if one.id in state.rows), key=key)


def rank_value(state: State, row: Row) -> float | None:
    """Return what a row is ranked by: bytes, or the difference from the control in bpb (its own is 0)."""
    if state.spec.ranking == "bytes":
        return row.result.get("total_bytes")
    score = row.result.get(state.spec.ranking)
    return None if score is None else float(score.get("difference_bpb", 0.0))


def facts_of(state: State, row: Row) -> dict[str, Any]:
    """Return a row for machines."""
    result, stage = row.result, state.spec.deciding_stage
    score = result.get(stage, {}) if stage else {}
    kept = (
        "artifact_bytes",
        "total_bytes",
        "headroom_bytes",
        "predicted_bytes",
        "error",
        "no_op",
        "dropped",
        "stopped",
        "stopped_early",
        "at_stop",
    )
    return {
        "id": row.id,
        "name": row.name,
        "role": row.settings.get("role"),
        "changes": row.settings.get("changes"),
        **{key: result[key] for key in kept if key in result},
        **{key: score[key] for key in ("bpb", "difference_bpb", "low_bpb", "high_bpb", "tokens") if key in score},
        "stages": {name: result[name] for name in STAGES if name in result},
        "verdict": row.verdict,
        "conclusion": row.conclusion,
        "seconds": row.seconds,
        "cost_dollars": row.cost_dollars,
    }


def cells(state: State, row: Row) -> tuple[str, ...]:
    """Return a row for people."""
    facts = facts_of(state, row)

    def shown(key: str, form: str) -> str:
        return format(facts[key], form) if facts.get(key) is not None else ""

    interval = f"{facts['low_bpb']:+.5f} … {facts['high_bpb']:+.5f}" if facts.get("low_bpb") is not None else ""
    numbers = (shown("artifact_bytes", ","), shown("headroom_bytes", ","), shown("bpb", ".5f"))
    difference = (shown("difference_bpb", "+.5f"), interval)
    return (row.name, *numbers, *difference, row.verdict or "", f"{row.seconds or 0:.1f}", _note(row))


def _note(row: Row) -> str:
    result = row.result
    for key in NOTED:
        if key in result:
            return f"{key.replace('_', ' ')}: {result[key]}"
    return ", ".join(f"no {stage}" for stage in result.get("skipped", {}))


def caption(state: State) -> str:
    """Return what the ranking means and what it cannot tell apart."""
    floor = noise_floor_of(state)
    by = "bytes" if state.spec.ranking == "bytes" else f"the paired difference from the control ({state.spec.ranking})"
    noise = "rounding noise not measured" if floor is None else f"rounding noise ±{floor:.5f} bpb"
    left = len(state.open)
    return f"{state.spec.question}   ranked by {by}; {noise}" + (f"; {left} trials to go" if left else "")


def noise_floor_of(state: State) -> float | None:
    """Return the noise floor in bpb of the repeats that are done; None before the first."""
    noise = [state.rows[one.id] for one in state.listed if one.trial.role == "noise" and one.id in state.rows]
    return noise_floor([row for row in noise if "error" not in row.result], state.spec.deciding_stage)


def show(state: State, title: str) -> None:
    """Print the table."""
    print_table(f"{title}: {caption(state)}", HEADER, [cells(state, row) for row in ranked(state)])
    if found := decided(state):
        print_table("decisions, the best first", OUTCOME_HEADER, [one.cells() for one in found])


def decided(state: State) -> list[Outcome]:
    """Return the outcomes of trials: the last rung first, there the control, then by the difference from it."""
    return sorted(outcomes(state), key=lambda one: (-one.rung, one.difference.mean if one.difference else -math.inf))


def markdown(state: State, title: str) -> str:
    """Return the table as Markdown."""
    text = f"# {title}\n\n{caption(state)}\n\n" + _as_markdown(HEADER, [cells(state, row) for row in ranked(state)])
    found = decided(state)
    return text + ("\n" + _as_markdown(OUTCOME_HEADER, [one.cells() for one in found]) if found else "")


def _as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)


def as_csv(state: State) -> str:
    """Return the table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([HEADER, *(cells(state, row) for row in ranked(state))])
    return out.getvalue()


def save(state: State, folder: Path, title: str) -> list[Path]:
    """Write table.md and table.csv; returns their paths."""
    written = []
    for name, text in (("table.md", markdown(state, title)), ("table.csv", as_csv(state))):
        with atomic_file(folder / name) as path:
            path.write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


def answer(state: State) -> dict[str, Any]:
    """Return the sweep for machines: what was asked, and its rows by rank."""
    return {
        "question": state.spec.question,
        "ranked_by": state.spec.ranking,
        "noise_floor_bpb": noise_floor_of(state),
        "trials": [facts_of(state, row) for row in ranked(state)],
        **({"outcomes": [one.facts() for one in found]} if (found := decided(state)) else {}),
        "open": [one.trial.name for one in state.open],
    }


def leaders(state: State, count: int = 3) -> list[Row]:
    """Return the first trials of the ranking that have a value to be ranked by, without sorting the others."""
    trials = [row for row in state.rows.values() if row.settings.get("role") == "trial" and "error" not in row.result]
    valued = [(value, row) for row in trials if (value := rank_value(state, row)) is not None]
    return [row for _, row in heapq.nsmallest(count, valued, key=lambda pair: pair[0])]


def live(state: State, row: Row, spent: Sequence[float]) -> None:
    """Print one line after a trial: what came of it, who leads, and when the sweep will be over."""
    best = leaders(state)
    lead = "; ".join(f"{place}. {one.name} {_short(state, one)}" for place, one in enumerate(best, 1))
    left, mean = len(state.open), sum(spent) / max(1, len(spent))
    done = len(state.listed) - left
    outcome = _note(row) if row.result.keys() & set(NOTED) else _short(state, row)
    line = f"[{done}/{len(state.listed)}] {row.name}: {outcome}"
    line += f" {row.verdict}" if row.verdict else ""
    say(line + (f" | {lead}" if lead else "") + f" | eta {left * mean:.0f} s")


def _short(state: State, row: Row) -> str:
    facts = facts_of(state, row)
    parts = []
    if facts.get("difference_bpb") is not None:
        half = (facts["high_bpb"] - facts["low_bpb"]) / 2 if facts.get("low_bpb") is not None else None
        parts.append(f"{facts['difference_bpb']:+.5f}" + (f" ± {half:.5f}" if half is not None else ""))
    elif facts.get("bpb") is not None:
        parts.append(f"{facts['bpb']:.5f} bpb")
    if facts.get("artifact_bytes") is not None:
        parts.append(f"{facts['artifact_bytes']:,} B")
    return ", ".join(parts)
