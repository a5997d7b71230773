"""The artifact stage: ids that never change, and results that are found again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pgolf_post.artifacts import find, is_no_op, plan_key, requant
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_folders, id_from_config
from pgolf_post.fit.artifact import fit_key
from pgolf_post.fit.kappa_cache import STAGES as KAPPA_STAGES
from pgolf_post.fit.prepare import Fitter
from pgolf_post.fit.settings import FitSettings
from pgolf_post.plan import read_plan
from pgolf_post.sweep.expand import expand
from pgolf_post.sweep.listed import trial_id
from pgolf_post.sweep.settings import SweepSpec, TrialSettings

VIEW_ID, STATS_ID = "a" * 64, "b" * 64


def bare_view() -> Any:
    """A view that is nothing but its id."""
    return SimpleNamespace(id=VIEW_ID, name="raw", checkpoint=None)


# ---- ids recorded before there was one stage: results made then must be found ----------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "codec", "jitter", "artifact_id"),
    [
        ("sdclip-1394", [], "rans", 0, "33366fb1fffa05dea0cb77d6161891f309994efe8835d2c59c511b4590d4cf82"),
        (
            "record-1855", ["mlp.clip=11"], "brotli", 0,
            "e7306d053e6da927437568a7a4ea96dcce45e64b444dde0e769682390a78d5da",
        ),
        ("sdclip-1394", [], "rans", 2, "111b2f99d6f0270d96c10f4018c372ef68c0b7a5a8d9eb7a736295e773631cff"),
        (
            "sdclip-1394", ["sequential=true"], "rans", 0,
            "302475b5d2324c7360e8802b3374e56ec385abdacea199a13576218d30ca00a6",
        ),
    ],
)  # fmt: skip
def test_an_artifact_by_a_plan_keeps_its_id(
    preset: str, changes: list[str], codec: str, jitter: int, artifact_id: str
) -> None:
    text: Any = SimpleNamespace(sha256="e" * 64) if changes == ["sequential=true"] else None
    key = plan_key(bare_view(), STATS_ID, read_plan(preset, changes), codec, text, jitter)
    assert key.id == artifact_id
    config = {"stage": key.stage.name, "version": key.stage.version, **key.config}
    assert id_from_config(config, [VIEW_ID, STATS_ID]) == artifact_id


@pytest.mark.parametrize(
    ("settings", "artifact_id", "kappa_id"),
    [
        (
            {"trellis_states": 64},
            "6c0e1a108d3c0a623bd179cef816de62494f083cc4e2a98c47fed3b1592d8497",
            "3fdc4da60895aaaf80a16a54b9a77f479ce0a0ceacec724d990a6028bc2b0761",
        ),
        (
            {"trellis_states": 0, "kappa": "off", "distill": True},
            "8e84c219e3510c80dbe034b166b5d929b9fd26d1eea7f1d1eda0eccf126a262d",
            None,
        ),
        (
            {"trellis_states": 64, "tune_tokens": 5},
            "ffa1da6e0019e297de8a952b137d34da0fd2fd0686a219d820e0ef58cca191ac",
            None,
        ),
    ],
)
def test_a_fitted_artifact_and_kappa_by_tensor_keep_their_ids(
    settings: dict[str, Any], artifact_id: str, kappa_id: str | None
) -> None:
    chosen = FitSettings(lookup_frequency="counted", **settings)
    builder: Any = SimpleNamespace(matrices={"w": SimpleNamespace(role="q")}, identity={})
    texts: Any = (SimpleNamespace(sha256="1" * 64), SimpleNamespace(sha256="2" * 64)) if chosen.tune_tokens else None
    unread: Any = None
    stats: Any = SimpleNamespace(id=STATS_ID)
    fitter = Fitter(bare_view(), unread, stats, chosen, builder, {}, unread, chosen.distill, texts)
    assert fit_key(fitter, 1000, "rans").id == artifact_id
    if kappa_id:
        identity = {
            **chosen.identity({"distill", "tune_tokens", "regularize"}),
            "text_sha256": "e" * 64,
        }
        assert KAPPA_STAGES["tensor"].id([VIEW_ID, STATS_ID], identity) == kappa_id


FULL: dict[str, Any] = {
    "question": "?",
    "stages": {
        "screen": {"tokens": 320}, "expected": {}, "plain": {"max_tokens": 161}, "sliding": {"stride": 4},
        "ttt": {"preset": "sgd", "set": ["stride=8"]}, "predict": {},
    },
    "rank_by": "bytes", "budget_bytes": 5, "gates": {"drop_if_over_budget": True},
}  # fmt: skip
BASED: dict[str, Any] = {
    "question": "?",
    "base": {
        "blend": {"ema_share": 0.5}, "calibration": {"tokens": 99}, "ttt": {"learning_rate": 0.1},
        "train": {"recipe": "trainer/recipes/tiny_cpu.toml", "steps": 4},
    },
    "stages": {"ttt": {}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "trial", "control", "expected"),
    [
        ({"question": "?"}, 0, "f", "cca82d591f52d01706f8057e0c964f3ebb02c8019e8d16c9c390aabef31e31de"),
        ({"question": "?"}, 1, "f", "78fae2ad07bd65178a3665357db00a95970a2b99bf191692be3824a3eef8a79d"),
        ({"question": "?"}, 2, "f", "9c7842294aabe1b2c9e38101510f16158bf582e41749da3a944216b390f2350d"),
        (FULL, 0, "f", "98d6d80e961fb2df2e8727ce26aa4e1ee6841850c5a180d669907510de170143"),
        (FULL, 1, "f", "c89145d5206964b7dcbd0d4755ef323fedda33718ea31fb44691e3d0364ac181"),
        (FULL, 3, "f", "e7a670557b6d92c7d7741d283825e11d48f811d857772aaecd70ac18db9d4986"),
        (BASED, 0, "", "7ec7485bb3bc8586305d7e2eadb803f28326422f1299874978c979d61e3114a8"),
    ],
)
def test_a_trial_keeps_its_id(tree: dict[str, Any], trial: int, control: str, expected: str) -> None:
    """Settings and stages that came later are off, and stay out of it."""
    weights = SimpleNamespace(checkpoint=lambda _: None, source_ids=lambda _: ["c" * 64])
    calibration = SimpleNamespace(data=lambda *_: SimpleNamespace(manifest_sha256="d" * 64))
    bench: Any = SimpleNamespace(weights=weights, calibration=calibration)
    spec = SweepSpec.model_validate(tree)
    assert trial_id(bench, spec, expand(spec, lambda _: 1)[trial], control * 64) == expected


def test_a_trial_that_cannot_be_named_keeps_its_id() -> None:
    from pgolf_post.derived import derived_id

    identity = {"settings": TrialSettings(checkpoint="nowhere").facts(), "error": "no"}
    expected = "32c8c5a446fb80d1a2bbce68af8f552b4439991750370e874d5599c974f9a128"
    assert derived_id("trial", 2, ["f" * 64], identity) == expected


def test_a_view_keeps_its_family_and_module(view: View) -> None:
    assert view.module is view.module
    assert view.family is view.family
    assert {parameter.device.type for parameter in view.module.parameters()} == {"meta"}
    assert view.train_seq_len == 16


def test_an_artifact_is_found_by_its_key(view: View, stats: Stats) -> None:
    plan = read_plan("sdclip-1394")
    key = plan_key(view, stats.id, plan, "rans")
    assert find(key) is None
    made = requant(view, stats, plan)
    found = find(key)
    assert found is not None
    assert (found.id, found.folder, found.cached) == (made.id, made.folder, True)
    assert made.verified is not None
    assert made.forgotten().verified is None
    assert set(made.decoded().tensors) == set(view.tensors)
    assert is_no_op(found, made)


def test_leftovers_are_no_results(view: View, stats: Stats) -> None:
    """Temporary, replaced and partial folders, and folders without a meta.json, are passed over."""
    made = requant(view, stats, read_plan("sdclip-1394"))
    stage = made.folder.parent
    for name in (".tmp-1-ab-0123", ".old-0123", "0123.partial", "4567"):
        (stage / name).mkdir()
    for name in (".tmp-1-ab-0123", ".old-0123", "0123.partial"):
        (stage / name / "meta.json").write_text("{}")
    kinds = {(folder.parent.name, folder.name) for folder in derived_folders(view.checkpoint.path)}
    assert kinds == {("artifact", made.folder.name), ("stats", stats.id[:12])}
