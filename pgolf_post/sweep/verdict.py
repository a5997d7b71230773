"""Whether a trial is better than its control: by its paired interval, and beyond what rounding alone does.

A trial is called better or worse only if its interval excludes zero *and* the difference exceeds the noise floor: what
the control's own score does when its scales are jittered by 1e-4, which no setting under test can be told apart from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from pgolf_post.ledger import Row, Verdict
from pgolf_post.sweep.settings import SweepSpec

FLOOR_LEVEL = 0.95


def judge(
    spec: SweepSpec, result: Mapping[str, Any], control: Mapping[str, Any], floor: float | None
) -> tuple[Verdict, str]:
    """Return verdict and conclusion from a trial's and the control's results; `floor` (bpb) is None if not measured."""
    stage = spec.deciding_stage
    score = result[stage] if stage else {}
    difference = score.get("difference_bpb")
    known = score.get("low_bpb") is not None and score.get("high_bpb") is not None
    low, high = (float(score[key]) if known else math.nan for key in ("low_bpb", "high_bpb"))
    outside = floor is None or (difference is not None and abs(difference) > floor)
    better, worse = known and high < 0 and outside, known and low > 0 and outside
    by = f"{difference:+.5f} bpb" if difference is not None else ""
    if spec.ranking == "bytes":
        if "artifact_bytes" not in result or "artifact_bytes" not in control:
            return "neutral", "no artifact, so no bytes to rank by" + (f"; {by}" if by else "")
        saved = control["artifact_bytes"] - result["artifact_bytes"]
        text = f"{-saved:+,} bytes" + (f", {by}" if by else "")
        if worse or saved < 0:
            return "negative" if not better else "neutral", text
        return ("positive" if saved > 0 else "neutral"), text
    if better or worse:
        return ("positive" if better else "negative"), by
    why = "its interval holds zero" if known and low <= 0 <= high else "no interval" if not known else ""
    return "neutral", f"{by}: " + (why or f"inside the noise floor of {floor:.5f}")


def noise_floor(noise: Sequence[Row], stage: str | None) -> float | None:
    """Return the difference in bpb that rounding alone stays within 95 % of the time: t × RMS of the repeats' own.

    None where nothing was repeated.
    """
    differences = [row.result[stage]["difference_bpb"] for row in noise if stage and stage in row.result]
    if not differences:
        return None
    mean_square = sum(value**2 for value in differences) / len(differences)
    return float(stdtrit(len(differences), (1 + FLOOR_LEVEL) / 2)) * math.sqrt(mean_square)
