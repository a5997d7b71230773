"""The headline of a diagnosis: its worst numbers under short names, as columns of the ledger.

`pgolf-post ledger table --kind diagnosis --show largest_condition,dead_units,marks` compares checkpoints and trials by
them. Marks are those of the rules on the day; the numbers themselves say more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgolf_post.diagnose.numbers import Number
from pgolf_post.diagnose.rules import find_marks

LARGEST = {
    "largest_condition": "condition",
    "largest_kurtosis": "kurtosis",
    "largest_row_ratio": "worst_row_ratio",
    "largest_input_peak": "input_peak",
    "softcap_top_share": "softcap_top_share",
    "largest_sharpness": "attention_sharpness",
}
SMALLEST = {
    "smallest_rank_share": "effective_rank_share",
    "smallest_attention_share": "attention_share",
    "smallest_mlp_share": "mlp_share",
    "smallest_removal": "removal_divergence",
}
TOTAL = {"dead_units": "dead_units"}


def headline(numbers: Sequence[Number]) -> dict[str, Any]:
    """Return the worst numbers that are finite, the number of marks and the names of the rules that made them."""
    values: dict[str, list[float]] = {}
    for number in numbers:
        if number.value is not None:
            values.setdefault(number.metric, []).append(number.value)
    found: dict[str, Any] = {}
    for names, reduce in ((LARGEST, max), (SMALLEST, min), (TOTAL, sum)):
        found |= {name: reduce(values[metric]) for name, metric in names.items() if metric in values}
    marks = find_marks(numbers)
    return {**found, "marks": len(marks), "marked_by": sorted({mark.rule.name for mark in marks})}
