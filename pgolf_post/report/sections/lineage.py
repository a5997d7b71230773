"""Lineage: what was made of what, as trees to fold, with differences where numbers compare."""

from __future__ import annotations

from pgolf_post.ledger.lineage import Node, describe
from pgolf_post.report.blocks import Branch, Section, Tree
from pgolf_post.report.subject import Subject


def lineage(subject: Subject) -> Section | None:
    """Return the section of the trees of all rows but notes."""
    roots = [branch_of(root) for root in subject.trees]
    note = "A difference is shown only against a number of the same text by the same protocol."
    return Section("lineage", "Lineage", [Tree("What was made of what", roots)], note) if roots else None


def branch_of(root: Node) -> Branch:
    """Return a tree of the ledger as branches of text."""
    made: dict[int, Branch] = {}
    for _, node in root.walk():  # a node comes before its children
        made[id(node)] = Branch(describe(node))
        if node is not root and node.parent is not None:
            made[id(node.parent)].children.append(made[id(node)])
    return made[id(root)]
