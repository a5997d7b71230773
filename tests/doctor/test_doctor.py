"""The doctor tells machines that fit from those that do not, and says what to do."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pgolf_post.cli.doctor import command
from pgolf_post.data import DataFolder
from pgolf_post.doctor import devices, machine, recipe, software, stage, work
from pgolf_post.doctor.findings import Finding, counts, failed, look, ok, warning
from tests.conftest import pico_recipe, write_recipe


def states(findings: list[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def test_a_look_that_raises_has_failed_with_its_error() -> None:
    def broken() -> list[Finding]:
        raise OSError("no such device")

    (finding,) = look("disk", broken)
    assert (finding.name, finding.state) == ("disk", "failed")
    assert "no such device" in finding.value
    assert counts([ok("a", ""), warning("b", "", "c"), finding]) == {"ok": 1, "warning": 1, "failed": 1}


@pytest.mark.parametrize(
    ("finding", "state"),
    [
        (software.python_version((3, 10)), "failed"),
        (software.python_version((3, 12)), "ok"),
        (software.torch_version("2.8.1+cu128"), "failed"),
        (software.torch_version("2.13.0"), "ok"),
        (software.torch_version("nightly"), "failed"),
        (software.cuda_driver("12.8", "570.86", True), "ok"),
        (software.cuda_driver("13.0", "570.86", True), "failed"),
        (software.cuda_driver("12.8", "", False), "failed"),
        (software.cuda_driver("12.8", "570.86", False), "failed"),
    ],
    ids=["old-python", "python", "old-torch", "torch", "no-version", "cuda", "old-driver", "no-driver", "hidden-gpu"],
)
def test_versions_that_fit_together(finding: Finding, state: str) -> None:
    assert finding.state == state
    assert bool(finding.mend) == (state != "ok")


@pytest.mark.parametrize(
    ("device", "rate", "state"),
    [
        ("NVIDIA H100 80GB HBM3", 690.0, "ok"),
        ("NVIDIA H100 80GB HBM3", 400.0, "warning"),
        ("NVIDIA A100-SXM4-80GB", 215.0, "ok"),
        ("Some other card", 20.0, "ok"),
    ],
    ids=["h100", "slow-h100", "a100", "unknown"],
)
def test_a_slow_pod_is_said(device: str, rate: float, state: str) -> None:
    finding = devices.judged("GPU 0 speed", device, rate)
    assert finding.state == state
    assert f"{100 * rate / devices.H100:.0f} % of an H100's" in finding.value


def test_gpus_that_are_not_here_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert states(devices.gpus(8)) == ["failed"]
    assert states(devices.gpus(None)) == ["ok"]


def test_little_memory_few_threads_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(machine.memory(2_000_000_000)) == ["warning"]
    assert states(machine.memory(64_000_000_000)) == ["ok"]
    monkeypatch.setattr(machine, "allowed_threads", lambda: 8)
    assert states(machine.cpus(8)) == ["warning"]
    assert states(machine.cpus(1)) == ["ok"]
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 20)
    assert machine.disk(tmp_path, need=1e18)[0].state == "failed"
    assert machine.disk(tmp_path / "not" / "there", need=1.0)[0].state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    (finding,) = machine.write_and_rename(tmp_path)
    assert finding.state == "failed"
    assert "read-only" in finding.value


def test_data_that_is_missing_or_cut_fails(tmp_path: Path, pico_data: DataFolder) -> None:
    assert states(recipe.data({"data": {"dir": str(pico_data.path)}})) == ["ok"]
    assert states(recipe.data({"data": {"dir": str(tmp_path)}})) == ["failed"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pico_data.path.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = next(broken.glob("fineweb_val_0*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert states(recipe.data({"data": {"dir": str(broken)}})) == ["failed"]
    tokenizer = broken / "tokenizer.model"
    shard.write_bytes(next(pico_data.path.glob("fineweb_val_0*.bin")).read_bytes())
    tokenizer.write_bytes(tokenizer.read_bytes() + b"x")
    assert "not the manifest's tokenizer" in recipe.data({"data": {"dir": str(broken)}})[0].value


def test_every_attention_kernel_runs_a_step_or_says_why_not() -> None:
    findings = work.attention()
    assert {"attention sdpa", "attention fa3"} <= {finding.name for finding in findings}
    assert states(findings) == ["ok"] * len(findings)
    assert "one step" in findings[0].value


def test_a_kernel_that_breaks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def unavailable(self, *_: Any) -> None:
            return None

        def reach(self, *_: Any) -> None:
            return None

        def attend(self, q: torch.Tensor, *_: Any) -> torch.Tensor:
            return q * float("inf")

    monkeypatch.setattr(work, "_backends", lambda model: {"broken": Broken()})
    assert states(work.attention()) == ["failed"]


def test_the_command_lists_findings_and_fails_with_4(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 20)
    path = write_recipe(pico_recipe(pico_data, tmp_path / "checkpoints"), tmp_path / "recipe.toml")
    monkeypatch.setattr(recipe, "dry_run", lambda _: [ok("recipe", "as if")])
    result = CliRunner().invoke(command, [str(path), "--fast", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert {"Python", "torch", "disk", "data", "recipe"} <= {row["name"] for row in found["findings"]}
    assert found["failed"] == 0
    monkeypatch.setattr(stage.machine, "clock", lambda: [failed("clock", "1970", "set it")])
    result = CliRunner().invoke(command, ["--fast"])
    assert getattr(result.exception, "exit_code", None) == 4
    assert "clock" in str(result.exception)


def test_the_slow_looks_are_left_out_on_demand() -> None:
    fast, whole = stage.looks(None, 2, fast=True), stage.looks(None, 2, fast=False)
    assert whole.keys() - fast.keys() == {"matrix product", "attention", "torch.compile", "two processes"}
    assert isinstance(whole["two processes"], partial)
