"""The curves in a public script's training log.

Two forms of line are merged in the challenge's records, both from its scripts' print statements:

    step:1000/20000 train_loss:2.3456 train_time:43500ms step_avg:43.50ms
    step:1000/20000 val_loss:2.3400 val_bpb:1.3823 train_time:43520ms step_avg:43.52ms
    1000/20000 train_loss: 3.1948 train_time: 1.7m tok/s: 7698918
    4000/20000 val_loss: 2.8722 val_bpb: 1.1119

A report is looked for anywhere in a line: real logs have colours, carriage returns, a prefix for each rank
(`[rank0]:`), and lines of several ranks run into each other. Of ranks, the lowest that reports counts. In the second
form, minutes have one decimal, so seconds are steps times tokens per step by the mean tokens per second, where the log
tells the tokens of a step (`train_batch_tokens`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pgolf_post.curves.curve import Point
from pgolf_post.curves.gathering import Gathering

COLOUR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")
REPORT = re.compile(
    r"(?:\bstep|(?<=ms)step|(?<=\d)step)\s*[:=]?\s*(\d+)(?:\s*/\s*\d+)?"  # step:1000/20000, after what may be another's
    r"|(?<![\w./-])(\d+)\s*/\s*\d+(?=\s)"  # 1000/20000
)
PAIR = re.compile(r"(?<![\w/])([A-Za-z_][\w/]*)\s*[:=]\s*([-+]?(?:\d[\d_,]*\.?\d*(?:[eE][-+]?\d+)?|nan|inf))([a-z]*)")
RANK = re.compile(r"^\s*\[?(?:rank|default|RANK)\s*[:=]?\s*(\d+)\]?\s*:?")
BATCH = re.compile(r"\btrain_batch_tokens\s*[:=]\s*([\d_,]+)")
LOSSES = {"train_loss": "train_loss", "loss": "train_loss", "val_loss": "val_loss", "val_bpb": "val_bpb"}
TIMES = ("train_time", "train_seconds", "elapsed")
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Report:
    """Values that one line reports of one step."""

    step: int
    values: Mapping[str, float]  # curve → value
    seconds: float | None
    rate: float | None  # mean tokens per second


def gather_public(text: str) -> Gathering:
    """Return the points of every report in a log's text."""
    batch = BATCH.search(COLOUR.sub("", text))
    tokens_per_step = _number(batch[1]) if batch else None
    gathering = Gathering()
    for report in _of_lowest_rank(text):
        tokens = report.step * tokens_per_step if tokens_per_step else None
        seconds = tokens / report.rate if tokens is not None and report.rate else report.seconds
        for name, value in report.values.items():
            gathering.add(name, Point(value, report.step, tokens, seconds))
    return gathering


def _of_lowest_rank(text: str) -> list[Report]:
    """Return the reports of the lowest rank that has any; lines without a rank count as the lowest."""
    by_rank: dict[int, list[Report]] = {}
    for line in COLOUR.sub("", text).split("\n"):
        rank = RANK.match(line)
        by_rank.setdefault(int(rank[1]) if rank else -1, []).extend(reports(line))
    return next((found for _, found in sorted(by_rank.items()) if found), [])


def reports(line: str) -> Iterator[Report]:
    """Yield the reports in one line: usually none or one, several where ranks wrote into each other."""
    starts = list(REPORT.finditer(line))
    ends = [*(match.start() for match in starts), len(line)][1:]
    for match, end in zip(starts, ends, strict=True):
        pairs = {key: (_number(number), unit) for key, number, unit in PAIR.findall(line[match.end() : end])}
        values = {LOSSES[key]: number for key, (number, _) in pairs.items() if key in LOSSES}
        if values:
            yield Report(int(match[1] or match[2]), values, _seconds(pairs), pairs.get("tok/s", (None, ""))[0])


def _seconds(pairs: Mapping[str, tuple[float, str]]) -> float | None:
    """Return the training seconds of a report, whatever their unit."""
    for key in TIMES:
        if key in pairs:
            number, unit = pairs[key]
            return number * SECONDS.get(unit, 1.0)
    return None


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("_", ""))
