"""What is counted as code is a real file that really runs, and the exported decoder needs nothing of this package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli.export_decoder import command as export_decoder
from pgolf_post.cli.pack_code import command as pack_code
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.pack import decode, script
from pgolf_post.pack.codecs import CODECS, Codec, compress_words
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.size import count
from pgolf_post.pack.snippet import decoder_snippet, unguarded_inflate
from pgolf_post.quantize.tensor import QuantizedModel
from tests.pack.samples import sample_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_gpt.py"
SOURCE = (
    '"""Doc."""\nimport sys\n\n\ndef double(number: int) -> int:\n    """Twice."""\n    return 2 * number  # yes\n\n\n'
)
SOURCE += 'if __name__ == "__main__":\n    print(double(int(sys.argv[1])), __name__)\n'


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("minified", [True, False])
def test_a_packed_script_does_what_the_script_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minified: bool
) -> None:
    if not minified:
        monkeypatch.setitem(sys.modules, "python_minifier", None)
    elif not script.has_minifier():
        pytest.skip("python-minifier is an extra")
    packed = script.pack_source(SOURCE)
    assert packed.minified is minified
    (tmp_path / "train_gpt.py").write_bytes(packed.data)
    assert run(tmp_path, "train_gpt.py", "21").split()[0] == "42"
    assert script.check_same_output(SOURCE, packed.data, [], ["4"]).startswith("8 ")


def test_a_packed_script_that_differs_is_refused() -> None:
    with pytest.raises(VerificationError, match="does not do what the script does: 43"):
        script.check_same_output("print(42)", b"print(43)", [], [])
    with pytest.raises(VerificationError, match="the script itself fails with status 1"):
        script.check_same_output("1/0", b"1/0", [], [])
    noisy = "import os\nprint(os.urandom(8))"
    with pytest.raises(VerificationError, match="prints something else at each run"):
        script.check_same_output(noisy, noisy.encode(), [], [])
    with pytest.raises(SettingsError, match="not Python: line 1"):
        script.pack_source("def :")


def test_what_a_script_imports_from_its_folder_is_counted(tmp_path: Path) -> None:
    files = {
        "train_gpt.py": "import json, model\nfrom parts.head import head\nimport numpy\n",
        "model.py": "from parts import norm\n",
        "parts/__init__.py": "",
        "parts/head.py": "x = 1\n",
        "parts/norm.py": "import model\n",
        "unused.py": "x" * 999,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "a.bin").write_bytes(bytes(100))
    report = count(tmp_path / "a.bin", [tmp_path / "train_gpt.py"])
    names = {str(file.path.relative_to(tmp_path)) for file in report.code}
    assert names == set(files) - {"unused.py"}
    assert report.strict_total_bytes == 100 + sum(len(files[name]) for name in names)


def test_convention_counts_the_wrapped_code(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(SOURCE + "# " + "a long comment " * 1000)
    (tmp_path / "a.bin").write_bytes(bytes(100))
    strict, wrapped = (count(tmp_path / "a.bin", [path], 16_000_000, flag) for flag in (False, True))
    packed = len(script.pack_source(path.read_text()).data)
    assert strict.total_bytes == strict.strict_total_bytes == 100 + path.stat().st_size
    assert wrapped.total_bytes == strict.convention_total_bytes == 100 + packed < strict.total_bytes


@pytest.mark.skipif(not script.has_minifier(), reason="python-minifier is an extra")
def test_the_exported_decoder_is_small_and_stands_alone(tmp_path: Path) -> None:
    result = CliRunner().invoke(export_decoder, ["--out", str(tmp_path / "decoder.py"), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["code_bytes"] == (tmp_path / "decoder.py").stat().st_size
    assert answer["packed_bytes"] <= 2560
    packed = script.pack_source(decoder_snippet(), ["decode"])
    assert len(packed.data) == answer["packed_bytes"]
    (tmp_path / "small.py").write_bytes(packed.data)
    for codec in ("rans", "brotli", "lzma", "zlib", "none"):
        (tmp_path / "a.pgolf").write_bytes(pack(sample_model(), PackSettings(codec=codec)))
        for module in ("decoder", "small"):
            code = f"import sys; sys.modules['pgolf_post'] = None; import {module}, numpy as np\n"
            code += f"np.savez('t.npz', **{module}.decode(open('a.pgolf', 'rb').read()))"
            run(tmp_path, "-c", code)
            with np.load(tmp_path / "t.npz") as found:
                assert_tensors(dict(found), sample_model())


def test_the_unguarded_decompressors_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a table with one more codec, whose ids no longer fit a list."""
    raw = np.random.default_rng(0).integers(-5, 6, 5000).astype(np.int8).tobytes()
    for more in ({}, {"reversed": Codec(99, lambda raw: raw[::-1], "lambda data: data[::-1]", "this test")}):
        for name, codec in more.items():
            monkeypatch.setitem(CODECS, name, codec)
        scope: dict[str, Any] = {**vars(decode)}  # its imports are those that the snippet has
        exec(unguarded_inflate(), scope)
        assert all(scope["inflate"](codec.id, codec.compress(raw)) == raw for codec in CODECS.values())
        assert scope["inflate"](*compress_words(raw, 2)) == raw


def assert_tensors(found: dict[str, np.ndarray], model: QuantizedModel) -> None:
    expected = model.tensors()
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_the_example_holds_the_current_decoder() -> None:
    current, example = (ast.parse(text).body for text in (decoder_snippet(), EXAMPLE.read_text()))
    found = [ast.dump(node) for node in example[1 : len(current) + 1]]  # after the docstring
    assert found == [ast.dump(node) for node in current]


@pytest.mark.long  # in the short run, scripts that submit makes are packed and score the same
def test_the_example_is_packed_and_scores_the_same(
    tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    from pgolf_post.artifacts import requant
    from pgolf_post.calibrate import CalibrationSettings, calibrate
    from pgolf_post.plan import read_plan
    from pgolf_post.score.cached import score_artifact
    from pgolf_post.score.plain import PlainProtocol

    view = pico_checkpoint.load()
    artifact = requant(view, calibrate(view, pico_data, CalibrationSettings(tokens=640)), read_plan("sdclip-1394"))
    shard = next(pico_data.path.glob("fineweb_val_*.bin"))
    arguments = [str(EXAMPLE), "--out", str(tmp_path / "packed.py"), "--json"]
    arguments += ["--beside", str(artifact.path), "--beside", str(shard), "--", artifact.path.name, shard.name]
    result = CliRunner().invoke(pack_code, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    answer = json.loads(result.stdout)
    assert answer["checked"]
    assert answer["code_bytes"] == (tmp_path / "packed.py").stat().st_size < answer["source_bytes"]
    printed = json.loads(run(tmp_path, "packed.py", str(artifact.path), str(shard)))
    score, _ = score_artifact(artifact.path, pico_data, PlainProtocol(seq_len=16))
    assert printed["tokens"] == pytest.approx(score["tokens"], abs=16)
    assert printed["nats"] / printed["tokens"] == pytest.approx(score["nats"] / score["tokens"], rel=0.01)
