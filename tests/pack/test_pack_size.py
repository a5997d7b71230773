"""The count is strict: real files, decimal bytes, nothing missing and nothing left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pgolf_post.cli
from pgolf_post.cli.size import command
from pgolf_post.errors import DamagedFileError, NotFoundError, OverBudgetError, SettingsError
from pgolf_post.pack.artifact import read_facts, write_artifact
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.size import count, unit_table
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor


def file_of(path: Path, num_bytes: int) -> Path:
    """A sparse file of exactly `num_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(num_bytes)
    return path


def sample_model() -> QuantizedModel:
    rng = np.random.default_rng(0)
    names = [f"blocks.{i}.mlp.fc.weight" for i in range(2)] + ["tok_emb.weight"]
    symbols = {name: rng.integers(-7, 8, (6, 10)).astype(np.int8) for name in names}
    quantized = {
        name: QuantizedTensor(name, array, (ScaleFactor("row", np.ones(6, np.float16)),), (6, 10))
        for name, array in symbols.items()
    }
    return QuantizedModel({}, {}, quantized, {"gain": np.ones(3, np.float16)})


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "derived" / "artifact.pgolf"
    write_artifact(path, pack(sample_model(), PackSettings(codec="brotli")))
    return path


def test_files_and_folders_are_counted_to_the_byte(tmp_path: Path) -> None:
    artifact = file_of(tmp_path / "a.bin", 1000)
    script = file_of(tmp_path / "train_gpt.py", 20)
    file_of(tmp_path / "code" / "b.py", 3)
    file_of(tmp_path / "code" / "sub" / "a.py", 4)
    file_of(tmp_path / "code" / ".hidden", 5)
    file_of(tmp_path / "code" / "__pycache__" / "b.pyc", 999)
    report = count(artifact, [script, tmp_path / "code"], 1031)
    names = [str(file.path.relative_to(tmp_path)) for file in report.code]
    assert names == ["train_gpt.py", "code/.hidden", "code/b.py", "code/sub/a.py"]
    assert report.facts() == {
        "artifact_bytes": 1000,
        "code_bytes": 32,
        "total_bytes": 1032,
        "budget_bytes": 1031,
        "headroom_bytes": -1,
    }
    assert report.over


@pytest.mark.parametrize(("num_bytes", "over"), [(16_000_000, False), (16_000_001, True)])
def test_the_default_budget_is_decimal(tmp_path: Path, num_bytes: int, over: bool) -> None:
    code = file_of(tmp_path / "c.py", 1)
    report = count(file_of(tmp_path / "a.bin", num_bytes - 1), [code])
    assert (report.over, report.headroom_bytes) == (over, 16_000_000 - num_bytes)


def test_a_file_named_twice_counts_once_and_a_link_counts_again(tmp_path: Path) -> None:
    artifact = file_of(tmp_path / "submission" / "a.bin", 100)
    script = file_of(tmp_path / "submission" / "train_gpt.py", 10)
    (tmp_path / "submission" / "link.py").symlink_to(script)
    report = count(artifact, [script, tmp_path / "submission", script])
    assert report.total_bytes == 120


def test_a_code_file_that_cannot_be_counted_is_an_error(tmp_path: Path) -> None:
    artifact = file_of(tmp_path / "a.bin", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "link.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "folder").symlink_to(tmp_path / "broken")
    with pytest.raises(NotFoundError, match=r"no such code file: .*missing\.py"):
        count(artifact, [tmp_path / "missing.py"])
    for name, message in {"empty": "holds no files", "broken": "link or special", "linked": "link or special"}.items():
        with pytest.raises(NotFoundError, match=message):
            count(artifact, [tmp_path / name])


def test_a_missing_artifact_or_negative_budget_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such artifact file"):
        count(tmp_path / "a.bin")
    with pytest.raises(SettingsError, match="-1 bytes"):
        count(file_of(tmp_path / "a.bin", 1), budget_bytes=-1)


def test_role_rows_add_up_to_the_artifact(ours: Path) -> None:
    rows = unit_table(read_facts(ours))
    roles = ["manifest", "row factors, float16", "passthrough, float16", "blocks.*.mlp.fc.weight", "tok_emb.weight"]
    assert [row.role for row in rows] == roles
    assert [row.num_weights for row in rows] == [0, 18, 3, 120, 60]
    assert sum(row.stored_bytes for row in rows) == ours.stat().st_size
    assert rows[0].bits_per_weight is None
    assert rows[3].bits_per_weight == 8 * rows[3].stored_bytes / 120


def test_size_of_our_artifact_in_its_folder(ours: Path, tmp_path: Path) -> None:
    code = file_of(tmp_path / "train_gpt.py", 12_345)
    result = CliRunner().invoke(command, [str(ours.parent), "--code", str(code), "--json"])
    assert result.exit_code == 0, result.output
    artifact_bytes = ours.stat().st_size
    answer = json.loads(result.stdout)
    assert sum(row["bytes"] for row in answer.pop("roles")) == artifact_bytes
    assert sum(row["bytes"] for row in answer.pop("tensors")) == artifact_bytes
    assert answer == {
        "artifact": str(ours),
        "artifact_bytes": artifact_bytes,
        "code_bytes": 12_345,
        "total_bytes": artifact_bytes + 12_345,
        "strict_total_bytes": artifact_bytes + 12_345,
        "convention_total_bytes": artifact_bytes + 12_345,
        "budget_bytes": 16_000_000,
        "headroom_bytes": 16_000_000 - 12_345 - artifact_bytes,
        "symbols_sha256": sample_model().symbols_sha256(),
    }
    assert "12,345" in result.stderr
    assert "blocks.*.mlp.fc.weight" in result.stderr
    assert "no --code" not in result.stderr


def test_any_file_is_an_artifact_and_absent_code_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(file_of(tmp_path / "model.int6.ptz", 77)), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["code_bytes"] == 0
    assert "symbols_sha256" not in json.loads(result.stdout)
    assert "code is counted as 0 bytes because no --code file was given" in result.stderr


def test_without_json_stdout_is_empty(ours: Path) -> None:
    result = CliRunner().invoke(command, [str(ours)])
    assert (result.exit_code, result.stdout) == (0, "")


def test_over_budget_prints_everything_then_fails(tmp_path: Path) -> None:
    artifact = file_of(tmp_path / "a.bin", 16_000_001)
    result = CliRunner().invoke(command, [str(artifact), "--json"])
    assert isinstance(result.exception, OverBudgetError)
    assert "16,000,001 bytes are 1 over the budget of 16,000,000" in str(result.exception)
    assert "--clip" in (result.exception.hint or "")
    assert json.loads(result.stdout)["headroom_bytes"] == -1
    assert "headroom" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["a.bin"], None),
        (["a.bin", "--code", "c.py"], 3),
        (["a.bin", "--code", "c.py", "--budget", "16000001"], None),
        (["a.bin", "--code", "missing.py"], 1),
        (["missing.bin"], 1),
        (["."], 1),
        (["a.bin", "--budget", "-1"], 2),
        (["a.bin", "--budgets", "1"], 2),
    ],
)
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], exit_code: int | None
) -> None:
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path / "a.bin", 16_000_000)
    file_of(tmp_path / "c.py", 1)
    monkeypatch.setattr(sys, "argv", ["pgolf-post", "size", *arguments])
    if exit_code is None:
        pgolf_post.cli.main()
    else:
        with pytest.raises(SystemExit) as stopped:
            pgolf_post.cli.main()
        assert stopped.value.code == exit_code


def test_the_process_exits_3_when_over(tmp_path: Path) -> None:
    artifact = file_of(tmp_path / "a.bin", 16_000_001)
    arguments = [sys.executable, "-m", "pgolf_post", "size", str(artifact), "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["total_bytes"] == 16_000_001
    assert "next: " in done.stderr


def test_a_damaged_artifact_is_not_counted(ours: Path) -> None:
    ours.write_bytes(ours.read_bytes()[:-1])
    result = CliRunner().invoke(command, [str(ours)])
    assert isinstance(result.exception, DamagedFileError)
    assert str(ours) in str(result.exception)
