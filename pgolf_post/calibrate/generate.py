"""Text that the model writes itself: calibration without any training or validation text.

Windows start with BOS and continue token by token, each drawn from softmax(logits / temperature). A batch of windows
goes through the model at once, with the keys and values of earlier tokens cached (`start_past`), so that a step costs
one token per window. The random numbers depend on the seed and the window alone, and the batches are fixed, so any
number of processes writes the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgolf_post.base.progress import progress_bar
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate.backward import sample_labels
from pgolf_post.calibrate.randomness import uniforms
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.text import num_windows
from pgolf_post.checkpoint import View, read_tensors, write_tensors
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.derived import Stage, require_writable_result
from pgolf_post.errors import SettingsError
from pgolf_post.families import load_module

SELFTEXT = Stage("selftext", 1, "tokens.safetensors")
WINDOWS_AT_ONCE = 32


@torch.no_grad()
def write_windows(
    module: nn.Module,  # a LanguageModel
    numbers: np.ndarray,  # (windows, seq_len) float64 in [0, 1): number t decides token t; the first is BOS
    temperature: float,
) -> np.ndarray:  # (windows, seq_len) int64
    """Write one batch of windows. Raises SettingsError if the model's family cannot continue a text."""
    if not hasattr(module, "start_past"):
        raise SettingsError(
            "this model family cannot write text: its module has no start_past()",
            hint="--calibration-source train, or implement start_past and hidden(tokens, past=…) in the family",
        )
    model: Any = module
    device = next(module.parameters()).device
    batch, seq_len = numbers.shape
    draws = torch.from_numpy(numbers).to(device)
    tokens = torch.full((batch, seq_len), BOS_ID, dtype=torch.int64, device=device)
    past = model.start_past(batch, seq_len)
    for position in range(1, seq_len):
        logits: Tensor = model.logits(model.hidden(tokens[:, position - 1 : position], past=past))[:, -1]
        p = torch.softmax(logits.double() / temperature, -1)
        tokens[:, position] = sample_labels(p, draws[:, position])
    written: np.ndarray = tokens.numpy(force=True)
    return written


def own_text(
    view: View,
    settings: CalibrationSettings,
    seq_len: int,
    ranks: Ranks = ALONE,
) -> np.ndarray:  # (windows, seq_len) int64
    """Return the text that a view writes itself, from the cache or written now by all ranks."""
    # the id: whose text, how much, by which numbers
    count = num_windows(settings, seq_len)
    identity = {"windows": count, "seq_len": seq_len, "seed": settings.seed, "temperature": settings.temperature}
    folder = view.checkpoint.derived(SELFTEXT.name, SELFTEXT.id([view.id], identity))
    # written once, each rank its share of the windows
    if ranks.main_says(SELFTEXT.intact_meta(folder) if ranks.is_main else None) is None:
        if ranks.is_main:
            require_writable_result(folder)
        rows = torch.from_numpy(_write_share(view, settings, count, seq_len, ranks)).to(ranks.device)
        ranks.sum_(rows)  # zeros where another rank wrote
        config = {"view": view.name, "view_id": view.id, **identity}

        def make(building: Path) -> Mapping[str, Any]:
            write_tensors(building / SELFTEXT.payload, {"tokens": rows.to(torch.int32)})
            return {"tokens": rows.numel()}

        if ranks.is_main:
            SELFTEXT.store(folder, config, make)
    ranks.wait()
    tokens: np.ndarray = read_tensors(folder / SELFTEXT.payload)["tokens"].long().numpy()
    return tokens


def _write_share(view: View, settings: CalibrationSettings, count: int, seq_len: int, ranks: Ranks) -> np.ndarray:
    """Return a text with this rank's windows written and zeros elsewhere."""
    module = load_module(view.config, view.tensors, str(view)).to(ranks.device)
    text = np.zeros((count, seq_len), dtype=np.int64)
    with progress_bar("writing text", count, "windows") as advance:
        for batch in ranks.share(range(-(-count // WINDOWS_AT_ONCE))):
            windows = range(batch * WINDOWS_AT_ONCE, min((batch + 1) * WINDOWS_AT_ONCE, count))
            numbers = uniforms(settings.seed, "generation", windows, seq_len)
            text[windows.start : windows.stop] = write_windows(module, numbers, settings.temperature)
            advance(len(windows) * ranks.world_size)
    return text
