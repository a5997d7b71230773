"""Reading documents: keys, streaming formats, errors that name file and line; the standard library as a corpus."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest
import zstandard

from pgolf_post.data.documents import Document, read_documents, text_key
from pgolf_post.data.stdlib_corpus import find_docstrings, module_documents, module_files
from pgolf_post.errors import DamagedFileError, NotFoundError

LINES = [{"text": "one\nline"}, {"text": "two", "source": "s", "path": "p"}, {"text": "ünï", "source": "s"}]


def jsonl(records: list[object]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("dos\r\nline ü\n".encode())
    (tmp_path / "b.txt").write_bytes("dos\r\nline ü\n".encode())
    first, second = read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert first.text == "dos\r\nline ü\n"
    assert first.key == second.key == text_key(first.text)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_jsonl_and_its_compressed_form(tmp_path: Path, name: str) -> None:
    data = jsonl([*LINES]) + b"\n" + jsonl([{"text": "last"}]).rstrip(b"\n")
    if name.endswith(".zst"):  # two frames, cut inside a line
        data = zstandard.compress(data[:20]) + zstandard.compress(data[20:])
    (tmp_path / name).write_bytes(data)
    documents = list(read_documents([tmp_path / name]))
    assert [document.text for document in documents] == ["one\nline", "two", "ünï", "last"]
    assert documents[1].key == '["s", "p"]'
    assert documents[2].key == text_key("ünï")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"bad\.jsonl line 2: not valid JSON"),
        (b'["a"]', r"bad\.jsonl line 2: a list"),
        (b'{"text": "abc', r"bad\.jsonl line 2: not valid JSON: Unterminated string starting at column 10"),
        (b'{"text": null}', r'"text" is null, expected a string'),
        (b'{"text": NaN}', r'"text" is a number'),
        (b'{"text": "first", "text": "second"}', r'line 2: the key "text" stands 2 times in one object'),
        (b"[" * 100_000, r"line 2: not readable as JSON: it is nested too deeply"),
        (
            b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
            "line 2: .* a number of more than 4,300 digits",
        ),
        (b'{"body": "a", "id": 1}', r'bad\.jsonl line 2: "text" is missing; the keys are: body, id'),
        (b'{"text": 3}', r'bad\.jsonl line 2: "text" is a number'),
        (b'{"text": "\xff"}', r"bad\.jsonl line 2: not UTF-8 text: byte 0xff at offset 10"),
        (b'{"text": "a\\ud800"}', r"bad\.jsonl line 2: .*lone surrogate U\+D800 at character 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DamagedFileError, match=message) as caught:
        list(read_documents([tmp_path / "bad.jsonl"]))
    assert caught.value.hint


def test_a_page_named_as_lines_is_called_a_page(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(DamagedFileError, match=r"docs\.jsonl is an HTML or XML page, not JSON lines") as caught:
        list(read_documents([tmp_path / "docs.jsonl"]))
    assert "/resolve/" in str(caught.value.hint)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine \xe9t\xe9")
    compressed = zstandard.compress(jsonl([{"text": "x" * 500 + str(number)} for number in range(2000)]))
    (tmp_path / "cut.jsonl.zst").write_bytes(compressed[: len(compressed) // 2])
    (tmp_path / "not.jsonl.zst").write_bytes(b"plain text")
    with pytest.raises(DamagedFileError, match=r"a\.txt: not UTF-8 text: byte 0xe9 at offset 5"):
        list(read_documents([tmp_path / "a.txt"]))
    for name in ("cut.jsonl.zst", "not.jsonl.zst"):
        with pytest.raises(DamagedFileError, match=name):
            list(read_documents([tmp_path / name]))
    for missing in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(NotFoundError):
            list(read_documents([missing]))


MODULE = '''\
"""Module ü."""
import os

class Thing:
    """Class text
    over lines."""

    def method(self):
        """Method."""; return "kept"

    async def empty(self):
        r"""Only this \\d."""

value = """not a docstring"""
'''


def test_a_module_is_its_prose_and_its_code_without_it(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE, encoding="utf-8")
    prose, code = module_documents(path, "stdlib/module.py")
    assert prose.key == code.key == "stdlib/module.py"
    assert prose.text == "Module ü.\n\nClass text\nover lines.\n\nMethod.\n\nOnly this \\d."
    assert "Class text" not in code.text
    assert "Method." not in code.text
    assert '; return "kept"' in code.text
    assert 'value = """not a docstring"""' in code.text
    (tmp_path / "broken.py").write_text("def (:\n", encoding="utf-8")
    assert list(module_documents(tmp_path / "broken.py", "k")) == []


def test_the_walk_takes_standard_modules_only(tmp_path: Path) -> None:
    wanted = ["json/decoder.py", "os.py"]
    unwanted = ["json/test/a.py", "idlelib/run.py", "site-packages/json.py", "nonstandard.py", "_sysconfigdata_x.py"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    assert [path.relative_to(tmp_path).as_posix() for path in module_files(tmp_path)] == wanted


@pytest.mark.parametrize("module", [json, ast])
def test_the_code_of_real_modules_is_every_line_but_docstrings(module: ModuleType) -> None:
    path = Path(str(module.__file__))
    lines = path.read_text(encoding="utf-8").split("\n")
    nodes = find_docstrings(ast.parse("\n".join(lines)))
    documented = {line for node in nodes for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    _prose, code = module_documents(path, "k")
    assert len(nodes) >= 5
    assert code.text.split("\n") == [line for number, line in enumerate(lines, 1) if number not in documented]


def test_documents_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Document("a", "b").text = "c"  # type: ignore[misc]
