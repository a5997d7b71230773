"""Continuing a text is reading it: a forward pass with a past gives the logits of one over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pgolf_post.errors import MismatchError
from tests.trainer.test_oracle import CASES, draw_tokens, random_model
from trainer.model.architecture import GraphState


@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 3, 1), (9,)])
@pytest.mark.parametrize("case", [*CASES, "isolated documents"])
@torch.no_grad()
def test_a_text_read_in_pieces_has_the_logits_of_the_whole(case: str, steps: tuple[int, ...]) -> None:
    overrides: dict[str, Any] = CASES.get(case, {**CASES["everything"], "isolate_documents": True})
    model = random_model(overrides)
    model.set_graph(GraphState(active_loops=model.config.max_active_loops))
    tokens = draw_tokens(23, 9)
    tokens[:, 5] = 1  # a second document
    whole = model(tokens)
    past, start, pieces = model.start_past(len(tokens), 9), 0, []
    for step in steps:
        pieces.append(model.logits(model.hidden(tokens[:, start : start + step], past=past)))
        start += step
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def test_more_tokens_than_a_past_holds_are_refused() -> None:
    model = random_model({})
    past = model.start_past(1, 4)
    model.hidden(torch.zeros(1, 3, dtype=torch.int64), past=past)
    with pytest.raises(MismatchError, match="a past of 4 tokens holds 3; 2 more do not fit"):
        model.hidden(torch.zeros(1, 2, dtype=torch.int64), past=past)
