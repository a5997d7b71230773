"""CPUs, memory, disk and clock: what this process may use, not what the machine has."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from pgolf_post.base.threads import allowed_threads
from pgolf_post.doctor.findings import Finding, failed, ok, warning

LEAST_MEMORY = 8e9  # bytes, of a run on a GPU: two checkpoints in flight and the data's pages
LEAST_DISK = 5e9
PROBE_BYTES = 32 << 20
SLOW_DISK = 50e6  # bytes per second
MOST_SKEW = 5.0  # seconds between the clock here and the file system's
EARLIEST = 1_767_225_600  # 2026-01-01: a clock before that is wrong


def cpus(gpus: int) -> list[Finding]:
    """Return how many threads this process may run; a rank wants some of its own."""
    threads, machine = allowed_threads(), os.cpu_count() or 1
    value = f"{threads} threads allowed of {machine}"
    if gpus > 1 and threads < 2 * gpus:
        return [warning("CPUs", value, f"{gpus} ranks want two threads each: rent a pod with more CPUs")]
    return [ok("CPUs", value)]


def memory(available: int | None = None) -> list[Finding]:
    """Return how much memory can be had; `available` in bytes replaces the machine's own answer."""
    free = available_memory() if available is None else available
    if free is None:
        return [warning("memory", "not known", "look at free -g")]
    value = f"{free / 1e9:.1f} GB available"
    if free < LEAST_MEMORY:
        return [warning("memory", value, f"a run may need {LEAST_MEMORY / 1e9:.0f} GB: stop what else runs here")]
    return [ok("memory", value)]


def available_memory() -> int | None:
    """Return bytes of memory that can be had: the machine's, or less where a cgroup says so."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def disk(root: Path, need: float = LEAST_DISK) -> list[Finding]:
    """Return how much can be written where checkpoints go, and whether a rename there is one step."""
    place = root.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    value = f"{free / 1e9:.1f} GB free at {place}"
    found = [ok("disk", value)]
    if free < need:
        found = [failed("disk", value, f"a run may write {need / 1e9:.1f} GB: free space, or another checkpoint_root")]
    return [*found, *write_and_rename(place)]


def write_and_rename(place: Path) -> list[Finding]:
    """Write a file, flush it, rename it over another and read it back, as a checkpoint is written."""
    token = secrets.token_hex(4)
    building, final = place / f".doctor-{token}.tmp", place / f".doctor-{token}"
    content = os.urandom(1 << 20) * (PROBE_BYTES >> 20)
    try:
        started = time.perf_counter()
        final.write_bytes(b"old")
        with building.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        building.replace(final)
        seconds = time.perf_counter() - started
        skew = abs(final.stat().st_mtime - time.time())
        intact = final.read_bytes() == content
    except OSError as error:
        return [failed("write and rename", str(error), f"make {place} writable, or choose another checkpoint_root")]
    finally:
        building.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    rate = PROBE_BYTES / seconds
    value = f"{rate / 1e6:,.0f} MB/s at {place}"
    if not intact:
        return [failed("write and rename", f"{value}, but other bytes came back", "do not train onto this disk")]
    if skew > MOST_SKEW:
        mend = "set the clock (a network file system has its own): caches go by it"
        return [warning("write and rename", f"{value}; its clock is {skew:.0f} s off", mend)]
    if rate < SLOW_DISK:
        return [warning("write and rename", value, "checkpoints will hold training up: use a local disk")]
    return [ok("write and rename", value)]


def clock() -> list[Finding]:
    """Return whether the clock is plausible and goes forward evenly."""
    wall, monotonic = time.time(), time.perf_counter()
    time.sleep(0.05)
    wall, monotonic = time.time() - wall, time.perf_counter() - monotonic
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < EARLIEST:
        return [warning("clock", now, "set the date: logs and the ledger go by it")]
    if abs(wall - monotonic) > 0.02:
        return [
            warning("clock", f"{now}; wall and monotonic clock differ by {abs(wall - monotonic):.3f} s", "wait for it")
        ]
    return [ok("clock", now)]
