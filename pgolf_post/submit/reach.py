"""Reachability: the definitions that a program's entry function leads to, each reduced by what is known.

From the entry function on, every global name in a definition leads to the next one (static reachability, as in a
linker). Each is reduced first (`reduce`), so that what only other settings would need is never reached. Methods and
attributes that nothing names are left out, which may leave more unreached, and so on until nothing changes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from pgolf_post.errors import MismatchError
from pgolf_post.settings import Settings
from pgolf_post.submit.calls import Calls, constant_parameters
from pgolf_post.submit.facts import settings_class
from pgolf_post.submit.foreign import foreign_names
from pgolf_post.submit.known import Evaluator
from pgolf_post.submit.reduce import Reducer, copied
from pgolf_post.submit.sources import Definition, Sources, is_address
from pgolf_post.submit.syntax import acts, assignments, has_fields
from pgolf_post.submit.trees import children, name_of, walk
from pgolf_post.submit.trim import trim
from pgolf_post.submit.world import constant_world

DROPPED_BASES = ("abc:ABC", "typing:Generic", "typing:Protocol")
DROPPED_DECORATORS = ("abc:abstractmethod", "typing:runtime_checkable", "typing:override")
BY_NAME = ("getattr", "hasattr", "setattr")
CALLED_BY_TORCH = ("forward",)
VALIDATORS = ("pydantic:field_validator", "pydantic:model_validator", "pydantic:model_serializer")
PLAIN_SETTINGS = """
def __init__(self, **values):
    self.__dict__.update(values)

def model_copy(self, update):
    return type(self)(**{**self.__dict__, **update})
