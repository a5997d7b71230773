"""Expected differences: the definition, no chance left in them, and a text that is not as expected is noticed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.errors import MismatchError
from pgolf_post.score.compare.expected import ExpectedWindows
from pgolf_post.score.compare.screen import Screening, ScreenSettings, screen
from pgolf_post.score.compare.windows import bytes_of_windows
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import protocol_spans
from pgolf_post.score.spans import Span, num_targets
from tests.score.conftest import record_model

pytestmark = pytest.mark.slow

SEQ_LEN, WINDOWS = 8, 128
PLAIN = {"num_layers": 2, "xsa_last_n": 2, "loop_start": 0, "loop_end": 0, "num_loops": 0, "lanes_start": None}


@dataclass
class Setting:
    """A reference, two models near it, and a text in windows."""

    reference: Any
    candidate: Any
    control: Any
    tokens: np.ndarray
    token_bytes: np.ndarray
    spans: list[Span]

    def scorer(self, **modules: Any) -> ExpectedWindows:
        own = {"reference": self.reference, "candidate": self.candidate, "control": self.control, **modules}
        return ExpectedWindows(**own, tokens=self.tokens, token_bytes=self.token_bytes, spans=self.spans)

    def screen(self, scorer: ExpectedWindows, half_width_bpb: float) -> Screening:
        settings = ScreenSettings(half_width_bpb=half_width_bpb, stop_at_zero=False, look_every=16)
        return screen(scorer, self.all_bytes, SEQ_LEN * len(self.spans), settings, quiet=True)

    @property
    def all_bytes(self) -> np.ndarray:
        return bytes_of_windows(self.spans, self.token_bytes)


def near(module: Any, size: float, seed: int) -> Any:
    """A model with noise of a size on its weights."""
    made = deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return made


def sampled(module: Any) -> np.ndarray:  # (WINDOWS · SEQ_LEN + 1,)
    """A text of which every token is drawn from what the module says in its window."""
    random = np.random.default_rng(0)
    tokens = np.full(WINDOWS * SEQ_LEN + 1, 7)
    for place in range(len(tokens) - 1):
        window = torch.from_numpy(tokens[place - place % SEQ_LEN : place + 1])[None]
        shares = torch.softmax(module.logits(module.hidden(window))[0, -1].double(), -1).numpy()
        tokens[place + 1] = random.choice(len(shares), p=shares)
    return tokens.astype(np.uint16)


@pytest.fixture(scope="module")
def setting() -> Setting:
    reference = record_model(active_loops=0, **PLAIN)  # a text is drawn from it, word by word
    reference.tok_emb.weight.mul_(0.15)  # unsure of every word, as language models are
    tokens = sampled(reference)
    token_bytes = np.random.default_rng(1).integers(1, 5, len(tokens))
    spans = protocol_spans(PlainProtocol(seq_len=SEQ_LEN), num_targets(len(tokens), SEQ_LEN, "drop"))
    return Setting(reference, near(reference, 0.003, 1), near(reference, 0.005, 2), tokens, token_bytes, spans)


def test_the_difference_is_that_of_losses_over_all_words(setting: Setting) -> None:
    scorer = setting.scorer()
    first, second = scorer(np.array([3, 40]))
    expected = 0.0
    for window in (3, 40):
        inputs = torch.from_numpy(setting.tokens[8 * window : 8 * window + 8].astype(np.int64))[None]
        p, a, b = (
            torch.log_softmax(module.logits(module.hidden(inputs))[0].double(), -1)
            for module in (setting.reference, setting.candidate, setting.control)
        )
        expected += float((p.exp() * (b - a)).sum())
    assert first.nats - second.nats == pytest.approx(expected, abs=1e-5)
    assert first.tokens == second.tokens == 16


def test_it_leaves_out_the_luck_of_the_words(setting: Setting) -> None:
    scorer = setting.scorer()
    screening = setting.screen(scorer, 1e-9)
    exact = scorer.measured(setting.all_bytes, 0.95)
    assert (exact.half, screening.half) == (0.0, 1e-9)
    losses = [
        sum(
            float(torch.nn.functional.cross_entropy(module.logits(module.hidden(x))[0], y, reduction="sum"))
            for x, y in windows(setting)
        )
        for module in (setting.candidate, setting.control)
    ]
    total = int(setting.all_bytes.sum())
    assert exact.bpb == pytest.approx((losses[0] - losses[1]) / np.log(2) / total, abs=1e-5)
    expected = scorer.divergence_bits[0] - scorer.divergence_bits[1]
    assert expected.std() < 0.1 * scorer.measured_bits.std()
    assert screening.last.bpb == pytest.approx(expected.sum() / total, abs=1e-9)


def windows(setting: Setting) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.from_numpy(setting.tokens.astype(np.int64))
    return [
        (rows[s.start : s.start + s.length][None], rows[s.start + 1 : s.start + 1 + s.length]) for s in setting.spans
    ]


def test_text_as_the_reference_expects_holds_no_surprise_and_other_text_does(setting: Setting) -> None:
    def surprise(tokens: np.ndarray) -> Any:
        other = Setting(
            setting.reference, setting.candidate, setting.control, tokens, setting.token_bytes, setting.spans
        )
        scorer = other.scorer()
        scorer(np.arange(0, WINDOWS, 2))
        return scorer.surprise(setting.all_bytes, 0.99)

    own = surprise(setting.tokens)
    assert not own.excludes_zero
    assert own.half > 0
    assert surprise(np.full_like(setting.tokens, 7)).excludes_zero


def test_it_takes_less_text(setting: Setting) -> None:
    scorer = setting.scorer()
    setting.screen(scorer, 1e-9)
    spread = scorer.measured_bits.std() / setting.all_bytes.mean()
    half = 0.5 * spread / WINDOWS**0.5
    again = setting.scorer()
    assert setting.screen(again, half).last.windows < WINDOWS
    assert again.measured(setting.all_bytes, 0.95).half > half


def test_the_reference_diverges_nowhere_from_itself(setting: Setting) -> None:
    scorer = setting.scorer(candidate=setting.reference)
    scorer(np.arange(WINDOWS))
    own, other = scorer.divergences(setting.all_bytes, 0.95)
    assert abs(own.bpb) < 1e-7
    assert other.bpb > 1e-6


def test_another_vocabulary_is_refused(setting: Setting) -> None:
    with pytest.raises(MismatchError, match="the reference tells 320 tokens apart, another model 321") as caught:
        setting.scorer(control=record_model(vocab_size=321))(np.arange(4))
    assert "--reference" in str(caught.value.hint)


def test_chance_is_called_chance_as_often_as_it_says(setting: Setting) -> None:
    scorer = setting.scorer()
    scorer(np.arange(WINDOWS))
    random = np.random.default_rng(2)
    size = scorer.measured_bits - scorer.divergence_bits[0] + scorer.divergence_bits[1]
    expected = scorer.divergence_bits[0] - scorer.divergence_bits[1]
    called = 0
    for _ in range(400):  # the text again with other words: surprises of either sign, of these sizes
        scorer.measured_bits = expected + size * random.choice([-1, 1], WINDOWS)
        surprise = scorer.surprise(setting.all_bytes, 0.9)
        called += surprise.excludes_zero
    assert 0.05 <= called / 400 <= 0.15
    scorer.measured_bits = expected + np.abs(size)
    assert scorer.surprise(setting.all_bytes, 0.9).excludes_zero


def test_every_window_keeps_its_own_divergence(setting: Setting) -> None:
    both, alone = setting.scorer(), setting.scorer()
    both(np.array([3, 40]))
    alone(np.array([40]))
    assert both.divergence_bits[:, 40] == pytest.approx(alone.divergence_bits[:, 40], abs=1e-6)
    assert not np.allclose(both.divergence_bits[:, 3], both.divergence_bits[:, 40], rtol=0.01)


def test_intervals_of_a_few_windows_hold_the_truth_as_often_as_they_say(setting: Setting) -> None:
    scorer = setting.scorer()
    scorer(np.arange(WINDOWS))
    truth, random, held = scorer.measured(setting.all_bytes, 0.9).bpb, np.random.default_rng(3), 0
    for _ in range(400):
        scorer.drawn = np.isin(np.arange(WINDOWS), random.choice(WINDOWS, 10, replace=False))
        found = scorer.measured(setting.all_bytes, 0.9)
        held += abs(found.bpb - truth) <= found.half
    assert 0.85 <= held / 400 <= 0.95
