"""Threads on a busy machine: seconds and CPU seconds of a training step while other processes want the same CPUs.

Baseline: one thread. Compared: as many threads as there are CPUs, whose idle workers spin (OpenMP's default) or sleep
(OMP_WAIT_POLICY=PASSIVE, what commands set; see pgolf_post/base/threads.py). Each step runs in a process of its own, as
OpenMP reads its policy once; the busy processes are loops in Python, none or one a CPU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgolf_post.base.progress import print_table
from pgolf_post.base.threads import THREAD_VARIABLES, allowed_threads

STEPS, WARM_STEPS, ROUNDS = 12, 3, 3
SETTINGS = {  # name → threads and OpenMP's policy
    "1 thread": (1, "ACTIVE"),
    "all, spinning": (allowed_threads(), "ACTIVE"),
    "all, sleeping": (allowed_threads(), "PASSIVE"),
}


def step_times(data: str) -> None:
    """Print the median seconds and CPU seconds of a step of the recipe tiny_cpu in this process."""
    from benchmarks.bench_train import trainer_for

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for("tiny_cpu.toml", Path(data), Path(folder), 0.0)
        seconds, cpu_seconds = [], []
        for _ in range(WARM_STEPS + STEPS):
            started, started_cpu = time.perf_counter(), time.process_time()
            trainer.timed_step(0.0)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - started_cpu)
    print(statistics.median(seconds[WARM_STEPS:]), statistics.median(cpu_seconds[WARM_STEPS:]))


def measure(data: Path, threads: int, policy: str) -> tuple[float, float]:
    """Return seconds and CPU seconds of a step with so many threads under this policy."""
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "OMP_WAIT_POLICY": policy}
    words = [sys.executable, "-m", "benchmarks.bench_threads", "--step", str(data)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, cpu_seconds = map(float, done.stdout.split()[-2:])
    return seconds, cpu_seconds


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy inside the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Print one table: medians over rounds in which the settings take turns."""
    from benchmarks.bench_train import build_data

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = build_data(Path(folder)).path
        for busy in (0, allowed_threads()):
            with busy_processes(busy):
                rounds = [{name: measure(data, *setting) for name, setting in SETTINGS.items()} for _ in range(ROUNDS)]
            for name in SETTINGS:
                wall, cpu = (statistics.median(times[name][i] for times in rounds) for i in (0, 1))
                ratio = statistics.median(times["1 thread"][0] / times[name][0] for times in rounds)
                rows.append((name, str(busy), f"{wall * 1e3:.0f}", f"{cpu * 1e3:.0f}", f"{ratio:.2f}"))
    header = ("threads", "busy processes beside it", "ms a step", "CPU ms a step", "speed, ratio to 1 thread")
    print_table("a step of tiny_cpu (0.85M parameters)", header, rows)


if __name__ == "__main__":
    step_times(sys.argv[2]) if sys.argv[1:2] == ["--step"] else main()
