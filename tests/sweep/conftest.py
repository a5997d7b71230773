"""What the sweep tests share: specs written as files, run in a folder that holds a pico run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.data import DataFolder
from pgolf_post.ledger import Row
from pgolf_post.sweep.engines.local import run_local
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.run import Options
from pgolf_post.sweep.state import State

CALIBRATION = "[calibration]\ntokens = 320\n"
STAGES = "[stages.screen]\ntokens = 320\n"
LAMBDAS = 'question = "λ?"\nnoise_repeats = 1\n[grid]\n"*.hessian_lambda" = [0, 0.2, 0.6]\n'


def spec_text(head: str = LAMBDAS) -> str:
    """A small spec: what is asked, then little text to calibrate on and to score."""
    return f"{head}\n{CALIBRATION}\n{STAGES}"


class Lab:
    """A folder with a pico run, in which specs are written and run."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root

    def options(self, text: str, name: str = "lab", **more: object) -> Options:
        path = self.folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        places = Places(self.root / "latest", None, self.root, self.folder / "results")
        return Options(path, (), places, **more)  # type: ignore[arg-type]

    def run(self, text: str, name: str = "lab", **more: object) -> State:
        return run_local(self.options(text, name, **more))


@pytest.fixture
def lab(tmp_path: Path, pico_run: Path, pico_data: DataFolder) -> Lab:
    return Lab(tmp_path, pico_run)


def by_name(state: State) -> dict[str, Row]:
    return {row.name: row for row in state.rows.values()}


def lasting(row: Row) -> dict[str, object]:
    """What a row says beside when, where and how fast, and of what it found made already."""
    result = {key: value for key, value in row.result.items() if key not in ("stage_seconds", "shared")}
    return {"id": row.id, "parents": row.parents, "settings": row.settings, "result": result, "verdict": row.verdict}
