"""Collecting: windows in batches of a fixed size, shared out over processes, summed up at the end.

Batches and the random numbers of their labels depend on the text and the seed alone, and their sums are added in
float64, so the result is the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pgolf_post.base.autocast import autocast_to
from pgolf_post.base.copying import to_device
from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate.backward import fisher_batch
from pgolf_post.calibrate.forward import forward_batch
from pgolf_post.calibrate.partial_sums import PartialSums
from pgolf_post.calibrate.randomness import uniforms
from pgolf_post.calibrate.sums import MAXIMA, Sums, kind_of
from pgolf_post.families import Lookup, Site

FORWARD_TOKENS = {"cpu": 8192, "cuda": 32768}  # per batch
FISHER_TOKENS = {"cpu": 2048, "cuda": 16384}  # a backward pass keeps every activation; a GPU waits for launches


@dataclass(frozen=True)
class Observed:
    """A model and the statistics to collect from it."""

    module: nn.Module  # a LanguageModel whose parameters need no gradient
    sites: Sequence[Site]
    lookups: Sequence[Lookup] = ()
    fisher: bool = False  # the backward half as well
    seed: int = 0  # of the sampled labels
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def batch_windows(self, seq_len: int) -> int:
        """Windows per batch."""
        return max(1, (FISHER_TOKENS if self.fisher else FORWARD_TOKENS)[self.device.type] // seq_len)

    def add_batch(self, text: np.ndarray, windows: range, sums: Sums) -> None:  # text: (all windows, seq_len)
        """Run the given windows and add their sums."""
        tokens = to_device(torch.from_numpy(text[windows.start : windows.stop]), self.device)
        with autocast_to(self.device, self.autocast):
            if not self.fisher:
                return forward_batch(self.module, self.sites, tokens, sums)
            numbers = to_device(torch.from_numpy(uniforms(self.seed, "labels", windows, tokens.size(1))), self.device)
            return fisher_batch(self.module, self.sites, self.lookups, tokens, numbers, sums)


def collect(
    observed: Observed,
    tokens: np.ndarray,  # (windows, seq_len) int64
    ranks: Ranks = ALONE,
    partial_folder: Path | None = None,  # to save partial sums in, and to resume from
) -> Sums:
    """Return the sums over all windows; with several ranks, the totals on every rank.

    Raises NumericsError naming the first sum that is not finite.
    """
    # start from the partial sums of an interrupted run, which rank 0 holds
    count, size = len(tokens), observed.batch_windows(tokens.shape[1])
    partial = PartialSums(partial_folder, size, ranks) if partial_folder else None
    sums, done = partial.resume() if partial else (Sums(), set[int]())
    sums.to(observed.device)
    sums.products_in = observed.autocast or torch.float32
    ranks.wait()  # no rank writes before all have read
    # add this rank's share of the batches that are not done
    mine = set(done) if ranks.is_main else set()
    with progress_bar("calibrating", count, "windows") as advance:
        advance(min(count, len(done) * size))
        for batch in ranks.share(batch for batch in range(-(-count // size)) if batch not in done):
            windows = range(batch * size, min((batch + 1) * size, count))
            observed.add_batch(tokens, windows, sums)
            mine.add(batch)
            advance(len(windows) * ranks.world_size)
            if partial:
                partial.save_if_due(sums, mine)
    # total over ranks
    _add_up(sums, observed.device, ranks)
    sums.require_finite()
    return sums


def _add_up(sums: Sums, device: torch.device, ranks: Ranks) -> None:
    """Replace each rank's sums by the totals. Rank 0 has had a batch and knows all shapes; others may have had none."""
    shapes: dict[str, list[int]] = ranks.main_says({key: list(sums[key].shape) for key in sums})
    for key, shape in shapes.items():
        total = sums.tensors.setdefault(key, torch.zeros(shape, dtype=torch.float64, device=device))
        (ranks.maximum_ if kind_of(key) in MAXIMA else ranks.sum_)(total)
