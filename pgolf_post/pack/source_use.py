"""Scripts that read their own source while they run: Triton kernels, TorchScript, `inspect`.

`@triton.jit` and `torch.jit.script` compile the text of a function, which code run by `exec` does not have. The packed
form of such a script keeps its source readable, and the minifier leaves alone what those compilers read.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

# Modules and attributes that read a function's text, with its argument annotations.
KERNEL_READERS = ("triton", "numba.cuda", "taichi", "torch.jit", "tilelang", "cutlass")
# Modules that hand a function's text to the script itself: any change of the text is a change of behaviour.
TEXT_READERS = ("inspect", "linecache")
# Names that read annotations at run time.
ANNOTATION_READERS = ("get_type_hints", "__annotations__", "custom_op", "triton_op", "get_annotations", "signature")


@dataclass(frozen=True)
class SourceUse:
    """Readers of a script's own source; `kernels` and `text` name the first reader of each kind."""

    kernels: str = ""
    text: str = ""
    annotations: str = ""

    @property
    def reader(self) -> str:
        return self.text or self.kernels


def source_use(tree: ast.Module) -> SourceUse:
    """Return what reads the source of a program. Imports and dotted names are looked at, wherever they stand."""
    dotted = sorted(_dotted_names(tree))
    return SourceUse(
        kernels=_first(dotted, KERNEL_READERS),
        text=_first(dotted, TEXT_READERS),
        annotations=next((name for name in dotted if name.rpartition(".")[2] in ANNOTATION_READERS), ""),
    )


def _first(dotted: list[str], readers: tuple[str, ...]) -> str:
    return next((name for name in dotted for reader in readers if f"{name}.".startswith(f"{reader}.")), "")


def _dotted_names(tree: ast.Module) -> set[str]:
    """Return all modules imported and all names with attributes, aliases of imports resolved."""
    aliases: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update({alias.asname: alias.name for alias in node.names if alias.asname})
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            head, dot, rest = ast.unparse(node).partition(".") if _is_dotted(node) else ("", "", "")
            names.add(aliases.get(head, head) + dot + rest)
        if isinstance(node, ast.Attribute):
            names.add(node.attr if node.attr in ANNOTATION_READERS else "")
    return names - {""}


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)
