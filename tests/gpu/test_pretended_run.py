"""On a pretended GPU: the trainer mixes no devices, and waits for the GPU only where it is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pgolf_post.data import DataFolder
from tests.conftest import pico_recipe
from tests.gpu import pretend
from tests.trainer.test_distributed import torchrun
from trainer.run.loop import Trainer

pytestmark = pytest.mark.slow

# Where a training step may wait for the GPU: once, for the loss; the norm is there by then.
WAITS_OF_A_STEP = {"item @ trainer/step/distributed.py:sum_floats", "item @ trainer/run/loop.py:timed_step"}


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
    assert by_function(seen.places(seen.syncs, "trainer/run/loop.py:timed_step")) == WAITS_OF_A_STEP
    assert len(seen.places(seen.syncs, "trainer/run/loop.py:timed_step")) == 2 * 4
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
from trainer.step.distributed import TrainingRanks
from trainer.run.loop import Trainer

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
