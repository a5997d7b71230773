"""Definitions without what a handed-in program never does: other settings, messages, checks that translate errors.

Expressions whose value is known are written as that value, and branches that they decide are left out. A guard becomes
an assertion, so that a rule that is broken still stops the program: `if wrong: raise SomeError(message)` is
`assert not wrong`. Handlers that only turn one error into another go; so do calls that only talk to people.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from pgolf_post.settings import Settings
from pgolf_post.submit.calls import called
from pgolf_post.submit.facts import UNKNOWN, Partly, Scope
from pgolf_post.submit.known import Evaluator
from pgolf_post.submit.literals import literal
from pgolf_post.submit.sources import Definition, is_address
from pgolf_post.submit.syntax import acts, assignments
from pgolf_post.submit.trees import Transformer, copied_tree, parameters, walk

EMPTY = (ast.Pass,)
KNOWN_OBJECT = "known"  # mark of a None that stands for a known object


def is_known_object(node: ast.expr) -> bool:
    """Return whether an expression is a None that stands for a known object."""
    return isinstance(node, ast.Constant) and node.kind == KNOWN_OBJECT


class Reducer:
    """Reduce definitions, a pass at a time: what one pass decides, the next may build on."""

    def __init__(self, evaluator: Evaluator, silent: frozenset[str]) -> None:
        self.evaluator, self.silent = evaluator, silent

    def reduce(self, definition: Definition) -> None:
        """Reduce a definition in place, once."""
        owner = definition if isinstance(definition.node, ast.ClassDef) else None
        with self.evaluator.remembering():
            reduced = _Reduction(self, Scope({}, owner)).visit(definition.node)
        assert isinstance(reduced, ast.stmt)
        definition.node = reduced


class _Reduction(Transformer):
    def __init__(self, reducer: Reducer, scope: Scope) -> None:
        self.reducer, self.evaluator, self.scope = reducer, reducer.evaluator, scope

    # ---- expressions -----------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) and _is_read(node):
            written = self._written(node)
            if written is not None:
                return ast.copy_location(written, node)
        return super().visit(node)

    def _written(self, node: ast.expr) -> ast.expr | None:
        """Return an expression's value as source, if it is known and short; None to leave the expression."""
        if isinstance(node, ast.Name) and is_address(node.id):
            return None
        value = self.evaluator.value(node, self.scope)
        if value is UNKNOWN or isinstance(value, Partly):
            return None
        if isinstance(value, Settings):
            return ast.Constant(None, KNOWN_OBJECT)  # it is still handed on, and not read (`check_known`)
        is_answer = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        is_answer = is_answer and node.func.id in self.evaluator.facts.answers  # type: ignore[attr-defined]
        written = literal(value, records=is_answer)
        return written if written is None or ast.dump(written) != ast.dump(node) else None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write the argument in place of a call of a function that only returns it."""
        world = self.evaluator.world
        place = world.passing.get(called(node.func)) if world is not None and not node.keywords else None
        if place is None or place >= len(node.args) or any(isinstance(each, ast.Starred) for each in node.args):
            return self.generic_visit(node)
        others = [node.func, *(each for number, each in enumerate(node.args) if number != place)]
        return self.generic_visit(node) if any(acts(each) for each in others) else self.visit(node.args[place])

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Leave out operands that decide nothing, and what comes after one that decides."""
        decides = isinstance(node.op, ast.Or)
        kept: list[ast.expr] = []
        for operand in node.values:
            value = self.evaluator.value(operand, self.scope)
            if value is not UNKNOWN and bool(value) != decides and operand is not node.values[-1]:
                continue
            kept.append(self.visit(operand))
            if value is not UNKNOWN and bool(value) == decides:
                break
        node.values = kept
        return kept[0] if len(kept) == 1 else node

    def _condition(self, node: ast.expr) -> ast.expr:
        """Return a condition without operands that never decide it: only its truth is asked for."""
        if not isinstance(node, ast.BoolOp):
            return node
        decides = isinstance(node.op, ast.Or)
        truths = [self.evaluator.truth(each, self.scope) for each in node.values]
        kept = [
            self._condition(each)
            for each, truth in zip(node.values, truths, strict=True)
            if truth is UNKNOWN or truth == decides or acts(each)
        ]
        node.values = kept
        return node if len(kept) > 1 else kept[0] if kept else ast.Constant(not decides)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        test = self.evaluator.truth(node.test, self.scope)
        if test is not UNKNOWN:
            return self.visit(node.body if test else node.orelse)
        self.generic_visit(node)
        node.test = self._condition(node.test)
        return node

    # ---- statements ------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.args.defaults = [self.visit(each) for each in node.args.defaults]
        node.args.kw_defaults = [each and self.visit(each) for each in node.args.kw_defaults]
        outer = self.scope
        for name in _unset_at_first(node):
            trial = copied_tree(node)
            self._reduce_body(trial, outer, {name: None}, keep_unread=True)
            if all(isinstance(each, ast.Constant) and each.value is None for each in _values_of(trial, name)):
                node.body = trial.body
        self._reduce_body(node, outer, {})
        return node

    def _reduce_body(
        self, node: ast.FunctionDef, outer: Scope, assumed: dict[str, Any], keep_unread: bool = False
    ) -> None:
        """Reduce a function's body in place, as if some of its locals were constant."""
        own = self.scope = self.evaluator.scope(node, outer)
        own.locals.update(assumed)
        node.body = self._body(node.body)
        self.scope = outer
        if not keep_unread:
            _drop_unused_locals(node, lambda value: self.evaluator.value(value, own) is not UNKNOWN)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        outer, self.scope = self.scope, self.evaluator.scope(node, self.scope)
        node.body = self.visit(node.body)
        self.scope = outer
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.body = [self.visit(each) for each in node.body]
        return node

    def _comprehension(self, node: ast.AST) -> ast.AST:
        """Names that a comprehension binds are not those of the function around it."""
        outer = self.scope
        generators: list[ast.comprehension] = node.generators  # type: ignore[attr-defined]
        targets = {part.id for each in generators for part in walk(each.target) if isinstance(part, ast.Name)}
        self.scope = Scope({name: v for name, v in outer.locals.items() if name not in targets}, outer.owner)
        self.generic_visit(node)
        self.scope = outer
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def _body(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Reduce a list of statements; nothing follows one that leaves."""
        out: list[ast.stmt] = []
        for node in body:
            for each in self._statement(node):
                out.append(each)
                if isinstance(each, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                    return out
        return out or [ast.Pass()]

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        if isinstance(node, ast.If):
            return self._if(node)
        if isinstance(node, ast.Assert) and not _guards(node):
            return []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            return [ast.copy_location(ast.Raise(ast.Name("RuntimeError", ast.Load()), None), node)]
        if isinstance(node, ast.Expr) and self._is_silent(node.value):
            return []
        if isinstance(node, ast.Try):
            return self._try(node)
        if isinstance(node, (ast.For, ast.While, ast.With)):
            body = node.body
            node.body = []
            self.generic_visit(node)
            node.body = self._body(body)
            if isinstance(node, ast.With):
                return self._with(node)
            node.orelse = self._body(node.orelse) if node.orelse else []
            return [node]
        visited = self.visit(node)
        return [] if isinstance(visited, EMPTY) else [visited]

    def _with(self, node: ast.With) -> list[ast.stmt]:
        """Leave out contexts that only talk, once nothing reads what they give."""
        read = {each.id for part in node.body for each in walk(part) if isinstance(each, ast.Name)}
        node.items = [
            each
            for each in node.items
            if not self._is_silent(each.context_expr)
            or (isinstance(each.optional_vars, ast.Name) and each.optional_vars.id in read)
        ]
        return [node] if node.items else node.body

    def _is_silent(self, node: ast.expr) -> bool:
        if not isinstance(node, ast.Call):
            return False
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return name in self.reducer.silent

    def _if(self, node: ast.If) -> list[ast.stmt]:
        test = self.evaluator.truth(node.test, self.scope)
        if test is not UNKNOWN:
            chosen = node.body if test else node.orelse
            return [each for each in self._body(chosen) if not isinstance(each, EMPTY)] if chosen else []
        node.test = self._condition(self.visit(node.test))
        is_guard = _only_raises(node.body)
        if is_guard and not node.orelse:
            negated = ast.copy_location(ast.Assert(ast.UnaryOp(ast.Not(), node.test), ast.Constant("rule")), node)
            return [ast.fix_missing_locations(negated)]
        node.body = self._body(node.body)
        node.orelse = [e for e in self._body(node.orelse) if not isinstance(e, EMPTY)] if node.orelse else []
        if all(isinstance(each, EMPTY) for each in node.body) and not node.orelse and not acts(node.test):
            return []
        return [node]

    def _try(self, node: ast.Try) -> list[ast.stmt]:
        """Leave out handlers that always end in another error."""
        node.handlers = [each for each in node.handlers if not _leaves_by_error(each.body)]
        if not node.handlers and not node.finalbody:
            return self._body([*node.body, *node.orelse])
        node.body = self._body(node.body)
        for handler in node.handlers:
            handler.body = self._body(handler.body)
        node.finalbody = [e for e in self._body(node.finalbody) if not isinstance(e, EMPTY)] if node.finalbody else []
        return [node]


def _is_read(node: ast.expr) -> bool:
    return isinstance(getattr(node, "ctx", ast.Load()), ast.Load) and not isinstance(node, (ast.Starred, ast.Slice))


def _guards(node: ast.Assert) -> bool:
    """Whether an assertion was made of a guard, here; ours are for the type checker and go."""
    return isinstance(node.msg, ast.Constant) and node.msg.value == "rule"


def _only_raises(body: list[ast.stmt]) -> bool:
    """Whether statements only work out a message and raise."""
    *before, last = body
    return isinstance(last, ast.Raise) and last.exc is not None and all(isinstance(e, ast.Assign) for e in before)


def _leaves_by_error(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise) and isinstance(body[-1].exc, ast.Call)


def _drop_unused_locals(node: ast.FunctionDef, is_known: Callable[[ast.expr], bool]) -> None:
    """Leave out assignments to locals that nothing reads, of values that are known or take no call; so idle loops."""
    read = {each.id for each in walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    kept_names = {name for each in walk(node) if isinstance(each, (ast.Global, ast.Nonlocal)) for name in each.names}

    def is_dead(each: ast.stmt) -> bool:
        targets: list[ast.expr]
        if isinstance(each, ast.AnnAssign):
            targets, value = [each.target], each.value
        elif isinstance(each, ast.For):
            is_idle = not each.orelse and all(isinstance(part, EMPTY) for part in each.body)
            targets, value = [each.target] if is_idle else [], each.iter
        else:
            targets, value = (each.targets, each.value) if isinstance(each, ast.Assign) else ([], None)
        if len(targets) != 1 or value is None or (acts(value) and not is_known(value)):
            return False
        names = targets[0].elts if isinstance(targets[0], ast.Tuple) else targets
        return all(isinstance(n, ast.Name) and n.id not in read | kept_names and not is_address(n.id) for n in names)

    for part in walk(node):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(part, field, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                alive = [each for each in body if not is_dead(each)]
                setattr(part, field, alive or ([ast.Pass()] if field == "body" else []))


def _unset_at_first(node: ast.FunctionDef) -> list[str]:
    """Return locals that are None at first and something else later, perhaps in branches that are never taken."""
    asked = {each.left.id for each in walk(node) if isinstance(each, ast.Compare) and isinstance(each.left, ast.Name)}
    pairs = [(t.id, v) for t, v in assignments(node.body) if isinstance(t, ast.Name) and t.id in asked]
    names = [name for name, v in pairs if isinstance(v, ast.Constant) and v.value is None]
    is_shared = any(isinstance(each, (ast.Global, ast.Nonlocal)) for each in walk(node))
    given = {each.arg for each in parameters(node)}  # set before that
    return [] if is_shared else [name for name in names if len(_values_of(node, name)) > 1 and name not in given]


def _values_of(node: ast.FunctionDef, name: str) -> list[ast.expr | None]:
    """Return what a function assigns to a local, None for what is not one expression."""
    pairs = assignments([each for each in walk(node) if isinstance(each, ast.stmt)])
    values = [value for target, value in pairs if isinstance(target, ast.Name) and target.id == name]
    stores = [e for e in walk(node) if isinstance(e, ast.Name) and e.id == name and not isinstance(e.ctx, ast.Load)]
    return [*values, *[None] * (len(stores) - len(values))]


def copied(definition: Definition) -> Definition:
    """Return a definition whose tree can be changed."""
    return Definition(definition.module, definition.names, definition.order, copied_tree(definition.node))
