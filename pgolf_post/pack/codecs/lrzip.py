"""zpaq through the lrzip program (`lrzip -z -L 9`), as the record submissions used it: measured, never shipped.

zpaq mixes context models bit by bit, which is the strongest general compressor at hand and takes as long to decode as
to encode. The program is a package of most Linux distributions.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from pgolf_post.errors import NotFoundError, PgolfError

PROGRAM = "lrzip"


def is_installed() -> bool:
    """Whether the program is on the path."""
    return shutil.which(PROGRAM) is not None


def compress(raw: bytes) -> bytes:
    """One .lrz file. Raises NotFoundError without the program, PgolfError if it fails."""
    return _run(raw, "-z", "-L", "9")


def decompress(stream: bytes) -> bytes:
    """The bytes of one .lrz file. Raises NotFoundError without the program, PgolfError if it fails."""
    return _run(stream, "-d")


def _run(content: bytes, *flags: str) -> bytes:
    if not is_installed():
        raise NotFoundError(f"the program {PROGRAM} is not installed", hint="apt-get install lrzip")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(content)
        command = [PROGRAM, "-q", "-f", *flags, "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.is_file():
            raise PgolfError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return out.read_bytes()
