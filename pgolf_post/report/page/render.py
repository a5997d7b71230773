"""Sections as one HTML file that works from the file system and asks nothing of the network.

Jinja escapes every value; figures travel as JSON whose < > & are escaped; and a content security policy names the only
two scripts that may run by their sha256, so that even a value that slipped through could not run. Plotly's own file is
inlined: 4.8 of the page's megabytes.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.storage import atomic_file
from pgolf_post.ledger.schema import iso_utc
from pgolf_post.report.blocks import Figure, Section
from pgolf_post.report.points import main_text
from pgolf_post.report.sections.table import sections_of
from pgolf_post.report.subject import Subject

SIGNIFICANT_DIGITS = 7  # of a figure's numbers; tables have theirs in full


def write_report(subject: Subject, path: Path, remake: str) -> int:
    """Write the report of a subject as one HTML file, and return its bytes. `remake` is the command shown at its end.

    Raises PgolfError if it cannot be written.
    """
    page = render(subject, sections_of(subject), remake)
    with atomic_file(path) as temporary:
        return temporary.write_bytes(page.encode())


def render(subject: Subject, sections: list[Section], remake: str, version: str = "") -> str:
    """Return the page; with a version, one that asks its server for newer ones."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_text("report.html.jinja"))
    specs = {
        f"block-{place}-{number}": figure_json(block)
        for place, section in enumerate(sections)
        for number, block in enumerate(section.blocks)
        if isinstance(block, Figure)
    }
    plotly, script = plotly_js(), _text("report.js")
    return template.render(
        title=subject.title,
        subtitle=f"{subject.root.resolve()}, {len(subject.rows):,} rows, {iso_utc()[:16].replace('T', ' ')} UTC",
        facts=_facts(subject),
        sections=sections,
        specs=specs,
        remake=remake,
        version=version,
        policy=_policy([plotly, script], bool(version)),
        style=Markup(_text("report.css")),
        plotly=Markup(plotly),
        script=Markup(script),
    )


@cache
def _text(name: str) -> str:
    return (files("pgolf_post.report.page") / name).read_text(encoding="utf-8")


@cache
def plotly_js() -> str:
    """Return the drawing library, as a script that can stand inside a page."""
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")


@cache
def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _policy(scripts: list[str], watches: bool) -> str:
    """Return a content security policy: these scripts alone, nothing from elsewhere."""
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    own = "'self'" if watches else "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; connect-src {own}; "
        "base-uri 'none'; form-action 'none'"
    )


def figure_json(figure: Figure) -> dict[str, Any]:
    """Return a figure as plain JSON values; what is not finite becomes null."""
    return {"data": [_plain(trace) for trace in figure.traces], "layout": _plain(figure.layout)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool | str | int | None):
        return value
    number = float(value)
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(number) else None


def _facts(subject: Subject) -> list[tuple[str, str]]:
    """Return what a reader wants first: the best numbers, and how much there is."""
    facts = []
    compared = main_text(subject.points)
    fitting = [point for point in compared if point.num_bytes <= subject.budget_bytes]
    if fitting:
        best = fitting[0]
        facts.append((f"best within the budget, {best.text}", f"{best.bpb:.5f} bpb"))
        facts.append(("its bytes", f"{best.num_bytes:,} of {subject.budget_bytes:,}"))
    counts = {kind: len(subject.of_kind(kind)) for kind in ("checkpoint", "artifact", "score", "trial")}
    facts += [(f"{kind}s", f"{count:,}") for kind, count in counts.items() if count]
    seconds = math.fsum(row.seconds or 0.0 for row in subject.of_kind("trial", "artifact", "score", "stats"))
    return [*facts, ("seconds after training", f"{seconds:,.0f}")] if seconds else facts
