"""Train all weights, or those of the last blocks, on each chunk after it is scored.

Source: openai/parameter-golf, PR #1493, whose settings are the defaults.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from pgolf_post.errors import SettingsError
from pgolf_post.score.ttt.chunks import ChunkPass, ChunkProtocol

LAYER = re.compile(r"\.(\d+)(?:_p\d+)?\.")  # blocks.3.attn…, override_mlps.3_p1.fc…


class SGDProtocol(ChunkProtocol):
    method: Literal["sgd"] = "sgd"
    last_blocks: int | None = Field(None, ge=1, description="train only the last n blocks; without it, everything")


class SGDPass(ChunkPass[SGDProtocol]):
    """Method `sgd`."""

    def trained(self, names: list[str]) -> list[str]:
        count = self.settings.last_blocks
        return names if count is None else in_last_blocks(names, count)


def in_last_blocks(names: list[str], count: int) -> list[str]:
    """Return the names that belong to the last `count` blocks. Raises SettingsError for more blocks than there are."""
    layers = {name: int(match.group(1)) for name in names if (match := LAYER.search(name))}
    number = max(layers.values(), default=-1) + 1
    if count > number:
        raise SettingsError(f"last_blocks {count} exceeds the model's {number} blocks")
    return [name for name, layer in layers.items() if layer >= number - count]
