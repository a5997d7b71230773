"""The architecture once more, as plainly as it can be written: NumPy, float64, one position and one head at a time.

It is written from the definition of the architecture and shares no code with `trainer`, so that a mistake would have to
be made twice to go unseen. Weights are a dict of arrays under the checkpoint's names, settings a dict under those of
config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy import ndarray

EPS = 1.1920928955078125e-07  # of float32, whatever the precision here
BOS = 1

Weights = Mapping[str, ndarray]
Config = Mapping[str, Any]


def sigmoid(z: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-z))


def rms_norm(x: ndarray) -> ndarray:  # (dim,)
    return x / math.sqrt(float(np.mean(x * x)) + EPS)


def softmax(scores: ndarray) -> ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def erf(x: ndarray) -> ndarray:
    return np.array([math.erf(value) for value in x])


# ---- the list of visits ------------------------------------------------------------------------------------------


def halves(config: Config, active_loops: int) -> tuple[list[int], list[int]]:
    """The encoder and the decoder half of the active list."""
    visits = list(range(config["num_layers"]))
    if active_loops and config["visits"] is not None:
        visits = list(config["visits"])
    elif active_loops:
        before = [i for i in visits if i < config["loop_start"]]
        loop = [i for i in visits if config["loop_start"] <= i <= config["loop_end"]]
        after = [i for i in visits if i > config["loop_end"]]
        visits = before + loop * (1 + active_loops) + after
    first_half = config["encoder_visits"]
    if first_half is None:
        first_half = math.floor(len(visits) / 2)
    return visits[:first_half], visits[first_half:]


def looped_layers(config: Config) -> list[int]:
    """Layers that the list with everything on visits more than once."""
    encoder, decoder = halves(config, config["num_loops"] if config["visits"] is None else 1)
    everything = encoder + decoder
    return [i for i in range(config["num_layers"]) if everything.count(i) > 1]


# ---- input -------------------------------------------------------------------------------------------------------


def at(value: Any, layer: int) -> Any:
    """A setting's value in a layer."""
    return value[layer] if isinstance(value, list) else value


def begins_word(config: Config, token: int) -> bool:
    return int(config["token_kinds"][token], 16) >= 8


HASHES = [(36313, 27191, 51497), (48611, 60493, 40289), (57041, 33317, 45007), (39019, 53777, 62233)]


def hashed_row(w: Weights, config: Config, tokens: list[int], t: int, n: int) -> ndarray:
    """Mean of the rows of the bigram table that the hashes of an n-gram have."""
    buckets = config["bigram_buckets"]
    rows = []
    for multipliers in HASHES[: config.get("bigram_heads", 1)]:
        bucket = buckets - 1
        if t >= n - 1:
            mixed = 0
            for back in range(n):
                mixed ^= multipliers[back] * tokens[t - back]
            split = config.get("bigram_classes", "none")
            if split == "none":
                bucket = mixed % (buckets - 1)
            else:
                kind = 0 if begins_word(config, tokens[t]) else 1
                if split == "word_position" and kind == 1 and t > 0 and not begins_word(config, tokens[t - 1]):
                    kind = 2
                share = (buckets - 1) // (2 if split == "word_start" else 3)
                bucket = kind * share + mixed % share
        rows.append(w["bigram.embed.weight"][bucket])
    return sum(rows) / len(rows)


def trigram_vector(w: Weights, config: Config, tokens: list[int], t: int) -> ndarray:
    """What position t gets from the trigrams' own table."""
    bucket = config["trigram_buckets"] - 1
    if t >= 2:
        mixed = (36313 * tokens[t]) ^ (27191 * tokens[t - 1]) ^ (51497 * tokens[t - 2])
        bucket = mixed % (config["trigram_buckets"] - 1)
    vector = w["trigram.embed.weight"][bucket]
    if "trigram.proj.weight" in w:
        vector = w["trigram.proj.weight"] @ vector
    return w["trigram.scale"] * vector


