"""Whoever runs the trials, the rows are the same: one process, two workers, torchrun's ranks, a local Ray."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgolf_post import families
from pgolf_post.errors import SettingsError
from pgolf_post.ledger import LEDGER_FILE, Ledger
from pgolf_post.sweep.engines import ray as ray_engine
from pgolf_post.sweep.engines.local import require_devices, run_local
from pgolf_post.sweep.engines.ray import RayOptions
from pgolf_post.sweep.run import Sweep
from tests import processes
from tests.sweep.conftest import LAMBDAS, Lab, lasting, spec_text

REPOSITORY = Path(__file__).parents[2]
TRIALS = LAMBDAS.replace("0.6]", "0.4]") + '[[trials]]\nname = "bad"\ncheckpoint = "nowhere"\n'


def command(lab: Lab, *more: str, root: Path | None = None) -> list[str]:
    """`sweep run` of the lab's spec as a process."""
    root = root or lab.root
    where = ["--checkpoint", str(root / "latest"), "--root", str(root), "--results", str(root.parent / "results")]
    return ["-m", "pgolf_post", "sweep", "run", str(lab.folder / "lab.toml"), *where, *more]


def run_process(arguments: list[str], folder: Path) -> None:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def rows_of(root: Path) -> dict[str, dict[str, object]]:
    with Ledger.open(root) as ledger:
        rows = ledger.rows("trial")
    return {row.name: lasting(row) for row in rows}


def copied(lab: Lab, name: str) -> Path:
    """Another checkpoint root of the same run, without what was derived."""
    root = lab.folder / name / "checkpoints"
    ignore = shutil.ignore_patterns("derived", f"{LEDGER_FILE}*")
    shutil.copytree(lab.root, root, symlinks=True, ignore=ignore)
    (root / "latest").unlink()
    final = sorted((lab.root / "pico").glob("*-final"))[0]
    (root / "latest").symlink_to(Path("pico") / final.name)
    return root


