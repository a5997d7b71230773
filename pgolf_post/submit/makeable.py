"""Refusals of a whole form: wishes of a recipe that no script has, in one table, and steps of a fit, in another.

A script that trains has plain parts of the trainer and of the toolkit only. What it would leave out is refused by name
before anything is made, so that no script trains another model than the run did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pgolf_post.errors import SettingsError
from pgolf_post.submit.seeds import Seed

ANOTHER_ARTIFACT = "make the whole form from an artifact without it, or the eval form: leave --recipe out"
EVAL_FORM = "make the eval form: leave --recipe out"
WITHOUT_RECIPE = "submit without --recipe: the artifact and code that reads it"


class Lacking(NamedTuple):
    """A wish of recipes that no script has."""

    asked: Callable[[Any], str]  # the recipe → its own keys that ask for it; empty: it does not
    reason: str  # begins after those keys
    hint: str = WITHOUT_RECIPE


def _started(key: str, value: str) -> Callable[[Any], str]:
    return lambda recipe: f'model.{key} = "{value}"' if getattr(recipe.model, key, None) == value else ""


def _qat(settings: Any) -> str:
    return f"qat.plan {settings.plan}" if settings.plan else f"qat.mode {settings.mode}"


FROM_TEXT = " starts from the training text, which is not part of a script"

LACKING = (
    Lacking(
        lambda recipe: ", ".join(f"loss.{key}" for key in recipe.loss.settings_on()) if recipe.loss.is_on else "",
        ": a script that trains minimises plain nats",
    ),
    Lacking(
        lambda recipe: f"init.checkpoint {recipe.init.checkpoint}" if recipe.init.is_on else "",
        ": a script that trains starts from its own init, and that model's weights are no part of it",
    ),
    Lacking(
        lambda recipe: "optim.groups" if recipe.optim.groups else "",
        ": a script that trains steps all tensors of a kind alike",
    ),
    Lacking(
        lambda recipe: "schedule.stages" if recipe.schedule.stages else "",
        ": a script that trains has steps and windows of one size",
    ),
    Lacking(
        lambda recipe: "meta_ttt" if recipe.meta_ttt is not None else "",
        ": a script that trains does not adapt on the way",
    ),
    Lacking(
        lambda recipe: _qat(recipe.qat) if recipe.qat is not None else "",
        ": a script that trains does not round weights on the way",
    ),
    Lacking(_started("qk_init", "cooccurrence"), FROM_TEXT, EVAL_FORM),
    Lacking(_started("output_bias", "unigram"), FROM_TEXT, EVAL_FORM),
    Lacking(
        lambda recipe: "" if recipe.run.kernels in ("auto", "eager") else "run.kernels",
        ": fused kernels are not part of a script",
        "--set run.kernels=eager",
    ),
)

STEPS_OF_A_FIT = {  # key of the artifact's settings → the step that it stands for
    "tune": "blocks fine-tuned between roundings (--tune-tokens)",
    "distill": "floats tuned by distillation (--distill)",
    "jitter_seed": "rows moved at random by a sweep",
}


def is_fitted(seed: Seed) -> bool:
    """Return whether an artifact was made by `fit`."""
    return seed.settings.get("plan") == "fit"


def require_makeable(seed: Seed, recipe: Any) -> None:
    """Raise SettingsError for the first thing that an artifact or a recipe asks for and no whole form does."""
    if is_fitted(seed):
        _require_plain_fit(seed)
    if seed.settings.get("sequential") or seed.settings.get("distill"):
        raise SettingsError(f"{seed.artifact}: a sequential or distilled plan is not part of a script")
    for row in LACKING:
        if asked := row.asked(recipe):
            raise SettingsError(asked + row.reason, hint=row.hint)
    _require_training_text(seed)


def _require_plain_fit(seed: Seed) -> None:
    for key, step in STEPS_OF_A_FIT.items():
        if seed.settings.get(key):
            raise SettingsError(f"{seed.artifact} has {step}, which is not part of a script", hint=ANOTHER_ARTIFACT)
    if set(seed.manifest["lineage"]) != {"checkpoint_id", "stats_id"}:
        stale = f"{seed.artifact}: its statistics are of other weights (--allow-stale)"
        raise SettingsError(stale, hint=ANOTHER_ARTIFACT)


def _require_training_text(seed: Seed) -> None:
    """Raise SettingsError for statistics of other text than a script reads."""
    source = seed.stats_settings().get("source", "train")
    if source != "train":
        raise SettingsError(
            f"{seed.artifact}: its statistics are of text of source {source!r}, and a script reads training text",
            hint=ANOTHER_ARTIFACT,
        )
