"""Code bytes: payloads are followed without running them, and what cannot be followed is never counted as nothing."""

from __future__ import annotations

import base64
import bz2
import lzma
import zlib
from pathlib import Path

import brotli
import pytest

from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.pack import script
from pgolf_post.pack.report.size import count_code

pytestmark = pytest.mark.slow

NEIGHBOUR = "x = 1\n" * 1437
INNER = b"import neighbour\n"
RAW = [{"id": lzma.FILTER_LZMA2}]


def text(data: bytes, encode: str = "b85encode") -> str:
    return repr(getattr(base64, encode)(data).decode())


def nested(times: int) -> str:
    source = INNER.decode()
    for _ in range(times):
        payload = text(zlib.compress(source.encode()), "b64encode")
        source = f"import zlib,base64\nexec(zlib.decompress(base64.b64decode({payload})))"
    return source


ZLIB, ZLIB_64 = text(zlib.compress(INNER)), text(zlib.compress(INNER), "b64encode")
BROTLI, BZ2 = text(brotli.compress(INNER)), text(bz2.compress(INNER))
RAW_STREAM = lzma.compress(INNER, format=lzma.FORMAT_RAW, filters=RAW)
FOLLOWED = {
    "lzma": f"import lzma as c,base64\nexec(c.decompress(base64.b85decode({text(lzma.compress(INNER))})))",
    "raw lzma": f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({text(RAW_STREAM)}),"
    'format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))',
    "brotli": f"from brotli import decompress as d\nimport base64\nexec(d(base64.b85decode({BROTLI})))",
    "zlib": f"exec(__import__('zlib').decompress(__import__('base64').b64decode({ZLIB_64})))",
    "bz2 by names": f"import bz2,base64\ns={BZ2}\nt=bz2.decompress(base64.b85decode(s)).decode()\n"
    "exec(compile(t,'a','exec'),globals())",
    "nested": nested(3),
    "written": f"import zlib,base64\nopen('t.txt','wb').write(zlib.decompress(base64.b85decode({ZLIB})))",
    "import_module": "from importlib import import_module\nimport_module('neighbour')",
    "run_path": "import runpy\nrunpy.run_path('neighbour.py')",
    "byte order mark": "\ufeffimport neighbour",
    "latin-1": "# -*- coding: latin-1 -*-\nname = 'caf\xe9'\nimport neighbour",
}


def folder_of(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "train_gpt.py"
    path.write_bytes(source.encode("latin-1" if "latin-1" in source else "utf-8"))
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    return path


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_a_payload_imports_is_counted(tmp_path: Path, kind: str) -> None:
    path = folder_of(tmp_path, FOLLOWED[kind])
    assert count_code([path]) == path.stat().st_size + len(NEIGHBOUR)


@pytest.mark.parametrize(
    "source",
    ["import neighbour\ndef :", "import sys\nexec(open(sys.argv[1]).read())", "s = 'x'\ns = 'y'\nexec(s)", "\0"],
)
def test_what_cannot_be_followed_is_an_error_or_counted_whole(tmp_path: Path, source: str) -> None:
    path = folder_of(tmp_path, source)
    with pytest.raises(SettingsError, match=r"cannot be followed, and neighbour\.py lies beside it"):
        count_code([path])
    assert count_code([tmp_path]) == count_code([path, tmp_path]) == path.stat().st_size + len(NEIGHBOUR)
    (tmp_path / "neighbour.py").unlink()
    assert count_code([path]) == path.stat().st_size


def test_nothing_of_a_script_is_executed(tmp_path: Path) -> None:
    path = folder_of(tmp_path, f"exec(\"open({str(tmp_path / 'ran')!r}, 'w')\")\nopen({str(tmp_path / 'ran')!r}, 'w')")
    count_code([path])
    assert not (tmp_path / "ran").exists()


KERNEL = "import torch\n\n@torch.jit.script\ndef f(x: torch.Tensor, n: int):\n    # a comment\n    return x * n\n\n"
KERNEL += "print(f(torch.ones(2), 3))\n"
TEXT = "import inspect\ndef kernel(x):\n    return x + 1\nprint(len(inspect.getsource(kernel).splitlines()))\n"


@pytest.mark.parametrize(("source", "reader"), [(KERNEL, "torch.jit"), (TEXT, "inspect")])
def test_a_script_that_reads_its_source_is_packed_with_it(source: str, reader: str) -> None:
    packed = script.pack_source(source)
    assert reader in packed.reader
    assert packed.keeping_bytes > 0
    script.check_unpacks(packed)
    assert script.check_same_output(source, packed.data, [], [])


def test_triton_kernels_keep_names_and_annotations_and_a_lost_source_is_refused() -> None:
    source = (
        "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(ptr, BLOCK: tl.constexpr):\n    return\n"
    )
    packed = script.pack_source(source)
    script.check_unpacks(packed)  # triton itself is not needed: the payload is not run
    assert b"linecache" in packed.data
    bare = script.pack_source("def kernel(x):\n    return x\n").data
    with pytest.raises(VerificationError, match="cannot show that of kernel"):
        script.check_unpacks(script.PackedScript(bare, "lzma", True, "triton.jit"))


def test_a_docstring_that_is_read_stays() -> None:
    source = "'''usage: x'''\nprint(__doc__)\n"
    assert "usage" in script.check_same_output(source, script.pack_source(source).data, [], [])
