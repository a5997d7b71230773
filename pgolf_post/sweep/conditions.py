"""`only_if`: a condition on a trial's own facts, such as `headroom_bytes >= 0 and screen_low_bpb <= 0.001`.

Names, numbers, + - * /, comparisons, `and`, `or`, `not`; nothing else is read, nothing is ever executed. A condition
on a fact that is not known (its stage did not run) does not hold.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from pgolf_post.errors import SettingsError
from pgolf_post.sweep.stages import STAGES

SCORE_FACTS = ("bpb", "difference_bpb", "low_bpb", "high_bpb")  # of each scoring stage
SIZES = ("predicted_bytes", "artifact_bytes", "total_bytes", "headroom_bytes", "budget_bytes")
FACTS = SIZES + tuple(f"{stage}_{fact}" for stage in STAGES for fact in SCORE_FACTS)
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


def check_condition(text: str) -> None:
    """Raise SettingsError for a condition that cannot be read or names no fact."""
    if text:
        _value(_parse(text), dict.fromkeys(FACTS, 1.0), text)


def holds(text: str, facts: Mapping[str, float | None]) -> bool:
    """Whether a condition holds for these facts; the empty one does."""
    if not text:
        return True
    tree = _parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if any(facts.get(name) is None for name in names):
        return False
    return bool(_value(tree, facts, text))


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        raise SettingsError(f"only_if = {text!r} is no condition; for example: headroom_bytes >= 0") from None


def _value(node: ast.expr, facts: Mapping[str, float | None], text: str) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            if name not in facts:
                raise SettingsError(f"only_if = {text!r}: no fact {name!r}; there are: {', '.join(FACTS)}")
            return facts[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, facts, text)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, facts, text)
        case ast.BoolOp(op=kind, values=parts):
            values = [bool(_value(part, facts, text)) for part in parts]
            return all(values) if isinstance(kind, ast.And) else any(values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            try:
                return OPERATORS[type(op)](_value(left, facts, text), _value(right, facts, text))
            except ZeroDivisionError:
                raise SettingsError(f"only_if = {text!r} divides by zero") from None
        case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in OPERATORS for op in ops):
            values = [_value(part, facts, text) for part in (left, *rights)]
            pairs = zip(ops, values[:-1], values[1:], strict=True)
            return all(OPERATORS[type(op)](first, second) for op, first, second in pairs)
    raise SettingsError(f"only_if = {text!r}: {ast.unparse(node)!r} is not part of a condition")
