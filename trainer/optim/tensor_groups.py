"""Tensors that step in a way of their own: the recipe's tables `optim.groups`, matched by name.

A group changes what the optimizer does with the tensors whose names its glob takes: another learning rate or decay, the
other method, or no step at all for a part of the run (layer freezing: Brock et al. 2017, arXiv:1706.04983). A frozen
tensor's gradient is dropped before the step, so neither moments nor decay touch it. Without groups nothing here runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings
from trainer.schedule.points import LARGEST_RATE

Method = Literal["muon", "adamw"]


class TensorGroupSettings(Settings):
    """One table `[[optim.groups]]`. What is left out stays as it is for other tensors of the kind."""

    match: str = Field(min_length=1, description='glob on tensor names, for example "blocks.0.*" or "*.mlp.*"')
    lr_scale: float = Field(1.0, gt=0, le=LARGEST_RATE, description="factor of the learning rate")
    freeze_until: float | None = Field(None, gt=0, le=1, description="progress before which the tensors do not step")
    freeze_from: float | None = Field(None, ge=0, lt=1, description="progress from which the tensors do not step")
    weight_decay: float | None = Field(None, ge=0, description="weight decay, times the learning rate")
    method: Method | None = Field(None, description="muon (matrices only) or adamw")

    @model_validator(mode="after")
    def _steps_at_all(self) -> TensorGroupSettings:
        if self.freeze_until is not None and self.freeze_from is not None and self.freeze_from <= self.freeze_until:
            raise ValueError(
                f"freeze_from {self.freeze_from:g} is not after freeze_until {self.freeze_until:g}, so that nothing "
                "is trained in between; freeze_from = 0 alone freezes for the whole run"
            )
        return self


@dataclass(frozen=True)
class StepGroup:
    """Parameters that step alike, with their peaks, which the schedule multiplies."""

    label: str  # the kind of tensor, and the globs where it is not as the kind has it
    names: tuple[str, ...]
    method: Method
    lr: float
    weight_decay: float
    freeze_until: float | None = None  # progress
    freeze_from: float | None = None  # progress

    def is_frozen(self, at: float) -> bool:
        """Return whether the parameters do not step at progress `at`."""
        before = self.freeze_until is not None and at < self.freeze_until
        return before or (self.freeze_from is not None and at >= self.freeze_from)


def claim(names: Sequence[str], groups: Sequence[TensorGroupSettings]) -> dict[str, TensorGroupSettings]:
    """Return name → the group that matches it. Raises SettingsError for a group without tensors, or a tensor of two."""
    claimed: dict[str, TensorGroupSettings] = {}
    for number, group in enumerate(groups):
        matched = [name for name in names if fnmatchcase(name, group.match)]
        if not matched:
            raise SettingsError(
                f'optim.groups[{number}].match = "{group.match}" matches none of the {len(names)} tensors of the model',
                hint=f"names are like {', '.join(names[:: max(len(names) // 4, 1)])}; * stands for anything",
            )
        for name in matched:
            if name in claimed:
                raise SettingsError(
                    f'optim.groups: tensor {name} is matched by "{claimed[name].match}" and by "{group.match}"; it can '
                    "be in one group",
                    hint="make one of the two narrower",
                )
            claimed[name] = group
    return claimed


def split(
    kinds: Sequence[StepGroup],
    parameters: Mapping[str, Tensor],
    groups: Sequence[TensorGroupSettings],
) -> list[StepGroup]:
    """Divide kinds of tensors by what the groups say of them; tensors of a kind that step alike stay together.

    Raises SettingsError for a group without tensors, a tensor of two groups, and Muon for a tensor that is no matrix.
    """
    claimed = claim([name for kind in kinds for name in kind.names], groups)
    divided: dict[StepGroup, list[str]] = {}  # what they have in common, the label left as the kind's → names
    globs: dict[StepGroup, dict[str, None]] = {}  # of the groups that made them so, in order
    for kind in kinds:
        for name in kind.names:
            own = replace(kind, names=())
            if group := claimed.get(name):
                _require_matrix(name, parameters[name], group)
                changed = _as_group(own, group)
                if changed != own:
                    globs.setdefault(changed, {})[group.match] = None
                own = changed
            divided.setdefault(own, []).append(name)
    return [
        replace(own, label=" ".join((own.label, *globs.get(own, ()))), names=tuple(names))
        for own, names in divided.items()
    ]


def _as_group(own: StepGroup, group: TensorGroupSettings) -> StepGroup:
    return replace(
        own,
        method=group.method or own.method,
        lr=own.lr * group.lr_scale,
        weight_decay=own.weight_decay if group.weight_decay is None else group.weight_decay,
        freeze_until=group.freeze_until,
        freeze_from=group.freeze_from,
    )


def _require_matrix(name: str, parameter: Tensor, group: TensorGroupSettings) -> None:
    if group.method == "muon" and parameter.ndim != 2:
        raise SettingsError(
            f'optim.groups: method "muon" of "{group.match}" needs matrices; {name} has shape {tuple(parameter.shape)}',
            hint='take "adamw", or a narrower glob such as "*.weight"',
        )


def freeze_moments(groups: Sequence[TensorGroupSettings]) -> dict[str, tuple[str, float]]:
    """Return row of a dry run → key and progress at which tensors begin or cease to step, within the run."""
    keys = ("freeze_until", "freeze_from")
    found = [(key, share) for key in keys for group in groups if (share := getattr(group, key)) and share < 1]
    return {f"{key}@{share:g}": (f"optim.groups {key}", share) for key, share in found}


def in_words(group: StepGroup, num_parameters: int) -> str:
    """Return in one line how a group steps."""
    moments = [f"until {group.freeze_until:g}"] if group.freeze_until is not None else []
    moments += [f"from {group.freeze_from:g} on"] if group.freeze_from is not None else []
    frozen = f", frozen {' and '.join(moments)}" if moments else ""
    return (
        f"{group.label}: {len(group.names)} tensors of {num_parameters:,} parameters, {group.method}, peak learning "
        f"rate {group.lr:g}, weight decay {group.weight_decay:g}{frozen}"
    )
