"""On a pretended GPU: the trainer and the commands mix no devices, and wait for the GPU only where it is meant.

Small in every run of the tests; all commands where whole campaigns run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pgolf_post.cli
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from tests.cli.conftest import caller
from tests.conftest import pico_recipe
from tests.gpu import pretend
from tests.trainer.test_distributed import torchrun
from trainer.loop import Trainer

pytestmark = pytest.mark.slow

# Where a training step may wait for the GPU: once, for the loss; the norm is there by then.
WAITS_OF_A_STEP = {"item @ trainer/distributed.py:sum_floats", "item @ trainer/loop.py:timed_step"}
TTT = ("--protocol", "ttt", "--ttt")
LORA_SET = ("--set", "rank=2", "--set", "chunk_tokens=8", "--set", "batch_documents=4")

SMALL: dict[str, tuple[object, ...]] = {
    "statistics with derivatives": ("calibrate", "--tokens", 128, "--fisher"),
    "quantization and a score": ("requant", "--calibration-tokens", 128, "--eval"),
    "test-time training": ("eval", *TTT, "lora", *LORA_SET, "--max-tokens", 100),
    "verification": ("checkpoint", "verify"),
}
WHOLE: dict[str, tuple[object, ...]] = {
    "sliding windows": ("eval", "--protocol", "sliding", "--stride", 8, "--max-tokens", 100),
    "learning chunks": ("eval", *TTT, "sgd", "--set", "chunk_tokens=64", "--set", "stride=8", "--max-tokens", 200),
    "learning phases": ("eval", *TTT, "phased", *LORA_SET, "--set", "phases=[2]", "--max-tokens", 200),
    "sequential quantization": ("requant", "--calibration-tokens", 128, "--set", "sequential=true"),
    "blend": ("swa-blend",),
    "searched blend": ("swa-blend", "--search"),
    "solution": ("fit", "--budget", 9000, "--calibration-tokens", 512, "--kappa-tokens", 256),
    "pruning": ("prune", "--share", 0.2, "--calibration-tokens", 128),
}


def by_function(places: list[str]) -> set[str]:
    """Places without the numbers of their lines."""
    return {":".join((place.split(":")[0], place.split(":")[-1])) for place in places}


def test_a_training_step_mixes_no_devices_and_waits_once(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(
        pico_data,
        tmp_path,
        run={"precision": "bf16", "attention": "sdpa", "warmup_steps": 1},
        data={"micro_batch_tokens": 32},
        model={"isolate_documents": True, "smear_gate": True, "attn_gate": "sparse", "lanes_start": 2},
        optim={"swa_start": 0.2, "swa_every": 1, "power_ema_sigmas": (0.1,), "power_ema_snapshots": 2},
        schedule={"steps": 4, "loops_at": 0.5, "seconds": 1e6},
    )
    with pretend.cuda() as seen:
        run = Trainer(recipe)
        seen.clear()
        saved = run.run()
    assert not seen.violations
    assert not seen.hazards
    assert by_function(seen.places(seen.syncs, "trainer/loop.py:timed_step")) == WAITS_OF_A_STEP
    assert len(seen.places(seen.syncs, "trainer/loop.py:timed_step")) == 2 * 4
    assert saved.meta["step"] == 4


def test_a_run_goes_on_from_its_checkpoint_on_the_gpu(pico_data: DataFolder, pico_run: Path, tmp_path: Path) -> None:
    with pretend.cuda() as seen:
        run = Trainer(pico_recipe(pico_data, tmp_path / "resumed", run={"compile": False}))
        run.resume(next(pico_run.glob("pico/*frac75")))
        assert all(parameter.device.type == "cuda" for parameter in run.model.parameters())
        seen.clear()
        run.run()
    assert not seen.violations
    assert not seen.hazards


RANK_SCRIPT = """
import json, sys
from pathlib import Path
from pgolf_post.base.ranks import end_process
from pgolf_post.data import DataFolder
from tests.conftest import pico_recipe
from tests.gpu import pretend
from trainer.distributed import TrainingRanks
from trainer.loop import Trainer

data, root = Path(sys.argv[1]), Path(sys.argv[2])
with pretend.cuda() as seen:
    ranks = TrainingRanks.join()
    recipe = pico_recipe(DataFolder.open(data), root, run={"compile": False, "warmup_steps": 1}, schedule={"steps": 3})
    Trainer(recipe, ranks).run()
    answer = {"violations": [what for what, _ in seen.violations], "collectives": seen.collectives}
    (root / f"rank{ranks.rank}.json").write_text(json.dumps(answer))
    ranks.leave()
end_process(0)
"""


@pytest.mark.long
def test_two_ranks_send_gpu_tensors_alone_and_in_the_same_order(pico_data: DataFolder, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{RANK_SCRIPT}")
    done = torchrun(2, str(script), str(pico_data.path), str(tmp_path))
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["violations"] == other["violations"] == []
    assert one["collectives"] == other["collectives"]
    assert len(one["collectives"]) > 3 * 5


@pytest.fixture
def pgolf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico_run: Path) -> Any:
    """`pgolf-post …` in a folder whose checkpoints/ is a private copy of the pico run."""
    monkeypatch.chdir(tmp_path)
    return caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(arguments, id=name) for name, arguments in SMALL.items()),
        *(pytest.param(arguments, id=name, marks=pytest.mark.long) for name, arguments in WHOLE.items()),
    ],
)
def test_a_command_mixes_no_devices(pgolf: Any, pico_checkpoint: Checkpoint, arguments: tuple[object, ...]) -> None:
    with pretend.cuda() as seen:
        answer = pgolf(*arguments)
    assert answer.code == 0, answer.err
    assert not seen.violations
    assert not seen.hazards


def test_a_score_waits_once_for_each_batch(pgolf: Any) -> None:
    with pretend.cuda() as seen:
        answer = pgolf("eval", "--max-tokens", 300)
    assert answer.code == 0, answer.err
    assert by_function(seen.places(seen.syncs, "pgolf_post/score/spans.py:work")) == {
        "copy to the GPU @ pgolf_post/score/spans.py:scored_hidden",
        "copy from the GPU @ pgolf_post/score/spans.py:work",
    }
