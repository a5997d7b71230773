"""Memory is counted before work starts, and too little is refused with a way out."""

from __future__ import annotations

import resource

import pytest
import torch

from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.calibrate.memory import free_bytes, plan_memory, require_memory
from pgolf_post.calibrate.stage import observe
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError

CPU = torch.device("cpu")


def test_the_plan_names_the_largest_matrix_and_counts_every_sum(pico_checkpoint: Checkpoint) -> None:
    observed = observe(pico_checkpoint.load(), CalibrationSettings(fisher=True))
    plain = plan_memory(observed.module, observed.sites, [], 512, 64, fisher=False)
    fisher = plan_memory(observed.module, observed.sites, observed.lookups, 512, 64, fisher=True)
    assert plain.largest == "hessian of blocks.0.mlp.out, 32 × 32"
    sites = 8 * (3 * (3 * 16**2 + 32**2) + 16**2)
    assert plain.sums_bytes == sites + 3 * 4 * 32**2
    matrices = 8 * (3 * (3 + 1 + 1) * 16**2 + 3 * 32**2 + 2 * 16**2)
    products = [tensor for site in observed.sites if not site.is_head for tensor in site.tensors]
    outputs = sum(8 * observed.module.get_parameter(tensor).size(0) ** 2 for tensor in products)
    assert outputs >= 8 * 3 * (2 * 16**2 + 32**2)
    assert fisher.sums_bytes == sites + matrices + outputs + 3 * 4 * 32**2
    assert fisher.activation_bytes > plain.activation_bytes


def test_too_little_memory_is_refused_before_any_work(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf_post.calibrate.memory.free_bytes", lambda _: 10_000)
    with pytest.raises(PgolfError, match=r"largest: hessian of blocks\.0\.mlp\.out, 32 × 32.* 10,000 are free") as no:
        calibrate(pico_checkpoint.load(), pico_data, CalibrationSettings(tokens=64))
    assert no.value.hint is not None
    assert not list(pico_checkpoint.path.glob("derived/stats/*"))


def test_processes_on_one_machine_share_its_memory(pico_checkpoint: Checkpoint) -> None:
    observed = observe(pico_checkpoint.load(), CalibrationSettings())
    plan = plan_memory(observed.module, observed.sites, [], 512, 64, fisher=False)
    require_memory(plan, CPU, 1)
    with pytest.raises(PgolfError, match="in 1000000 processes"):
        require_memory(plan, CPU, 1_000_000)


def test_free_memory_is_that_of_this_machine() -> None:
    pages, size = resource.getpagesize(), free_bytes(CPU)
    assert pages < size < 1 << 62
