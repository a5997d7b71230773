"""Training speed: this trainer's step, eager and compiled, against a plain loop over the same model in the same run.

Baseline: forward, backward and one AdamW over all parameters, as the shortest PyTorch loop would have it, with the same
autocast. What the trainer adds (Muon's Newton-Schulz, the EMA, clipping, the clock) and what the compiler takes away is
what the ratios show: the three take turns step by step, so that a busy machine slows all of them alike. On a CPU the
ratio of processor seconds stands beside that of seconds, because other work does not change it.

On a GPU also the record recipe's model with the 98,304 tokens that each of eight GPUs has of a step, against what its
authors' log says of one of theirs. Argument: `--record-only`.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pgolf_post.base.progress import print_table, say
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.provenance import accelerator_name
from pgolf_post.settings import read_settings
from trainer.config import Recipe
from trainer.model.activations import activation_of
from trainer.model.architecture import ModelConfig
from trainer.model.attention_backends import BACKENDS
from trainer.model.layers import activation_names, mlp_widths
from trainer.model.visits import visit_list
from trainer.run.loop import Trainer
from trainer.run.warm_up import warm_up

RECIPES = Path(__file__).parents[1] / "trainer" / "recipes"
WARM_ROUNDS, ROUNDS = 1, 5
VARIANTS = ("plain", "eager", "compiled")

RECORD_TOKENS = 98_304  # of one of eight GPUs in a step of 786,432
PUBLISHED = {0: 1.02e6, 2: 0.70e6}  # active loops → tokens/s of one H100, openai/parameter-golf #1855, seed 42
H100_FLOPS = 989.4e12  # dense bf16, NVIDIA's data sheet; an H200's are the same
RECORD_STEPS = 20


def build_data(folder: Path, vocab_size: int = 1024) -> DataFolder:
    """The standard library as a data folder."""
    settings = BuildSettings(name="bench", vocab_size=vocab_size)
    return build(stdlib_documents(), folder / f"data_{vocab_size}", settings, source=stdlib_source())


def trainer_for(recipe_name: str, data: Path, root: Path, at: float, *overrides: str) -> Trainer:
    """A trainer of a shipped recipe, its runtime graph as at progress `at`."""
    settings = [f"data.dir={data}", f"run.checkpoint_root={root}", *overrides]
    trainer = Trainer(read_settings(RECIPES / recipe_name, Recipe, settings))
    trainer.state.update_graph(at)
    return trainer


def plain_step(trainer: Trainer) -> Callable[[], None]:
    """One step of the plain loop over a trainer's model and data."""
    data, device = trainer.recipe.data, trainer.state.device
    windows = data.batch_tokens // data.seq_len
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, foreach=True)
    step = 0

    def run() -> None:
        nonlocal step
        inputs, targets = next(trainer.sampler.step_batches(step, windows, windows))
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.state.autocast is not None):
            logits = trainer.model(inputs.to(device))
        F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        step += 1

    return run


def step_of(variant: str, recipe_name: str, data: Path, root: Path, at: float) -> tuple[Trainer, Callable[[], object]]:
    """A trainer and what to call for one step of it."""
    trainer = trainer_for(recipe_name, data, root, at, f"run.compile={str(variant == 'compiled').lower()}")
    return trainer, plain_step(trainer) if variant == "plain" else lambda: trainer.timed_step(at)


def take_turns(steps: dict[str, Callable[[], object]]) -> dict[str, list[tuple[float, float]]]:
    """(Seconds, processor seconds) of each variant's step in each round, after rounds that warm up (and compile)."""
    spent: dict[str, list[tuple[float, float]]] = {variant: [] for variant in steps}
    for number in range(WARM_ROUNDS + ROUNDS):
        for variant, step in steps.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            step()
            if number >= WARM_ROUNDS:
                spent[variant].append((time.perf_counter() - started, time.process_time() - started_cpu))
    return spent


