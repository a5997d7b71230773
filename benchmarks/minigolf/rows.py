"""Rows of rounds: one JSON line and one row of the ledger each, and the table that compares them.

Rounds of one name are seeds of one thing. They are compared with a baseline by Welch's test, as the challenge does, and
only where all that is not theirs to choose is equal: the documents, the scale, the seconds and the bytes. A round that
trained for longer than its seconds allow stands in the table and is left out of every comparison.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.minigolf.play import TRAINING, Game
from benchmarks.minigolf.settings import WINDOW_TOKENS
from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.ledger.phases import ChainPhase, Limit
from pgolf_post.ledger.recording import record
from pgolf_post.ledger.schema import Row
from pgolf_post.provenance import provenance
from pgolf_post.score.compare.comparison import compare
from pgolf_post.score.compare.record import RECORD_P, welch
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score
from pgolf_post.sweep.claims import claim

ROWS_FILE = "rows.jsonl"
OVERRUN = 1.01  # of the training seconds: a round beyond is compared with nothing
EQUAL = ("scale", "text_sha256", "train_budget_seconds", "eval_budget_seconds", "budget_bytes")  # for a comparison
HEADER = (
    "round", "seeds", "tokens seen", "bpb unquantized", "bpb", "after protocols", "gap", "expected gap", "bytes",
    "bits/weight", "training s", "scoring s", "against baseline", "p", "verdict",
)  # fmt: skip


def row_of(game: Game, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's row. The measured gap is paired by document, from the two scores on disk."""
    train, rounded, own, reference = (answers[key] for key in ("train", "round", "score", "reference"))
    seconds = {stage: round(sum(lives), 3) for stage, lives in game.lives.items()}
    training, scoring = (sum(seconds.get(stage, 0.0) for stage in stages) for stages in (TRAINING, game.scoring_stages))
    made = provenance(torch.device("cpu"))
    protocols = {name: answer["bpb"] for name, answer in answers["protocols"].items()}
    return {
        "id": game.id,
        "name": game.wanted.name,
        "seed": game.seed,
        "scale": game.scale,
        "steps": train["steps"],
        "tokens_seen": train["tokens_seen"],
        "parameters": train["parameters"],
        "bpb_unquantized": reference["bpb"],
        "bpb": own["bpb"],
        "bpb_protocols": protocols,
        "tokens": own["tokens"],
        "bytes": own["bytes"],
        "documents": game.text.documents,
        "text_sha256": game.text.sha256,
        "gap": gap_of(game, train, rounded),
        "expected_gap": answers["expected"],
        **{key: rounded[key] for key in ("artifact_bytes", "code_bytes", "total_bytes", "budget_bytes")},
        "bits_per_weight": rounded["bits_per_weight"],
        **({"clip_factor": rounded["clip_factor"]} if "clip_factor" in rounded else {}),
        "symbols_sha256": rounded["symbols_sha256"],
        "processor_seconds": seconds,
        "lives": {stage: len(lives) for stage, lives in game.lives.items()},
        "training_seconds": round(training, 3),
        "train_budget_seconds": game.training.budget_seconds,
        "within_seconds": training <= OVERRUN * game.training.budget_seconds,
        "scoring_seconds": round(scoring, 3),
        "eval_budget_seconds": game.eval_seconds,
        "data_sha256": game.data.manifest_sha256,
        "commit": made["git"]["commit"],
        "dirty": made["git"]["dirty"],
        "versions": made["versions"],
        "device": made["device"],
    }


