"""Tables in Markdown, and cells that would end one."""

from __future__ import annotations

import pytest

from pgolf_post.base.markdown import markdown_cell, markdown_table


def test_a_table_is_a_header_a_line_and_its_rows() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


@pytest.mark.parametrize(
    ("text", "cell"), [("x|y", r"x\|y"), ("x\r\ny", "x<br>y"), (r"C:\x", r"C:\\x"), ("plain", "plain")]
)
def test_a_cell_holds_what_would_end_it(text: str, cell: str) -> None:
    assert markdown_cell(text) == cell
