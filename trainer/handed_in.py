"""The program of a record folder that trains: train, collect statistics, quantize, pack, then score what was packed.

    torchrun --standalone --nproc_per_node=8 train_gpt.py DATA     DATA holds fineweb_train_*.bin and fineweb_val_*.bin
    python train_gpt.py DATA TOKENS eval                           only score the artifact that lies there

Ordinary code that never runs here: `pgolf-post submit --recipe` makes a script of it, with recipe, plan and protocol
known. Every stage is the function that ran here, without what a single run needs no more: checkpoints, resuming, logs.
With a schedule in steps the same machine gets the same weights, and so the same artifact.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf_post.base.autocast import autocast_dtype
from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.packed import pack_upper, unpack_upper
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.calibrate.stats import Stats
from pgolf_post.calibrate.text import draw_training_text
from pgolf_post.families import Fold, Site
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import LqerSettings, TensorPlan
from pgolf_post.quantize.awq import stretch
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.lqer import corrections
from pgolf_post.quantize.rows import keep_tensor, quantize_entries
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.rules import GridRule, KeepRule
from pgolf_post.settings import read_settings
from pgolf_post.submit.evaluate import ARTIFACT, built, read_shards, run
from pgolf_post.submit.fitting import fisher, fitted
from trainer.config import Recipe
from trainer.model.gpt import GolfGPT
from trainer.optim.averages import EMA, RunningMean
from trainer.optim.optimizer import Optimizer
from trainer.schedule.functions import (
    active_loops_at,
    cyclic_momentum,
    lr_multiplier,
    momentum_at,
    progress,
    weight_decay_multiplier,
)
from trainer.step.batches import WindowSampler
from trainer.step.distributed import TrainingRanks
from trainer.step.gradients import GradientAccumulator, micro_batch_tokens, training_autocast


def recipe_of(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe for the program that is made of it. Raises SettingsError, NotFoundError."""
    return read_settings(path, Recipe, overrides)


def known(name: str) -> Any:
    """Return what is known when the program is made: recipe, view, reserve, calibration, entries, folds, sites, …"""
    raise NotImplementedError(name)


def main() -> None:
    """Train and pack, unless told only to score; then score the artifact, and print the sums."""
    ranks = joined()
    folder = Path(sys.argv[1] if sys.argv[1:] else "data")
    if sys.argv[3:] != ["eval"]:
        tensors = train(known("recipe"), folder, ranks)
        text = TrainingText(folder)
        stats = statistics(tensors, text, known("calibration"), ranks)
        if ranks.is_main:
            data = fitted(tensors, stats, text) if known("fits") else artifact(tensors, stats, known("packing"))
            (Path(__file__).parent / ARTIFACT).write_bytes(data)
        ranks.wait()
    run(ranks)


def joined() -> TrainingRanks:
    """Return this process's place, from torchrun's variables."""
    place = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    ranks = TrainingRanks(*(int(os.environ.get(name, default)) for name, default in place))
    if ranks.world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
        dist.init_process_group(timeout=timedelta(hours=6))  # the others wait while rank 0 quantizes and packs
    return ranks


class TrainingText:
    """The training shards of a folder, as the sampler and the calibration take them."""

    def __init__(self, folder: Path) -> None:
        self.path, self.files = folder, sorted(folder.glob("**/fineweb_train_*.bin"))

    def shards(self, split: str) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield each shard with its path."""
        for path in self.files:
            yield path, read_shards([path])


# ---- training ------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, folder: Path, ranks: TrainingRanks) -> dict[str, Tensor]:
    """Train to the end of the schedule. Return the view that is handed in, on the CPU."""
    if recipe.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    text: Any = TrainingText(folder)
    sampler = WindowSampler(text, recipe.data.seq_len, recipe.run.seed)
    torch.manual_seed(recipe.run.seed)
    model = new_model(SimpleNamespace(active_loops=0))
    model.to(ranks.device)
    if known("backend") is not None:
        model.attention_backend = known("backend")
    autocast, micro = (
        training_autocast(recipe.run.precision, ranks.device),
        micro_batch_tokens(recipe, ranks.world_size),
    )
    gradients = GradientAccumulator(recipe, model, ranks, autocast, micro)
    warm_up(model, gradients, sampler)
    optimizer = Optimizer(model, recipe.optim, ranks)
    average = kept_average(model, recipe)

    step, seconds = 0, 0.0
    windows = recipe.data.batch_tokens // recipe.data.seq_len, micro // recipe.data.seq_len
    while (at := progress(recipe.schedule, step, seconds, known("reserve"))) < 1.0:
        started = time.perf_counter()
        active = active_loops_at(recipe.schedule, known("loops"), at)
        model.set_graph(SimpleNamespace(active_loops=active))  # type: ignore[arg-type]
        loss = gradients.accumulate(sampler.step_batches(step, *windows, ranks.rank, ranks.world_size))
        multipliers = (
            lr_multiplier(recipe.schedule, at),
            momentum(recipe, step),
            weight_decay_multiplier(recipe.schedule, at),
        )
        optimizer.step(*multipliers)
        step += 1
        if average is not None and (known("view") == "ema" or at >= (recipe.optim.swa_start or 0.0)):
            average.update(step)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds = ranks.main_float(seconds + time.perf_counter() - started)
        if step % recipe.run.log_every == 0:
            (mean,) = ranks.sum_floats(loss)  # each rank has its share of the mean
            if ranks.is_main:
                print(f"step:{step} train_loss:{mean:.4f} train_time:{seconds:.3f}s", flush=True)
    if ranks.is_main:
        print(f"step:{step} train_time:{seconds:.3f}s", flush=True)
    return {name: tensor.cpu() for name, tensor in {**model.state_dict(), **averaged(average)}.items()}


def new_model(graph: Any) -> GolfGPT:
    """Return the recipe's model, initialised; replaced when the program is made."""
    raise NotImplementedError


