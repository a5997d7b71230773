"""Tables of a diagnosis for people: the marked numbers first, then weights by group and blocks by visit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pgolf_post.diagnose.numbers import Number
from pgolf_post.diagnose.rules import Mark
from pgolf_post.diagnose.stage import Diagnosis

By = Literal["role", "layer", "tensor"]

MARK_HEADER = ("rule", "what", "measured", "limit", "where")
BLOCK_HEADER = ("block", "‖x‖ before", "after", "p99 / mean", "attention", "MLP", "removal", "±")


class Column(NamedTuple):
    """A column of the table of weights: a metric, its heading, and which of a group's values is its worst."""

    metric: str
    heading: str
    worst: Literal["largest", "smallest"]
    form: str


COLUMNS = (
    Column("effective_rank_share", "eff. rank", "smallest", ".1%"),
    Column("effective_rank_squared_share", "of σ²", "smallest", ".1%"),
    Column("stable_rank", "stable rank", "smallest", ".1f"),
    Column("condition", "condition", "largest", ",.0f"),
    Column("kurtosis", "kurtosis", "largest", "+.2f"),
    Column("worst_row_ratio", "worst row", "largest", ".1f"),
    Column("beyond_3_sigma", "> 3σ", "largest", ".2%"),
    Column("beyond_6_sigma", "> 6σ", "largest", ".4%"),
)


def title(diagnosis: Diagnosis) -> str:
    """Return one line: what was measured, how long it took, and how much of it is marked."""
    how = "cached; measured" if diagnosis.cached else "measured"
    marked = f"{len(diagnosis.marks)} marked by rules of thumb" if diagnosis.marks else "none marked"
    return f"{how} in {diagnosis.seconds:.1f} s: {len(diagnosis.numbers):,} numbers, {marked}"


def mark_rows(marks: Sequence[Mark]) -> list[tuple[str, ...]]:
    """Return one row of cells under MARK_HEADER for each marked number."""
    return [
        (
            mark.rule.name,
            mark.number.subject,
            text_of(mark.number.value),
            f"{'>' if mark.rule.bad == 'above' else '<'} {mark.rule.limit:g}",
            where(mark.number),
        )
        for mark in marks
    ]


def where(number: Number) -> str:
    """Return where a number's extreme lies: what its note says, else its index."""
    return number.note or ("" if number.at is None else str(number.at))


def text_of(value: float | None) -> str:
    """Return a value in four digits; one that is not finite as ∞."""
    if value is None:
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def advice(marks: Sequence[Mark]) -> list[str]:
    """Return a line for each rule that marks something: how often, what to do, and whose experience it is."""
    rules = {mark.rule.name: mark.rule for mark in marks}
    counts = {name: sum(mark.rule.name == name for mark in marks) for name in rules}
    return [f"{name} ({counts[name]}): {rule.advice}  [{rule.source}]" for name, rule in rules.items()]


def weight_header(by: By) -> tuple[str, ...]:
    """Return the heading of the table of weights."""
    return (by, *(column.heading for column in COLUMNS))


def weight_rows(numbers: Iterable[Number], by: By) -> list[tuple[str, ...]]:
    """Return one row of cells for each tensor, or for each role or layer the worst of its tensors."""
    groups: dict[str, dict[str, list[float | None]]] = {}
    for number in numbers:
        if number.part == "weights":
            groups.setdefault(group_of(number, by), {}).setdefault(number.metric, []).append(number.value)
    return [(name, *(_worst(values[column.metric], column) for column in COLUMNS)) for name, values in groups.items()]


def group_of(number: Number, by: By) -> str:
    """Return the group that a matrix's number belongs to."""
    if by == "tensor":
        return number.subject
    if by == "role":
        return number.role
    return "outside the blocks" if number.layer is None else f"block {number.layer}"


def _worst(values: Sequence[float | None], column: Column) -> str:
    worst = worst_of(values, column.worst)
    return "∞" if worst is None else format(worst, column.form)


def worst_of(values: Sequence[float | None], which: Literal["largest", "smallest"]) -> float | None:
    """Return the largest or the smallest value; None, which is not finite, is larger than every value."""
    finite = [value for value in values if value is not None]
    if which == "largest":
        return max(finite) if len(finite) == len(values) else None
    return min(finite) if finite else None


def block_rows(numbers: Sequence[Number]) -> list[tuple[str, ...]]:
    """Return one row of cells under BLOCK_HEADER for each visit; a block's removal stands at its last visit."""
    found = {(number.subject, number.metric): number.value for number in numbers}
    subjects = [number.subject for number in numbers if number.metric == "norm_before"]
    rows = []
    for subject in subjects:
        visit, block = subject.partition(", lane")[0], subject.partition(",")[0]
        is_last = subject == [name for name in subjects if name.partition(",")[0] == block][-1]
        cells = [_cell(found, subject, metric, ".1f") for metric in ("norm_before", "norm_after")]
        cells.append(_cell(found, subject, "norm_tail", ".2f"))
        cells += [_cell(found, visit, metric, ".1%") for metric in ("attention_share", "mlp_share")]
        removal = ("removal_divergence", "removal_divergence_error") if is_last else ()
        cells += [_cell(found, block, metric, ".4f") for metric in removal] or ["", ""]
        rows.append((subject, *cells))
    return rows


def _cell(found: dict[tuple[str, str], float | None], subject: str, metric: str, form: str) -> str:
    value = found.get((subject, metric))
    return "" if value is None else format(value, form)