def ngram_vector(w: Weights, config: Config, tokens: list[int], t: int) -> ndarray:
    """What position t gets from the bigram table."""
    buckets = config["bigram_buckets"]
    if config["bigram_hash"] == "product":
        before = tokens[t - 1] if t >= 1 else 0
        return w["bigram.proj.weight"] @ w["bigram.embed.weight"][(92821 * before + tokens[t]) % buckets]
    vector = hashed_row(w, config, tokens, t, 2)
    if config["trigram"]:
        vector = vector + hashed_row(w, config, tokens, t, 3)
    if "bigram.proj.weight" in w:
        vector = w["bigram.proj.weight"] @ vector
    vector = w["bigram.scale"] * vector
    if config.get("bigram_gate"):
        vector = vector * sigmoid(
            float(w["bigram.gate"] @ w["tok_emb.weight"][tokens[t]]) + float(w["bigram.gate_bias"])
        )
    if config.get("word_start_boost") and begins_word(config, tokens[t]):
        vector = vector * w["bigram.boost"]
    return vector


def blended(rows: list[ndarray], own: ndarray) -> list[ndarray]:
    """Each row and its predecessor, `own` of the former; before the first row there is nothing."""
    mixed = [own * rows[0]]
    for t in range(1, len(rows)):
        mixed.append(own * rows[t] + (1.0 - own) * rows[t - 1])
    return mixed


def embed(w: Weights, config: Config, tokens: list[int]) -> list[ndarray]:
    """x0 at every position."""
    rows = []
    for t, token in enumerate(tokens):
        row = w["tok_emb.weight"][token]
        if config["bigram_buckets"]:
            row = row + ngram_vector(w, config, tokens, t)
        if config.get("trigram_buckets"):
            row = row + trigram_vector(w, config, tokens, t)
        if config.get("token_type_dim"):
            kind = w["token_type.embed.weight"][int(config["token_kinds"][token], 16) % 8]
            row = row + w["token_type.scale"] * (w["token_type.proj.weight"] @ kind)
        rows.append(row)
    smeared = []
    for t, token in enumerate(tokens):
        row = rows[t]
        if config["smear_gate"] and t > 0 and (token != BOS or config["smear_across_bos"]):
            gate = sigmoid(float(w["smear_gate"][0] @ row[: config["gate_window"]]))
            row = row + w["smear_lambda"][0] * gate * rows[t - 1]
        smeared.append(row)
    if "channel_keep" in w:
        smeared = blended(smeared, sigmoid(w["channel_keep"]))
    normed = [rms_norm(row) for row in smeared]
    if "channel_smear" in w:
        normed = blended(normed, 1.0 - sigmoid(w["channel_smear"]))
    if "embed_proj.weight" in w:
        return [w["embed_proj.weight"] @ row for row in normed]
    return normed


# ---- attention ---------------------------------------------------------------------------------------------------


