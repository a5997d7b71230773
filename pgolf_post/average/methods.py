"""The averages that there are: one file and one row of `AVERAGES` each.

Every method makes a checkpoint beside the run's own: from the final checkpoint of a run, its own settings and the data
on which the metric is recorded. `swa-blend --method NAME --set KEY=VALUE` reaches each of them by its name here.
Blends of any checkpoints by name (`linear.linear_blend`) do not start from a run and are not in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pgolf_post.average import linear, posthoc
from pgolf_post.average.settings import HalfLifeSettings, PowerSettings, SwaSettings
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings, parse_settings


class Method(NamedTuple):
    """One way to average the weights of a run."""

    make: Callable[[Checkpoint, Any, DataFolder], tuple[Checkpoint, bool]]  # the average, whether it was there already
    settings: type[Settings]
    reads: str
    source: str


AVERAGES: dict[str, Method] = {
    # name: Method(make, settings, reads, source)
    "swa": Method(
        linear.swa, SwaSettings,
        "the run's checkpoints, raw; the final EMA if it has a share",
        "Izmailov et al. 2018, arXiv 1803.05407",
    ),
    "power-ema": Method(
        posthoc.power_ema, PowerSettings,
        "the run's snapshots (optim.power_ema_sigmas)",
        "Karras et al. 2024, arXiv 2312.02696, section 3",
    ),
    "half-life-ema": Method(
        posthoc.half_life_ema, HalfLifeSettings,
        "the run's snapshots (optim.power_ema_sigmas)",
        "an exponential profile by the least squares of arXiv 2312.02696, section 3",
    ),
}  # fmt: skip


def get_method(name: str) -> Method:
    """Return a method by name. Raises SettingsError listing the names."""
    if name not in AVERAGES:
        raise SettingsError(f"unknown average {name!r}; known: {', '.join(AVERAGES)}")
    return AVERAGES[name]


def make_average(final: Checkpoint, name: str, given: Mapping[str, Any], data: DataFolder) -> tuple[Checkpoint, bool]:
    """Return an average of the run that ends at `final`, as a checkpoint, and whether it was there already.

    Raises SettingsError for an unknown name, key or value, and what the method raises.
    """
    method = get_method(name)
    return method.make(final, parse_settings(method.settings, given, f"average {name}"), data)
