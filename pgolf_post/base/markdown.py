"""Tables in Markdown: for record folders, exports of the ledger and pages of results."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. Cells are taken as they are: `markdown_cell` escapes what would end one."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def markdown_cell(text: str) -> str:
    """Return a text as one cell: pipes and backslashes escaped, line breaks as `<br>`."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
