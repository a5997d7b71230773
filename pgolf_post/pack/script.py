"""The counted script as participants submit it: minified, compressed, and unpacking itself when run.

By convention a submission's code is counted after wrapping: names shortened and comments dropped (python-minifier, the
`pack` extra), the smaller of lzma and brotli, base85, `exec`. Without the minifier the script is wrapped as it is, and
said to be: code is never counted as less than a file that was really made. A script whose source is read while it runs
(`@triton.jit`) gets a wrapper that keeps the source readable.
"""

from __future__ import annotations

import ast
import base64
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import brotli

from pgolf_post.base.storage import named_failures
from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.pack.payload import Layer, imported_by_name, layers, parse, read_script
from pgolf_post.pack.source_use import SourceUse, source_use

WRAPPERS = {
    "lzma": b'import lzma as c,base64\nexec(c.decompress(base64.b85decode("%s")))\n',
    "brotli": b'import brotli as c,base64\nexec(c.decompress(base64.b85decode("%s")))\n',
}
# These leave the source where `inspect` looks for it, under the packed file's own name.
KEEPING_WRAPPERS = {
    name: b"import %s as c,base64,linecache\n" % name.encode()
    + b's=c.decompress(base64.b85decode("%s")).decode()\n'
    + b"linecache.cache[__file__]=len(s),None,s.splitlines(True),__file__\n"
    + b'exec(compile(s,__file__,"exec"))\n'
    for name in WRAPPERS
}
# Runs a packed file up to its payload: prints the payload, then the functions whose source cannot be read.
PROBE = """import ast, inspect, json, sys, textwrap, types
path = sys.argv[1]
taken = []
scope = {"__name__": "__main__", "__file__": path, "exec": lambda code, *_: taken.append(code)}
exec(compile(open(path, "rb").read(), path, "exec"), scope)
payload = taken[0]
code = payload if isinstance(payload, types.CodeType) else compile(payload, "<string>", "exec")
todo, lost = [code], []
while todo:
    here = todo.pop()
    todo += [part for part in here.co_consts if isinstance(part, types.CodeType)]
    if here.co_name[0] != "<" and here.co_flags & inspect.CO_OPTIMIZED:
        try:
            name = ast.parse(textwrap.dedent(inspect.getsource(here))).body[0].name
        except Exception as error:
            name = repr(error)
        if name != here.co_name:
            lost.append(here.co_name)
print(json.dumps({"lost": lost}))
"""
LZMA1 = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}
MINIFIER_MISSING = "python-minifier is not installed (pip install 'pgolf-post[pack]'): counted without minifying"
RUN_SECONDS = 600
UNUSED = SourceUse()


@dataclass(frozen=True)
class PackedScript:
    """A self-extracting script."""

    data: bytes
    codec: str
    minified: bool
    reader: str = ""  # what reads the script's source while it runs; the packed form keeps the source for it
    keeping_bytes: int = 0  # what keeping it costs, against the smallest form that does not


def has_minifier() -> bool:
    """Return whether python-minifier can be imported."""
    try:
        import python_minifier  # noqa: F401
    except ImportError:
        return False
    return True


def pack_source(source: str, keep_names: Sequence[str] = (), hoist: bool = True) -> PackedScript:
    """Wrap a script's source; `keep_names` are globals that others import. Raises SettingsError if it is not Python.

    `hoist` gives literals that occur often a name: shorter, but of a long script the compressor makes less of it.

    A script that reads its own source keeps it: minified without renaming for compilers of kernels, word for word for
    `inspect` and its like.
    """
    use = source_use(parse(source))
    minified = has_minifier()
    smallest = minify(source, keep_names, use, hoist=hoist) if minified else source
    codec, data = _wrap(smallest, WRAPPERS)
    if not use.reader:
        return PackedScript(data, codec, minified)
    minified = minified and not use.text
    codec, kept = _wrap(minify(source, keep_names, use, for_kernels=True) if minified else source, KEEPING_WRAPPERS)
    return PackedScript(kept, codec, minified, use.reader, len(kept) - len(data))


