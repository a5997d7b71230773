"""Settings that every method of test-time training has, and the identity that scores are stored under.

Each method adds a class of its own beside its pass (methods.py lists them): a setting that a method does not have is
refused, because a knob that never acts must not look like one that did.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from pgolf_post.settings import LARGEST_SEED, Settings

# A score's id is a hash of its protocol's values. It was first defined with one class for all methods, whose values for
# settings that a method does not have were in it. They still are, so that those scores are found. Nothing is added.
STORED: dict[str, Any] = {
    "stride": 64,
    "schedule": "cosine",
    "grad_clip": 1.0,
    "epochs": 3,
    "train_batch_seqs": 32,
    "last_blocks": None,
    "freeze": [],
    "rank": 80,
    "alpha": 144.0,
    "adapt": ["q", "k", "v", "o", "mlp", "head"],
    "batch_documents": 64,
    "lanes": 8,
    "phases": [833, 1666, 2500],
    "global_lr": 0.001,
    "global_momentum": 0.9,
    "global_chunk_tokens": 32768,
    "global_seq_len": 2048,
    "global_grad_clip": 1.0,
}

LATER: dict[str, Any] = {"precision": "fp32"}  # settings that came later, in the identity where they are not this


class TTTProtocol(Settings):
    """Test-time training: what exactly was scored and how the model learned. Part of a score's identity."""

    protocol: Literal["ttt"] = "ttt"
    method: str
    split: Literal["train", "val"] = "val"
    seq_len: int = Field(ge=2, description="longest window in tokens, of scoring and of training")
    max_tokens: int | None = Field(None, ge=2, description="score only the first max_tokens tokens")
    tail: Literal["drop", "score"] = "drop"
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of everything drawn")

    chunk_tokens: int = Field(32768, ge=1, description="targets scored before the next step may use them")
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: float = Field(0.005, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1, description="momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of AdamW's second moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's addend to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0)

    @property
    def excerpt_tokens(self) -> int:
        """Number of tokens in which an audit sees the method at work."""
        return 1 + 8 * self.seq_len

    @model_serializer(mode="wrap")
    def _identity(self, own_values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Serialize the settings in the order and with the keys that scores have always been stored under."""
        own = {key: value for key, value in own_values(self).items() if key not in LATER or value != LATER[key]}
        return {**{name: own[name] for name in TTTProtocol.model_fields}, **STORED, **own}