def peak_mib(variant: str, recipe_name: str, data: Path) -> int:
    """Peak memory of a process of its own that takes two steps with all loops on."""
    words = [sys.executable, "-m", "benchmarks.bench_train", "--peak", recipe_name, variant, str(data)]
    return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(recipe_name: str, variant: str, data: str) -> None:
    """What `peak_mib` starts: MiB on stdout, of the GPU where there is one."""
    _, step = step_of(variant, recipe_name, Path(data), Path(data).parent, 1.0)
    step()
    step()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() // 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def bench_small(folder: Path) -> None:
    """The CPU recipes, before and after loops: tokens/s of the three variants and their peak memory."""
    data, rows = build_data(folder), []
    for recipe_name in ("tiny_cpu.toml", "small_cpu.toml"):
        peaks = {variant: peak_mib(variant, recipe_name, data.path) for variant in VARIANTS}
        for at in (0.0, 1.0):
            made = {variant: step_of(variant, recipe_name, data.path, folder, at) for variant in VARIANTS}
            trainer = made["plain"][0]
            spent = take_turns({variant: step for variant, (_, step) in made.items()})
            label = f"{recipe_name.removesuffix('.toml')}, {trainer.num_parameters():,} parameters"
            for variant in VARIANTS:
                rate = trainer.recipe.data.batch_tokens / statistics.median(wall for wall, _ in spent[variant])
                pairs = list(zip(spent["plain"], spent[variant], strict=True))
                ratios = (statistics.median(plain[i] / ours[i] for plain, ours in pairs) for i in (0, 1))
                loops = str(trainer.model.graph.active_loops)
                numbers = f"{rate:,.0f}", *(f"{ratio:.3f}" for ratio in ratios), f"{peaks[variant]:,}"
                rows.append((label, loops, variant, *numbers))
    header = (
        "model", "active loops", "step", "tokens/s", "speed, ratio to plain", "the same in processor seconds",
        "peak MiB, all loops",
    )  # fmt: skip
    print_table(f"Training speed on {trainer.state.provenance['device']}, medians of {ROUNDS} rounds", header, rows)


# ---- the record recipe on one GPU ----------------------------------------------------------------------------------


def flops_per_token(config: ModelConfig, active_loops: int) -> float:
    """Of forward and backward: 6 per matrix entry and visit, and attention as if each document filled its window."""
    dim, kv_dim = config.model_dim, config.num_kv_heads * config.model_dim // config.num_heads
    gated = [activation_of(name).gated for name in activation_names(config)]
    mlps = [(3 if gated[layer] else 2) * dim * width for layer, width in enumerate(mlp_widths(config))]
    layers = visit_list(config, active_loops)
    visits = len(layers)
    matrices = (
        visits * (2 * dim * dim + 2 * dim * kv_dim)
        + sum(mlps[layer] for layer in layers)
        + config.vocab_size * (config.embedding_dim or dim)
    )
    return 6.0 * matrices + visits * 6.0 * config.train_seq_len * dim


def record_row(trainer: Trainer, active_loops: int, label: str) -> tuple[str, ...]:
    """Tokens/s of RECORD_STEPS steps with this many loops, against what was published."""
    trainer.state.set_active_loops(active_loops)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(RECORD_STEPS):
        before = trainer.state.train_seconds
        trainer.timed_step(0.0)
        seconds.append(trainer.state.train_seconds - before)
    rate = RECORD_TOKENS / statistics.median(seconds)
    mfu = rate * flops_per_token(trainer.model.config, active_loops) / H100_FLOPS
    known = any(name in accelerator_name() for name in ("H100", "H200"))
    peak = torch.cuda.max_memory_allocated() / 2**20
    published = PUBLISHED[active_loops]
    rest = (f"{mfu:.1%}" if known else "unknown peak", f"{published:,.0f}", f"{rate / published:.3f}", f"{peak:,.0f}")
    return label, str(active_loops), f"{rate:,.0f}", *rest


def bench_record(folder: Path) -> None:
    """The record recipe's model on this GPU, compiled with each attention backend, and eager."""
    if not torch.cuda.is_available():
        say("record recipe, 98,304 tokens per GPU: NOT RUN, there is no CUDA device here; nothing is said of its speed")
        return
    data, rows = build_data(folder, 8192), []
    device = torch.device("cuda")
    names = [name for name, backend in BACKENDS.items() if not backend.unavailable(device, torch.bfloat16, True)]
    for attention, choice in [*((name, "true") for name in names), ("auto", "false")]:
        overrides: list[Any] = [f"data.batch_tokens={RECORD_TOKENS}", "run.warmup_steps=3"]
        kernels = [f"run.attention={attention}", f"run.compile={choice}"]
        trainer = trainer_for("record_8xh100.toml", data.path, folder, 0.0, *overrides, *kernels)
        warmed = warm_up(trainer.state, trainer.gradients)
        label = f"{trainer.model.attention_backend.name}, {'compiled' if trainer.gradients.compiled else 'eager'}"
        say(f"{label}: warmed up in {warmed['seconds']:.1f} s")
        rows += [record_row(trainer, loops, label) for loops in PUBLISHED]
        del trainer
    header = ("step", "active loops", "tokens/s", "MFU", "published per H100", "ratio", "peak MiB")
    title = f"Record recipe, {RECORD_TOKENS:,} tokens a step on one {accelerator_name()}"
    print_table(f"{title}, medians of {RECORD_STEPS} steps", header, rows)


def main() -> None:
    if "--peak" in sys.argv:
        print_peak(*sys.argv[sys.argv.index("--peak") + 1 :])
        return
    with tempfile.TemporaryDirectory() as folder:
        if "--record-only" not in sys.argv:
            bench_small(Path(folder))
        bench_record(Path(folder))


if __name__ == "__main__":
    main()
