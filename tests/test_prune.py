"""Pruned checkpoints: exact counts, a parent on record, found again, and marked when nothing changed."""

from __future__ import annotations

import pytest
import torch

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.plan import read_plan
from pgolf_post.prune import PruneSettings, prune_checkpoint, prune_view

PLAN = read_plan("sdclip-1394")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ones"])
def test_a_share_is_zeroed_and_everything_else_is_untouched(view: View, stats: Stats, method: str) -> None:
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    tensors, zeroed, weights = prune_view(view, stats, PruneSettings(method=method, share=0.1), PLAN)
    assert 0 < zeroed <= 0.1 * weights
    assert all(torch.equal(before[name], tensor) for name, tensor in view.tensors.items())
    changed = sum(int((tensors[name] != before[name]).sum()) for name in tensors)
    assert changed == zeroed
    assert all(bool((tensors[name][tensors[name] != before[name]] == 0).all()) for name in tensors)


def test_a_pruned_checkpoint_records_its_parent_and_is_found_again(
    view: View, stats: Stats, pico_data: DataFolder
) -> None:
    settings = PruneSettings(method="wanda", share=0.1, roles=("mlp_fc",))
    pruned, cached = prune_checkpoint(view, stats, settings, PLAN, pico_data)
    again, cached_again = prune_checkpoint(view, stats, settings, PLAN, pico_data)
    assert (cached, cached_again, again.path) == (False, True, pruned.path)
    assert pruned.meta["kind"] == "pruned"
    assert pruned.meta["parents"][0]["id"] == view.id
    assert not pruned.meta["no_op"]
    twice, _ = prune_checkpoint(pruned.load("raw"), stats, settings, PLAN, pico_data)
    assert twice.path == pruned.path  # the same weights again are zero already


def test_roles_without_a_matrix_are_refused(view: View, stats: Stats) -> None:
    with pytest.raises(SettingsError, match="--roles banana: no such matrices"):
        prune_view(view, stats, PruneSettings(roles=("banana",)), PLAN)
