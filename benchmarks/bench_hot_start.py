"""What hot-starting saves: a requant from cached Hessians against collecting them again, in the same run.

The model is the small CPU recipe's shape (4.6M parameters) with random weights, which costs the same as trained ones.
Baseline: calibrate + quantize + pack from nothing, as a script that re-runs the pipeline does for every setting.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pgolf_post.artifacts import requant
from pgolf_post.base.progress import print_table
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint, save_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.plan import read_plan
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.settings import read_settings
from trainer.config import Recipe
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT

REPEATS = 3
RECIPE = Path(__file__).parents[1] / "trainer" / "recipes" / "small_cpu.toml"


def random_checkpoint(root: Path, data: DataFolder, recipe_file: Path = RECIPE) -> Checkpoint:
    """A checkpoint of a recipe's model with random weights."""
    recipe = read_settings(recipe_file, Recipe, [f"data.dir={data.path}"])
    torch.manual_seed(0)
    model = GolfGPT(recipe.model_config_for(data.vocab_size), GraphState(active_loops=recipe.model.num_loops))
    model.initialise()
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    config = {
        "family": "golf_gpt",
        "model": model.config.model_dump(mode="json"),
        "graph": model.graph.model_dump(mode="json"),
        "tokenizer": {"sha256": data.tokenizer_sha256, "vocab_size": data.vocab_size},
        "data": {"manifest_sha256": data.manifest_sha256},
    }
    meta = {"kind": "raw", "run": "bench", "phase": "final", "step": 0, "parents": [], "data_dir": str(data.path)}
    return save_checkpoint(root / "bench" / "step_000000-final", config, {"raw": tensors}, meta)


def median_seconds(work: Callable[[int], object]) -> float:
    """Median wall seconds of `work(0) … work(REPEATS - 1)`."""
    seconds = []
    for repeat in range(REPEATS):
        started = time.perf_counter()
        work(repeat)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        data = build(stdlib_documents(), out, BuildSettings(name="bench"), source=stdlib_source())
        checkpoint = random_checkpoint(Path(folder), data)
        calibration = CalibrationSettings(tokens=65536)

        def cold(repeat: int) -> None:
            view = checkpoint.load()
            plan = read_plan(DEFAULT_PRESET, [f"*.hessian_lambda={0.1 + repeat / 100}"])
            requant(view, calibrate(view, data, calibration, fresh=True), plan, fresh=True)

        def hot(repeat: int) -> None:
            view = checkpoint.load()
            plan = read_plan(DEFAULT_PRESET, [f"*.hessian_lambda={0.2 + repeat / 100}"])
            requant(view, calibrate(view, data, calibration), plan)

        def read(_: int) -> None:
            calibrate(checkpoint.load(), data, calibration)

        seconds = {name: median_seconds(work) for name, work in (("cold", cold), ("hot", hot), ("read", read))}
    labels = {
        "cold": "baseline: calibrate + quantize + pack",
        "hot": "new settings from cached Hessians: quantize + pack",
        "read": "load weights and cached Hessians alone",
    }
    rows = [(labels[name], f"{value:.2f}", f"{value / seconds['cold']:.3f}") for name, value in seconds.items()]
    print_table(f"Hot start, 4.6M parameters, median of {REPEATS}", ("", "seconds", "ratio to baseline"), rows)
