"""Values known before the program runs: a handed-in script serves one model and one protocol, and asks nothing twice.

`Facts` says what is known: the settings that parameters of some class always are, attributes of a few others, answers
of functions. An expression made of nothing else has a value here, and the reducer writes the value in its place; so
`if self.config.smear_gate:` becomes one of its branches and `split_visits(config, graph.active_loops)` two lists.

Nothing is guessed: what is not known is `UNKNOWN`, and an expression is evaluated only by the operators, the builtins
and the functions listed here, or by functions of the model's own package whose arguments are all known.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from pgolf_post.settings import Settings
from pgolf_post.submit.alike import Alike
from pgolf_post.submit.calls import base_names, called
from pgolf_post.submit.facts import UNKNOWN, ByName, Facts, Instance, Partly, Scope, World, plain, unchanging
from pgolf_post.submit.sources import Definition, Sources, is_address
from pgolf_post.submit.syntax import acts, assignments, has_fields, is_own_attribute, is_stored
from pgolf_post.submit.trees import parameters, walk

CONSTANT_PARAMETERS = "constant_parameters"  # attribute of a function's node: parameter → value of every call

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
CALLED: dict[str, Callable[..., Any]] = {
    "int": int,
    "len": len,
    "bool": bool,
    "max": max,
    "min": min,
    "sum": sum,
    "sorted": sorted,
    "tuple": tuple,
    "list": list,
}


class Evaluator:
    """Evaluate expressions of resolved definitions."""

    def __init__(self, sources: Sources, facts: Facts, changed: frozenset[str] = frozenset()) -> None:
        self.sources, self.facts = sources, facts
        self.changed = changed  # attributes that are also set from outside their class: never known
        self._memory: dict[tuple[int, int], tuple[ast.expr, Scope, Any]] | None = None
        self._attributes: dict[str, dict[str, Any]] = {}  # class → attributes of self
        self.world: World | None = None  # what is constant in the whole program (world.py), once it is known
        self._bases_of, self._bases_known = -1, set[str]()  # of how many definitions, which classes are bases
        self.alike = Alike(facts.module)

    # ---- expressions -----------------------------------------------------------------------------------------------

    def value(self, node: ast.expr | None, scope: Scope) -> Any:
        """Return an expression's value, or UNKNOWN."""
        evaluate = self._BY_TYPE.get(type(node))
        if evaluate is None or node is None:
            return UNKNOWN
        key = id(node), id(scope)
        if self._memory is not None and key in self._memory:
            return self._memory[key][-1]
        try:
            value = evaluate(self, node, scope)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
            value = UNKNOWN
        if self._memory is not None and scope.is_complete:
            self._memory[key] = (node, scope, value)  # both are held, so that no other takes their place
        return value

    def truth(self, node: ast.expr, scope: Scope) -> Any:
        """Return whether a condition holds: its truth may be known where its value is not (`x and False`)."""
        value = self.value(node, scope)
        if value is not UNKNOWN:
            return bool(value)
        if isinstance(node, ast.BoolOp):
            decides = isinstance(node.op, ast.Or)
            truths = [self.truth(each, scope) for each in node.values]
            if any(truth is not UNKNOWN and truth == decides for truth in truths) and not acts(node):
                return decides
        return UNKNOWN

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep the values of expressions inside the block, while their definition is gone through from the top."""
        self._memory = {}
        try:
            yield
        finally:
            self._memory = None

    def _constant(self, node: ast.Constant, scope: Scope) -> Any:
        return node.value

    def _name(self, node: ast.Name, scope: Scope) -> Any:
        if not is_address(node.id):
            value = scope.locals.get(node.id, UNKNOWN)
            return UNKNOWN if isinstance(value, Instance) else value
        module, _, name = node.id.partition(":")
        if not name or not self.sources.is_own(module):
            return UNKNOWN
        return getattr(importlib.import_module(module), name, UNKNOWN)

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Any:
        value = self._attribute_of(node, scope)
        is_global = isinstance(node.value, ast.Name) and is_address(node.value.id)  # a module, or a class
        if value is not UNKNOWN or self.world is None or is_global or acts(node.value):
            return value
        if node.attr in self.world.attributes:
            return self.world.attributes[node.attr]
        return self.world.kinds.get(node.attr, UNKNOWN)

    def _attribute_of(self, node: ast.Attribute, scope: Scope) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and scope.owner is not None:
            return self.attributes(scope.owner).get(node.attr, UNKNOWN)
        held = scope.locals.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if isinstance(held, Instance):
            return self.attributes(held.owner).get(node.attr, UNKNOWN)
        base = self.value(node.value, scope)
        if isinstance(base, Partly):
            return UNKNOWN if node.attr in self.changed else base.attributes.get(node.attr, UNKNOWN)
        is_plain = isinstance(base, Settings) or (dataclasses.is_dataclass(base) and not isinstance(base, type))
        return getattr(base, node.attr, UNKNOWN) if is_plain else UNKNOWN

    def _binary(self, node: ast.BinOp, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        numbers = (int, float)
        if not isinstance(left, numbers) or not isinstance(right, numbers):
            return UNKNOWN
        return BINARY[type(node.op)](left, right)

    def _unary(self, node: ast.UnaryOp, scope: Scope) -> Any:
        operand = self.value(node.operand, scope)
        if operand is UNKNOWN:
            return UNKNOWN
        return not operand if isinstance(node.op, ast.Not) else -operand if isinstance(node.op, ast.USub) else UNKNOWN

    def _boolean(self, node: ast.BoolOp, scope: Scope) -> Any:
        """Return the value of `and`, `or`: known where an operand in front of all unknown ones decides."""
        decides = isinstance(node.op, ast.Or)
        value = UNKNOWN
        for operand in node.values:
            value = self.value(operand, scope)
            if value is UNKNOWN or bool(value) == decides:
                return value
        return value

    def _compare(self, node: ast.Compare, scope: Scope) -> Any:
        left = self.value(node.left, scope)
        for kind, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node, scope)
            if left is UNKNOWN or right is UNKNOWN:
                return UNKNOWN
            if not COMPARED[type(kind)](left, right):
                return False
            left = right
        return True

    def _choice(self, node: ast.IfExp, scope: Scope) -> Any:
        test = self.truth(node.test, scope)
        return UNKNOWN if test is UNKNOWN else self.value(node.body if test else node.orelse, scope)

    def _items(self, node: ast.Tuple | ast.List, scope: Scope) -> Any:
        items = [self.value(each, scope) for each in node.elts]
        if any(item is UNKNOWN for item in items):
            return UNKNOWN
        return tuple(items) if isinstance(node, ast.Tuple) else items

    def _item(self, node: ast.Subscript, scope: Scope) -> Any:
        base, index = self.value(node.value, scope), self.value(node.slice, scope)
        if isinstance(base, (tuple, list)) and base and index is UNKNOWN and not isinstance(node.slice, ast.Slice):
            return base[0] if not acts(node.slice) and all(repr(each) == repr(base[0]) for each in base) else UNKNOWN
        return UNKNOWN if base is UNKNOWN or index is UNKNOWN or isinstance(base, type) else base[index]

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in self.facts.answers:
            answer = self.facts.answers[name]
            return answer.values[self.value(node.args[0], scope)] if isinstance(answer, ByName) else answer
        if self.world is not None and (answer := self._constant_answer(node)) is not UNKNOWN:
            return answer
        if name == "hasattr":
            return self._has_attribute(node, scope)
        if name == "bool" and len(node.args) == 1:
            return self.truth(node.args[0], scope)
        arguments = [self.value(each, scope) for each in node.args]
        named = {str(each.arg): self.value(each.value, scope) for each in node.keywords}
        if any(value is UNKNOWN or isinstance(value, Partly) for value in [*arguments, *named.values()]):
            return UNKNOWN
        if name == "isinstance":
            return isinstance(arguments[0], arguments[1])
        if name == "getattr" and len(arguments) == 2 and isinstance(arguments[0], Settings):
            return getattr(*arguments)
        if name in CALLED:
            return CALLED[name](*arguments, **named)
        function = self._pure(node.func, scope)
        return UNKNOWN if function is UNKNOWN else plain(function(*arguments, **named))

    def _constant_answer(self, node: ast.Call) -> Any:
        """Return what a function or method always returns, if its arguments do nothing."""
        assert self.world is not None
        parts = [node.func, *node.args, *(key.value for key in node.keywords)]
        return UNKNOWN if any(acts(each) for each in parts) else self.world.functions.get(called(node.func), UNKNOWN)

    def _pure(self, node: ast.expr, scope: Scope) -> Any:
        """Return a function that may be called: one of a pure package, or a method of a known record of its own."""
        if isinstance(node, ast.Attribute):
            base = self.value(node.value, scope)
            is_record = dataclasses.is_dataclass(base) and not isinstance(base, (type, Partly))
            return getattr(base, node.attr) if is_record or isinstance(base, Settings) else UNKNOWN
        function = self.value(node, scope) if isinstance(node, ast.Name) and is_address(node.id) else UNKNOWN
        is_pure = isinstance(function, FunctionType) and function.__module__.partition(".")[0] in self.facts.pure
        return function if is_pure else UNKNOWN

    def _has_attribute(self, node: ast.Call, scope: Scope) -> Any:
        name = self.value(node.args[1], scope)
        if name in self.facts.absent:
            return False
        if isinstance(node.args[0], ast.Name) and node.args[0].id == "self" and scope.owner is not None:
            having = {hasattr(each, name) for each in self.alike.instances(scope.owner)}
            return having.pop() if len(having) == 1 else UNKNOWN
        return UNKNOWN

    _BY_TYPE: Mapping[Any, Callable[[Any, Any, Scope], Any]] = {
        ast.Constant: _constant,
        ast.Name: _name,
        ast.Attribute: _attribute,
        ast.BinOp: _binary,
        ast.UnaryOp: _unary,
        ast.BoolOp: _boolean,
        ast.Compare: _compare,
        ast.IfExp: _choice,
        ast.Tuple: _items,
        ast.List: _items,
        ast.Subscript: _item,
        ast.Call: _call,
    }

    # ---- scopes ----------------------------------------------------------------------------------------------------

    def scope(self, node: ast.FunctionDef | ast.Lambda, outer: Scope) -> Scope:
        """Return what is known in a function: parameters by their class, and locals assigned once."""
        known = Scope(dict(outer.locals), outer.owner, is_complete=False)
        constant = getattr(node, CONSTANT_PARAMETERS, {})
        for arg in parameters(node):
            known.locals[arg.arg] = constant.get(arg.arg, self._of_annotation(arg.annotation))
        if isinstance(node, ast.FunctionDef):
            given = {each.arg for each in parameters(node)}  # they have a value before the one that is assigned
            stores = [each.id for each in walk(node) if isinstance(each, ast.Name) and is_stored(each)]
            for name in stores:
                known.locals[name] = UNKNOWN
            for target, value in assignments([each for each in walk(node) if isinstance(each, ast.stmt)]):
                if isinstance(target, ast.Name) and stores.count(target.id) == 1 and target.id not in given:
                    known.locals[target.id] = unchanging(self.value(value, known))
        known.is_complete = True
        return known

    def _of_annotation(self, annotation: ast.expr | None) -> Any:
        if not isinstance(annotation, ast.Name) or not is_address(annotation.id):
            return UNKNOWN
        if annotation.id in self.facts.values:
            return self.facts.values[annotation.id]
        module, _, name = annotation.id.partition(":")
        if name and self.sources.is_own(module) and annotation.id in self.sources.definitions:
            owner = self.sources.definition(annotation.id)
            if isinstance(owner.node, ast.ClassDef) and annotation.id not in self._base_names():
                return Instance(owner)
        return UNKNOWN

    def _base_names(self) -> set[str]:
        """Return `base_names` of all that is in sight, as long as nothing comes into sight."""
        if len(self.sources.definitions) != self._bases_of:
            self._bases_of = len(self.sources.definitions)
            self._bases_known = base_names(self.sources.definitions.values())
        return self._bases_known

    def learn(self, definition: Definition, function: ast.FunctionDef, constant: Mapping[str, Any]) -> None:
        """Take note that every call of a function gives these parameters these values."""
        original = self.sources.definition(definition.addresses[0]).node
        for node in (function, *(each for each in walk(original) if isinstance(each, ast.FunctionDef))):
            if node.name == function.name:
                setattr(node, CONSTANT_PARAMETERS, dict(constant))
        self._attributes.clear()

    def learn_world(self, world: World) -> None:
        """Take note of what is constant in the whole program (world.py)."""
        self.world = world
        self._attributes.clear()

    def forget(self) -> None:
        """Take back everything that was learned."""
        for definition in self.sources.definitions.values():
            for node in walk(definition.node):
                if hasattr(node, CONSTANT_PARAMETERS):
                    delattr(node, CONSTANT_PARAMETERS)
        self._attributes.clear()

    def attributes(self, owner: Definition) -> dict[str, Any]:
        """Return the attributes of a class's objects that are known: assigned known values and nothing else."""
        at = owner.addresses[0]
        if at not in self._attributes:
            owner = self.sources.definition(at)  # as it was written: what is reduced says less
            self._attributes[at] = {}  # while they are being found out, none is known
            found: dict[str, Any] = {}
            for base in self._bases(owner):
                found.update(self.attributes(base))
            found.update(self.alike.shared(owner))
            for name, values in self._assigned(owner).items():
                if any(value is UNKNOWN for value in values):
                    found[name] = found.get(name, UNKNOWN) if name in self.alike.shared(owner) else UNKNOWN
                elif all(value == values[0] for value in values):
                    found[name] = unchanging(values[0])
            known = {name: value for name, value in found.items() if name not in self.changed}
            known.update(self.facts.shared.get(at, {}))
            known.update({} if self.world is None else self.world.fields.get(at, {}))
            self._attributes[at] = {name: value for name, value in known.items() if value is not UNKNOWN}
        return self._attributes[at]

    def _bases(self, owner: Definition) -> list[Definition]:
        assert isinstance(owner.node, ast.ClassDef)
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in owner.node.bases]
        names = [base.id for base in bases if isinstance(base, ast.Name) and is_address(base.id)]
        own = [name for name in names if self.sources.is_own(name.partition(":")[0])]
        return [each for name in own if isinstance((each := self.sources.definition(name)).node, ast.ClassDef)]

    def _assigned(self, owner: Definition) -> dict[str, list[Any]]:
        """Return every value that methods of a class assign to attributes of self."""
        assert isinstance(owner.node, ast.ClassDef)
        assigned: dict[str, list[Any]] = {}
        if not has_fields(owner.node):  # there, a field's default
            for target, value in assignments(owner.node.body):
                if isinstance(target, ast.Name):
                    assigned[target.id] = [self.value(value, Scope({}, owner))]
        for method in owner.node.body:
            if not isinstance(method, ast.FunctionDef):
                continue
            scope = self.scope(method, Scope({}, owner))
            for target, value in assignments(list(walk(method))):
                if is_own_attribute(target):
                    assert isinstance(target, ast.Attribute)
                    assigned.setdefault(target.attr, []).append(self.value(value, scope))
        return assigned
