"""The one model and its one forward: the record architecture.

Embedding (with hashed bigrams, smeared with its predecessor) → RMSNorm → a list of block visits in U-Net order →
RMSNorm → tied (or own) head → tanh soft-cap. Some blocks are visited several times (depth recurrence); how often is
`GraphState`, and a model evaluated with its loops off silently loses most of its quality, so that state travels with
every checkpoint. The definition of right is the logits of the public scripts (openai/parameter-golf, train_gpt.py and
its records).
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import SettingsError
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.attention import Context, rotary_angles, whole_angles
from trainer.model.attention_backends import SDPA, Reach
from trainer.model.block import MLP, Block, BlockVisit
from trainer.model.controls import Controls, Place
from trainer.model.head import HeadResidual
from trainer.model.lanes import START, Lanes, lanes_with_skip, visit_routed, visit_separate, visit_sequential
from trainer.model.layers import has_xsa, mlp_widths, rotations
from trainer.model.ngrams import NgramEmbedding, TrigramEmbedding
from trainer.model.norms import at_least_float32, rms_norm
from trainer.model.passes import Passes, has_passes
from trainer.model.past import LOOK_BACK, Past
from trainer.model.recurrence import Recurrence, carry_coefficients
from trainer.model.smear import channel_smear, narrow_smear
from trainer.model.token_kinds import TokenKinds, TokenTypeEmbedding, reads_token_kinds
from trainer.model.value_embedding import ValueEmbedding
from trainer.model.visits import (
    is_left_behind,
    looped_layers,
    num_places,
    num_skips,
    revisits,
    split_visits,
    visit_list,
)

ZERO_INIT = re.compile(
    r".*attn\.proj\.weight|.*mlp\.proj\.weight|override_mlps\..*\.proj\.weight|lm_head\.weight"
    r"|(bigram|trigram)\.embed\.weight|(value_embed|token_type)\.proj\.weight|head_residual\.up\.weight"
)


def document_pieces(
    tokens: Tensor,  # (batch, seq_len)
    cut: int | None,  # tokens in a piece at most; None = whole documents
) -> Tensor:  # (batch, seq_len) int64
    """Number the documents of a window, or their pieces; a window opens a document, with or without its BOS."""
    starts = tokens == BOS_ID
    if cut is not None:
        position = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        start = torch.where(starts, position, 0).cummax(1).values
        starts = starts | ((position - start) % cut == 0)
    return starts.cumsum(1)


class GolfGPT(nn.Module):
    """The model. `graph.active_loops` may be changed between calls; weights never depend on it."""

    few_kernels = False  # compute in forms of which a compiler makes fewer kernels; they round otherwise
    angles: list[tuple[Tensor, Tensor]] | None = None  # of each layer, for windows of their length: made beforehand

    def __init__(self, config: ModelConfig, graph: GraphState) -> None:
        super().__init__()
        self.config = config
        self.set_graph(graph)
        self.attention_backend = SDPA  # how attention is computed, not what; a run may choose another
        embedding_dim = config.embedding_dim or config.model_dim
        self.tok_emb = nn.Embedding(config.vocab_size, embedding_dim)
        if config.bigram_buckets:
            self.bigram = NgramEmbedding(config)
        if config.trigram_buckets:
            self.trigram = TrigramEmbedding(config)
        if reads_token_kinds(config):
            self.token_kinds = TokenKinds(config)
        if config.token_type_dim:
            self.token_type = TokenTypeEmbedding(config)
        if config.value_embed_layers:
            self.value_embed = ValueEmbedding(config)
        if config.smear_gate:
            self.smear_gate = nn.Parameter(torch.zeros(1, config.gate_window))
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.channel_smear == "after_norm":
            self.channel_smear = nn.Parameter(torch.zeros(embedding_dim))  # logits of the predecessor's share
        elif config.channel_smear == "before_norm":
            self.channel_keep = nn.Parameter(torch.full((embedding_dim,), 3.0))  # logits of the token's own share
        if embedding_dim != config.model_dim:
            self.embed_proj = nn.Linear(embedding_dim, config.model_dim, bias=False)
            self.head_proj = nn.Linear(config.model_dim, embedding_dim, bias=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self._add_recurrence(config)
        self.skip_weights = nn.Parameter(torch.ones(num_skips(config), config.model_dim))
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips(config), config.model_dim))
        if config.lanes_start is not None and config.lane_kind == "separate":
            self.lane_merge = nn.Parameter(torch.tensor(0.5))
        elif config.lanes_start is not None:
            self.parallel_post_lambdas = nn.Parameter(torch.ones(config.num_layers, 2, 2))
            self.parallel_resid_lambdas = nn.Parameter(torch.full((config.num_layers, 2), START[config.lane_kind]))
        if config.head_residual_rank:
            self.head_residual = HeadResidual(config)
        if config.output_bias != "none":
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.head_in = nn.Identity()  # the head's input passes here, so that calibration can see it
        self.head_out = nn.Identity()  # and the head's product, before the soft-cap
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(embedding_dim, config.vocab_size, bias=False)

    def _add_recurrence(self, config: ModelConfig) -> None:
        """Add the parameters of re-visits: carry coefficients and, if untied, MLPs named {layer}_p{re-visit}."""
        self.looped = looped_layers(config)
        if config.carry != "none":
            self.recur_beta, self.recur_alpha = carry_coefficients(config)
        if config.visit_controls:
            layers = visit_list(config, config.max_active_loops)
            beyond = range(config.num_layers, num_places(config))
            self.places = nn.ModuleDict({str(place): Place(config, layers[place]) for place in beyond})
        if config.untied_loop_mlps:
            counts = [(layer, count) for layer, count in revisits(config).items() if mlp_widths(config)[layer]]
            mlps = {f"{layer}_p{k}": MLP(config, layer) for layer, count in counts for k in range(1, count + 1)}
            self.override_mlps = nn.ModuleDict(mlps)
        if has_passes(config):
            self.passes = Passes(config)

    def set_graph(self, graph: GraphState) -> None:
        """Change the runtime graph state. Raises SettingsError beyond what the config can activate."""
        config = self.config
        if graph.active_loops > config.max_active_loops:
            limit = (
                f"the configured num_loops {config.num_loops}" if config.visits is None else "1, the explicit visits"
            )
            raise SettingsError(f"active_loops {graph.active_loops} exceeds {limit}")
        self.graph = graph

    def initialise(self) -> None:
        """Initialise as the record does: orthogonal matrices, zero output projections, small embedding; torch's RNG."""
        for name, parameter in self.named_parameters():
            if ZERO_INIT.fullmatch(name):
                nn.init.zeros_(parameter)
            elif name in ("tok_emb.weight", "value_embed.embed.weight", "token_type.embed.weight"):
                nn.init.normal_(parameter, std=self.config.embedding_init_std)
            elif name.endswith(".weight") or name == "passes.basis":
                nn.init.orthogonal_(parameter)

    def _rotary(self, seq_len: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return cos and sin of each layer; layers that rotate alike share them."""
        if self.angles is not None and len(self.angles[0][0]) == seq_len:
            return self.angles
        config, dtype = self.config, at_least_float32(self.tok_emb.weight.dtype)
        longest = min(seq_len, config.document_cut or seq_len)  # what attention can see
        unstretched = config.rope_ntk_from or config.train_seq_len
        made = {}
        for dims, base in dict.fromkeys(rotations(config)):
            stretched = base
            if config.rope_ntk and longest > unstretched:
                stretched *= (longest / unstretched) ** (dims / (dims - 2))
            made[dims, base] = rotary_angles(seq_len, dims, stretched, device, dtype)
        return [made[rotation] for rotation in rotations(config)]

    def fix_angles(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the angles of windows of a length once, in the form that each attention takes."""
        head_dim, fixed = self.config.model_dim // self.config.num_heads, []
        made: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        for block, angles in zip(self.blocks, self._rotary(seq_len, device), strict=True):
            assert isinstance(block, Block)
            stacked = block.has_attention and block.attn.qkv is not None
            key = id(angles), stacked  # equal ones are one object
            if key not in made:
                made[key] = whole_angles(*angles, head_dim, dtype) if stacked else angles
            fixed.append(made[key])
        self.angles = fixed

    def _skip_row(self, index: int) -> int | None:
        """Return the row of skip_weights that second-half visit `index` uses; None if there is none for it."""
        stored = self.skip_weights.size(0)
        if self.config.reuse_last_skip:
            index = min(index, stored - 1)
        return index if 0 <= index < stored else None

    def _skip(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        """Add a U-Net skip with a row of the weights, gated where the model has gates."""
        skip = rms_norm(skip) if self.config.skip_norm == "before" else skip
        if not self.config.skip_gates:
            x = x + self.skip_weights[row] * skip
        elif self.few_kernels:  # two factors a channel, whose gradients are two sums
            gate = torch.sigmoid(self.skip_gates[row].to(at_least_float32(x.dtype)))
            x = gate.to(x.dtype) * x + (self.skip_weights[row] * (1 - gate)).to(x.dtype) * skip
        else:
            x = torch.lerp(self.skip_weights[row] * skip, x, torch.sigmoid(self.skip_gates[row]).to(x.dtype))
        return rms_norm(x) if self.config.skip_norm == "after" else x

    def _skip_lanes(self, lanes: Lanes, skip: Tensor | None, row: int | None, has_just_split: bool) -> Lanes:
        """Add a U-Net skip to the lanes that take it."""
        if skip is None or row is None:
            return lanes
        takes = lanes_with_skip(self.config.lane_kind, has_just_split)
        first, second = (self._skip(lane, skip, row) if t else lane for lane, t in zip(lanes, takes, strict=True))
        return first, second

    def _embed(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) → (batch, seq_len, model_dim)
        """Return the embedding: tokens, n-grams, types, smear gates, norm, and the projection if widths differ."""
        config = self.config
        x = embedded = self.tok_emb(tokens)
        kinds = self.token_kinds(tokens) if reads_token_kinds(config) else None
        if config.bigram_buckets:
            x = x + self.bigram(tokens, embedded, kinds)
        if config.trigram_buckets:
            x = x + self.trigram(tokens)
        if config.token_type_dim:
            x = x + self.token_type(kinds)
        if config.smear_gate:
            x = narrow_smear(x, tokens, self.smear_gate, self.smear_lambda, config.smear_across_bos)
        if config.channel_smear == "before_norm":
            x = channel_smear(x, self.channel_keep, of_predecessor=False)
        x = rms_norm(x)
        if config.channel_smear == "after_norm":
            x = channel_smear(x, self.channel_smear, of_predecessor=True)
        return self.embed_proj(x) if hasattr(self, "embed_proj") else x

    def embed_alone(self, tokens: Tensor) -> Tensor:  # (n,) → (n, model_dim)
        """Return the embedding of tokens by themselves, without n-grams and neighbours."""
        x = rms_norm(self.tok_emb(tokens))
        return self.embed_proj(x) if hasattr(self, "embed_proj") else x

    def _recurrence(self) -> Recurrence:
        if self.config.carry == "none":
            return Recurrence([])
        return Recurrence(self.looped, self.recur_beta, self.recur_alpha)

    def _mlp(self, layer: int, revisit: int) -> MLP | None:
        """Return the MLP of this visit: the block's own on the first and, unless untied, on every other."""
        if not mlp_widths(self.config)[layer]:
            return None
        untied = revisit and self.config.untied_loop_mlps
        mlp = self.override_mlps[f"{layer}_p{revisit}"] if untied else self.blocks[layer].mlp
        assert isinstance(mlp, MLP)
        return mlp

    def _controls(self, place: int) -> Controls | None:
        """Return the gains of a place in the list of visits; None if layers have them."""
        if not self.config.visit_controls:
            return None
        if place >= self.config.num_layers:
            beyond = self.places[str(place)]
            assert isinstance(beyond, Place)
            return beyond.controls(self.config, place)
        block = self.blocks[place]
        assert isinstance(block, Block)
        if not block.has_attention:  # only ever visited at its own place
            return None
        use_xsa = has_xsa(self.config, place, num_places(self.config))
        return Controls(
            block.attn_scale, block.mlp_scale, block.resid_mix, block.attn.q_gain, block.norm_scale, use_xsa, place
        )

    def _visit(self, layer: int, x: Tensor, x0: Tensor, context: Context, recurrence: Recurrence) -> Tensor:
        """Visit a block with a single residual stream."""
        controls, block = self._controls(recurrence.place), self.blocks[layer]
        assert isinstance(block, Block)
        revisit = recurrence.enter(layer)
        if has_passes(self.config) and self.graph.active_loops:
            x = self.passes(x, layer, revisit)
        output: Tensor = block(block.stream_in(x), x0, context, self._mlp(layer, revisit), controls)
        carried: Tensor = block.stream_out(recurrence.carry(layer, revisit, output))
        return carried

    def _visit_lanes(self, layer: int, lanes: Lanes, x0: Tensor, context: Context, recurrence: Recurrence) -> Lanes:
        """Visit a block with two residual lanes."""
        block, controls = self.blocks[layer], self._controls(recurrence.place)
        assert isinstance(block, Block)
        visited, mlp = BlockVisit(block, controls), self._mlp(layer, recurrence.enter(layer))
        lanes = block.stream_in(lanes)
        if self.config.lane_kind == "separate":
            left = visit_separate(visited, lanes, x0, context, mlp)
        else:
            visit = visit_routed if self.config.lane_kind == "routed" else visit_sequential
            keep, post = self._lane_shares(x0, context)
            left = visit(visited, lanes, x0, context, mlp, keep[layer], post[layer])
        watched: Lanes = block.stream_out(left)
        return watched

    def _lane_shares(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return what lanes keep, (num_layers, 2), and what they are given, (num_layers, 2, 2).

        In forms for a compiler both are spread over positions, (…, batch, seq_len, 1).
        """
        keep, post = self.parallel_resid_lambdas, self.parallel_post_lambdas
        if not self.few_kernels:
            return keep, post
        both = {"keep": keep[..., None, None, None], "post": post[..., None, None, None]}
        first, second = (context.spread(name, one, (*one.shape[:-3], *x.shape[:-1], 1)) for name, one in both.items())
        return first, second

    def _merge(self, lanes: Lanes) -> Tensor:
        if self.config.lane_kind == "separate":
            return self.lane_merge * lanes[0] + (1 - self.lane_merge) * lanes[1]
        if self.config.lane_output == "mean":
            return 0.5 * (lanes[0] + lanes[1])
        return lanes[0] if self.config.lane_output == "attn" else lanes[1]

    def reach(
        self,
        tokens: Tensor,  # (batch, seq_len) int64, on the CPU or the model's device
        document: Tensor | None = None,  # (batch, seq_len), ascending: attention stays within equal values
    ) -> Reach:
        """Return who attends to whom, in the attention backend's form; without `document`, as configured."""
        if document is None and self.config.isolate_documents:
            document = document_pieces(tokens, self.config.document_cut)
        backend, device = self.attention_backend, self.tok_emb.weight.device
        return Reach(backend, backend.reach(tokens, document, device))

    def _reach(self, tokens: Tensor, seen: Tensor, document: Tensor | Reach | None, past: Past | None) -> Reach:
        """Return the reach of new tokens: as given, as configured, or over all that a past has seen."""
        if isinstance(document, Reach):
            return document
        if past is None:
            return self.reach(tokens, document)
        if document is None and self.config.isolate_documents:
            document = document_pieces(seen, self.config.document_cut)
        return Reach(SDPA, past.mask(tokens.size(1), document))

    def hidden(
        self,
        tokens: Tensor,  # (batch, seq_len) int64
        document: Tensor | Reach | None = None,  # as in `reach`, or what it gave
        past: Past | None = None,  # of `start_past`: tokens then continue what earlier calls read, document spans all
    ) -> Tensor:  # (batch, seq_len, embedding_dim)
        """Return the head's input: final hidden states after the last norm (and head_proj)."""
        # Tokens so far, and where the new ones stand among them.
        seen, new = tokens if past is None else past.read(tokens), tokens.size(1)
        positions = slice(seen.size(1) - new, seen.size(1))

        # What all attentions share: rotary angles, who attends to whom, value embeddings.
        value_embeddings = self.value_embed(tokens) if self.config.value_embed_layers else {}
        rotary = self._rotary(new if past is None else past.capacity, tokens.device)
        angles = rotary if past is None else [(cos[positions], sin[positions]) for cos, sin in rotary]
        reach = self._reach(tokens, seen, document, past)

        # The embedding, from as far back as it looks.
        recurrence = self._recurrence()
        x = x0 = self._embed(seen[:, max(0, positions.start - LOOK_BACK) :])[:, -new:]
        context = Context(angles, reach, value_embeddings, past, x0)

        # Encoder: every visit leaves its output for a skip.
        encoder, decoder = split_visits(self.config, self.graph.active_loops)
        skips: list[Tensor] = []
        for layer in encoder:
            x = self._visit(layer, x, x0, context, recurrence)
            skips.append(x)

        # Decoder: every visit takes a skip back, the last one first; from lanes_start on, in two residual lanes. Visits
        # that routed lanes leave behind go on with the stream from before the split, which nothing reads again.
        lanes: Lanes | None = None
        for index, layer in enumerate(decoder):
            has_just_split = bool(lanes is None and self.config.lanes_start and layer >= self.config.lanes_start)
            if has_just_split:
                lanes = x, x
            row = self._skip_row(index) if len(skips) > 0 else None  # torch 2.11 compiles no bool(list)
            skip = None if row is None else skips.pop()
            if lanes is None or is_left_behind(self.config, layer):
                x = x if skip is None or row is None else self._skip(x, skip, row)
                x = self._visit(layer, x, x0, context, recurrence)
            else:
                lanes = self._skip_lanes(lanes, skip, row, has_just_split)
                lanes = self._visit_lanes(layer, lanes, x0, context, recurrence)

        # One stream again, normalised and as wide as the head reads it.
        x = rms_norm(x if lanes is None else self._merge(lanes))
        if self.config.head_residual_rank:
            x = self.head_residual(x)
        if hasattr(self, "head_proj"):
            x = self.head_proj(x)
        return self.head_in(x)

    def uncapped_logits(self, hidden: Tensor) -> Tensor:  # (…, embedding_dim) → (…, vocab_size)
        head = self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight
        product: Tensor = self.head_out(F.linear(hidden, head))
        return product if self.config.output_bias == "none" else product + self.output_bias

    def start_past(self, batch: int, capacity: int) -> Past:
        """Return an empty past for texts of up to `capacity` tokens; angles are those of a text of that length."""
        return Past(batch, capacity, self.tok_emb.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:  # (…, embedding_dim) → (…, vocab_size) float32 (float64 of float64)
        """Return the soft-capped logits cap·tanh(z / cap)."""
        z, cap = self.uncapped_logits(hidden), self.config.logit_softcap
        return cap * torch.tanh(z.to(at_least_float32(z.dtype)) / cap)

    def forward(self, tokens: Tensor, document: Tensor | None = None) -> Tensor:  # (batch, seq_len, vocab_size) float32
        return self.logits(self.hidden(tokens, document))