def rotate(config: Config, layer: int, vector: ndarray, t: int, seq_len: int) -> ndarray:
    """One head's query or key in a layer, turned to position t."""
    if layer in config.get("nope_layers", []):
        return vector
    d = at(config["rope_dims"], layer) or len(vector)
    base = at(config["rope_base"], layer)
    short = config["train_seq_len"] if config["rope_ntk_from"] is None else config["rope_ntk_from"]
    if config["rope_ntk"] and seq_len > short:
        base = base * (seq_len / short) ** (d / (d - 2))
    turned = vector.copy()
    for k in range(d // 2):
        angle = t * base ** (-2 * k / d)
        a, b = vector[k], vector[k + d // 2]
        turned[k] = a * math.cos(angle) + b * math.sin(angle)
        turned[k + d // 2] = -a * math.sin(angle) + b * math.cos(angle)
    return turned


def head_gate(w: Weights, config: Config, at: str, head: int, x: ndarray, query: ndarray) -> float:
    kind = config["attn_gate"]
    if kind == "none":
        return 1.0
    if kind == "dense":
        return float(sigmoid(w[f"{at}.gate"][head] @ x))
    if kind == "sparse":
        return float(sigmoid(config["attn_gate_scale"] * (w[f"{at}.gate"][head] @ x[: config["gate_window"]])))
    z = query if config["attn_gate_source"] == "query" else x
    return float(2 * sigmoid(w[f"{at}.double_gate"][head] @ z[: config["gate_window"]]))


class Pass:
    """One sequence on its way through the network."""

    def __init__(self, w: Weights, config: Config, tokens: list[int], document: list[int]) -> None:
        self.w, self.config, self.tokens, self.document = w, config, tokens, document
        self.x0 = embed(w, config, tokens)
        self.earlier_values: list[ndarray] | None = None
        self.visited: list[int] = []
        self.first_output: dict[int, list[ndarray]] = {}

    def values(self, layer: int, place: int, xs: list[ndarray]) -> list[ndarray]:
        """Each position's values, all key-value heads in one vector."""
        w, config, at = self.w, self.config, f"blocks.{layer}.attn"
        vs = []
        for t, x in enumerate(xs):
            if layer in config.get("value_x0_layers", []):
                x = x + w[f"{at}.x0_share"] * rms_norm(self.x0[t])
            v = w[f"{at}.v.weight"] @ x
            if place in config["value_embed_layers"]:
                extra = w["value_embed.embed.weight"][self.tokens[t]]
                if "value_embed.proj.weight" in w:
                    extra = w["value_embed.proj.weight"] @ extra
                position = list(config["value_embed_layers"]).index(place)
                v = v + w["value_embed.layer_scales"][position] * (extra * w["value_embed.scale"])
            vs.append(v)
        if not config["value_residual"]:
            return vs
        if self.earlier_values is None:
            self.earlier_values = vs
            return vs
        old, own = w[f"{at}.value_mix"]
        mixed = [old * earlier + own * v for earlier, v in zip(self.earlier_values, vs, strict=True)]
        if config.get("value_residual_from", "first") == "previous":
            self.earlier_values = mixed
        return mixed

    def attention(self, layer: int, place: int, xs: list[ndarray]) -> list[ndarray]:
        w, config, at = self.w, self.config, f"blocks.{layer}.attn"
        gain = w[f"places.{place}.q_gain" if place >= config["num_layers"] else f"blocks.{place}.attn.q_gain"]
        last = sum(map(len, halves(config, config["num_loops"] if config["visits"] is None else 1)))
        last = max(last, config["num_layers"]) if config["visit_controls"] else config["num_layers"]
        heads, kv_heads = config["num_heads"], config["num_kv_heads"]
        d = config["model_dim"] // heads
        seq_len = len(xs)
        values = self.values(layer, place, xs)
        raw_queries = [w[f"{at}.q.weight"] @ x for x in xs]
        raw_keys = [w[f"{at}.k.weight"] @ x for x in xs]
        outputs = []
        for t in range(seq_len):
            parts = []
            for head in range(heads):
                kv = slice((head // (heads // kv_heads)) * d, (head // (heads // kv_heads) + 1) * d)
                q = rotate(config, layer, rms_norm(raw_queries[t][head * d : (head + 1) * d]), t, seq_len)
                q = q * gain[head]
                seen = [s for s in range(t + 1) if self.document[s] == self.document[t]]
                scores = [q @ rotate(config, layer, rms_norm(raw_keys[s][kv]), s, seq_len) / math.sqrt(d) for s in seen]
                shares = softmax(np.array(scores))
                y = sum(share * values[s][kv] for share, s in zip(shares, seen, strict=True))
                listed = config.get("xsa_layers")
                if place in listed if listed is not None else place >= last - config["xsa_last_n"]:
                    own = values[t][kv]
                    direction = own / math.sqrt(float(own @ own))
                    share = sigmoid(float(w[f"{at}.xsa_alpha"])) if config.get("xsa_alpha") else 1.0
                    y = y - share * (y @ direction) * direction
                parts.append(head_gate(w, config, at, head, xs[t], raw_queries[t]) * y)
            output = w[f"{at}.proj.weight"] @ np.concatenate(parts)
            outputs.append(output if config.get("sandwich_norm", "none") == "none" else rms_norm(output))
        return outputs

    # ---- blocks --------------------------------------------------------------------------------------------------

    def mlp(self, layer: int, revisit: int, x: ndarray) -> ndarray:
        w, config = self.w, self.config
        at = f"blocks.{layer}.mlp"
        if config["untied_loop_mlps"] and revisit > 0:
            at = f"override_mlps.{layer}_p{revisit}"
        if f"{at}.fc.weight" not in w:
            return np.zeros_like(x)
        h = w[f"{at}.fc.weight"] @ x
        kind = config["activation"] if isinstance(config["activation"], str) else config["activation"][layer]
        if kind == "swiglu":
            z = w[f"{at}.gate.weight"] @ x
            return self.settled(w[f"{at}.proj.weight"] @ (z * sigmoid(z) * h))
        activations: dict[str, Callable[[ndarray], ndarray]] = {
            "relu2": lambda h: np.maximum(h, 0) ** 2,
            "relu3": lambda h: np.maximum(h, 0) ** 3,
            "leaky_relu2": lambda h: np.where(h > 0, h, config["leaky_slope"] * h) ** 2,
            "silu2": lambda h: (h * sigmoid(h)) ** 2,
            "gelu2": lambda h: (h * 0.5 * (1 + erf(h / math.sqrt(2)))) ** 2,
        }
        return self.settled(w[f"{at}.proj.weight"] @ activations[kind](h))

    def settled(self, output: ndarray) -> ndarray:
        return rms_norm(output) if self.config.get("sandwich_norm", "none") == "both" else output

    def norm_scale(self, place: int) -> float:
        return 1 / math.sqrt(place + 1) if self.config["ln_scale"] else 1.0

    def place(self, layer: int) -> int:
        """Whose gains the visit that was just entered has: its place's in the list, or the layer's."""
        return len(self.visited) - 1 if self.config["visit_controls"] else layer

    def gains(self, place: int, name: str) -> ndarray:
        """One of the gains of a place."""
        return self.w[f"{'places' if place >= self.config['num_layers'] else 'blocks'}.{place}.{name}"]

    def mix(self, place: int) -> tuple[Any, Any]:
        """Shares of the stream and of the embedding."""
        if not self.config.get("x0_mix", True):
            return 1.0, 0.0
        stream, embedding = self.gains(place, "resid_mix")
        return stream, embedding

    def attends(self, layer: int) -> bool:
        listed = self.config.get("attn_layers")
        return (layer > 0 or self.config["first_attention"]) and (listed is None or layer in listed)

    def mlp_gain(self, place: int) -> Any:
        name = f"{'places' if place >= self.config['num_layers'] else 'blocks'}.{place}.mlp_scale"
        return self.w.get(name, 0.0)

    def before_visit(self, layer: int, revisit: int, xs: list[ndarray]) -> list[ndarray]:
        """What passes do to the stream: only where loops are on."""
        w, config = self.w, self.config
        if not self.active_loops:
            return xs
        looped = looped_layers(config)
        encoder, decoder = halves(config, config["num_loops"] if config["visits"] is None else 1)
        everything = encoder + decoder
        row_of: dict[str, dict[int, int]] = {"pass": {looped[0]: revisit} if looped else {}, "visit": {}}
        start = 0
        for each in looped:
            row_of["visit"][each] = start + revisit
            start += everything.count(each)
        out = xs
        if config.get("pass_norm") and layer == looped[0] and revisit > 0:
            out = [w["passes.gain"][revisit - 1] * rms_norm(x) for x in out]
        row = row_of.get(config.get("pass_film", "none"), {}).get(layer)
        if row is not None:
            out = [(1 + w["passes.film"][0][row]) * x + w["passes.film"][1][row] for x in out]
        row = row_of.get(config.get("pass_embeddings", "none"), {}).get(layer)
        if row is not None:
            full = "passes.embed" in w
            vector = w["passes.embed"][row] if full else w["passes.code"][row] @ w["passes.basis"]
            out = [x + vector for x in out]
        return out

    def block(self, layer: int, revisit: int, xs: list[ndarray]) -> list[ndarray]:
        """F_i: the block with one residual stream."""
        config, place = self.config, self.place(layer)
        s = self.norm_scale(place)
        m0, m1 = self.mix(place)
        inputs = [m0 * x + m1 * x0 for x, x0 in zip(xs, self.x0, strict=True)]
        attended = [np.zeros_like(x) for x in inputs]
        if self.attends(layer):
            heard = self.attention(layer, place, [rms_norm(x) * s for x in inputs])
            attended = [self.gains(place, "attn_scale") * a for a in heard]
        parallel = config["gptj_start"] is not None and layer >= config["gptj_start"]
        outputs = []
        for x_in, a in zip(inputs, attended, strict=True):
            x = x_in + a
            source = x_in if parallel else x
            outputs.append(x + self.mlp_gain(place) * self.mlp(layer, revisit, rms_norm(source) * s))
        return outputs

    def visit(self, layer: int, xs: list[ndarray]) -> list[ndarray]:
        """The block, and on a re-visit the carry."""
        revisit = self.visited.count(layer)
        self.visited.append(layer)
        outputs = self.block(layer, revisit, self.before_visit(layer, revisit, xs))
        looped = looped_layers(self.config)
        if self.config["carry"] == "none" or layer not in looped:
            return outputs
        if revisit == 0:
            self.first_output[layer] = outputs
            return outputs
        beta, alpha = self.w["recur_beta"], self.w["recur_alpha"]
        if self.config["carry_per_pass"]:
            beta, alpha = beta[revisit - 1], alpha[revisit - 1]
        i = looped.index(layer)
        carried = []
        for t, output in enumerate(outputs):
            total = beta[i] * output
            for j, other in enumerate(looped):
                if other in self.first_output:
                    total = total + alpha[i][j] * self.first_output[other][t]
            carried.append(total)
        return carried

    def visit_lanes(
        self, layer: int, lane0: list[ndarray], lane1: list[ndarray]
    ) -> tuple[list[ndarray], list[ndarray]]:
        w, kind = self.w, self.config["lane_kind"]
        revisit = self.visited.count(layer)
        self.visited.append(layer)
        place = self.place(layer)
        s = self.norm_scale(place)
        m0, m1 = self.mix(place)
        mixed = [m0 * x + m1 * x0 for x, x0 in zip(lane0, self.x0, strict=True)]
        attended = [np.zeros_like(x) for x in mixed]
        if self.attends(layer):
            heard = self.attention(layer, place, [rms_norm(x) * s for x in mixed])
            attended = [self.gains(place, "attn_scale") * a for a in heard]
        new0, new1 = [], []
        for t in range(len(lane0)):
            a = attended[t]
            first, second = lane0[t], lane1[t]
            read = second
            if kind == "sequential":
                r, post = w["parallel_resid_lambdas"][layer], w["parallel_post_lambdas"][layer]
                first, second = r[0] * first + post[0][0] * a, r[0] * second + post[0][1] * a
                read = m0 * second + m1 * self.x0[t]
            b = self.mlp_gain(place) * self.mlp(layer, revisit, rms_norm(read) * s)
            if kind == "separate":
                first, second = mixed[t] + a, second + b
            elif kind == "sequential":
                first, second = r[1] * first + post[1][0] * b, r[1] * second + post[1][1] * b
            else:
                r, post = w["parallel_resid_lambdas"][layer], w["parallel_post_lambdas"][layer]
                first = r[0] * first + post[0][0] * a + post[1][0] * b
                second = r[1] * second + post[0][1] * a + post[1][1] * b
            new0.append(first)
            new1.append(second)
        return new0, new1

    # ---- the U-Net -----------------------------------------------------------------------------------------------

    def skip(self, k: int, stored: list[list[ndarray]], xs: list[ndarray]) -> list[ndarray]:
        """Take back the last stored output before second-half visit k."""
        w = self.w
        if self.config["reuse_last_skip"] and k >= len(w["skip_weights"]) > 0:
            k = len(w["skip_weights"]) - 1
        if not stored or k >= len(w["skip_weights"]):
            return xs
        back = stored.pop()
        joined = []
        for x, old in zip(xs, back, strict=True):
            norm = self.config.get("skip_norm", "none")
            weighted = w["skip_weights"][k] * (rms_norm(old) if norm == "before" else old)
            if self.config["skip_gates"]:
                g = sigmoid(w["skip_gates"][k])
                joined.append((1 - g) * weighted + g * x)
            else:
                joined.append(x + weighted)
        if norm == "after":
            return [rms_norm(x) for x in joined]
        return joined

    def run(self, active_loops: int) -> list[ndarray]:
        """Logits at every position."""
        w, config = self.w, self.config
        self.active_loops = active_loops
        encoder, decoder = halves(config, active_loops)
        xs, stored = self.x0, []
        for layer in encoder:
            xs = self.visit(layer, xs)
            stored.append(xs)
        lane1: list[ndarray] | None = None  # before the lanes split there is only xs, afterwards xs is lane 0
        kind = config["lane_kind"]
        stale: list[ndarray] = []  # the single stream that routed lanes leave behind
        for k, layer in enumerate(decoder):
            if lane1 is not None and kind == "routed" and layer < config["lanes_start"]:
                stale = self.visit(layer, self.skip(k, stored, stale))
                continue
            splits = lane1 is None and config["lanes_start"] and layer >= config["lanes_start"]
            kept = list(stored)
            joined = self.skip(k, stored, xs)
            if splits:
                stale = xs
            if lane1 is None:
                lane1 = {"routed": xs, "sequential": joined, "separate": joined}[kind] if splits else None
                xs = joined
            elif kind == "sequential":
                xs, lane1 = joined, self.skip(k, kept, lane1)
            elif kind == "routed":
                xs = joined
            if lane1 is None:
                xs = self.visit(layer, xs)
            else:
                xs, lane1 = self.visit_lanes(layer, xs, lane1)
        if lane1 is not None and kind == "separate":
            m = float(w["lane_merge"])
            xs = [m * a + (1 - m) * b for a, b in zip(xs, lane1, strict=True)]
        elif lane1 is not None and config["lane_output"] == "mean":
            xs = [(a + b) / 2 for a, b in zip(xs, lane1, strict=True)]
        elif lane1 is not None and config["lane_output"] == "mlp":
            xs = lane1
        head = w["tok_emb.weight"] if config["tie_embeddings"] else w["lm_head.weight"]
        rows = []
        for x in xs:
            h = rms_norm(x)
            if "head_residual.up.weight" in w:
                h = h + w["head_residual.up.weight"] @ (w["head_residual.down.weight"] @ h)
            if "head_proj.weight" in w:
                h = w["head_proj.weight"] @ h
            z = head @ h + w.get("output_bias", 0.0)
            rows.append(config["logit_softcap"] * np.tanh(z / config["logit_softcap"]))
        return rows


def forward(
    weights: Weights,
    config: Config,
    active_loops: int,
    tokens: ndarray,  # (batch, seq_len)
    document: ndarray | None = None,  # (batch, seq_len): attention stays within equal values
) -> ndarray:  # (batch, seq_len, vocab_size) float64
    """The logits of each row by itself."""
    w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    rows = []
    for i, row in enumerate(tokens.tolist()):
        documents = [0] * len(row) if document is None else document[i].tolist()
        rows.append(np.stack(Pass(w, config, row, documents).run(active_loops)))
    return np.stack(rows)
