"""A round of mini golf: its row, its seconds over several lives, its bytes, and what a table says of rows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks.minigolf import work
from benchmarks.minigolf.__main__ import command
from benchmarks.minigolf.rows import OVERRUN, ROWS_FILE, grouped, keep_line, read_rows, table_rows, verdict
from benchmarks.minigolf.settings import Round, read_round, scaled_tokens
from benchmarks.minigolf.spending import Account, Children, SpentError
from benchmarks.minigolf.text import scored_text
from benchmarks.minigolf.training import Training
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli import cli
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.documents import Document
from pgolf_post.errors import MismatchError, OverBudgetError, PgolfError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.ledger import Ledger
from pgolf_post.pack.report.size import count
from pgolf_post.settings import parse_settings
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.trainer_process import as_toml
from tests.conftest import PICO_RECIPE
from trainer.__main__ import command as train_command
from trainer.run.loop import Trainer
from trainer.schedule.clock import processor_seconds

ROUNDS = Path(__file__).resolve().parents[2] / "benchmarks" / "minigolf" / "rounds"
COMMANDS: dict[str, click.Command] = {
    "trainer": train_command,
    "pgolf_post": cli,
    "benchmarks.minigolf.work": work.command,
}


class Calls:
    """Runs stages in this process."""

    def run(self, module: str, words: Sequence[str], account: Account, stage: str, limit_seconds: float | None) -> str:
        write, before = account.begin(stage), processor_seconds()
        try:
            done = CliRunner().invoke(COMMANDS[module], words, catch_exceptions=False, standalone_mode=False)
        finally:
            write(processor_seconds() - before)
        return done.stdout


def write_round(folder: Path, **changes: Any) -> Path:
    """A pico round and its recipe as files."""
    recipe = {key: value for key, value in PICO_RECIPE.items() if key != "checkpoint"}
    (folder / "pico.toml").write_text(as_toml(recipe))
    (folder / "code.py").write_text("print('decode')\n")
    tables = {
        "budget": {"train_seconds": 1.0, "eval_seconds": 100.0, "bytes": 30_000, "code": ["code.py"]},
        "rounding": {
            "method": "plan", "plan": "record-1855", "codec": "rans", "calibration_tokens": 64, "fixed_seconds": 0.2,
        },
    }  # fmt: skip
    top = 'name = "pico"\nrecipe = "pico.toml"\nthreads = 1\nsave_seconds = 0.05\nexpected_windows = 8\n'
    path = folder / "round.toml"
    path.write_text(top + as_toml({key: {**table, **changes.get(key, {})} for key, table in tables.items()}))
    return path


def played(path: Path, data: DataFolder, out: Path, seed: int = 1337) -> dict[str, Any]:
    """Play a round by its command and return its row."""
    words = ["play", str(path), "--data", str(data.path), "--out", str(out), "--seed", str(seed), "--json"]
    done = CliRunner().invoke(command, words, obj=Calls(), catch_exceptions=False, standalone_mode=False)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@pytest.mark.slow
def test_a_killed_round_goes_on_and_its_row_counts_both_lives(
    tmp_path: Path, pico_data: DataFolder, pico_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_round(tmp_path), tmp_path / "out"  # a first run, the fixture's, has imported everything
    step = Trainer.timed_step

    def killed(trainer: Trainer, at: float) -> tuple[float, float]:
        if trainer.state.step >= 5:
            trainer.writer.drain()
            raise ZeroDivisionError
        return step(trainer, at)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "timed_step", killed)
        with pytest.raises(ZeroDivisionError):
            played(path, pico_data, out)
    (account,) = out.glob("*/training/processor_seconds.json")
    first = json.loads(account.read_text())["train"]
    assert len(first) == 1
    assert not (out / "rows.jsonl").exists()

    row = played(path, pico_data, out)
    lives = json.loads(account.read_text())["train"]
    assert lives[0] == first[0] > 0
    assert row["processor_seconds"]["train"] == pytest.approx(sum(lives), abs=2e-3)
    assert row["lives"]["train"] == 2
    final = Checkpoint.open(Path(json.loads((account.parent / "train.json").read_text())["checkpoint"]))
    assert final.meta["train_seconds"] >= 0.8  # the budget less what is kept for rounding; the first life's included
    assert final.meta["step"] == row["steps"]
    assert lives[1] < 0.8  # without the first life's seconds it would have trained for longer
    assert row["training_seconds"] == pytest.approx(sum(lives) + row["processor_seconds"]["round"], abs=2e-3)

    # the row: sums of real files, a gap that is the difference of its two scores, a row of the ledger
    (artifact,) = out.glob("*/step_*/derived/artifact/*/artifact.pgolf")
    size = count(artifact, [tmp_path / "code.py"], 30_000)
    assert {key: row[key] for key in size.facts() if key in row} == {k: v for k, v in size.facts().items() if k in row}
    assert row["code_bytes"] == (tmp_path / "code.py").stat().st_size
    assert row["gap"]["difference_bpb"] == pytest.approx(row["bpb"] - row["bpb_unquantized"], abs=1e-9)
    assert row["expected_gap"]["difference_bpb"] > 0
    with Ledger.open(out, read_only=True) as ledger:
        kept = ledger.get("trial", row["id"])
    assert kept is not None
    assert kept.result["bpb"] == row["bpb"]
    for limit, spent in (("training", row["training_seconds"]), ("evaluation", row["scoring_seconds"])):
        assert sum(phase["seconds"] for phase in kept.phases if phase["limit"] == limit) == pytest.approx(
            spent, abs=2e-3
        )

    # another way of rounding has the same training: the seconds count for both, and are spent once
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace('"pico"', '"other"', 1).replace("record-1855", "rtn"))
    shared = played(other, pico_data, out)
    assert json.loads(account.read_text())["train"] == lives
    assert shared["processor_seconds"]["train"] == row["processor_seconds"]["train"]
    assert shared["bpb_unquantized"] == row["bpb_unquantized"]
    assert shared["symbols_sha256"] != row["symbols_sha256"]
    assert [one["name"] for one in read_rows(out / ROWS_FILE)] == ["pico", "other"]

    # again: every stage is found, nothing is spent, and the row stays one
    again = played(path, pico_data, out)
    assert again == row
    assert [one["name"] for one in read_rows(out / ROWS_FILE)] == ["other", "pico"]


def task_for(checkpoint: Checkpoint, data: DataFolder, **changes: Any) -> dict[str, Any]:
    """The task of rounding a pico checkpoint."""
    plan = {"method": "plan", "plan": "record-1855", "set": [], "to_bytes": "no", "codec": "rans"}
    fit = {"fit": FitSettings(kappa="off", trellis_states=0).model_dump(mode="json")}
    made = {"checkpoint": str(checkpoint.path), "data": str(data.path), "weights": "ema", "code": []}
    return {**made, **plan, **fit, "calibration_tokens": 64, "bytes": 30_000, **changes}


@pytest.mark.long
def test_an_artifact_over_the_bytes_is_refused_and_larger_steps_make_it_fit(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    published = work.rounded(task_for(pico_checkpoint, pico_data))
    limit = published["artifact_bytes"] - 150
    with pytest.raises(OverBudgetError, match="150 over the budget"):
        work.rounded(task_for(pico_checkpoint, pico_data, bytes=limit))
    down = work.rounded(task_for(pico_checkpoint, pico_data, bytes=limit, to_bytes="down"))
    assert down["total_bytes"] <= limit
    assert down["clip_factor"] > 1
    same = work.rounded(task_for(pico_checkpoint, pico_data, to_bytes="down"))
    assert same["symbols_sha256"] == published["symbols_sha256"]  # as published where it fits


@pytest.mark.long
def test_fit_leaves_room_for_the_code(tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    code = tmp_path / "decode.py"
    code.write_text("#" * 1000)
    made = work.rounded(task_for(pico_checkpoint, pico_data, method="fit", bytes=7_000, code=[str(code)]))
    assert made["code_bytes"] == 1000
    assert made["total_bytes"] == made["artifact_bytes"] + 1000 <= 7_000
    assert Path(made["artifact"]).stat().st_size == made["artifact_bytes"]


# ---- rounds as files -------------------------------------------------------------------------------------------------


def test_every_round_of_ours_can_be_trained(pico_data: DataFolder) -> None:
    recipes = {"record_6x256.toml", "ours_recipe.toml"}
    files = [path for path in sorted(ROUNDS.glob("*.toml")) if path.name not in recipes]
    names = [read_round(path)[0].name for path in files]
    assert {"R", "R-retuned", "R-fit", "ours", "ours-tenth"} == set(names)
    assert len(set(names)) == len(names)
    for path in files:
        wanted, recipe = read_round(path)
        for scale in (1.0, 0.1):
            Training(wanted, recipe, pico_data, Path("unused"), 1, scale, Calls())
        assert wanted.rounding.reserve_seconds + wanted.rounding.fixed_seconds < wanted.budget.train_seconds


def test_what_counts_steps_keeps_its_share_of_a_shorter_run(tmp_path: Path, pico_data: DataFolder) -> None:
    path = write_round(tmp_path)
    wanted, recipe = read_round(path)
    recipe["optim"] = {**recipe["optim"], "momentum_warmup_steps": 40, "ema_decay": 0.99}
    whole, half = (Training(wanted, recipe, pico_data, tmp_path, 1, s, Calls()).settings["optim"] for s in (1.0, 0.5))
    assert (whole["momentum_warmup_steps"], half["momentum_warmup_steps"]) == (40, 20)
    assert whole["ema_decay"] == 0.99
    assert half["ema_decay"] == pytest.approx(0.99**2, abs=1e-6)


def test_settings_that_cannot_act_are_refused() -> None:
    def parsed(**rounding: Any) -> Round:
        return parse_settings(Round, {"name": "a", "recipe": "a.toml", "rounding": rounding}, "round")

    for rounding, words in (
        ({"method": "plan"}, "a plan is for method plan"),
        ({"method": "fit", "plan": "rtn"}, "a plan is for method plan"),
        ({"method": "fit", "to_bytes": "fill"}, "acts on a plan only"),
        ({"method": "plan", "plan": "rtn", "fit": {"kappa": "off"}}, "acts with method fit only"),
        ({"method": "fit", "codec": "zip"}, "codec 'zip'; there are"),
    ):
        with pytest.raises(PgolfError, match=words):
            parsed(**rounding)
    assert parsed(method="fit").rounding.codec == "best"


def test_scaled_tokens_are_a_share_but_some_windows_at_least() -> None:
    assert scaled_tokens(100_000, 0.5) == 50_000
    assert scaled_tokens(100_000, 1e-6) == 2048
    assert scaled_tokens(1000, 0.5) == 1000
    assert scaled_tokens(0, 0.5) == 0


def test_the_text_is_the_same_documents_under_every_tokenizer(tmp_path: Path) -> None:
    documents = [
        Document(f"d{i}", f"the {i} quick brown fox jumps over {'lazy dogs ' * (3 * i + 1)}") for i in range(30)
    ]
    train, val = documents[:20], documents[20:]
    folders = []
    for size in (300, 340):
        folders.append(
            build(
                train,
                tmp_path / str(size),
                BuildSettings(name="t", vocab_size=size, byte_sidecar=True),
                val_documents=val,
            )
        )
    (first, second), whole = [[scored_text(folder, share) for folder in folders] for share in (0.3, 1.0)]
    assert first.sha256 == second.sha256 != whole[0].sha256 == whole[1].sha256
    assert first.documents == second.documents < whole[0].documents == 10
    assert first.tokens != second.tokens
    sizes = [len(document.text.encode()) for document in val]
    assert sum(sizes[: first.documents - 1]) < 0.3 * sum(sizes) <= sum(sizes[: first.documents])
    assert whole[0].tokens == len(folders[0].tokens("val"))


# ---- seconds ---------------------------------------------------------------------------------------------------------


def test_a_childs_processor_seconds_are_counted_and_limited(tmp_path: Path) -> None:
    account = Account(tmp_path / "seconds.json")
    Children().run("timeit", ["-n", "1", "-r", "1", "sum(range(3 * 10**6))"], account, "work", None)
    assert account.spent("work") > 0.02
    with pytest.raises(SpentError, match=r"endless has spent its 0\.1 processor seconds"):
        Children().run("timeit", ["-n", "1", "-r", "1", "while True: pass"], account, "endless", 0.1)
    assert account.spent("endless") >= 0.1
    assert Account(tmp_path / "seconds.json").lives == account.lives  # as on disk
    with pytest.raises(PgolfError, match=r"wrong failed \(exit 1\)"):
        Children().run("timeit", ["1 / 0"], account, "wrong", None)


PARENT = """
import sys
from pathlib import Path
from benchmarks.minigolf.spending import Account, Children
Children().run("timeit", ["-n", "1", "-r", "1", "while True: pass"], Account(Path(sys.argv[1])), "work", None)
"""


def test_a_killed_parent_has_counted_and_leaves_no_child(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(path)])
    until = time.monotonic() + 60
    while not (path.is_file() and Account(path).spent("work") > 0):
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert children
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert Account(path).spent("work") > 0


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- tables ----------------------------------------------------------------------------------------------------------


def row(name: str, seed: int, bpb: float, **changes: Any) -> dict[str, Any]:
    """A row as a table reads it."""
    gap = {"difference_bpb": 0.001, "low_bpb": 0.0005, "high_bpb": 0.0015}
    budgets = {"train_budget_seconds": 4800.0, "eval_budget_seconds": 4800.0, "budget_bytes": 2_000_000}
    equal = {"scale": 1.0, "text_sha256": "a", "data_sha256": name, **budgets}
    numbers = {
        "tokens_seen": 100,
        "bpb_unquantized": bpb - 0.001,
        "bpb": bpb,
        "bpb_protocols": {"ttt lora": bpb - 0.01},
    }
    seconds = {"training_seconds": 4790.0, "scoring_seconds": 90.0, "within_seconds": True}
    sizes = {"total_bytes": 1_999_000, "bits_per_weight": 3.5}
    return {
        "name": name,
        "seed": seed,
        "gap": gap,
        "expected_gap": gap,
        **equal,
        **numbers,
        **seconds,
        **sizes,
        **changes,
    }


def test_rounds_that_end_at_one_moment_keep_both_rows(tmp_path: Path) -> None:
    other = threading.Thread(target=keep_line, args=(tmp_path, {"id": "b"}))
    with claim(tmp_path, "rows", wait=True):
        other.start()
        other.join(0.05)
        assert other.is_alive()  # it waits
        (tmp_path / ROWS_FILE).write_text('{"id": "a"}\n')
    other.join()
    assert [one["id"] for one in read_rows(tmp_path / ROWS_FILE)] == ["a", "b"]


def test_verdicts_are_welchs_and_need_two_seeds() -> None:
    base = [row("R", seed, 1.90 + 0.001 * seed) for seed in range(3)]
    better = [row("ours", seed, 1.85 + 0.001 * seed) for seed in range(3)]
    difference, p, word = verdict(better, base)
    assert (round(difference, 9), word) == (-0.05, "better")
    assert p is not None
    assert p < 1e-5
    assert verdict(base, better)[2] == "worse"
    assert verdict([row("ours", s, 1.90 + 0.001 * s) for s in (0, 1, 3)], base)[2] == "undecided"
    assert verdict(better[:1], base)[1:] == (None, "one seed says nothing of the spread")
    late = [{**one, "within_seconds": False} for one in better]
    assert verdict(late, base)[2] == "over its seconds"
    table = table_rows(grouped([*base, *better]), "R")
    assert [line[0] for line in table] == ["R", "ours"]
    assert table[1][-3:] == ("-0.05000", f"{p:.4f}", "better")
    assert OVERRUN == 1.01


def test_rows_that_cannot_be_compared_are_refused() -> None:
    for key, value in (("scale", 0.1), ("text_sha256", "b"), ("train_budget_seconds", 1.0), ("budget_bytes", 1)):
        with pytest.raises(MismatchError, match=f"rows differ in {key}"):
            grouped([row("R", 0, 1.9), row("ours", 0, 1.9, **{key: value})])
    with pytest.raises(MismatchError, match="two rows of one seed"):
        grouped([row("R", 0, 1.9), row("R", 0, 1.8)])
