"""Which parameters a run may train: everything, the last blocks, or only gains, mixes and gates.

The small control tensors (a few thousand numbers) steer every block's share in the residual stream: they adapt within
few tokens, can hardly overfit, and need next to no optimizer memory.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from pgolf_post.families import ModelFamily
from pgolf_post.score.ttt.settings import TTTProtocol

LAYER = re.compile(r"\.(\d+)(?:_p\d+)?\.")  # blocks.3.attn…, override_mlps.3_p1.fc…


def trained_parameters(module: nn.Module, family: ModelFamily, settings: TTTProtocol) -> dict[str, Tensor]:
    """Parameters by name that a chunk-wise run trains. Raises SettingsError if none is left."""
    names = [name for name, parameter in module.named_parameters() if parameter.is_floating_point()]
    if settings.method == "scales":
        names = [name for name in names if family.role(name) == "control"]
    if settings.last_blocks is not None:
        names = in_last_blocks(names, settings.last_blocks)
    names = [name for name in names if not any(re.search(pattern, name) for pattern in settings.freeze)]
    if not names:
        raise SettingsError("the settings of test-time training leave no parameter to train: see last_blocks, freeze")
    parameters = dict(module.named_parameters())
    return {name: parameters[name] for name in names}


def in_last_blocks(names: list[str], count: int) -> list[str]:
    """The names that belong to the last `count` blocks. Raises SettingsError beyond what there is."""
    layers = {name: int(found.group(1)) for name in names if (found := LAYER.search(name))}
    number = max(layers.values(), default=-1) + 1
    if count > number:
        raise SettingsError(f"last_blocks {count} exceeds the model's {number} blocks")
    return [name for name, layer in layers.items() if layer >= number - count]
