"""Calibration's cost, as ratios: statistics against the plain passes they ride on, on the same tokens, in float32.

Plain forward = what scoring runs: hidden states, logits and loss of every token, without gradients. Forward + backward
= what training runs: the same with gradients of all weights. Both use the batches of the pass they are compared with.
Seconds are those of the processor (one thread), which other work on the machine disturbs least; runs are interleaved
and the least of each is taken. Weights are random: no operation here takes longer for others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.progress import print_table
from pgolf_post.calibrate.collect import Observed
from pgolf_post.calibrate.stats import FISHER_PAYLOAD, PAYLOAD, open_stats, write_stats
from pgolf_post.calibrate.sums import Sums
from pgolf_post.derived import store, verified_meta
from pgolf_post.settings import read_toml
from trainer.family import GolfGPTFamily
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT

RECIPES = Path(__file__).parents[1] / "trainer" / "recipes"
MODELS = {"small_cpu.toml": (1024, 8192), "record_8xh100.toml": (8192, 4096)}  # recipe: (vocabulary, tokens)
REPEATS = 3


def model_of(recipe: str, vocab_size: int) -> GolfGPT:
    """A recipe's model with random weights and all its loops on."""
    tree = read_toml(RECIPES / recipe)
    config = ModelConfig(**tree["model"], vocab_size=vocab_size, train_seq_len=tree["data"]["seq_len"])
    torch.manual_seed(0)
    model = GolfGPT(config, GraphState(active_loops=config.num_loops))
    model.initialise()
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def plain(model: GolfGPT, tokens: Tensor) -> Tensor:
    """Mean loss of predicting each token's successor (the last one's is the first token: it costs the same)."""
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def forward(model: GolfGPT, batches: list[Tensor]) -> None:
    with torch.no_grad():
        for tokens in batches:
            plain(model, tokens)


def forward_backward(model: GolfGPT, batches: list[Tensor]) -> None:
    model.requires_grad_(True)
    for tokens in batches:
        plain(model, tokens).backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def gathered(observed: Observed, text: np.ndarray) -> Sums:
    """One calibration pass, without files."""
    sums, size = Sums(), observed.batch_windows(text.shape[1])
    for start in range(0, len(text), size):
        observed.add_batch(text, range(start, min(start + size, len(text))), sums)
    return sums


def interleaved(*passes: Callable[[], Any]) -> list[float]:
    """The least processor seconds of each of several passes that take turns."""
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(REPEATS):
        for run, spent in zip(passes, seconds, strict=True):
            started = time.process_time()
            run()
            spent.append(time.process_time() - started)
    return [min(spent) for spent in seconds]


def passes_row(recipe: str) -> tuple[tuple[str, ...], Sums]:
    """One model's row, and the sums of its Fisher pass."""
    vocab_size, num_tokens = MODELS[recipe]
    model, family = model_of(recipe, vocab_size), GolfGPTFamily()
    seq_len = model.config.train_seq_len
    text = np.random.default_rng(0).integers(2, vocab_size, (num_tokens // seq_len, seq_len))
    half = Observed(model, family.sites(model))
    both = Observed(model, family.sites(model), family.lookups(model), fisher=True)
    batches = {
        observed.fisher: list(torch.from_numpy(text).split(observed.batch_windows(text.shape[1])))
        for observed in (half, both)
    }
    seconds = interleaved(
        lambda: forward(model, batches[False]),
        lambda: gathered(half, text),
        lambda: forward_backward(model, batches[True]),
        lambda: gathered(both, text),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ratios = (seconds[1] / seconds[0], seconds[3] / seconds[2])
    label = f"{recipe.removesuffix('.toml')}, {parameters:,} parameters, {text.size:,} tokens"
    row = (label, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{ratios[0]:.2f}", f"{seconds[2]:.2f}")
    return (*row, f"{seconds[3]:.2f}", f"{ratios[1]:.2f}"), gathered(both, text)


def reading_rows(sums: Sums) -> list[tuple[str, str, str]]:
    """Processor seconds to verify and read every matrix of a stored set, and its size: either half."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats" / "bench"

        def make(building: Path) -> dict[str, Any]:
            write_stats(building, sums)
            fisher = {"head": "tok_emb.weight", "token_table": "tok_emb.weight"}
            return {"num_tokens": int(sums["tokens.all"]), "view_id": "bench", "fisher": fisher}

        store(path, PAYLOAD, {"stage": "stats"}, make)
        for half, name in (("hessians", PAYLOAD), ("weighted moments", FISHER_PAYLOAD)):
            spent = []
            for _ in range(REPEATS):
                started = time.process_time()
                stats = open_stats(path, "bench", verified_meta(path, PAYLOAD), cached=True)
                matrices = stats.hessians if half == "hessians" else stats.fisher.weighted  # type: ignore[union-attr]
                count = sum(1 for _ in matrices.values())
                spent.append(time.process_time() - started)
            size = (path / name).stat().st_size
            rows.append((f"{half}: {count} matrices", f"{min(spent):.2f}", f"{size / 1e6:.1f} MB"))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rows, sums = [], Sums()
    for recipe in MODELS:
        row, sums = passes_row(recipe)
        rows.append(row)
    header = ("model", "forward s", "calibrate s", "ratio", "forward + backward s", "--fisher s", "ratio")
    print_table(f"Calibration, processor seconds, least of {REPEATS}", header, rows)
    print_table("Reading a cached 36M set, processor seconds", ("", "seconds", "on disk"), reading_rows(sums))


if __name__ == "__main__":
    main()
