"""The counted script as participants submit it: minified, compressed, and unpacking itself when run.

By convention a submission's code is counted after wrapping: names shortened and comments dropped (python-minifier, the
`pack` extra), the smaller of lzma and brotli, base85, `exec`. Without the minifier the script is wrapped as it is, and
said to be: code is never counted as less than a file that was really made.
"""

from __future__ import annotations

import ast
import base64
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import brotli

from pgolf_post.errors import NotFoundError, SettingsError, VerificationError

WRAPPERS = {
    "lzma": b'import lzma as c,base64\nexec(c.decompress(base64.b85decode("%s")))\n',
    "brotli": b'import brotli as c,base64\nexec(c.decompress(base64.b85decode("%s")))\n',
}
LZMA1 = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}
MINIFIER_MISSING = "python-minifier is not installed (pip install 'pgolf-post[pack]'): counted without minifying"
RUN_SECONDS = 600


@dataclass(frozen=True)
class PackedScript:
    """A self-extracting script."""

    data: bytes
    codec: str
    minified: bool


def has_minifier() -> bool:
    """Return whether python-minifier can be imported."""
    try:
        import python_minifier  # noqa: F401
    except ImportError:
        return False
    return True


def pack_source(source: str, keep_names: Sequence[str] = ()) -> PackedScript:
    """Wrap a script's source; `keep_names` are globals that others import. Raises SettingsError if it is not Python."""
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise SettingsError(f"the script is not Python: line {error.lineno}: {error.msg}") from None
    minified = has_minifier()
    plain = (minify(source, keep_names) if minified else source).encode()
    streams = {
        "lzma": lzma.compress(plain, format=lzma.FORMAT_ALONE, filters=[LZMA1]),
        "brotli": brotli.compress(plain, quality=11),
    }
    wrapped = {name: WRAPPERS[name] % base64.b85encode(stream) for name, stream in streams.items()}
    codec = min(wrapped, key=lambda name: (len(wrapped[name]), name))
    return PackedScript(wrapped[codec], codec, minified)


def minify(source: str, keep_names: Sequence[str] = ()) -> str:
    """Return the same program in fewer bytes: no comments, docstrings or annotations, short names."""
    import python_minifier

    keep = list(keep_names)
    small: str = python_minifier.minify(
        source, remove_literal_statements=True, rename_globals=bool(keep), preserve_globals=keep
    )
    return small


def read_script(path: Path) -> str:
    """Return a script's text. Raises NotFoundError, SettingsError for anything that is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"no such script: {path}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: {error}") from None


def local_imports(script: Path) -> list[Path]:
    """Return the files that a script imports, directly or not, from its own folder: they are part of the submission.

    Only import statements are followed; modules that a script imports by name at run time are missed.
    """
    folder, imported, todo = script.parent, {script}, [script]
    while todo:
        for name in _imported(read_script(todo.pop())):
            path = folder.joinpath(*name.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.is_file() and candidate not in imported:
                    imported.add(candidate)
                    todo.append(candidate)
    return sorted(imported - {script})


def _imported(source: str) -> Iterable[str]:
    """Yield the dotted names of modules that a source imports, each with its parents."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[: n + 1]) for n in range(len(parts)))


def check_same_output(script: str, packed: bytes, beside: Sequence[Path], arguments: Sequence[str]) -> str:
    """Run the script and its packed form, each in an empty folder beside copies of `beside`; return their output.

    Raises VerificationError if the two differ in output or exit status, or fail.
    """
    plain, wrapped = (_run(content, beside, arguments) for content in (script.encode(), packed))
    if plain.returncode != 0:
        raise VerificationError(
            f"the script itself fails with status {plain.returncode}: {plain.stderr.strip()[-500:]}"
        )
    if (plain.stdout, plain.returncode) != (wrapped.stdout, wrapped.returncode):
        detail = wrapped.stderr.strip()[-500:] or wrapped.stdout[-500:]
        raise VerificationError(f"the packed script does not do what the script does: {detail}")
    return plain.stdout


def _run(content: bytes, beside: Sequence[Path], arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "train_gpt.py").write_bytes(content)
        for path in beside:
            (folder / path.name).write_bytes(path.read_bytes())
        command = [sys.executable, "train_gpt.py", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
