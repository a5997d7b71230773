"""The numbers of a diagnosis: one row says of one subject (a tensor, a block's visit, a head) one measured value.

`METRICS` is the table of everything that is measured, with its unit and its words: tables, pictures and the rules of
thumb (rules.py) all speak of metrics by these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

Part = Literal["weights", "embedding", "residual", "sites", "units", "logits", "attention", "removal", "scalars"]
PARTS: tuple[Part, ...] = get_args(Part)


class Metric(NamedTuple):
    """Row of METRICS: where the metric belongs, its unit and what it is."""

    part: Part
    unit: str  # empty: a plain ratio or count
    words: str


METRICS: dict[str, Metric] = {
    # weights of matrices
    "effective_rank": Metric("weights", "dimensions", "exp of the entropy of the normalised singular values"),
    "effective_rank_share": Metric("weights", "of the smaller side", "effective rank by width"),
    "effective_rank_squared": Metric("weights", "dimensions", "the same of the squared singular values"),
    "effective_rank_squared_share": Metric("weights", "of the smaller side", "effective rank (σ²) by width"),
    "stable_rank": Metric("weights", "dimensions", "‖W‖²_F / σ₁²"),
    "condition": Metric("weights", "", "largest singular value by smallest; none for a singular matrix"),
    "kurtosis": Metric("weights", "", "excess kurtosis of the weights; 0 for a normal distribution"),
    "worst_row_ratio": Metric("weights", "× median", "largest row norm by the median row norm; at: its row"),
    "beyond_3_sigma": Metric("weights", "of weights", "share of weights beyond 3 standard deviations"),
    "beyond_6_sigma": Metric("weights", "of weights", "share of weights beyond 6 standard deviations"),
    # rows of lookup tables
    "class_norm": Metric("embedding", "", "mean norm of the rows of a token class"),
    "word_start_norm_ratio": Metric("embedding", "", "mean norm of word starts by that of continuations"),
    "nearest_row_cosine": Metric("embedding", "", "largest cosine between two rows; at: the first of them"),
    "duplicate_rows": Metric("embedding", "rows", "rows whose nearest other row has a cosine above 0.9"),
    "byte_row_cosine": Metric("embedding", "", "mean cosine between the rows of byte-fallback pieces"),
    # residual stream, by visit
    "norm_before": Metric("residual", "", "mean norm of the residual before the block"),
    "norm_before_p99": Metric("residual", "", "99th percentile of the norm before the block"),
    "norm_after": Metric("residual", "", "mean norm of the residual after the block"),
    "norm_after_p99": Metric("residual", "", "99th percentile of the norm after the block"),
    "norm_tail": Metric("residual", "× mean", "99th percentile of the norm after the block by its mean"),
    "attention_share": Metric("residual", "of ‖x‖", "mean ‖Δx‖/‖x‖ of the attention"),
    "mlp_share": Metric("residual", "of ‖x‖", "mean ‖Δx‖/‖x‖ of the MLP"),
    # inputs of matrices
    "input_max": Metric("sites", "", "largest absolute input; at: its channel"),
    "input_p999": Metric("sites", "", "99.9th percentile of the absolute inputs, of a sample"),
    "input_peak": Metric("sites", "× median", "largest channel maximum by the median channel's; at: its channel"),
    # hidden units of MLPs
    "dead_units": Metric("units", "units", "units that never rise above a thousandth of the usual peak"),
    "saturated_units": Metric("units", "units", "units with a positive input at nearly every token: they are linear"),
    # logits
    "logit_max": Metric("logits", "of the cap", "largest absolute logit by the soft-cap"),
    "softcap_share": Metric("logits", "of logits", "share of logits beyond 90 % of the soft-cap"),
    "softcap_top_share": Metric("logits", "of tokens", "share of tokens whose largest logit is beyond 90 % of the cap"),
    # heads
    "attention_entropy": Metric("attention", "nats", "mean entropy of a head's attention"),
    "attention_entropy_share": Metric("attention", "of the largest", "mean entropy by the log of what is in reach"),
    "attention_sharpness": Metric("attention", "", "mean of a head's largest attention weight"),
    "first_token_share": Metric("attention", "of attention", "mean attention on the first token in the window"),
    "head_similarity": Metric(
        "attention", "", "mean cosine of a head's attention with the most similar head; at: which"
    ),
    # removal
    "removal_divergence": Metric("removal", "nats/token", "KL divergence if the block adds nothing"),
    "removal_divergence_error": Metric("removal", "nats/token", "standard error of that over windows"),
    # learned scalars
    "value": Metric("scalars", "", "the scalar itself"),
    "mean": Metric("scalars", "", "mean of the vector"),
    "abs_mean": Metric("scalars", "", "mean absolute value of the vector"),
    "abs_max": Metric("scalars", "", "largest absolute value of the vector; at: its index"),
    "skip_open": Metric("scalars", "", "mean share of the skip that its gate lets through"),
}


@dataclass(frozen=True)
class Number:
    """One measured value of one subject."""

    part: Part
    subject: str  # a tensor, a site, `blocks.3.attn head 2`, `blocks.3 visit 1`
    metric: str  # a key of METRICS
    value: float | None  # None: it has no finite value
    role: str = ""  # of a matrix, as its family names it
    layer: int | None = None
    visit: int | None = None  # from 1, in a forward pass
    at: int | None = None  # the row, channel, unit or head where an extreme lies
    note: str = ""  # what `at` is for people: a token's text, a list of units

    def facts(self) -> dict[str, Any]:
        """Return the number as JSON, without the fields that say nothing."""
        return {key: value for key, value in asdict(self).items() if key == "value" or value not in (None, "")}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Number:
        """Return what `facts` gave."""
        return cls(**facts)

    @property
    def unit(self) -> str:
        """The metric's unit."""
        return METRICS[self.metric].unit


def number(metric: str, subject: str, value: float | None, **more: Any) -> Number:
    """Return a number of a metric, under the metric's own part."""
    return Number(METRICS[metric].part, subject, metric, value, **more)
