"""What a compiled training step launches, moves and holds on a GPU, counted on fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_fake_cuda import REPOSITORY, guard  # noqa: F401

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counts are those of this torch's Inductor"),
]


def test_a_small_step_is_one_graph_with_its_known_kernels_and_bytes(guard: Path) -> None:  # noqa: F811
    words = [sys.executable, "-m", "tests.gpu.step_count", str(guard), "small;varlen"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kinds = found["by kind"]
    assert found["graphs"] == 1
    assert kinds["generated"] == pytest.approx(144, rel=0.03)
    assert kinds["library"] == pytest.approx(97, rel=0.03)
    assert kinds["eager _foreach_copy_"] <= 2  # weights to the twin, gradients back
    assert found["launches"] == pytest.approx(443, rel=0.03)
    assert found["gigabytes"] == pytest.approx(3.724, rel=0.03)
    assert found["peak_gib"] == pytest.approx(2.02, rel=0.05)
