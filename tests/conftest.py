"""Shared by all tests: a pico data folder, a pico training run, and the switch for long campaigns."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pico models: threads would only wait for each other

from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.documents import Document
from trainer.config import Recipe
from trainer.run.loop import Trainer

# Started in the background, a test run ignores Ctrl-C and hang-ups; the processes that its tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

PICO_RECIPE = {
    "run": {"name": "pico", "precision": "fp32", "log_every": 1000, "seed": 7},
    "data": {"seq_len": 16, "batch_tokens": 64},
    "model": {
        "num_layers": 3,
        "model_dim": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mlp_mult": 2.0,
        "rope_dims": 4,
        "xsa_last_n": 2,
        "loop_start": 1,
        "loop_end": 1,
        "num_loops": 1,
    },
    "optim": {"momentum_warmup_steps": 3, "ema_decay": 0.9},
    "schedule": {"steps": 12, "warmdown": 0.5, "loops_at": 0.25},
    "checkpoint": {"fractions": [0.75], "metric_tokens": 400},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run whole campaigns, not their small samples")
    parser.addoption("--quick", action="store_true", help="run what trains nothing and starts no process")
    parser.addoption("--gpu", action="store_true", help="let tests see the GPU; for tests/trainer/test_kernels.py")


hypothesis.settings.register_profile("short", max_examples=34, deadline=None)
hypothesis.settings.register_profile("long", max_examples=100, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs: the tests state what holds on the CPU, bit for bit, wherever they run."""
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    quick = config.getoption("--quick")
    left_out = {item for item in items if "long" in item.keywords or (quick and not is_quick(item))}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Take what imports left out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


def is_quick(item: pytest.Item) -> bool:
    """Whether a test needs no trained model, stands in a module that starts no process, and is not marked slow."""
    trains = "pico_run_original" in getattr(item, "fixturenames", ())
    module = getattr(item, "module", None)
    starts_processes = any(hasattr(module, name) for name in ("subprocess", "processes", "torchrun"))
    return not (trains or starts_processes or "slow" in item.keywords)


def pico_documents() -> Iterator[Document]:
    """Sixty short documents of plain words, different enough to be told apart."""
    subjects = ("the model", "a byte", "this row", "every token", "one Hessian", "no column")
    verbs = ("keeps", "drops", "scales", "rounds", "mixes", "counts")
    for number in range(60):
        sentences = [
            f"{subjects[(number + i) % 6]} {verbs[(number * 5 + i * i) % 6]} {number * 37 + i} bits;" for i in range(14)
        ]
        yield Document(f"pico/{number}", "\n".join(sentences))


def pico_recipe(folder: DataFolder, root: Path, **tables: dict[str, object]) -> Recipe:
    """The pico recipe for a data folder and checkpoint root; `tables` override keys per table."""
    tree = {name: {**PICO_RECIPE.get(name, {}), **tables.get(name, {})} for name in {**PICO_RECIPE, **tables}}
    tree["data"]["dir"] = folder.path
    tree["run"]["checkpoint_root"] = root
    return Recipe.model_validate(tree)


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """A recipe as the TOML file that the trainer's command line reads."""
    lines = []
    for table, values in recipe.model_dump(mode="json", exclude_none=True).items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def pico_data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A data folder of a few thousand tokens with a 320-piece tokenizer. Do not change it."""
    out = tmp_path_factory.mktemp("pico") / "data"
    return build(pico_documents(), out, BuildSettings(name="pico", vocab_size=320, val_fraction=0.2))


@pytest.fixture(scope="session")
def pico_run_original(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """checkpoints/ of one pico run of 12 steps. Do not change it: take `pico_run`."""
    root = tmp_path_factory.mktemp("pico_run") / "checkpoints"
    Trainer(pico_recipe(pico_data, root)).run()
    return root


@pytest.fixture
def pico_run(tmp_path: Path, pico_run_original: Path) -> Path:
    """A private copy of the pico run's checkpoint root."""
    root = tmp_path / "checkpoints"
    shutil.copytree(pico_run_original, root, symlinks=True)
    return root


@pytest.fixture
def pico_checkpoint(pico_run: Path) -> Checkpoint:
    """The final checkpoint of a private copy of the pico run, loops on, raw and EMA views."""
    return Checkpoint.open(pico_run / "latest")


@pytest.fixture
def view(pico_checkpoint: Checkpoint) -> View:
    """The EMA weights of the pico run."""
    return pico_checkpoint.load()


@pytest.fixture
def stats(view: View, pico_data: DataFolder) -> Stats:
    """Their statistics over 640 tokens."""
    return calibrate(view, pico_data, CalibrationSettings(tokens=640))
