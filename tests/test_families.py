"""A model that is not ours goes through the whole toolkit: examples/my_family.py, a small GPT as in nanoGPT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pgolf_post.cli
from pgolf_post import families
from pgolf_post.checkpoint import Checkpoint, save_checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.families import build_module, get_family
from tests import processes
from tests.cli.conftest import caller

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_family.py"
SOURCE = f"{EXAMPLE}:TinyGPTFamily"
STEPS, BATCH = 60, 16


@pytest.fixture
def registered() -> Iterator[families.ModelFamily]:
    """The example's family, for this test alone."""
    yield families.load_family(SOURCE)
    families.forget_families()


def train(module: torch.nn.Module, tokens: torch.Tensor, seq_len: int) -> float:
    """Take a few Adam steps; the last loss, nats per token."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for step in range(STEPS):
        starts = [(step * BATCH + i) * 7 % (len(tokens) - seq_len - 1) for i in range(BATCH)]
        batch = torch.stack([tokens[start : start + seq_len + 1] for start in starts])
        logits = module.logits(module.hidden(batch[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture
def foreign(tmp_path: Path, registered: families.ModelFamily, pico_data: DataFolder) -> Checkpoint:
    """A trained checkpoint of the example's model, as a script of one's own would save it."""
    torch.manual_seed(0)
    model = registered.complete({"vocab_size": pico_data.vocab_size, "seq_len": 32})
    module = registered.build(model, {})
    train(module, torch.from_numpy(pico_data.tokens("train").astype("int64")), 32)
    config = {
        "family": registered.name,
        "model": model,
        "graph": {},
        "tokenizer": {"sha256": pico_data.tokenizer_sha256},
        "data": {"manifest_sha256": pico_data.manifest_sha256},
    }
    meta = {"kind": "raw", "phase": "final", "step": STEPS, "parents": [], "data_dir": str(pico_data.path)}
    return save_checkpoint(tmp_path / "checkpoints" / "mine" / "final", config, {"raw": module.state_dict()}, meta)


@pytest.fixture
def pgolf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """A command in this process, which knows the family from --family alone; it returns its JSON."""
    monkeypatch.chdir(tmp_path)
    call = caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)

    def run(*arguments: object) -> dict:
        families.forget_families()
        answer = call("--family", SOURCE, *arguments, "--json")
        assert answer.code == 0, answer.err + answer.out
        return answer.json

    return run


def as_process(folder: Path, *arguments: object) -> dict:
    """Run a command in a process of its own; return its JSON."""
    words = ["-m", "pgolf_post", "--family", SOURCE, *map(str, arguments), "--json"]
    done = processes.run(words, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    answer: dict = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def test_another_model_is_calibrated_quantized_fitted_and_scored(
    tmp_path: Path, foreign: Checkpoint, pgolf: Callable[..., dict]
) -> None:
    text = ("--calibration-tokens", 1024)
    stats = pgolf("calibrate", foreign.path, "--tokens", 1024)
    assert stats["tokens"] == 1024
    plain = pgolf("eval", foreign.path)
    requant = as_process(tmp_path, "requant", foreign.path, *text, "--eval")
    smaller = requant["artifact_bytes"] - 500
    fit = pgolf("fit", foreign.path, *text, "--kappa-tokens", 512, "--budget", smaller, "--eval")
    assert fit["artifact_bytes"] <= smaller
    assert plain["bpb"] < fit["bpb"] < requant["bpb"], "fit loses less in fewer bytes"
    artifact = pgolf("eval", next((foreign.path / "derived" / "artifact").glob("*/artifact.pgolf")))
    assert artifact["bpb"] in (fit["bpb"], requant["bpb"])


def test_settings_of_a_family_are_strict(registered: families.ModelFamily) -> None:
    with pytest.raises(SettingsError, match=r"unknown width; missing vocab_size|unknown width"):
        registered.complete({"width": 3})
    with pytest.raises(SettingsError, match="missing vocab_size"):
        registered.complete({})
    assert registered.complete({"vocab_size": 9})["layers"] == 2


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("my_family.py", SettingsError, "FILE.py:CLASS"),
        ("nowhere.py:Family", NotFoundError, "no such file"),
        (f"{EXAMPLE}:Family", SettingsError, "TinyGPTFamily"),
    ],
)
def test_a_family_that_cannot_be_loaded_is_refused(source: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        families.load_family(source)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nowhere_to_be_found", r"ModuleNotFoundError: .*mine\.py, line 1"),
        ("def (", "SyntaxError"),
        ("class Mine: name = 'mine'", "Mine has no build, complete, sites"),
        ("from pgolf_post.families import BaseFamily\nclass Mine(BaseFamily): pass", "Mine has no name, build, sites"),
        ("from trainer.family import GolfGPTFamily as Mine", "'golf_gpt' is an installed family"),
    ],
)
def test_a_file_whose_class_is_no_family_is_refused(tmp_path: Path, code: str, words: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(SettingsError, match=words):
        families.load_family(f"{path}:Mine")


def test_an_unknown_family_names_the_installed_ones() -> None:
    with pytest.raises(SettingsError, match="golf_gpt"):
        families.get_family("tiny_gpt")


def test_an_interrupt_amid_torchs_own_bookkeeping_stays_an_interrupt(
    pico_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        torch.overrides._pop_mode()  # as where an interrupt falls between torch's pop and its push
        raise KeyboardInterrupt

    monkeypatch.setattr(type(get_family("golf_gpt")), "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_module(pico_checkpoint.config)
