"""Questions to nvidia-smi, which knows of clocks and of other processes what torch does not."""

from __future__ import annotations

import shutil
import subprocess

SECONDS = 20


def query(*columns: str, what: str = "gpu") -> list[list[str]]:
    """Return rows of `nvidia-smi --query-WHAT`, one a GPU or process; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-{what}={','.join(columns)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
