"""A script run as a stranger would run it: an empty folder, a fresh interpreter, none of our modules, no network.

The interpreter starts isolated and without its `site` (`python -I -S`), so that neither the environment nor a path file
can put this package within reach; the folders of the public packages that a script may import are then named to it, and
imports of our own names are refused even there. The network is off: the process has a network namespace of its own
where the system allows one (`unshare -rn`), else its sockets refuse to connect.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.base.threads import num_threads
from pgolf_post.errors import PgolfError, VerificationError

PUBLIC = ("torch", "numpy", "brotli", "sentencepiece", "scipy", "numba", "triton")  # that a script of ours may import
OPTIONAL = ("scipy", "numba", "triton")  # by some scripts only
REFUSED = ("pgolf_post", "trainer", "benchmarks", "tests")
KERNELS = (  # variables by which libraries choose how they multiply, and so the last bits of products
    *("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"),
    "ONEDNN_MAX_CPU_ISA",
)
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT", *KERNELS)
RUN_SECONDS = 3600
TAIL = 1500  # characters of stderr that an error shows

BOOTSTRAP = """
import sys, runpy
paths, refused, no_sockets, arguments = {settings!r}
sys.path[:0] = paths
class Refused:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{{name}} is not there where this script is run", name=name)
sys.meta_path.insert(0, Refused)
if no_sockets:
    import socket
    def refuse(*_):
        raise OSError("the network is off")
    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.create_connection = socket.getaddrinfo = refuse
sys.argv = arguments
runpy.run_path(arguments[0], run_name="__main__")
"""


@dataclass(frozen=True)
class IsolatedRun:
    """Output of a script, and how it was kept apart."""

    stdout: str
    network: str  # "namespace" or "refusing sockets"
    threads: int

    @property
    def answer(self) -> dict[str, Any]:
        """The last line of stdout, a JSON object. Raises VerificationError if it is none."""
        last = self.stdout.strip().rpartition("\n")[2]
        try:
            value = json.loads(last)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise VerificationError(f"the script's last line is no JSON object: {last[:200]!r}")
        return value


def run_isolated(
    files: Mapping[str, Path | bytes], arguments: Sequence[str], seconds: float = RUN_SECONDS
) -> IsolatedRun:
    """Run the first of `files` (name → content or where it lies) in an empty folder that holds them.

    Raises VerificationError if it fails or runs for longer than `seconds`.
    """
    script, threads = next(iter(files)), num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for own, content in files.items():
            if isinstance(content, bytes):
                (folder / own).write_bytes(content)
            else:
                shutil.copyfile(content, folder / own)
        prefix = ["unshare", "-rn"] if has_namespaces() else []
        settings = (package_folders(), REFUSED, not prefix, [script, *arguments])
        command = [*prefix, sys.executable, "-I", "-S", "-c", BOOTSTRAP.format(settings=settings)]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=_environment(folder, threads),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise VerificationError(f"{script} ran for more than {seconds:.0f} s and was stopped") from None
    if done.returncode != 0:
        raise VerificationError(f"{script} fails in an empty folder: {done.stderr.strip()[-TAIL:]}")
    return IsolatedRun(done.stdout, "namespace" if prefix else "refusing sockets", threads)


@functools.cache
def has_namespaces() -> bool:
    """Return whether this user may start a process in a network namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


def package_folders() -> list[str]:
    """Return the folders that hold the public packages. Raises PgolfError if one that every script needs is missing."""
    folders: dict[str, None] = {}
    for package in PUBLIC:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            where = Path(spec.origin).parent
            folders[str(where.parent if spec.submodule_search_locations else where)] = None
        elif package not in OPTIONAL:
            raise PgolfError(f"{package} is not installed, which the script imports", hint=f"pip install {package}")
    return list(folders)


def _environment(folder: Path, threads: int) -> dict[str, str]:
    """Return the variables of the run: threads and kernels as here, since sums depend on them."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**kept, **counts, "OMP_WAIT_POLICY": "PASSIVE", "HOME": str(folder), "TMPDIR": str(folder)}
