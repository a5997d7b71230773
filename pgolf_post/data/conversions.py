"""Shell commands that turn a file which is not read here into one that is; errors print them, people run them.

Each writes a new file and leaves the old one as it is. They use this Python, the tools of a Debian system, and where
they say so a package to install.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pgolf_post.data.compressed import codec_of

AS_LINES = 'write its documents as .jsonl, one {"text": …} a line'
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PARQUET = (
    "import sys, pandas; "
    "pandas.read_parquet(sys.argv[1], columns=['text']).to_json(sys.argv[2], orient='records', lines=True)"
)
TABLE = (
    "import sys, csv, json; csv.field_size_limit(2**31 - 1); "
    "rows = csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter={delimiter}); "
    "[print(json.dumps({'text': row['text']})) for row in rows]"
)
RENAMED = (
    "import sys, json; "
    "[print(json.dumps({'text': json.loads(line)[sys.argv[1]]})) for line in sys.stdin.buffer if line.strip()]"
)


def to_lines(kind: str, path: Path) -> str | None:
    """Return the command that writes the documents of a container as .jsonl; None if there is no general one.

    A compression around it is undone first, into a file beside the result.
    """
    stem, codec = stem_of(path), codec_of(path)
    inner = f"{stem}.{kind}" if codec and kind != "tar" else path
    unpack = f"{codec.unpack} {_quoted(path)} > {_quoted(inner)} && " if codec and kind != "tar" else ""
    lines = _quoted(f"{stem}.{kind}.jsonl")
    if kind == "parquet":
        install = f"{_quoted(sys.executable)} -m pip install pandas pyarrow"
        return f"{unpack}{install} && {_python(PARQUET)} {_quoted(inner)} {lines}"
    if kind in ("csv", "tsv"):
        code = TABLE.replace("{delimiter}", "','" if kind == "csv" else "chr(9)")
        return f'{unpack}{_python(code)} {_quoted(inner)} > {lines}   (needs a column "text")'
    if kind in ("zip", "tar"):
        undo = f"{unpack}unzip {_quoted(inner)} -d" if kind == "zip" else f"tar -xf {_quoted(path)} -C"
        folder = _quoted(f"{stem}.{kind}.files")
        return f"mkdir {folder} && {undo} {folder}   (then name the files in it)"
    return None


def rename_key(path: Path, key: str) -> str:
    """Return the command that writes JSON lines with "text" in place of another key."""
    read = _read(path)
    return f"{read} | {_python(RENAMED)} {_quoted(key)} > {_quoted(f'{stem_of(path)}.text.jsonl')}"


def without_line(path: Path, number: int) -> str:
    """Return the command that writes a file without one of its lines."""
    return f"{_read(path)} | sed {number}d > {_quoted(f'{stem_of(path)}.rest.jsonl')}   (leaves that line out)"


def to_utf8(path: Path) -> str:
    """Return what to do about a text in another encoding."""
    where, out = _quoted(path), _quoted(f"{path}.utf8")
    return f"file -i {where} tells its encoding; then convert it: iconv -f ENCODING -t UTF-8 {where} > {out}"


def stem_of(path: Path) -> str:
    """Return a file's name up to its first dot."""
    return path.name.split(".")[0] or path.name.strip(".") or "documents"


def _read(path: Path) -> str:
    """Return the command that prints a file as UTF-8, decompressed."""
    codec = codec_of(path)
    with path.open("rb") as file:
        is_utf16 = file.read(2) in UTF16_MARKS
    return f"{codec.unpack if codec else 'iconv -f UTF-16 -t UTF-8' if is_utf16 else 'cat'} {_quoted(path)}"


def _python(code: str) -> str:
    """Return the command that runs code which has nothing that a shell reads between double quotes."""
    return f'{_quoted(sys.executable)} -c "{code}"'


def _quoted(value: Path | str) -> str:
    text = str(value)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
