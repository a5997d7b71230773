"""A contestant's log, as far as a reviewer reads it: seed, seconds, bytes, and the loss and bpb of each evaluation.

The public scripts print lines such as

    val_loader:shards pattern=… tokens:62021632
    step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
    Code size: 47642 bytes
    Total submission size int8+zlib: 15863489 bytes
    final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570

(openai/parameter-golf, train_gpt.py and its records); the trainer here writes JSON lines, and a script of ours one with
`nats`, `tokens`, `bytes` and `bpb`. Both are read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.base.text import decode_text

SEED = re.compile(r"\bseed[\s:=_]+(\d+)", re.IGNORECASE)
TOKENS = re.compile(r"\bval\w*[^\n]*?\btokens[:=]\s*([\d,]+)", re.IGNORECASE)
SCORED = re.compile(r"\bval_loss[:=]\s*([\d.]+)\D+?val_bpb[:=]\s*([\d.]+)", re.IGNORECASE)
TRAIN_TIME = re.compile(r"\btrain_time[:=]\s*([\d.]+)\s*(ms|s)\b", re.IGNORECASE)
STEP_TIME = re.compile(r"\bstep_avg[:=]\s*([\d.]+)\s*(ms|s)\b", re.IGNORECASE)
EVAL_TIME = re.compile(r"\beval_time[:=]\s*([\d.]+)\s*(ms|s)\b", re.IGNORECASE)
HESSIANS = re.compile(r"hessians?\b[^\n]*?\bin\s+([\d.]+)\s*(ms|s)\b", re.IGNORECASE)
TOTAL = re.compile(r"total submission size[^:\n]*:\s*([\d,]+)", re.IGNORECASE)
CODE = re.compile(r"code size[^:\n]*:\s*([\d,]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation that a log reports."""

    loss: float  # nats per token
    bpb: float
    seconds: float | None = None
    tokens: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token that loss and bpb imply."""
        return self.loss / math.log(2) / self.bpb


@dataclass
class RunLog:
    """Facts that one log states."""

    path: Path
    seed: int | None = None
    tokens: int | None = None  # of the validation text
    train_seconds: float | None = None
    step_seconds: float | None = None
    hessian_seconds: float = 0.0
    total_bytes: int | None = None  # the last that is printed: the compressed one
    code_bytes: int | None = None
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation, which is the one that is submitted."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing that a reviewer asks for."""
        return not (self.evaluations or self.train_seconds or self.total_bytes)


def read_run_log(path: Path) -> RunLog:
    """Return what a log says; an unreadable line says nothing."""
    log = RunLog(path)
    named = SEED.search(path.stem) or re.search(r"seed(\d+)", path.stem)
    log.seed = int(named.group(1)) if named else None
    for line in decode_text(path.read_bytes(), errors="replace").splitlines():
        if line.lstrip().startswith("{"):
            _read_json(log, line)
        else:
            _read_line(log, line)
    return log


def _read_line(log: RunLog, line: str) -> None:
    if log.seed is None and (match := SEED.search(line)):
        log.seed = int(match.group(1))
    if match := TOKENS.search(line):
        log.tokens = _number(match.group(1))
    if match := TRAIN_TIME.search(line):
        log.train_seconds = _seconds(match)
    if match := STEP_TIME.search(line):
        log.step_seconds = _seconds(match)
    if match := HESSIANS.search(line):
        log.hessian_seconds += _seconds(match)
    for name, pattern in (("total_bytes", TOTAL), ("code_bytes", CODE)):
        if match := pattern.search(line):
            setattr(log, name, _number(match.group(1)))
    if match := SCORED.search(line):
        loss, bpb = float(match.group(1)), float(match.group(2))
        took = EVAL_TIME.search(line)
        if loss > 0 and bpb > 0:
            log.evaluations.append(Evaluation(loss, bpb, _seconds(took) if took else None))


def _read_json(log: RunLog, line: str) -> None:
    """Read a line of the trainer's log, or of what a script of ours prints."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return
    if not isinstance(row, dict):
        return
    if isinstance(row.get("train_seconds"), (int, float)):
        log.train_seconds = float(row["train_seconds"])
    if all(isinstance(row.get(key), (int, float)) for key in ("nats", "tokens", "bytes", "bpb")) and row["bytes"]:
        nested = row.get("seconds")
        seconds = [value for value in nested.values() if isinstance(value, float)] if isinstance(nested, dict) else []
        taken = math.fsum(seconds) if seconds else None
        log.evaluations.append(Evaluation(row["nats"] / row["tokens"], row["bpb"], taken, int(row["tokens"])))


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _seconds(match: re.Match[str]) -> float:
    value = float(match.group(1))
    return value / 1000 if match.group(2).lower() == "ms" else value
