"""A log gives the settings that stand in it, whatever was put around its lines; what is skipped or unclear is said."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli.importer import command
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from pgolf_post.importers.importing import export_view
from pgolf_post.importers.log_file import MAX_GAP, read_log
from pgolf_post.importers.script_words import known_keys

SETTINGS = (
    "  activation: leaky_relu2\n  attn_gate: none\n  ln_scale: True\n  logit_softcap: 30.0\n  matrix_lr: 0.02\n"
    "  num_layers: 11\n  parallel_residual_start: -1\n  rope_dims: 16\n  run_id: x\n  tokenizer: None\n"
)
BODY = f"logs/x.txt\nHyperparameters:\n{SETTINGS}train_shards: 80\nstep:1/10 train_loss:5.0\n  num_layers: 12\n"
SOURCE = 'class Hyperparameters:\n    rope_dims = 8\nlog0("Hyperparameters:", console=False)\n'
READ = {
    "activation": "leaky_relu2", "attn_gate": "none", "ln_scale": True, "logit_softcap": 30.0, "matrix_lr": 0.02,
    "num_layers": 11, "parallel_residual_start": -1, "rope_dims": 16, "run_id": "x", "tokenizer": None,
}  # fmt: skip
LINES = BODY.splitlines(keepends=True)
TORCHRUN = [
    "W0413 04:52:40.123000 140 torch/distributed/run.py:793] \n",
    "W0413 04:52:40.123000 140 torch/distributed/run.py:793] *****\n",
    "W0413 04:52:40.123000 140 torch/distributed/run.py:793] Setting OMP_NUM_THREADS: 1\n",
]
RANK_LINES = [f"[rank{rank}]: {line}" for line in LINES for rank in (0, 1)]


def prefixed(prefix: str) -> bytes:
    """Every line behind a prefix, in which # is the line's number."""
    return "".join(prefix.replace("#", str(i)) + line for i, line in enumerate(LINES, 10)).encode()


