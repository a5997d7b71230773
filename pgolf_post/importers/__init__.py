"""Foreign checkpoints → native folders, and back. One file per format, one row of `FORMATS`.

A format recognises its state dict, turns it into canonical tensors (one per matrix) and turns those back, tensor by
tensor identical. What a model is built from is in no state dict: see `foreign_config.py`. Compressed artifacts of the
public scripts have a table of their own, `repack.ARTIFACT_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.importers import banked, flat
from pgolf_post.importers.strangers import OWN_FAMILY, call_parts

if TYPE_CHECKING:
    from torch import Tensor


class Format(NamedTuple):
    """One layout of a state dict."""

    recognises: Callable[[Mapping[str, Tensor]], bool]
    to_canonical: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # MismatchError lists tensors it does not have
    from_canonical: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # every tensor identical
    source: str


FORMATS: dict[str, Format] = {
    # name: Format(recognises, to canonical, from canonical, source)
    "flat": Format(
        flat.recognises, flat.to_canonical, flat.from_canonical,
        "openai/parameter-golf: the official baseline, most records to mid-April",
    ),
    "banked": Format(
        banked.recognises, banked.to_canonical, banked.from_canonical,
        "openai/parameter-golf: from the parallel-Muon line on, PR #1855 among them",
    ),
}  # fmt: skip


def get_format(name: str) -> Format:
    """Return a format by name. Raises SettingsError listing the names."""
    if name not in FORMATS:
        raise SettingsError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(state: Mapping[str, Tensor], source: str) -> str:
    """Return the name of a state dict's format. Raises MismatchError for an architecture that is not known."""
    for name, form in FORMATS.items():
        if form.recognises(state):
            return name
    shown, parts = ", ".join(sorted(state)[:8]), call_parts(state)
    raise MismatchError(
        f"{source}: an unknown architecture; its {len(state)} tensors begin {shown}. Known: {', '.join(FORMATS)}"
        + (f". It has {parts}" if parts else ""),
        hint=OWN_FAMILY,
    )
