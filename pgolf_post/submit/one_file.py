"""Reached definitions as one file: in the order in which Python needs them, each name plain and only once taken.

The imports of public packages stand on top, the call of the entry function at the end.
"""

from __future__ import annotations

import ast
import builtins
import keyword
from dataclasses import dataclass, field

from pgolf_post.submit.reach import Reach, names_read
from pgolf_post.submit.reduce import copied
from pgolf_post.submit.sources import Definition, is_address
from pgolf_post.submit.trees import Transformer, parameters, walk

HEADER = "from __future__ import annotations\n"


@dataclass(frozen=True)
class Part:
    """One definition of the amalgamated file."""

    module: str
    name: str
    source: str


@dataclass(frozen=True)
class Amalgam:
    """A self-contained program."""

    imports: str
    parts: tuple[Part, ...]
    start: str  # the call of the entry function
    external: tuple[str, ...] = field(default=())  # packages that it imports

    @property
    def source(self) -> str:
        """The whole file."""
        return "\n\n".join([HEADER + self.imports, *(part.source for part in self.parts), self.start]) + "\n"


def written(reach: Reach) -> Amalgam:
    """Return what is reached as the text of one program."""
    ordered = _ordered(reach)
    names = _names(reach, ordered)
    parts = []
    for definition in ordered:
        node = _Named(names).visit(copied(definition).node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.name = names[definition.addresses[0]]
        text = ast.unparse(ast.fix_missing_locations(node))
        parts.append(Part(definition.module, ", ".join(definition.names), text))
    start = f'if __name__ == "__main__":\n    {names[reach.entry]}()'
    packages = sorted({at.partition(":")[0].partition(".")[0] for at in reach.external if ":" in at})
    return Amalgam(_imports(reach.external, names), tuple(parts), start, tuple(packages))


def _ordered(reach: Reach) -> list[Definition]:
    """Return definitions so that whatever runs at import time comes after what it reads."""
    done: dict[str, Definition] = {}
    active: set[str] = set()

    def visit(definition: Definition) -> None:
        at = definition.addresses[0]
        if at in done or at in active:
            return
        active.add(at)
        for name in names_read(definition.node, at_import=True):
            module = name.partition(":")[0]
            if reach.sources.is_own(module):
                visit(reach.own(name))
        done[at] = definition

    for definition in sorted(reach.reached.values(), key=lambda each: (each.module, each.order)):
        visit(definition)
    return [each for at, each in done.items() if at in reach.reached]


def _names(reach: Reach, ordered: list[Definition]) -> dict[str, str]:
    """Return a plain name for every address: its own, unless taken, or a local of some reader."""
    locals_of: dict[str, set[str]] = {}  # address → names local to definitions that read it
    for definition in ordered:
        local = _plain_names(definition.node)
        for at in [*names_read(definition.node), *definition.addresses]:
            locals_of.setdefault(at, set()).update(local)
    names: dict[str, str] = {}
    taken = set(dir(builtins)) | set(keyword.kwlist)
    addresses = [at for each in ordered for at in each.addresses] + sorted(reach.external)
    for at in addresses:
        module, _, own = at.partition(":")
        name = own or reach.sources.aliases.get(at, module.rpartition(".")[2])
        if own and not reach.sources.is_own(module):
            name = reach.sources.aliases.get(at, own)
        forms = [
            name,
            f"{name}_{module.rpartition('.')[2]}",
            *(f"{name}_{n}" for n in range(2, len(addresses) + 3)),
        ]
        name = next(each for each in forms if each not in taken and each not in locals_of.get(at, ()))
        names[at] = name
        taken.add(name)
    return names


def _imports(external: set[str], names: dict[str, str]) -> str:
    lines = []
    for at in sorted(external):
        module, _, own = at.partition(":")
        alias = names[at]
        if not own:
            lines.append(f"import {module}" + (f" as {alias}" if alias != module else ""))
        else:
            lines.append(f"from {module} import {own}" + (f" as {alias}" if alias != own else ""))
    return "\n".join(lines) + "\n"


def _plain_names(node: ast.AST) -> set[str]:
    """Return all local names of a definition."""
    names = {each.id for each in walk(node) if isinstance(each, ast.Name) and not is_address(each.id)}
    for each in walk(node):
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            names.update(arg.arg for arg in parameters(each))
        if isinstance(each, ast.ExceptHandler) and each.name:
            names.add(each.name)
        if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and each is not node:
            names.add(each.name)
    return names


class _Named(Transformer):
    """Write plain names for addresses; in annotations, those of what is not there are as they were."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names, self.module = names, ""

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if not is_address(node.id):
            return node
        module, _, own = node.id.partition(":")
        return ast.copy_location(ast.Name(self.names.get(node.id, own or module), node.ctx), node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)
