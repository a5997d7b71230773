"""The trainer as a process: how a sweep calls its runs, how many processes share one, and when it is stopped.

A sweep's trainer leaves the ledger alone, wherever it runs: the rows of its run come with the trial's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.sweep.spending import BudgetSpentError
from pgolf_post.sweep.train_stage import TrainStage

MOST_NAME = 80  # characters of a run's name before its id
STOP_SECONDS = 120.0  # for a trainer that is asked to stop to save what it has


@dataclass(frozen=True)
class Asked:
    """Who asks for a training: what it is called, why it is made, and the training that it changes."""

    title: str = "sweep"  # as "sweep/trial"
    why: str = ""
    base: TrainStage | None = None


def folder_name(title: str, identity: str) -> str:
    """Return a run's name: what it is called, as a folder can be, and what it is found by."""
    plain = re.sub(r"[^A-Za-z0-9.=]+", "-", title.replace("/", ".")).replace("=", "").strip("-.")[:MOST_NAME]
    return f"{plain or 'sweep'}_{identity}"


def trainer_command(
    recipe: Path, processes: int, name: str, root: Path, asked: Asked, base: str | None = None
) -> list[str]:
    """Return the command that trains a recipe under a name; `base` is the name of the run that it changes."""
    program = [sys.executable, "-m", "trainer"]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [*launcher, f"--nproc_per_node={processes}", "-m", "trainer"]
    told = {"name": name, "checkpoint_root": str(root), "why": asked.why, "base": base}
    sets = [word for key, value in told.items() if value for word in ("--set", f"run.{key}={json.dumps(value)}")]
    return [*program, str(recipe), "--json", "--no-ledger", *sets]


def run_trainer(
    command: list[str], seconds_left: Callable[[], float | None], environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a trainer to its end. Returns exit code and what it wrote to standard output and error.

    Raises BudgetSpentError when no seconds are left: it is asked to stop, and saves what it has.
    """
    # The claim goes along: should this process be killed, the next waits for its trainer instead of starting another.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=False, env=environment
    )
    started = time.perf_counter()
    try:
        out, err = process.communicate(timeout=seconds_left())
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        spent = time.perf_counter() - started
        raise BudgetSpentError(
            f"training was stopped after {spent:.0f} s; the next run goes on with it", spent
        ) from None
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def as_toml(tree: Mapping[str, Any]) -> str:
    """Return a recipe's tables as TOML."""
    lines = []
    for table, values in tree.items():
        lines += [f"[{table}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    """Return a value, tables within it inline."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
