"""The decoder as a snippet for a contestant's own single-file script: `decode(bytes)` → float32 arrays by name.

The snippet is `decode.py` without its guards against damaged and hostile files: sizes, checksums, limits on what is
inflated, and error messages. A contestant's own artifact needs none of them. The sha256 of all symbols is still
compared, so that no wrong array can pass.
"""

from __future__ import annotations

import ast
from pathlib import Path

from pgolf_post.pack import decode
from pgolf_post.pack.codecs import CODECS, WORDS_ID

GUARDS = ("need", "check")
HEADER = "# Decoder of pgolf-post artifacts: decode(bytes) -> float32 arrays by tensor name. Needs numpy and brotli.\n"


def decoder_snippet() -> str:
    """Return the source of the snippet."""
    return HEADER + _stripped(_Strip())


def decoder_module() -> str:
    """Return the source of `decode.py` without its guards; `decode` returns what it does there."""
    return _stripped(_Strip(tensors_alone=False))


def _stripped(strip: _Strip) -> str:
    tree = strip.visit(ast.parse(Path(decode.__file__).read_text("utf-8")))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def unguarded_inflate() -> str:
    """Return the source of `inflate` without limits, from the decompressors named in `CODECS`."""
    calls = {codec.id: codec.decode for codec in CODECS.values()}
    if sorted(calls) == [0, 1, 2, 3]:  # a list is shorter; 6, lzma of words, is 2 like any lzma
        chosen = f"[{', '.join(calls[codec_id] for codec_id in sorted(calls))}][codec & 3]"
    else:
        calls[WORDS_ID] = CODECS["lzma"].decode
        chosen = f"{{{', '.join(f'{codec_id}: {call}' for codec_id, call in sorted(calls.items()))}}}[codec]"
    return f"def inflate(codec, data):\n    return {chosen}(bytes(data))\n"


class _Strip(ast.NodeTransformer):
    """Drop guards and docstrings; with `tensors_alone`, `decode` returns nothing else."""

    def __init__(self, tensors_alone: bool = True) -> None:
        self.tensors_alone = tensors_alone

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in GUARDS:
            return ast.Assert(call.args[0], None) if "sha256" in ast.unparse(call) else None
        return None if isinstance(call, ast.Constant) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node.name in GUARDS:
            return None
        if node.name == "inflate":
            return ast.parse(unguarded_inflate()).body[0]
        self.generic_visit(node)
        if node.name == "build" and self.tensors_alone:
            node.body[-1] = ast.Return(ast.Name("tensors", ast.Load()))
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        named = ast.unparse(node.targets[0])
        is_guard = ("MAX_MANIFEST" in named and self.tensors_alone) or named in ("checked", "rooms")
        return None if is_guard else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "inflate":
            node.args.pop()  # the limit
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        return None

    def visit_Try(self, node: ast.Try) -> list[ast.stmt]:
        return node.body
