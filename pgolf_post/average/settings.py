"""What an average is made of, and how a search for the best one is run, as settings."""

from __future__ import annotations

from pydantic import Field, model_validator

from pgolf_post.settings import Settings


class Selection(Settings):
    """One way of naming members. Nothing given: from warm-down start on."""

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


class SearchSettings(Settings):
    """How much to look at, and how sure to be."""

    max_tokens: int = Field(262144, ge=2, description="sample of the text that a candidate is scored on at most")
    level: float = Field(0.95, gt=0, lt=1, description="confidence of the whole search")
    tolerance: float = Field(0.0001, ge=0, description="a difference in bpb that is not worth telling apart")
    seed: int = Field(0, ge=0, description="of the order in which windows are drawn")
