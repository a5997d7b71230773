"""The driver of a Ray sweep, on a stand-in for Ray: workers and machines die, no row is lost or written twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.sweep.engines.ray import Crew, RayOptions, _drive, run_ray
from pgolf_post.sweep.run import Sweep
from tests.sweep.conftest import Lab, by_name, spec_text
from tests.sweep.test_engines import REPOSITORY, copied, rows_of

MANY = 'question = "?"\nnoise_repeats = 1\nbaselines = []\n[grid]\n"*.hessian_lambda" = [0, 0.1, 0.2, 0.3, 0.4, 0.5]\n'


class ActorError(Exception):
    """A worker that died."""


class TaskError(Exception):
    """A trial that raised."""

    cause = "because"


class StandIn:
    """Ray as far as the driver sees it; `die(n, name)` says whether the n-th call of a worker's method kills it."""

    class exceptions:
        RayActorError, RayTaskError = ActorError, TaskError

    def __init__(self, die: Callable[[int, str], bool], rows: Callable[[str], Row]) -> None:
        self.die, self.make_row, self.calls, self.given = die, rows, 0, list[str]()

    def remote(self, **_: float) -> Callable[[type], Any]:
        class Method:
            def __init__(self, method: str) -> None:
                self.method = method

            def remote(inner, *arguments: Any) -> tuple[int, str, tuple[Any, ...]]:
                self.calls += 1
                self.given += [arguments[0]] if inner.method == "run" else []
                return self.calls, inner.method, arguments[:1]

        class Worker:
            started, run = Method("started"), Method("run")

        class Maker:
            remote = staticmethod(lambda *_: Worker())

        return lambda _: Maker

    def wait(self, futures: Sequence[Any], **_: float) -> tuple[list[Any], list[Any]]:
        return list(futures)[:1], list(futures)[1:]

    def get(self, future: tuple[int, str, tuple[Any, ...]]) -> tuple[Row, tuple[Row, ...]] | None:
        number, method, arguments = future
        if self.die(number, method):
            raise ActorError
        return (self.make_row(arguments[0]), ()) if method == "run" else None


def drive(lab: Lab, die: Callable[[int, str], bool], retries: int = 2) -> tuple[StandIn, list[str], Sweep]:
    options = lab.options(spec_text(MANY))
    driver = Sweep(options, torch.device("cpu"))
    names = {one.id: one.trial for one in driver.state().listed}
    score = {"bpb": 1.0, "difference_bpb": 0.0}

    def row(trial_id: str) -> Row:
        trial = names[trial_id]
        return Row(
            "trial", trial_id, name=trial.name, run="lab", settings=trial.named(), result={"screen": score, "bpb": 1.0}
        )

    ray, written = StandIn(die, row), list[str]()
    _drive(Crew(ray, options, RayOptions(workers=3, retries=retries)), driver, lambda _, row: written.append(row.name))
    return ray, written, driver


def test_trials_are_written_once_in_an_order_that_refers_back(lab: Lab) -> None:
    ray, written, driver = drive(lab, lambda *_: False)
    assert len(written) == len(set(written)) == len(ray.given) == 7
    assert written[:2] == ["control (hessian_lambda = 0)", "noise 1"]
    assert {row.name for row in driver.ledger.rows("trial")} == set(written)
    driver.close()


def test_what_dead_workers_were_at_is_given_to_others(lab: Lab) -> None:
    """Every third call kills: workers that are starting, and workers amid a trial."""
    ray, written, driver = drive(lab, lambda number, _: number % 3 == 0, retries=4)
    assert len(written) == len(set(written)) == 7
    assert len(ray.given) > 7
    driver.close()


def test_a_trial_that_kills_its_workers_ends_the_sweep(lab: Lab) -> None:
    with pytest.raises(PgolfError, match="its worker died 3 times, --retries is 2"):
        drive(lab, lambda _, method: method == "run")


def test_a_worker_reads_and_writes_no_ledger(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from pgolf_post.sweep.engines.ray import TrialActor

    driver = Sweep(lab.options(spec_text(MANY)), torch.device("cpu"))
    control = driver.state().listed[0]
    (lab.root / "ledger.sqlite").unlink(missing_ok=True)
    driver.close()
    monkeypatch.setattr("pgolf_post.sweep.engines.ray.silence", lambda: None)  # of the worker's process, not of this
    actor = TrialActor(driver.options)
    row, _ = actor.run(control.id, {}, 1, None)
    assert "error" not in row.result
    assert "ledger" not in vars(actor.sweep)


# ---- a real cluster --------------------------------------------------------------------------------------------------

KILLING = """
import os, signal, sys, threading, time
from pathlib import Path
import ray
import psutil  # which ray brings
from ray.cluster_utils import Cluster

def is_worker(process):
    try:
        return process.cmdline()[0].startswith("ray::TrialActor")
    except (psutil.Error, IndexError):
        return False

kind, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
Path(out).write_text(cluster.address)
armed = Path(out + ".armed")
while not armed.exists():
    time.sleep(0.02)
if kind == "node":
    cluster.remove_node(second, allow_graceful=False)
else:
    workers = [child for child in psutil.Process().children(recursive=True) if is_worker(child)]
    workers[0].send_signal(signal.SIGKILL)  # of this cluster alone: the text of this program names workers too
Path(out + ".done").write_text("")
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["worker", "node"])
def test_a_worker_or_a_node_killed_amid_a_sweep_on_two_nodes_loses_nothing(lab: Lab, kind: str) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    options = lab.options(spec_text(MANY))
    undisturbed = copied(lab, "undisturbed")
    lab.root, first = undisturbed, lab.root
    lab.run(spec_text(MANY))
    expected = rows_of(undisturbed)
    lab.root = first
    out = lab.folder / "address"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLING, kind, str(out)], stdin=subprocess.PIPE, env=environment, cwd=lab.folder
    )
    try:
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.05)
        written: list[str] = []

        def on_row(_: object, row: Row) -> None:
            written.append(row.name)
            if len(written) == 2:
                Path(f"{out}.armed").write_text("")

        state = run_ray(options, RayOptions(address=out.read_text(), workers=2, retries=5), on_row)
    finally:
        process.communicate()
    assert Path(f"{out}.done").exists()
    assert len(written) == len(set(written)) == len(by_name(state)) == len(expected)
    with Ledger.open(first) as ledger:
        assert len(ledger.rows("trial")) == len(expected)
    assert rows_of(first) == expected
