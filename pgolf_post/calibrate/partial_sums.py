"""Partial sums of an interrupted calibration: each process saves the sums of the batches it has finished.

A `<stats>.partial` folder beside the result holds a file per process: its sums, the numbers of their batches, and a
hash. Sums add up, so the next run, with any number of processes, takes the saved ones and shares out the other batches.
Files can overlap if a process was killed between writing merged sums and removing their parts: then the larger file is
taken, and the batches that only the other held are done again.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from pgolf_post.base.partial import read_partial, write_partial
from pgolf_post.base.progress import say
from pgolf_post.base.ranks import Ranks
from pgolf_post.calibrate.packed import pack_upper, unpack_upper
from pgolf_post.calibrate.sums import MATRICES, Sums, kind_of
from pgolf_post.errors import DamagedFileError

SAVE_SECONDS = 20.0  # between two saves, or longer, so that saving takes at most SAVE_SHARE of the time
SAVE_SHARE = 0.03


class PartialSums:
    """One process's file of partial sums, and the files it resumed from."""

    def __init__(self, folder: Path, batch_windows: int, ranks: Ranks) -> None:
        self.folder, self.batch_windows, self.ranks = folder, batch_windows, ranks
        self.path = folder / f"{secrets.token_hex(8)}-{ranks.rank}.safetensors"
        self.absorbed: list[Path] = []  # files whose sums are part of this process's
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0

    def resume(self) -> tuple[Sums, set[int]]:
        """Return the saved sums (on rank 0; on other ranks empty ones) and the numbers of their batches.

        No process may save before all have called this.
        """
        sums, done = Sums(), set[int]()
        read = {path: self._read(path) for path in self.folder.glob("*.safetensors")}
        intact = [(path.name, *part) for path, part in read.items() if part is not None]
        for _, saved, batches in sorted(intact, key=lambda item: (-len(item[2]), item[0])):
            if not batches & done:
                done |= batches
                sums.merge(saved)
        if done:
            say(f"resuming: {len(done)} batches were done before")
        if not self.ranks.is_main:
            return Sums(), done
        self.absorbed = list(read)
        return sums, done

    def save_if_due(self, sums: Sums, batches: set[int]) -> None:
        """Save the sums so far if the last save is long enough ago."""
        if time.perf_counter() - self.saved_at >= max(SAVE_SECONDS, self.save_seconds / SAVE_SHARE):
            self.save(sums, batches)

    def save(self, sums: Sums, batches: set[int]) -> None:
        """Write the sums so far in one rename, then remove the files that they contain. Raises PgolfError."""
        started = time.perf_counter()
        tensors = {key: _packed(key, sums[key]) for key in sums}
        facts = {"batch_windows": self.batch_windows, "batches": sorted(batches)}
        write_partial(self.path, tensors, facts)
        for path in self.absorbed:
            path.unlink(missing_ok=True)
        self.absorbed = []
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - started

    def _read(self, path: Path) -> tuple[Sums, set[int]] | None:
        """Return a file's sums and batches; None, with a message, if it is damaged or its batches have another size."""
        try:
            facts, tensors = read_partial(path)
            if facts["batch_windows"] != self.batch_windows:
                raise DamagedFileError("its batches have another size")
            return Sums({key: _unpacked(key, tensor) for key, tensor in tensors.items()}), set(facts["batches"])
        except (KeyError, TypeError, ValueError, DamagedFileError) as error:
            say(f"{path}: {error}; its batches are done again")
            return None


def _packed(key: str, tensor: Tensor) -> Tensor:
    return pack_upper(tensor, np.float64) if kind_of(key) in MATRICES else tensor.cpu()


def _unpacked(key: str, tensor: Tensor) -> Tensor:
    return unpack_upper(tensor) if kind_of(key) in MATRICES else tensor
