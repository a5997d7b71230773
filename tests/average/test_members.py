"""Members of an average: what takes part where nothing is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pgolf_post.average.members import select_members
from pgolf_post.average.settings import Selection
from pgolf_post.checkpoint import Checkpoint


def test_a_checkpoint_of_an_interruption_takes_part_only_where_its_step_is_named(pico_run: Path) -> None:
    final = Checkpoint.open(pico_run / "latest")
    usual = [member.path.name for member in select_members(final, Selection())]
    step = int(final.meta["step"]) - 1
    interrupted = final.path.with_name(f"step_{step:06d}-interrupted")
    shutil.copytree(final.path, interrupted)
    meta = json.loads((interrupted / "meta.json").read_text())
    (interrupted / "meta.json").write_text(json.dumps({**meta, "phase": "interrupted", "step": step}))
    assert [member.path.name for member in select_members(final, Selection())] == usual
    assert interrupted.name not in [member.path.name for member in select_members(final, Selection(last=2))]
    named = select_members(final, Selection(steps=(step,)))
    assert [member.path.name for member in named] == [interrupted.name]