def warm_up(model: GolfGPT, gradients: GradientAccumulator, sampler: WindowSampler) -> None:
    """Compile both graphs on made-up tokens before the clock starts."""
    if gradients.compiled:
        shape = gradients.micro_tokens // sampler.seq_len, sampler.seq_len
        for active in (known("loops"), 0):
            model.set_graph(SimpleNamespace(active_loops=active))  # type: ignore[arg-type]
            tokens = torch.full(shape, 2)
            gradients.accumulate([(tokens, tokens)])
        model.zero_grad(set_to_none=True)


def momentum(recipe: Recipe, step: int) -> float:
    """Return Muon's momentum at a step, as `OptimSettings.momentum_for`."""
    cycle, rise = recipe.optim.momentum_cycle_steps, recipe.optim.momentum_warmup_steps
    peak = recipe.optim.momentum_cycle_high if cycle else recipe.optim.momentum
    if cycle is None or step < rise:
        return momentum_at(step, recipe.optim.momentum_start, peak, rise)
    return cyclic_momentum(step - rise, recipe.optim.momentum_cycle_low, peak, cycle)


def kept_average(model: GolfGPT, recipe: Recipe) -> EMA | RunningMean | None:
    """Return the average that is handed in; None for the raw weights."""
    if known("view") == "ema":
        return EMA(model, recipe.optim.ema_decay, recipe.optim.ema_every)
    if known("view") == "swa":
        return RunningMean(model, recipe.optim.swa_every)
    return None


def averaged(average: Any) -> Mapping[str, Tensor]:
    """Return the tensors of an average."""
    if known("view") == "ema":
        return dict(average.shadow)
    return dict(average.mean) if known("view") == "swa" else {}


# ---- statistics, quantization, packing -----------------------------------------------------------------------------


def statistics(tensors: Mapping[str, Tensor], text: Any, settings: CalibrationSettings, ranks: TrainingRanks) -> Stats:
    """Return the statistics of the view over the calibration's windows, rounded as a file of them is."""
    module = built(tensors, ranks.device)
    windows = draw_training_text(text, settings, known("calibration_seq_len"))
    sites: list[Site] = known("sites")
    autocast = autocast_dtype(settings.precision, ranks.device)
    observed = Observed(module, sites, known("lookups"), known("backward"), settings.seed, autocast)
    sums = collect(observed, windows.tokens, ranks)
    hessians = {site.name: unpack_upper(pack_upper(sums[f"hessian.{site.name}"].cpu())) for site in sites}
    magnitudes = {site.name: sums[f"abs.{site.name}"].cpu() for site in sites}
    num_tokens = int(windows.tokens.size)
    backward = fisher(sums, num_tokens) if known("fits") else None
    return Stats(known("stats_id"), hessians, num_tokens, False, magnitudes, fisher=backward)


def artifact(tensors: Mapping[str, Tensor], stats: Stats, packing: PackSettings) -> bytes:
    """Quantize the view by the plan's entries, and pack it."""
    rules = known("rules")
    entries = [
        TensorPlan(name, role, rules[number], site, depth) for name, role, number, site, depth in known("entries")
    ]
    folds: dict[str, Fold] = known("folds")
    stretched = stretch(tensors, entries, stats, folds)
    grid = [entry for entry in entries if isinstance(entry.rule, GridRule)]
    quantized = quantize_entries(grid, stretched, stats, StatsFactors(stats))
    lqer: LqerSettings | None = known("lqer")
    if lqer is not None:
        fed = [entry.name for entry in grid if entry.site]
        floats = stretched.decoded()
        quantized.update(corrections({name: floats[name] for name in fed}, quantized, lqer))
    kept = [entry for entry in entries if isinstance(entry.rule, KeepRule)]
    floats_kept = {entry.name: keep_tensor(entry, tensors[entry.name]) for entry in kept}
    model = QuantizedModel(known("config"), known("lineage"), quantized, floats_kept)
    print(f"symbols_sha256:{model.symbols_sha256()}", flush=True)
    return pack(model, packing)
