"""Plain tables: at most 80 columns, nothing cut, whatever is in them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.base.plain_tables import PLAIN_WIDTH, plain_table

WORDS = st.text(st.characters(categories=["L", "N", "P"]), max_size=30)
CELLS = st.lists(WORDS, max_size=12).map(" ".join)


def test_columns_after_the_first_are_right_aligned() -> None:
    assert plain_table(("name", "bytes"), [("fit", "383,340"), ("a longer name", "9")]) == [
        "name             bytes",
        "fit            383,340",
        "a longer name        9",
    ]


def test_a_long_first_column_is_folded_and_the_rest_stands_on_its_first_line() -> None:
    lines = plain_table(("what", "bpb"), [("word " * 30, "2.17222")])
    assert lines[1].endswith("2.17222")
    assert len(lines) > 3
    assert "".join(lines).count("word") == 30


def test_a_row_that_is_too_wide_becomes_lines_of_one_value_each() -> None:
    header = ("name", *(f"column {n}" for n in range(8)))
    lines = plain_table(header, [("a", *("0.123456789" for _ in range(7)), "")])
    assert lines == ["a", *(f"  column {n}  0.123456789" for n in range(7))]


def test_a_pair_stays_on_one_line_however_wide() -> None:
    assert plain_table(("", "value"), [("hint", "x" * 90)]) == ["hint  " + "x" * 90]


@given(st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_every_word_of_every_table_is_printed(rows: list[list[str]]) -> None:
    header = [f"h{n}" for n in range(len(rows[0]))]
    printed = "\n".join(plain_table(header, rows))
    for row in rows:
        for cell in row:
            assert all(word in printed.replace("\n", "") or word in printed for word in cell.split() if len(word) < 16)


@given(st.lists(st.tuples(CELLS, st.integers(), st.floats()), min_size=1, max_size=5))
def test_no_line_is_wider_than_eighty_columns(rows: list[tuple[str, int, float]]) -> None:
    cells = [(name, f"{count:,}"[:20], f"{value:.5g}") for name, count, value in rows]
    assert max(map(len, plain_table(("name", "count", "value"), cells))) <= PLAIN_WIDTH
