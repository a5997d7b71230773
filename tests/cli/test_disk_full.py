"""A disk that refuses the bytes: every command that writes says which file, what it needs and what to do, and exits 1.

The system itself refuses them (RLIMIT_FSIZE), so that Python, NumPy, safetensors and SQLite all meet it. What was there
stays as it was; no half-written file is left.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import torch

import pgolf_post.cli
import trainer.__main__
from pgolf_post.base.ownership import TEMPORARY_PREFIX
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.importers import FORMATS
from pgolf_post.ledger import Ledger, Row
from tests.cli.conftest import Call, caller
from tests.conftest import pico_documents, pico_recipe, write_recipe
from tests.importers.test_repack import int8_artifact, saved
from tests.small_disk import files_of_at_most
from trainer.run.log import LOG_FILE
from trainer.run.loop import Trainer

CKPT = "checkpoints/latest"
FEW = ("--calibration-tokens", "512")
SPEC = """question = "?"
[grid]
"*.hessian_lambda" = [0, 0.2]
[calibration]
tokens = 512
[stages.screen]
tokens = 320
"""
LOG = "| # | Name | Base | Result | Learning | BPB |\n|---|---|---|---|---|---|\n| 1 | a | | Baseline | x | 1.2 |\n"
MODEL_KEYS = ("activation", "logit_softcap", "rope_base", "rope_dims", "rope_ntk", "xsa_last_n", "ln_scale")
LOOP_KEYS = ("num_loops", "loop_start", "loop_end", "train_seq_len")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pico_run_original: Path, pico_data: DataFolder) -> Path:
    """A folder with the pico run and an input for every command. Do not change it."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(pico_run_original, folder / "checkpoints", symlinks=True)
    checkpoint = Checkpoint.open(folder / CKPT)
    torch.save(FORMATS["flat"].from_canonical(checkpoint.load("raw").tensors), folder / "model.pt")
    model = checkpoint.config["model"]
    (folder / "run.toml").write_text(
        "".join(f"{key} = {json.dumps(model[key])}\n" for key in (*MODEL_KEYS, *LOOP_KEYS)), encoding="utf-8"
    )
    lines = [json.dumps({"text": document.text}) for document in pico_documents()]
    (folder / "docs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copytree(pico_data.path, folder / "data")
    shutil.copytree(pico_data.path, folder / "shards")
    (folder / "shards" / "manifest.json").unlink()
    (folder / "sweep.toml").write_text(SPEC, encoding="utf-8")
    (folder / "log.md").write_text(LOG, encoding="utf-8")
    with Ledger.open(folder / "elsewhere") as ledger:
        ledger.add(Row("trial", "a", name="a"))
    (folder / "final_model.int8.ptz").write_bytes(zlib.compress(saved(int8_artifact()[0])))
    optim, steps = {"power_ema_sigmas": (0.05, 0.1)}, {"steps": 12}
    Trainer(pico_recipe(pico_data, folder / "kept", run={"name": "kept"}, schedule=steps, optim=optim)).run()
    (folder / "train_gpt.py").write_text("print('a script', 1)\n" * 30, encoding="utf-8")
    write_recipe(pico_recipe(pico_data, Path("checkpoints"), run={"name": "again"}), folder / "recipe.toml")
    return folder


COMMANDS: dict[str, tuple[str, ...]] = {
    "data build": ("data", "build", "docs.jsonl", "--vocab-size", "300", "--val-fraction", "0.2", "--out", "new"),
    "data adopt": ("data", "adopt", "shards", "--tokenizer", "shards/tokenizer.model", "--out", "adopted"),
    "import": ("import", "model.pt", "--config", "run.toml", "--data", "data", "--metric-tokens", "300"),
    "export": ("export", CKPT, "--format", "flat", "--out", "exported.pt"),
    "repack": ("repack", "final_model.int8.ptz", "--codec", "zlib", "--out", "repacked/artifact.pgolf"),
    "swa-blend": ("swa-blend", CKPT),
    "ema-blend": ("ema-blend", "kept/latest", "--sigma", "0.07", "--max-error", "1"),
    "calibrate": ("calibrate", CKPT, "--tokens", "512"),
    "calibrate self": ("calibrate", CKPT, "--tokens", "64", "--source", "self"),
    "prune": ("prune", CKPT, *FEW),
    "requant": ("requant", CKPT, *FEW),
    "fit": ("fit", CKPT, *FEW, "--budget", "20000"),
    "attribute": ("attribute", CKPT, *FEW, "--tokens", "300"),
    "eval": ("eval", CKPT, "--max-tokens", "300"),
    "compare": ("compare", CKPT, CKPT, "--max-tokens", "300"),
    "pack-code": ("pack-code", "train_gpt.py", "--out", "packed.py"),
    "export-decoder": ("export-decoder", "--out", "decoder.py"),
    "sweep run": ("sweep", "run", "sweep.toml", "--checkpoint", CKPT),
    "ledger scan": ("ledger", "scan"),
    "ledger import": ("ledger", "import", "log.md"),
    "ledger note": ("ledger", "note", "a", "what was learned " * 500, "--root", "elsewhere"),
    "ledger export": ("ledger", "export", "--root", "elsewhere", "--format", "csv", "--out", "rows.csv"),
    "train": ("recipe.toml",),
}


def written_in(root: Path) -> dict[str, bytes]:
    """Relative path → contents; of links, where they lead."""
    return {
        str(path.relative_to(root)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `pgolf-post …`, or the trainer for a recipe."""
    commands = {
        False: caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys),
        True: caller(trainer.__main__.main, "trainer", monkeypatch, capsys),
    }
    return lambda *arguments: commands[arguments[0] == "recipe.toml"](*arguments)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "file_bytes", [0, 100, *(pytest.param(size, marks=pytest.mark.long) for size in (1000, 5000, 20_000))]
)
def test_a_full_disk_is_said_and_changes_nothing(
    name: str, file_bytes: int, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Call
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    before = written_in(folder)
    with files_of_at_most(file_bytes):
        answer = run(*COMMANDS[name])
    if file_bytes < 1000 or answer.code:  # more suffices for some
        assert answer.code == 1, answer.err
        assert "error: " in answer.err
        assert "File too large" in answer.err or "disk I/O error" in answer.err  # SQLite's words
        assert "next: allow larger files" in answer.err or "next: free disk space" in answer.err
    made = {path: content for path, content in written_in(folder).items() if before.get(path) != content}
    if answer.code:
        assert [path for path in made if not is_whole(folder / path)] == []
    assert before.keys() <= written_in(folder).keys()
    assert not [path for path in folder.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def is_whole(path: Path) -> bool:
    """Whether a file belongs to a finished result of an earlier stage, or to a ledger that SQLite finds whole.

    A run's log grows line by line, whenever its thread comes to it: all lines but the last are objects.
    """
    if path.name == LOG_FILE:
        return all(isinstance(json.loads(line), dict) for line in path.read_text("utf-8").splitlines()[:-1])
    if path.name.startswith("ledger.sqlite"):
        with closing(sqlite3.connect(path.with_name("ledger.sqlite"))) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    return (path.parent / "meta.json").is_file()
