"""The page's laws: one file, nothing from elsewhere, every value is text, every figure has its table."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from pgolf_post.report.blocks import Branch, Cell, Figure, Section, Table, Tree, label, lines, number
from pgolf_post.report.page.render import figure_json, render, write_report
from pgolf_post.report.sections.table import sections_of
from pgolf_post.report.subject import Subject
from tests.report.conftest import HOSTILE, QUOTED, TRIALS

NAMES = [
    *("runs", "checkpoints", "artifacts", "diagnostics", "attribution", "divergence"),
    *("breakdowns", "sweeps", "audits", "lineage", "commands"),
]


class Page(HTMLParser):
    """The tags of a page with their attributes, the text outside scripts, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def sections(full: Subject) -> list[Section]:
    return sections_of(full)


@pytest.fixture(scope="module")
def html(full: Subject, sections: list[Section]) -> str:
    return render(full, sections, f"pgolf-post report '{HOSTILE}'")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def figures(sections: list[Section]) -> list[Figure]:
    return [block for section in sections for block in section.blocks if isinstance(block, Figure)]


def test_every_kind_of_result_has_its_section(sections: list[Section]) -> None:
    assert [section.name for section in sections] == NAMES


def test_it_is_one_small_file(html: str) -> None:
    assert len(html.encode()) <= 6_000_000
    assert html.count("</html>") == 1


def test_nothing_is_asked_from_elsewhere(page: Page) -> None:
    assert not {"iframe", "object", "embed", "img", "form", "base"} & {tag for tag, _ in page.tags}
    links = [attributes["href"] for tag in ("a", "link") for attributes in page.all(tag)]
    assert {link for link in links if link and not link.startswith("#")} == {"data:,"}
    assert not any("src" in attributes for _, attributes in page.tags)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in policy


def test_every_value_is_text(page: Page, html: str) -> None:
    running = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert len(running) == 2
    assert not any("alert(" in text for text in running)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7*7 }}" in html
    shown = " ".join(page.text)
    assert HOSTILE in shown
    assert QUOTED in shown


def test_figures_hold_no_markup_but_line_breaks(sections: list[Section]) -> None:
    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for one in value.values() for text in texts(one)]
        if isinstance(value, list):
            return [text for one in value for text in texts(one)]
        return [value] if isinstance(value, str) else []

    for figure in figures(sections):
        for text in texts(figure_json(figure)):
            assert not re.search(r"<(?!br>|extra>|/extra>)", text), text


def test_plotly_knows_every_property(sections: list[Section]) -> None:
    for figure in figures(sections):
        plotly.graph_objects.Figure(figure_json(figure))  # raises ValueError for a name or value it does not know


def test_each_figure_has_its_table_and_is_named_to_a_reader_of_the_screen(page: Page, sections: list[Section]) -> None:
    drawn = [attributes for attributes in page.all("div") if attributes.get("class") == "plot"]
    assert len(drawn) == len(figures(sections)) > 8
    for attributes, figure in zip(drawn, figures(sections), strict=True):
        assert attributes["role"] == "img"
        assert attributes["aria-label"] == f"{figure.title}. {figure.summary}"
        assert figure.table.rows
        assert all(len(row) == len(figure.table.header) for row in figure.table.rows)
    regions = [attributes["aria-label"] for attributes in page.all("div") if attributes.get("role") == "region"]
    landmarks = Counter([*regions, *(section.title for section in sections)])
    assert [name for name, times in landmarks.items() if times > 1] == []
    captions = Counter(attributes["aria-label"] for attributes in page.all("div") if "tabindex" in attributes)
    assert all(captions[figure.table.title] for figure in figures(sections))


def test_headings_and_anchors_fit_together(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"] for link in page.all("a")]
    assert all(target and target[1:] in ids for target in targets)
    labels = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(labels) <= set(ids)
    order = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert order[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(order))


def test_a_sweeps_table_has_every_trial(sections: list[Section]) -> None:
    (sweep,) = next(section for section in sections if section.name == "sweeps").blocks
    assert isinstance(sweep, Figure)
    assert len(sweep.table.rows) == TRIALS
    shown = [float(row[4].value) for row in sweep.table.rows if row[4].value is not None]
    assert shown == sorted(shown)
    assert sweep.traces[0]["x"] == shown[: len(sweep.traces[0]["x"])]


def test_a_failed_audit_stands_first(sections: list[Section]) -> None:
    (table,) = next(section for section in sections if section.name == "audits").blocks
    assert isinstance(table, Table)
    assert [row[1].shown for row in table.rows] == ["FAIL", "pass"]


def test_it_is_written_in_one_step(full: Subject, tmp_path: Path) -> None:
    size = write_report(full, tmp_path / "report.html", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size == size


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_a_deep_tree_is_walked_without_recursion() -> None:
    branch = Branch("leaf")
    for depth in range(5000):
        branch = Branch(f"node {depth}", [branch, Branch("side")])
    steps = list(Tree("deep", [branch]).steps())
    kinds = Counter(step.kind for step in steps)
    assert kinds == {"open": 5000, "close": 5000, "leaf": 5001}
    level, deepest = 0, 0
    for step in steps:
        level += {"open": 1, "close": -1, "leaf": 0}[step.kind]
        deepest = max(deepest, level)
        assert level >= 0
    assert (level, deepest) == (0, 5000)


def test_cells_numbers_and_labels() -> None:
    assert number(None) == Cell("")
    assert number(1234567, "+,") == Cell("+1,234,567", 1234567.0)
    assert label("<b>&amp;") == "&lt;b&gt;&amp;amp;"
    assert lines(["ab", "<x>", ""], width=1) == "a<br>b<br>&lt;<br>x<br>&gt;<br>"
    assert Table("t", ("a", "b"), [(Cell("x"), number(1))]).numeric == [False, True]
    assert Table("t", ("a",), []).numeric == [False]
    once = Table("t", ("a",), [(number(1),)])
    assert once.numeric is once.numeric  # asked for by every row of the page


def test_what_is_not_finite_is_null() -> None:
    figure = Figure("t", "s", [{"y": [1.0, float("nan"), float("inf")]}], {"a": (1, True)}, Table("t", ("a",), []))
    assert figure_json(figure) == {"data": [{"y": [1.0, None, None]}], "layout": {"a": [1, True]}}
