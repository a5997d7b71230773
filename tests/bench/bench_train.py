"""Training speed: this trainer's step against a plain loop over the same model, in the same run.

Baseline: forward, backward and one AdamW over all parameters, as the shortest PyTorch loop would have it, with the same
autocast. What the trainer adds (Muon's Newton-Schulz, the EMA, clipping, the clock) is what the ratio shows.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.progress import print_table
from pgolf_post.settings import read_settings
from trainer.config import Recipe
from trainer.loop import Trainer

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
WARM_STEPS, STEPS = 2, 7


def trainer_for(recipe_name: str, data: DataFolder, root: Path, at: float) -> Trainer:
    """A trainer of a shipped recipe, its runtime graph as at progress `at`."""
    overrides = [f"data.dir={data.path}", f"run.checkpoint_root={root}"]
    trainer = Trainer(read_settings(RECIPES / recipe_name, Recipe, overrides))
    trainer.update_graph(at)
    return trainer


def plain_step(trainer: Trainer) -> Callable[[], None]:
    """One step of the plain loop over a trainer's model and data."""
    data = trainer.recipe.data
    windows = data.batch_tokens // data.seq_len
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, foreach=True)
    step = 0

    def run() -> None:
        nonlocal step
        inputs, targets = next(trainer.sampler.step_batches(step, windows, windows))
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.dtype is not None):
            logits = trainer.model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    return run


def tokens_per_second(step: Callable[[], object], batch_tokens: int) -> float:
    """Median over STEPS steps, after WARM_STEPS."""
    seconds = []
    for number in range(WARM_STEPS + STEPS):
        started = time.perf_counter()
        step()
        if number >= WARM_STEPS:
            seconds.append(time.perf_counter() - started)
    return batch_tokens / statistics.median(seconds)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = build(stdlib_documents(), Path(folder) / "data", BuildSettings(name="bench"), source=stdlib_source())
        for recipe_name in ("tiny_cpu.toml", "small_cpu.toml"):
            for at in (0.0, 1.0):
                trainer = trainer_for(recipe_name, data, Path(folder), at)
                batch_tokens = trainer.recipe.data.batch_tokens
                plain = tokens_per_second(plain_step(trainer), batch_tokens)
                ours = tokens_per_second(lambda trainer=trainer, at=at: trainer.timed_step(at), batch_tokens)  # type: ignore[misc]
                label = f"{recipe_name.removesuffix('.toml')}, {trainer.num_parameters():,} parameters"
                loops = str(trainer.model.graph.active_loops)
                rows.append((label, loops, f"{plain:,.0f}", f"{ours:,.0f}", f"{ours / plain:.3f}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    header = ("model", "active loops", "baseline: plain loop, tokens/s", "trainer, tokens/s", "ratio")
    print_table(f"Training speed, median of {STEPS} steps; peak memory of the whole run {peak:,.0f} MiB", header, rows)


if __name__ == "__main__":
    main()
