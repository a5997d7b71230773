"""Smoke ladders asked for before trials train: a fault that shows after training costs a training run on every GPU.

Asked is the recipe as its file has it (`python -m trainer RECIPE --smoke`). What a trial changes of it is the sweep's
question, and a ladder for each trial would cost more than it saves.
"""

from __future__ import annotations

import math
import subprocess
import sys

import torch

from pgolf_post.base.progress import say
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.sweep.run import Options, Sweep
from pgolf_post.sweep.training import find_stopped, find_trained


def num_gpus(processes: int, ray_gpus_per_trial: float | None = None) -> int:
    """Return how many GPUs so many processes of a sweep use at once; with Ray, each as many as a trial asks for."""
    if ray_gpus_per_trial is not None:
        return math.ceil(processes * ray_gpus_per_trial)
    return processes if torch.cuda.is_available() else 0


def require_smoke(options: Options) -> None:
    """Raise VerificationError for the first recipe still to be trained that has not passed its smoke ladder."""
    for recipe in recipes_to_train(options):
        command = [sys.executable, "-m", "trainer", recipe, "--smoke-passed"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == VerificationError.exit_code:
            raise VerificationError(
                f"{recipe} has not passed its smoke ladder here, and training on several GPUs is dear (or --no-smoke)",
                hint=f"python -m trainer {recipe} --smoke",
            )
        if done.returncode:
            raise PgolfError(
                f"{recipe}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no answer'}"
            )
        say(f"{recipe}: its smoke ladder has passed")


def recipes_to_train(options: Options) -> list[str]:
    """Return the recipe files of trials that have no row and whose training has no end yet."""
    sweep = Sweep(options, torch.device("cpu"))
    try:
        stages = [one.trial.settings.train for one in sweep.state().open]
    finally:
        sweep.close()
    root = options.places.root
    wanted = [s for s in stages if s and find_trained(s, root) is None and find_stopped(s, root) is None]
    return list(dict.fromkeys(stage.recipe for stage in wanted))
