"""The page in a real headless Chromium, started once: drawn, quiet, offline, sortable, and hostile names are text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pgolf_post.report.page.render import write_report
from pgolf_post.report.sections.table import sections_of
from pgolf_post.report.subject import Subject
from tests.report.conftest import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
    pytest.mark.slow,
]
FITS = "[...document.querySelectorAll('.main-svg')].every(svg => svg.clientWidth <= 400)"


@dataclass
class Opened:
    """A page in the browser, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def opened(full: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(full, path, "pgolf-post report")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        one = Opened(browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light"))
        one.page.on("console", lambda message: one.said.append(message.text))
        one.page.on("pageerror", lambda error: one.said.append(str(error)))
        one.page.on("dialog", lambda dialog: (one.said.append(f"alert {dialog.message}"), dialog.dismiss()))
        one.page.on("request", lambda request: one.asked.append(request.url))
        one.page.goto(path.as_uri())
        one.page.wait_for_selector("html[data-ready=yes]")
        yield one
        browser.close()


def test_it_draws_every_figure_and_asks_for_nothing(opened: Opened, full: Subject) -> None:
    figures = sum(block.kind == "figure" for section in sections_of(full) for block in section.blocks)
    assert opened.page.locator(".plot[data-drawn] .main-svg:first-child").count() == figures
    assert opened.said == []
    assert [url.partition(":")[0] for url in opened.asked] == ["file"]


def test_a_hover_shows_the_label(opened: Opened) -> None:
    plot = opened.page.locator("section#artifacts .plot")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .points path").first
    point.hover(force=True)
    label = plot.locator(".hoverlayer .hovertext").first
    label.wait_for()
    assert "bytes" in label.text_content()


def test_hostile_names_are_shown_as_they_are(opened: Opened) -> None:
    plot = opened.page.locator("section#attribution .plot")
    ticks = plot.locator(".ytick text").all_text_contents()
    assert HOSTILE[:30] in " ".join(ticks)
    assert HOSTILE in opened.page.locator("section#lineage").text_content()
    assert opened.page.locator("main img").count() == 0


def test_a_table_sorts_by_number_with_the_keyboard(opened: Opened) -> None:
    table = opened.page.locator("section#sweeps table")
    opened.page.locator("section#sweeps details summary").first.press("Enter")
    column = table.locator("thead th").nth(3)
    for order, sign in (("ascending", 1), ("descending", -1)):
        column.locator("button").press("Enter")
        assert column.get_attribute("aria-sort") == order
        cells = table.evaluate("t => [...t.tBodies[0].rows].map(r => r.cells[3].dataset.value ?? '')")
        values = [float(value) for value in cells if value]
        assert values == sorted(values, key=lambda value: sign * value)
        assert cells[len(values) :] == [""] * (len(cells) - len(values))  # what has no number stays last
    assert "Sorted by bpb" in opened.page.locator("#said").text_content()


def test_it_fits_a_phone_and_follows_the_theme(opened: Opened) -> None:
    page = opened.page
    page.set_viewport_size({"width": 400, "height": 800})
    for _ in range(100):  # the page's own policy forbids the driver to wait inside it
        if page.evaluate(FITS):
            break
        page.wait_for_timeout(50)
    assert page.evaluate(FITS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert dark != light
    page.locator("#theme").click()  # the reader's own choice
    assert page.evaluate(background) == light
    page.emulate_media(media="print", color_scheme="light")
    assert page.locator("nav").is_hidden()
    page.emulate_media(media="screen")
    assert opened.said == []
