"""A training recipe: one strict TOML file, and nothing else, decides a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pgolf_post.base.threads import MOST_THREADS
from pgolf_post.data import DataFolder
from pgolf_post.score.breakdown.token_text import token_kinds
from pgolf_post.settings import LARGEST_SEED, Settings
from trainer.model.architecture import ArchitectureSettings, ModelConfig
from trainer.model.attention_backends import BackendChoice
from trainer.model.token_kinds import reads_token_kinds
from trainer.optim.settings import OptimSettings
from trainer.run.stopping import StopSettings
from trainer.schedule.functions import ScheduleSettings
from trainer.schedule.stages import Stage, require_divisible, stages_of
from trainer.start.init_settings import InitSettings
from trainer.step.loss import LossSettings
from trainer.step.meta_ttt_settings import MetaTTTSettings
from trainer.step.qat_settings import QatSettings

PhaseName = Literal["init", "momentum_warmup_done", "loops_on", "all_loops_on", "warmdown_start", "final"]
TrainingPrecision = Literal["auto", "bf16", "fp32", "fp64"]
Kernels = Literal["auto", "eager", "triton", "triton_loss", "triton_mlp"]
CompileChoice = Literal["auto"] | bool
Stream = Literal["auto", "fp32", "bf16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
MetricTime = Literal["each", "end", "final"]
YOUNGER = {  # table → keys that recipes which were hashed did not have: left out of a dump where they are off
    "run": ("compile_mode", "grad_norm_limit", "grad_norm_stop"),
    "optim": ("newton_schulz_steps", "groups"),
    "schedule": ("clock", "stages"),
    "loss": ("focal_gamma_ramp", "future_tokens", "future_weight"),
    "qat": ("bits", "rate", "every"),
}


class RunSettings(Settings):
    """The run's name and place, and how this machine runs it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run's folder under checkpoint_root"
    )
    checkpoint_root: Path = Field(Path("checkpoints"), description="folder that holds the folders of runs")
    base: str | None = Field(None, description="run that this one changes, under checkpoint_root or in its ledger")
    why: str | None = Field(None, min_length=1, description="what the run is made to find out, in words")
    seed: int = Field(1337, ge=0, le=LARGEST_SEED, description="seed of initial weights and data order")
    precision: TrainingPrecision = Field("auto", description="autocast dtype; auto = bf16 where the processor has it")
    stream: Stream = Field(
        "auto",
        description="dtype of the residual stream and of all that is applied to it, in training; auto = bf16 on a GPU "
        "whose products are bf16, as in the public record scripts, else fp32",
    )
    kernels: Kernels = Field(
        "auto",
        description="triton_loss, triton_mlp = fused loss or MLP (trainer/kernels), triton = both, CUDA only; auto = "
        "triton_mlp on an A100 or H100 in bf16 where Triton and the activation allow it, else eager",
    )
    threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="CPU threads; left out: as many as this process may use"
    )
    attention: BackendChoice = Field("auto", description="attention kernel; auto = the fastest that can run here")
    compile: CompileChoice = Field(
        "auto",
        description="torch.compile the loss, and on a GPU the updates of matrices; auto = on a GPU, not on a CPU",
    )
    compile_mode: CompileMode = Field("default", description="mode of torch.compile; CUDA graphs and longer searches")
    deterministic: bool = Field(
        False, description="take deterministic kernels: on a GPU slower, and an error where an operation has none"
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="steps on synthetic tokens with each graph before the clock starts, after which all state is put "
        "back; default 2 where the loss is compiled, else 0",
    )
    log_every: int = Field(20, ge=1, description="steps between lines at the terminal; train.jsonl has every step")
    min_tokens_per_second: float | None = Field(
        None, gt=0, description="end the run within its first 30 steps if it is slower than this"
    )
    grad_norm_limit: float | None = Field(
        None, gt=0, description="gradient norm before clipping above which a step is warned of"
    )
    grad_norm_stop: bool = Field(
        False, description="end the run, with a checkpoint, at a gradient norm above grad_norm_limit"
    )

    @model_validator(mode="after")
    def _acts(self) -> RunSettings:
        if self.compile is False and self.compile_mode != "default":
            raise ValueError(
                f'compile_mode "{self.compile_mode}" acts only where the loss is compiled; compile is false'
            )
        if self.grad_norm_stop and self.grad_norm_limit is None:
            raise ValueError("grad_norm_stop acts only with grad_norm_limit")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder, which its checkpoints and its log go to."""
        return self.checkpoint_root / self.name


class DataSettings(Settings):
    """The training text and the sizes of windows and batches, in tokens."""

    dir: Path = Field(description="a data folder made by `pgolf-post data build` or `download`")
    seq_len: int = Field(ge=2, description="tokens of a window")
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
    """The moments that become checkpoint folders, and the folders that stay.

    The end of the run (`final`) is always one; folders of phase boundaries are always kept.
    """

    phases: tuple[PhaseName, ...] = get_args(PhaseName)
    fractions: tuple[float, ...] = Field((), description="also at these shares of the run, for example 0.7, 0.85")
    steps: tuple[int, ...] = Field((), description="also after these steps")
    every_steps: int | None = Field(None, ge=1, description="steps between periodic checkpoints, for resuming")
    every_seconds: float | None = Field(None, gt=0, description="training seconds between periodic checkpoints")
    keep_last: int | None = Field(None, ge=1, description="periodic checkpoints that are kept; default all")
    optimizer_state: bool = Field(True, description="write training.safetensors, needed by --resume")
    keep_optimizer_state: Literal["all", "last"] = Field("all", description="last: drop it from older checkpoints")
    metric: MetricTime = Field(
        "each", description="when views are scored: each as it is saved, all at the end of the run, or the final alone"
    )
    metric_tokens: int | None = Field(65536, ge=2, description="validation tokens of the recorded metric; omit for all")
    max_in_flight: int = Field(2, ge=0, description="writes in host memory while training goes on; 0 = wait for each")

    @model_validator(mode="after")
    def _reachable(self) -> CheckpointSettings:
        outside = [f for f in self.fractions if not 0 < f < 1]
        if outside:
            raise ValueError(f"checkpoint fractions must lie strictly between 0 and 1, got {outside}")
        negative = [step for step in self.steps if step < 0]
        if negative:
            raise ValueError(f"checkpoint steps count from 0, got {negative}")
        if self.keep_last and not (self.every_steps or self.every_seconds):
            raise ValueError(
                f"keep_last {self.keep_last} acts only on periodic checkpoints: set every_steps or every_seconds"
            )
        if self.keep_optimizer_state == "last" and not self.optimizer_state:
            raise ValueError('keep_optimizer_state "last" acts only with optimizer_state = true')
        return self


class Recipe(Settings):
    """Everything that decides a run."""

    run: RunSettings
    data: DataSettings
    model: ArchitectureSettings
    optim: OptimSettings
    schedule: ScheduleSettings
    checkpoint: CheckpointSettings
    stop: StopSettings = StopSettings()
    loss: LossSettings = LossSettings()
    init: InitSettings = InitSettings()
    qat: QatSettings | None = None
    meta_ttt: MetaTTTSettings | None = None

    @model_validator(mode="after")
    def _stages_divide(self) -> Recipe:
        if self.schedule.stages:
            require_divisible(self.stages, self.data.micro_batch_tokens)
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Sizes of steps and windows over the run; one stage unless the schedule has more."""
        return stages_of(self.data.batch_tokens, self.data.seq_len, self.schedule.stages)

    @property
    def longest_seq_len(self) -> int:
        """Tokens of the longest window of the run."""
        return max(stage.seq_len for stage in self.stages)

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, own_values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what sets nothing and is younger than recipes that were hashed: tables, and keys."""
        values: dict[str, Any] = own_values(self)
        for table in ("loss", "init"):
            if not getattr(self, table).is_on:
                values.pop(table, None)
        for table in ("qat", "meta_ttt"):
            if getattr(self, table) is None:
                values.pop(table, None)
        for table, keys in YOUNGER.items():
            settings = getattr(self, table)
            for key in keys if table in values else ():
                if getattr(settings, key) == type(settings).model_fields[key].default:
                    values[table].pop(key, None)
        return values

    def model_config_for(self, vocab_size: int, token_kinds: str | None = None) -> ModelConfig:
        """Return the model's config: the architecture, the vocabulary, and the longest text that attention sees."""
        train_seq_len = min(self.longest_seq_len, self.model.document_cut or self.longest_seq_len)
        known = {"vocab_size": vocab_size, "train_seq_len": train_seq_len, "token_kinds": token_kinds}
        return ModelConfig(**self.model.model_dump(), **known)

    def model_config_in(self, data: DataFolder) -> ModelConfig:
        """Return the model's config for a data folder, whose tokenizer says the vocabulary and the kinds of tokens."""
        return self.model_config_for(
            data.vocab_size, token_kinds(data.tokenizer) if reads_token_kinds(self.model) else None
        )
