"""The command of a rented session: it records at once, goes on where it stopped, and every step starts and ends dry."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu import session
from tests.gpu.session import PART_SECONDS, RECORDS, Step, append, main, read_records, run_step, steps
from tests.gpu.steps import STEPS


def test_every_step_is_known_named_once_and_fits_its_part(tmp_path: Path) -> None:
    for dry in (False, True):
        listed = steps(tmp_path, dry)
        assert len({one.name for one in listed}) == len(listed)
        assert {one.arguments[2] for one in listed} <= STEPS.keys()
        for part in (1, 2, 3, 4):
            limits = [one.seconds for one in listed if one.part == part]
            assert limits
            assert max(limits) <= PART_SECONDS


def test_a_step_that_fails_or_hangs_is_recorded_and_leaves_nothing_behind(tmp_path: Path) -> None:
    failing = Step(1, "failing", ("-c", "print('before'); raise SystemExit(3)"), 60)
    record = run_step(failing, tmp_path, {"device": "cpu"})
    assert (record["rc"], record["last_lines"], record["device"]) == (3, ["before"], "cpu")
    hanging = Step(1, "hanging", ("-c", "import time; print('up', flush=True); time.sleep(600)"), 1)
    record = run_step(hanging, tmp_path, {})
    assert record["rc"] == "limit"
    assert record["seconds"] < 60


def test_a_part_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = "import sys; open(sys.argv[1], 'a').write('x'); raise SystemExit(int(sys.argv[2]))"
    listed = [
        Step(1, name, ("-c", count, str(tmp_path / name), code), 60) for name, code in (("good", "0"), ("bad", "1"))
    ]
    monkeypatch.setattr(session, "steps", lambda out, dry: listed)
    monkeypatch.setattr(session, "facts_of_session", lambda dry: {"device": "cpu", "commit": "c", "dry": True})
    words = ["--part", "1", "--out", str(tmp_path)]
    assert (main(words), main(words)) == (1, 1)
    assert ((tmp_path / "good").read_text(), (tmp_path / "bad").read_text()) == ("x", "xx")
    append(tmp_path / RECORDS, {"part": 1, "name": "bad", "rc": 0})
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"part": 1, "na')  # cut short by the end of the session
    assert main(words) == 0
    assert len(list(read_records(tmp_path / RECORDS))) == 4


def test_a_part_that_is_over_starts_nothing_more_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(session, "steps", lambda out, dry: [Step(1, "one", (), 90), Step(1, "another", (), 90)])
    monkeypatch.setattr(session, "facts_of_session", lambda dry: {"device": "cpu"})
    now = iter([0.0, PART_SECONDS - 30.5, PART_SECONDS - 5.0])
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=now.__next__))

    def run(one: Step, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
        limits.append(one.seconds)
        return {"part": one.part, "name": one.name, "rc": 0, "seconds": 1.0, "peak_mib": None}

    monkeypatch.setattr(session, "run_step", run)
    assert main(["--part", "1", "--out", str(tmp_path)]) == 1
    assert limits == [30]
    assert "another: no time left in this part" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_a_part_runs_dry_without_a_gpu(part: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.getbasetemp() / "dry-session"  # shared: a part starts from what an earlier one made
    assert main(["--part", str(part), "--out", str(out), "--dry"]) == 0
    records: dict[str, dict[str, Any]] = {one["name"]: one for one in read_records(out / RECORDS)}
    expected = {one.name for one in steps(out, True) if one.part == part}
    assert expected <= records.keys()
    assert all(records[name]["rc"] == 0 and records[name]["peak_mib"] for name in expected)
    assert json.loads((out / RECORDS).read_text().splitlines()[0])["commit"]
