"""Python's syntax trees: walked, changed and copied in a part of the standard library's time, and asked for names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SHARED = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)  # by all trees: Python makes one of each


def children(node: ast.AST) -> list[ast.AST]:
    """Return what `ast.iter_child_nodes` yields, in its order and a third of its time."""
    found: list[ast.AST] = []
    own = node.__dict__
    for name in node._fields:
        value = own.get(name)
        if isinstance(value, ast.AST):
            found.append(value)
        elif isinstance(value, list):
            found += [each for each in value if isinstance(each, ast.AST)]
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what `ast.walk` yields, in its order."""
    todo = [node]
    for each in todo:  # which grows
        todo += children(each)
        yield each


class Transformer(ast.NodeTransformer):
    """An `ast.NodeTransformer` that goes through fields as fast as `children` does."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        own = node.__dict__
        for name in node._fields:
            value = own.get(name)
            if isinstance(value, list):
                new: list[Any] = []
                for each in value:
                    if not isinstance(each, ast.AST):
                        new.append(each)
                    elif isinstance(visited := self.visit(each), ast.AST):
                        new.append(visited)
                    elif visited is not None:
                        new += visited
                value[:] = new
            elif isinstance(value, ast.AST):
                visited = self.visit(value)
                if visited is None:
                    delattr(node, name)
                else:
                    setattr(node, name, visited)
        return node


def bound_names(node: ast.AST) -> list[str]:
    """Return the names that a statement binds where it stands, in order; not those bound inside functions of it."""
    names: dict[str, None] = {}

    def visit(part: ast.AST) -> None:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[part.name] = None
        elif isinstance(part, (ast.Lambda, *COMPREHENSIONS)):
            return
        elif isinstance(part, ast.Name) and isinstance(part.ctx, (ast.Store, ast.Del)):
            names[part.id] = None
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            names.update({alias.asname or alias.name.partition(".")[0]: None for alias in part.names})
        elif isinstance(part, ast.ExceptHandler) and part.name:
            names[part.name] = None
            for child in children(part):
                visit(child)
        else:
            for child in children(part):
                visit(child)

    visit(node)
    return list(names)


def name_of(node: ast.expr) -> str:
    """Return the address of a base or decorator, without its arguments."""
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def parameters(node: Function) -> list[ast.arg]:
    """Return all parameters of a function."""
    own = node.args
    some = [*own.posonlyargs, *own.args, *own.kwonlyargs]
    return some + [each for each in (own.vararg, own.kwarg) if each is not None]


def copied_tree(part: Any) -> Any:
    """Return a copy of a tree down to its constants: a tenth of the time of `copy.deepcopy`."""
    if isinstance(part, list):
        return [copied_tree(each) for each in part]
    if not isinstance(part, ast.AST) or isinstance(part, SHARED):
        return part
    new, own = type(part)(), vars(part)
    vars(new).update({name: value for name, value in own.items() if not isinstance(value, (ast.AST, list))})
    vars(new).update({name: copied_tree(own[name]) for name in part._fields if name in own})
    return new
