"""Modules as tables of definitions in which every global name says where it comes from.

The amalgamator writes one file from definitions of many. Two of them may have one name, and one definition may be known
under several, so names are resolved first: in a definition taken from here, a global name is its *address*,
"package.module:name" ("package.module:" for a module itself), and a plain name is a local one. Names are resolved as
Python does, statically: parameters and whatever a function binds are local to it, imports are followed to the module
that defines the name, wherever they stand.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pgolf_post.errors import MismatchError
from pgolf_post.submit.trees import (
    Function,
    Transformer,
    bound_names,
    parameters,
    walk,
)

BUILTINS = frozenset(dir(builtins)) | {"__file__", "__name__"}


def address(module: str, name: str = "") -> str:
    """Return the address of a module's global, or of the module itself."""
    return f"{module}:{name}"


def is_address(name: str) -> bool:
    """Return whether a name in a resolved tree is global."""
    return ":" in name


@dataclass
class Definition:
    """One top-level statement that binds names, with its global names resolved."""

    module: str
    names: tuple[str, ...]
    order: int  # place in its module
    node: ast.stmt

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address(self.module, name) for name in self.names)


@dataclass
class Module:
    """A parsed module: what its global names stand for, and its definitions by name."""

    name: str
    tree: ast.Module
    bindings: dict[str, str] = field(default_factory=dict)  # name → address
    submodules: set[str] = field(default_factory=set)  # external ones, imported by their dotted names


