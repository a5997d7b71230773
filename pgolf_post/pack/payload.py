"""Scripts inside scripts: a wrapper's payload is code of the submission, and so is what the payload imports.

A participant's file is often one line: `exec(lzma.decompress(base64.b85decode("…")))`. Its imports are in the payload.
So such expressions are worked out here, from constants, single assignments and a table of known decoders. Nothing of
the script is executed. Code that is run and cannot be worked out is reported, so that a count never passes over it.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import codecs
import io
import lzma
import platform
import textwrap
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import brotli
import zstandard

from pgolf_post.base.paths import absent
from pgolf_post.errors import NotFoundError, SettingsError

MAX_SOURCE_BYTES = 1 << 26
MAX_LAYERS = 16
BINARY_TO_TEXT = ("b16decode", "b32decode", "b64decode", "b85decode", "a85decode", "standard_b64decode")
LZMA_CONSTANTS = {name: value for name, value in vars(lzma).items() if name.isupper() and isinstance(value, int)}
TEXT_METHODS = ("encode", "decode", "strip", "replace", "join", "lstrip", "rstrip", "translate")


class NotConstantError(Exception):
    """An expression that cannot be worked out without running the script."""


def _inflate_lzma(
    data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: int | None = None, filters: Any = None
) -> bytes:
    return lzma.LZMADecompressor(format, memlimit, filters).decompress(data, MAX_SOURCE_BYTES)


def _inflate_zlib(data: bytes, wbits: int = 15, bufsize: int = 0) -> bytes:
    return zlib.decompressobj(wbits).decompress(data, MAX_SOURCE_BYTES)


DECODERS: dict[str, Callable[..., Any]] = {
    **{f"base64.{name}": getattr(base64, name) for name in (*BINARY_TO_TEXT, "urlsafe_b64decode", "decodebytes")},
    "binascii.a2b_base64": binascii.a2b_base64,
    "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex,
    "bytes": bytes,
    "str": str,
    "codecs.decode": codecs.decode,
    "lzma.decompress": _inflate_lzma,
    "zlib.decompress": _inflate_zlib,
    "gzip.decompress": lambda data: zlib.decompressobj(31).decompress(data, MAX_SOURCE_BYTES),
    "bz2.decompress": lambda data: bz2.BZ2Decompressor().decompress(data, MAX_SOURCE_BYTES),
    "brotli.decompress": brotli.decompress,
    "zstandard.decompress": lambda data: zstandard.decompress(data, MAX_SOURCE_BYTES),
    "compile": lambda source, *_, **__: source,
    "textwrap.dedent": textwrap.dedent,
}
UNPACKERS = tuple(name for name in DECODERS if name.endswith(".decompress"))
RUNNERS = ("exec", "eval")


@dataclass(frozen=True)
class Layer:
    """One program of a script: the script itself, or a payload. `opaque` names what it runs and cannot be read."""

    tree: ast.Module
    opaque: tuple[str, ...] = ()


def decode_source(data: bytes, name: str) -> str:
    """Return Python source as Python reads it: by its byte order mark or coding line, else UTF-8.

    Raises SettingsError for bytes that are not text in that encoding.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return io.TextIOWrapper(io.BytesIO(data), encoding, newline=None).read()
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise SettingsError(
            f"{name} is not Python text: {error}", hint="save it as UTF-8, or state its encoding in its first line"
        ) from None


def read_script(path: Path) -> str:
    """Return a script's text. Raises NotFoundError, SettingsError for what is not text in its stated encoding."""
    if not path.is_file():
        raise NotFoundError(absent(path, "script"))
    return decode_source(path.read_bytes(), str(path))


