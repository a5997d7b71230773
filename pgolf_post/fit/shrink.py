"""The share of a stage of fine-tuning that is kept: as far as held-out text agrees.

One rate does not suit all. The fewer tokens a stage reads for each weight that it moves, the more of a step is noise,
and noise adds up. So what a stage came to is taken back towards where it began. The share that is kept is the least of
a parabola through the divergences on held-out text at none, half and all of the way.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pgolf_post.fit.probe import Probe


def agreed_share(
    probe: Probe,  # of held-out text
    others: Mapping[str, Tensor],  # changed before, and not by the stage
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> float:
    """Return the share of a stage's way with the least divergence, 0 to 1. Raises NumericsError as `Probe` does."""
    places = [{**others, **part_of_way(before, after, share)} for share in (0.0, 0.5, 1.0)]
    none, half, whole = (measured.mean for measured in probe.divergences(places))
    return least_share(none, half, whole)


def part_of_way(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the weights at a share of the way from `before` to `after`."""
    return {name: weight.lerp(after[name], share) for name, weight in before.items()}


def least_share(none: float, half: float, whole: float) -> float:
    """Return where in [0, 1] the parabola through values at 0, 1/2 and 1 is least."""
    curvature, slope = 2 * (none - 2 * half + whole), 4 * half - 3 * none - whole
    if curvature <= 0:
        return 1.0 if whole < none else 0.0
    return min(max(-slope / (2 * curvature), 0.0), 1.0)
