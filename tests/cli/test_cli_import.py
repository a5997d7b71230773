"""import at the command line: what is refused, what is passed over aloud, what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.importers import FORMATS


def write_model(checkpoint: Checkpoint, path: Path) -> list[str]:
    """The pico model as a flat file; --set flags for what its shapes do not say."""
    torch.save(FORMATS["flat"].from_canonical(checkpoint.load("raw").tensors), path)
    model = checkpoint.config["model"]
    keys = ("activation", "logit_softcap", "rope_base", "rope_dims", "rope_ntk", "xsa_last_n", "ln_scale", "num_loops")
    flags = [f"{key}={str(model[key]).lower()}" for key in (*keys, "loop_start", "loop_end", "train_seq_len")]
    return [word for flag in flags for word in ("--set", flag)]


def test_a_mistyped_setting_is_refused_before_anything_is_read(
    pgolf: Any, pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    flags = write_model(pico_checkpoint, tmp_path / "model.pt")
    config = tmp_path / "run.toml"
    config.write_text("logit_softcapp = 30.0\n")
    call = ("import", tmp_path / "model.pt", "--data", pico_data.path, *flags)
    for wrong, name in ((("--set", "rope_dimz=4"), "rope_dims"), (("--config", config), "logit_softcap")):
        answer = pgolf(*call, *wrong)
        assert answer.code == 2
        assert f"did you mean '{name}'" in answer.err
    assert not (tmp_path / "checkpoints" / "model").exists()


def test_a_name_that_would_leave_its_root_is_refused_before_anything_is_read(pgolf: Any, tmp_path: Path) -> None:
    for name in ("../up", "a/b", ".hidden", "..", "-dash", "a\nb"):
        answer = pgolf("import", "nothing.pt", "--data", "nothing", "--name", name)
        assert (answer.code, "cannot name a folder" in answer.err) == (2, True), answer.err
        answer = pgolf("data", "adopt", "nothing", "--tokenizer", "nothing", "--name", name)
        assert (answer.code, "cannot name a folder" in answer.err) == (2, True), answer.err
    assert "cannot name a folder" in pgolf("import", "...pt", "--data", "nothing").err
    assert "cannot name a folder" not in pgolf("data", "build", "nothing", "--name", "a b ä (1)").err


def test_a_log_may_say_more_and_what_it_says_more_is_named(
    pgolf: Any, pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path
) -> None:
    flags = write_model(pico_checkpoint, tmp_path / "model.pt")
    log = tmp_path / "train.log"
    log.write_text("Hyperparameters:\n  matrix_lr: 0.02\n  rope_dims: 4\n  bigram_dim: 8\n  data_path: ./data\n")
    small = ("--data", pico_data.path, "--metric-tokens", 400, "--json")
    answer = pgolf("import", tmp_path / "model.pt", "--log", log, *flags, *small)
    assert answer.code == 0
    assert "2 settings of the model; 2 others passed over: matrix_lr, data_path" in answer.err
    assert "no such part: bigram_dim" in answer.err
    assert answer.json["checkpoint_id"] == pico_checkpoint.view_id("raw")