"""


class Reach:
    """Definitions that an entry function reaches, reduced; `reached` and `external` are whole after `link`."""

    def __init__(
        self, sources: Sources, entry: str, evaluator: Evaluator, silent: frozenset[str], unused: frozenset[str]
    ) -> None:
        self.sources, self.entry, self.unused = sources, entry, unused
        self.reducer = Reducer(evaluator, silent)
        self.reached: dict[str, Definition] = {}  # by the address of its first name
        self.copies: dict[int, Definition] = {}
        self.external: set[str] = set()
        self.named: set[str] = set()  # attributes that reached code reads

    def link(self) -> None:
        """Reach and reduce until nothing changes."""
        before: list[str] = []
        while True:
            self._reach()
            self._shake()
            state = sorted(self.reached) + [ast.dump(each.node) for each in self.reached.values()]
            if state == before:
                return
            before = state

    def own(self, at: str) -> Definition:
        original = self.sources.definition(at)
        if id(original) not in self.copies:
            self.copies[id(original)] = self._prepared(copied(original))
        return self.copies[id(original)]

    def _prepared(self, definition: Definition) -> Definition:
        """Reduce a definition, and take from it what only type checkers and readers of tables need."""
        node = definition.node
        chosen = self._chosen_from_table(node, definition.module)
        if chosen is not None:
            assert isinstance(node, ast.Assign)
            node.value = chosen
        if isinstance(node, ast.ClassDef):
            self._plain_settings(node, definition)
            bases = [base for base in node.bases if name_of(base) not in DROPPED_BASES]
            node.bases = [base.value if isinstance(base, ast.Subscript) else base for base in bases]
            node.keywords = []
        for each in walk(node):
            if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
                each.decorator_list = [d for d in each.decorator_list if name_of(d) not in DROPPED_DECORATORS]
        for _ in range(2):  # a local that the first pass settles decides branches in the second
            self.reducer.reduce(definition)
        return definition

    def _plain_settings(self, node: ast.ClassDef, definition: Definition) -> None:
        """Make of a class of settings a plain one: it keeps its methods; values are given whole, and were checked."""
        real = settings_class(definition)
        if real is None:
            return
        if real is Settings:
            node.body, node.bases = ast.parse(PLAIN_SETTINGS).body, []
            return
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        node.body = [each for each in methods if not any(name_of(d) in VALIDATORS for d in each.decorator_list)]
        node.body = node.body or [ast.Pass()]

    def _chosen_from_table(self, node: ast.stmt, module: str) -> ast.expr | None:
        """Return the row of `NAME = TABLE["key"]` where the table is written out in the same module."""
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Subscript):
            return None
        table, key = node.value.value, node.value.slice
        if not isinstance(table, ast.Name) or not isinstance(key, ast.Constant) or not is_address(table.id):
            return None
        tree = copied(self.sources.definition(table.id)).node
        rows = getattr(tree, "value", None)
        if not isinstance(rows, ast.Dict):
            return None
        for own, row in zip(rows.keys, rows.values, strict=True):
            if isinstance(own, ast.Constant) and own.value == key.value:
                return row
        return None

    def _reach(self) -> None:
        """Find what is reached: definitions by their names, methods of reached classes by theirs."""
        self.reached, self.external = {}, set()
        named: set[str] = set(CALLED_BY_TORCH)
        done: set[int] = set()
        todo = [self.entry]
        while todo:
            units = [unit for at in todo for unit in self._arrive(at)]
            units += [unit for each in self.reached.values() for unit in self._methods(each, named)]
            todo = []
            for unit in units:
                if id(unit) not in done:
                    done.add(id(unit))
                    named.update(_attribute_names(unit))
                    todo += names_read(unit)
            if not todo:
                more = [unit for each in self.reached.values() for unit in self._methods(each, named)]
                todo = [name for unit in more if id(unit) not in done for name in ["", *names_read(unit)]]
        self.named = named

    def _arrive(self, at: str) -> list[ast.AST]:
        """Return the code that a name brings with it: a function, or a class without its methods."""
        module, _, name = at.partition(":")
        if not at:
            return []
        if not self.sources.is_own(module):
            self.external.add(at)
            return []
        if not name:
            raise MismatchError(f"{module} is used as a value, which one file cannot do")
        definition = self.own(at)
        if definition.addresses[0] in self.reached:
            return []
        self.reached[definition.addresses[0]] = definition
        if not isinstance(definition.node, ast.ClassDef):
            return [definition.node]
        methods = [each for each in definition.node.body if isinstance(each, ast.FunctionDef)]
        outside = [each for each in definition.node.body if each not in methods]
        return [*definition.node.bases, *definition.node.decorator_list, *outside]

    def _methods(self, definition: Definition, named: set[str]) -> list[ast.AST]:
        """Return the methods of a reached class that are called by a name that is read somewhere."""
        if not isinstance(definition.node, ast.ClassDef):
            return []
        methods = [each for each in definition.node.body if isinstance(each, ast.FunctionDef)]
        unused = {name.rpartition(".")[2] for name in self.unused if name.startswith(f"{definition.addresses[0]}.")}
        return [each for each in methods if _is_kept(each.name, named) and each.name not in unused]

    def _shake(self) -> None:
        """Leave out methods that are not reached, attributes of self that are only set, and learn what calls give."""
        for definition in self.reached.values():
            if isinstance(definition.node, ast.ClassDef):
                self._shake_class(definition.node, self._methods(definition, self.named))
        evaluator, calls, foreign = self.reducer.evaluator, Calls.of(self.reached), foreign_names(self.external)
        for definition, function, constant in constant_parameters(self.reached, calls):
            evaluator.learn(definition, function, constant)
        evaluator.learn_world(constant_world(self.reached, calls, evaluator, foreign))
        trim(self.reached, calls, self.named, foreign)
        for definition in self.reached.values():
            self.reducer.reduce(definition)

    def _shake_class(self, node: ast.ClassDef, live: list[ast.AST]) -> None:
        kept: list[ast.stmt] = []
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and not any(each is method for method in live):
                continue
            if isinstance(each, ast.AnnAssign) and each.value is None and not has_fields(node):
                continue  # a declaration
            if not has_fields(node) and _is_unread_constant(each, self.named):
                continue
            kept.append(each)
        for method in kept:
            if isinstance(method, ast.FunctionDef):
                _drop_unread_attributes(method, self.named)
        node.body = kept or [ast.Pass()]


def names_read(node: ast.AST, at_import: bool = False) -> list[str]:
    """Return the addresses that a definition reads, annotations left out; `at_import`: when it is defined."""
    found: dict[str, None] = {}

    def visit(part: ast.AST) -> None:
        if isinstance(part, ast.Name):
            if is_address(part.id):
                found[part.id] = None
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for each in [*getattr(part, "decorator_list", []), *part.args.defaults, *part.args.kw_defaults]:
                if each is not None:
                    visit(each)
            if not at_import:
                for each in part.body if isinstance(part.body, list) else [part.body]:
                    visit(each)
        elif isinstance(part, ast.AnnAssign):
            visit(part.target)
            if part.value is not None:
                visit(part.value)
        else:
            for each in children(part):
                visit(each)

    visit(node)
    return list(found)


def _attribute_names(node: ast.AST) -> Iterator[str]:
    """Yield every attribute that is read, and every one that is asked for by name."""
    for each in walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Load):
            yield each.attr
        elif isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Attribute):
            yield each.target.attr
        elif isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id in BY_NAME:
            yield from (a.value for a in each.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _is_kept(name: str, named: set[str]) -> bool:
    return name in named or name in CALLED_BY_TORCH or (name.startswith("__") and name.endswith("__"))


def _is_unread_constant(node: ast.stmt, named: set[str]) -> bool:
    """Whether a statement of a class gives it an attribute that nothing reads."""
    pairs = assignments([node])
    names = [target.id for target, _ in pairs if isinstance(target, ast.Name)]
    is_plain = bool(pairs) and len(names) == len(pairs) and not any(v is None or acts(v) for _, v in pairs)
    return is_plain and not any(_is_kept(name, named) for name in names)


def _drop_unread_attributes(method: ast.FunctionDef, named: set[str]) -> None:
    """Leave out `self.x = value` where nothing reads x and working out the value does nothing else."""

    def is_dead(target: ast.expr, value: ast.expr) -> bool:
        is_own = isinstance(target, ast.Attribute) and name_of(target.value) == "self"
        return is_own and target.attr not in named and not acts(value)  # type: ignore[attr-defined]

    for part in walk(method):
        body = getattr(part, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.stmt):
            continue
        kept: list[ast.stmt] = []
        for each in body:
            if isinstance(each, ast.AnnAssign) and each.value is not None and is_dead(each.target, each.value):
                continue
            if isinstance(each, ast.Assign) and len(each.targets) == 1:
                target, value = each.targets[0], each.value
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = [pair for pair in zip(target.elts, value.elts, strict=True) if not is_dead(*pair)]
                    if not pairs:
                        continue
                    target.elts, value.elts = [t for t, _ in pairs], [v for _, v in pairs]
                    if len(pairs) == 1:
                        each.targets, each.value = [pairs[0][0]], pairs[0][1]
                elif is_dead(target, value):
                    continue
            kept.append(each)
        part.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
