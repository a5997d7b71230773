"""Train only gains, mixes and gates on each chunk after it is scored.

The small control tensors (a few thousand numbers) steer every block's share in the residual stream: they adapt within
few tokens, can hardly overfit, and need next to no optimizer memory.
"""

from __future__ import annotations

from typing import Literal

from pgolf_post.score.ttt.chunks import ChunkPass, ChunkProtocol


class ScalesProtocol(ChunkProtocol):
    method: Literal["scales"] = "scales"


class ScalesPass(ChunkPass[ScalesProtocol]):
    """Method `scales`."""

    def trained(self, names: list[str]) -> list[str]:
        return [name for name in names if self.family.role(name) == "control"]
