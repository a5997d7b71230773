"""Interrupted fine-tuning goes on after the last block that it finished.

One file in a `.partial` folder beside the artifact to be holds the weights that every rounded matrix was rounded from,
those of the others and of the floats as tuned so far, the number of blocks that were tuned after, and the seconds
spent, which count as training. Rounding is replayed from them (replay.py); tuning, which takes long, is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pgolf_post.base.partial import read_partial, write_partial
from pgolf_post.base.progress import say
from pgolf_post.errors import DamagedFileError

FILE = "tuning.safetensors"


@dataclass(frozen=True)
class Done:
    """Fine-tuning that was done before."""

    blocks: int = 0  # after which matrices were tuned
    seconds: float = 0.0
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # of every matrix, and of floats that are tuned


class TunePartial:
    """The file of a fine-tuning under way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE

    def resume(self) -> Done:
        """Return what was done; nothing, said aloud, where the file is damaged."""
        if not self.path.is_file():
            return Done()
        try:
            facts, tensors = read_partial(self.path)
            done = Done(int(facts["blocks"]), float(facts["seconds"]), tensors)
        except (KeyError, TypeError, ValueError, DamagedFileError) as error:
            say(f"{self.path}: {error}; fine-tuning starts again")
            return Done()
        say(f"resuming: fine-tuned after {done.blocks} blocks before")
        return done

    def save(self, done: Done) -> None:
        """Replace the file in one rename. Raises PgolfError."""
        tensors = {name: tensor.contiguous() for name, tensor in done.weights.items()}
        write_partial(self.path, tensors, {"blocks": done.blocks, "seconds": done.seconds})

    def remove(self) -> None:
        """Delete the file and its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
