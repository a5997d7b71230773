"""The decoder that ships: one small file, alone in a fresh process, the same under older libraries and any threads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import brotli
import numpy as np
import pytest

from pgolf_post.pack import codecs, decode
from pgolf_post.pack.container import PackSettings, pack
from tests.pack.samples import sample_model

SOURCE = Path(decode.__file__)


def test_the_decoder_is_small_and_imports_only_what_ships() -> None:
    assert SOURCE.stat().st_size <= 8192
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert {name.split(".")[0] for name in imported} <= {"numpy", "brotli", *sys.stdlib_module_names}


def test_every_dtype_is_explicit_about_byte_order() -> None:
    literals = [node.value for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.Constant)]
    assert {"<i1", "<i2", "<f2", "<u2"} <= set(literals)
    assert not [
        text for text in literals if isinstance(text, str) and text in {"i2", "f2", "u2", "u4", "i4", "f4", "i8"}
    ]
    assert decode.FRAME.format.startswith("<")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with a copy of decode.py, an artifact, and a `site` that holds numpy and brotli and nothing else."""
    (tmp_path / "decode.py").write_bytes(SOURCE.read_bytes())
    (tmp_path / "a.pgolf").write_bytes(pack(sample_model()))
    site = tmp_path / "site"
    site.mkdir()
    for package in (Path(np.__file__).parent, Path(brotli.__file__)):
        for path in package.parent.iterdir():
            if path.name.lstrip("_").startswith(("numpy", "brotli")) and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return tmp_path


ALONE = """
import sys
sys.path[:0] = ["site", "."]
import decode
import numpy as np
with open("a.pgolf", "rb") as file:
    manifest, tensors, _ = decode.decode(file.read())
np.savez("tensors.npz", **tensors)
assert not {"pgolf_post", "torch", "pydantic"} & set(sys.modules)
try:
    import pgolf_post
except ImportError:
    print(manifest["symbols_sha256"])
"""


def test_a_fresh_process_without_this_package_decodes_the_same(alone: Path) -> None:
    done = run_python(alone, "-I", "-S", "-c", ALONE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sample_model().symbols_sha256()
    expected = sample_model().tensors()
    with np.load(alone / "tensors.npz") as found:
        assert set(found.files) == expected.keys()
        assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


OLDER = ("numpy==1.26.4", "brotli==1.1.0")


@pytest.mark.long
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheels for this Python")
def test_older_numpy_and_brotli_decode_the_same(alone: Path) -> None:
    """numpy 1 promotes types differently. Also on two threads instead of one: no answer may depend on either."""
    subprocess.run([sys.executable, "-m", "venv", "old"], cwd=alone, check=True)
    python = alone / "old" / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *OLDER], capture_output=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"cannot install {OLDER}: {installed.stderr.decode()[-200:]}")
    code = ALONE.replace('["site", "."]', '["."]')
    for codec in codecs.CHOICES:
        (alone / "a.pgolf").write_bytes(pack(sample_model(), PackSettings(codec=codec)))
        for threads in ("1", "2"):
            environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
            done = subprocess.run(
                [python, "-c", code], cwd=alone, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            with np.load(alone / "tensors.npz") as found:
                assert all(found[name].tobytes() == array.tobytes() for name, array in sample_model().tensors().items())


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
