"""Everything a test-time training run can be told, in one strict class, and the presets by name.

A setting that the chosen method does not read is refused: a knob that never acts must not look like one that did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings, apply_override, parse_settings

Method = Literal["sgd", "scales", "lora", "phased"]
AdapterTarget = Literal["q", "k", "v", "o", "mlp", "head"]

CHUNK_ONLY = ("stride", "schedule", "grad_clip", "epochs", "train_batch_seqs", "freeze")
LORA_ONLY = ("rank", "alpha", "adapt", "batch_documents", "lanes")
PHASED_ONLY = ("phases", "global_lr", "global_momentum", "global_chunk_tokens", "global_seq_len", "global_grad_clip")
UNREAD: dict[str, tuple[str, ...]] = {  # method → settings that it has no use for
    "sgd": (*LORA_ONLY, *PHASED_ONLY),
    "scales": (*LORA_ONLY, *PHASED_ONLY, "last_blocks"),
    "lora": (*CHUNK_ONLY, "last_blocks", *PHASED_ONLY),
    "phased": (*CHUNK_ONLY, "last_blocks"),
}


class TTTProtocol(Settings):
    """Test-time training; what exactly was scored and how it learned. Part of a score's identity."""

    protocol: Literal["ttt"] = "ttt"
    method: Method
    split: Literal["train", "val"] = "val"
    seq_len: int = Field(ge=2, description="longest window, of scoring and of training")
    max_tokens: int | None = Field(None, ge=2, description="score only the first max_tokens tokens")
    tail: Literal["drop", "score"] = "drop"
    seed: int = Field(0, ge=0)

    chunk_tokens: int = Field(32768, ge=1, description="targets scored before the next step may use them")
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: float = Field(0.005, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1, description="momentum")
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    stride: int = Field(64, ge=1, description="of the sliding window that scores a chunk")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate, over chunks")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 = no clipping")
    epochs: int = Field(3, ge=1, description="passes over a scored chunk")
    train_batch_seqs: int = Field(32, ge=1, description="sequences in one optimizer step")
    last_blocks: int | None = Field(None, ge=1, description="train only the last n blocks; default everything")
    freeze: tuple[str, ...] = Field((), description="regular expressions of parameter names that are not trained")

    rank: int = Field(80, ge=1)
    alpha: float = Field(144.0, gt=0, description="an adapter's output is scaled by alpha / rank")
    adapt: tuple[AdapterTarget, ...] = Field(("q", "k", "v", "o", "mlp", "head"), min_length=1)
    batch_documents: int = Field(64, ge=1, description="documents of similar length that adapt side by side")

    lanes: int = Field(8, ge=1, description="queues of batches, shared by ranks, along each of which A is carried")

    phases: tuple[int, ...] = Field((833, 1666, 2500), description="fully scored documents at which weights are tuned")
    global_lr: float = Field(0.001, ge=0)
    global_momentum: float = Field(0.9, ge=0, lt=1)
    global_chunk_tokens: int = Field(32768, ge=1)
    global_seq_len: int = Field(2048, ge=2)
    global_grad_clip: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _every_setting_acts(self) -> TTTProtocol:
        fields = type(self).model_fields
        idle = [name for name in UNREAD[self.method] if getattr(self, name) != fields[name].default]
        if idle:
            raise ValueError(f"method {self.method!r} does not read {', '.join(idle)}")
        if self.method in ("sgd", "scales") and self.stride > self.seq_len:
            raise ValueError(f"stride {self.stride} exceeds the window's {self.seq_len} tokens (seq_len)")
        if self.method in ("lora", "phased") and self.chunk_tokens > self.seq_len:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} exceeds the window's {self.seq_len} tokens (seq_len)")
        if list(self.phases) != sorted(set(self.phases)) or (self.method == "phased" and not self.phases):
            raise ValueError(f"phases must be ascending numbers of documents, got {list(self.phases)}")
        return self


SGD_1493: dict[str, Any] = {"method": "sgd", "seq_len": 2048}  # the class's defaults are its values
LORA_1855: dict[str, Any] = {
    "method": "lora",
    "seq_len": 2048,
    "chunk_tokens": 48,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "beta1": 0.0,
    "beta2": 0.99,
    "eps": 1e-10,
    "weight_decay": 0.5,
}
PRESETS: dict[str, dict[str, Any]] = {
    # openai/parameter-golf, PR #1493 and PR #1855; a method's own name is its preset for the model's window
    "sgd-1493": SGD_1493,
    "record-1855": {**LORA_1855, "method": "phased"},
    "sgd": {"method": "sgd"},
    "scales": {"method": "scales", "optimizer": "adamw", "learning_rate": 1e-3, "epochs": 1},
    "lora": {key: value for key, value in LORA_1855.items() if key != "seq_len"},
    "phased": {**{key: value for key, value in LORA_1855.items() if key != "seq_len"}, "method": "phased"},
}


def ttt_protocol(preset: str, overrides: Iterable[str], common: dict[str, Any], window: int) -> TTTProtocol:
    """A preset with `key=value` overrides and the options all protocols share; `window` where nothing names seq_len.

    Raises SettingsError for a preset, key or value that does not exist.
    """
    if preset not in PRESETS:
        raise SettingsError(f"no TTT preset or method {preset!r}; there are: {', '.join(PRESETS)}")
    tree = {"seq_len": window, **PRESETS[preset], **{key: value for key, value in common.items() if value is not None}}
    for override in overrides:
        apply_override(tree, override)
    return parse_settings(TTTProtocol, tree, f"--ttt {preset}")
