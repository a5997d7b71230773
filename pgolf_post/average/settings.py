"""Settings of averages: which weights take part, in which shares, and how a search for the best one is run."""

from __future__ import annotations

from pydantic import Field, model_validator

from pgolf_post.settings import LARGEST_SEED, Settings

MAX_ERROR = 0.05  # of a profile, see posthoc.py


class Selection(Settings):
    """The members of an average, named in one way. Nothing given: from warm-down start on."""

    steps: tuple[int, ...] | None = Field(None, min_length=1, description="the checkpoints at these steps")
    last: int | None = Field(None, ge=1, description="the last so many checkpoints")
    phase: str | None = Field(None, description='from this phase on: "warmdown", "loops_on", "frac70", …')
    shares: tuple[float, ...] | None = Field(None, description="proportions of the members, in step order")

    @model_validator(mode="after")
    def _one_way(self) -> Selection:
        given = [name for name in ("steps", "last", "phase") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different ways of naming the members; give one")
        if self.steps is not None and len(set(self.steps)) != len(self.steps):
            raise ValueError(f"a step is named twice in {list(self.steps)}")
        if self.shares is not None and (sum(self.shares) <= 0 or min(self.shares) < 0):
            raise ValueError(f"shares {list(self.shares)} must not be negative, and not all zero")
        return self


class SwaSettings(Selection):
    """A linear blend of the members' raw weights with the final EMA."""

    ema_share: float = Field(0.0, description="share of the final EMA; the rest is the members'")
    allow_different: tuple[str, ...] = Field((), description="config keys in which the members may differ")

    @property
    def selection(self) -> Selection:
        """The members alone."""
        return Selection(**self.model_dump(include=set(Selection.model_fields)))


class ProfileSettings(Settings):
    """Step at which a post-hoc average ends, and the largest error allowed of its profile."""

    end_step: int | None = Field(None, description="the step at which the average ends; the checkpoint's by default")
    max_error: float = Field(MAX_ERROR, description="largest accepted reconstruction error of the profile, as a share")


class PowerSettings(ProfileSettings):
    """A power-function average."""

    sigma: float = Field(description="width of the profile, as a share of the run")


class HalfLifeSettings(ProfileSettings):
    """An exponential average."""

    half_life_steps: float = Field(description="half-life, in steps")


class SearchSettings(Settings):
    """Settings of a search for the best blend: the text it reads, and the certainty of its choice."""

    max_tokens: int = Field(
        262144, ge=2, description="Score each candidate on at most this many tokens, drawn from the text"
    )
    level: float = Field(0.95, gt=0, lt=1, description="Confidence of the whole search, as a probability")
    tolerance: float = Field(
        0.0001, ge=0, description="Drop candidates that are better than the leader by no more than this, in bpb"
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the order in which windows are drawn")
