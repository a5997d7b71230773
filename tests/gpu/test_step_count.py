"""What a compiled training step launches, moves and holds on a GPU, counted on fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_fake_cuda import REPOSITORY, guard  # noqa: F401

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counts are those of this torch's Inductor"),
]


def count(library: Path, case: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.gpu.step_count", str(library), case]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", ["small", "small-without-loops"])
@pytest.mark.parametrize("backend", ["sdpa", "flex", "fa3"])
def test_each_attention_is_part_of_the_one_graph(guard: Path, backend: str, case: str) -> None:  # noqa: F811
    found = count(guard, f"{case};{backend}")
    assert found["graphs"] == 1
    assert found["later graphs"] == 4  # of Muon's updates: a shape of matrices each


@pytest.mark.parametrize(
    ("case", "generated", "library", "launches", "gigabytes", "peak_gib"),
    [
        ("record;varlen", 197, 252, 546, 62.082, 31.21),
        ("loops;varlen", 252, 354, 750, 89.515, 40.90),
        ("small;varlen", 115, 133, 315, 2.724, 1.86),
        ("record;varlen;run.stream=fp32", 521, 318, 925, 102.157, 38.01),
        ("record;varlen;run.kernels=eager", 219, 252, 568, 84.228, 33.28),
    ],
)
def test_a_step_is_one_graph_with_its_known_kernels_bytes_and_memory(
    guard: Path,  # noqa: F811
    case: str,
    generated: int,
    library: int,
    launches: int,
    gigabytes: float,
    peak_gib: float,
) -> None:
    found = count(guard, case)
    assert (found["graphs"], found["later graphs"]) == (1, 4)
    assert found["by kind"]["generated"] == pytest.approx(generated, rel=0.03)
    assert found["by kind"]["library"] == pytest.approx(library, rel=0.03)
    assert found["launches"] == pytest.approx(launches, rel=0.03)
    assert found["gigabytes"] == pytest.approx(gigabytes, rel=0.03)
    assert found["peak_gib"] == pytest.approx(peak_gib, rel=0.05)
    assert found["peak_gib"] < 75