class Sources:
    """The modules of some packages, read on demand; `replaced` gives the source of a module in place of its file."""

    def __init__(self, packages: Iterable[str], replaced: Mapping[str, str] | None = None) -> None:
        self.packages, self.replaced = tuple(packages), dict(replaced or {})
        self.modules: dict[str, Module] = {}
        self.definitions: dict[str, Definition] = {}  # by address
        self.aliases: dict[str, str] = {}  # address of an external name → what our modules call it

    def is_own(self, module: str) -> bool:
        """Return whether a module belongs to the packages."""
        return module.partition(".")[0] in self.packages and self._source_path(module) is not None

    def module(self, name: str) -> Module:
        """Return a module with its bindings; its definitions are then in `definitions`."""
        if name not in self.modules:
            path = self._source_path(name)
            assert path is not None, name
            text = self.replaced.get(name) or path.read_text("utf-8")
            module = self.modules[name] = Module(name, ast.parse(text, str(path)))
            self._bind(module, path.name == "__init__.py")
            self._define(module)
        return self.modules[name]

    def definition(self, at: str) -> Definition:
        """Return the definition at an address. Raises MismatchError if the module does not define the name."""
        module, _, name = at.partition(":")
        self.module(module)
        if at not in self.definitions:
            raise MismatchError(f"{module} does not define {name!r}")
        return self.definitions[at]

    def replace(self, at: str, source: str, names: Mapping[str, str] | None = None) -> None:
        """Put another definition at an address; `names` are further globals of it and their addresses."""
        old = self.definition(at)
        module = self.module(old.module)
        scope = Module(module.name, module.tree, {**module.bindings, **(names or {})}, module.submodules)
        node = _Resolver(self, scope).visit(ast.parse(source).body[0])
        new = Definition(old.module, old.names, old.order, node)
        self.definitions.update(dict.fromkeys(old.addresses, new))

    # ---- bindings --------------------------------------------------------------------------------------------------

    def _source_path(self, module: str) -> Path | None:
        return _source_path(module)

    def _bind(self, module: Module, is_package: bool) -> None:
        for node in _statements(module.tree.body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.bind_import(node, module, is_package)
            else:
                module.bindings.update({name: address(module.name, name) for name in bound_names(node)})

    def bind_import(self, node: ast.Import | ast.ImportFrom, module: Module, is_package: bool = False) -> None:
        """Add what an import statement binds."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                module.bindings[alias.asname or top] = self._named(address(top), alias.asname or top)
                module.submodules.add(alias.name)
            return
        parts = module.name.split(".")[: len(module.name.split(".")) + is_package - node.level] if node.level else []
        source = ".".join([*parts, *filter(None, [node.module])])
        for alias in node.names:
            target = self._imported(source, alias.name)
            module.bindings[alias.asname or alias.name] = self._named(target, alias.asname or alias.name)

    def _named(self, target: str, name: str) -> str:
        self.aliases.setdefault(target, name)
        return target

    def _imported(self, source: str, name: str) -> str:
        """Return the address of `from source import name`, through modules that import it themselves."""
        if not self.is_own(source):
            return address(source, name)
        if _source_path(f"{source}.{name}") is not None:
            return address(f"{source}.{name}")
        return self.module(source).bindings.get(name, address(source, name))

    def _define(self, module: Module) -> None:
        resolver = _Resolver(self, module)
        for order, node in enumerate(module.tree.body):
            names = () if isinstance(node, (ast.Import, ast.ImportFrom)) else bound_names(node)
            if names:
                definition = Definition(module.name, tuple(names), order, resolver.visit(node))
                self.definitions.update(dict.fromkeys(definition.addresses, definition))


@cache
def _source_path(module: str) -> Path | None:
    """Return a module's file; None where it has none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _statements(body: list[ast.stmt]) -> Iterable[ast.stmt]:
    """Yield top-level statements, those under `if TYPE_CHECKING` included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
        else:
            yield node


class _Resolver(Transformer):
    """Replace global names by their addresses; imports inside functions are resolved and dropped."""

    def __init__(self, sources: Sources, module: Module) -> None:
        self.sources, self.module = sources, module
        self.scopes: list[dict[str, str | None]] = []  # local name → None, or the address that an import gave it

    def _look_up(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name] or name
        if name in self.module.bindings:
            return self.module.bindings[name]
        return name

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.copy_location(ast.Name(self._look_up(node.id), node.ctx), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        value = self.visit(node.value)
        if isinstance(value, ast.Name) and value.id.endswith(":"):  # an attribute of a module
            module = value.id[:-1]
            if self.sources.is_own(module):
                return ast.copy_location(ast.Name(self.sources._imported(module, node.attr), node.ctx), node)
            if f"{module}.{node.attr}" in self.module.submodules:
                target = self.sources._named(address(f"{module}.{node.attr}"), node.attr)
                return ast.copy_location(ast.Name(target, node.ctx), node)
        return ast.copy_location(ast.Attribute(value, node.attr, node.ctx), node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        # decorators, defaults and annotations are read outside
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        self._visit_signature(node)
        if node.returns is not None:
            node.returns = self.visit(node.returns)

        # the body has a scope of its own; imports in it are known from its start
        names = {arg.arg: None for arg in parameters(node)}
        names.update(dict.fromkeys(name for each in node.body for name in bound_names(each)))
        scope: dict[str, str | None] = dict(names)
        self.scopes.append(scope)
        for each in walk(node):
            if isinstance(each, (ast.Import, ast.ImportFrom)):
                inner = Module(self.module.name, self.module.tree)
                self.sources.bind_import(each, inner)
                scope.update(inner.bindings)
        node.body = self._visit_all(node.body)
        self.scopes.pop()
        return node

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def _visit_signature(self, node: Function) -> None:
        own = node.args
        own.defaults = [self.visit(each) for each in own.defaults]
        own.kw_defaults = [each and self.visit(each) for each in own.kw_defaults]
        for arg in parameters(node):
            if arg.annotation is not None:
                arg.annotation = self.visit(arg.annotation)

    def _visit_all(self, body: list[ast.stmt]) -> list[ast.stmt]:
        visited = [self.visit(each) for each in body]
        return [each for each in visited if each is not None] or [ast.Pass()]

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        return None if self.scopes else node

    visit_ImportFrom = visit_Import  # type: ignore[assignment]

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self._visit_signature(node)
        self.scopes.append({arg.arg: None for arg in parameters(node)})
        node.body = self.visit(node.body)
        self.scopes.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.bases = [self.visit(each) for each in node.bases]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)

        # names of the body are seen by its statements, not by its methods
        own: dict[str, str | None] = dict.fromkeys(name for each in node.body for name in bound_names(each))
        body = []
        for each in node.body:
            is_method = isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
            if not is_method:
                self.scopes.append(own)
            body.append(self.visit(each))
            if not is_method:
                self.scopes.pop()
        node.body = [each for each in body if each is not None] or [ast.Pass()]
        return node

    def _comprehension(self, node: ast.AST) -> ast.AST:
        generators: list[ast.comprehension] = node.generators  # type: ignore[attr-defined]
        targets = [part.id for each in generators for part in walk(each.target) if isinstance(part, ast.Name)]
        generators[0].iter = self.visit(generators[0].iter)  # the first is read outside
        self.scopes.append(dict.fromkeys(targets))
        for index, each in enumerate(generators):
            each.target = self.visit(each.target)
            if index:
                each.iter = self.visit(each.iter)
            each.ifs = [self.visit(test) for test in each.ifs]
        for name in ("elt", "key", "value"):
            if hasattr(node, name):
                setattr(node, name, self.visit(getattr(node, name)))
        self.scopes.pop()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension
