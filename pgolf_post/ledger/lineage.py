"""Lineage: the ledger as trees, each node with its difference to its ancestor.

A difference in bpb is shown only against a number of the same text by the same protocol: a score against an ancestor's
score with the same settings, any other number against the nearest ancestor's where both say the same tokens and bytes
of text and the same protocol, or are rows of one log that say nothing of either. Where no ancestor's compares, the tree
says why. A difference in bytes is against the nearest ancestor that has bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgolf_post.ledger.query import bpb_of, counted_bytes
from pgolf_post.ledger.schema import Row

EXTERNAL = "external:"  # a parent that is a name and no row: "the reference script", "PR #1855"
ID_DIGITS = 12


@dataclass
class Node:
    """One row in its tree. A parent that is not in the ledger is a node without a row."""

    id: str
    row: Row | None = None
    delta_bpb: float | None = None
    delta_bytes: int | None = None
    not_compared: str = ""  # why no difference in bpb is shown, where ancestors have numbers
    other_parents: tuple[str, ...] = ()
    children: list[Node] = field(default_factory=list)
    scores: dict[str, Row] = field(default_factory=dict, repr=False)  # of this very thing, by settings
    parent: Node | None = field(default=None, repr=False)

    def adopt(self, child: Node) -> None:
        self.children.append(child)
        child.parent = self
        if child.row is not None and child.row.kind == "score":
            self.scores.setdefault(child.row.settings_hash, child.row)

    def walk(self) -> Iterator[tuple[int, Node]]:
        """The node and all below it with their depth, each before its children."""
        pending = [(0, self)]
        while pending:
            depth, node = pending.pop()
            yield depth, node
            pending += [(depth + 1, child) for child in reversed(node.children)]

    def facts(self) -> dict[str, Any]:
        """The node as JSON, by its parent's id."""
        row = self.row
        told = {"kind": row.kind, "name": row.name, "verdict": row.verdict} if row else {}
        numbers = {"bpb": bpb_of(row), "counted_bytes": counted_bytes(row)} if row else {}
        deltas = {"delta_bpb": self.delta_bpb, "delta_bytes": self.delta_bytes}
        parent = self.parent.id if self.parent else None
        why = {"not_compared": self.not_compared} if self.not_compared else {}
        return {"id": self.id, "parent": parent, "in_ledger": row is not None, **told, **numbers, **deltas, **why}


def trees(rows: Sequence[Row]) -> list[Node]:
    """Return all rows but notes as trees, each once, under the first parent that is there (else the first named).

    Rows whose parents form a circle hang under the one of them that was created first.
    """
    rows = [row for row in rows if row.kind != "note"]
    by_id = _first_by_id(rows)
    nodes = {id(row): Node(row.id, row) for row in rows}
    strangers: dict[str, Node] = {}
    parents = {id(row): _parent(row, by_id) for row in rows}
    roots: list[Node] = []
    for row in rows:
        known, parent_id = parents[id(row)]
        node = nodes[id(row)]
        node.other_parents = tuple(other for other in row.parents if other != parent_id)
        if known is not None and not _is_circle(row, parents):
            nodes[id(known)].adopt(node)
        elif parent_id is not None and known is None:
            if parent_id not in strangers:
                strangers[parent_id] = Node(parent_id)
                roots.append(strangers[parent_id])
            strangers[parent_id].adopt(node)
        else:
            roots.append(node)
    for root in roots:
        _measure(root)
    return roots


def tree_of(rows: Sequence[Row], row: Row) -> Node | None:
    """Return the tree of one row: the line of its ancestors, and all that came from it. None for a note."""
    every = (node for root in trees(rows) for _, node in root.walk())
    at = next(
        (node for node in every if node.row is not None and (node.row.kind, node.row.id) == (row.kind, row.id)), None
    )
    while at is not None and at.parent is not None:
        at.parent.children = [at]
        at = at.parent
    return at


def ancestors(rows: Sequence[Row], row: Row) -> list[Row]:
    """Return all rows that a row was made of, and those that they were made of, the oldest first."""
    by_id, found, pending = _first_by_id(rows), dict[int, Row](), [row]
    while pending:
        for parent in pending.pop().parents:
            known = by_id.get(parent) or by_id.get(parent[:ID_DIGITS] if _is_hex(parent) else parent)
            if known is not None and known is not row and id(known) not in found:
                found[id(known)] = known
                pending.append(known)
    return sorted(found.values(), key=lambda each: each.created)


def _first_by_id(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by id, and by the id's first digits, which is how folders are named."""
    by_id: dict[str, Row] = {}
    for row in rows:
        by_id.setdefault(row.id, row)
        by_id.setdefault(row.id[:ID_DIGITS], row)
    return by_id


def _parent(row: Row, by_id: dict[str, Row]) -> tuple[Row | None, str | None]:  # the parent's row, its id as named
    for parent in row.parents:
        known = by_id.get(parent) or by_id.get(parent[:ID_DIGITS] if _is_hex(parent) else parent)
        if known is not None and known is not row:
            return known, parent
    return None, (row.parents[0] if row.parents and row.parents[0] != row.id else None)


def _is_hex(text: str) -> bool:
    return len(text) == 64 and all(digit in "0123456789abcdef" for digit in text)


def _is_circle(row: Row, parents: dict[int, tuple[Row | None, str | None]]) -> bool:
    """Whether going from parent to parent comes back to the row, and the row is the eldest of that circle."""
    seen, at = {id(row): row}, parents[id(row)][0]
    while at is not None and id(at) not in seen:
        seen[id(at)] = at
        at = parents[id(at)][0]
    return at is row and row is min(seen.values(), key=lambda member: (member.created, member.kind, member.id))


def _measure(root: Node) -> None:
    """Fill in the differences."""
    for _, node in root.walk():
        if node.row is not None:
            line = _ancestors(node)
            node.delta_bpb, node.delta_bytes = _delta_bpb(node.row, line), _delta_bytes(node.row, line)
            if node.delta_bpb is None:
                node.not_compared = _why_not_compared(node.row, line)


def _ancestors(node: Node) -> list[Node]:
    """Nearest first."""
    line = []
    while node.parent is not None:
        node = node.parent
        line.append(node)
    return line


def _delta_bpb(row: Row, line: list[Node]) -> float | None:
    """Return the difference to the nearest comparable ancestor; else the one that an imported table states."""
    if row.kind == "comparison":
        return row.result.get("difference_bpb")
    own, told = bpb_of(row), row.result.get("delta_bpb")
    for ancestor in line if own is not None else []:
        for other in _numbers_of(ancestor):
            theirs = bpb_of(other)
            if own is not None and theirs is not None and other is not row and comparable(row, other):
                return own - theirs
    return float(told) if isinstance(told, int | float) else None


def _numbers_of(node: Node) -> list[Row]:
    """A node's row, and the scores of exactly that thing."""
    return ([node.row] if node.row is not None else []) + list(node.scores.values())


def _why_not_compared(row: Row, line: list[Node]) -> str:
    """Return how the nearest ancestor's number differs in kind; empty where there is none, or none of the row's own."""
    others = [other for ancestor in line for other in _numbers_of(ancestor) if other is not row]
    nearest = next((other for other in others if bpb_of(other) is not None), None)
    if bpb_of(row) is None or nearest is None:
        return ""
    return f"{difference_in_kind(row, nearest)} than {nearest.name or _short(nearest.id)}"


def comparable(first: Row, second: Row) -> bool:
    """Whether two rows' bpb are of the same text by the same protocol, as both of them say."""
    return not difference_in_kind(first, second)


def difference_in_kind(first: Row, second: Row) -> str:
    """Return why two rows' bpb do not compare, as "another text"; empty where they do."""
    if {first.kind, second.kind} == {"run", "checkpoint"}:
        return "another moment of the run"
    if first.kind == second.kind == "score":
        return "" if first.settings_hash == second.settings_hash else "another protocol or text"
    one, other = _measured(first), _measured(second)
    if not one and not other:  # as in imported tables and rows written by hand
        return "" if first.run == second.run else "a text of another log, perhaps other,"
    for key, what in MEASURED.items():
        if one.get(key) != other.get(key):
            return f"another {what}" if key in one and key in other else f"perhaps another {what} (one does not say)"
    same = first.result.get("protocols"), second.result.get("protocols")
    stage = one.get("protocol")
    if all(isinstance(ids, dict) for ids in same) and len({ids.get(stage) for ids in same if ids}) > 1:
        return "another protocol"
    return ""


MEASURED = {"text": "text", "tokens": "text", "bytes": "text", "protocol": "protocol"}
TEXT_COLUMNS = ("data", "dataset", "text", "val", "val set", "val data", "validation", "split", "eval set", "eval data")
PROTOCOL_COLUMNS = ("protocol", "eval", "eval type", "evaluation", "stride", "eval stride", "eval seq len")
TOKEN_COLUMNS = ("val tokens", "eval tokens", "tokens scored")


def _measured(row: Row) -> dict[str, Any]:
    """Return what a row says of the text and the protocol of its bpb."""
    result, stage = _deciding_stage(row)
    protocol = row.settings.get("protocol") or row.result.get("protocol") or stage
    said: dict[str, Any] = {key: result.get(key) for key in ("tokens", "bytes")}
    said["protocol"] = protocol.get("protocol") if isinstance(protocol, dict) else protocol

    # a column of an imported table, by its heading
    columns = {re.sub(r"[\s_-]+", " ", key).strip().casefold(): value for key, value in row.settings.items()}
    for what, names in (("text", TEXT_COLUMNS), ("protocol", PROTOCOL_COLUMNS), ("tokens", TOKEN_COLUMNS)):
        values = [str(columns[name]) for name in names if isinstance(columns.get(name), str | int)]
        if "table" in row.settings and values and said.get(what) is None:
            said[what] = ", ".join(values)
    return {key: value for key, value in said.items() if value is not None}


def _deciding_stage(row: Row) -> tuple[dict[str, Any], str | None]:
    """Return the part of a result that its bpb is of: a trial has it under the name of a stage, which is returned."""
    stages = row.result.get("protocols")
    if "tokens" not in row.result and isinstance(stages, dict):
        for stage in stages:
            part = row.result.get(stage)
            if isinstance(part, dict) and part.get("bpb") == row.result.get("bpb"):
                return part, stage
    return row.result, None


def _delta_bytes(row: Row, line: list[Node]) -> int | None:
    own = counted_bytes(row)
    for ancestor in line:
        theirs = counted_bytes(ancestor.row) if ancestor.row is not None else None
        is_itself = ancestor.row is not None and (row.kind, ancestor.row.kind) == ("score", "artifact")
        if own is not None and theirs is not None and not is_itself:
            return own - theirs
    return None


def describe(node: Node) -> str:
    """A node as one line of the drawn tree."""
    if node.row is None:
        return f"{node.id.removeprefix(EXTERNAL)}  (not in the ledger)"
    row, parts = node.row, []
    bpb, num_bytes = bpb_of(row), counted_bytes(row)
    if row.kind == "comparison":
        parts.append(_difference(row))
    elif bpb is not None:
        parts.append(f"bpb {bpb:.5f}" + _bpb_note(node))
    elif node.delta_bpb is not None:
        parts.append(f"bpb {node.delta_bpb:+.5f}")
    if num_bytes is not None:
        parts.append(f"{num_bytes:,} B" + (f" ({node.delta_bytes:+,})" if node.delta_bytes is not None else ""))
    if row.verdict:
        parts.append(row.verdict)
    if node.other_parents:
        parts.append("also from " + ", ".join(_short(other) for other in node.other_parents[:4]))
    return f"{row.kind} {row.name or _short(row.id)}" + (f"  {' · '.join(parts)}" if parts else "")


def _bpb_note(node: Node) -> str:
    if node.delta_bpb is not None:
        return f" ({node.delta_bpb:+.5f})"
    return f" (not compared: {node.not_compared})" if node.not_compared else ""


def _difference(row: Row) -> str:
    """Return a comparison's difference in bpb, with its interval where it has one."""
    interval = [row.result.get(key) for key in ("difference_bpb", "low_bpb", "high_bpb")]
    bpb, low, high = (f"{value:+.5f}" if isinstance(value, float) else "" for value in interval)
    return f"difference {bpb}" + (f" [{low} … {high}]" if low and high else "")


def _short(name: str) -> str:
    return name[:ID_DIGITS] if _is_hex(name) else name.removeprefix(EXTERNAL)


def draw(root: Node) -> str:
    """A tree as text, a line for each node; no line is cut, however wide the terminal is."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    trunk = Tree(Text(describe(root)))
    branches, longest = {id(root): trunk}, 0
    for depth, node in root.walk():
        longest = max(longest, 4 * depth + len(describe(node)))
        for child in node.children:
            branches[id(child)] = branches[id(node)].add(Text(describe(child)))
    out = io.StringIO()
    Console(file=out, width=2 * longest + 8).print(trunk)  # a letter can be two columns wide
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
