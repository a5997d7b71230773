"""A whole text's difference from some of its windows, drawn at random without replacement.

How many bytes each window stands for is known without scoring it, and tells prose from tables, which quantization hurts
differently. So the windows' differences D are regressed on their bytes X, and their mean is corrected for how the drawn
windows' bytes differ from all (the regression estimator, Cochran 1977, ch. 7). As windows run out, so does the error:

    Δ = N · (D̄ + β(X̄ - x̄)) / ΣX      SE = N · s · √((1 - n/N)/n + (X̄ - x̄)²/Sxx) / ΣX,   s of the residuals, n - 2
"""

from __future__ import annotations

import math

import numpy as np


def estimate(
    bits: np.ndarray,  # (n,) differences of the windows drawn
    drawn_bytes: np.ndarray,  # (n,)
    all_bytes: np.ndarray,  # (N,) of every window of the text
) -> tuple[float, float]:
    """Return the whole text's difference in bpb and its standard error; n > 2."""
    count, total = len(bits), len(all_bytes)
    if count == total:
        return math.fsum(bits) / int(all_bytes.sum()), 0.0

    # the slope of differences on bytes, and how far the drawn windows' mean is from all windows'
    off = drawn_bytes - drawn_bytes.mean()
    spread = float(off @ off)
    slope = float(off @ bits) / spread if spread else 0.0
    shift = float(all_bytes.mean() - drawn_bytes.mean())

    # the spread of what bytes do not explain, less as windows run out
    residual = bits - bits.mean() - slope * off
    scale = total / int(all_bytes.sum())
    of_mean = (1 - count / total) / count + (shift * shift / spread if spread else 0.0)
    error = scale * math.sqrt(float(residual @ residual) / (count - 2) * of_mean)
    return scale * (float(bits.mean()) + slope * shift), error
