"""Threads follow what a process may use: its affinity, its cgroup's quota, `--threads`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_post.base.threads import THREAD_VARIABLES, allowed_threads

AFFINITY = len(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(AFFINITY < 2, reason="one CPU cannot be divided")


def cgroup(folder: Path, quota_us: int | str, version: int) -> None:
    """Write a cgroup's quota as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota_us} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{'-1' if quota_us == 'max' else quota_us}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


def allowed(mount: Path, membership: str) -> int:
    """Return the threads allowed to a member of these cgroups."""
    (mount / "membership").write_text(membership)
    return allowed_threads(mount, mount / "membership")


@pytest.mark.parametrize(
    ("version", "base", "membership"),
    [
        (2, "", "0::/jobs/mine\n"),
        (2, "unified", "0::/jobs/mine\n"),
        (1, "cpu", "1:cpu:/jobs/mine\n2:memory:/other\n"),
        (1, "cpu,cpuacct", "4:cpu,cpuacct:/jobs/mine\n"),
    ],
)
def test_a_quota_limits_the_threads_wherever_it_stands_above_the_process(
    tmp_path: Path, version: int, base: str, membership: str
) -> None:
    mount = tmp_path / base
    cgroup(mount / "jobs" / "mine", "max", version)
    assert allowed(tmp_path, membership) == AFFINITY
    cgroup(mount / "jobs", 100_000, version)
    assert allowed(tmp_path, membership) == 1
    cgroup(mount / "jobs", 199_999, version)  # 1.99 CPUs run one thread without waiting
    assert allowed(tmp_path, membership) == 1
    cgroup(mount / "jobs", 10_000, version)
    assert allowed(tmp_path, membership) == 1
    cgroup(mount / "jobs", 100_000 * 64, version)
    assert allowed(tmp_path, membership) == AFFINITY


def test_a_container_sees_its_own_cgroup_as_the_mount_whatever_path_it_is_told(tmp_path: Path) -> None:
    cgroup(tmp_path / "cpu", 100_000, 1)
    assert allowed(tmp_path, "3:cpu:/docker/0123abcd\n") == 1
    assert allowed_threads(tmp_path, tmp_path / "absent") == 1


@pytest.mark.parametrize("content", ["", "x y\n", "100000\n", "-5 0\n"])
def test_a_quota_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert allowed(tmp_path, "0::/\n") == AFFINITY


SHOW_THREADS = """
import sys, click
from pgolf_post.base.command_line import run_command
from pgolf_post.cli.common import threads_option

@click.command()
@threads_option
def command():
    import torch
    print(torch.get_num_threads())

run_command(command)
"""


def threads_of_a_command(*arguments: str, **variables: str) -> str:
    """Return the threads that torch uses in a process, of which `arguments` are a prefix or options."""
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES} | variables
    prefix = [] if not arguments or arguments[0].startswith("--") else list(arguments)
    options = [] if prefix else list(arguments)
    command = [*prefix, sys.executable, "-c", SHOW_THREADS, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_a_command_uses_what_it_may_what_it_is_told_and_what_torchrun_sets() -> None:
    assert threads_of_a_command() == str(allowed_threads())
    assert threads_of_a_command("taskset", "-c", str(min(os.sched_getaffinity(0)))) == "1"
    assert threads_of_a_command("--threads", "1") == "1"
    assert threads_of_a_command(OMP_NUM_THREADS="1") == "1"  # as torchrun does
