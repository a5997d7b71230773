"""The kinds of residual lanes by hand, on a block whose attention doubles and whose MLP triples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.lanes import lanes_with_skip, visit_routed, visit_separate, visit_sequential

X0 = torch.tensor(100.0)
KEEP, POST = torch.tensor([0.5, 0.25]), torch.tensor([[1.0, 10.0], [2.0, 20.0]])
CONTEXT: Any = None


class Plain:
    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        return x + x0

    def attention_update(self, x: Tensor, context: Any) -> Tensor:
        return 2 * x

    def mlp_update(self, x: Tensor, mlp: nn.Module) -> Tensor:
        return 3 * x


LANES = torch.tensor(1.0), torch.tensor(3.0)
ATTENTION = 2 * (1 + 100)  # 202, from the first lane and x0


def test_routed_lanes_are_read_as_they_were() -> None:
    fed = 3 * 3  # from the second lane alone
    expected = (0.5 * 1 + 1 * ATTENTION + 2 * fed, 0.25 * 3 + 10 * ATTENTION + 20 * fed)
    assert visit_routed(Plain(), LANES, X0, CONTEXT, nn.Identity(), KEEP, POST) == expected


def test_sequential_lanes_hear_of_attention_before_the_mlp() -> None:
    first, second = 0.5 * 1 + 1 * ATTENTION, 0.5 * 3 + 10 * ATTENTION
    fed = 3 * (second + 100)
    expected = (0.25 * first + 2 * fed, 0.25 * second + 20 * fed)
    assert visit_sequential(Plain(), LANES, X0, CONTEXT, nn.Identity(), KEEP, POST) == expected


def test_separate_lanes_never_meet() -> None:
    assert visit_separate(Plain(), LANES, X0, CONTEXT, nn.Identity()) == (1 + 100 + ATTENTION, 3 + 3 * 3)


def test_skips_enter_the_lanes_of_their_kind() -> None:
    assert [lanes_with_skip("routed", split) for split in (True, False)] == [(True, False), (True, False)]
    assert [lanes_with_skip("sequential", split) for split in (True, False)] == [(True, True), (True, True)]
    assert [lanes_with_skip("separate", split) for split in (True, False)] == [(True, True), (False, False)]
