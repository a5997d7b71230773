"""The table of sections, in the order in which the page has them. A new section is one file and one row here."""

from __future__ import annotations

from collections.abc import Callable

from pgolf_post.report.blocks import Section
from pgolf_post.report.sections.artifacts import artifacts
from pgolf_post.report.sections.attribution import attribution
from pgolf_post.report.sections.audits import audits
from pgolf_post.report.sections.breakdowns import breakdowns
from pgolf_post.report.sections.changes import changes
from pgolf_post.report.sections.checkpoints import checkpoints
from pgolf_post.report.sections.commands import commands
from pgolf_post.report.sections.diagnostics import diagnostics
from pgolf_post.report.sections.divergence import divergence
from pgolf_post.report.sections.lineage import lineage
from pgolf_post.report.sections.runs import runs
from pgolf_post.report.sections.sweeps import sweeps
from pgolf_post.report.sections.tensors import tensors
from pgolf_post.report.subject import Subject

SECTIONS: tuple[Callable[[Subject], Section | None], ...] = (  # None: there is nothing to show
    runs,
    checkpoints,
    artifacts,
    tensors,
    diagnostics,
    attribution,
    divergence,
    breakdowns,
    changes,
    sweeps,
    audits,
    lineage,
    commands,
)


def sections_of(subject: Subject) -> list[Section]:
    """Return the sections that have something to show."""
    made = (make(subject) for make in SECTIONS)
    return [section for section in made if section is not None and section.blocks]
