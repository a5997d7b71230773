"""Figures and the command line: what is drawn is what the rows say, and `plan` does no work."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pgolf_post.sweep.figures import curves, draw, pareto_front, pareto_points
from pgolf_post.sweep.plan import plan_rows
from pgolf_post.sweep.run import Sweep
from tests.sweep.conftest import Lab, by_name, spec_text

REPOSITORY = Path(__file__).parents[2]


def test_the_front_is_what_no_point_beats() -> None:
    assert pareto_front([(3, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (4, 1.0)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_figures_are_drawn_of_what_was_packed_and_scored(lab: Lab, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    state = lab.run(spec_text())
    assert len(pareto_points(state)) == 4  # the unquantized weights have no bytes
    (axis, rows), *others = curves(state).items()
    assert not others
    assert axis == "*.hessian_lambda"
    assert [row.settings["changes"][axis] for row in rows] == [0, 0.2, 0.6]
    paths = draw(state, tmp_path / "out")
    assert sorted(path.name for path in paths) == ["curve_0.png", "curve_0.svg", "pareto.png", "pareto.svg"]
    for path in paths:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plan_says_what_there_is_and_comes_near(lab: Lab) -> None:
    sweep = Sweep(lab.options(spec_text()))
    before = plan_rows(sweep)
    assert not any(row.done or row.cached for row in before)
    assert not list(lab.root.rglob("derived"))
    assert all(row.seconds and row.seconds > 0 for row in before)
    sweep.close()
    rows = by_name(lab.run(spec_text()))
    sweep = Sweep(lab.options(spec_text()))
    after = {row.listed.trial.name: row for row in plan_rows(sweep)}
    sweep.close()
    assert all(row.done for row in after.values())
    packed = {name: row for name, row in rows.items() if "artifact_bytes" in row.result}
    assert all(after[name].cached == ("stats", "artifact") for name in packed)
    for name, row in packed.items():
        predicted = after[name].predicted_bytes
        assert predicted is not None
        assert 0.5 < predicted / row.result["artifact_bytes"] < 2  # a pico artifact is half manifest and plain floats


@pytest.mark.long
def test_the_command_answers_in_json(lab: Lab) -> None:
    options = lab.options(spec_text())
    where = ["--checkpoint", str(lab.root / "latest"), "--root", str(lab.root), "--results", str(lab.folder / "r")]

    def ask(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "pgolf_post", "sweep", *arguments, str(options.spec), *where, "--json"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    assert ask("table")["trials"] == []
    ran = ask("run", "--set", "noise_repeats=0")
    assert ran["open"] == []
    assert [trial["role"] for trial in ran["trials"]].count("control") == 1  # type: ignore[attr-defined]
    watched = ask("watch", "--set", "noise_repeats=0")
    assert watched["trials"] == ran["trials"]