def test_workers_have_the_families_of_their_command(lab: Lab) -> None:
    """A family from a file is known to one process alone; what a worker is given lets it load the same."""
    families.load_family(f"{REPOSITORY / 'examples' / 'my_family.py'}:TinyGPTFamily")
    try:
        options = lab.options(spec_text())
        families.forget_families()
        with pytest.raises(SettingsError, match="unknown model family"):
            families.get_family("tiny_gpt")
        Sweep(options).close()
        assert families.get_family("tiny_gpt").name == "tiny_gpt"
    finally:
        families.forget_families()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class StandInRay:
    """Ray's calls in this process: an actor is an object, answers are there at once; the first given a trial dies."""

    class exceptions:
        RayActorError = ConnectionError
        RayTaskError = ChildProcessError

    def __init__(self) -> None:
        self.deaths, self.workers = 1, 0

    def init(self, **settings: object) -> None:
        assert settings["num_cpus"] == 2

    def shutdown(self) -> None:
        assert not self.deaths
        assert self.workers == 3  # two, and one in the place of the dead

    def remote(self, **_: object) -> Any:
        """What makes an actor class's workers."""

        def made(kind: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: worker(kind(*pickle.loads(pickle.dumps(arguments)))))

        def worker(actor: Any) -> Any:
            self.workers += 1
            names = ("started", "run")
            return SimpleNamespace(**{name: SimpleNamespace(remote=partial(Answer, actor, name)) for name in names})

        return made

    def wait(self, answers: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return answers[:num_returns], answers[num_returns:]

    def get(self, answer: Answer) -> Any:
        if self.deaths and answer.name == "run":
            self.deaths -= 1
            raise self.exceptions.RayActorError("the worker died")
        return pickle.loads(pickle.dumps(getattr(answer.actor, answer.name)(*answer.arguments)))


class Answer:
    """What a stand-in's worker was asked."""

    def __init__(self, actor: Any, name: str, *arguments: object) -> None:
        self.actor, self.name, self.arguments = actor, name, arguments


def test_the_same_rows_by_two_ranks_and_by_rays_workers(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one of Ray's workers dies: its trial goes to another."""
    lab.run(spec_text(TRIALS))
    expected = rows_of(lab.root)
    assert len(expected) == 6
    assert "error" in expected["bad"]["result"]  # type: ignore[operator]
    root = copied(lab, "ranks")
    done = processes.run_ranks(2, *command(lab, root=root), cwd=lab.folder)
    assert done.returncode == 0, done.stderr
    assert rows_of(root) == expected
    root = copied(lab, "ray")
    monkeypatch.setitem(sys.modules, "ray", StandInRay())  # type: ignore[arg-type]
    monkeypatch.setattr(ray_engine, "silence", lambda: None)
    options = lab.options(spec_text(TRIALS))
    places = replace(options.places, checkpoint=root / "latest", root=root, results=root.parent / "results")
    ray_engine.run_ray(replace(options, places=places), RayOptions(workers=2))
    assert rows_of(root) == expected
    assert "its worker died; given to another" in capsys.readouterr().err


@pytest.mark.long
def test_the_same_rows_by_two_workers_and_by_two_ranks(lab: Lab) -> None:
    lab.run(spec_text(TRIALS))
    expected = rows_of(lab.root)
    assert len(expected) == 6
    assert "error" in expected["bad"]["result"]  # type: ignore[operator]
    roots = {name: copied(lab, name) for name in ("workers", "torchrun")}
    run_process([sys.executable, *command(lab, "--workers", "2", root=roots["workers"])], lab.folder)
    assert rows_of(roots["workers"]) == expected
    rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--nproc_per_node", "2"]
    ranks = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *command(lab, root=roots["torchrun"])]
    run_process(ranks, lab.folder)
    assert rows_of(roots["torchrun"]) == expected


@pytest.mark.long  # Ray takes ten seconds to start; the short run has a stand-in
def test_the_same_rows_on_a_local_ray(lab: Lab) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    lab.run(spec_text(TRIALS))
    root = copied(lab, "ray")
    run_process([sys.executable, *command(lab, "--engine", "ray", "--workers", "2", root=root)], lab.folder)
    assert rows_of(root) == rows_of(lab.root)


def test_two_workers_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_devices(2)
    with pytest.raises(SettingsError, match="two workers never share one"):
        require_devices(3)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def created(root: Path) -> dict[str, str]:
    """When each trial's row was written."""
    if not (root / LEDGER_FILE).is_file():
        return {}
    with Ledger.open(root) as ledger:
        return {row.id: row.created for row in ledger.rows("trial")}


def kill_and_compare(lab: Lab, kills: int) -> None:
    lambdas = ", ".join(f"{0.02 * n:.2f}" for n in range(2 + kills))
    text = spec_text(LAMBDAS.replace("0, 0.2, 0.6", lambdas))
    options = lab.options(text)
    undisturbed = copied(lab, "undisturbed")
    started = time.monotonic()
    done = processes.run(command(lab, root=undisturbed), cwd=lab.folder)
    assert done.returncode == 0, done.stderr
    kill_through(lab, kills, time.monotonic() - started)
    before = created(lab.root)
    run_local(options)
    after = created(lab.root)
    assert before.items() <= after.items()
    assert rows_of(lab.root) == rows_of(undisturbed)


def kill_through(lab: Lab, kills: int, undisturbed_seconds: float) -> None:
    """One row more, then a kill at a random moment of the next trial, so many times."""
    generator = random.Random(11)
    held: dict[str, str] = {}
    quiet = subprocess.DEVNULL
    latest = undisturbed_seconds  # of the first kill; a machine that was busy is quicker now, so it may come too late
    while kills:
        process = processes.Process(command(lab), cwd=lab.folder, stdout=quiet, stderr=quiet)
        while held and process.poll() is None and len(created(lab.root)) == len(held):
            time.sleep(0.005)
        if not held:  # amid starting, calibrating, or the control
            time.sleep(generator.uniform(0.2, 0.9) * latest)
        time.sleep(generator.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        now = created(lab.root)
        assert held.items() <= now.items(), "a row was lost, or written again"
        held = now
        if killed:
            kills -= 1
        else:  # it had ended: from the start again
            forget(lab)
            held, latest = {}, latest / 2


def forget(lab: Lab) -> None:
    """Take away what the sweep has made."""
    for folder in list(lab.root.rglob("derived")):
        shutil.rmtree(folder)
    for path in lab.root.glob(f"{LEDGER_FILE}*"):
        path.unlink()


def test_kill_9_at_any_moment_loses_and_repeats_nothing(lab: Lab) -> None:
    kill_and_compare(lab, 1)


@pytest.mark.long
def test_thirty_kills(lab: Lab) -> None:
    kill_and_compare(lab, 30)
