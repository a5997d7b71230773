"""Rules of thumb: which numbers of a diagnosis are known as bad, by whose experience, and what to do.

A rule is a row of RULES: a metric, a limit and the side of it that is bad. Limits are not laws: each names its source,
and a marked number is a question, not a verdict. `diagnose --fail-on RULE` turns a rule into a gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pgolf_post.diagnose.numbers import Number
from pgolf_post.errors import SettingsError

NOTES = "participants' notes on the challenge"  # public write-ups of their runs


@dataclass(frozen=True)
class Rule:
    """A row of RULES."""

    name: str
    metric: str  # of numbers.METRICS
    bad: Literal["above", "below"]
    limit: float
    source: str
    advice: str  # what to do about it, one clause
    subject: str = ""  # only of subjects that hold this text

    def marks(self, number: Number) -> bool:
        """Whether this rule knows a number as bad; a value that is not finite is above every limit."""
        if number.metric != self.metric or self.subject not in number.subject:
            return False
        if number.value is None:
            return self.bad == "above"
        return number.value > self.limit if self.bad == "above" else number.value < self.limit


@dataclass(frozen=True)
class Mark:
    """A number with the rule that knows it as bad."""

    rule: Rule
    number: Number

    @property
    def excess(self) -> float:
        """Distance beyond the limit, as a factor of at least 1; the worst marks have the largest."""
        value = self.number.value
        if value is None:
            return float("inf")
        ratio = abs(value) / abs(self.rule.limit) if self.rule.limit else 1.0 + abs(value)
        return ratio if self.rule.bad == "above" else 1.0 / max(ratio, 1e-12)

    def facts(self) -> dict[str, Any]:
        """Return the mark as JSON."""
        rule = {key: getattr(self.rule, key) for key in ("bad", "limit", "source", "advice")}
        return {"rule": self.rule.name, **rule, **self.number.facts()}


RULES: tuple[Rule, ...] = (
    # weights
    Rule(
        "low-rank", "effective_rank_squared_share", "below", 0.10,
        f"{NOTES}: a block at 6.1 % of its width was dead, at 10.3 % it was alive again",
        "share this block with another layer, or store the matrix as two factors",
    ),
    Rule(
        "ill-conditioned", "condition", "above", 1e4,
        f"{NOTES}: the query matrix with condition 49,644 was the one that quantization hurt most",
        "give it more bits, or look at what `attribute --by tensor` says of it",
    ),
    Rule(
        "heavy-tails", "kurtosis", "above", 10.0,
        f"{NOTES}: a key matrix with kurtosis 33.8 was outlier-heavy",
        "clip by a larger multiple of σ, keep its outliers apart (LQER), or use a non-uniform grid",
    ),
    Rule(
        "outlier-row", "worst_row_ratio", "above", 5.0,
        f"{NOTES}: rows of 10 to 22 times the median hurt, 4.5 times did not",
        "use a scale for each row, or clamp the row in training",
    ),
    Rule(
        "beyond-6-sigma", "beyond_6_sigma", "above", 1e-4,
        "a normal distribution has 2e-9 there; a clip of k·σ cuts them off",
        "raise k for this tensor: `requant --clip`",
    ),
    # embedding
    Rule(
        "twin-rows", "nearest_row_cosine", "above", 0.95,
        f"{NOTES}: byte tokens with a cosine of 0.96 were confused with each other",
        "look whether both pieces occur in training text",
    ),
    Rule(
        "quiet-word-starts", "word_start_norm_ratio", "below", 0.90,
        f"{NOTES}: word starts with norms 12 % lower had 40 % of the tokens and 66 % of the loss",
        "untie the head, or see the loss by token class",
    ),
    # activations
    Rule(
        "residual-tail", "norm_tail", "above", 4.0,
        f"{NOTES}: growth of the residual norm was the cause of large quantization errors",
        "look at the inputs of the next block; a norm after skips helped",
    ),
    Rule(
        "quiet-attention", "attention_share", "below", 0.03,
        f"{NOTES}: a first block whose attention was scaled by 0.10 was hardly used",
        "measure its removal; an MLP alone may do",
    ),
    Rule(
        "quiet-mlp", "mlp_share", "below", 0.03,
        f"{NOTES}: as for the attention",
        "measure its removal; store its matrices in fewer bits",
    ),
    Rule(
        "activation-outlier", "input_peak", "above", 30.0,
        f"{NOTES}: an MLP input with a maximum of 1,314 caused 6.9 % of quantization error",
        "clamp it in training, or let AWQ scale the channel",
    ),
    Rule(
        "dead-units", "dead_units", "above", 0.0,
        "a unit that never fires costs bytes and changes no prediction",
        "remove the unit: `prune`, or a smaller mlp_mult",
    ),
    Rule(
        "softcap-saturation", "softcap_top_share", "above", 0.01,
        f"{NOTES}: a largest logit of 94 % of the cap was called not saturating",
        "raise logit_softcap",
    ),
    # attention
    Rule(
        "saturated-head", "attention_sharpness", "above", 0.95,
        "a head whose largest weight is nearly 1 copies one token and has no gradient left",
        "lower its q_gain",
    ),
    Rule(
        "uniform-head", "attention_entropy_share", "above", 0.97,
        "a head that attends to everything alike computes a mean",
        "raise its q_gain, or train with fewer heads",
    ),
    Rule(
        "twin-heads", "head_similarity", "above", 0.95,
        "two heads that look at the same tokens differ in their values alone",
        "share their keys (num_kv_heads), or train with fewer heads",
    ),
    # blocks
    Rule(
        "dead-block", "removal_divergence", "below", 0.005,
        "0.005 nats per token is what the challenge calls a record's difference",
        "leave the block out, or share another one in its place",
    ),
    # learned scalars
    Rule(
        "dead-scale", "abs_mean", "below", 0.05,
        f"{NOTES}: a boost that training drove to 0.017 was dead",
        "leave out what it scales", subject="_scale",
    ),
    Rule(
        "dead-skip", "abs_mean", "below", 0.05,
        f"{NOTES}: as for scales", "leave the skip out: encoder_visits", subject="skip_weights",
    ),
    Rule(
        "closed-skip", "skip_open", "below", 0.05,
        "a gate that lets less than a twentieth through has turned the skip off",
        "leave the skip out: encoder_visits",
    ),
    Rule(
        "runaway-mix", "abs_max", "above", 3.0,
        f"{NOTES}: a value mix of 3.26 came with instability, 0.9 did not",
        "clamp it, or lower scalar_lr", subject="mix",
    ),
)  # fmt: skip


def find_marks(numbers: Iterable[Number], rules: Sequence[Rule] = RULES) -> list[Mark]:
    """Return the numbers that a rule knows as bad, the furthest beyond its limit first."""
    marks = [Mark(rule, number) for number in numbers for rule in rules if rule.marks(number)]
    return sorted(marks, key=lambda mark: (-mark.excess, mark.rule.name, mark.number.subject))


def rule_named(name: str) -> Rule:
    """Return the rule of that name. Raises SettingsError naming the rules that there are."""
    found = next((rule for rule in RULES if rule.name == name), None)
    if found is None:
        raise SettingsError(f"unknown rule {name!r}; rules: {', '.join(rule.name for rule in RULES)}")
    return found
