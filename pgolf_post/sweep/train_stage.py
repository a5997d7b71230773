"""Settings of trials that train: the recipe and its changes, the seeds it is trained with, the rungs of a halving.

A training is known by what decides its weights. Settings that came later are left out of what is written where they
are off, so that ids of older rows stay.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pgolf_post.settings import Settings

SEED_KEY = "run.seed"


class Length(Settings):
    """A training's length, one of two."""

    seconds: float | None = Field(None, gt=0, description="Length in seconds, instead of the recipe's.")
    steps: int | None = Field(None, ge=1, description="Length in steps, instead of the recipe's.")

    @model_validator(mode="after")
    def _one_length(self) -> Length:
        if self.seconds is not None and self.steps is not None:
            raise ValueError("seconds and steps are two ways of saying how long; give one")
        return self


class TrainStage(Length):
    """Training as the first stage: the trainer's own recipe, run as a process of its own."""

    recipe: str = Field(description="TOML file of the recipe.")
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of the recipe.")
    seeds: tuple[int, ...] = Field((), description="Train once with each of these seeds; verdicts are over them.")
    processes: int = Field(1, ge=1, description="Processes that share a training, under torchrun, one per GPU.")

    @model_validator(mode="after")
    def _own_seeds(self) -> TrainStage:
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must differ and be at least 0, got {list(self.seeds)}")
        if self.seeds and any(change.partition("=")[0].strip() == SEED_KEY for change in self.set):
            raise ValueError(f"seeds and {SEED_KEY} in set are two ways of saying which; give one")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for key in ("seeds", "processes"):
            if key in written and getattr(self, key) == type(self).model_fields[key].default:
                del written[key]
        return written

    def with_seed(self, seed: int) -> TrainStage:
        """Return the training with this one seed."""
        return self.model_copy(update={"seeds": (), "set": (*self.set, f"{SEED_KEY}={seed}")})

    def at_rung(self, rung: Rung) -> TrainStage:
        """Return the training at a rung's length, with its first so many seeds."""
        return self.model_copy(update={"seconds": rung.seconds, "steps": rung.steps, "seeds": self.seeds[: rung.seeds]})


class Rung(Length):
    """One rung: how long every trial that reached it is trained, and with how many of its seeds."""

    seeds: int = Field(1, ge=1, description="The first so many of the trial's seeds.")

    @model_validator(mode="after")
    def _some_length(self) -> Rung:
        if self.seconds is None and self.steps is None:
            raise ValueError("a rung needs a length: seconds or steps")
        return self


class Halving(Settings):
    """Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) over the length of trainings and their seeds."""

    rungs: tuple[Rung, ...] = Field(min_length=2, description="From the shortest to the longest.")
    keep: float = Field(0.5, gt=0, lt=1, description="Share of a rung's trials that go on to the next, rounded up.")

    @model_validator(mode="after")
    def _rising(self) -> Halving:
        for key in ("seconds", "steps"):
            lengths = [getattr(rung, key) for rung in self.rungs]
            if None in lengths and set(lengths) != {None}:
                raise ValueError("rungs are all in seconds or all in steps")
            if None not in lengths and lengths != sorted(set(lengths)):
                raise ValueError(f"rungs must get longer, got {key} {lengths}")
        return self

    def kept(self, trials: int) -> int:
        """Return how many of so many trials go on."""
        return math.ceil(self.keep * trials)
