"""A training recipe: one strict TOML file, and nothing else, decides a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from pgolf_post.settings import Settings
from trainer.architecture import ArchitectureSettings, ModelConfig
from trainer.optim import OptimSettings
from trainer.schedule import ScheduleSettings

PhaseName = Literal["init", "momentum_warmup_done", "loops_on", "all_loops_on", "warmdown_start", "final"]
Precision = Literal["auto", "bf16", "fp32", "fp64"]
Kernels = Literal["eager", "triton"]


class RunSettings(Settings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under checkpoints/")
    checkpoint_root: Path = Path("checkpoints")
    seed: int = Field(1337, ge=0)
    precision: Precision = Field("auto", description="autocast dtype; auto = bf16 where the processor has it")
    kernels: Kernels = Field(
        "eager", description="triton = fused loss and MLP (trainer/kernels), CUDA only; not the default: not yet timed"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default torch's own choice")
    log_every: int = Field(20, ge=1, description="steps between lines at the terminal; train.jsonl has every step")
    min_tokens_per_second: float | None = Field(
        None, gt=0, description="end the run within its first 30 steps if it is slower than this"
    )


class DataSettings(Settings):
    dir: Path = Field(description="a data folder made by `pgolf-post data build` or `download`")
    seq_len: int = Field(ge=2)
    batch_tokens: int = Field(ge=2, description="tokens per optimizer step")
    micro_batch_tokens: int | None = Field(None, ge=2, description="tokens per backward pass; default batch_tokens")

    @model_validator(mode="after")
    def _divisible(self) -> DataSettings:
        micro = self.micro_batch_tokens or self.batch_tokens
        if micro % self.seq_len or self.batch_tokens % micro:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} must be a multiple of micro_batch_tokens {micro}, "
                f"which must be a multiple of seq_len {self.seq_len}"
            )
        return self


class CheckpointSettings(Settings):
    """Which phase boundaries become folders. `final` is always one."""

    phases: tuple[PhaseName, ...] = get_args(PhaseName)
    fractions: tuple[float, ...] = Field((), description="also at these shares of the run, for example 0.7, 0.85")
    steps: tuple[int, ...] = Field((), description="also after these steps")
    optimizer_state: bool = Field(True, description="write training.safetensors, needed by --resume")
    metric_tokens: int | None = Field(65536, ge=2, description="validation tokens of the recorded metric; omit for all")

    @model_validator(mode="after")
    def _reachable(self) -> CheckpointSettings:
        outside = [f for f in self.fractions if not 0 < f < 1]
        if outside:
            raise ValueError(f"checkpoint fractions must lie strictly between 0 and 1, got {outside}")
        negative = [step for step in self.steps if step < 0]
        if negative:
            raise ValueError(f"checkpoint steps count from 0, got {negative}")
        return self


class Recipe(Settings):
    """The whole of a run."""

    run: RunSettings
    data: DataSettings
    model: ArchitectureSettings
    optim: OptimSettings
    schedule: ScheduleSettings
    checkpoint: CheckpointSettings

    def model_config_for(self, vocab_size: int) -> ModelConfig:
        """The architecture, completed by what the data decides: what attention sees at most is a training length."""
        train_seq_len = min(self.data.seq_len, self.model.document_cut or self.data.seq_len)
        return ModelConfig(**self.model.model_dump(), vocab_size=vocab_size, train_seq_len=train_seq_len)
