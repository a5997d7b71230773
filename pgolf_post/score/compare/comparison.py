"""The paired comparison of two scores: one difference in bits per byte, and how sure it is, three ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pgolf_post.errors import SettingsError
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import SignTest, paired_documents, sign_test
from pgolf_post.score.compare.paired import Difference, bootstrap_interval, t_interval
from pgolf_post.score.stage import StoredScore


@dataclass(frozen=True)
class Comparison:
    """Bits per byte of a candidate less those of a control; negative is better."""

    candidate_bpb: float
    control_bpb: float
    by_t: Difference  # interval from the variance over documents, with jackknifed ratio
    by_bootstrap: Difference  # interval from documents drawn again
    signs: SignTest

    @property
    def difference_bpb(self) -> float:
        """The difference itself."""
        return self.by_t.bpb

    def facts(self) -> dict[str, Any]:
        """Return it as JSON facts; a bootstrap interval that is not finite is left out."""
        resampled = {"bootstrap_low_bpb": self.by_bootstrap.low, "bootstrap_high_bpb": self.by_bootstrap.high}
        finite = {key: value for key, value in resampled.items() if np.isfinite(value)}
        sign = {"better": self.signs.better, "worse": self.signs.worse, "sign_p": self.signs.p}
        return {"bpb": self.candidate_bpb, "control_bpb": self.control_bpb, **self.by_t.facts(), **finite, **sign}


def compare(
    candidate: Score | StoredScore, control: Score | StoredScore, *, level: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare two scores of the same text, paired by document.

    `level` is that of the intervals, `seed` the bootstrap's.

        >>> pg.compare(pg.score(artifact, data), pg.score(view, data)).by_t

    Raises MismatchError if the two did not score the same tokens, SettingsError for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise SettingsError(f"level = {level}: the level of an interval lies between 0 and 1, such as 0.95")
    first, second = (one.sums if isinstance(one, StoredScore) else one for one in (candidate, control))
    clusters = paired_documents(first, second)
    return Comparison(
        first.bpb,
        second.bpb,
        t_interval(clusters, level),
        bootstrap_interval(clusters, level, seed=seed),
        sign_test(clusters),
    )
