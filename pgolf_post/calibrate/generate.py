"""Text that the model writes itself: calibration without any training or validation text.

Windows start with BOS and continue token by token, each drawn from softmax(logits / temperature). A batch of windows
goes through the model at once, with the keys and values of earlier tokens cached (`start_past`), so that a step costs
one token per window. The random numbers depend on the seed and the window alone, and the batches are fixed, so any
number of processes writes the same text. Batches are saved as they are written: an interrupted run goes on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pgolf_post.base.partial import read_partial, write_partial
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.base.storage import PARTIAL_SUFFIX
from pgolf_post.calibrate.backward import sample_labels
from pgolf_post.calibrate.randomness import uniforms
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.text import num_windows
from pgolf_post.checkpoint import View, read_tensors, write_tensors
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.derived import Stage, require_writable_result
from pgolf_post.errors import DamagedFileError, SettingsError
from pgolf_post.families import load_module

SELFTEXT = Stage("selftext", 1, "tokens.safetensors")
WINDOWS_AT_ONCE = 32
SAVE_SECONDS = 20.0  # between two saves of what was written
SAVED = "[!.]*.safetensors"  # names of saved batches, without those that are being written


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
    count = num_windows(settings.tokens, seq_len)
    identity = {"windows": count, "seq_len": seq_len, "seed": settings.seed, "temperature": settings.temperature}
    folder = view.checkpoint.derived(SELFTEXT.name, SELFTEXT.id([view.id], identity))
    # written once, each rank its share of the windows
    if ranks.main_says(SELFTEXT.intact_meta(folder) if ranks.is_main else None) is None:
        if ranks.is_main:
            require_writable_result(folder)
        partial = WrittenBatches(folder.with_name(folder.name + PARTIAL_SUFFIX))
        rows = torch.from_numpy(_write_share(view, settings, count, seq_len, ranks, partial)).to(ranks.device)
        ranks.sum_(rows)  # zeros where another rank wrote
        config = {"view": view.name, "view_id": view.id, **identity}

        def make(building: Path) -> Mapping[str, Any]:
            write_tensors(building / SELFTEXT.payload, {"tokens": rows.to(torch.int32)})
            return {"tokens": rows.numel()}

        if ranks.is_main:
            SELFTEXT.store(folder, config, make)
            partial.remove()
    ranks.wait()
    tokens: np.ndarray = read_tensors(folder / SELFTEXT.payload)["tokens"].long().numpy()
    return tokens


class WrittenBatches:
    """The batches of a text under way: a file each time that some are saved, which any number of processes reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved_at = folder, time.perf_counter()
        self.unsaved: dict[str, Tensor] = {}  # batch → (windows, seq_len) int64

    def resume(self) -> dict[int, Tensor]:
        """Return the batches that were written before; those of a file not of use, said aloud, are written again."""
        written: dict[int, Tensor] = {}
        for path in sorted(self.folder.glob(SAVED)):
            try:
                facts, batches = read_partial(path)
                if facts.get("windows_at_once") != WINDOWS_AT_ONCE:
                    raise DamagedFileError("its batches have another size")
                written |= {int(batch): tokens for batch, tokens in batches.items()}
            except (ValueError, DamagedFileError) as error:
                say(f"{path}: {error}; its windows are written again")
        return written

    def add(self, batch: int, tokens: np.ndarray) -> None:
        """Keep a batch, and save those that are kept if the last save is long enough ago. Raises PgolfError."""
        self.unsaved[str(batch)] = torch.from_numpy(tokens)
        if time.perf_counter() - self.saved_at >= SAVE_SECONDS:
            path = self.folder / f"{secrets.token_hex(8)}.safetensors"
            write_partial(path, self.unsaved, {"windows_at_once": WINDOWS_AT_ONCE})
            self.unsaved, self.saved_at = {}, time.perf_counter()

    def remove(self) -> None:
        """Delete all files, and the folder unless another process is saving its batches of the same text there."""
        for path in self.folder.glob(SAVED):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another process removed it
            self.folder.rmdir()


def _write_share(
    view: View, settings: CalibrationSettings, count: int, seq_len: int, ranks: Ranks, partial: WrittenBatches
) -> np.ndarray:
    """Return a text with this rank's windows written and zeros elsewhere; rank 0's hold those written before, too."""
    module = load_module(view.config, view.tensors, str(view)).to(ranks.device)
    text = np.zeros((count, seq_len), dtype=np.int64)
    spans = [slice(first, min(first + WINDOWS_AT_ONCE, count)) for first in range(0, count, WINDOWS_AT_ONCE)]
    before = partial.resume()
    ranks.wait()  # none saves before all have read
    if before:
        say(f"resuming: {len(before)} of {len(spans)} batches of text were written before")
    with progress_bar("writing text", count, "windows") as advance:
        for batch, rows in before.items():
            text[spans[batch]] = rows.numpy() if ranks.is_main else 0
            advance(len(rows))
        for batch in ranks.share(batch for batch in range(len(spans)) if batch not in before):
            numbers = uniforms(settings.seed, "generation", range(spans[batch].start, spans[batch].stop), seq_len)
            text[spans[batch]] = write_windows(module, numbers, settings.temperature)
            partial.add(batch, text[spans[batch]])
            advance(len(numbers) * ranks.world_size)
    return text