def gap_of(game: Game, train: Mapping[str, Any], rounded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what rounding cost in bpb and its 95 % interval over documents, from the scores that are on disk."""
    protocol = PlainProtocol(seq_len=WINDOW_TOKENS, max_tokens=game.text.tokens)
    view = Checkpoint.open(Path(train["checkpoint"])).load(game.wanted.rounding.weights)
    pair = score(Path(rounded["artifact"]), game.data, protocol), score(view, game.data, protocol)
    return compare(*pair).by_t.facts()


# ---- keeping ---------------------------------------------------------------------------------------------------------


def keep(game: Game, row: Mapping[str, Any], artifact: Path) -> None:
    """Keep a row once: as a line of rows.jsonl, and in the ledger beside the checkpoints."""
    keep_line(game.root, row)
    record(artifact.parent, rows=lambda: [ledger_row(game, row, artifact)], root=game.root)


def keep_line(root: Path, row: Mapping[str, Any]) -> None:
    """Write a row's line, in place of an earlier one of its id. Rounds that end at one moment wait for each other."""
    path = root / ROWS_FILE
    with claim(root, "rows", wait=True):
        others = [other for other in (read_rows(path) if path.is_file() else []) if other["id"] != row["id"]]
        with atomic_file(path) as building:
            building.write_text("".join(json.dumps(one, allow_nan=False) + "\n" for one in [*others, row]))


def ledger_row(game: Game, row: Mapping[str, Any], artifact: Path) -> Row:
    """Return the ledger's row of a round: a trial, with the processor seconds that a budget counts as its phases."""
    limits: dict[str, Limit] = dict.fromkeys(TRAINING, "training") | dict.fromkeys(game.scoring_stages, "evaluation")
    phases = [
        ChainPhase(stage, seconds, limits[stage], by_convention=True, reads_training_data=stage in TRAINING).facts()
        for stage, seconds in row["processor_seconds"].items()
        if stage in limits
    ]
    parents = (artifact.parent.name,)
    total = sum(row["processor_seconds"].values())
    result = {key: value for key, value in row.items() if key not in ("id", "processor_seconds")}
    named: dict[str, Any] = {"name": f"{game.wanted.name} s{game.seed} x{game.scale:g}", "run": game.training.name}
    return Row("trial", game.id, parents, **named, settings=game.identity, result=result, seconds=total, phases=phases)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines. Raises NotFoundError."""
    if not path.is_file():
        raise NotFoundError(f"no rows at {path}", hint="python -m benchmarks.minigolf play ROUND.toml --data FOLDER")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- the table -------------------------------------------------------------------------------------------------------


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows by name, their seeds in order. Raises MismatchError where two names, or seeds, are not comparable."""
    for key in EQUAL:
        values = {row[key] for row in rows}
        if len(values) > 1:
            raise MismatchError(
                f"rows differ in {key}: {', '.join(map(str, sorted(values)))}", hint="--scale X shows one scale"
            )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        groups.setdefault(row["name"], []).append(row)
    for name, own in groups.items():
        seeds = [row["seed"] for row in own]
        if len(set(seeds)) < len(seeds):
            raise MismatchError(
                f"round {name!r} has two rows of one seed: its file has changed meanwhile",
                hint="give the changed round another name, or remove a line of rows.jsonl",
            )
    return groups


def verdict(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> tuple[float, float | None, str]:
    """Return the difference of mean bpb, Welch's one-sided p (None with a single seed), and what follows."""
    ours, theirs = (np.array([row["bpb"] for row in rows if row["within_seconds"]]) for rows in (own, base))
    if not len(ours) or not len(theirs):
        return math.nan, None, "over its seconds"
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return difference, None, "one seed says nothing of the spread"
    p = welch(ours, theirs).p
    return difference, p, "better" if p < RECORD_P else ("worse" if p > 1 - RECORD_P else "undecided")


def table_rows(groups: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str | None) -> list[tuple[str, ...]]:
    """Return the table. Raises NotFoundError for a baseline that has no rows."""
    if baseline is not None and baseline not in groups:
        raise NotFoundError(f"no rows of a round {baseline!r}; there are: {', '.join(groups)}")
    table: list[tuple[str, ...]] = []
    for name, rows in groups.items():
        compared = ("", "", "")
        if baseline is not None and name != baseline:
            difference, p, word = verdict(rows, groups[baseline])
            compared = (f"{difference:+.5f}", "" if p is None else f"{p:.4f}", word)
        gap, expected = (_gap_text(rows, key) for key in ("gap", "expected_gap"))
        table.append((
            name, ", ".join(str(row["seed"]) for row in rows), f"{_mean(rows, 'tokens_seen'):,.0f}",
            _spread(rows, "bpb_unquantized"), _spread(rows, "bpb"), _protocols(rows), gap, expected,
            f"{max(row['total_bytes'] for row in rows):,}", f"{_mean(rows, 'bits_per_weight'):.2f}",
            _seconds(rows), f"{_mean(rows, 'scoring_seconds'):,.1f}", *compared,
        ))  # fmt: skip
    return table


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _spread(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.fmean(values):.5f}" + (f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else "")


def _gap_text(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    gaps = [row[key] for row in rows]
    text = f"{statistics.fmean(gap['difference_bpb'] for gap in gaps):+.5f}"
    if len(gaps) == 1 and gaps[0]["low_bpb"] is not None:
        text += f" ({gaps[0]['low_bpb']:+.5f} … {gaps[0]['high_bpb']:+.5f})"
    return text


def _protocols(rows: Sequence[Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row["bpb_protocols"])
    means = {name: statistics.fmean(row["bpb_protocols"][name] for row in rows) for name in names}
    return ", ".join(f"{name} {bpb:.5f}" for name, bpb in means.items())


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    over = "" if all(row["within_seconds"] for row in rows) else " OVER"
    return f"{_mean(rows, 'training_seconds'):,.1f} of {rows[0]['train_budget_seconds']:,.0f}{over}"


def finish(game: Game, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a played round's row, kept on disk; says so where rounding used seconds that it did not have."""
    row = row_of(game, answers)
    keep(game, row, Path(answers["round"]["artifact"]))
    if not row["within_seconds"]:
        say(
            f"{game.name}: {row['training_seconds']:,.1f} processor seconds of {game.training.budget_seconds:,.1f}; "
            "the row is kept and compared with nothing: raise rounding.reserve_seconds or rounding.fixed_seconds"
        )
    return row
