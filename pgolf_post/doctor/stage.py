"""The looks in their order, cheap ones first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pgolf_post.base.progress import progress_bar
from pgolf_post.checkpoint import CHECKPOINT_ROOT
from pgolf_post.doctor import devices, machine, recipe, software, work
from pgolf_post.doctor.findings import Finding, Look, look


def looks(recipe_path: Path | None, gpus: int | None, fast: bool) -> dict[str, Look]:
    """Return what will be looked at, by name; `fast` leaves out what takes seconds. Raises as `read_recipe`."""
    tables = recipe.read_recipe(recipe_path) if recipe_path else {}
    root = recipe.checkpoint_root(tables) if recipe_path else CHECKPOINT_ROOT
    chosen: dict[str, Look] = {
        "versions": software.versions,
        "extras": software.extras,
        "GPUs": partial(devices.gpus, gpus),
        "CPUs": partial(machine.cpus, gpus or 1),
        "memory": machine.memory,
        "disk": partial(machine.disk, root),
        "clock": machine.clock,
    }
    if recipe_path is not None:
        chosen |= {"data": partial(recipe.data, tables), "recipe": partial(recipe.dry_run, recipe_path)}
    slow: dict[str, Look] = {
        "matrix product": devices.matmul,
        "attention": work.attention,
        "torch.compile": work.compiling,
        "two processes": partial(work.all_reduce, gpus or 1),
    }
    return chosen if fast else {**chosen, **slow}


def examine(
    recipe_path: Path | None = None,
    gpus: int | None = None,
    fast: bool = False,
    said: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Look at everything and return the findings, in order. Raises as `read_recipe` for a recipe that is no TOML."""
    chosen = looks(recipe_path, gpus, fast)
    findings: list[Finding] = []
    with progress_bar("doctor", len(chosen), "looks") as advance:
        for name, what in chosen.items():
            if said is not None:
                said(name)
            findings += look(name, what)
            advance(1, name)
    return findings
