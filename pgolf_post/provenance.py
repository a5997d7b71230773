"""Provenance: code, machine and versions, as facts for meta.json, sweeps and the ledger.

This is the one place that asks git and the device. `git` counts only inside a checkout of this code.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch


def git_state() -> dict[str, Any]:
    """Return the commit of the code that runs and whether files differ from it; None outside a git checkout."""
    try:
        commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status)}


@functools.cache  # an answer is kept; a failure, which may be of the moment, is raised and asked again
def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the accelerator's or processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a reader of a checkpoint may ask about this process: git, versions, device, arguments."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    if importlib.util.find_spec("triton"):
        versions["triton"] = triton_version()
    return {"git": git_state(), "versions": versions, "device": device_name(device), "argv": sys.argv[1:]}


def command_line() -> str:
    """Return this process's command as a person types it, to copy into a shell."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    shown = f"python {program}" if path.suffix == ".py" else path.name
    if path.name == "__main__.py":  # run as a module: python -m PACKAGE
        shown = "pgolf-post" if path.parent.name == "pgolf_post" else f"python -m {path.parent.name}"
    return f"{shown} {shlex.join(arguments)}".strip()


def triton_version() -> str:
    """Return the version of the distribution that holds the package triton, whatever that is called."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # torch's own builds have had it under names of their own
        names = importlib.metadata.packages_distributions().get("triton", [])
    return importlib.metadata.version(names[0]) if names else "unknown"


def code_commit() -> str | None:
    """Return the commit of the code that runs, or None outside a git checkout."""
    commit = git_state()["commit"]
    return None if commit is None else str(commit)


def accelerator_name() -> str:
    """Return the accelerator's own name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