SAME = {
    "plain": BODY.encode(),
    "crlf": BODY.replace("\n", "\r\n").encode(),
    "utf-16, as PowerShell 5 writes it": BODY.encode("utf-16"),
    "utf-16 without a mark": BODY.encode("utf-16-le"),
    "byte order mark": codecs.BOM_UTF8 + BODY.encode(),
    "seconds": prefixed("1776142360.7# "),
    "date and level": prefixed("2026-04-13 04:52:#,123 INFO "),
    "date in brackets": prefixed("[2026-04-13 04:52:#] "),
    "iso": prefixed("2026-04-13T04:52:#.123456Z "),
    "logger": prefixed("INFO:root:"),
    "rank": prefixed("[rank0]: "),
    "torchrun --tee": prefixed("[default0]:"),
    "srun -l": prefixed("0: "),
    "two prefixes": prefixed("[default0]:2026-04-13 04:52:# | INFO | "),
    "kubernetes": prefixed("trainer-0 | "),
    "compose": prefixed("trainer | "),
    "syslog": prefixed("Nov 29 20:36:# node python[4321]: "),
    "nulls of a crash": BODY.replace("\n", "\0\n").encode(),
    "a coloured value": BODY.replace("  ln_scale", "\x1b[32m  ln_scale\x1b[0m").encode(),
    "coloured lines": "".join(f"\x1b[36;1m{line[:-1]}\x1b[0m\n" for line in LINES).encode(),
    "coloured prefix": "".join(f"\x1b[2m12:00:{i}\x1b[22m {line}" for i, line in enumerate(LINES, 10)).encode(),
    "tabs": BODY.replace("  ", "\t").encode(),
    "equals": BODY.replace(": ", " = ").encode(),
    "names in capitals": "".join(
        line.split(":")[0].upper() + ":" + line.split(":", 1)[1] if line.startswith("  ") else line for line in LINES
    ).encode(),
    "every line twice": "".join(line * 2 for line in LINES).encode(),
    "two ranks": "".join(RANK_LINES).encode(),
    "the block twice": (BODY + BODY).encode(),
    "a warning within": "".join([*LINES[:6], *TORCHRUN, *LINES[6:]]).encode(),
    "a warning at once": "".join([*LINES[:2], *TORCHRUN, *LINES[2:]]).encode(),
    "blank lines": "".join([*LINES[:6], "\n", "\n", *LINES[6:]]).encode(),
    "an unprefixed line within": prefixed("[rank0]: ").replace(b"[rank0]:   num", b"wandb: syncing\n[rank0]:   num"),
    "behind the script's source": (SOURCE * 2 + BODY).encode(),
    "before a line of many": BODY.replace("train_shards: 80\n", "rope_dims: 8 num_heads: 4\nrope_dims: 8\n").encode(),
    "indentation taken off": BODY.replace("\n  ", "\n").replace("matrix_lr: 0.02\n", "").encode(),
    "json on one line": b"Hyperparameters: " + json.dumps(READ).encode() + b"\nstep:1/2\n",
    "a dictionary of Python": f"Hyperparameters: {READ}\nstep:1/2\n".encode(),
    "json over lines": ("Hyperparameters: " + json.dumps(READ, indent=2) + "\nstep:1/2\n").encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_settings_are_read_from_every_shape(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.log").write_bytes(SAME[name])
    known = {key: READ[key] for key in READ if key in known_keys()}
    assert read_log(tmp_path / "train.log") == (known if name == "indentation taken off" else READ)


SAID = {
    "a warning within": "3 lines among the settings are none and were skipped: 'W0413",
    "every line twice": "10 settings stand there more than once, with the same value",
    "rank": "prefix '[rank0]:' taken off",
    "the block twice": "2 blocks of Hyperparameters, the same about the model",
    "an unprefixed line within": "1 lines among the settings are none and were skipped: 'wandb: syncing'",
}


@pytest.mark.parametrize("name", SAID)
def test_what_was_skipped_is_said(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_bytes(SAME[name])
    read_log(tmp_path / "train.log")
    assert SAID[name] in capsys.readouterr().err


def test_a_plain_log_is_read_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_bytes(SAME["plain"])
    read_log(tmp_path / "train.log")
    assert capsys.readouterr().err == ""


def test_blocks_that_disagree_are_asked_about(tmp_path: Path) -> None:
    first = BODY.replace("rope_dims: 16", "rope_dims: 0").replace("  ln_scale: True\n", "")
    path = tmp_path / "train.log"
    path.write_text(first + BODY)
    with pytest.raises(
        SettingsError, match=r"1 in line 2, 2 in line 16.*: ln_scale = absent \| True; rope_dims = 0 \| 16"
    ) as caught:
        read_log(path)
    assert "--log-block 1 … 2" in str(caught.value.hint)
    assert [read_log(path, block)["rope_dims"] for block in (1, 2)] == [0, 16]
    with pytest.raises(SettingsError, match=r"has 2 blocks .* asks for 3"):
        read_log(path, 3)


def test_blocks_that_differ_in_the_optimizer_alone_are_one_model(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(BODY + BODY.replace("0.02", "0.03").replace("run_id: x", "run_id: y"))
    assert read_log(tmp_path / "train.log") == {**READ, "matrix_lr": 0.03, "run_id": "y"}  # the last


def test_one_block_with_two_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(BODY.replace("  run_id", "  rope_dims: 8\n  run_id"))
    with pytest.raises(SettingsError, match="rope_dims = 16 in line 10, 8 in line 11"):
        read_log(tmp_path / "train.log")


def test_a_block_ends_at_training_or_after_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text("Hyperparameters:\n  num_layers: 11\n" + "x\n" * MAX_GAP + "  rope_dims: 16\nstep 1\n")
    assert read_log(path) == {"num_layers": 11, "rope_dims": 16}
    path.write_text("Hyperparameters:\n  num_layers: 11\n" + "x\n" * (MAX_GAP + 1) + "  rope_dims: 16\nstep 1\n")
    assert read_log(path) == {"num_layers": 11}


def test_a_cut_block_is_said_to_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("".join(LINES[:5]))
    assert set(read_log(tmp_path / "train.log")) == {"activation", "attn_gate", "ln_scale"}
    assert "it ends inside the block, after ln_scale: settings may be missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step 1\n", "no 'Hyperparameters:' line"),
        (b"", "is empty"),
        (b"the Hyperparameters: of this run\n", "no 'Hyperparameters:' line"),
        (b"Hyperparameters:\nstep:1/10\n", "no '  name: value' line stands under 'Hyperparameters:' in line 1"),
        (b"\x1f\x8b\x08\x00", "is a gzip stream"),
        (b"<!DOCTYPE html>", "is an HTML page"),
    ],
)
def test_a_log_without_settings_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.log").write_bytes(content)
    with pytest.raises(MismatchError, match=message):
        read_log(tmp_path / "train.log")


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such log: .*train\.log"):
        read_log(tmp_path / "train.log")


def test_the_command_takes_the_block_that_it_is_told(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_view(pico_checkpoint.load("raw"), "flat", Path("model.pt"))
    stated = {k: v for k, v in pico_checkpoint.config["model"].items() if v is not None and not isinstance(v, list)}
    block = "Hyperparameters:\n" + "".join(f"  {key}: {value}\n" for key, value in stated.items())
    softer = block.replace(f"logit_softcap: {stated['logit_softcap']}", "logit_softcap: 7.0")
    assert softer != block
    Path("train.log").write_text(softer + block)
    arguments = ["model.pt", "--data", str(pico_data.path), "--log", "train.log", "--metric-tokens", "400"]
    asked = CliRunner().invoke(command, arguments)
    assert isinstance(asked.exception, SettingsError)
    assert not Path("checkpoints").exists()
    softcaps = []
    for number in ("1", "2"):
        done = CliRunner().invoke(command, [*arguments, "--log-block", number, "--name", f"block{number}"])
        assert done.exit_code == 0, done.output
        folder = next(Path("checkpoints", f"block{number}").iterdir())
        softcaps.append(Checkpoint.open(folder).config["model"]["logit_softcap"])
    assert softcaps == [7.0, stated["logit_softcap"]]
    alone = CliRunner().invoke(command, [*arguments[:3], "--log-block", "1"])
    assert "no effect without --log" in str(alone.exception)