def parse(source: str, name: str = "the script") -> ast.Module:
    """Parse a source. Raises SettingsError naming the line if this Python cannot."""
    if "\0" in source:
        raise SettingsError(f"{name} is not Python: it has a null byte at character {source.index(chr(0))}")
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise SettingsError(
            f"{name} is not Python: line {error.lineno}: {error.msg} (Python {platform.python_version()})",
            hint="use the Python it was written for, or count a whole folder: pgolf-post size ARTIFACT --code FOLDER",
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise SettingsError(f"{name} is not Python: {error or type(error).__name__}") from None


def layers(source: str, name: str = "the script") -> list[Layer]:
    """Return the script and all payloads in it, at any depth. Raises SettingsError for a script that does not parse."""
    found: list[Layer] = []
    todo = [parse(source, name)]
    while todo:
        tree = todo.pop()
        folder = _Folder.of(tree)
        payloads = [] if len(found) >= MAX_LAYERS else list(folder.payloads())
        opaque = folder.opaque if len(found) < MAX_LAYERS else [*folder.opaque, f"more than {MAX_LAYERS} payloads"]
        found.append(Layer(tree, tuple(opaque)))
        todo += payloads
    return found


@dataclass
class _Folder:
    """Work out the constant expressions of one program."""

    tree: ast.Module
    modules: dict[str, str] = field(default_factory=dict)  # local name -> dotted name of what it was imported as
    values: dict[str, ast.expr] = field(default_factory=dict)  # the last value assigned to a name
    bindings: Counter[str] = field(default_factory=Counter)  # how often a name is bound, in whatever way
    opaque: list[str] = field(default_factory=list)
    active: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tree: ast.Module) -> _Folder:
        """Collect the imports and assignments of a program."""
        folder = cls(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                folder.modules.update({alias.asname or alias.name: alias.name for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module:
                folder._import_names(node.module, [(alias.name, alias.asname) for alias in node.names])
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                folder._assign(node)
            elif isinstance(node, ast.NamedExpr):
                folder.values[node.target.id] = node.value
            elif isinstance(node, ast.arg):
                folder.bindings[node.arg] += 1
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                folder.bindings[node.id] += 1
        return folder

    def _import_names(self, module: str, names: list[tuple[str, str | None]]) -> None:
        for name, alias in names:
            if name == "*":
                known = [key for key in DECODERS if key.startswith(module + ".")]
                self.modules.update({key.rpartition(".")[2]: key for key in known})
            else:
                self.modules[alias or name] = f"{module}.{name}"

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> None:
        if node.value is None:
            return
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                self.values[target.id] = node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(part, ast.Name):
                        self.values[part.id] = value

    def payloads(self) -> Iterator[ast.Module]:
        """Yield the programs that this one runs or unpacks; note in `opaque` what is run and cannot be read."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call):
                continue
            name = self._dotted(node.func).removeprefix("builtins.")
            if name in RUNNERS and node.args:
                yield from self._run_payload(name, node)
            elif name in UNPACKERS:
                yield from self._unpacked(node)

    def _run_payload(self, name: str, node: ast.Call) -> Iterator[ast.Module]:
        try:
            yield _program(self.fold(node.args[0]))
        except NotConstantError as error:
            self.opaque.append(f"line {node.lineno}: {name}(…): {error}")

    def _unpacked(self, node: ast.Call) -> Iterator[ast.Module]:
        """Yield what is unpacked, if it is a program: some wrappers write it to a file and run that."""
        try:
            yield _program(self.fold(node))
        except NotConstantError:
            return

    def fold(self, node: ast.expr) -> Any:
        """Return an expression's value. Raises NotConstantError if it takes running the script."""
        kind = type(node)
        if kind not in FOLDS:
            raise NotConstantError(f"{kind.__name__} is not a constant")
        try:
            return FOLDS[kind](self, node)
        except (RecursionError, MemoryError, KeyError, TypeError, ValueError, LookupError) as error:
            raise NotConstantError(f"{type(error).__name__}: {error}") from None
        except (lzma.LZMAError, zlib.error, brotli.error, zstandard.ZstdError, OSError, EOFError) as error:
            raise NotConstantError(f"its payload is damaged: {error}") from None

    def _name(self, node: ast.Name) -> Any:
        if self.bindings[node.id] != 1 or node.id not in self.values or node.id in self.active:
            raise NotConstantError(f"{node.id!r} has no single constant value")
        self.active.add(node.id)
        try:
            return self.fold(self.values[node.id])
        finally:
            self.active.discard(node.id)

    def _attribute(self, node: ast.Attribute) -> Any:
        name = self._dotted(node)
        if name.startswith("lzma.") and name[5:] in LZMA_CONSTANTS:
            return LZMA_CONSTANTS[name[5:]]
        raise NotConstantError(f"{name or node.attr} is not a constant")

    def _binary(self, node: ast.BinOp) -> Any:
        left, right = self.fold(node.left), self.fold(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, (str, bytes)):
            return left + right
        if isinstance(node.op, ast.BitOr) and isinstance(left, int):
            return left | right
        raise NotConstantError("an operation that is not followed")

    def _subscript(self, node: ast.Subscript) -> Any:
        value = self.fold(node.value)
        if isinstance(node.slice, ast.Slice):
            parts = (node.slice.lower, node.slice.upper, node.slice.step)
            return value[slice(*(None if part is None else self.fold(part) for part in parts))]
        return value[self.fold(node.slice)]

    def _call(self, node: ast.Call) -> Any:
        name = self._dotted(node.func).removeprefix("builtins.")
        if name not in DECODERS and not (isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_METHODS):
            raise NotConstantError(f"{name or ast.unparse(node.func)[:60]}() is not followed")
        given = [self.fold(argument) for argument in node.args]
        named = {keyword.arg or "": self.fold(keyword.value) for keyword in node.keywords}
        if name in DECODERS:
            value = DECODERS[name](*given, **named)
        else:
            assert isinstance(node.func, ast.Attribute)
            value = getattr(self.fold(node.func.value), node.func.attr)(*given, **named)
        if isinstance(value, (str, bytes)) and len(value) >= MAX_SOURCE_BYTES:
            raise NotConstantError(f"its payload is larger than {MAX_SOURCE_BYTES:,} bytes")
        return value

    def _dotted(self, node: ast.expr) -> str:
        """Return the name of what an expression refers to, imports resolved; empty if it is not a name."""
        if isinstance(node, ast.Name):
            value = self.values.get(node.id)
            if self.bindings[node.id] == 1 and isinstance(value, (ast.Attribute, ast.Call)):
                return self._dotted(value) or node.id
            return self.modules.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            parent = self._dotted(node.value)
            return parent and f"{parent}.{node.attr}"
        if isinstance(node, ast.Call):
            return imported_by_name(node) or ""
        return ""


FOLDS: dict[type, Callable[[_Folder, Any], Any]] = {
    ast.Constant: lambda _, node: node.value,
    ast.Name: _Folder._name,
    ast.Attribute: _Folder._attribute,
    ast.BinOp: _Folder._binary,
    ast.UnaryOp: lambda folder, node: -folder.fold(node.operand),
    ast.Subscript: _Folder._subscript,
    ast.Call: _Folder._call,
    ast.NamedExpr: lambda folder, node: folder.fold(node.value),
    ast.List: lambda folder, node: [folder.fold(item) for item in node.elts],
    ast.Tuple: lambda folder, node: tuple(folder.fold(item) for item in node.elts),
    ast.Dict: lambda folder, node: {
        folder.fold(key): folder.fold(value) for key, value in zip(node.keys, node.values, strict=True)
    },
}


def imported_by_name(node: ast.Call) -> str | None:
    """Return the module that `__import__("name")` or `import_module("name")` names; None for any other call."""
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if function not in ("__import__", "import_module") or not node.args:
        return None
    first = node.args[0]
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _program(value: Any) -> ast.Module:
    """Parse a worked-out value as a program. Raises NotConstantError if it is none."""
    if not isinstance(value, (str, bytes)):
        raise NotConstantError(f"it runs a {type(value).__name__}")
    try:
        return parse(value if isinstance(value, str) else decode_source(value, "the payload"), "the payload")
    except SettingsError as error:
        raise NotConstantError(str(error)) from None
