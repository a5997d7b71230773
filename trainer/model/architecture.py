"""The architecture as settings: what a model is built from, and its runtime graph state.

The depth-recurrent U-Net of the record line is a *list of visits* to blocks, split into an encoder half, whose outputs
are kept, and a decoder half, which takes them back in reverse. The list is given in shorthand (blocks a..b, n extra
times) or in full (visits.py). How much of it is active is runtime state (`GraphState`), not a weight: it changes
during training and is stored in every checkpoint. Parts that most models lack have settings of their own
(parts.py), each in the file of its concept.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pgolf_post.settings import Settings
from trainer.model.activations import ActivationNames
from trainer.model.head import HeadSettings, check_head
from trainer.model.layers import (
    LayerSettings,
    check_absent,
    check_layers,
    check_lengths,
    check_listed_once,
    check_values,
)
from trainer.model.ngrams import NgramSettings, check_ngrams
from trainer.model.passes import PassSettings, check_passes
from trainer.model.residual import ResidualSettings, check_residual
from trainer.model.smear import ChannelSmear
from trainer.model.start_settings import StartSettings, check_starts
from trainer.model.token_kinds import TokenKindSettings, TokenTypeSettings, check_token_kinds
from trainer.model.value_paths import ValueSettings, check_value_paths
from trainer.model.visits import (
    looped_layers,
    num_places,
    revisit_in_lanes,
    revisits,
    usable_skips,
    visit_after_lanes,
    visit_before_lanes,
    visit_list,
    visits_in_lanes,
)

LaneKind = Literal["routed", "sequential", "separate"]
BigramHash = Literal["xor", "product"]
AttentionGate = Literal["none", "sparse", "dense", "double_sigmoid"]
LaneOutput = Literal["mean", "attn", "mlp"]
Carry = Literal["none", "frozen", "learnable"]


class ArchitectureSettings(
    LayerSettings,
    PassSettings,
    ValueSettings,
    NgramSettings,
    TokenTypeSettings,
    ResidualSettings,
    HeadSettings,
    StartSettings,
):
    """The architecture, without what the data decides. Defaults: the record line's values at width 512."""

    num_layers: int = Field(11, ge=1, description="number of blocks")
    model_dim: int = Field(512, ge=2, description="width of the residual stream")
    embedding_dim: int | None = Field(None, ge=1, description="width of the embedding; default model_dim")
    num_heads: int = Field(8, ge=1, description="query heads")
    num_kv_heads: int = Field(4, ge=1, description="key-value heads, each shared by a group of query heads")
    mlp_mult: float | tuple[float, ...] = Field(
        4.0, description="hidden width = int(mlp_mult · model_dim), 0 = no MLP; one number, or one per layer"
    )
    mlp_hidden: int | tuple[int, ...] | None = Field(
        None, description="hidden width itself, in place of mlp_mult; one number, or one per layer"
    )
    activation: ActivationNames = Field(
        "leaky_relu2", description="a name in trainer/model/activations.py, or one per layer"
    )
    leaky_slope: float = Field(0.5, ge=0, le=1, description="slope of leaky_relu2 below 0, before it is squared")
    tie_embeddings: bool = Field(True, description="use the embedding as the head's matrix")
    logit_softcap: float = Field(30.0, gt=0, description="cap of the logits cap·tanh(z / cap)")
    rope_base: float | tuple[float, ...] = Field(
        10000.0, description="base of the rotary frequencies, or one per layer"
    )
    rope_dims: int | tuple[int, ...] = Field(16, description="rotated dimensions per head, or one per layer; 0 = all")
    rope_ntk: bool = Field(True, description="stretch the rotary base beyond the training length")
    rope_ntk_from: int | None = Field(
        None, ge=2, description="tokens beyond which rope_ntk stretches the base; default the training length"
    )
    q_gain_init: float | tuple[float, ...] | tuple[tuple[float, ...], ...] = Field(
        4.0,
        description="starting gain of each head's query; or one per layer; or a list of heads, for all or per layer",
    )
    xsa_last_n: int = Field(11, ge=0, description="XSA on the last n layers")
    ln_scale: bool = Field(True, description="scale layer i's normalised input by 1/√(i+1)")
    skip_gates: bool = Field(True, description="gate each U-Net skip per channel")
    stored_skips: int | None = Field(
        None, ge=0, description="rows of skip_weights; default as many as the longest list of visits can use"
    )
    reuse_last_skip: bool = Field(False, description="visits beyond stored_skips use its last row; false = no skip")
    loop_start: int = Field(0, ge=0, description="first block of the loop")
    loop_end: int = Field(0, ge=0, description="last block of the loop")
    num_loops: int = Field(0, ge=0, description="extra visits of blocks loop_start..loop_end")
    visits: tuple[int, ...] | None = Field(None, description="all visits in order, in place of loop_start..num_loops")
    encoder_visits: int | None = Field(
        None, ge=0, description="visits in the first half of every list that is long enough; default half of the list"
    )
    carry: Carry = Field(
        "none", description="re-visits of looped blocks add the first outputs of looped blocks, with these coefficients"
    )
    carry_per_pass: bool = Field(False, description="carry coefficients of their own for each re-visit")
    carry_beta: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = Field(
        None, description="starting β of each looped block; with carry_per_pass also a list per pass; default 1"
    )
    carry_alpha: tuple[tuple[float, ...], ...] | tuple[tuple[tuple[float, ...], ...], ...] | None = Field(
        None, description="starting α, one row per block; with carry_per_pass also such rows per pass; default 0"
    )
    visit_controls: bool = Field(
        False, description="gains and mixes of each place in the list of visits, not of layers"
    )
    first_attention: bool = Field(True, description="block 0 has attention; false = only its MLP")
    untied_loop_mlps: bool = Field(False, description="an MLP of its own for each re-visit of a block")
    gptj_start: int | None = Field(None, ge=0, description="from this layer on, attention and MLP read the same input")
    embedding_init_std: float = Field(0.005, gt=0, description="standard deviation of the initial embedding")
    smear_gate: bool = Field(False, description="add a gated share of the predecessor's embedding to each token's")
    smear_across_bos: bool = Field(False, description="the smear gate does not stop at BOS, which opens a document")
    channel_smear: ChannelSmear = Field(
        "none", description="blend each token's embedding with its predecessor's per channel, after or before the norm"
    )
    attn_gate: AttentionGate = Field("none", description="gate on each head's output")
    attn_gate_scale: float = Field(0.5, gt=0, description="factor of the sparse gate's logit")
    attn_gate_source: Literal["input", "query"] = Field("input", description="input of the double-sigmoid gate")
    gate_window: int = Field(12, ge=1, description="leading dimensions that the narrow gates read")
    lanes_start: int | None = Field(
        None,
        ge=0,
        description="two residual lanes from this layer on, in the decoder half; later visits of layers below it go "
        "to a third stream that nothing reads, as in the public scripts; 0 = weights kept, unused",
    )
    lane_kind: LaneKind = Field(
        "routed", description="both parts read what the last visit left, or one after the other, or each its own lane"
    )
    lane_output: LaneOutput = Field("mean", description="the lane, or the mean of both, that the last norm reads")
    isolate_documents: bool = Field(False, description="attention stays within a document, each opened by BOS")
    document_cut: int | None = Field(
        None, ge=2, description="isolated documents are cut into pieces of so many tokens that do not see each other"
    )
    value_residual: bool = Field(False, description="mix each attention's values with those of the first visit")
    value_embed_layers: tuple[int, ...] = Field((), description="layers whose values get a token embedding")
    value_embed_dim: int = Field(0, ge=0, description="width of the value embedding's table")
    bigram_buckets: int = Field(0, ge=0, description="rows of the hashed bigram table; 0 = none")
    bigram_dim: int | None = Field(None, ge=1, description="width of the bigram table; default that of the embedding")
    bigram_hash: BigramHash = Field(
        "xor", description="hash of the bigram table, and whether it has a scale (xor) or none (product)"
    )
    trigram: bool = Field(False, description="look trigrams up in the bigram table too")

    @model_validator(mode="after")
    def _consistent(self) -> ArchitectureSettings:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        check_lengths(self)
        check_values(self)
        if self.num_loops and not self.loop_start <= self.loop_end < self.num_layers:
            raise ValueError(f"loops need loop_start ≤ loop_end < num_layers, got {self.loop_start}, {self.loop_end}")
        if self.lanes_start and self.gptj_start is not None:
            raise ValueError("lanes_start and gptj_start are two forms of parallel residuals; set one")
        return self

    @model_validator(mode="after")
    def _visits_consistent(self) -> ArchitectureSettings:
        if self.visits is not None:
            if self.num_loops or self.loop_start or self.loop_end:
                raise ValueError("visits replaces loop_start, loop_end and num_loops; set one or the other")
            check_layers("visits", self.visits, self.num_layers)
            if not self.visits:
                raise ValueError("visits is empty; leave it out for one visit of each layer")
        if self.lane_kind == "sequential" and (layer := visit_before_lanes(self)) is not None:
            raise ValueError(
                f"layer {layer} comes before the decoder half; lanes, here from lanes_start {self.lanes_start} on, "
                "begin in that half"
            )
        if self.lane_kind == "sequential" and (layer := visit_after_lanes(self)) is not None:
            raise ValueError(
                f"{'visits' if self.visits is not None else 'loops'}: layer {layer} comes after the lanes split at "
                f"lanes_start {self.lanes_start}; sequential lanes take no layer below that"
            )
        longest = len(visit_list(self, self.max_active_loops))
        if self.encoder_visits is not None and self.encoder_visits > longest:
            raise ValueError(f"encoder_visits {self.encoder_visits} exceeds the {longest} visits of the list")
        if self.stored_skips is not None and self.stored_skips > usable_skips(self):
            raise ValueError(f"stored_skips {self.stored_skips} exceeds the {usable_skips(self)} that visits can use")
        if self.reuse_last_skip and self.stored_skips is None:
            raise ValueError("reuse_last_skip does nothing without stored_skips")
        return self

    @model_validator(mode="after")
    def _recurrence_consistent(self) -> ArchitectureSettings:
        size = len(looped_layers(self))
        if (self.carry != "none" or self.untied_loop_mlps) and not size:
            raise ValueError("carry and untied_loop_mlps need a layer that is visited twice: set num_loops or visits")
        lists = [visit_list(self, active) for active in range(self.max_active_loops + 1)]
        late = [visits_in_lanes(self, active) for active in range(len(lists))]
        if not self.first_attention and self.lane_kind == "separate" and any(0 in visits for visits in late):
            raise ValueError("first_attention = false: block 0 cannot be visited in lanes")
        if not self.first_attention and self.visit_controls and any(visits[:1] != [0] for visits in lists):
            raise ValueError("first_attention = false with visit_controls: lists must begin with block 0")
        if self.visit_controls and num_places(self) <= self.num_layers:
            raise ValueError("visit_controls needs a list with more visits than layers: set num_loops or visits")
        if self.carry == "none" and (self.carry_per_pass or self.carry_beta or self.carry_alpha):
            raise ValueError("carry_per_pass, carry_beta and carry_alpha do nothing with carry 'none'")
        check_carry(self)
        if self.carry != "none" and (layer := revisit_in_lanes(self)) is not None:
            raise ValueError(
                f"carry has one residual lane to add to, but layer {layer} is re-visited after lanes split"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_consistent(self) -> ArchitectureSettings:
        if not self.bigram_buckets and (self.trigram or self.bigram_dim is not None):
            raise ValueError("trigram and bigram_dim do nothing with bigram_buckets 0")
        if self.bigram_hash == "product" and (self.trigram or not self.bigram_buckets):
            raise ValueError("bigram_hash 'product' needs a bigram table, and has no trigrams")
        places = num_places(self) if self.visit_controls else self.num_layers
        check_listed_once("value_embed_layers", self.value_embed_layers, places)
        check_listed_once("xsa_layers", self.xsa_layers or (), places)
        if bool(self.value_embed_layers) != bool(self.value_embed_dim):
            raise ValueError("value_embed_layers and value_embed_dim go together: set both or neither")
        if self.smear_across_bos and not self.smear_gate:
            raise ValueError("smear_across_bos does nothing without smear_gate = true")
        return self

    @model_validator(mode="after")
    def _parts_consistent(self) -> ArchitectureSettings:
        for check in PART_CHECKS:
            check(self)
        return self

    @model_validator(mode="after")
    def _documents_consistent(self) -> ArchitectureSettings:
        if self.document_cut is not None and not self.isolate_documents:
            raise ValueError("document_cut does nothing without isolate_documents = true")
        return self

    @property
    def max_active_loops(self) -> int:
        """The largest `GraphState.active_loops`: an explicit list is either off (0) or on (1)."""
        return self.num_loops if self.visits is None else 1


PART_CHECKS = (
    check_absent,
    check_passes,
    check_value_paths,
    check_ngrams,
    check_residual,
    check_head,
    check_starts,
)


def check_carry(settings: ArchitectureSettings) -> None:
    """Raise ValueError unless α and β, in each pass, have a place for each looped layer."""
    layers, passes = looped_layers(settings), max(revisits(settings).values(), default=0)
    size = len(layers)
    for key, axes in (("carry_beta", 1), ("carry_alpha", 2)):
        value = getattr(settings, key)
        if value is None:
            continue
        has_passes = depth(value) == axes + 1
        if has_passes and not settings.carry_per_pass:
            raise ValueError(f"{key} lists passes, which needs carry_per_pass = true")
        if has_passes and len(value) != passes:
            raise ValueError(f"{key} lists {len(value)} passes; layers are re-visited {passes} times")
        for each in value if has_passes else (value,):
            rows = (each,) if axes == 1 else each
            if any(len(row) != size for row in rows):
                raise ValueError(f"{key} must have {size} columns, one for each of the layers {layers}")
            if axes == 2 and len(rows) != size:
                raise ValueError(f"{key} has {len(rows)} rows, must have {size}")


def depth(value: object) -> int:
    """Return how many lists a number is nested in."""
    return 1 + depth(value[0]) if isinstance(value, tuple) and value else int(isinstance(value, tuple))


class ModelConfig(ArchitectureSettings, TokenKindSettings):
    """Everything `GolfGPT` is built from; stored in a checkpoint's config.json."""

    vocab_size: int = Field(ge=2, le=65536, description="number of tokens")
    train_seq_len: int = Field(ge=2, description="longest text, in tokens, that attention saw in training")

    @model_validator(mode="after")
    def _kinds_known(self) -> ModelConfig:
        check_token_kinds(self)
        return self


class GraphState(Settings):
    """Runtime graph state: how many of the configured extra visits are active (1 = all of an explicit list)."""

    active_loops: int = Field(0, ge=0, description="extra visits that are active")