def _wrap(text: str, wrappers: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the codec and bytes of the smallest wrapped form."""
    plain = text.encode()
    streams = {
        "lzma": lzma.compress(plain, format=lzma.FORMAT_ALONE, filters=[LZMA1]),
        "brotli": brotli.compress(plain, quality=11),
    }
    wrapped = {name: wrappers[name] % base64.b85encode(stream) for name, stream in streams.items()}
    codec = min(wrapped, key=lambda name: (len(wrapped[name]), name))
    return codec, wrapped[codec]


def minify(
    source: str,
    keep_names: Sequence[str] = (),
    use: SourceUse = UNUSED,
    for_kernels: bool = False,
    hoist: bool = True,
) -> str:
    """Return the same program in fewer bytes: no comments, docstrings or annotations, short names.

    With `for_kernels` names, literals and annotations stay: a kernel's compiler reads them.
    """
    import python_minifier

    keep = list(keep_names)
    annotations = not (for_kernels or use.annotations)
    small: str = python_minifier.minify(
        source,
        remove_literal_statements="__doc__" not in source,
        rename_globals=bool(keep),
        preserve_globals=keep,
        remove_annotations=annotations and python_minifier.RemoveAnnotationsOptions(),
        hoist_literals=hoist and not for_kernels,
        rename_locals=not for_kernels,
        constant_folding=not for_kernels,
    )
    return small


def check_unpacks(packed: PackedScript) -> None:
    """Run a packed script up to its payload, which is compiled and not run.

    Raises VerificationError if it fails, or if it should keep its source and a function's cannot be read.
    """
    with tempfile.TemporaryDirectory() as name:
        with named_failures(Path(name) / "train_gpt.py"):
            (Path(name) / "train_gpt.py").write_bytes(packed.data)
        command = [sys.executable, "-c", PROBE, "train_gpt.py"]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if done.returncode != 0:
        raise VerificationError(f"the packed script does not unpack: {done.stderr.strip()[-500:]}")
    lost = json.loads(done.stdout)["lost"]
    if packed.reader and lost:
        raise VerificationError(
            f"{packed.reader} reads the script's source, and the packed script cannot show that of {', '.join(lost)}",
            hint="submit the script as it is, or put these functions on lines of their own",
        )


def local_imports(script: Path, counted: Iterable[Path] = ()) -> list[Path]:
    """Return the files that a script imports, directly or not, from its own folder: they are part of the submission.

    Payloads of wrappers are read without running them. Followed are import statements, imports by a constant name, and
    names of Python files beside the script. Raises SettingsError if a part cannot be read and files beside the script
    are neither imported nor in `counted`: they may be what it imports.
    """
    folder, imported, todo, opaque = script.parent, {script}, [script], []
    while todo:
        path = todo.pop()
        if path.suffix != ".py":
            continue
        try:
            found = layers(read_script(path), str(path))
        except SettingsError as error:
            opaque.append(str(error))
            continue
        opaque += [f"{path}: {reason}" for layer in found for reason in layer.opaque]
        for candidate in _local_files(found, path, folder):
            if candidate not in imported:
                imported.add(candidate)
                todo.append(candidate)
    if opaque and (missed := _python_beside(folder, {*imported, *counted})):
        raise SettingsError(
            f"what {script} imports cannot be followed, and {missed[0].name} lies beside it: {'; '.join(opaque)}",
            hint="put the submission's files into a folder of their own and count them all: --code FOLDER",
        )
    return sorted(imported - {script})


def _python_beside(folder: Path, counted: Iterable[Path]) -> list[Path]:
    """Return Python files beside a script, or in packages there, that are not counted."""
    beside = [*folder.glob("*.py"), *folder.glob("*/*.py"), *folder.glob("*.so"), *folder.glob("*.pyc")]
    known = {path.absolute() for path in counted}
    return sorted(path for path in set(beside) if path.is_file() and path.absolute() not in known)


def _local_files(found: Sequence[Layer], path: Path, folder: Path) -> Iterable[Path]:
    """Yield the files that a program's layers import or name."""
    for layer in found:
        for parent, name in _imported(layer.tree, path, folder):
            stem = parent.joinpath(*name.split("."))
            candidates = [stem.with_name(stem.name + ".py"), stem / "__init__.py", stem.with_name(stem.name + ".pyc")]
            candidates += sorted(stem.parent.glob(f"{stem.name}*.so")) if stem.parent.is_dir() else []
            yield from (candidate for candidate in candidates if candidate.is_file())
        for node in ast.walk(layer.tree):
            named = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if _is_script_name(named) and (folder / named).is_file():
                yield folder / named


def _is_script_name(text: str) -> bool:
    return text.endswith(".py") and len(text) < 200 and text.isprintable() and not Path(text).is_absolute()


def _imported(tree: ast.Module, path: Path, folder: Path) -> Iterable[tuple[Path, str]]:
    """Yield (folder, dotted name) of the modules that a program imports, each with its parents."""
    for node in ast.walk(tree):
        parent = folder
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = path.parents[node.level - 1] if 0 < node.level <= len(path.parents) else folder
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
        elif isinstance(node, ast.Call) and (name := imported_by_name(node)):
            names = [name.lstrip(".")]
        for name in names:
            parts = name.split(".")
            yield from ((parent, ".".join(parts[: n + 1])) for n in range(len(parts)) if parts[n] not in ("", "*"))


def check_same_output(script: str | bytes, packed: bytes, beside: Sequence[Path], arguments: Sequence[str]) -> str:
    """Run the script and its packed form, each in an empty folder beside copies of `beside`; return their output.

    Raises VerificationError if the two differ in output or exit status, or fail, or if the script is never the same.
    """
    content = script.encode() if isinstance(script, str) else script
    plain, wrapped = (_run(form, beside, arguments) for form in (content, packed))
    if plain.returncode != 0:
        raise VerificationError(
            f"the script itself fails with status {plain.returncode}: {plain.stderr.strip()[-500:]}"
        )
    if (plain.stdout, plain.returncode) != (wrapped.stdout, wrapped.returncode):
        if _run(content, beside, arguments).stdout != plain.stdout:
            raise VerificationError(
                f"the script prints something else at each run, so that its forms cannot be compared: "
                f"{plain.stdout.strip()[:200]}",
                hint="run it on what it prints the same for, or leave out --beside",
            )
        detail = wrapped.stderr.strip()[-500:] or wrapped.stdout[-500:]
        raise VerificationError(f"the packed script does not do what the script does: {detail}")
    return plain.stdout


def _run(content: bytes, beside: Sequence[Path], arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with named_failures(folder / "train_gpt.py"):
            (folder / "train_gpt.py").write_bytes(content)
            for path in beside:
                (folder / path.name).write_bytes(path.read_bytes())
        command = [sys.executable, "train_gpt.py", *arguments]
        try:
            return subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=RUN_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise VerificationError(f"the script ran for more than {RUN_SECONDS} s and was stopped") from None
