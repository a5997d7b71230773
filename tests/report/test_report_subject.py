"""What a report is about: all of a root, or what belongs to a run, a checkpoint or a sweep, up and down its lineage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.derived import Stage
from pgolf_post.diagnose.settings import DiagnoseSettings
from pgolf_post.diagnose.stage import diagnose
from pgolf_post.errors import MismatchError, NotFoundError, PgolfError
from pgolf_post.ledger import Row
from pgolf_post.ledger.lineage import trees
from pgolf_post.plan import read_plan
from pgolf_post.report.blocks import Figure, Table
from pgolf_post.report.points import points_of
from pgolf_post.report.sections import tensors
from pgolf_post.report.sections.artifacts import front
from pgolf_post.report.sections.diagnostics import diagnostics
from pgolf_post.report.sections.ranges import near_axis
from pgolf_post.report.sections.runs import runs, thinned
from pgolf_post.report.sections.tensors import kept_table
from pgolf_post.report.subject import Subject, find_subject, related
from tests.report.conftest import HOSTILE, TRIALS

BUDGET = 16_000_000
LOG = "\n".join(json.dumps({"step": step, "loss": 5.0 - step / 10}) for step in range(1, 9))


def test_a_run_a_checkpoint_and_a_sweep_narrow_it(full: Subject, full_root: Path, tmp_path: Path) -> None:
    run = find_subject([Path(HOSTILE)], full_root, BUDGET)
    assert run.names == (HOSTILE,)
    assert {row.kind for row in run.rows} >= {"run", "checkpoint", "score", "audit"}
    assert not run.of_kind("trial")
    assert len(run.folders) == len(full.folders) > 2
    final = next((full_root / HOSTILE).glob("*final"))
    one = find_subject([final], tmp_path, BUDGET)  # a path says its root
    assert one.folders == [final]
    assert one.of_kind("score")
    spec = tmp_path / "a sweep.toml"
    spec.write_text("")
    swept = find_subject([spec], full_root, BUDGET)
    assert len(swept.of_kind("trial")) == TRIALS
    assert not swept.folders


def test_what_is_not_there_is_named(full_root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere is not a run"):
        find_subject([Path("nowhere")], full_root, BUDGET)
    with pytest.raises(NotFoundError, match="no such sweep"):
        find_subject([Path("absent.toml")], full_root, BUDGET)
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(NotFoundError, match="nothing is recorded of other"):
        find_subject([tmp_path / "other.toml"], full_root, BUDGET)
    with pytest.raises(NotFoundError, match="nothing is recorded under"):
        find_subject([], tmp_path, BUDGET)
    final = next((full_root / HOSTILE).glob("*final"))
    with pytest.raises(MismatchError, match="several checkpoint folders"):
        find_subject([final, tmp_path / "other.toml"], tmp_path, BUDGET)


@given(st.data())
def test_related_rows_are_ancestors_and_descendants(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    parents = [data.draw(st.sets(st.integers(0, number - 1))) if number else set() for number in range(count)]
    rows = [Row("trial", f"r{n}", tuple(f"r{p}" for p in sorted(parents[n]))) for n in range(count)]
    seed = data.draw(st.integers(0, count - 1))
    reach = np.eye(count, dtype=bool)
    for number in range(count):
        for parent in parents[number]:
            reach[number] |= reach[parent]  # number comes from parent
    expected = [f"r{n}" for n in range(count) if reach[seed, n] or reach[n, seed]]
    assert [row.id for row in related(rows, [rows[seed]])] == expected


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20).map(float)), min_size=1, max_size=20))
def test_the_front_is_what_no_point_beats(points: list[tuple[int, float]]) -> None:
    best = front(points)
    for point in set(points):
        beaten = any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points)
        assert (point in best) == (not beaten)


def test_a_gap_is_against_the_weights_that_were_quantized() -> None:
    protocol = {"protocol": "plain", "seq_len": 16}
    sums = {"nats": 1.0, "tokens": 9, "bytes": 9}
    rows = [
        Row("checkpoint", "v1"),
        Row("score", "s1", ("v1",), "plain of a checkpoint", settings=protocol, result={"bpb": 1.5, **sums}),
        Row("artifact", "a1", ("v1",), "six bits", result={"artifact_bytes": 10}),
        Row("score", "s2", ("a1",), "plain of an artifact", settings=protocol, result={"bpb": 1.75, **sums}),
    ]
    (point,) = points_of(rows, trees(rows))
    assert (point.num_bytes, point.bpb, point.gap_bpb) == (10, 1.75, 0.25)


def test_a_run_without_a_readable_log_has_no_curve(tmp_path: Path) -> None:
    for run, text in (
        ("torn", '{"step": 1, "lo'),
        ("short", '{"step": 1, "loss": 2.0}'),
        ("whole", LOG),
        ("other", LOG),
    ):
        (tmp_path / run).mkdir()
        (tmp_path / run / "train.jsonl").write_text(text)
    names = ("torn", "short", "whole", "other")
    rows = [Row("run", f"run:{name}", (), name, name) for name in names]
    section = runs(Subject("t", tmp_path, rows, BUDGET))
    assert section is not None
    assert [block.title for block in section.blocks] == ["Losses of all runs", "Loss of other", "Loss of whole"]
    assert runs(Subject("t", tmp_path, rows[:2], BUDGET)) is None


@given(st.integers(1, 50), st.integers(1, 60))
def test_thinning_keeps_the_mean_of_equal_groups(count: int, points: int) -> None:
    values = np.arange(count, dtype=float)
    thin = thinned(values, points)
    assert len(thin) == min(count, points)
    assert values.min() <= thin.min() <= thin.max() <= values.max()
    if count % len(thin) == 0:
        assert thin.mean() == pytest.approx(values.mean())


def test_an_axis_leaves_out_what_is_far() -> None:
    assert near_axis([1.0, 1.1, 1.2, 1.3]) == ({}, "")
    assert near_axis([1.0, 1.0]) == ({}, "")
    axis, sentence = near_axis([1.0, 1.01, 1.02, 1.03, 6.0])
    assert axis["range"][0] < 1.0 < 1.03 < axis["range"][1] < 6.0
    assert "1 lie above" in sentence


def test_the_bytes_of_an_artifact_are_counted_once(view: View, stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = requant(view, stats, read_plan("rtn"))
    counted = kept_table(artifact.path)
    assert sum(row.stored_bytes for row in counted) == artifact.num_bytes
    monkeypatch.setattr(tensors, "tensor_table", lambda path: pytest.fail("counted again"))
    assert kept_table(artifact.path) == counted
    subject = find_subject([view.checkpoint.path], view.checkpoint.path.parent.parent, BUDGET)
    section = tensors.tensors(subject)
    assert section is not None
    (figure,) = section.blocks
    assert isinstance(figure, Figure)
    assert figure.traces[0]["values"][0] == artifact.num_bytes  # the root of the treemap
    assert {row[0].shown for row in figure.table.rows} == {row.name for row in counted}


def test_a_folder_that_cannot_be_written_is_counted_each_time(
    view: View, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = requant(view, stats, read_plan("rtn"))

    def refuse(*_: object) -> None:
        raise PgolfError("read-only")

    monkeypatch.setattr(Stage, "store", refuse)
    assert kept_table(artifact.path) == kept_table(artifact.path)
    assert not (view.checkpoint.path / "derived" / "bytes").exists()


def test_diagnoses_of_a_run_are_curves_over_its_steps(pico_run: Path) -> None:
    saved = sorted((pico_run / "pico").glob("step_*"))[-2:]
    for folder in saved:
        diagnose(Checkpoint.open(folder).load("raw"), None, DiagnoseSettings(tokens=0))
    section = diagnostics(find_subject([], pico_run, BUDGET))
    assert section is not None
    curves = [block for block in section.blocks if isinstance(block, Figure) and "by step" in block.title]
    assert [block.title.split(" of ")[0] for block in curves] == ["effective rank share", "condition", "kurtosis"]
    steps = [float(folder.name.split("_")[1].split("-")[0]) for folder in saved]
    assert all(list(trace["x"]) == steps for trace in curves[0].traces)
    marked = section.blocks[0]
    assert isinstance(marked, Table)
    assert marked.rows or "No rule of thumb" in marked.note
