"""What the report's tests share: a checkpoint root with a result of every kind, some of them with hostile names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pgolf_post.base.storage import write_json
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.derived import store
from pgolf_post.diagnose.settings import DiagnoseSettings
from pgolf_post.diagnose.stage import diagnose
from pgolf_post.ledger import Ledger, Row
from pgolf_post.report.subject import Subject, find_subject
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score

HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>"
QUOTED = '" onmouseover="alert(3)" \' & %{x} {{ 7*7 }} \u2028 <b>bold'
TRIALS = 500


def trial(number: int) -> Row:
    """A trial of a sweep, with its interval; some failed, some not scored."""
    name = QUOTED if number == 3 else f"clip = {number}"
    settings = {"role": "trial", "changes": {"clip": number, "why": HOSTILE}, "axis": "clip", "question": HOSTILE}
    if number % 50 == 7:
        return Row("trial", f"t{number}", ("c0ffee",), name, "a sweep", settings, result={"error": HOSTILE})
    difference = 0.002 * (number % 17) - 0.004
    bpb = 2.0 + difference
    scored = {"bpb": bpb, "nats": 1.0, "tokens": 9, "bytes": 9, "difference_bpb": difference}
    scored |= {"low_bpb": difference - 0.001, "high_bpb": difference + 0.001}
    result = {"artifact_bytes": 15_000_000 + 3_000 * number, "bpb": bpb, "plain": scored, "noise_floor_bpb": 0.0004}
    return Row("trial", f"t{number}", ("c0ffee",), name, "a sweep", settings, result=result, seconds=1.0)


def add_results(root: Path, checkpoint: Checkpoint) -> None:
    """Write an attribution, a measurement of κ and rows of the ledger, as the commands do."""
    derived = checkpoint.path / "derived"
    groups = [(HOSTILE, 0.003), ("mlp_fc", 0.001), ("all", 0.004)]
    rows = [
        {"group": group, "tensors": 2, "weights": 64, "group_bytes": 50, "gain_bpb": gain, "low_bpb": gain - 0.0005}
        | {"high_bpb": gain + 0.0005, "gain_per_100kb": 6.0, "no_op": False}
        for group, gain in groups
    ]
    control = {"bpb": 2.1, "nats": 1.0, "tokens": 9, "bytes": 9, "artifact_bytes": 4000}

    def attributed(building: Path) -> dict[str, str]:
        write_json(building / "rows.json", {"control": control, "rows": rows})
        return {}

    def measured(building: Path) -> dict[str, str]:
        kappas = {name: {"predicted": 1e-4, "measured": 2e-4, "error": 1e-5, "kappa": 1.4} for name in ("q", HOSTILE)}
        write_json(building / "kappa.json", kappas)
        return {}

    config = {"view_id": checkpoint.meta["views"]["raw"]["id"]}
    store(derived / "attribution" / "a1", "rows.json", {"stage": "attribution", "by": "role", **config}, attributed)
    store(derived / "kappa" / "k0", "kappa.json", {"stage": "kappa", "kappa": "role", **config}, measured)
    store(derived / "kappa" / "k1", "kappa.json", {"stage": "kappa", "kappa": "tensor", **config}, measured)
    tests = [{"test": "flip", "passed": True, "evidence": "bit-identical"}]
    tests += [{"test": HOSTILE, "passed": False, "evidence": QUOTED}]
    audit = Row("audit", "audit1", (config["view_id"],), HOSTILE, result={"tests": tests, "passed": False})
    typed = Row("comparison", "c1", (config["view_id"],), HOSTILE, command=f"pgolf-post compare '{HOSTILE}' x")
    with Ledger.open(root) as ledger:
        ledger.add_all([*map(trial, range(TRIALS)), audit, typed])


@pytest.fixture(scope="session")
def full_root(tmp_path_factory: pytest.TempPathFactory, pico_run_original: Path, pico_data: DataFolder) -> Path:
    """A checkpoint root with one run, of a hostile name, and a result of every kind. Do not change it."""
    root = tmp_path_factory.mktemp("report") / "checkpoints"
    shutil.copytree(pico_run_original / "pico", root / HOSTILE, symlinks=True)
    final = Checkpoint.open(next((root / HOSTILE).glob("*final")))
    score(final.load(), pico_data, PlainProtocol(seq_len=16, max_tokens=400), breakdown=True)
    diagnose(final.load("raw"), None, DiagnoseSettings(tokens=0))
    add_results(root, final)
    return root


@pytest.fixture(scope="session")
def full(full_root: Path) -> Subject:
    """Everything under that root."""
    return find_subject([], full_root, 16_000_000)
