"""Trials in this process, or in one worker process per device that all take from the same list."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable

import torch

from pgolf_post.base.progress import silence
from pgolf_post.base.ranks import ALONE, use_gpu
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.ledger import Row
from pgolf_post.sweep.run import Options, Sweep, check_control, work
from pgolf_post.sweep.state import State


def run_local(options: Options, workers: int = 1, on_row: Callable[[State, Row], None] | None = None) -> State:
    """Run a sweep to its end. Raises SettingsError for more workers than GPUs, PgolfError if all workers died."""
    if workers == 1:
        sweep = Sweep(options)
        try:
            return work(sweep, on_row)
        finally:
            sweep.close()
    require_devices(workers)
    watching = Sweep(options, torch.device("cpu"))  # before any worker starts: a spec that cannot be used is one error
    try:
        watching.state()
        return _supervise(watching, options, workers, on_row)
    finally:
        watching.close()


def require_devices(workers: int) -> None:
    """Raise SettingsError if two workers would share a GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and workers > gpus:
        raise SettingsError(f"--workers {workers}: there are {gpus} GPUs, and two workers never share one")


def _supervise(watching: Sweep, options: Options, workers: int, on_row: Callable[[State, Row], None] | None) -> State:
    """Watch the rows arrive. A worker that dies leaves its trial to the others."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(options, index, workers), daemon=True) for index in range(workers)
    ]
    for process in processes:
        process.start()
    seen = set(watching.state().rows)
    try:
        while True:
            state = watching.state()
            for listed in state.listed:
                if listed.id in state.rows and listed.id not in seen:
                    seen.add(listed.id)
                    if on_row:
                        on_row(state, state.rows[listed.id])
            if not state.open:
                check_control(state)
                return state
            if not any(process.is_alive() for process in processes):
                check_control(watching.state())
                if options.max_seconds is not None and all(process.exitcode == 0 for process in processes):
                    return state  # each has said that nothing fits in what is left
                codes = ", ".join(str(process.exitcode) for process in processes)
                raise PgolfError(
                    f"all {workers} workers ended (exit codes {codes}) with {len(state.open)} trials to go",
                    hint="run the same command again to go on",
                )
            time.sleep(0.2)
    finally:
        for process in processes:
            process.join(timeout=30 if sys.exc_info()[0] is None else 0.1)
            if process.is_alive():
                process.terminate()


def _worker(options: Options, index: int, workers: int) -> None:
    """Work in a process with its own GPU, or its share of the processor's threads."""
    silence()
    if torch.cuda.is_available():
        use_gpu(index)
        device = ALONE.device
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    sweep = Sweep(options, device)
    try:
        work(sweep)
    except PgolfError as error:  # the supervisor says what it finds in the rows
        raise SystemExit(error.exit_code) from None
    finally:
        sweep.close()
