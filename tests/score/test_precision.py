"""bfloat16 products where they are asked for: the number that autocast gives, kept as another score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.families import load_module
from pgolf_post.score.cached import score_view
from pgolf_post.score.compare.windows import window_scorer
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.plain import PlainProtocol, score_plain
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, make_protocol, protocol_spans, score_text
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.spans import CPU_BATCH_TOKENS, batches_of
from tests.score.conftest import Bench

SHORT = {"seq_len": 32, "tail": "score", "max_tokens": 400}
PROTOCOLS = {
    precision: [
        PlainProtocol(precision=precision, **SHORT),  # type: ignore[arg-type]
        SlidingProtocol(precision=precision, stride=8, **SHORT),  # type: ignore[arg-type]
    ]
    for precision in ("fp32", "bf16")
}


def autocast_nats(bench: Bench, protocol: Protocol) -> float:
    """The nats of a text by the definition: one window at a time, under torch's autocast."""
    spans = protocol_spans(protocol, len(bench.tokens) - 1)  # type: ignore[arg-type]
    total = 0.0
    for span in spans:
        text = torch.from_numpy(bench.tokens[span.start : span.start + span.length + 1].astype(np.int64))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = bench.module.logits(bench.module.hidden(text[None, :-1])[0, -span.scored :])
        total += float(F.cross_entropy(logits.float(), text[-span.scored :], reduction="sum"))
    return total


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "sliding"])
def test_bf16_is_what_autocast_gives(bench: Bench, kind: int) -> None:
    exact, rounded = (bench.score(PROTOCOLS[precision][kind]).nats for precision in ("fp32", "bf16"))
    assert rounded == pytest.approx(autocast_nats(bench, PROTOCOLS["bf16"][kind]), rel=1e-4)
    assert 0 < abs(rounded - exact) < 0.01 * exact


def test_every_way_of_scoring_windows_takes_the_precision(bench: Bench) -> None:
    protocol = PROTOCOLS["bf16"][0]
    text = (bench.tokens, bench.token_bytes)
    nats = bench.score(protocol).nats
    assert score_plain(bench.module, *text, protocol).nats == nats  # type: ignore[arg-type]
    spans = protocol_spans(protocol, len(bench.tokens) - 1)  # type: ignore[arg-type]
    both = window_scorer(bench.module, bench.module, *text, spans, "bf16")(np.arange(len(spans)))
    assert [score.nats for score in both] == [nats, nats]


def test_a_precision_is_part_of_a_scores_identity_where_it_is_not_float32(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    assert "precision" not in PlainProtocol(seq_len=16).model_dump(mode="json")
    assert PlainProtocol(seq_len=16, precision="bf16").model_dump(mode="json")["precision"] == "bf16"
    view, folders = pico_checkpoint.load(), []
    for precision in ("fp32", "bf16"):
        facts, cached = score_view(view, pico_data, make_protocol("plain", {"precision": precision}, 16, "eval"))
        assert not cached
        folders.append(facts["folder"])
    assert len(set(folders)) == 2
    assert score_view(view, pico_data, PlainProtocol(seq_len=16, precision="bf16"))[1]


def test_test_time_training_takes_it_where_the_method_has_it() -> None:
    given = {"precision": "bf16", "chunk_tokens": 8}
    assert make_protocol("ttt", given, 16, "eval", "lora").precision == "bf16"  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match="precision"):
        make_protocol("ttt", given, 16, "eval", "sgd")


@pytest.mark.parametrize("kind", [0, 1], ids=["plain", "sliding"])
def test_a_compiled_text_is_one_graph_whatever_its_batches(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, kind: int
) -> None:
    """One of `hidden`, padded to the largest batch, and one of `logits` for each number of rows; scoring adds none."""
    view, protocol = pico_checkpoint.load(), PROTOCOLS["bf16"][kind].model_copy(update={"seq_len": 16})
    tokens = pico_data.tokens("val", 2500)
    text, counters = (tokens, pico_data.token_bytes("val", tokens)), torch._dynamo.utils.counters
    batches = batches_of(protocol_spans(protocol, len(tokens) - 1), CPU_BATCH_TOKENS)  # type: ignore[arg-type]
    assert len({(len(batch), batch[0].length) for batch in batches}) > 1
    torch._dynamo.reset()
    counters.clear()
    pool = ModelPool(compiled=True, backend="eager")
    model = pool.load(view.config, view.tensors, "view", torch.device("cpu"))
    pool.warm_up(model, protocol, len(tokens), PhaseTimes())
    graphs = 1 + len({len(batch) * batch[0].scored for batch in batches})
    assert counters["stats"]["unique_graphs"] == graphs
    compiled = score_text(model, view.family, *text, protocol)[0]
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    eager = score_text(load_module(view.config, view.tensors, "view"), view.family, *text, protocol)[0]
    assert compiled.nats == pytest.approx(eager.nats, rel=1e-4)
