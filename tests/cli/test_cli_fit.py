"""`pgolf-post fit` as its users run it, by itself and on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.data import DataFolder
from tests import processes

FIT = ("--calibration-tokens", "512", "--kappa-tokens", "256")


def on_two_ranks(*arguments: object) -> dict[str, Any]:
    """Return what `fit` answers on two ranks."""
    done = processes.run_ranks(2, "-m", "pgolf_post", "fit", *map(str, arguments), *FIT)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_fit_fills_the_budget_and_is_the_same_on_two_ranks(pgolf: Any, pico_run: Path, pico_data: DataFolder) -> None:
    checkpoint, code = pico_run / "latest", pico_run / "code.py"
    code.write_text("print(1)\n")
    options = (checkpoint, "--budget", 9000, "--code", code, "--data", pico_data.path, "--json")
    first = pgolf("fit", *options, "--explain", "--eval", *FIT).json
    assert 9000 - 2000 <= first["total_bytes"] <= 9000
    assert first["code_bytes"] == 9
    assert first["artifact_bytes"] + first["code_bytes"] == first["total_bytes"]
    assert first["headroom_bytes"] == 9000 - first["total_bytes"]
    assert first["bpb"] > 0
    assert set(first["train_seconds"]) == {"statistics", "kappa"}
    again = on_two_ranks(*options, "--fresh")
    assert not again["artifact_cached"]
    assert again["symbols_sha256"] == first["symbols_sha256"]


@pytest.mark.long
def test_a_cached_fit_reports_the_training_data_that_making_it_read(pgolf: Any, pico_data: DataFolder) -> None:
    """Fine-tuning and distillation too, which a cached artifact does not repeat."""
    options = ("fit", "--budget", 9000, "--distill", "--tune-tokens", 4096, "--data", pico_data.path, "--json", *FIT)
    first, again = pgolf(*options).json, pgolf(*options).json
    assert (first["artifact_cached"], again["artifact_cached"]) == (False, True)
    assert set(first["train_seconds"]) == {"statistics", "kappa", "fine-tuning", "held-out text", "distillation"}
    assert first["fine_tuned"] == again["fine_tuned"]
    assert again["train_seconds"] == first["train_seconds"]


def test_a_front_of_budgets_shares_its_statistics(pgolf: Any, pico_data: DataFolder) -> None:
    fits = pgolf("fit", "--budgets", "7e3,9e3,12e3", "--data", pico_data.path, "--json", *FIT).json["fits"]
    assert [fit["budget_bytes"] for fit in fits] == [7000, 9000, 12000]
    assert all(0 <= fit["headroom_bytes"] <= 2000 for fit in fits)
    losses = [fit["predicted_nats"] for fit in fits]
    assert losses == sorted(losses, reverse=True)


def test_bytes_for_a_gap(pgolf: Any, pico_data: DataFolder) -> None:
    found = pgolf("fit", "--target-gap", 0.01, "--data", pico_data.path, "--json", *FIT).json
    assert 0 <= found["headroom_bytes"] <= 2000


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--budget", 2000), 3, "the least is about"),
        (("--budget", 10**7), 2, "nothing to solve"),
        (("--budget", 9000, "--budgets", "8e3"), 2, "give one of them"),
        (("--budgets", "8e3,much"), 2, "numbers of bytes with commas between"),
        (("--budget", 9000, "--trellis-states", 7), 2, "a trellis of 7 states"),
        (("--budget", 9000, "--train-seconds", 1e-9), 2, "--train-seconds allows"),
    ],
)
def test_bad_input_says_what_to_do(
    pgolf: Any, pico_data: DataFolder, options: tuple[object, ...], code: int, message: str
) -> None:
    done = pgolf("fit", *options, "--data", pico_data.path, *FIT)
    assert done.code == code, done.err
    assert message in done.err
    assert "Traceback" not in done.err
