"""The next command that an error prints, run as a shell runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest


def run_printed(hint: str | None, folder: Path) -> None:
    """Run a hint's command in a folder; text before a colon and behind three spaces is for people."""
    command = (hint or "").split("   (")[0].removeprefix("if it is raw 16-bit tokens (nanoGPT writes those): ")
    subprocess.run(["bash", "-ec", command], cwd=folder, check=True, timeout=60)


def run_python_here(hint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a hint `mv A B && PYTHON -c CODE A B`, its Python part in this process."""
    before, _, after = (hint or "").partition(" && ")
    subprocess.run(["bash", "-ec", before[before.index("mv ") :]], check=True, timeout=60)
    python, dash_c, code, *arguments = shlex.split(after)
    assert (python, dash_c) == (sys.executable, "-c")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *arguments])
        exec(compile(code, "<hint>", "exec"), {})
