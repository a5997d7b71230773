"""Settings that decide the contents of a data folder that is built or downloaded."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.base.threads import MOST_THREADS, num_threads
from pgolf_post.settings import Settings

MAX_VOCAB_SIZE = 1 << 16  # a shard's tokens are uint16
CHALLENGE_REPOSITORY = "willdepueoai/parameter-golf"
CASEOPS_VARIANT = "sp8192_lossless_caps_caseops_v1_reserved"
# Where each variant is published; the challenge's own repository has only the first.
REPOSITORIES = {
    "sp1024": CHALLENGE_REPOSITORY,
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
    CASEOPS_VARIANT: "romeerp/parameter-golf-caseops-v1",
}


class BuildSettings(Settings):
    """Settings that decide a built folder's contents, besides its documents."""

    name: str = Field("data", min_length=1, description="Name in the manifest.")
    vocab_size: int = Field(
        1024, gt=0, le=MAX_VOCAB_SIZE, description=f"Pieces of the tokenizer to train, at most {MAX_VOCAB_SIZE}."
    )
    val_fraction: float = Field(
        0.04, gt=0.0, lt=1.0, description="Fraction of documents that the hash split sends to validation."
    )
    tokens_per_shard: int = Field(100_000_000, gt=0, description="Tokens per shard.")
    tokenizer_sample_bytes: int = Field(
        8_000_000,
        gt=0,
        description="Bytes of training text that the tokenizer is trained on.",
    )
    byte_sidecar: bool = Field(False, description="Write a file of the original bytes behind each validation token.")
    num_threads: int = Field(
        default_factory=num_threads,
        gt=0,
        le=MOST_THREADS,
        description="Threads to tokenize with; the result does not depend on it. Left out: all CPUs it may use.",
    )


class DownloadSettings(Settings):
    """The data set to download. `repository` is by default the one known to publish the variant."""

    variant: str = Field(
        "sp1024",
        pattern=r"^[A-Za-z0-9_]+$",
        description=f"Name of the export: {', '.join(REPOSITORIES)}, or what --repository publishes.",
    )
    train_shards: int = Field(
        1, ge=0, description="Training shards, each 100,000,000 tokens or about 200 MB; 0 for none."
    )
    repository: str | None = Field(
        None, description="Dataset repository, OWNER/NAME; left out, the variant's known publisher."
    )
    revision: str = Field("main", description="Branch, tag or commit of the repository.")
    subfolder: str = Field("datasets", description="Folder of the repository in which manifest.json lies.")
    endpoint: str = Field("https://huggingface.co", description="Address of the hub.")

    @property
    def source_repository(self) -> str:
        """The repository to fetch from: the named one, else the variant's known publisher."""
        return self.repository or REPOSITORIES.get(self.variant, CHALLENGE_REPOSITORY)
