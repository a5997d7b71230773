"""Versions that fit together: Python, torch, CUDA, driver, NCCL, and the packages that extras bring."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys

import torch

from pgolf_post.doctor.findings import Finding, failed, ok, warning
from pgolf_post.doctor.nvidia import query

LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 9)
# CUDA version → the oldest Linux driver that runs it (NVIDIA's release notes, minor-version compatibility)
LEAST_DRIVER = {12: 525, 13: 580}
EXTRAS = {  # module → (distribution, extra, what is lost without it)
    "python_minifier": ("python-minifier", "pack", "code is counted without minifying"),
    "huggingface_hub": ("huggingface_hub", "data", "published shards cannot be downloaded"),
    "matplotlib": ("matplotlib", "plots", "nothing is drawn"),
    "ray": ("ray", "cluster", "sweeps run on one machine"),
    "triton": ("triton", "", "kernels and torch.compile on a GPU"),
}


def versions() -> list[Finding]:
    """Return whether Python and torch are recent enough, and CUDA fits its driver."""
    found = [python_version(sys.version_info[:2]), torch_version(torch.__version__)]
    if torch.version.cuda:
        rows = query("driver_version")
        driver = rows[0][0] if rows else ""
        found.append(cuda_driver(torch.version.cuda, driver, torch.cuda.is_available()))
        if torch.cuda.is_available():
            found.append(ok("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    else:
        found.append(ok("CUDA", "torch is built without it: this machine computes on its CPUs"))
    return found


def python_version(version: tuple[int, ...]) -> Finding:
    """Return whether a version of Python will do."""
    text = ".".join(map(str, version))
    if version < LEAST_PYTHON:
        return failed("Python", text, f"install Python {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or later")
    return ok("Python", platform.python_version())


def torch_version(text: str) -> Finding:
    """Return whether a version of torch will do."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None or tuple(map(int, match.groups())) < LEAST_TORCH:
        return failed("torch", text, f"pip install 'torch>={LEAST_TORCH[0]}.{LEAST_TORCH[1]}'")
    return ok("torch", text)


def cuda_driver(cuda: str, driver: str, available: bool) -> Finding:
    """Return whether a driver runs a CUDA version, and torch agrees."""
    value = f"{cuda}, driver {driver or 'not found'}"
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]))
    if driver and least and int(driver.split(".")[0]) < least:
        return failed(
            "CUDA", value, f"CUDA {cuda} needs a driver of at least {least}: update it, or another torch build"
        )
    if not available:
        mend = "start the container with its GPUs (--gpus all)" if driver else "install the driver, or use a CPU build"
        return failed("CUDA", f"{value}; torch sees no GPU", mend)
    return ok("CUDA", value)


def extras() -> list[Finding]:
    """Return which optional packages are here."""
    missing = []
    present = []
    for module, (distribution, extra, lost) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            how = f"pip install 'pgolf-post[{extra}]'" if extra else f"pip install {distribution}"
            missing.append(warning(f"extra {distribution}", f"not installed: {lost}", how))
        else:
            [name, *_] = importlib.metadata.packages_distributions().get(module) or [distribution]  # nightly's differ
            present.append(f"{name} {importlib.metadata.version(name)}")
    return [ok("extras", ", ".join(present)), *missing] if present else missing
