"""The Python interface: lazy, complete, and the round trip of its documentation."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pgolf_post as pg
from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, Stats
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.plan import read_plan

DOCUMENT = Path(__file__).parents[1] / "docs" / "api" / "index.md"
PACKAGES = ("calibrate", "diagnose", "quantize", "pack", "score", "fit")  # called by their own name


def in_a_process(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_importing_it_loads_no_torch() -> None:
    loads = "import sys, pgolf_post as pg; pg.PgolfError; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert in_a_process(loads) == "[]"


@pytest.mark.parametrize("name", pg.__all__)
def test_every_name_exists_and_is_documented(name: str) -> None:
    value = getattr(pg, name)
    assert callable(value)
    assert len(inspect.getdoc(value) or "") > 20
    assert name in dir(pg)


@pytest.mark.parametrize("name", [name for name in pg.__all__ if name.islower()])
def test_every_verb_shows_an_example(name: str) -> None:
    function = inspect.unwrap(getattr(pg, name))
    assert f">>> pg.{name}(" in re.sub(r">>> [\w, ]+ = ", ">>> ", inspect.getdoc(function) or "")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="it has Checkpoint, View"):
        pg.quantise


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_also_its_function(name: str) -> None:
    """Whichever is imported first, and with the function's signature."""
    first = f"import pgolf_post.{name} as package, pgolf_post as pg; print(callable(pg.{name}), pg.{name} is package)"
    then = f"import pgolf_post as pg; print(callable(pg.{name})); import pgolf_post.{name}; print(callable(pg.{name}))"
    assert in_a_process(first) == "True True"
    assert in_a_process(then).split() == ["True", "True"]
    assert next(iter(inspect.signature(getattr(pg, name)).parameters)) in ("view", "model", "scored")


def test_the_round_trip_of_the_documentation(pico_checkpoint: Checkpoint) -> None:
    """Its first code block, as it stands, on a pico model."""
    block = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    code = block.group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    scope: dict[str, Any] = {"path": pico_checkpoint.path}
    exec(compile(code, str(DOCUMENT), "exec"), scope)
    assert scope["fitted"].num_bytes <= scope["recipe"].num_bytes


def test_what_can_be_scored(view: View, stats: Stats, pico_data: DataFolder) -> None:
    """A view, a checkpoint, an artifact and their paths; the same thing has one score."""
    artifact = requant(view, stats, read_plan("sdclip-1394"))
    whole = pg.score(view, pico_data)
    assert not whole.cached
    for same in (view.checkpoint, view.checkpoint.path, str(view.checkpoint.path)):
        again = pg.score(same, pico_data)
        assert (again.bpb, again.cached) == (whole.bpb, True)
    packed = pg.score(artifact, pico_data)
    for same in (artifact.path, artifact.folder):
        assert pg.score(same, pico_data).nats == packed.nats
    difference = pg.compare(packed, whole)
    assert pg.compare(packed.sums, whole.sums) == difference
    assert difference.difference_bpb == pytest.approx(packed.bpb - whole.bpb, abs=1e-12)
    with pytest.raises(pg.PgolfError):
        pg.score("nowhere", pico_data)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_pickled_and_copied_by_name(name: str) -> None:
    package = getattr(pg, name)
    assert pickle.loads(pickle.dumps(package)) is package
    assert copy.deepcopy(package) is package


def test_damaged_bytes_are_refused_in_words(view: View, stats: Stats) -> None:
    artifact = requant(view, stats, read_plan("sdclip-1394"))
    whole = artifact.path.read_bytes()
    for damaged in (b"", b"x" * 100, whole[:-5], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        with pytest.raises(pg.PgolfError, match="damaged"):
            pg.unpack(damaged)
    assert pg.size(str(artifact.path)).artifact == pg.size(artifact.path).artifact


def test_a_level_outside_of_0_and_1_is_refused(view: View, pico_data: DataFolder) -> None:
    sums = pg.score(view, pico_data).sums
    with pytest.raises(pg.PgolfError, match="level"):
        pg.compare(sums, sums, level=95)


def test_an_audit_of_an_honest_model_passes(view: View, pico_data: DataFolder) -> None:
    result = pg.audit(view, pico_data, samples=2, tokens=64)
    assert result.passed
    assert {"flip", "score once"} <= {finding.test for finding in result.findings}


def test_options_are_checked_where_they_are_given(view: View, pico_data: DataFolder) -> None:
    assert pg.CalibrationSettings is CalibrationSettings
    with pytest.raises(pg.PgolfError, match="the code takes"):
        pg.fit(view, pico_data, 10, code=[DOCUMENT])
    with pytest.raises(pg.PgolfError, match="valid codecs: none"):
        pg.fit(view, pico_data, 6000, codec="zip")
