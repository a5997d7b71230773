"""Rows of a lookup table: how often each will be looked up, from how often it was in little text.

An error in a row enters as often as the row is looked up. A table of n-grams has tens of thousands of rows, and the
text of statistics looks most of them up a few times or never. By their counts those rows would be insensitive, but
other text looks them up. So counts are taken as Poisson draws of frequencies, and frequencies as draws of a gamma
distribution with the mean of the counts and the shape α under which the counts are likeliest (empirical Bayes:
Robbins, 1956). A row has its posterior mean, (n + α)/(n̄ + α)·n̄. What one lookup costs is shrunk likewise, towards the
table's average lookup.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR_LOOKUPS = 4.0  # average lookups that a row's own are mixed with
SHAPES = torch.logspace(-3, 3, 241, dtype=torch.float64)  # of which the likeliest is taken


def expected_sums(counts: Tensor, sums: Tensor) -> Tensor:  # (rows,), (rows,) float64 → the same
    """Return what each row's sum over its lookups is expected to be in other text of the same length.

    The total of the counts is kept: rows that were looked up often give to rows that were not.
    """
    total = counts.sum()
    if not total:
        return sums
    frequencies = expected_counts(counts)
    average = sums.sum() / total
    return frequencies * (sums + PRIOR_LOOKUPS * average) / (counts + PRIOR_LOOKUPS)


def expected_counts(counts: Tensor) -> Tensor:  # (rows,) float64 → the same
    """Return posterior means of counts under the likeliest gamma prior of the mean count."""
    mean, shape = counts.mean(), likeliest_shape(counts)
    return (counts + shape) * (mean / (mean + shape))


def likeliest_shape(counts: Tensor) -> Tensor:  # (rows,) float64 → ()
    """Return the shape α of a negative binomial of the counts' mean under which they are likeliest."""
    values, rows = counts.unique(return_counts=True)
    total = values + (shapes := SHAPES[:, None])
    each = total.lgamma() - shapes.lgamma() + shapes * shapes.log() - total * (shapes + counts.mean()).log()
    return SHAPES[(each * rows).sum(1).argmax()]
