"""What the record model needs of a GPU's memory, counted on fake tensors of its full size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of guard.cpp, built for this torch."""
    compiler = shutil.which("g++")
    if compiler is None or torch.version.cuda is not None:
        pytest.skip("needs g++ and a CPU build of torch")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    words = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-I", str(FOLDER / "include")]
    words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    subprocess.run([*words, str(Path(__file__).with_name("guard.cpp")), "-o", str(library)], check=True)
    return library


def peaks(guard: Path, kind: str) -> dict[str, float]:
    words = [sys.executable, "-m", "tests.gpu.fake_cuda", str(guard), kind]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.long
def test_test_time_training_at_record_size_fits_an_h100(guard: Path) -> None:
    peak = peaks(guard, "ttt")
    assert 10 < peak["ttt bf16"] < peak["ttt fp32"] < 70
    assert peak["ttt fp32 at once"] > 80  # what an H100 does not have


@pytest.mark.long
def test_every_other_stage_at_record_size_fits_an_h100(guard: Path) -> None:
    peak = peaks(guard, "others")
    assert len(peak) == 9
    assert all(0.5 < gib < 75 for gib in peak.values()), peak
    assert peak["plain bf16"] < peak["plain fp32"]
    assert peak["tuning bf16"] < peak["tuning fp32"]
