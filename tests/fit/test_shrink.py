"""How much of a stage of fine-tuning is kept: all of what helps, nothing of what does not."""

from __future__ import annotations

import pytest
import torch

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.text import draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.families import train_seq_len
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.shrink import agreed_share, least_share, part_of_way


@pytest.mark.parametrize("least", [0.1, 0.4, 0.5, 0.9])
def test_the_least_of_a_parabola_is_found(least: float) -> None:
    values = [2.0 + 3.0 * (share - least) ** 2 for share in (0.0, 0.5, 1.0)]
    assert least_share(*values) == pytest.approx(least)


@pytest.mark.parametrize(
    ("values", "share"),
    [((3.0, 2.0, 1.2), 1.0), ((1.0, 1.5, 2.2), 0.0), ((1.0, 1.5, 0.9), 1.0), ((1.0, 1.5, 1.1), 0.0), ((1, 1, 1), 0.0)],
)
def test_a_way_whose_least_lies_beyond_it_is_kept_whole_or_not_at_all(
    values: tuple[float, float, float], share: float
) -> None:
    assert least_share(*values) == share


@pytest.mark.parametrize(("start", "end", "share"), [(0.1, 0.0, 1.0), (0.1, -0.1, 0.5), (0.0, 0.1, 0.0)])
def test_a_way_is_kept_as_far_as_it_leads_to_the_reference(
    start: float, end: float, share: float, view: View, pico_data: DataFolder
) -> None:
    text = draw_training_text(pico_data, CalibrationSettings(tokens=1024), train_seq_len(view.config))
    names = ("blocks.1.mlp.fc.weight", "blocks.1.attn_scale")
    before, after = ({name: (1 + error) * view.tensors[name].float() for name in names} for error in (start, end))
    probe = Probe(view, text)
    assert agreed_share(probe, {}, before, after) == pytest.approx(share, abs=0.1)
    kept = part_of_way(before, after, share)
    assert probe.divergence(kept).mean <= min(probe.divergence(place).mean for place in (before, after)) + 1e-9
    assert all(torch.equal(part_of_way(before, after, 1.0)[name], after[name]) for name in names)
