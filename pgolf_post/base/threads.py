"""Number of threads: what this process may use, not what the machine has.

A rented container with a quota of 8 CPUs often stands on a host of 128. Libraries count the host's CPUs, and 128
threads that share 8 CPUs wait for each other. So commands ask the scheduler (affinity) and the kernel's quota (cgroup,
version 1 or 2).

OpenMP workers that have nothing to do spin by default. Where other work needs the CPUs, spinning takes them from the
one thread that all the others wait for: on two busy cores, a training step with two threads took more than twice the
CPU time of one with one thread. With OMP_WAIT_POLICY=PASSIVE they sleep instead (docs/results/train.md has the
figures). OpenMP and BLAS read their settings once, when they are loaded, so `settle_threads` comes before torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP_MOUNT = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
QUOTA_MOUNTS = ("", "unified", "cpu", "cpu,cpuacct")  # below CGROUP_MOUNT, of version 2 (first two) and 1
MOST_THREADS = 1024  # OpenMP ends the process, without a word to Python, when it cannot make as many as it is told
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def allowed_threads(mount: Path = CGROUP_MOUNT, membership: Path = CGROUP_MEMBERSHIP) -> int:
    """Return how many threads can run at once: the CPUs of the affinity mask, or fewer if a cgroup's quota is less.

    A quota of 2.5 CPUs gives 2. `mount` and `membership` are where the kernel tells of cgroups.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _own_cgroups(mount, membership) if (quota := _quota_cpus(folder)) is not None]
    return max(1, min([affinity, *map(int, quotas)]))


def _own_cgroups(mount: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in, and of those around them: a quota of any of them holds.

    A container sees its own cgroup as the mount itself, whatever path the membership names.
    """
    try:
        paths = {line.split(":", 2)[2] for line in membership.read_text().splitlines()}
    except (OSError, IndexError):
        paths = {"/"}
    for base in (mount / name for name in QUOTA_MOUNTS):
        for path in sorted(paths | {"/"}):
            own = base / path.lstrip("/")
            yield own
            yield from (folder for folder in own.parents if folder.is_relative_to(base))


def _quota_cpus(folder: Path) -> float | None:
    """Return a cgroup's CPU quota in CPUs, from the files of version 2 or else 1; None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def settle_threads() -> None:
    """Make the math libraries, not yet loaded, use the allowed threads and let those that wait sleep.

    Variables that the user or torchrun has set stay; OMP_NUM_THREADS holds for the others too.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    count = os.environ.get("OMP_NUM_THREADS") or str(allowed_threads())
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, count)


def num_threads() -> int:
    """Return how many threads this process computes with: torch's setting if torch is loaded, else what is allowed."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else allowed_threads()


def use_threads(count: int) -> None:
    """Make the math libraries of this process and its children use `count` threads."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(count)
    if "torch" in sys.modules:  # already loaded: it no longer reads the variables
        sys.modules["torch"].set_num_threads(count)
