"""The plans that ship: one TOML file each. Kept light, so that the command line can name them without loading torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

DEFAULT_PRESET = "sdclip-1394"
FOLDER = Path(__file__).parent


@cache
def preset_names() -> tuple[str, ...]:
    """The presets, in name order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
