"""Foreign checkpoints → native folders, and back. One file per format, one row per file.

A format knows how to recognise its state dict, turn it into canonical tensors (one per matrix) and turn those back,
tensor by tensor identical. What the model is built from is in no state dict: see `foreign_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from pgolf_post.errors import MismatchError
from pgolf_post.importers import banked, flat


class Format(Protocol):
    """What a format's module offers."""

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether this state dict is of the format."""

    def to_canonical(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors. Raises MismatchError listing tensors the format does not have."""

    def from_canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The foreign state dict again, every tensor identical."""


FORMATS: dict[str, Format] = {
    "flat": flat,  # the official baseline and most records to mid-April
    "banked": banked,  # from the parallel-Muon line on
}


def recognise(state: Mapping[str, Tensor], source: str) -> str:
    """The name of the format of a state dict. Raises MismatchError for an architecture that is not known."""
    for name, module in FORMATS.items():
        if module.recognises(state):
            return name
    shown = ", ".join(sorted(state)[:8])
    raise MismatchError(
        f"{source}: an unknown architecture; its {len(state)} tensors begin {shown}. Known: {', '.join(FORMATS)}"
    )
