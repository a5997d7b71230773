"""The pico run of the fit tests has the statistics and factors most of them ask for: measured once, found by all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.fit.limits import fixed_bytes
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory, pico_run_original: Path, pico_data: DataFolder) -> Path:
    root = tmp_path_factory.mktemp("prepared") / "checkpoints"
    shutil.copytree(pico_run_original, root, symlinks=True)
    view = Checkpoint.open(root / "latest").load()
    for tokens in (512, 4096):  # the latter for fine-tuning
        prepare(view, pico_data, CalibrationSettings(tokens=tokens), FitSettings(kappa_tokens=256, trellis_states=8))
    return root


@pytest.fixture
def pico_run(tmp_path: Path, prepared_run: Path) -> Path:
    root = tmp_path / "checkpoints"
    shutil.copytree(prepared_run, root, symlinks=True)
    return root


@pytest.fixture
def limit(fitter: Fitter) -> int:
    """Bytes at which a module's own `fitter` has two bits for each weight."""
    return fixed_bytes(fitter.builder) + fitter.builder.num_weights * 2 // 8 + WINDOW_BYTES // 2
