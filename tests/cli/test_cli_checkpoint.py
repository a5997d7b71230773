"""checkpoint, show, and which data a checkpoint may meet."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from tests import processes

FEW = ("--calibration-tokens", 512)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def scale_metric(view: str, key: str, factor: float) -> Callable[[dict[str, Any]], object]:
    """An edit of meta.json that multiplies one recorded number."""

    def edit(meta: dict[str, Any]) -> None:
        metric = meta["views"][view]["metric"]
        metric[key] = type(metric[key])(metric[key] * factor)

    return edit


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_as_it_was_saved_verifies(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    answer = pgolf("checkpoint", "verify", pico_checkpoint.path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["passed"] is True
    assert answer.json["views"].keys() == {"raw", "ema"}
    for name, view in answer.json["views"].items():
        assert view["recorded"] == pico_checkpoint.meta["views"][name]["metric"]["bpb"]


@pytest.mark.parametrize(
    ("view", "key", "factor"),
    [
        ("raw", "nats", 1.001),
        ("ema", "nats", 0.999),
        ("raw", "bpb", 1.001),
        ("ema", "bpb", 0.999),
        ("raw", "tokens", 1.01),
        ("raw", "bytes", 1.01),
    ],
)
def test_any_recorded_number_that_was_changed_exits_4(
    pgolf: Any, pico_checkpoint: Checkpoint, view: str, key: str, factor: float
) -> None:
    edit_json(pico_checkpoint.path / "meta.json", scale_metric(view, key, factor))
    answer = pgolf("checkpoint", "verify", "--json")
    assert answer.code == 4, answer.err
    assert str(pico_checkpoint.path.name) in answer.err


def test_a_changed_metric_exits_4_as_a_process(pico_checkpoint: Checkpoint) -> None:
    for key in ("nats", "bpb"):
        edit_json(pico_checkpoint.path / "meta.json", scale_metric("ema", key, 1.001))
    done = processes.run(["-m", "pgolf_post", "checkpoint", "verify", str(pico_checkpoint.path), "--json"])
    assert done.returncode == 4, done.stderr
    views = json.loads(done.stdout)["views"]
    assert (views["raw"]["passed"], views["ema"]["passed"]) == (True, False)
    assert "FAILED" in done.stderr
    assert "differs by more than 1e-05 nats per token" in done.stderr


def test_a_flipped_weight_bit_exits_1_and_names_the_file(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    path = pico_checkpoint.path / "ema.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    answer = pgolf("checkpoint", "verify")
    assert (answer.code, answer.out) == (1, "")
    assert "ema.safetensors or its config.json changed after saving" in answer.err


def test_a_path_that_is_no_checkpoint_exits_1(pgolf: Any, tmp_path: Path) -> None:
    for command in ("checkpoint verify", "requant", "calibrate", "eval", "swa-blend", "show"):
        answer = pgolf(*command.split(), tmp_path / "absent")
        assert (answer.code, answer.out) == (1, "")
        assert "absent" in answer.err
        assert "next: " in answer.err


def test_list_names_every_complete_checkpoint_and_no_other(pgolf: Any, pico_run: Path, tmp_path: Path) -> None:
    (pico_run / "pico" / "step_000000-init" / "meta.json").unlink()
    answer = pgolf("checkpoint", "list", "--json")
    assert answer.code == 0
    phases = [Path(listed["path"]).name.partition("-")[2] for listed in answer.json["checkpoints"]]
    assert phases == ["momentum_warmup_done+loops_on", "warmdown_start", "frac75", "final"]
    assert pgolf("checkpoint", "list", "--root", tmp_path / "absent", "--json").json == {"checkpoints": []}


# ---- which data ------------------------------------------------------------------------------------------------------

NEEDS_DATA = ("requant", "calibrate", "eval", "checkpoint verify", "swa-blend")


@pytest.mark.parametrize("command", NEEDS_DATA)
def test_a_data_folder_of_another_tokenizer_is_refused(pgolf: Any, other_data: DataFolder, command: str) -> None:
    answer = pgolf(*command.split(), "--data", other_data.path)
    assert (answer.code, answer.out) == (1, "")
    assert f"has tokenizer {other_data.tokenizer_sha256[:12]}" in answer.err
    assert "next: pass the folder made with the same tokenizer" in answer.err


@pytest.fixture
def own_data(pico_run: Path, pico_data: DataFolder, tmp_path: Path) -> Path:
    """A private copy of the pico data folder, recorded as the one that the final checkpoint was trained on."""
    folder = tmp_path / "data"
    shutil.copytree(pico_data.path, folder)
    edit_json((pico_run / "latest").resolve() / "meta.json", lambda meta: meta.update(data_dir=str(folder)))
    return folder


@pytest.mark.parametrize("command", NEEDS_DATA)
def test_a_data_folder_that_was_rebuilt_is_refused_unless_it_is_named(pgolf: Any, own_data: Path, command: str) -> None:
    edit_json(own_data / "manifest.json", lambda manifest: manifest.update(name="rebuilt"))
    answer = pgolf(*command.split())
    assert (answer.code, answer.out) == (1, "")
    assert f"{own_data} was rebuilt since" in answer.err
    assert f"next: if that is the text you mean, say so: --data {own_data}" in answer.err


def test_a_rebuilt_data_folder_that_is_named_is_used_but_verifies_nothing(pgolf: Any, own_data: Path) -> None:
    edit_json(own_data / "manifest.json", lambda manifest: manifest.update(name="rebuilt"))
    assert pgolf("requant", "--eval", *FEW, "--data", own_data).code == 0
    answer = pgolf("checkpoint", "verify", "--data", own_data)
    assert answer.code == 4
    assert "is not the data that" in answer.err


def test_a_data_folder_that_is_gone_asks_for_another(pgolf: Any, own_data: Path, pico_data: DataFolder) -> None:
    shutil.rmtree(own_data)
    answer = pgolf("eval")
    assert answer.code == 1
    assert "next: pass --data FOLDER" in answer.err
    assert pgolf("eval", "--data", pico_data.path).code == 0


# ---- show ------------------------------------------------------------------------------------------------------------


def test_show_says_what_each_kind_of_path_is_and_what_comes_next(
    pgolf: Any, pico_run: Path, pico_data: DataFolder
) -> None:
    artifact = Path(pgolf("requant", "--eval", "--json", *FEW).json["artifact"])
    blend = pgolf("swa-blend", "--json").json["checkpoint"]
    derived = artifact.parent.parent.parent
    expected: dict[Path | str, tuple[str, str]] = {
        pico_run / "latest": ("checkpoint", "requant --eval"),
        blend: ("checkpoint", "requant --eval"),
        pico_run / "pico" / "step_000000-init": ("checkpoint", "requant --eval"),
        pico_run / "pico": ("run", "pgolf-post show"),
        pico_run: ("run", "pgolf-post show"),
        artifact: ("artifact", f"pgolf-post eval {artifact}"),
        artifact.parent: ("derived artifact", f"pgolf-post size {artifact.parent}"),
        next(derived.glob("stats/*")): ("derived stats", ""),
        next(derived.glob("score/*")): ("derived score", ""),
        pico_data.path: ("data folder", f"pgolf-post data check {pico_data.path}"),
    }
    for path, (what, following) in expected.items():
        answer = pgolf("show", path, "--json")
        assert answer.code == 0, answer.err
        assert answer.json["what"] == what
        assert following in "".join(line for line in answer.err.splitlines(True) if line.startswith("next: "))


def test_show_without_a_path_is_the_newest_final_checkpoint_with_its_ids(
    pgolf: Any, pico_checkpoint: Checkpoint
) -> None:
    answer = pgolf("show", "--json")
    assert answer.json["checkpoint_id"] == pico_checkpoint.view_id("raw")
    assert answer.json["meta"]["phase"] == "final"
    for name in ("raw", "ema"):
        assert f"id {pico_checkpoint.view_id(name)[:12]}, bpb " in answer.err


def test_show_lists_each_checkpoint_of_a_run_once(pgolf: Any, pico_run: Path) -> None:
    for path in (pico_run, pico_run / "pico"):
        listed = [Path(folder).resolve() for folder in pgolf("show", path, "--json").json["checkpoints"]]
        assert listed == sorted(folder.resolve() for folder in (pico_run / "pico").glob("step_*"))


def test_show_lists_results_and_only_counts_what_is_none(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    artifact = Path(pgolf("requant", "--json", *FEW).json["artifact"]).parent
    for name in (f".tmp-{os.getpid()}-0-{artifact.name}", f".old-0-{artifact.name}", "0123456789ab.partial"):
        shutil.copytree(artifact, artifact.with_name(name))
    (artifact.parent / "incomplete").mkdir()
    shown = pgolf("show", pico_checkpoint.path).err
    derived = [line.split()[-1] for line in shown.splitlines() if "derived artifact" in line]
    assert derived == [artifact.name]
    assert "1 incomplete, 1 partial, 2 temporary" in shown
    for name, state in ((artifact.name, "complete"), ("0123456789ab.partial", "partial")):
        assert any(line.split()[:2] == ["state", state] for line in shown_lines(pgolf, artifact.with_name(name)))


def test_show_marks_a_result_of_other_weights(pgolf: Any, pico_checkpoint: Checkpoint) -> None:
    pgolf("calibrate", "--tokens", 64, "--weights", "raw")
    edit_json(pico_checkpoint.path / "meta.json", lambda meta: meta["views"]["raw"].update(id="another"))
    assert sum("(orphan: made from other weights)" in line for line in shown_lines(pgolf, pico_checkpoint.path)) == 1


def shown_lines(pgolf: Any, path: Path) -> list[str]:
    answer = pgolf("show", path)
    assert answer.code == 0, answer.err
    return str(answer.err).splitlines()


def test_show_refuses_what_it_does_not_know(pgolf: Any, tmp_path: Path, pico_run: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "notes.txt", tmp_path / "empty"):
        answer = pgolf("show", path)
        assert answer.code == 1
        assert "is not a checkpoint, run, derived folder, artifact or data folder" in answer.err
    incomplete = pico_run / "pico" / "step_000000-init"
    (incomplete / "meta.json").unlink()
    answer = pgolf("show", incomplete)
    assert answer.code == 1
    assert "not a complete checkpoint" in answer.err
