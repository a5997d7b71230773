"""On a pretended GPU: every command that runs a model runs it there, mixes no devices, and copies as it says.

A command of `pgolf-post --help` is tested here or said to run no model: a new one cannot be forgotten. A few run in
every run of the tests, all of them where whole campaigns run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import pgolf_post.cli
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli import COMMANDS
from pgolf_post.data import DataFolder
from tests.cli.conftest import caller
from tests.cli.test_cli_import import write_model
from tests.conftest import pico_recipe
from tests.gpu import pretend
from tests.gpu.test_pretended_run import by_function
from trainer.run.loop import Trainer

pytestmark = pytest.mark.slow

CKPT, EARLIER = "checkpoints/latest:ema", "checkpoints/latest:raw"
TTT = ("--protocol", "ttt", "--ttt")
LORA_SET = ("--set", "rank=2", "--set", "chunk_tokens=8", "--set", "batch_documents=4")
FEW = ("--calibration-tokens", 128)
SPEC = """
question = "?"
[grid]
"*.hessian_lambda" = [0, 0.2]
[calibration]
tokens = 512
[stages.expected]
tokens = 320
"""
FIT = ("fit", "--budget", 9000, "--calibration-tokens", 512, "--kappa-tokens", 256)

SMALL: dict[str, tuple[object, ...]] = {
    "statistics with derivatives": ("calibrate", "--tokens", 128, "--fisher"),
    "quantization and a score": ("requant", *FEW, "--eval"),
    "test-time training": ("eval", *TTT, "lora", *LORA_SET, "--max-tokens", 100),
    "verification": ("checkpoint", "verify"),
}
WHOLE: dict[str, tuple[object, ...]] = {
    "plain windows in bf16": ("eval", "--precision", "bf16", "--breakdown", "all", "--max-tokens", 300),
    "sliding windows": ("eval", "--protocol", "sliding", "--stride", 8, "--max-tokens", 100),
    "learning chunks": ("eval", *TTT, "sgd", "--set", "chunk_tokens=64", "--set", "stride=8", "--max-tokens", 200),
    "learning phases": ("eval", *TTT, "phased", *LORA_SET, "--set", "phases=[2]", "--max-tokens", 200),
    "text of its own": ("calibrate", "--tokens", 64, "--source", "self"),
    "sequential quantization": ("requant", *FEW, "--set", "sequential=true"),
    "distillation": (
        "requant",
        "--calibration-tokens",
        256,
        "--distill",
        "--set",
        "distill.tokens=128",
        "--set",
        "distill.steps=4",
    ),
    "blend": ("swa-blend",),
    "searched blend": ("swa-blend", "--search"),
    "averages of any length": ("ema-blend", "--sigma", "0.075"),
    "solution": FIT,
    "tuned solution": (*FIT, "--tune-tokens", 1024, "--tune-precision", "bf16", "--compile"),
    "pruning": ("prune", "--share", 0.2, *FEW),
    "attribution": ("attribute", *FEW, "--tokens", 300),
    "comparison": ("compare", CKPT, EARLIER, "--max-tokens", 300, "--breakdown", "all"),
    "screening": ("compare", CKPT, EARLIER, "--until-ci", 0.01, "--max-tokens", 600),
    "screening by a reference": (
        "compare",
        CKPT,
        EARLIER,
        "--until-ci",
        0.01,
        "--reference",
        CKPT,
        "--max-tokens",
        600,
    ),
    "diagnosis": ("diagnose", "--tokens", 128),
    "import": ("import", "model.pt", "--data", "data", "--metric-tokens", 300),
    "plan of a sweep": ("sweep", "plan", "sweep.toml", "--checkpoint", "checkpoints/latest"),
    "sweep": ("sweep", "run", "sweep.toml", "--checkpoint", "checkpoints/latest"),
}
ON_THE_HOST = {  # command → why it needs no GPU, or is tested by others
    "demo": "its stages are those of other commands",
    "data": "text and files",
    "doctor": "asks the driver and times small products of its own",
    "show": "reads what files say of themselves",
    "completion": "words",
    "export": "renames and regroups tensors of a file",
    "curves": "numbers of logs",
    "repack": "decodes and packs; --eval scores as requant does",
    "compress": "packs symbols",
    "pack-code": "a file",
    "export-decoder": "a file",
    "size": "counts bytes",
    "audit": "compares bits, so it computes on the CPU wherever it runs",
    "submit": "its scripts are processes of their own; its scores are eval's, its audits audit's",
    "ledger": "a table",
    "report": "draws what others have measured",
    "cache": "files",
    "plan-size": "its runs are the trainer's processes; it rounds and scores as fit does",
}


def test_every_command_of_the_help_is_tested_here_or_said_to_run_no_model() -> None:
    tested = {arguments[0] for arguments in (*SMALL.values(), *WHOLE.values())}
    assert not tested & ON_THE_HOST.keys()
    assert tested | ON_THE_HOST.keys() == COMMANDS.keys()


@pytest.fixture
def pgolf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico_run: Path) -> Any:
    """`pgolf-post …` in a folder whose checkpoints/ is a private copy of the pico run."""
    monkeypatch.chdir(tmp_path)
    return caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)


@pytest.fixture
def stated(tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder) -> list[str]:
    """Write what some commands read beside the run: a foreign file, a spec, data. Return what to state of the file."""
    (tmp_path / "sweep.toml").write_text(SPEC, encoding="utf-8")
    shutil.copytree(pico_data.path, tmp_path / "data")
    return write_model(pico_checkpoint, tmp_path / "model.pt")


@pytest.fixture
def tracks(tmp_path: Path, pico_data: DataFolder) -> None:
    """A run that took snapshots of two averages."""
    optim = {"power_ema_sigmas": (0.05, 0.1)}
    recipe = pico_recipe(pico_data, tmp_path, run={"name": "tracks"}, schedule={"steps": 60}, optim=optim)
    Trainer(recipe).run()
    shutil.move(tmp_path / "tracks", tmp_path / "checkpoints" / "tracks")


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(arguments, id=name) for name, arguments in SMALL.items()),
        *(pytest.param(arguments, id=name, marks=pytest.mark.long) for name, arguments in WHOLE.items()),
    ],
)
def test_a_command_mixes_no_devices(
    pgolf: Any, stated: list[str], arguments: tuple[object, ...], request: pytest.FixtureRequest
) -> None:
    if arguments[0] == "ema-blend":
        request.getfixturevalue("tracks")
    with pretend.cuda() as seen:
        answer = pgolf(*arguments, *(stated if arguments[0] == "import" else ()))
    assert answer.code == 0, answer.err
    assert not seen.violations
    assert not seen.hazards
    assert any(kind.startswith("to the GPU") for kind, _ in seen.transfers), "nothing ran on the GPU"


def test_a_score_waits_once_for_each_batch(pgolf: Any) -> None:
    with pretend.cuda() as seen:
        answer = pgolf("eval", "--max-tokens", 300)
    assert answer.code == 0, answer.err
    assert by_function(seen.places(seen.syncs, "pgolf_post/score/spans.py:work")) == {
        "copy to the GPU @ pgolf_post/score/spans.py:scored_hidden",
        "copy from the GPU @ pgolf_post/score/spans.py:work",
    }


@pytest.mark.long
def test_a_step_of_tuning_waits_for_the_step_before_it_alone(pgolf: Any) -> None:
    with pretend.cuda() as seen:
        answer = pgolf(*FIT, "--tune-tokens", 1024)
    assert answer.code == 0, answer.err
    assert by_function(seen.places(seen.syncs, "pgolf_post/fit/tune.py:tune")) == {
        "item @ pgolf_post/fit/tune.py:_finite"
    }
    assert not seen.places(seen.syncs, "pgolf_post/calibrate/collect.py:add_batch")
