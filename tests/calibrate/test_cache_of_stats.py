"""The cache of statistics: found by weights, text and settings; lazy, whole, and never other weights' by accident."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate, stale_stats
from pgolf_post.calibrate.stats import FISHER_PAYLOAD, PAYLOAD
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError
from pgolf_post.families import get_family, load_module
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.plan import read_plan
from tests.calibrate.conftest import SETTINGS

FISHER = SETTINGS.model_copy(update={"fisher": True})


def folder_of(checkpoint: Checkpoint, stats: Stats) -> Path:
    return checkpoint.derived("stats", stats.id)


def test_every_site_of_the_model_is_there_symmetric_and_positive(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    view = pico_checkpoint.load()
    stats = calibrate(view, pico_data, FISHER)
    module = load_module(view.config, view.tensors, "test")
    sites = get_family("golf_gpt").sites(module)
    assert set(stats.hessians) == set(stats.abs_sums) == set(stats.pass_traces) == {site.name for site in sites}
    assert (stats.num_tokens, stats.view_id) == (320, view.id)
    for site, hessian in stats.hessians.items():
        assert torch.equal(hessian, hessian.mT)
        assert float(torch.linalg.eigvalsh(hessian).min()) > -1e-3 * float(hessian.diagonal().max())
        assert (stats.abs_maxima[site] >= stats.mean_abs(site) / stats.visits(site)).all()
    assert stats.visits("blocks.1.attn.in") == 2
    fisher = stats.fisher
    assert fisher is not None
    assert set(fisher.rows) == set(fisher.weighted) == {tensor for site in sites for tensor in site.tensors}
    assert set(fisher.outputs) == set(fisher.rows) - {fisher.head}
    assert float(fisher.lookup_counts[fisher.token_table].sum()) == 320
    assert fisher.rows[fisher.head].shape == (320,)
    assert fisher.lookup_hessians[fisher.token_table].shape == (16, 16)
    for tensor in fisher.rows:
        assert fisher.mean_rows(tensor).shape == (view.tensors[tensor].shape[0],)
        assert fisher.mean_weighted(tensor).shape == (view.tensors[tensor].shape[1],) * 2
        assert (fisher.rows[tensor] > 0).any()
    for tensor in fisher.outputs:
        outputs = fisher.mean_outputs(tensor)
        torch.testing.assert_close(outputs.diagonal(), fisher.mean_rows(tensor), rtol=1e-4, atol=0.0)
        assert torch.equal(outputs, outputs.mT)


def test_what_is_read_is_fresh_float64_on_the_cpu(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    stats = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    for read in (stats.mean_hessian, stats.mean_abs, stats.hessians.__getitem__):
        first = read("head.in")
        kept = first.clone()
        first.zero_()
        assert torch.equal(read("head.in"), kept)
        assert (first.dtype, first.device.type) == (torch.float64, "cpu")
    with pytest.raises(MismatchError, match=r"no Hessian for 'blocks\.9'; calibrated: blocks\.0"):
        stats.mean_hessian("blocks.9")


def test_second_call_reads_and_never_recomputes(
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    assert not first.cached

    def refuse(*_: object) -> None:
        raise AssertionError("recomputed")

    monkeypatch.setattr("pgolf_post.calibrate.stage.collect", refuse)
    second = calibrate(pico_checkpoint.load(), pico_data, SETTINGS)
    assert (second.cached, second.id) == (True, first.id)
    assert "cached" in capsys.readouterr().err
    for site, hessian in first.hessians.items():
        assert torch.equal(hessian, second.hessians[site])


def test_statistics_with_the_backward_half_serve_those_who_did_not_ask_for_it(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    view = pico_checkpoint.load()
    fisher = calibrate(view, pico_data, FISHER)
    plain = calibrate(view, pico_data, SETTINGS)
    assert (plain.cached, plain.id) == (True, fisher.id)
    own = calibrate(view, pico_data, SETTINGS, fresh=True)
    assert own.id != fisher.id
    for site in own.hessians:
        torch.testing.assert_close(own.hessians[site], fisher.hessians[site], rtol=1e-5, atol=1e-4)


def test_views_settings_and_text_each_have_their_own_statistics(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    updates: list[dict[str, object]] = [{}, {"seed": 1}, {"tokens": 640}, {"fisher": True}, {"source": "random"}]
    ids = {
        calibrate(pico_checkpoint.load(weights), pico_data, SETTINGS.model_copy(update=update)).id
        for weights in ("raw", "ema")
        for update in updates
    }
    assert len(ids) == 10


@pytest.mark.parametrize("name", [PAYLOAD, FISHER_PAYLOAD])
def test_a_damaged_file_is_found_and_recomputed_aloud(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    first = calibrate(pico_checkpoint.load(), pico_data, FISHER)
    payload = folder_of(pico_checkpoint, first) / name
    content = bytearray(payload.read_bytes())
    content[-1] ^= 0x40
    payload.write_bytes(content)
    again = calibrate(pico_checkpoint.load(), pico_data, FISHER)
    assert not again.cached
    assert f"{name} does not match the sha256 recorded in meta.json; recomputing" in capsys.readouterr().err
    assert payload.read_bytes() != bytes(content)
    assert calibrate(pico_checkpoint.load(), pico_data, FISHER).cached


def test_truncated_checkpoint_is_found_before_calibration(pico_checkpoint: Checkpoint) -> None:
    path = pico_checkpoint.path / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"ema\.safetensors is damaged"):
        pico_checkpoint.load()


# ---- statistics of other weights ---------------------------------------------------------------------------------


@pytest.fixture
def views(pico_checkpoint: Checkpoint) -> tuple[View, View]:
    return pico_checkpoint.load("raw"), pico_checkpoint.load("ema")


def test_statistics_of_other_weights_are_refused(views: tuple[View, View], pico_data: DataFolder) -> None:
    stats = calibrate(views[0], pico_data, SETTINGS)
    with pytest.raises(MismatchError, match="are of weights") as refused:
        requant(views[1], stats, read_plan("sdclip-1394"))
    assert refused.value.hint is not None
    assert "--allow-stale" in refused.value.hint


def test_statistics_let_in_are_probed_and_recorded_in_what_is_made_from_them(
    views: tuple[View, View], pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    own = calibrate(views[0], pico_data, SETTINGS)
    folder = folder_of(views[0].checkpoint, own)
    for name in (str(folder), own.id, own.id[:8]):
        stats = stale_stats(views[1], pico_data, name, SETTINGS)
        assert stats.id == own.id
        assert "STALE" in capsys.readouterr().err
    assert stats.stale is not None
    assert stats.stale["view_id"] == views[0].id
    probe = stats.stale["probe"]
    assert set(probe) == set(own.hessians)
    assert any(row["distance"] > 1e-6 for row in probe.values())
    artifact = requant(views[1], stats, read_plan("sdclip-1394"))
    assert artifact.meta["stale"] == stats.stale
    assert read_artifact(artifact.path).manifest["lineage"]["stale_view_id"] == views[0].id[:12]
    assert "stale" not in requant(views[0], own, read_plan("sdclip-1394")).meta


def test_a_probe_on_the_same_weights_and_text_finds_no_difference(
    views: tuple[View, View], pico_data: DataFolder
) -> None:
    from pgolf_post.calibrate.stale import probe

    stats = calibrate(views[0], pico_data, SETTINGS)
    found = probe(views[0], pico_data, stats, SETTINGS)
    assert max(row["distance"] for row in found.values()) < 1e-5
    assert max(abs(row["trace_ratio"] - 1) for row in found.values()) < 1e-5
    assert stale_stats(views[0], pico_data, stats.id, SETTINGS).stale is None  # its own are not stale


def test_what_is_not_there_or_does_not_fit_is_refused(views: tuple[View, View], pico_data: DataFolder) -> None:
    with pytest.raises(NotFoundError, match="no statistics 'ffff'"):
        stale_stats(views[1], pico_data, "ffff", SETTINGS)
    stats = calibrate(views[0], pico_data, SETTINGS)
    with pytest.raises(MismatchError, match="has no backward half"):
        stale_stats(views[1], pico_data, stats.id, FISHER)
    payload = folder_of(views[0].checkpoint, stats) / PAYLOAD
    payload.write_bytes(payload.read_bytes()[:-1])
    with pytest.raises(PgolfError, match="does not match the sha256"):
        stale_stats(views[1], pico_data, stats.id, SETTINGS)


def test_settings_refuse_validation_text_by_the_rule() -> None:
    for name in ("val", "validation", "VAL", "test"):
        with pytest.raises(ValueError, match="allows no GPTQ calibration on the text that will be scored"):
            CalibrationSettings(source=name)  # type: ignore[arg-type]
