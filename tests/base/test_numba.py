"""Compiled loops: cached on disk where that can be, compiled again where it cannot, plain where numba fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pgolf_post.base import numba as compiled
from pgolf_post.errors import NotFoundError
from tests import processes

LOOP = """
from pgolf_post.base.numba import jit

@jit
def total(count):
    result = 0
    for i in range(count):
        result += i
    return result
"""
CALL = """
import resource, sys
if sys.argv[1] != "unlimited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.dont_write_bytecode = True
import loop
assert loop.total(10) == 45
print(sum(loop.total.stats.cache_hits.values()), sum(loop.total.stats.cache_misses.values()))
"""


def call(folder: Path, file_bytes: str = "unlimited", **variables: str) -> str:
    """Return "hits misses" of the cache in a fresh process that calls the loop in `folder`."""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    done = processes.run(["-c", CALL, file_bytes], environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_second_process_loads_what_the_first_compiled_unless_the_file_is_torn_or_could_not_be_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    assert call(tmp_path, "300") == "0 1"  # no file larger than 300 bytes can be written
    assert call(tmp_path) == "0 1"
    assert call(tmp_path) == "1 0"
    cached = [path for path in (tmp_path / "__pycache__").iterdir() if path.suffix in (".nbi", ".nbc")]
    assert len(cached) == 2
    for path, share in zip(cached, (0, 0.5), strict=True):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        call(tmp_path)  # asserts the result


def test_where_no_folder_can_be_written_each_process_compiles(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    (tmp_path / "home").write_text("a file where the user's cache folder would be")
    home = str(tmp_path / "home")
    assert call(tmp_path, HOME=home, XDG_CACHE_HOME=home) in ("0 0", "0 1")
    assert call(tmp_path, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "user")) == "0 1"
    assert call(tmp_path, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "user")) == "1 0"


def test_a_numba_that_cannot_be_loaded_is_said_once_with_its_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.has_numba.cache_clear()
    try:
        assert not compiled.use_compiled(None)
        assert not compiled.use_compiled(None)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert "numba cannot be loaded" in said[0]
        assert "up to a thousand times slower" in said[0]
        with pytest.raises(NotFoundError, match="numba cannot be loaded"):
            compiled.use_compiled(True)
    finally:
        compiled.has_numba.cache_clear()
